"""Runs the arms of a table through DVC's queue and writes the table (`fast-goal ablate table=VI`).

A run that has a finished experiment, of this table or another, is not run again, so a study that was killed goes on. Writes
models/ablations/<table>/{table.md,table.csv,table.png,runs.json}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fast_goal.ablations import plan, results, tables
from fast_goal.ablations.plan import Run
from fast_goal.ablations.queue import Queue
from fast_goal.ablations.results import Measured
from fast_goal.ablations.runner import POLL_SECONDS, Runner, check_backup, current_params
from fast_goal.ablations.tables import Table
from fast_goal.configure import check
from fast_goal.environment import WORK, WORK_SHARED_VARIABLE, WORK_VARIABLE, termination_raises
from fast_goal.errors import ConfigError, DataError, FastGoalError
from fast_goal.files import digest, read_json, write_json
from fast_goal.tracking.groups import Group

OUTPUT = Path("models/ablations")
REPORT, FINETUNE = "models/reports/metrics.json", "models/finetune/metrics.json"
LOCK = WORK / "ablation.lock"
COMMITTED = ("src", "dvc.yaml")  # what must be as committed


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command was told. overrides: for all arms."""

    table: Table
    experiment: str
    seeds: list[int]
    arms: list[str]
    overrides: list[str]

    @property
    def command(self) -> str:
        """The command that asks this."""
        parts = [f"table={self.table.name}", f"experiment={self.experiment}", f"seeds={_list(self.seeds)}"]
        parts += [f"arms={_list(self.arms)}"] if self.arms != list(self.table.arms) else []
        return "fast-goal ablate " + " ".join([*parts, *self.overrides])


def parse(words: Sequence[str]) -> Asked:
    """The words of the command: table=, seeds=, arms=, experiment=, and KEY=VALUE for all arms.

    Raises ConfigError for an unknown table or arm, and for seeds that are not whole numbers.
    """
    told: dict[str, Any] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: expected table=NAME, seeds=[0,1,2], arms=[NAME,...], experiment=NAME or KEY=VALUE")
        if key == "seed":
            raise ConfigError(f"{word}: several are asked for together, as in seeds=[0,1,2]")
        if key in ("seeds", "arms"):
            found = yaml.safe_load(value)
            told[key] = found if isinstance(found, list) else [found]
        elif key in ("table", "experiment"):
            told[key] = value
        else:
            overrides.append(word)
    if "table" not in told:
        raise ConfigError(f"table= is missing: one of {', '.join(tables.names())}")
    table = tables.load(told["table"])
    seeds, arms = told.get("seeds", table.seeds), told.get("arms", list(table.arms))
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"seeds = {seeds}: expected whole numbers, as in seeds=[0,1,2]")
    if unknown := [arm for arm in arms if arm not in table.arms]:
        raise ConfigError(f"arms = {unknown}: table {table.name} has {', '.join(table.arms)}")
    return Asked(table, told.get("experiment", table.experiment), seeds, arms, overrides)


def ablate(words: Sequence[str], jobs: int = 1, dry_run: bool = False) -> str:
    """The command, in the current folder (the project's). Returns what is to be printed."""
    told, root = parse(words), Path.cwd()
    if dry_run:
        return "\n".join(Study(told, Queue(root)).preview())
    try:
        with FileLock(root / LOCK, timeout=0), termination_raises():
            check_project(Queue(root))
            group = Group.open(f"ablation {told.table.name}", {"table": told.table.name, "experiment": told.experiment})
            shared = {WORK_VARIABLE: str((root / WORK).absolute()), WORK_SHARED_VARIABLE: "caches" if jobs > 1 else "all"}
            study = Study(told, Queue(root, {**group.environment, **shared}), jobs)
            return (run_in(group, study) / "table.md").read_text(encoding="utf-8")
    except Timeout:
        raise ConfigError(f"another `fast-goal ablate` is at work here ({root / LOCK})") from None


def run_in(group: Group, study: Study) -> Path:
    """Runs the study below a run of the tracking."""
    status = "FAILED"
    try:
        folder = study.run()
        status = "FINISHED"
        return folder
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        known = group.experiments()
        for name, (metrics, tags) in study.children().items():
            if name not in known:
                group.add(name, metrics, tags)
        group.close(status, sorted(study.folder.glob("*.*")))


