"""What a FLISM run found, in numbers. `P` best pairs with a true box."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fast_goal.flism.regions import DROP_REASONS, box_iou
from fast_goal.flism.shards import Outcome

KINDS = ("detector", "quadrant", "centre")
HISTOGRAM_EDGES = np.round(np.arange(-1.0, 1.0001, 0.05), 2)  # of the cosine similarity
TRUE_IOU = 0.5  # from which a region counts as the sentence's true box, as in detection benchmarks
BOX = ["x1", "y1", "x2", "y2"]


def flism_metrics(
    regions: pd.DataFrame,
    pairs: pd.DataFrame,
    skipped: pd.DataFrame,
    outcomes: Sequence[Outcome],
    seconds: float,
    truth: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """The metrics of a run; one outcome for each image asked for, `seconds` spent on all of them, in whatever run.

    images: those with a pair. images_per_second: of all. regions_per_image, pairs. skipped with skipped_share and
    skipped_by_reason (images, and their fraction of all). truncated_sentences: longer than the text context, with
    truncated_share of all sentences. dropped_detections and dropped_by_reason: what the filters left out. Over the best
    pairs of the images: share_by_kind (fractions), mean_similarity, similarity_histogram (edges and counts). With
    `truth` also `true_region` of `truth_agreement`.
    """
    best = pairs[pairs["rank"] == 1]
    used, images = regions["image_id"].nunique(), len(outcomes)
    sentences, truncated = sum(one.sentences for one in outcomes), sum(one.truncated for one in outcomes)
    dropped: Counter[str] = Counter()
    for outcome in outcomes:
        dropped.update(outcome.dropped)
    reasons = Counter(str(reason).replace(" ", "_") for reason in skipped["reason"])
    metrics: dict[str, Any] = {
        "images": int(used),
        "skipped": len(skipped),
        "skipped_share": len(skipped) / images,
        "skipped_by_reason": {reason: {"images": count, "share": count / images} for reason, count in sorted(reasons.items())},
        "images_per_second": images / seconds if seconds > 0 else 0.0,
        "regions_per_image": len(regions) / used,
        "pairs": len(pairs),
        "share_by_kind": {kind: float((best["kind"] == kind).mean()) for kind in KINDS},
        "mean_similarity": float(best["similarity"].mean()),
        "sentences": sentences,
        "truncated_sentences": truncated,
        "truncated_share": truncated / sentences if sentences else 0.0,
        "dropped_detections": sum(dropped.values()),
        "dropped_by_reason": {reason: dropped[reason] for reason in DROP_REASONS},
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
