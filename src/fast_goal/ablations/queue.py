"""DVC's experiment queue, by its command line: each experiment runs in a temporary folder, from the commit and its settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from fast_goal.errors import FastGoalError
from fast_goal.files import read_json
from fast_goal.tracking.identity import PIPELINE_VARIABLE

TARGET = "evaluate"  # the step whose report is read; what it does not need is not run
FINISHED = re.compile(r"refs/exps/[0-9a-f]{2}/[0-9a-f]+/([^/]+)")
KILL_SECONDS = 20  # for DVC to see that a run it killed is dead
# DVC keeps experiments as commits; where git has been told no name, they get this one
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "fast-goal"), ("EMAIL", "fast-goal@localhost"))
}
LAST_LINES = 5  # of a failed experiment, in its reason


@dataclass(frozen=True)
class Status:
    """The queue: name -> Queued, Running, Failed, Success; and the worker processes, at work or idle."""

    tasks: dict[str, str]
    workers: int


class Queue:
    """The queue of the project at `root`. `environment` is added to that of the experiments."""

    def __init__(self, root: Path, environment: Mapping[str, str] | None = None):
        self.root = root
        inherited = {name: value for name, value in os.environ.items() if name != PIPELINE_VARIABLE}
        # this interpreter's `fast-goal` and `dvc`; the code is that of the commit, wherever the package is installed
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        code = os.pathsep.join(filter(None, ["src", os.environ.get("PYTHONPATH")]))
        base = {**IDENTITY, **inherited} if not self._has_identity() else inherited
        self._environment = {**base, "PATH": path, "PYTHONPATH": code, "DVC_NO_ANALYTICS": "1", **(environment or {})}

    def _has_identity(self) -> bool:
        asked = [["git", "config", key] for key in ("user.name", "user.email")]
        return all(subprocess.run(words, cwd=self.root, capture_output=True).returncode == 0 for words in asked)

    def finished(self) -> dict[str, str]:
        """The commits of all finished experiments, by name."""
        listed = self.git("for-each-ref", "--format=%(refname) %(objectname)", "refs/exps")
        found = {}
        for line in listed.splitlines():
            reference, commit = line.split()
            if matched := FINISHED.fullmatch(reference):
                found[matched[1]] = commit
        return found

    def add(self, name: str, settings: Sequence[str]) -> None:
        """Queues an experiment."""
        told = [part for setting in settings for part in ("-S", setting)]
        self._dvc("exp", "run", "--queue", "--name", name, *told, TARGET)

    def start(self, jobs: int) -> None:
        """Starts workers, which live until the queue is empty."""
        self._dvc("queue", "start", "--jobs", str(jobs))

    def status(self) -> Status:
        """What is in the queue."""
        tasks, workers, lives = {}, 0, False
        for line in self._dvc("queue", "status").splitlines():
            parts = line.split()
            if parts[:2] == ["Worker", "status:"]:
                workers = sum(int(number) for number in re.findall(r"\d+", line))
            elif len(parts) >= 4 and re.fullmatch(r"[0-9a-f]{7,}", parts[0]):
                tasks.setdefault(parts[1], parts[-1])  # the latest one of a name comes first
                lives |= parts[-1] == "Running" and self._lives(parts[0])
        return Status(tasks, max(workers, int(lives), self._living_workers()))  # one at work does not always answer DVC

    def log(self, name: str) -> list[str]:
        """What an experiment has printed so far, the lines that are not empty."""
        try:
            return [line.strip() for line in self._dvc("queue", "logs", name).splitlines() if line.strip()]
        except FastGoalError:
            return []

    def step(self, name: str) -> str:
        """The step that a running experiment is at."""
        steps = [found[1] for line in self.log(name) if (found := re.search(r"Running stage '([^']+)'", line))]
        return steps[-1] if steps else "starting"

    def reason(self, name: str) -> str:
        """Why an experiment failed: its last lines."""
        lines = [line for line in self.log(name) if not line.startswith(("WARNING", "Reproducing"))]
        said = [line for line in lines if line.startswith("fast-goal:")]
        return " / ".join(said[-1:] or lines[-LAST_LINES:]) or "DVC kept no output of it"

    def drop(self, names: Sequence[str]) -> None:
        """Takes experiments off the queue: kills those that run, forgets the others."""
        tasks = self.status().tasks
        left = [name for name in names if tasks.get(name, "Running") != "Running"]
        if left:
            self._dvc("queue", "remove", *left)
        running = [name for name in names if tasks.get(name) == "Running"]
        if not running:
            return
        with suppress(FastGoalError):  # of a worker that is gone
            self._dvc("queue", "kill", *running)
        end = time.monotonic() + KILL_SECONDS
        while left := sorted({*running} & {*self.status().tasks}):
            with suppress(FastGoalError):  # DVC takes a moment to see that it is dead
                self._dvc("queue", "remove", *left)
            if time.monotonic() > end:
                return
            time.sleep(1)

    def file(self, commit: str, path: str) -> str:
        """A file of an experiment: one of git's, or of an output of a step. Raises FastGoalError where there is none."""
        if path in ("params.yaml", "dvc.lock"):
            return self.git("show", f"{commit}:./{path}")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "file"
            self._dvc("get", "--quiet", "--rev", commit, "--out", str(copy), str(self.root), path)
            return copy.read_text(encoding="utf-8")

    def git(self, *arguments: str) -> str:
        """What git prints. Raises FastGoalError."""
        return self._run(["git", *arguments])

    def _dvc(self, *arguments: str) -> str:
        return self._run([sys.executable, "-m", "dvc", *arguments])

    def _run(self, command: list[str]) -> str:
        # files, not pipes: a worker that is started keeps them open. A group of its own: Ctrl-C must not meet DVC while it
        # holds params.yaml, nor a worker
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            code = subprocess.run(
                command,
                cwd=self.root,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
                check=False,
            ).returncode
            said = []
            for stream in (output, errors):
                stream.seek(0)
                said.append(stream.read().decode(errors="replace"))
        if code:
            lines = (said[1].strip() or said[0].strip()).splitlines()
            shown = " ".join(command[2:] if command[0] == sys.executable else command)[:200]
            raise FastGoalError(f"`{shown}` failed: {' '.join(lines[-LAST_LINES:])}")
        return said[0]

    def _living_workers(self) -> int:
        """The worker processes on this machine."""
        count = 0
        for path in (self.root / ".dvc/tmp/exps/celery").glob("dvc-exp-worker-*.json"):
            with suppress(OSError, ValueError, KeyError):
                known = read_json(path)
                count += known["returncode"] is None and psutil.pid_exists(known["pid"])
        return count

    def _lives(self, task: str) -> bool:
        """Whether the process of a task (the beginning of its commit) runs on this machine."""
        for path in (self.root / ".dvc/tmp/exps/run").glob(f"{task}*/*.json"):
            with suppress(OSError, ValueError, KeyError):
                return psutil.pid_exists(read_json(path)["pid"])
        return False
