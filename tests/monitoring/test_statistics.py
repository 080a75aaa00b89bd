"""The statistics against slow obvious ones, and the permutation test against all permutations there are."""

import itertools
import math

import numpy as np
import pytest

from fast_goal.monitoring.statistics import Pool, dealings, energy, kolmogorov_smirnov, permutation_test, pool, total_variation


def keys(numbers) -> np.ndarray:
    """A key for each number."""
    return np.array([list(int(number).to_bytes(16, "little")) for number in numbers], np.uint8).reshape(-1, 16)


def sides(places) -> Pool:
    """Members by where they stand: "a", "b" or both, "ab"."""
    return Pool(np.arange(len(places)), *(np.array([side in place for place in places]) for side in "ab"))


def once(statistic, members: Pool) -> float:
    return float(statistic(members.first[None], members.second[None])[0])


def slow_energy(values, first, second) -> float:
    def mean(one, other):
        found = [math.dist(values[i], values[j]) for i in one for j in other if i != j]
        return sum(found) / len(found)

    across = mean(first, second)
    return (2 * across - mean(first, first) - mean(second, second)) / (2 * across)


def slow_ks(values, first, second) -> float:
    def share(side, limit):
        return sum(values[i] <= limit for i in side) / len(side)

    return max(abs(share(first, limit) - share(second, limit)) for limit in values)


def slow_total_variation(counts, first, second) -> float:
    def share(side, label):
        return sum(counts[i][label] for i in side) / sum(sum(counts[i]) for i in side)

    return sum(abs(share(first, label) - share(second, label)) for label in range(len(counts[0]))) / 2


MADE = {
    "energy": (energy, slow_energy, lambda generator, n: generator.normal(size=(n, 3))),
    "ks": (kolmogorov_smirnov, slow_ks, lambda generator, n: generator.integers(0, 4, n)),  # many ties
    "variation": (
        total_variation,
        slow_total_variation,
        lambda generator, n: generator.integers(0, 3, (n, 4)) + np.eye(4, dtype=int)[0],
    ),
}
PLACES = [["a"] * 4 + ["b"] * 5, ["a", "ab", "b", "ab", "ab", "b", "a", "b"], ["ab"] * 5 + ["b"] * 3]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("places", PLACES, ids=["apart", "overlapping", "grown"])
def test_a_statistic_is_what_its_definition_says(name, places):
    make, slow, draw = MADE[name]
    members = sides(places)
    first, second = np.flatnonzero(members.first).tolist(), np.flatnonzero(members.second).tolist()
    for seed in range(5):
        values = draw(np.random.default_rng(seed), len(places))
        assert once(make(values), members) == pytest.approx(slow(values.tolist(), first, second), abs=1e-12)


def test_statistics_of_samples_with_nothing_in_common_and_of_equal_ones():
    apart, same = sides(["a"] * 3 + ["b"] * 3), sides(["ab"] * 4)
    assert once(energy(np.array([[0.0], [0], [0], [5], [5], [5]])), apart) == 1
    assert once(kolmogorov_smirnov(np.array([1, 1, 2, 7, 8, 9])), apart) == 1
    assert once(total_variation(np.array([[1, 0]] * 3 + [[0, 2]] * 3)), apart) == 1
    assert once(energy(np.random.default_rng(0).normal(size=(4, 2))), same) == pytest.approx(0, abs=1e-12)
    assert once(energy(np.zeros((6, 2))), apart) == 0, "all in one place"
    assert once(total_variation(np.array([[1, 2]] * 3 + [[0, 0]] * 3)), apart) == 1, "one sample without any label"
    assert once(total_variation(np.zeros((6, 2))), apart) == 0


