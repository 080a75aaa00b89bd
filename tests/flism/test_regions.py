import collections
import math

import numpy as np
import pytest

from fast_goal.flism.regions import DROP_REASONS, Detections, box_iou, candidate_regions, spatial_regions


def detections(*boxes, scores=None):
    return Detections(
        np.array(boxes, dtype=float), [f"thing{i}" for i in range(len(boxes))], np.array(scores or [0.5] * len(boxes))
    )


def test_spatial_regions_by_hand():
    expected = [[0, 0, 50, 30], [50, 0, 100, 30], [0, 30, 50, 60], [50, 30, 100, 60], [25, 15, 75, 45]]
    np.testing.assert_array_equal(spatial_regions(100, 60), expected)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (641, 479), (10_000, 1)])
def test_spatial_regions_tile_the_image_and_join_the_quadrants_centres(size):
    boxes = spatial_regions(*size)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert boxes.shape == (5, 4)
    assert boxes.dtype == np.float64
    np.testing.assert_allclose(areas[:4].sum(), size[0] * size[1])
    centres = (boxes[:4, :2] + boxes[:4, 2:]) / 2
    np.testing.assert_allclose(boxes[4], [*centres[0], *centres[3]])


def test_spatial_regions_of_nothing():
    with pytest.raises(ValueError, match="0 x 5"):
        spatial_regions(0, 5)


def test_both_puts_spatial_first_and_keeps_the_detectors_order():
    regions = candidate_regions(100, 60, detections([10, 10, 20, 30], [0, 0, 90, 60], scores=[0.4, 0.9]))
    assert regions.kinds == ["quadrant"] * 4 + ["centre"] + ["detector"] * 2
    assert regions.labels == [""] * 5 + ["thing0", "thing1"]
    np.testing.assert_array_equal(regions.scores, [1] * 5 + [0.4, 0.9])
    np.testing.assert_array_equal(regions.boxes[5:], [[10, 10, 20, 30], [0, 0, 90, 60]])
    assert (len(regions), sum(regions.dropped.values())) == (7, 0)


def test_detector_and_spatial_only():
    found = detections([10, 10, 20, 30])
    assert candidate_regions(100, 60, found, "detector").kinds == ["detector"]
    assert candidate_regions(100, 60, found, "spatial").kinds == ["quadrant"] * 4 + ["centre"]
    nothing = candidate_regions(100, 60, Detections.none(), "detector")
    assert len(nothing) == 0
    assert nothing.boxes.shape == (0, 4)


def test_clipping_and_dropping():
    found = detections(
        [-5, -5, 30, 30],  # clipped
        [90, 50, 130, 90],  # clipped
        [120, 0, 130, 10],  # outside
        [20, 20, 20.5, 40],  # half a pixel wide
        [40, 40, 30, 50],  # turned round
        [np.nan, 0, 10, 10],
        [0, 0, np.inf, 10],
    )
    regions = candidate_regions(100, 60, found, "detector")
    np.testing.assert_array_equal(regions.boxes, [[0, 0, 30, 30], [90, 50, 100, 60]])
    assert regions.labels == ["thing0", "thing1"]
    assert regions.dropped == {"degenerate": 5, "class": 0, "min_area": 0, "merged": 0, "max_detections": 0}


def test_min_area_is_a_fraction_of_the_image_after_clipping():
    found = detections([0, 0, 10, 10], [0, 0, 10, 11], [-90, 0, 10, 10])
    assert candidate_regions(100, 100, found, "detector", 0.01).dropped["min_area"] == 0
    regions = candidate_regions(100, 100, found, "detector", 0.0101)
    assert (regions.labels, regions.dropped["min_area"]) == (["thing1"], 2)


def test_classes_and_the_most_confident():
    boxes = [[i, i, i + 20, i + 20] for i in range(6)]
    found = detections(*boxes, scores=[0.5, 0.9, 0.5, 0.7, 0.5, 0.8])
    regions = candidate_regions(100, 100, found, "detector", max_detections=4)
    assert regions.labels == ["thing0", "thing1", "thing3", "thing5"]  # of the equal ones the first, in the old order
    assert regions.dropped["max_detections"] == 2
    regions = candidate_regions(100, 100, found, "detector", classes=["thing1", "thing2", "thing4"], max_detections=2)
    assert regions.labels == ["thing1", "thing2"]
    assert (regions.dropped["class"], regions.dropped["max_detections"]) == (3, 1)


