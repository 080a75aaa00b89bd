"""The candidate regions of an image: object detections and five fixed boxes (METHOD: "FLISM", step 2).

Boxes are float xyxy in pixels of the original image after EXIF rotation, x2 and y2 exclusive. `R` regions, `D` detections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

MIN_SIDE = 1.0  # pixels; a thinner box holds nothing that a crop could show
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

    `dropped` counts the detections left out: degenerate after clipping, or below the smallest area.
    """

    boxes: np.ndarray
    kinds: list[str]
    labels: list[str]
    scores: np.ndarray
    dropped: int

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
) -> Regions:
    """The regions to match sentences with: the spatial ones first, then the detections in the detector's order.

    Detections are clipped to the image of `width` x `height` pixels; one with a side under a pixel, a coordinate that
    is not finite, or an area below `min_area` (a fraction of the image) is dropped and counted. `use` selects the kinds
    (Table VII); with "detector" the result is empty where nothing was detected.
    """
    spatial = spatial_regions(width, height) if use != "detector" else np.zeros((0, 4))
    kinds = list(SPATIAL_KINDS[: len(spatial)])
    labels, scores = [""] * len(spatial), [1.0] * len(spatial)
    if use == "spatial":
        return Regions(spatial, kinds, labels, np.array(scores), 0)

    boxes = np.asarray(detections.boxes, dtype=np.float64).reshape(-1, 4)
    clipped = np.clip(boxes, 0, [width, height, width, height])
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = np.isfinite(boxes).all(1) & (sides >= MIN_SIDE).all(1) & (sides.prod(1) >= min_area * width * height)
    for index in np.flatnonzero(keep):
        kinds.append("detector")
        labels.append(detections.labels[index])
        scores.append(float(detections.scores[index]))
    return Regions(np.concatenate([spatial, clipped[keep]]), kinds, labels, np.array(scores), int((~keep).sum()))


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes float[n, 4] with boxes float[n, 4], row by row; 0 where both are empty."""
    overlap = np.clip(np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2]), 0, None).prod(1)
    union = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
