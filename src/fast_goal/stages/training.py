"""What the steps `intermediate` and `finetune` share: one stage of fine-tuning, from the weights of an earlier step to a model.

No step itself.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import FinetuneConfig, Params, to_dict
from fast_goal.errors import FastGoalError
from fast_goal.files import digest, file_digest, read_json, tree_digest, write_json, write_text
from fast_goal.stages.base import measured

if TYPE_CHECKING:
    import torch

    from fast_goal.data.records import Dataset
    from fast_goal.model.clip import Clip
    from fast_goal.tracking import Tracker

FLISM, TABLES = Path("data/flism"), Path("data/negatives")
STATE = Path(".fast_goal/state")
LOGS = Path(".fast_goal/logs")
# settings that do not change what is learned: a run that lacked memory continues with what the error advised
NOT_LEARNED = (
    "processes",
    "workers",
    "log_every",
    "save_every",
    "keep_states",
    "accumulate",
    "checkpointing",
    "compile",
    "pixel_cache",
    "shards",
    "diverged",
)
MINIMUM_VALIDATION = 2  # images; with one, every recall is 100 %
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is trained, on what, from where."""

    step: str
    section: str  # of params.yaml, with the settings of the training
    dataset: str
    objective: dict[str, Any]
    config: FinetuneConfig
    start: Path  # the folder of the weights to start from
    output: Path  # the step's folder
    model: Path  # the model's, which may be the same one


def weights_digest(folder: Path) -> str:
    """A digest of a model's weights and configuration, without its description, which names a commit and times."""
    from fast_goal.model.clip import INFO_FILE

    return tree_digest(folder, keep=lambda path: path.name != INFO_FILE)


def train(stage: Stage, params: Params, track: Tracker) -> bool:
    """Fine-tunes on the split `train` of the stage's data set; a killed run is continued.

    Writes the model, and to the step's folder history.jsonl (a record per logged step and, where there is a validation
    split, one per epoch), the same as history.csv, and metrics.json. Of several processes the first one writes; the others
    return False. Raises FastGoalError where the step is running in this folder already.
    """
    from fast_goal.training.distributed import rank

    with alone(STATE / f"{stage.step}.lock") if rank() == 0 else nullcontext():
        return _train(stage, params, track)


