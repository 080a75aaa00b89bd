import numpy as np
import pandas as pd
import pytest

from fast_goal.flism.metrics import flat, flism_metrics, truth_agreement
from fast_goal.flism.shards import Outcome


def pair(image_id, rank, similarity, kind, box=(0, 0, 10, 10), start=0):
    place = dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))
    return {"image_id": image_id, "rank": rank, "char_start": start, **place, "kind": kind, "similarity": similarity}


PAIRS = pd.DataFrame(
    [
        pair("a", 1, 0.31, "detector"),
        pair("a", 2, -0.9, "centre"),
        pair("b", 1, 1.0, "quadrant", (0, 0, 10, 5), 7),
        pair("c", 1, -1.0, "detector", start=3),
    ]
)
REGIONS = pd.DataFrame({"image_id": list("aaabbbccc")})
SKIPPED = pd.DataFrame({"sample": ["d"], "reason": ["no region"]})
OUTCOMES = [
    Outcome("1", "a", None, 4, 2, {"class": 1}),
    Outcome("2", "b", None, 3, 1, {}),
    Outcome("3", "c", None, 1, 0, {}),
    Outcome("4", "d", "no region", 4, 0, {"min_area": 2, "class": 1}),
]


def true(image_id, start, box):
    return {"image_id": image_id, "char_start": start, **dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))}


def test_metrics_by_hand():
    metrics = flism_metrics(REGIONS, PAIRS, SKIPPED, OUTCOMES, seconds=2.0)
    assert metrics["share_by_kind"] == {"detector": pytest.approx(2 / 3), "quadrant": pytest.approx(1 / 3), "centre": 0}
    assert metrics["mean_similarity"] == pytest.approx(0.31 / 3)
    assert (metrics["images"], metrics["skipped"], metrics["pairs"]) == (3, 1, 4)
    assert (metrics["images_per_second"], metrics["regions_per_image"]) == (2, 3)
    assert (metrics["sentences"], metrics["truncated_sentences"], metrics["truncated_share"]) == (12, 3, 0.25)
    assert (metrics["dropped_detections"], metrics["skipped_share"]) == (4, 0.25)
    none = {"degenerate": 0, "merged": 0, "max_detections": 0}
    assert metrics["dropped_by_reason"] == {"class": 2, "min_area": 2, **none}
    assert metrics["skipped_by_reason"] == {"no_region": {"images": 1, "share": 0.25}}
    histogram = metrics["similarity_histogram"]
    assert (len(histogram["edges"]), len(histogram["counts"])) == (41, 40)
    # 1.0 belongs to the last bin, -1.0 to the first
    assert np.flatnonzero(histogram["counts"]).tolist() == [0, 26, 39]
    assert "true_region_share" not in metrics


def test_truth_agreement_counts_sentences_with_a_box_alone():
    truth = pd.DataFrame([true("a", 0, (0, 0, 10, 10)), true("b", 7, (0, 0, 10, 11)), true("c", 99, (0, 0, 1, 1))])
    agreement = truth_agreement(PAIRS[PAIRS["rank"] == 1], truth)
    assert agreement == {"pairs_with_truth": 2, "true_region_share": 0.5, "mean_true_iou": pytest.approx((1 + 50 / 110) / 2)}


def test_an_overlap_of_exactly_a_half_counts():
    truth = pd.DataFrame([true("b", 7, (0, 0, 10, 10))])
    assert truth_agreement(PAIRS, truth)["true_region_share"] == 1


def test_truth_agreement_of_nothing():
    assert truth_agreement(PAIRS, pd.DataFrame([true("z", 0, (0, 0, 1, 1))])) == {"pairs_with_truth": 0}


def test_flat():
    assert flat({"a": 1, "b": {"c": 0.5, "edges": [1, 2]}, "name": "x"}) == {"a": 1.0, "b.c": 0.5}
