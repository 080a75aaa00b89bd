"""The steps of the pipeline, one module each: read the parameters, call a layer, write the outputs.

`dvc repro` and `fast-goal <step>` come here. Each step's module has `main(params, track)`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from fast_goal.config import Params, load_params, to_dict
from fast_goal.environment import prepare, share_work, termination_raises
from fast_goal.errors import ConfigError

STEPS = ("download", "base", "flism", "validate", "publish", "negatives", "intermediate", "finetune", "evaluate", "register")
SETTINGS = {"finetune": ("objective", "finetune")}  # sections of params.yaml a step reads; else the one of its name

SHARED: dict[str, Callable[[Params], int]] = {  # steps that several processes work on: how many are asked for
    "intermediate": lambda params: params.intermediate.training.processes if params.intermediate.dataset else 1,
    "finetune": lambda params: params.finetune.processes,
}


def run(step: str) -> None:
    """Runs one step in the current folder (the project's), recorded as an MLflow run.

    Raises ConfigError for an unknown step; errors of the step pass through, after its run is marked FAILED (KILLED for
    an interrupt or a termination).
    """
    if step not in STEPS:
        raise ConfigError(f"unknown step {step!r}. The steps are {', '.join(STEPS)}.")
    prepare()
    share_work()
    params = load_params()
    module = importlib.import_module(f"fast_goal.stages.{step}")
    if step in SHARED:
        from fast_goal.training import distributed

        count = 1 if "RANK" in os.environ else distributed.processes(SHARED[step](params))
        if count > 1:
            distributed.launch(count, ["-m", "fast_goal", step])
            return
        if distributed.rank():  # rank 0 tells the tracker
            from fast_goal.tracking import NullTracker

            module.main(params, NullTracker())
            return
    from fast_goal.tracking.runs import step_run

    with termination_raises(), step_run(step, params) as track:
        track.params(settings(step, params))
        module.main(params, track)


def settings(step: str, params: Params) -> dict[str, Any]:
    """What a step reads from params.yaml."""
    values = to_dict(params)
    return {"seed": params.seed, **{section: values[section] for section in SETTINGS.get(step, (step,))}}
