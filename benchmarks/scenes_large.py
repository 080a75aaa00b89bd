"""The paper's ablations on a strong base, in pieces that a time limit allows: the experiment `scenes_large`.

    python benchmarks/scenes_large.py --minutes 9    # again and again, until it ends with status 0

Ends with status 0 when all is done, 3 when the time was up and more is to do, 1 after an error. A call goes on where the one
before stopped, also where that was killed. It needs torch, torchvision, timm, open_clip_torch, ultralytics, pysbd and the table
libraries, but neither DVC, MLflow nor Hydra: the settings of every arm stand in scenes_large_params.json, which `--compose`
writes. On a machine that has them, `fast-goal ablate table=VI experiment=scenes_large` is the way.

It runs the steps of the pipeline: data, base (one for all seeds), a choice of the learning rate on the validation split, then
FLISM, fine-tuning and evaluation for each arm and seed. Writes benchmarks/results/scenes_large.{json,md} after each of them.
docs/scenes_large.md says what it asks.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from fast_goal.ablations import plan, results, tables
from fast_goal.ablations.results import Measured
from fast_goal.config import Params
from fast_goal.configure import check, compose
from fast_goal.environment import device, prepare, termination_raises
from fast_goal.files import digest, read_json, write_json, write_text
from fast_goal.objectives import make_objective
from fast_goal.tracking import NullTracker
from fast_goal.tracking.identity import git_commit

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "scenes_large"
COMPOSED = Path(__file__).with_name("scenes_large_params.json")
OUTPUT = ROOT / "benchmarks/results/scenes_large"
WORK = ROOT / ".fast_goal/scenes_large"
TABLES = ("V", "VI", "VII", "VIII", "XIV", "XVI", "XVII")
TUNED = {"global": "global", "fast_goal": "fast_goal"}  # arms of Table VI for which a learning rate is chosen
# sections of the settings that no training follows from
UNTRAINED = ("experiment", "validate", "publish", "evaluate", "register", "gate", "drift")
DONE, MORE = 0, 3  # exit statuses
GRACE = 20.0  # seconds that a training gets to write its state, within the limit; after the limit the process is ended


def main() -> int:
    """Works until the time is up or everything is done."""
    options = arguments()
    if options.compose:
        write_json(COMPOSED, composed())
        return DONE
    prepare()
    limit = options.minutes * 60
    with time_limit(limit), termination_raises():
        begin = time.monotonic()
        study = Study(options)
        try:
            study.run()
        except SystemExit:
            if not limit or time.monotonic() - begin < limit - grace(limit) - 0.5:
                raise
            print(f"scenes_large: time is up; {study.left()} of {study.total} rows are left", file=sys.stderr)
            return MORE
    print(study.output.with_suffix(".md").read_text(encoding="utf-8"))
    return DONE


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0, help="stop before so many are over; 0: no limit")
    parser.add_argument("--tables", nargs="+", default=["VI"], choices=TABLES)
    parser.add_argument("--arms", nargs="+", help="of the tables; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4], help="learning rates to choose from")
    parser.add_argument("--base-seed", type=int, default=0, help="of the base, which all seeds of fine-tuning share")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every arm")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the data, the models and what is half done")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="without suffix")
    parser.add_argument("--compose", action="store_true", help=f"write {COMPOSED.name} (needs Hydra) and do nothing else")
    return parser.parse_args(words)


def composed() -> dict[str, Any]:
    """The settings of every arm of TABLES: the sections in which they differ from the experiment's own."""
    params = compose([f"experiment={EXPERIMENT}"])
    arms: dict[str, Any] = {}
    for name in TABLES:
        table = tables.load(name)
        for arm in table.arms:
            told = plan.overrides_of(table, arm, EXPERIMENT)
            if told is not None:
                own = compose(told)
                arms.setdefault(name, {})[arm] = {key: value for key, value in own.items() if value != params[key]}
    return {"params": params, "arms": arms}


