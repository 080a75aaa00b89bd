"""Intervals and the paired test against loops, known theory and their own error rates."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from fast_goal.evaluation import bootstrap
from fast_goal.evaluation.bootstrap import Interval, PairedTest, holm, interval, paired_test


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


def enumerated_p(values, baseline, groups):
    """The share of all assignments of the two models' answers to the groups that differ at least as much."""
    names = sorted(set(groups))
    differences = [v - b for v, b in zip(values, baseline, strict=True)]
    observed, reached = sum(differences), []
    for signs in itertools.product((1, -1), repeat=len(names)):
        sign = dict(zip(names, signs, strict=True))
        reached.append(math.fsum(sign[g] * d for g, d in zip(groups, differences, strict=True)))
    return sum(abs(total) >= abs(observed) - 1e-9 for total in reached) / len(reached)


@pytest.mark.parametrize("seed", range(30))
def test_the_exact_test_agrees_with_an_enumeration(seed):
    generator = np.random.default_rng(seed)
    groups = generator.integers(generator.integers(1, 11), size=generator.integers(1, 40)).tolist()
    if seed % 2:  # hits in percent
        values, baseline = (100.0 * (generator.random(len(groups)) < share) for share in (0.7, 0.4))
    else:  # reciprocal ranks
        values, baseline = (1 / generator.integers(1, 6, len(groups)) for _ in range(2))
    found = paired_test(values, baseline, groups)
    assert found.exact
    assert found.value == pytest.approx(np.mean(values) - np.mean(baseline))
    assert found.p_value == pytest.approx(enumerated_p(values.tolist(), baseline.tolist(), groups), rel=1e-9)


def test_hits_of_single_queries_give_the_exact_mcnemar_test():
    better, worse, same = 60, 35, 4000
    values = np.r_[np.ones(better), np.zeros(worse), np.ones(same)]
    baseline = np.r_[np.zeros(better), np.ones(worse), np.ones(same)]
    tail = sum(math.comb(better + worse, k) for k in range(better, better + worse + 1)) / 2 ** (better + worse)
    found = paired_test(values, baseline)
    assert found.exact
    assert found.p_value == pytest.approx(2 * tail, rel=1e-9)
    assert paired_test(baseline, values).p_value == pytest.approx(found.p_value)


@pytest.mark.parametrize("seed", range(4))
def test_drawn_signs_estimate_the_exact_p_value(monkeypatch, seed):
    generator = np.random.default_rng(seed)
    groups = generator.integers(60, size=200)
    values, baseline = 1.0 * (generator.random(200) < 0.5), 1.0 * (generator.random(200) < 0.45)
    exact = paired_test(values, baseline, groups)
    assert exact.exact
    monkeypatch.setattr(bootstrap, "COUNTED", 0)
    drawn = paired_test(values, baseline, groups, samples=20_000)
    assert not drawn.exact
    # three standard errors of a share of 20,000 draws
    assert drawn.p_value == pytest.approx(exact.p_value, abs=3 * (exact.p_value * (1 - exact.p_value) / 20_000) ** 0.5 + 5e-5)


def test_the_p_value_of_drawn_signs_is_never_zero():
    found = paired_test(1 + np.random.default_rng(0).random(50), np.zeros(50), samples=99)
    assert found == PairedTest(pytest.approx(1.5, abs=0.1), 0.01, False)


def test_equal_models_have_a_p_value_of_one():
    assert paired_test([0.5, 0.25], [0.5, 0.25]) == PairedTest(0.0, 1.0, True)
    assert paired_test([1.0], [0.0]) == PairedTest(1.0, 1.0, True)  # one query shows nothing


def test_copies_of_a_caption_do_not_lower_the_p_value_of_grouped_hits():
    generator = np.random.default_rng(1)
    values, baseline = 1.0 * (generator.random(60) < 0.6), 1.0 * (generator.random(60) < 0.4)
    once = paired_test(values, baseline)
    copies = [np.repeat(part, 5) for part in (values, baseline)]
    assert paired_test(*copies, groups=np.repeat(np.arange(60), 5)) == once
    assert paired_test(*copies).p_value < once.p_value / 5


def test_a_true_null_is_rejected_about_as_often_as_the_level_says():
    generator, rejected = np.random.default_rng(4), 0
    for seed in range(400):
        difficulty = generator.normal(size=(40, 1))  # of each image, shared by its three captions
        values, baseline = (np.ravel(difficulty + generator.normal(size=(40, 3))) for _ in range(2))
        found = paired_test(values, baseline, np.repeat(np.arange(40), 3), samples=199, seed=seed)
        rejected += found.p_value <= 0.05
    assert 0.02 <= rejected / 400 <= 0.08


def test_the_test_and_the_interval_agree_about_a_clear_difference():
    generator = np.random.default_rng(7)
    difficulty = generator.random(500)
    base, tuned = 1.0 * (difficulty < 0.4), 1.0 * (difficulty < 0.5)
    assert paired_test(tuned, base).p_value < 1e-6
    assert interval(tuned, base).shows_difference


def test_drawn_signs_depend_on_the_seed_and_not_on_the_chunks(monkeypatch):
    values, baseline = np.random.default_rng(0).random((2, 30))
    whole = paired_test(values, baseline, samples=501, seed=4)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 7 * 30)
    assert paired_test(values, baseline, samples=501, seed=4) == whole


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # the standard example
    generator = random.Random(0)
    for _ in range(50):
        found = [generator.random() ** 3 for _ in range(generator.randint(1, 8))]
        raised = holm(found)
        for level in (0.01, 0.05, 0.3, 0.8):
            # step down: reject while the smallest p left is within the level divided by the number left
            left = sorted(range(len(found)), key=found.__getitem__)
            rejected = set()
            while left and found[left[0]] <= level / len(left):
                rejected.add(left.pop(0))
            assert {index for index, p in enumerate(raised) if p <= level} == rejected
    assert holm([]) == []


def test_a_test_without_draws_is_refused():
    with pytest.raises(ValueError, match="samples = 0"):
        paired_test([1.0], [0.0], samples=0)
    with pytest.raises(ValueError, match="as many values"):
        paired_test([1.0, 0.0], [1.0])
