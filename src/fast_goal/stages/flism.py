"""The step `flism`: regions and local pairs of the data sets that are trained on (`fast-goal flism`).

Reads data/records/ and models/base/; writes data/flism/<dataset>/{regions,pairs,skipped}.parquet and pairs.png, and
data/flism/metrics.json. Finished shards stay in .fast_goal/flism/, so that a killed run goes on where it stopped and a
grown data set costs only what is new; embeddings, detections and sentence bounds in .fast_goal/embeddings/.

Without any `flism.splits` nothing is matched: the tables are there and empty, and metrics.json says so.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params

if TYPE_CHECKING:
    import torch

    from fast_goal.data.records import Dataset
    from fast_goal.flism.detectors import RegionDetector
    from fast_goal.model.clip import Clip
    from fast_goal.tracking import Tracker

BASE = Path("models/base")
OUTPUT = Path("data/flism")
CACHE = Path(".fast_goal")
HEADLINES = ("images_per_second", "mean_similarity", "true_region_share")


def main(params: Params, track: Tracker) -> None:
    """Runs FLISM over the splits `flism.splits` of the training data set, and of that of the first stage of training where
    it is another one."""
    from fast_goal.environment import prepare
    from fast_goal.files import write_json

    names = params.training_datasets
    if not params.flism.splits:
        for name in names:
            _write_none(OUTPUT / name)
        write_json(OUTPUT / "metrics.json", {"used": False})
        return
    from fast_goal.flism.metrics import flat

    begin = time.monotonic()
    prepare()
    metrics = {name: _match(params, name, track) for name in names}
    seconds = time.monotonic() - begin
    write_json(OUTPUT / "metrics.json", {**metrics, "seconds": seconds})
    numbers = flat(metrics[names[0]])
    track.metrics({**numbers, **flat({name: metrics[name] for name in names[1:]}), "seconds": seconds})
    track.headline({f"flism_{name}": numbers[name] for name in HEADLINES if name in numbers})


def _write_none(folder: Path) -> None:
    """Empty tables: `finetune` and `publish` depend on them, whether they look at pairs or not."""
    from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, write_table

    (folder / "pairs.png").unlink(missing_ok=True)  # of an earlier run
    for name, schema in (("regions", REGIONS), ("pairs", PAIRS), ("skipped", SKIPPED)):
        write_table(folder / f"{name}.parquet", [], schema)


def _match(params: Params, name: str, track: Tracker) -> dict[str, Any]:
    """Writes the tables and the picture of one data set; returns its metrics."""
    from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, load_dataset, write_table
    from fast_goal.environment import device
    from fast_goal.flism.engine import extract
    from fast_goal.flism.pictures import sheet

    dataset = load_dataset(name)
    track.input(dataset)
    clip, detector = load_models(params, dataset, device())
    # a worker process loads its own; the data set goes along only where the boxes come from it
    models = partial(load_models, params, dataset if detector is not None and not detector.reads_pixels else None)
    result = extract(dataset, clip, detector, params.flism, CACHE, device(), models=models)
    folder = OUTPUT / name
    write_table(folder / "regions.parquet", result.regions, REGIONS)
    write_table(folder / "pairs.parquet", result.pairs, PAIRS)
    write_table(folder / "skipped.parquet", result.skipped, SKIPPED)
    track.artifact(sheet(dataset, result.pairs, folder / "pairs.png"))
    return result.metrics


def load_models(params: Params, dataset: Dataset | None, device: torch.device) -> tuple[Clip, RegionDetector | None]:
    """The CLIP that matches (`flism.matcher`, else the base) and the detector (None where the settings use none).

    Raises ModelError where one is missing or does not fit.
    """
    from fast_goal.flism.detectors import load_detector
    from fast_goal.model.clip import Clip, load_pretrained

    matcher = params.flism.matcher
    if matcher.model is None:
        clip = Clip.load(BASE / "clip")
    else:
        clip = load_pretrained(matcher.model, matcher.pretrained, params.base.context_length, params.base.keep_positions)
    detector = None
    if params.flism.regions != "spatial":
        detector = load_detector(BASE / "detector", params.flism, dataset, device)
    return clip.to(device).eval(), detector
