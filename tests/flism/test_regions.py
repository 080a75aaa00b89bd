import numpy as np
import pytest

from fast_goal.flism.regions import Detections, box_iou, candidate_regions, spatial_regions


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
    assert (len(regions), regions.dropped) == (7, 0)


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
    assert regions.dropped == 5


def test_min_area_is_a_fraction_of_the_image_after_clipping():
    found = detections([0, 0, 10, 10], [0, 0, 10, 11], [-90, 0, 10, 10])
    assert candidate_regions(100, 100, found, "detector", 0.01).dropped == 0
    regions = candidate_regions(100, 100, found, "detector", 0.0101)
    assert (regions.labels, regions.dropped) == (["thing1"], 2)


def test_box_iou_against_counted_pixels():
    rng = np.random.default_rng(1)
    first, second = (np.sort(rng.integers(0, 12, (50, 2, 2)), axis=1).reshape(50, 4).astype(float) for _ in range(2))
    grid_y, grid_x = np.mgrid[:12, :12]
    for a, b, value in zip(first, second, box_iou(first, second), strict=True):
        inside = [(grid_x >= x1) & (grid_x < x2) & (grid_y >= y1) & (grid_y < y2) for x1, y1, x2, y2 in (a, b)]
        union = (inside[0] | inside[1]).sum()
        assert value == pytest.approx((inside[0] & inside[1]).sum() / union if union else 0)
