"""The step `finetune`: fine-tunes the base CLIP on long captions and local pairs (`fast-goal finetune`).

Writes models/finetune, a folder that open_clip loads, with history.jsonl (a record per logged step and, where there is a
validation split, one per epoch) and metrics.json. The model is that of the last epoch; the validation recall chooses
another only with `finetune.result` best, and ends the training only with `finetune.patience`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params, to_dict
from fast_goal.files import digest, file_digest, tree_digest, write_json, write_text
from fast_goal.stages.base import measured

if TYPE_CHECKING:
    import torch

    from fast_goal.data.records import Dataset
    from fast_goal.model.clip import Clip
    from fast_goal.tracking import Tracker

BASE = Path("models/base/clip")
FLISM = Path("data/flism")
OUTPUT = Path("models/finetune")
STATE = Path(".fast_goal/state/finetune")
# settings that do not change what is learned: a run that lacked memory continues with what the error advised
NOT_LEARNED = ("processes", "workers", "log_every", "save_every", "accumulate", "checkpointing", "compile")
MINIMUM_VALIDATION = 2  # images; with one, every recall is 100 %


def main(params: Params, track: Tracker) -> None:
    """Fine-tunes on the split `train` of the training data set; a killed run is continued."""
    from fast_goal.data.records import PAIRS, load_dataset, read_table
    from fast_goal.environment import device
    from fast_goal.model.clip import INFO_FILE, Clip
    from fast_goal.objectives import make_objective
    from fast_goal.tracking.identity import git_commit
    from fast_goal.training.checkpoint import remove_state
    from fast_goal.training.distributed import own_device, process_group
    from fast_goal.training.loop import finetune

    begin = time.perf_counter()
    dataset = load_dataset(params.download.train_dataset)
    objective = make_objective(params.objective)
    pairs_path = FLISM / dataset.name / "pairs.parquet"
    pairs = read_table(pairs_path, PAIRS) if objective.needs_local else None
    clip = Clip.load(BASE)
    base_digest = tree_digest(BASE, keep=lambda path: path.name != INFO_FILE)
    settings = to_dict(params.finetune)
    track.input(dataset, "training")
    key = digest(
        {
            "finetune": {name: value for name, value in settings.items() if name not in NOT_LEARNED},
            "objective": params.objective,
            "seed": params.seed,
            "dataset": dataset.digest,
            "pairs": file_digest(pairs_path) if pairs is not None else None,
            "base": base_digest,
        }
    )
    history: list[dict[str, Any]] = []

    def on_step(step: int, record: dict[str, Any]) -> None:
        history.append(record)
        track.metrics(measured(record), step=step)

    state = STATE / f"{key}.pt"
    own = own_device(device())
    with process_group(own) as group:
        summary = finetune(
            clip,
            dataset,
            pairs,
            objective,
            params.finetune,
            seed=params.seed,
            device=own,
            state_path=state,
            state_key=key,
            group=group,
            on_step=on_step,
            on_epoch=validation(dataset, params, own),
        )
    if not group.main:
        return
    metrics = {**summary, "training_seconds": summary["seconds"], "seconds": time.perf_counter() - begin}
    clip.save(
        OUTPUT,
        {
            "step": "finetune",
            "method": params.objective,
            "dataset": {"name": dataset.name, "digest": dataset.digest},
            "base": {"name": clip.name, "digest": base_digest},
            "commit": git_commit(),
            "params": {"finetune": settings, "seed": params.seed},
            "metrics": metrics,
        },
    )
    write_text(OUTPUT / "history.jsonl", "".join(json.dumps(record) + "\n" for record in history))
    write_json(OUTPUT / "metrics.json", metrics)
    remove_state(state)
    track.metrics(measured(metrics) | measured({f"final_{name}": value for name, value in summary["final"].items()}))
    for name in ("history.jsonl", "metrics.json"):
        track.artifact(OUTPUT / name)


def validation(dataset: Dataset, params: Params, device: torch.device) -> Callable[[Clip, int], dict[str, float]] | None:
    """Measures R@1 in percent, both ways, on the long captions of the split `val`; None where it has too few."""
    import torch

    from fast_goal.evaluation.embedding import Captions, answer, questions
    from fast_goal.evaluation.retrieval import recall_at_k

    if (dataset.split("val")["long_caption"].str.strip() != "").sum() < MINIMUM_VALIDATION:
        return None
    asked = questions(dataclasses.replace(dataset, truth=None), "val")
    asked = dataclasses.replace(asked, short=Captions([], asked.short.images[:0]))

    def measure(clip: Clip, epoch: int) -> dict[str, float]:
        found = answer(clip, asked, params.evaluate.batch_size, device, name=f"validation {epoch}")
        texts = found.text_features[found.rows(asked.long.texts)]
        recall = recall_at_k(found.image_features, texts, torch.from_numpy(asked.long.images), ks=[1])
        return {f"val_{direction}_R@1": values[1] for direction, values in recall.items()}

    return measure