class Study:
    """What the command line asks for, done piece by piece in the folder `work`.

    `work` is a project of its own: data and base as the pipeline has them, and a folder for each training, which sees them by
    links.
    """

    def __init__(self, options: argparse.Namespace):
        self.work, self.output = options.work.absolute(), options.output.absolute()
        self._options = options
        self._known = read_json(COMPOSED)
        self._tables = [tables.load(name) for name in options.tables]
        for name in options.arms or []:
            if not any(name in table.arms for table in self._tables):
                sys.exit(f"--arms {name}: the tables {', '.join(options.tables)} have no such arm")
        self._rates: dict[str, float] = {}
        self._problems: dict[str, None] = {}
        self._done: dict[tuple[str, str, int], Measured] = {}
        self._seconds: dict[str, float] = {}
        arms = sum(len(self._arms(table)) for table in self._tables)
        self.total = arms * len(options.seeds)

    def left(self) -> int:
        """How many trainings of the tables are still to do."""
        return self.total - len(self._done)

    def run(self) -> None:
        """Everything that is not done yet."""
        params = self._params({}, self._options.base_seed)
        with inside(self.work):
            self._download()
            self._base(params)
        if len(self._options.rates) > 1:
            self._tune()
        for timed in (False, True):  # those that are to take as long as others come last
            for seed in self._options.seeds:
                for table in self._tables:
                    for arm in self._arms(table):
                        if (table.arms[arm].equal_compute is not None) == timed:
                            self._arm(table, arm, seed)
        self._write()

    def _arms(self, table: tables.Table) -> list[str]:
        return [arm for arm in self._known["arms"][table.name] if arm in (self._options.arms or table.arms)]

    def _params(self, sections: Mapping[str, Any], seed: int, more: Sequence[str] = ()) -> Params:
        """The settings of an arm: its own sections, those of the command line, the learning rate, `more`."""
        values = copy.deepcopy({**self._known["params"], **sections, "seed": seed})
        rate = self._rates.get("fast_goal" if make_objective(values["objective"]).needs_local else "global")
        rate = rate or self._options.rates[0]
        for setting in [f"finetune.learning_rate={rate!r}", *self._options.set, *more]:
            key, _, value = setting.partition("=")
            *parents, last = key.split(".")
            section = values
            for parent in parents:
                section = section.get(parent, {})
            if last in section:
                section[last] = yaml.safe_load(value)
            elif parents[:2] != ["download", "datasets"]:  # not every arm has each of the data sets
                sys.exit(f"--set {setting}: there is no such setting")
        return check(values)

    def _download(self) -> None:
        """The data of all arms: Table V has a second set."""
        from fast_goal.stages import download

        found = [self._params(sections, 0) for arms in self._wanted().values() for sections in arms.values()]
        sets = {name: values for params in found for name, values in params.download.datasets.items()}
        mark, key = Path("data/done.json"), digest(sets)
        if mark.exists() and read_json(mark)["key"] == key:
            return
        largest = max(found, key=lambda params: len(params.download.datasets))
        begin = time.monotonic()
        download.main(largest, NullTracker())
        write_json(mark, {"key": key, "seconds": time.monotonic() - begin})

    def _wanted(self) -> dict[str, dict[str, Any]]:
        """The sections of every arm that is asked for, by table."""
        return {table.name: {arm: self._known["arms"][table.name][arm] for arm in self._arms(table)} for table in self._tables}

    def _base(self, params: Params) -> None:
        from fast_goal.data.records import load_dataset
        from fast_goal.stages import base

        dataset = load_dataset(params.download.train_dataset).digest
        mark, key = Path("models/base.json"), digest([repr(params.base), dataset, params.seed])
        if mark.exists() and read_json(mark)["key"] == key:
            return
        base.main(params, NullTracker())
        write_json(mark, {"key": key})

    def _tune(self) -> None:
        """Chooses the learning rates by R@1 on the validation split, mean of both directions, with the first seed."""
        seed = self._options.seeds[0]
        for objective, arm in TUNED.items():
            found = {}
            for rate in self._options.rates:
                params = self._params(self._known["arms"]["VI"][arm], seed, [f"finetune.learning_rate={rate!r}"])
                folder = self._train(params, f"{arm}, rate {rate:g}")
                lines = (folder / "models/finetune/history.jsonl").read_text().splitlines()
                last = [record for record in map(json.loads, lines) if "val_text_to_image_R@1" in record][-1]
                found[rate] = statistics.fmean(value for name, value in last.items() if name.startswith("val_"))
            self._rates[objective] = max(found, key=found.__getitem__)
            self._problems[f"{objective}: learning rate {self._rates[objective]:g}; R@1 on val {found}"] = None

    def _arm(self, table: tables.Table, arm: str, seed: int) -> None:
        """One row of a table with one seed."""
        described, more = table.arms[arm], []
        if described.equal_compute is not None:
            own, other = (self._done.get((table.name, name, seed)) for name in (described.like, described.equal_compute))
            if own is None or other is None:
                self._problems[f"{arm}: needs {described.like} and {described.equal_compute} among --arms"] = None
                return
            epochs = plan.equal_compute_epochs(own.params.finetune.epochs, other.step_seconds, own.step_seconds)
            more = [f"finetune.epochs={epochs}"]
        params = self._params(self._known["arms"][table.name][arm], seed, more)
        folder = self._train(params, f"{arm}, seed {seed}, {len(self._done) + 1} of {self.total}")
        report, wanted = folder / "measured.json", self._tasks()
        if not report.exists() or not wanted <= read_json(report)["tasks"].keys():
            with inside(folder):
                write_json(report, {"tasks": dict.fromkeys(sorted(wanted)), "report": evaluate(params, sorted(wanted))})
        metrics = read_json(folder / "models/finetune/metrics.json")
        self._done[table.name, arm, seed] = Measured(arm, seed, params, read_json(report)["report"], metrics)
        self._write()

    def _tasks(self) -> set[str]:
        """What has to be measured for the tables."""
        paths = {
            column.path.format(model=row.model, task=row.task)
            for table in self._tables
            for column in table.columns
            for row in table.rows
        }
        return {path.split("/")[0] for path in paths if not path.startswith(results.FINETUNE)}

    def _train(self, params: Params, name: str) -> Path:
        """The folder of a training, done if it was not."""
        from fast_goal.stages import finetune, intermediate

        values = {key: value for key, value in vars(params).items() if key not in UNTRAINED}
        base = read_json(self.work / "models/base.json")["key"]
        folder = self.work / "runs" / digest([base, {key: repr(value) for key, value in values.items()}])
        if not (folder / "models/finetune/metrics.json").exists():
            print(f"scenes_large: {name}", file=sys.stderr, flush=True)
            with inside(folder):
                for shared in ("data/records", "data/datasets", "models/base", ".fast_goal"):
                    link(self.work / shared, Path(shared))
                if make_objective(params.objective).needs_local and not Path("data/flism/done.json").exists():
                    match(params)
                if params.intermediate.dataset is not None and not intermediate.START.exists():
                    intermediate.main(params, NullTracker())
                finetune.main(params, NullTracker())
        return folder

    def _write(self) -> None:
        """The tables of what there is so far."""
        where = torch.cuda.get_device_name(device()) if device().type == "cuda" else str(device())
        words = [f"`python benchmarks/scenes_large.py` at commit {git_commit()[:9]}, on {where}, torch {torch.__version__}."]
        words += [f"One base (seed {self._options.base_seed}); the seeds are those of the fine-tuning."]
        words += [f"Further settings: {' '.join(self._options.set)}."] if self._options.set else []
        text, runs = ["# scenes_large", "", *words, ""], []
        base = read_json(self.work / "models/base/metrics.json")
        for table in self._tables:
            done = [run for (name, *_), run in self._done.items() if name == table.name]
            if not done:
                continue
            about = ["Shares in percent; mean ± standard deviation over the seeds."]
            problems = [*self._problems, *([f"{self.left()} rows are to come"] if self.left() else [])]
            text += [results.markdown(results.gather(table, done, self._arms(table), about, problems))]
            runs += [
                {"table": table.name, "arm": run.arm, "seed": run.seed, "epochs": run.params.finetune.epochs}
                | {"learning_rate": run.params.finetune.learning_rate, "finetune": run.finetune, "report": run.report}
                for run in done
            ]
        made = {"about": words, "tables": list(self._options.tables), "left": self.left(), "base": base, "runs": runs}
        write_json(self.output.with_suffix(".json"), made)
        write_text(self.output.with_suffix(".md"), "\n".join(text).replace("\n## Missing\n", "\n## Notes\n").rstrip() + "\n")


