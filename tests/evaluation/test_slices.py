"""Slices against plain comparisons, and their recall against the interval of the same queries."""

import numpy as np
import pytest

from fast_goal.evaluation.bootstrap import interval
from fast_goal.evaluation.slices import sliced_recall, slices


def test_every_query_lies_in_the_slice_that_its_name_says():
    tokens = np.array([5, 77, 78, 128, 129, 248, 249, 1000])
    found = slices(tokens, [77, 128, 248])
    assert list(found) == ["up to 77", "78 to 128", "129 to 248", "over 248"]
    assert [tokens[mine].tolist() for mine in found.values()] == [[5, 77], [78, 128], [129, 248], [249, 1000]]


def test_single_numbers_and_empty_slices():
    found = slices([0, 1, 2, 2, 9], [1, 2, 3, 5])
    assert {name: mine.nonzero()[0].tolist() for name, mine in found.items()} == {"up to 1": [0, 1], "2": [2, 3], "over 5": [4]}
    assert slices([3], [3]).keys() == {"up to 3"}


def test_recall_of_a_slice_is_that_of_its_queries_alone():
    generator = np.random.default_rng(0)
    ranks, rivals = generator.integers(1, 8, 200), generator.integers(1, 8, 200)
    sentences, images = generator.integers(1, 12, 200), generator.integers(60, size=200)
    alone = sliced_recall(ranks, sentences, [4, 8], [1, 5], samples=200, seed=3, groups=images)
    paired = sliced_recall(ranks, sentences, [4, 8], [1, 5], rivals, 200, 3, images)
    assert sum(part["queries"] for part in alone.values()) == 200
    for name, mine in (("up to 4", sentences <= 4), ("over 8", sentences > 8)):
        assert alone[name]["queries"] == mine.sum()
        assert alone[name]["groups"] == len(set(images[mine]))
        for k in (1, 5):
            hits, others = 100.0 * (ranks[mine] <= k), 100.0 * (rivals[mine] <= k)
            assert alone[name][f"R@{k}"] == interval(hits, None, 200, 3, images[mine])._asdict()
            assert paired[name][f"R@{k}"] == interval(hits, others, 200, 3, images[mine])._asdict()
            assert alone[name][f"R@{k}"]["value"] == pytest.approx(100 * np.mean(ranks[mine] <= k))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="whole numbers"):
        slices([1.5], [1])
    for edges in ([], [3, 3], [3, 2]):
        with pytest.raises(ValueError, match="ascending"):
            slices([1], edges)
    with pytest.raises(ValueError, match="each of 2 ranks"):
        sliced_recall([1, 2], [1], [1], [1])
