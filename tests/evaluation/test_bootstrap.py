"""Bootstrap intervals against a loop, known theory and their own coverage."""

import random
import statistics

import numpy as np
import pytest

from fast_goal.evaluation import bootstrap
from fast_goal.evaluation.bootstrap import Interval, interval


def slow_interval(values, groups, samples, seed):
    """Percentiles of resampled means with Python lists and another generator: equal within sampling noise."""
    draw = random.Random(seed)
    members = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    names = list(members)
    means = sorted(statistics.fmean(v for g in draw.choices(names, k=len(names)) for v in members[g]) for _ in range(samples))
    return means[int(0.025 * samples)], means[int(0.975 * samples)]


def test_a_mean_agrees_with_a_loop_and_with_theory():
    hits = (np.arange(400) % 10 < 3).astype(float)
    found = interval(hits, samples=4000, seed=1)
    low, high = slow_interval(hits.tolist(), range(400), 4000, 2)
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)
    error = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.008)


def test_groups_agree_with_a_loop_when_their_sizes_differ():
    generator = np.random.default_rng(3)
    groups = generator.integers(40, size=200)
    values = (generator.random(200) < 0.2 + 0.6 * (groups % 2)).astype(float)
    found = interval(values, samples=4000, groups=groups)
    low, high = slow_interval(values.tolist(), groups.tolist(), 4000, 5)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)


def test_copies_of_a_caption_do_not_narrow_the_interval_of_grouped_hits():
    hits = (np.random.default_rng(0).random(200) < 0.5).astype(float)
    once = interval(hits)
    grouped = interval(np.repeat(hits, 5), groups=np.repeat(np.arange(200), 5))
    naive = interval(np.repeat(hits, 5))
    assert grouped == pytest.approx(once)
    assert naive.high - naive.low < 0.6 * (grouped.high - grouped.low)


def test_the_order_and_the_names_of_the_groups_do_not_matter():
    values, names = [1.0, 0.0, 1.0, 1.0, 0.0], ["b", "a", "b", "c", "a"]
    reordered = [(values[i], names[i]) for i in (3, 1, 0, 4, 2)]
    assert interval(values, groups=names) == interval([v for v, _ in reordered], groups=[n for _, n in reordered])


def test_a_paired_difference_is_tighter_than_two_separate_intervals():
    generator = np.random.default_rng(7)
    difficulty = generator.random(500)
    base, tuned = (difficulty < 0.4).astype(float), (difficulty < 0.5).astype(float)
    found = interval(tuned, base)
    assert found.value == pytest.approx(tuned.mean() - base.mean())
    assert found == interval(tuned - base)
    separate = interval(tuned)
    assert found.high - found.low < 0.8 * (separate.high - separate.low)
    assert found.shows_difference


def test_equal_models_show_no_difference():
    hits = (np.arange(50) % 2).astype(float)
    assert interval(hits, hits) == Interval(0.0, 0.0, 0.0)
    assert not interval(hits, hits).shows_difference
    assert interval([0.0, 0.0], [1.0, 1.0]).shows_difference


def test_about_95_of_100_intervals_hold_the_true_mean():
    generator = np.random.default_rng(11)
    covered = 0
    for seed in range(300):
        found = interval(generator.random(150) < 0.4, samples=400, seed=seed)
        covered += found.low <= 0.4 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_the_seed_decides_and_the_chunks_do_not(monkeypatch):
    values = np.random.default_rng(0).random(30)
    whole = interval(values, samples=101, seed=4)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 7 * 30)
    assert interval(values, samples=101, seed=4) == whole
    assert interval(values, samples=101, seed=5) != whole


def test_one_value():
    assert interval([1.0], samples=10) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "n > 0"),
        ([1.0, float("nan")], {}, "finite"),
        ([1.0, 0.0], {"baseline": [1.0]}, "as many values"),
        ([1.0, 0.0], {"groups": [1]}, "one group per value"),
    ],
)
def test_bad_input_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        interval(values, **options)