class Study:
    """One call of the command. `say` tells how far it is."""

    def __init__(
        self, asked: Asked, queue: Queue, jobs: int = 1, say: Callable[[str], None] | None = None, poll: float = POLL_SECONDS
    ):
        self.asked = asked
        self.folder = queue.root / OUTPUT / asked.table.name
        self._queue = queue
        self._code = code_digest(queue)
        self._runs: dict[tuple[str, int], Run] = {}  # by arm and seed, in order
        self._done: dict[tuple[str, int], Measured] = {}
        self._known = {name.rpartition("-")[2]: name for name in queue.finished()}  # by key
        self._notes: dict[str, None] = {}  # what is left out, in order
        say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self._runner = Runner(queue, f"ablation {asked.table.name}", jobs, say, poll)

    def run(self) -> Path:
        """Runs what is missing and writes the table; returns its folder. Raises FastGoalError where runs failed."""
        first = self._first()
        try:
            self._finish(first, ahead=len(self._timed()) * len(self.asked.seeds))
            self._finish(self._second())
        finally:
            if self._done:
                self._write()
        failed = self._runner.failed
        if failed or not self._done:
            why = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
            raise FastGoalError(
                f"{len(failed)} runs failed. {self.folder / 'table.md'} has the others; again: the same command.{why}"
            )
        return self.folder

    def preview(self) -> list[str]:
        """What would be run, and with which settings."""
        finished, lines = self._queue.finished(), []
        for run in self._first():
            done = run.name in finished
            lines.append(f"{run.name}  {'done' if done else 'to run'}: {' '.join(run.overrides)}")
            if not done:
                changed = plan.settings(run.values, current_params(self._queue.root))
                lines.append("    " + (" ".join(f"-S {setting}" for setting in changed) or "params.yaml as it is"))
        for arm in self._timed():
            described = self.asked.table.arms[arm]
            lines.append(f"{arm}: as {described.like}, for as long as {described.equal_compute} takes, once that is measured")
        return [*lines, *self._notes]

    def children(self) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
        """The numbers of every finished run and what it is, by its name."""
        found = {}
        for place, run in self._done.items():
            modes = [row for row in self.asked.table.rows if row.arm == run.arm and row.mode]
            metrics = {}
            for dataset in (key for key, value in run.report.items() if isinstance(value, Mapping)):
                for row in (tables.Row("", run.arm, "finetuned", "long"), *modes):
                    for column in self.asked.table.columns:
                        value = results.lookup(run.report, run.finetune, dataset, row, column)
                        if value is not None:
                            name = ".".join(part for part in (dataset, row.mode, column.label) if part)
                            metrics[name.replace("@", "").replace(" ", "_")] = value
            found[self._runs[place].name] = metrics, {"arm": run.arm, "seed": str(run.seed), "table": self.asked.table.name}
        return found

    def _timed(self) -> list[str]:
        return [arm for arm in self.asked.arms if self.asked.table.arms[arm].equal_compute]

    def _first(self) -> list[Run]:
        """The runs that need no others. The arms of a seed share its base: one arm of each seed comes first, so that no two
        runs that go on at once make the same base; then one seed after the other."""
        arms = self.asked.table.arms
        needed = [other for arm in self._timed() for other in (arms[arm].like, arms[arm].equal_compute) if other]
        wanted = list(dict.fromkeys(arm for arm in [*self.asked.arms, *needed] if not arms[arm].equal_compute))
        order = [(seed, arm) for arm in wanted[:1] for seed in self.asked.seeds]
        order += [(seed, arm) for seed in self.asked.seeds for arm in wanted[1:]]
        return [run for seed, arm in order for run in self._plan(arm, seed)]

    def _second(self) -> list[Run]:
        """The runs that are to take as long as others have."""
        made: list[Run] = []
        for seed in self.asked.seeds:
            by_arm = {run.arm: run for run in self._done.values() if run.seed == seed}
            for arm in self._timed():
                described = self.asked.table.arms[arm]
                own, other = by_arm.get(described.like or ""), by_arm.get(described.equal_compute or "")
                if own is None or other is None:
                    self._notes[f"{arm}, seed {seed}: {described.like} and {described.equal_compute} have to be run first"] = (
                        None
                    )
                    continue
                training = own.params.finetune
                epochs = plan.equal_compute_epochs(training.epochs, other.step_seconds, own.step_seconds)
                made += self._plan(arm, seed, [f"finetune.epochs={epochs}"])
        return made

    def _plan(self, arm: str, seed: int, more: Sequence[str] = ()) -> list[Run]:
        told = plan.overrides_of(self.asked.table, arm, self.asked.experiment, [*self.asked.overrides, *more])
        if told is None:
            known = ", ".join(self.asked.table.arms[arm].experiments)
            self._notes[f"{arm}: not with experiment={self.asked.experiment}, only with {known}"] = None
            return []
        run = plan.make_run(arm, seed, told, self._code, self._queue.root)
        run = dataclasses.replace(run, experiment=self._known.get(run.key))
        self._runs[arm, seed] = run
        return [run]

    def _finish(self, runs: Sequence[Run], ahead: int = 0) -> None:
        try:
            self._runner.finish(runs, ahead)
        finally:
            self._collect(runs)

    def _collect(self, runs: Sequence[Run]) -> None:
        """Reads what the finished runs measured; what an earlier call read is in runs.json."""
        finished, path = self._queue.finished(), self.folder / "runs.json"
        known = {entry["name"]: entry for entry in read_json(path)["runs"]} if path.is_file() else {}
        for run in runs:
            commit = finished.get(run.name)
            if commit is None:
                continue
            entry = known.get(run.name, {})
            if entry.get("commit") != commit:
                try:
                    entry = self._read(run, commit)
                except FastGoalError as error:
                    self._runner.failed[run.name] = str(error)
                    continue
            known[run.name] = entry
            self._done[run.arm, run.seed] = Measured(run.arm, run.seed, check(run.values), entry["report"], entry["finetune"])
        write_json(path, {"command": self.asked.command, "runs": list(known.values())})

    def _read(self, run: Run, commit: str) -> dict[str, Any]:
        made = yaml.safe_load(self._queue.file(commit, "params.yaml"))
        if plan.canonical(made) != plan.canonical(run.values):
            wrong = " ".join(plan.settings(run.values, made))
            raise DataError(f"the experiment's params.yaml is not what was asked for: it lacks {wrong}")
        return {
            "name": run.name,
            "arm": run.arm,
            "seed": run.seed,
            "overrides": run.overrides,
            "commit": commit,
            "report": json.loads(self._queue.file(commit, REPORT)),
            "finetune": json.loads(self._queue.file(commit, FINETUNE)),
        }

    def _write(self) -> None:
        head, done = self._queue.git("rev-parse", "--short", "HEAD").strip(), list(self._done.values())
        seeds = self.asked.seeds
        over = (
            f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
        )
        about = [f"Made by `{self.asked.command}` at commit {head}. Shares in percent; {over}."]
        lengths = [f"{run.params.finetune.epochs} (seed {run.seed})" for run in done if run.arm in self._timed()]
        if lengths:
            about += ["", f"Equal compute: epochs {', '.join(lengths)}, by the measured seconds of a step."]
        missing = [run.name for place, run in self._runs.items() if place not in self._done]
        problems = [
            *self._notes,
            *(f"{name} failed: {why}" for name, why in self._runner.failed.items()),
            *(f"{name}: not run yet" for name in missing if name not in self._runner.failed),
        ]
        results.write(results.gather(self.asked.table, done, self.asked.arms, about, problems), self.folder)


