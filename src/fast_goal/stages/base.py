"""The step `base`: the weights to start from, CLIP and detector (`fast-goal base`).

Writes models/base/clip, models/base/detector and models/base/metrics.json. Each of the two is kept apart, under
.fast_goal/state/base, until both are done: a kill while one is made does not cost the other.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params, to_dict
from fast_goal.files import digest, file_digest, read_json, write_json

if TYPE_CHECKING:
    from fast_goal.data.records import Dataset
    from fast_goal.tracking import Tracker

OUTPUT = Path("models/base")
STATE = Path(".fast_goal/state/base")
PIXELS = Path(".fast_goal/pixels")
_log = logging.getLogger(__name__)


def main(params: Params, track: Tracker) -> None:
    """Makes the detector and the CLIP of `params.base`."""
    from fast_goal.data.records import load_dataset

    begin = time.perf_counter()
    dataset = load_dataset(params.download.train_dataset)
    track.input(dataset, "training")
    config = to_dict(params.base)
    inputs = {"dataset": dataset.digest, "seed": params.seed}
    detector_config = config.pop("detector")
    weights = Path(params.base.detector.weights)
    detector_inputs = {**inputs, "config": detector_config, "file": file_digest(weights) if weights.is_file() else None}
    # The detector first: what can be wrong with it mostly shows at once.
    detector, detector_metrics = _part("detector", detector_inputs, lambda folder, key: _make_detector(params, dataset, folder))
    clip, clip_metrics = _part(
        "clip", {**inputs, "config": config}, lambda folder, key: _make_clip(params, dataset, folder, key, track)
    )
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    shutil.copytree(clip, OUTPUT / "clip")
    shutil.copytree(detector, OUTPUT / "detector")
    metrics = {**clip_metrics, "detector": detector_metrics, "seconds": time.perf_counter() - begin}
    write_json(OUTPUT / "metrics.json", metrics)
    for mark in STATE.glob("*/metrics.json"):  # first: a kill halfway must not leave half a part that seems finished
        mark.unlink()
    shutil.rmtree(STATE)
    flat = {**metrics, **{f"detector_{name}": value for name, value in detector_metrics.items()}}
    track.metrics(measured(flat))
    track.artifact(OUTPUT / "metrics.json")


def measured(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among the values, without the step of a record, for the tracker."""
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float) and name != "step"}


def _part(name: str, inputs: dict[str, Any], make: Callable[[Path, str], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder and metrics of a part, made by `make(folder, key)` unless an earlier run has finished it.

    The part's metrics.json is written last and marks it as finished.
    """
    key = digest(inputs)
    folder = STATE / f"{name}-{key}"
    mark = folder / "metrics.json"
    if mark.exists():
        _log.warning("base: an interrupted run has finished the %s; it is taken from %s.", name, folder)
        return folder / name, read_json(mark)
    shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = make(folder / name, key)
    write_json(mark, metrics)
    return folder / name, metrics


def _make_detector(params: Params, dataset: Dataset, folder: Path) -> dict[str, Any]:
    from fast_goal.flism.detectors import obtain_detector

    config = params.base.detector
    info = obtain_detector(config, folder, dataset, params.seed)
    return {"kind": config.kind, "weights": config.weights, **info.get("metrics", {})}


def _make_clip(params: Params, dataset: Dataset, folder: Path, key: str, track: Tracker) -> dict[str, Any]:
    from fast_goal.environment import device
    from fast_goal.model.clip import build_scratch, load_pretrained
    from fast_goal.tracking.identity import git_commit
    from fast_goal.training.checkpoint import remove_state
    from fast_goal.training.pretraining import train_scratch

    begin = time.perf_counter()
    config = params.base
    state, trained = folder.with_name("clip.pt"), {}
    if config.kind == "pretrained":
        clip = load_pretrained(config.model, config.pretrained, config.context_length, config.keep_positions)
    else:
        clip = build_scratch(config.scratch, seed=params.seed)
        if config.scratch.steps:
            trained = train_scratch(
                clip,
                dataset,
                config.scratch,
                seed=params.seed,
                device=device(),
                state_path=state,
                state_key=key,
                on_step=lambda step, record: track.metrics(measured(record), step=step),
                pixels_folder=PIXELS,
            )
        clip = clip.stretched(config.context_length, config.keep_positions)
    metrics = {
        "kind": config.kind,
        "model": clip.name,
        "weak": config.kind == "scratch",
        "parameters": sum(parameter.numel() for parameter in clip.parameters()),
        "positions": clip.stretch.describe(),
        **trained,
        "clip_seconds": time.perf_counter() - begin,
    }
    data = {"name": dataset.name, "digest": dataset.digest}
    clip.save(folder, {"step": "base", "dataset": data, "commit": git_commit(), "params": to_dict(config), "metrics": metrics})
    remove_state(state)
    return metrics