def _train(stage: Stage, params: Params, track: Tracker) -> bool:
    from fast_goal.data.records import NEGATIVES, PAIRS, load_dataset, read_table
    from fast_goal.environment import device
    from fast_goal.model.clip import Clip
    from fast_goal.objectives import check_objectives, make_objective
    from fast_goal.tracking.identity import git_commit
    from fast_goal.training.checkpoint import remove_state
    from fast_goal.training.distributed import own_device, process_group
    from fast_goal.training.loop import finetune
    from fast_goal.training.recorder import CsvLog

    begin = time.perf_counter()
    check_objectives(params)
    dataset = load_dataset(stage.dataset)
    objective = make_objective(stage.objective)
    pairs_path = FLISM / dataset.name / "pairs.parquet"
    pairs = read_table(pairs_path, PAIRS) if objective.needs_local else None
    negatives_path = TABLES / f"{dataset.name}.parquet"
    # what a table that is not there means is said by whoever needs it
    hard = objective.needs_negatives and negatives_path.is_file()
    negatives = read_table(negatives_path, NEGATIVES) if hard else None
    clip = Clip.load(stage.start)
    start = weights_digest(stage.start)
    settings = to_dict(stage.config)
    track.input(dataset, "training")
    key = digest(
        {
            "training": {name: value for name, value in settings.items() if name not in NOT_LEARNED},
            "objective": stage.objective,
            "seed": params.seed,
            "dataset": dataset.digest,
            "pairs": file_digest(pairs_path) if pairs is not None else None,
            "negatives": file_digest(negatives_path) if negatives is not None else None,
            "start": start,
        }
    )
    history: list[dict[str, Any]] = []
    state, log = STATE / stage.step / f"{key}.pt", LOGS / f"{stage.step}.csv"
    own = own_device(device())
    with process_group(own) as group:
        write = CsvLog(log) if group.main else lambda step, record: None

        def on_step(step: int, record: dict[str, Any]) -> None:
            history.append(record)
            write(step, record)
            track.metrics(measured(record), step=step)

        summary = finetune(
            clip,
            dataset,
            pairs,
            objective,
            stage.config,
            seed=params.seed,
            device=own,
            state_path=state,
            state_key=key,
            group=group,
            on_step=on_step,
            on_epoch=validation(dataset, params, own, stage.step, stage.config.captions),
            section=stage.section,
            negatives=negatives,
        )
    if not group.main:
        return False
    metrics = {**summary, "training_seconds": summary["seconds"], "seconds": time.perf_counter() - begin}
    clip.save(
        stage.model,
        {
            "step": stage.step,
            "method": stage.objective,
            "dataset": {"name": dataset.name, "digest": dataset.digest},
            **_ancestry(stage.start, clip.name, start),
            "commit": git_commit(),
            "params": {stage.section: settings, "seed": params.seed},
            "metrics": metrics,
        },
    )
    write_text(stage.output / "history.jsonl", "".join(json.dumps(record) + "\n" for record in history))
    shutil.copyfile(log, stage.output / "history.csv")
    write_json(stage.output / "metrics.json", metrics)
    remove_state(state)
    track.metrics(measured(metrics) | measured({f"final_{name}": value for name, value in summary["final"].items()}))
    for name in ("history.jsonl", "history.csv", "metrics.json"):
        track.artifact(stage.output / name)
    return True


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the lock in the file, which the system releases with the process however that ends. Raises FastGoalError where
    another process holds it: a killed `dvc repro` leaves its step running, and two trainings would write one state."""
    from fast_goal.tracking.identity import host

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise FastGoalError(
                f"The step {path.stem} is running in this folder already, as the process {stream.read().strip()}. Wait for it, "
                "or end it (on SIGTERM it writes its state), and run the step again."
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): take care that the step runs in this folder only once.", path, error)
        stream.truncate(0)
        stream.write(f"{os.getpid()} on {host()}\n")
        stream.flush()
        yield


def _ancestry(start: Path, name: str, start_digest: str) -> dict[str, Any]:
    """The stages that the weights in the folder `start` come from, each with its digest."""
    from fast_goal.model.clip import INFO_FILE

    info = read_json(start / INFO_FILE) if (start / INFO_FILE).is_file() else {}
    if "base" not in info:
        return {"base": {"name": name, "digest": start_digest}}
    stage = {"method": info["method"], "dataset": info["dataset"], "digest": start_digest}
    return {"base": info["base"], info["step"]: stage}


def validation(
    dataset: Dataset, params: Params, device: torch.device, step: str, captions: str = "long"
) -> Callable[[Clip, int], dict[str, float]] | None:
    """Measures R@1 in percent, both ways, on the captions of the split `val` that the training is about, `long` or `short`;
    None where too few images have one."""
    import torch

    from fast_goal.data.records import captions_of
    from fast_goal.evaluation.embedding import Captions, answer, questions
    from fast_goal.evaluation.retrieval import recall_at_k

    if sum(map(bool, captions_of(dataset.split("val"), captions))) < MINIMUM_VALIDATION:
        return None
    asked = questions(dataclasses.replace(dataset, truth=None), "val")
    nothing = Captions([], asked.short.images[:0])
    asked = dataclasses.replace(asked, **{"short" if captions == "long" else "long": nothing})
    measured_on = asked.long if captions == "long" else asked.short

    def measure(clip: Clip, epoch: int) -> dict[str, float]:
        found = answer(clip, asked, params.evaluate.batch_size, device, name=f"{step}, validation {epoch}")
        texts = found.text_features[found.rows(measured_on.texts)]
        recall = recall_at_k(found.image_features, texts, torch.from_numpy(measured_on.images), ks=[1])
        return {f"val_{direction}_R@1": values[1] for direction, values in recall.items()}

    return measure
