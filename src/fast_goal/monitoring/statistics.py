"""How far two samples differ, and whether chance alone would make them differ so much: permutation tests.

A member may stand in both samples: the present training set usually holds most of the earlier one. Were all members drawn
from one distribution, it would be chance which of them stand in the one sample, in the other, or in both. A permutation
deals these three places out anew, as often as each was there; the p-value is the share of the dealings whose statistic
is at least the observed one. It is exact where all dealings can be gone through; else they are drawn, and the observed one
counts as drawn (Phipson and Smyth 2010), so that it is never 0. Two equal samples have one dealing, and p = 1.

Each statistic is an effect size by itself: 0 where the samples are alike, 1 where they have nothing in common. With enough
members every difference is significant; the effect says whether it matters.

Letters: `N` members, `M` rows of values, `P` dealings, `D` width, `L` labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

AT_ONCE = 250  # dealings in memory, a guess: 250 x 2,000 members in float64 are 4 MB
TOLERANCE = 1e-9  # of statistics, which are of the order of 1: sums in another order are no difference

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]  # who is in either sample, bool [P, N] each -> [P]


class Pool(NamedTuple):
    """The members of two samples, each once."""

    rows: np.ndarray  # int64 [N], where a member's values stand in those of the first sample followed by the second's
    first: np.ndarray  # bool [N], who is in the first sample
    second: np.ndarray  # bool [N]; everybody is in one of them at least


class Test(NamedTuple):
    """The outcome of a permutation test."""

    __test__ = False  # pytest would take it for a test of its own

    statistic: float
    p: float
    exact: bool  # False: estimated from drawn dealings
    bound: float  # what chance alone exceeds in a share of `level` of the dealings


def pool(first: np.ndarray, second: np.ndarray) -> Pool:
    """The pool of two samples known by their keys, uint8 [M, 16]; within a sample every key is unique."""
    keys = np.concatenate([first, second])
    _, rows, member = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    member = member.reshape(-1)
    sides = np.zeros((2, len(rows)), bool)
    sides[0, member[: len(first)]] = True
    sides[1, member[len(first) :]] = True
    return Pool(rows, *sides)


def permutation_test(statistic: Statistic, members: Pool, permutations: int, level: float, seed: int = 0) -> Test:
    """Tests whether the samples of a pool differ more than chance makes them.

    Args:
        statistic: of who stands where; large where the samples differ.
        members: both samples with a member at least.
        permutations: dealings to draw; all are gone through where there are no more than that.
        level: see `Test.bound`.
        seed: of the dealings.
    """
    observed = float(statistic(members.first[None], members.second[None])[0])
    exact = dealings(members) <= permutations
    dealt = _all(members) if exact else _drawn(members, permutations, np.random.default_rng(seed))
    found = np.concatenate([statistic(first, second) for first, second in dealt])
    larger = int((found >= observed - TOLERANCE).sum())
    p = larger / len(found) if exact else (1 + larger) / (1 + len(found))
    return Test(observed, p, exact, float(np.quantile(found, 1 - level, method="higher")))


def dealings(members: Pool) -> int:
    """In how many ways the places can be dealt out."""
    both = int((members.first & members.second).sum())
    return comb(len(members.rows), both) * comb(len(members.rows) - both, int(members.first.sum()) - both)


def energy(values: np.ndarray) -> Statistic:
    """The energy coefficient of embeddings [N, D] (Székely and Rizzo 2013), from their Euclidean distances.

    (2 mean distance between the samples - mean distance within either) / (2 mean distance between), from pairs of different
    members: without bias, and so somewhat below 0 as often as above it where the samples are alike. It sees any difference
    of the distributions, of places most of all. Both samples have two members at least.
    """
    values = np.asarray(values, np.float64)
    squares = (values**2).sum(1)
    distances = np.sqrt(np.clip(squares[:, None] + squares[None] - 2 * values @ values.T, 0, None))
    np.fill_diagonal(distances, 0)

    def statistic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        common = (first & second).sum(1)
        first, second = first.astype(np.float64), second.astype(np.float64)
        m, n = first.sum(1), second.sum(1)
        reached = first @ distances  # [P, N]
        across = (reached * second).sum(1) / (m * n - common)  # a common member has no distance to itself
        within = (reached * first).sum(1) / (m * (m - 1))
        within_second = ((second @ distances) * second).sum(1) / (n * (n - 1))
        top = 2 * across - within - within_second
        return np.divide(top, 2 * across, out=np.zeros_like(top), where=across > 0)

    return statistic


def kolmogorov_smirnov(values: np.ndarray) -> Statistic:
    """The largest distance of the two cumulative distributions of numbers [N], ties and all."""
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values)[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # the last of every run of equal numbers

    def statistic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        shares = [side[:, order].cumsum(1)[:, ends] / side.sum(1, keepdims=True) for side in (first, second)]
        return np.abs(shares[0] - shares[1]).max(1)

    return statistic


def total_variation(counts: np.ndarray) -> Statistic:
    """Half the sum of the differences of the labels' shares; counts [N, L], of each label with each member.

    Members change places with all their labels: two objects of one image are no independent evidence. A sample without any
    label is at the distance 1 from one that has some.
    """
    counts = np.asarray(counts, np.float64)

    def statistic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        sums = [side.astype(np.float64) @ counts for side in (first, second)]  # [P, L]
        totals = [side.sum(1, keepdims=True) for side in sums]
        shares = [side / np.maximum(total, 1) for side, total in zip(sums, totals, strict=True)]
        found = np.abs(shares[0] - shares[1]).sum(1) / 2
        return np.where(((totals[0] == 0) != (totals[1] == 0))[:, 0], 1.0, found)

    return statistic


def _places(members: Pool) -> np.ndarray:
    """0: in the first sample, 1: in the second, 2: in both; uint8 [N]."""
    return np.where(members.first & members.second, 2, np.where(members.first, 0, 1)).astype(np.uint8)


def _drawn(members: Pool, count: int, generator: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    places = _places(members)
    for start in range(0, count, AT_ONCE):
        dealt = generator.permuted(np.tile(places, (min(AT_ONCE, count - start), 1)), axis=1)
        yield dealt != 1, dealt != 0


def _all(members: Pool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every dealing, the observed one among them."""
    places = _places(members)
    everybody, both, only = range(len(places)), int((places == 2).sum()), int((places == 0).sum())
    dealt = []
    for common in combinations(everybody, both):
        rest = [member for member in everybody if member not in common]
        for chosen in combinations(rest, only):
            row = np.ones(len(places), np.uint8)
            row[list(common)], row[list(chosen)] = 2, 0
            dealt.append(row)
    for start in range(0, len(dealt), AT_ONCE):
        part = np.stack(dealt[start : start + AT_ONCE])
        yield part != 1, part != 0
