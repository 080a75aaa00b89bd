"""`fast-goal publish`: writes the training data set with its local pairs in a layout that others can read.

Reads data/records/ and data/flism/, after the step `validate` has passed them; writes data/publish/<dataset>/ (README.md,
dataset.json, data files, checksums.sha256) and data/publish/metrics.json.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params, to_dict
from fast_goal.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fast_goal.tracking import Tracker

FLISM, VALIDATION = Path("data/flism"), Path("data/validation/summary.json")
DETECTOR = Path("models/base/detector/detector.json")
OUTPUT = Path("data/publish")
METRICS = ("images", "pairs", "images_with_pair", "mean_words_long", "skipped_here")
DETECTOR_FACTS = ("kind", "weights", "image_size")
CAPTIONER_FACTS = ("model", "max_new_tokens", "temperature", "max_side")
SCRATCH_FACTS = ("split", "image_size", "patch_size", "embed_dim", "steps")
FLISM_FACTS = ("regions", "top_k", "pair_weights", "confidence", "iou", "classes", "min_area", "max_detections", "merge_iou")


def main(params: Params, track: Tracker) -> None:
    """Runs the step. Raises ConfigError without a licence; DataError for a missing table, data that did not pass their
    validation, and a full disk."""
    import pandas as pd

    from fast_goal.data import records
    from fast_goal.data.publication import write_publication
    from fast_goal.files import read_json, write_json

    begin = time.monotonic()
    if not params.publish.licence.strip():
        raise ConfigError("publish.licence is empty: it stands in the card; name the licence, or say 'unknown'")
    if not VALIDATION.is_file():
        raise DataError(f"{VALIDATION} does not exist: only data that passed their checks are published. `dvc repro validate`")
    if failed := read_json(VALIDATION)["expectations"]["critical"]:  # the step writes its summary before it fails
        raise DataError(
            f"{VALIDATION}: {failed} critical expectations failed, and only data that passed their checks are published. "
            "Mend what data/validation/summary.md lists, then `dvc repro validate`"
        )
    dataset = records.load_dataset(params.download.train_dataset)
    track.input(dataset, "publication")
    tables = FLISM / dataset.name
    pairs = records.read_table(tables / "pairs.parquet", records.PAIRS)
    skipped = [records.load_skipped(dataset.name), records.read_table(tables / "skipped.parquet", records.SKIPPED)]
    folder = OUTPUT / dataset.name
    info = write_publication(
        dataset, pairs, pd.concat(skipped, ignore_index=True), params.publish, folder, how_it_was_made(params)
    )
    seconds = time.monotonic() - begin
    numbers: dict[str, Any] = {name: info[name] for name in METRICS}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    write_json(OUTPUT / "metrics.json", {dataset.name: {**numbers, "bytes": size}, "seconds": round(seconds, 1)})
    print(
        f"publish: {folder}: {info['images']:,} images, {info['images_with_pair']:,} with a local pair, "
        f"layout {info['layout']}, {size / 1e6:,.1f} MB, digest {info['digest']}"
    )
    if info["skipped_here"]:
        print(f"  skipped: {info['skipped_here']:,} images can no longer be read ({folder / 'skipped.parquet'})")
    track.metrics({name: float(value) for name, value in numbers.items()} | {"bytes": float(size), "seconds": seconds})
    track.artifact(folder / "README.md")


def how_it_was_made(params: Params) -> dict[str, dict[str, Any]]:
    """The settings that the local pairs, and captions written by a model, depend on, for the card: no paths, which
    are those of a machine."""
    from fast_goal.files import read_json

    base, flism = to_dict(params.base), to_dict(params.flism)
    if flism["matcher"]["model"] is None and base["kind"] == "scratch":
        # base.model is not used then
        matcher = {"model": "trained from scratch", **{name: base["scratch"][name] for name in SCRATCH_FACTS}}
    else:
        named = flism["matcher"] if flism["matcher"]["model"] else base
        matcher = {"model": _shown(named["model"]), "pretrained": _shown(named["pretrained"])}
    detector = {"kind": "none"}
    if flism["regions"] != "spatial":
        detector = read_json(DETECTOR) if DETECTOR.is_file() else base["detector"]
    made: dict[str, dict[str, Any]] = {}
    source = params.download.datasets[params.download.train_dataset]
    if source["source"] == "captioned":
        captioner = source["captioner"]
        made["captions"] = {name: _shown(captioner[name]) for name in CAPTIONER_FACTS} | {"prompt": source["prompt"]}
    if not params.flism.splits:
        return made
    return made | {
        "matcher": matcher,
        "detector": {name: _shown(detector[name]) for name in DETECTOR_FACTS if name in detector},
        "flism": {name: flism[name] for name in FLISM_FACTS},
    }


def _shown(value: Any) -> Any:
    """A setting; of a local path only its name."""
    if not isinstance(value, str):
        return value
    local = value.removeprefix("local-dir:")
    return Path(local).name if local != value or Path(local).is_absolute() else value