def match(params: Params) -> None:
    """FLISM as the step does it, without its picture, which needs matplotlib."""
    from fast_goal.data.records import PAIRS, load_dataset, write_table
    from fast_goal.flism.engine import extract
    from fast_goal.stages import flism

    for name in params.training_datasets:
        dataset = load_dataset(name)
        clip, detector = flism.load_models(params, dataset, device())
        kept = dataset if detector is not None and not detector.reads_pixels else None
        models = partial(flism.load_models, params, kept)
        found = extract(dataset, clip, detector, params.flism, flism.CACHE, device(), models=models)
        write_table(flism.OUTPUT / name / "pairs.parquet", found.pairs, PAIRS)
    write_json(flism.OUTPUT / "done.json", {})


def evaluate(params: Params, tasks: Sequence[str]) -> dict[str, Any]:
    """The numbers of the step `evaluate`, without its pictures."""
    import dataclasses

    from fast_goal.data.records import load_dataset
    from fast_goal.evaluation import comparison, embedding, features
    from fast_goal.evaluation.tasks import measure
    from fast_goal.model.clip import Clip

    config = dataclasses.replace(params.evaluate, tasks=list(tasks))
    clips = {"base": Clip.load("models/base/clip"), "finetuned": Clip.load("models/finetune")}
    stores = {
        model: features.FeatureStore(features.FOLDER, clip, device(), config.batch_size, config.precision)
        for model, clip in clips.items()
    }
    found = {}
    for name in config.datasets:
        asked = embedding.questions(load_dataset(name), config.split)
        found[name] = measure(comparison.Study(asked, stores, config), tasks, f"evaluate {name}")
    return found


def link(target: Path, path: Path) -> None:
    """A link at `path`, in the place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or not path.exists():
        path.unlink(missing_ok=True)
        path.symlink_to(target, target_is_directory=True)
    elif not path.samefile(target):
        shutil.rmtree(path)
        path.symlink_to(target, target_is_directory=True)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The steps work in the current folder."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def grace(limit: float) -> float:
    """Seconds before the limit at which the work is asked to end."""
    return min(GRACE, limit / 10)


@contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Sends this process a SIGTERM a little before `limit` seconds are over, on which trainings write their state, and ends it
    with MORE soon after them, whatever it does: every step goes on after a kill. 0: no limit."""
    if not limit:
        yield
        return
    timers = [
        threading.Timer(limit - grace(limit), os.kill, (os.getpid(), signal.SIGTERM)),
        threading.Timer(limit + GRACE, os._exit, (MORE,)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == MORE:
        os._exit(status)  # threads that are still at work would hold up the end, and nothing is lost by a kill
    sys.exit(status)
