"""The candidate regions of an image: object detections and five fixed boxes (METHOD: "FLISM", step 2).

Boxes are float xyxy in pixels of the original image after EXIF rotation, x2 and y2 exclusive. `R` regions, `D` detections.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

MIN_SIDE = 1.0  # pixels; a thinner box holds nothing that a crop could show
DROP_REASONS = ("degenerate", "class", "min_area", "merged", "max_detections")  # a detection's first one counts
SPATIAL_KINDS = ("quadrant", "quadrant", "quadrant", "quadrant", "centre")


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image: boxes float[D, 4], their labels, and their scores float[D] in 0..1."""

    boxes: np.ndarray
    labels: list[str]
    scores: np.ndarray

    @classmethod
    def none(cls) -> Detections:
        """No detection."""
        return cls(np.zeros((0, 4)), [], np.zeros(0))


@dataclass(frozen=True)
class Regions:
    """The regions of one image: boxes float[R, 4], kinds (detector, quadrant, centre), labels, scores float[R].

    `dropped` counts the detections left out, for each of DROP_REASONS (see `candidate_regions`).
    """

    boxes: np.ndarray
    kinds: list[str]
    labels: list[str]
    scores: np.ndarray
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.kinds)


def spatial_regions(width: float, height: float) -> np.ndarray:
    """The five spatial regions, float[5, 4]: top-left, top-right, bottom-left, bottom-right quadrant, and the centre.

    The corners of the centre box are the centres of the four quadrants: from 1/4 to 3/4 in both axes.
    Raises ValueError for a size that is not positive.
    """
    if not (width > 0 and height > 0):
        raise ValueError(f"an image of {width} x {height} pixels has no regions")
    fractions = np.array(
        [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1], [0.25, 0.25, 0.75, 0.75]], dtype=np.float64
    )
    return fractions * np.array([width, height, width, height], dtype=np.float64)


def candidate_regions(
    width: int,
    height: int,
    detections: Detections,
    use: Literal["both", "detector", "spatial"] = "both",
    min_area: float = 0.0,
    classes: Collection[str] | None = None,
    max_detections: int | None = None,
    merge_iou: float | None = None,
) -> Regions:
    """The regions to match sentences with: the spatial ones first, then the detections in the detector's order.

    `use` selects the kinds (Table VII); with "detector" the result is empty where no detection is left. A detection is
    clipped to the image of `width` x `height` pixels and dropped for the first of these reasons that holds:

    * degenerate: a side under a pixel, or a coordinate or score that is not finite;
    * class: `classes` is given and its label is not among them;
    * min_area: its area is below `min_area`, a fraction of the image;
    * merged: `merge_iou` is given and its IoU with a spatial region or with a kept detection that is more confident is
      at least that. The spatial regions are not merged with each other;
    * max_detections: so many more confident ones are left.

    Of equally confident detections the earlier one counts as more confident.
    """
    spatial = spatial_regions(width, height) if use != "detector" else np.zeros((0, 4))
    dropped = dict.fromkeys(DROP_REASONS, 0)
    labels, scores = [""] * len(spatial), np.ones(len(spatial))
    if use == "spatial" or not len(detections.labels):
        return Regions(spatial, list(SPATIAL_KINDS[: len(spatial)]), labels, scores, dropped)

    raw = np.asarray(detections.boxes, dtype=np.float64).reshape(-1, 4)
    found = np.asarray(detections.scores, dtype=np.float64)
    boxes = np.clip(raw, 0, [width, height, width, height])
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = np.ones(len(boxes), dtype=bool)

    def drop(reason: str, bad: np.ndarray) -> None:
        dropped[reason] = int((keep & bad).sum())
        keep[bad] = False

    drop("degenerate", ~(np.isfinite(raw).all(1) & np.isfinite(found) & (sides >= MIN_SIDE).all(1)))
    if classes is not None:
        drop("class", np.array([label not in classes for label in detections.labels]))
    drop("min_area", ~(sides.prod(1) >= min_area * width * height))
    order = np.flatnonzero(keep)[np.argsort(-found[keep], kind="stable")]  # most confident first
    if merge_iou is not None:
        keep_merged = _unmerged(spatial, boxes[order], merge_iou)
        dropped["merged"] = int((~keep_merged).sum())
        order = order[keep_merged]
    if max_detections is not None:
        dropped["max_detections"] = max(len(order) - max_detections, 0)
        order = order[:max_detections]
    order = np.sort(order)
    return Regions(
        np.concatenate([spatial, boxes[order]]),
        [*SPATIAL_KINDS[: len(spatial)], *["detector"] * len(order)],
        [*labels, *(detections.labels[index] for index in order)],
        np.concatenate([scores, found[order]]),
        dropped,
    )


def _unmerged(first: np.ndarray, boxes: np.ndarray, merge_iou: float) -> np.ndarray:
    """Which of `boxes`, in their order, have an IoU below `merge_iou` with all of `first` and all kept before them."""
    keep = np.ones(len(boxes), dtype=bool)
    if not len(boxes):
        return keep
    everything = np.concatenate([first, boxes])
    rows, columns = np.indices((len(everything), len(boxes))).reshape(2, -1)
    close = (box_iou(everything[rows], boxes[columns]) >= merge_iou).reshape(len(everything), len(boxes))
    keep &= ~close[: len(first)].any(0)
    for index in range(len(boxes)):
        if keep[index]:
            keep[index + 1 :] &= ~close[len(first) + index, index + 1 :]
    return keep


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes float[n, 4] with boxes float[n, 4], row by row; 0 where both are empty."""
    overlap = np.clip(np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2]), 0, None).prod(1)
    union = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
