"""What a FLISM run found, in numbers. `P` best pairs with a true box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fast_goal.flism.regions import box_iou

KINDS = ("detector", "quadrant", "centre")
HISTOGRAM_EDGES = np.round(np.arange(-1.0, 1.0001, 0.05), 2)  # of the cosine similarity
TRUE_IOU = 0.5  # from which a region counts as the sentence's true box, as in detection benchmarks
BOX = ["x1", "y1", "x2", "y2"]


def flism_metrics(
    regions: pd.DataFrame,
    pairs: pd.DataFrame,
    skipped: pd.DataFrame,
    counts: Mapping[str, float],
    images: int,
    truth: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """The metrics of a run over `images` images; `counts` are those summed over its shards.

    images: those with a pair. images_per_second: over the time spent on all of them. regions_per_image, pairs,
    skipped, truncated_sentences (longer than the text context), dropped_detections. Over the best pairs of the images:
    share_by_kind (fractions), mean_similarity, similarity_histogram (edges and counts). With `truth` also
    `true_region` of `truth_agreement`.
    """
    best = pairs[pairs["rank"] == 1]
    used = regions["image_id"].nunique()
    seconds = counts["seconds"]
    metrics: dict[str, Any] = {
        "images": int(used),
        "skipped": len(skipped),
        "images_per_second": images / seconds if seconds > 0 else 0.0,
        "regions_per_image": len(regions) / used,
        "pairs": len(pairs),
        "share_by_kind": {kind: float((best["kind"] == kind).mean()) for kind in KINDS},
        "mean_similarity": float(best["similarity"].mean()),
        "truncated_sentences": int(counts["truncated_sentences"]),
        "dropped_detections": int(counts["dropped_detections"]),
        "similarity_histogram": {
            "edges": HISTOGRAM_EDGES.tolist(),
            "counts": np.histogram(best["similarity"], HISTOGRAM_EDGES)[0].tolist(),
        },
    }
    if truth is not None:
        metrics |= truth_agreement(best, truth)
    return metrics


def truth_agreement(best: pd.DataFrame, truth: pd.DataFrame) -> dict[str, float]:
    """How well the chosen boxes fit the true boxes of their sentences, over the best pairs whose sentence has one.

    pairs_with_truth: their number; true_region_share: the fraction with an IoU of at least 0.5; mean_true_iou. A
    sentence is known by where it starts in the caption. Empty where there is no such pair.
    """
    joined = best.merge(truth[["image_id", "char_start", *BOX]], on=["image_id", "char_start"], suffixes=("", "_true"))
    if joined.empty:
        return {"pairs_with_truth": 0}
    iou = box_iou(joined[BOX].to_numpy(float), joined[[f"{name}_true" for name in BOX]].to_numpy(float))  # [P]
    return {
        "pairs_with_truth": len(joined),
        "true_region_share": float((iou >= TRUE_IOU).mean()),
        "mean_true_iou": float(iou.mean()),
    }


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of the metrics, nested names joined by a dot; lists are left out."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}.{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, int | float):
            numbers[name] = float(value)
    return numbers
