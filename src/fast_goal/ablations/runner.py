"""Brings experiments through DVC's queue, and tells how far they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fast_goal.ablations.plan import Run, settings
from fast_goal.ablations.queue import Queue
from fast_goal.config import PARAMS_FILE
from fast_goal.environment import WORK
from fast_goal.errors import ConfigError
from fast_goal.files import write_text
from fast_goal.progress import clock

BACKUP = WORK / "params.before_ablation.yaml"
POLL_SECONDS = 5.0
STATUS_EVERY = 4  # looks for finished experiments between two at the queue, which costs a second of one core
TELL_SECONDS = 120.0  # between two lines that say the same
PATIENCE = 3  # looks at a queue with too few workers until they are started


class Runner:
    """Runs what is missing. `failed`: the names of the runs that failed, and why; `seconds`: of each that ended here."""

    def __init__(self, queue: Queue, title: str, jobs: int, say: Callable[[str], None], poll: float = POLL_SECONDS):
        self.failed: dict[str, str] = {}
        self.seconds: list[float] = []
        self._queue, self._title, self._jobs, self._say, self._poll = queue, title, jobs, say, poll

    def finish(self, runs: Sequence[Run], ahead: int = 0) -> None:
        """Queues the runs that are neither finished nor in the queue, and waits for all of them; `ahead` more are to come.

        After an interrupt those that are left are taken off the queue.
        """
        finished = self._queue.finished()
        waiting = {run.name: run for run in runs if run.name not in finished}
        reused = len(runs) - len(waiting)
        if reused:
            self._say(f"{self._title}: {reused} of {len(runs)} runs are finished already")
        if not waiting:
            return
        try:
            tasks = self._queue.status().tasks
            stale = [name for name in waiting if tasks.get(name) in ("Failed", "Success")]
            if stale:
                self._queue.drop(stale)
            for number, run in enumerate(waiting.values(), 1):
                if tasks.get(run.name) not in ("Queued", "Running"):
                    self._say(f"{self._title}: queueing {run.name}, {number} of {len(waiting)}")
                    self._add(run)
            self._wait(waiting, len(runs), ahead)
        except (KeyboardInterrupt, SystemExit):
            self._say(f"{self._title}: interrupted; the runs that are left are taken off the queue")
            self._queue.drop([name for name in waiting if name not in self._queue.finished()])
            raise

    def _wait(self, waiting: dict[str, Run], total: int, ahead: int) -> None:
        looks, idle, told, begin, now_at = 0, 0, "", time.monotonic(), 0.0
        while waiting:
            ended = [name for name in self._queue.finished() if name in waiting]
            if not ended and looks % STATUS_EVERY:
                looks += 1
                time.sleep(self._poll)
                continue
            looks += 1
            for name in ended:
                del waiting[name]
                self.seconds.append((time.monotonic() - begin) * self._jobs)
                begin = time.monotonic()
            status = self._queue.status()
            for name in [name for name in waiting if status.tasks.get(name, "Failed") in ("Failed", "Success")]:
                if name in self._queue.finished():
                    continue  # since we looked
                gone = name not in status.tasks
                self.failed[name] = "it was taken off the queue" if gone else self._queue.reason(name)
                self._say(f"{self._title}: {name} failed: {self.failed[name]}")
                del waiting[name]
            idle = idle + 1 if status.workers < min(self._jobs, len(waiting)) else 0
            if (idle == 1 and looks == 1) or idle >= PATIENCE:
                running = [name for name in waiting if status.tasks.get(name) == "Running"]
                # DVC's workers read each other's half-written messages, and one of several may die of it (DVC 3.67)
                self._revive([] if status.workers else running, waiting)
                idle = 0
            line = self._line(waiting, status.tasks, total, ahead)
            if waiting and (line != told or time.monotonic() - now_at > TELL_SECONDS):
                told, now_at = line, time.monotonic()
                self._say(line)
            if waiting:
                time.sleep(self._poll)
        done = total - len(self.failed)
        self._say(f"{self._title}: {done} of {total} runs done" + (f", {len(self.failed)} failed" if self.failed else ""))

    def _revive(self, orphans: Sequence[str], waiting: Mapping[str, Run]) -> None:
        """Starts workers. What stands as running without one was left by a worker that was killed, and begins anew."""
        if orphans:
            self._queue.drop(orphans)
            for name in orphans:
                self._add(waiting[name])
        self._queue.start(self._jobs)

    def _line(self, waiting: Mapping[str, Run], tasks: Mapping[str, str], total: int, ahead: int) -> str:
        at = [
            f"{run.arm}, seed {run.seed}: {self._queue.step(name)}"
            for name, run in waiting.items()
            if tasks.get(name) == "Running"
        ]
        left = len(waiting) + ahead
        each = statistics.fmean(self.seconds) / self._jobs if self.seconds else None
        parts = [f"{self._title}: {total - len(waiting)}/{total} runs", "; ".join(at), f"{left} left"]
        parts += [f"about {clock(left * each)}"] if each else []
        return "  ".join(filter(None, parts))

    def _add(self, run: Run) -> None:
        with _params_kept(self._queue.root):
            self._queue.add(run.name, list(settings(run.values, current_params(self._queue.root))))


def current_params(root: Path) -> dict[str, Any]:
    """What params.yaml holds. Raises ConfigError."""
    path = root / PARAMS_FILE
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}. `fast-goal configure` writes it; the ablations leave it as it is.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping. `fast-goal configure` writes it.")
    return values


def check_backup(root: Path) -> None:
    """Raises ConfigError where a call was killed in the moment in which DVC held params.yaml."""
    backup, path = root / BACKUP, root / PARAMS_FILE
    if not backup.exists():
        return
    if path.exists() and path.read_bytes() == backup.read_bytes():
        backup.unlink()
        return
    raise ConfigError(
        f"{path} may not be as you left it: an earlier call was killed while DVC changed it. Your version is {backup}: "
        f"`mv {backup} {path}` brings it back, `rm {backup}` keeps the present one."
    )


@contextmanager
def _params_kept(root: Path) -> Iterator[None]:
    """DVC changes params.yaml for a moment as it queues an experiment: a copy is kept, and put back where DVC did not."""
    path, backup = root / PARAMS_FILE, root / BACKUP
    before = path.read_text(encoding="utf-8")
    write_text(backup, before)
    try:
        yield
    finally:
        if not path.exists() or path.read_text(encoding="utf-8") != before:
            write_text(path, before)
        backup.unlink(missing_ok=True)
