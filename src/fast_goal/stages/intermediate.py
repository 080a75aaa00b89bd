"""The step `intermediate`: a first stage of fine-tuning, before `finetune` (`fast-goal intermediate`).

With `intermediate.dataset` null there is none. Else the base is fine-tuned on that data set: to models/intermediate/clip,
with history.jsonl, history.csv and metrics.json beside it. Either way models/intermediate/start.json says which weights
`finetune` starts from; it holds no time, so that the same weights give the same file.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fast_goal.config import Params
from fast_goal.files import write_json
from fast_goal.stages.training import Stage, train, weights_digest

if TYPE_CHECKING:
    from fast_goal.tracking import Tracker

BASE = Path("models/base/clip")
OUTPUT = Path("models/intermediate")
MODEL = OUTPUT / "clip"
START = OUTPUT / "start.json"


def main(params: Params, track: Tracker) -> None:
    """Trains the first stage, if there is one; a killed run is continued."""
    from fast_goal.training.distributed import rank

    first = params.intermediate
    if first.dataset is not None:
        stage = Stage(
            step="intermediate",
            section="intermediate.training",
            dataset=first.dataset,
            objective=first.objective,
            config=first.training,
            start=BASE,
            output=OUTPUT,
            model=MODEL,
        )
        if train(stage, params, track):
            write_json(START, {"weights": MODEL.as_posix(), "digest": weights_digest(MODEL)})
    elif rank() == 0:
        shutil.rmtree(OUTPUT, ignore_errors=True)
        write_json(OUTPUT / "metrics.json", {"used": False})
        write_json(START, {"weights": BASE.as_posix()})