def test_the_energy_coefficient_is_without_bias():
    members = sides(["a"] * 6 + ["ab"] * 4 + ["b"] * 8)
    found = [once(energy(np.random.default_rng(seed).normal(size=(18, 4))), members) for seed in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(len(found))
    assert min(found) < 0 < max(found)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("places", [["a"] * 3 + ["b"] * 4, ["a", "a", "ab", "ab", "b", "b", "b"], ["ab"] * 4 + ["b"] * 2])
def test_p_is_exact_where_all_dealings_can_be_gone_through(name, places):
    make, slow, draw = MADE[name]
    values = draw(np.random.default_rng(1), len(places))
    members = sides(places)

    def measured(order):
        chosen = [[i for i, place in enumerate(order) if side in place] for side in "ab"]
        return slow(values.tolist(), *chosen)

    orders = set(itertools.permutations(places))
    observed = measured(tuple(places))
    expected = sum(measured(order) >= observed - 1e-9 for order in orders) / len(orders)
    found = permutation_test(make(values), members, 1000, 0.05)
    assert dealings(members) == len(orders)
    assert (found.exact, found.p) == (True, pytest.approx(expected))
    drawn = permutation_test(make(values), members, len(orders) - 1, 0.05)
    assert not drawn.exact and drawn.p >= 1 / len(orders)


def test_a_drawn_p_comes_near_the_exact_one_and_counts_the_observed_dealing():
    values = np.random.default_rng(3).normal(size=12)
    values[6:] += 0.8
    members = sides(["a"] * 6 + ["b"] * 6)
    exact = permutation_test(kolmogorov_smirnov(values), members, 924, 0.05)
    drawn = permutation_test(kolmogorov_smirnov(values), members, 900, 0.05)
    assert exact.exact and not drawn.exact
    assert drawn.p == pytest.approx(exact.p, abs=0.04)
    assert drawn == permutation_test(kolmogorov_smirnov(values), members, 900, 0.05), "the same data, the same p"
    apart = permutation_test(kolmogorov_smirnov(np.arange(40)), sides(["a"] * 20 + ["b"] * 20), 499, 0.05)
    assert apart.p == 1 / 500


def test_equal_samples_have_one_dealing():
    found = permutation_test(energy(np.random.default_rng(0).normal(size=(30, 4))), sides(["ab"] * 30), 99, 0.05)
    assert (found.p, found.exact) == (1, True)


@pytest.mark.parametrize(
    "places",
    [["a"] * 12 + ["b"] * 15, ["a"] * 8 + ["ab"] * 8 + ["b"] * 8, ["ab"] * 15 + ["b"] * 10],
    ids=["apart", "overlapping", "grown"],
)
@pytest.mark.parametrize("name", ["energy", "ks"])
def test_without_drift_p_is_uniform(name, places):
    make, _, _ = MADE[name]
    members = sides(places)
    found = []
    for seed in range(300):
        values = np.random.default_rng(seed).normal(size=(len(places), 4))
        values = values if name == "energy" else values[:, 0]
        found.append(permutation_test(make(values), members, 99, 0.05, seed).p)
    for level in (0.05, 0.2, 0.5, 0.8):
        share = np.mean(np.array(found) <= level)
        spread = 3.5 * math.sqrt(level * (1 - level) / len(found))
        # the values of ks are few, so that p stays behind the level, but never goes beyond it
        assert share <= level + spread
        assert name == "ks" or share >= level - spread


@pytest.mark.parametrize("places", [["a"] * 30 + ["b"] * 30, ["ab"] * 40 + ["b"] * 20, ["a"] * 20 + ["ab"] * 20 + ["b"] * 20])
def test_a_shift_is_found(places):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(60, 4))
    counts = generator.poisson([1, 1, 1], (60, 3))
    moved = np.array([place == "b" for place in places])
    values[moved] += 1.5
    counts[moved, 2] += 2
    members = sides(places)
    for statistic in (energy(values), kolmogorov_smirnov(values[:, 0]), total_variation(counts)):
        found = permutation_test(statistic, members, 999, 0.01)
        assert found.p < 0.01 and found.statistic > found.bound


def test_the_bound_is_what_chance_exceeds_with_the_level():
    members, values = sides(["a"] * 5 + ["b"] * 5), np.random.default_rng(0).normal(size=10)
    statistic = kolmogorov_smirnov(values)
    orders = [list(chosen) for chosen in itertools.combinations(range(10), 5)]
    found = []
    for chosen in orders:
        first = np.isin(np.arange(10), chosen)
        found.append(once(statistic, Pool(np.arange(10), first, ~first)))
    bound = permutation_test(statistic, members, 252, 0.1).bound
    assert np.mean(np.array(found) > bound + 1e-9) <= 0.1 < np.mean(np.array(found) >= bound - 1e-9)


def test_a_pool_has_everybody_once():
    members = pool(keys([7, 3, 9]), keys([1, 9, 3, 4]))
    stacked = [7, 3, 9, 1, 9, 3, 4]
    assert sorted(stacked[row] for row in members.rows) == [1, 3, 4, 7, 9]
    found = {stacked[row]: (bool(a), bool(b)) for row, a, b in zip(*members, strict=True)}
    assert found == {7: (True, False), 3: (True, True), 9: (True, True), 1: (False, True), 4: (False, True)}