def test_merging_by_hand():
    found = detections([0, 0, 50, 29], [60, 40, 80, 58], [60, 40, 80, 59], [61, 40, 80, 58], scores=[0.9, 0.5, 0.8, 0.7])
    regions = candidate_regions(100, 60, found, "both", merge_iou=0.85)
    assert len(regions) == 6  # the first box is nearly the top left quadrant, the others nearly the third
    assert (regions.labels[5], regions.dropped["merged"]) == ("thing2", 3)
    assert candidate_regions(100, 60, found, "detector", merge_iou=0.85).labels == ["thing0", "thing2"]
    assert candidate_regions(100, 60, found, "detector", merge_iou=0.96).labels == ["thing0", "thing1", "thing2", "thing3"]
    assert candidate_regions(100, 60, detections([0, 0, 50, 30], scores=[0.5]), merge_iou=1.0).dropped["merged"] == 1


def test_the_spatial_regions_are_never_merged():
    assert len(candidate_regions(100, 60, detections([30, 20, 60, 40]), merge_iou=0.01)) == 5


def slow_regions(width, height, found, use, min_area, classes, max_detections, merge_iou):
    """Box by box, as the docstring says: the indices of the detections that stay, and why the others do not."""
    spatial = [] if use == "detector" else spatial_regions(width, height).tolist()
    reasons, waiting = {}, []
    for index, (box, label, score) in enumerate(zip(found.boxes.tolist(), found.labels, found.scores.tolist(), strict=True)):
        x1, y1, x2, y2 = (min(max(value, 0), limit) for value, limit in zip(box, (width, height) * 2, strict=True))
        if not all(map(math.isfinite, [*box, score])) or x2 - x1 < 1 or y2 - y1 < 1:
            reasons[index] = "degenerate"
        elif classes is not None and label not in classes:
            reasons[index] = "class"
        elif (x2 - x1) * (y2 - y1) < min_area * width * height:
            reasons[index] = "min_area"
        else:
            waiting.append((-score, index, (x1, y1, x2, y2)))
    kept, boxes = [], list(spatial)
    for _, index, box in sorted(waiting):
        if merge_iou is not None and any(slow_iou(box, other) >= merge_iou for other in boxes):
            reasons[index] = "merged"
        else:
            kept.append(index)
            boxes.append(box)
    for index in kept[max_detections:] if max_detections is not None else []:
        reasons[index] = "max_detections"
    return [index for index in range(len(found.labels)) if index not in reasons], collections.Counter(reasons.values())


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


@pytest.mark.parametrize("seed", range(60))
def test_against_the_slow_oracle(seed):
    rng = np.random.default_rng(seed)
    count, width, height = int(rng.integers(0, 40)), 40, 30
    boxes = np.concatenate([rng.integers(-4, 40, (count, 2)), np.zeros((count, 2))], 1).astype(float)
    boxes[:, 2:] = boxes[:, :2] + rng.integers(0, 25, (count, 2))
    boxes[rng.random(count) < 0.05, 1] = np.nan
    scores = rng.integers(1, 6, count) / 8  # many are equal
    scores[rng.random(count) < 0.05] = np.nan
    found = Detections(boxes, [str(label) for label in rng.choice(["cat", "dog", "car"], count)], scores)
    arguments = (
        str(rng.choice(["both", "detector"])),
        float(rng.choice([0.0, 0.05, 0.2])),
        [None, ["cat", "car"], []][rng.integers(3)],
        [None, 1, 5][rng.integers(3)],
        [None, 0.3, 0.6, 1.0][rng.integers(4)],
    )
    regions = candidate_regions(width, height, found, *arguments)
    kept, reasons = slow_regions(width, height, found, *arguments)
    spatial = 0 if arguments[0] == "detector" else 5
    assert regions.kinds[spatial:] == ["detector"] * len(kept)
    assert regions.labels[spatial:] == [found.labels[index] for index in kept]
    np.testing.assert_array_equal(regions.scores[spatial:], scores[kept])
    np.testing.assert_array_equal(regions.boxes[spatial:], np.clip(boxes[kept], 0, [width, height] * 2))
    assert collections.Counter(regions.dropped) == reasons
    assert list(regions.dropped) == list(DROP_REASONS)


def test_box_iou_against_counted_pixels():
    rng = np.random.default_rng(1)
    first, second = (np.sort(rng.integers(0, 12, (50, 2, 2)), axis=1).reshape(50, 4).astype(float) for _ in range(2))
    grid_y, grid_x = np.mgrid[:12, :12]
    for a, b, value in zip(first, second, box_iou(first, second), strict=True):
        inside = [(grid_x >= x1) & (grid_x < x2) & (grid_y >= y1) & (grid_y < y2) for x1, y1, x2, y2 in (a, b)]
        union = (inside[0] | inside[1]).sum()
        assert value == pytest.approx((inside[0] & inside[1]).sum() / union if union else 0)
