"""Boxes that are known already: a table of own annotations, or the data set's true objects (`weights: objects`).

The table is CSV or parquet with the columns image_id, x1, y1, x2, y2 (pixels of the original image after its EXIF
rotation, x2 and y2 exclusive) and, where there are any, label and score (0..1; without it a box counts as certain).

On disk (`models/base/detector`): `boxes.parquet`, the boxes of the data set's images, and `detector.json` with kind,
weights (as configured), the sha256 of the copy and of its source, names (the labels that occur), and the numbers of
images with boxes, of boxes, and of boxes that belong to no image of the data set.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from fast_goal.config import DetectorConfig, FlismConfig
from fast_goal.data.records import Dataset, read_table, write_table
from fast_goal.errors import ConfigError, DataError
from fast_goal.flism.detectors import MAX_BOXES, NO_DETECTOR, check_file, detections_digest, detector, sha256_of
from fast_goal.flism.regions import Detections

if TYPE_CHECKING:
    import torch

OBJECTS_WORD = "objects"
BOXES_FILE = "boxes.parquet"
BOX = ["x1", "y1", "x2", "y2"]
BOXES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in BOX),
        pa.field("label", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ],
    metadata={"table": "boxes", "step": "base"},
)
_log = logging.getLogger(__name__)


@detector("table")
class TableDetector:
    """Looks the boxes up by image id. An image that the table does not name has none."""

    reads_pixels = False

    def __init__(self, boxes: pd.DataFrame, info: dict[str, Any], config: FlismConfig):
        boxes = boxes[boxes["score"] >= config.confidence]
        boxes = boxes.sort_values("score", ascending=False, kind="stable")
        boxes = boxes[boxes.groupby("image_id").cumcount() < MAX_BOXES]
        boxes = boxes.sort_values("image_id", kind="stable")
        ids = boxes["image_id"].to_numpy(dtype=object)
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.zeros(0, dtype=int)
        ends = [*starts[1:].tolist(), len(ids)]
        self._rows = {ids[start]: slice(start, end) for start, end in zip(starts.tolist(), ends, strict=False)}
        self._boxes = boxes[BOX].to_numpy(dtype=np.float64)
        self._labels = boxes["label"].astype("category")
        self._scores = boxes["score"].to_numpy(dtype=np.float64)
        self.names: list[str] = info["names"]
        self.digest = detections_digest(type(self), sha256=info["sha256"], confidence=config.confidence)

    def detect(self, images: Sequence[Image.Image | None], image_ids: Sequence[str]) -> list[Detections]:
        """The boxes of each image with at least the confidence, the highest score first; the images are not used."""
        return [self._detections(image_id) for image_id in image_ids]

    def _detections(self, image_id: str) -> Detections:
        rows = self._rows.get(image_id)
        if rows is None:
            return Detections.none()
        return Detections(self._boxes[rows], self._labels.iloc[rows].tolist(), self._scores[rows])

    @staticmethod
    def obtain(config: DetectorConfig, folder: Path, dataset: Dataset, seed: int) -> dict[str, Any]:
        """Copies the boxes of the data set's images. Raises ConfigError or DataError, with file, column and row."""
        boxes = _objects(dataset) if config.weights == OBJECTS_WORD else _read(Path(config.weights))
        known = boxes["image_id"].isin(set(dataset.records["image_id"]))
        if not known.any():
            raise DataError(
                f"base.detector.weights = {config.weights!r}: none of its {len(boxes)} boxes belongs to an image of the data "
                f"set {dataset.name!r}. image_id {boxes['image_id'].head(1).tolist()} in the table, "
                f"{dataset.records['image_id'].head(1).tolist()} in the data set."
            )
        if unknown := int((~known).sum()):
            _log.warning(
                "base: %d of the %d boxes in %s belong to no image of the data set %s (the first: image_id %r); left out.",
                unknown,
                len(boxes),
                config.weights,
                dataset.name,
                boxes.loc[~known, "image_id"].iloc[0],
            )
        boxes = boxes[known]
        write_table(folder / BOXES_FILE, boxes, BOXES)
        return {
            "weights": config.weights,
            "sha256": sha256_of(folder / BOXES_FILE),
            "source_sha256": None if config.weights == OBJECTS_WORD else sha256_of(Path(config.weights)),
            "names": sorted(set(boxes["label"]) - {""}),
            "images": int(boxes["image_id"].nunique()),
            "boxes": len(boxes),
            "unknown_boxes": unknown,
        }

    @classmethod
    def load(
        cls, folder: Path, info: dict[str, Any], config: FlismConfig, dataset: Dataset | None, device: torch.device
    ) -> TableDetector:
        """Reads the copy."""
        check_file(folder / BOXES_FILE, info["sha256"])
        source = Path(info["weights"])
        if info["source_sha256"] and source.is_file() and sha256_of(source) != info["source_sha256"]:
            _log.warning("%s has changed since the step `base` copied it. Run that step again: fast-goal base", source)
        return cls(read_table(folder / BOXES_FILE, BOXES), info, config)


