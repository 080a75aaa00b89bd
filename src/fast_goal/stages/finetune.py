"""The step `finetune`: fine-tunes CLIP on long captions and local pairs (`fast-goal finetune`).

It starts from models/intermediate/clip where `intermediate.dataset` asks for a first stage, else from models/base/clip.
Writes models/finetune, a folder that open_clip loads, with history.jsonl (a record per logged step and, where there is a
validation split, one per epoch), history.csv and metrics.json. The model is that of the last epoch; the validation recall
chooses another only with `finetune.result` best, and ends the training only with `finetune.patience`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fast_goal.config import Params
from fast_goal.errors import ModelError
from fast_goal.stages import intermediate
from fast_goal.stages.training import Stage, train

if TYPE_CHECKING:
    from fast_goal.tracking import Tracker

BASE = Path("models/base/clip")
OUTPUT = Path("models/finetune")


def main(params: Params, track: Tracker) -> None:
    """Fine-tunes on the split `train` of the training data set; a killed run is continued.

    Raises ModelError where the settings name a first stage that has not been run.
    """
    start = BASE
    if params.intermediate.dataset is not None:
        start = intermediate.MODEL
        if not start.is_dir():
            raise ModelError(
                f"{start} does not exist, but intermediate.dataset = {params.intermediate.dataset!r} asks for a first stage of "
                "training. Run it: `dvc repro intermediate`, or leave it out: intermediate.dataset=null"
            )
    stage = Stage(
        step="finetune",
        section="finetune",
        dataset=params.download.train_dataset,
        objective=params.objective,
        config=params.finetune,
        start=start,
        output=OUTPUT,
        model=OUTPUT,
    )
    train(stage, params, track)
