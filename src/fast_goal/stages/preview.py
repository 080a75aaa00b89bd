"""The contact sheet of the step `flism` (`fast-goal flism preview`): no step of its own, nothing that DVC tracks."""

from __future__ import annotations

from pathlib import Path

from fast_goal.config import Params, load_params
from fast_goal.environment import prepare
from fast_goal.errors import ModelError

OUTPUT = Path(".fast_goal/flism_preview.png")


def run(count: int, output: Path | None = None) -> Path:
    """Draws `count` images with their regions with the settings of params.yaml in the current folder; returns the path.

    Raises DataError or ModelError, naming the step to run, where the records or models/base are missing.
    """
    prepare()
    return draw(load_params(), count, output or OUTPUT)


def draw(params: Params, count: int, output: Path) -> Path:
    """As `run`, with the parameters given."""
    from fast_goal.data.records import load_dataset
    from fast_goal.environment import device
    from fast_goal.flism.preview import preview
    from fast_goal.stages.flism import BASE, CACHE, load_models

    dataset = load_dataset(params.download.train_dataset)
    if not (BASE / "clip").is_dir():
        raise ModelError(f"{BASE / 'clip'} does not exist in {Path.cwd()}. The step `base` writes it: fast-goal base")
    clip, detector = load_models(params, dataset, device())
    known = params.base.detector
    name = f"{known.kind} {Path(known.weights).name}" if known.kind != "none" else "none"
    return preview(dataset, clip, detector, params.flism, CACHE, output, count, name, device())