def _objects(dataset: Dataset) -> pd.DataFrame:
    if dataset.objects is None or not len(dataset.objects):
        raise ConfigError(
            f"base.detector.weights = 'objects' takes the true boxes of the data set, and {dataset.name!r} has none. Give the "
            f"path of a CSV or parquet file with boxes, or {NO_DETECTOR}."
        )
    return dataset.objects[["image_id", *BOX, "label"]].assign(score=1.0)


def _read(path: Path) -> pd.DataFrame:
    """The user's table with the columns of BOXES, in its own order."""
    where = f"base.detector.weights = {str(path)!r}"
    if not path.is_file():
        raise ConfigError(f"{where} does not exist. Give the path of a CSV or parquet file with boxes, or {OBJECTS_WORD!r}.")
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise ConfigError(f"{where}: expected a file that ends in .csv or .parquet")
    try:
        if path.suffix.lower() == ".csv":  # ids as they stand there: 0017 is no number
            table = pd.read_csv(path, dtype={"image_id": str, "label": str}, keep_default_na=False, na_values={})
        else:
            table = pd.read_parquet(path)
    except (ValueError, OSError, pa.ArrowException) as error:  # pandas' parser errors are ValueErrors
        raise DataError(f"{path} cannot be read: {error}") from None
    for name in ("image_id", *BOX):
        if name not in table.columns:
            raise DataError(
                f"{path}: the column {name!r} is missing; it has {list(table.columns)}. Expected: image_id, x1, y1, x2, y2 "
                "and, if there are any, label and score."
            )
    made = {"image_id": _texts(table["image_id"], path), **{name: _numbers(table[name], path) for name in BOX}}
    made["label"] = _texts(table["label"], path, "") if "label" in table.columns else ""
    made["score"] = _numbers(table["score"], path) if "score" in table.columns else 1.0
    boxes = pd.DataFrame(made, index=table.index)
    outside = ~boxes["score"].between(0, 1)
    if outside.any():
        row = int(np.argmax(outside.to_numpy()))
        raise DataError(f"{path}, row {row + 1}: score = {boxes['score'].iloc[row]}; expected a number from 0 to 1")
    if len(boxes) and boxes[BOX].to_numpy().max() <= 1:
        raise DataError(f"{path}: no coordinate is above 1. Boxes are given in pixels of the image, not as fractions of it.")
    return boxes


def _texts(column: pd.Series, path: Path, empty: str | None = None) -> pd.Series:
    """As text; an empty value becomes `empty`, or is an error where that is None."""
    missing = column.isna() | (column.astype(str) == "")
    if missing.any() and empty is None:
        row = int(np.argmax(missing.to_numpy()))
        raise DataError(f"{path}, row {row + 1}: {column.name} is empty")
    return column.astype(str).mask(missing, empty)


def _numbers(column: pd.Series, path: Path) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce").astype(float)
    bad = ~np.isfinite(values.to_numpy())
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{path}, row {row + 1}: {column.name} = {column.iloc[row]!r}; expected a number")
    return values