def check_project(queue: Queue) -> None:
    """Raises ConfigError where an experiment would not be that of a commit, or params.yaml is in danger."""
    check_backup(queue.root)
    current_params(queue.root)
    changed = queue.git("status", "--porcelain", "--untracked-files=all", "--", *COMMITTED).splitlines()
    if changed:
        files = ", ".join(line[3:] for line in changed[:5]) + (" ..." if len(changed) > 5 else "")
        raise ConfigError(
            f"these files are not as committed: {files}. Experiments run from a commit: `git add` and `git commit` them first. "
            "params.yaml may differ."
        )


def code_digest(queue: Queue) -> str:
    """Of the code that DVC's steps depend on, as committed: with another one, a finished run is not the same any more."""
    pipeline = yaml.safe_load(queue.git("show", "HEAD:./dvc.yaml"))
    listed = [dep for stage in pipeline["stages"].values() for dep in stage.get("deps", [])]
    # with the sources of data, which a variable of dvc.yaml stands for
    paths = sorted({"dvc.yaml", "src/fast_goal/data", *(dep for dep in listed if dep.startswith("src/") and "$" not in dep)})
    return digest(queue.git("rev-parse", *(f"HEAD:./{path}" for path in paths)).split())


def _list(values: Sequence[object]) -> str:
    return f"[{','.join(map(str, values))}]"
