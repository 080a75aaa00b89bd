"""How far a measured mean, or the difference of two models, could move with other test images: intervals and a test.

Intervals: percentile method (Efron 1979): resample with replacement, take the 2.5 % and 97.5 % quantiles of the statistic.
Two models are compared on the same resamples, so what both find hard or easy cancels out. Where several values belong
to one image (five captions, several sentences), images are resampled, not values: the values of one image are not
independent, and treating them so gives intervals that are too narrow.

Test (`paired_test`): were the models exchangeable on every image, the sign of each image's difference would be a coin's.
The p-value is the share of all such signs under which the means differ at least as much as they do, in either direction. It
is exact where the signs can be counted out, which they always can for hits; else it is estimated from drawn signs, counting
the observed ones as drawn (Phipson and Smyth 2010), so that it is never 0 and believes no false difference too often.

Both speak of the choice of test images only, not of the training seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
DRAWS_AT_ONCE = 4_000_000  # a guess: resampled indices held in memory at one time, 32 MB
ENUMERATED = 16  # images that differ, up to which all their signs are gone through: 65,536 combinations
COUNTED = 1_000_000_000  # a guess: additions up to which whole differences are counted out, about a second


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval, in the unit of the values."""

    value: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        """True where the interval of a difference leaves out zero."""
        return self.low > 0 or self.high < 0


class PairedTest(NamedTuple):
    """A difference of means, in the unit of the values, and how likely one so large is between exchangeable models."""

    value: float
    p_value: float  # two-sided
    exact: bool  # False: estimated from drawn signs


def interval(
    values: ArrayLike,
    baseline: ArrayLike | None = None,
    samples: int = 1000,
    seed: int = 0,
    groups: Sequence[object] | np.ndarray | None = None,
) -> Interval:
    """The interval of a mean, or of a paired difference of means.

    Args:
        values: [n], for example 1.0 where a query was a hit and 0.0 where it was not.
        baseline: [n], the same queries with the other model; the estimate is then mean(values) - mean(baseline).
        samples: resamples.
        seed: the same seed, number of groups and `samples` draw the same resamples.
        groups: [n], what is resampled as a whole, such as the image of each caption. None: each value for itself.
            With groups of unequal size the estimate stays the mean over values, not over groups.

    Raises:
        ValueError: no values, lengths that differ, values that are not finite.
    """
    numbers, sums, counts = _grouped(values, baseline, groups)
    generator = np.random.default_rng(seed)
    means = []
    chunk = max(1, DRAWS_AT_ONCE // len(sums))
    for start in range(0, samples, chunk):
        drawn = generator.integers(len(sums), size=(min(chunk, samples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(numbers.mean()), float(low), float(high))


def macro_interval(
    values: ArrayLike,
    baseline: ArrayLike | None,
    parts: ArrayLike,
    samples: int = 1000,
    seed: int = 0,
    groups: Sequence[object] | np.ndarray | None = None,
) -> Interval:
    """The interval of a mean of means: of the values of each part, all parts counting alike.

    Args:
        parts: [n], the part that each value belongs to. Every resample takes the means anew; a part of which it holds
            nothing is left out of it.
        values, baseline, samples, seed, groups: as for `interval`, of which this is the result where there is one part.

    Raises:
        ValueError: as for `interval`, or not one part per value.
    """
    numbers, sums, _ = _grouped(values, baseline, groups)
    part = np.unique(np.asarray(parts), return_inverse=True)[1]
    if len(part) != len(numbers):
        raise ValueError(f"expected one part per value: {len(part)} parts for {len(numbers)} values")
    owner = np.arange(len(numbers)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    several = int(part.max()) + 1
    rows, index = np.unique(owner * several + part, return_inverse=True)  # the values of one group and part together
    totals, counts = np.bincount(index, numbers), np.bincount(index)
    owners, places = rows // several, rows % several

    def mean(times: np.ndarray) -> float:
        sizes = np.bincount(places, times * counts, several)
        there = sizes > 0
        return float((np.bincount(places, times * totals, several)[there] / sizes[there]).mean())

    generator = np.random.default_rng(seed)
    means = []
    chunk = max(1, DRAWS_AT_ONCE // len(sums))
    for start in range(0, samples, chunk):
        for drawn in generator.integers(len(sums), size=(min(chunk, samples - start), len(sums))):
            means.append(mean(np.bincount(drawn, minlength=len(sums))[owners]))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean(np.ones(len(rows))), float(low), float(high))


def paired_test(
    values: ArrayLike,
    baseline: ArrayLike,
    groups: Sequence[object] | np.ndarray | None = None,
    samples: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """The sign-flip test of mean(values) - mean(baseline), the same queries with two models.

    Args:
        values, baseline: [n].
        groups: [n], whose signs are flipped as a whole, such as the image of each caption. None: each query for itself.
        samples: signs drawn for each image where they cannot be counted out.
        seed: of these.

    Raises:
        ValueError: as for `interval`, or samples < 1.
    """
    numbers, sums, _ = _grouped(values, baseline, groups)
    if samples < 1:
        raise ValueError(f"samples = {samples}: expected at least 1")
    value, differing = float(numbers.mean()), sums[sums != 0]
    whole = _whole(differing)
    if whole is not None and len(whole) * np.abs(whole).sum() <= COUNTED:
        return PairedTest(value, _counted(whole), True)
    if len(differing) <= ENUMERATED:
        reached = np.zeros(1)
        for number in differing:
            reached = np.concatenate([reached + number, reached - number])
        return PairedTest(value, float(_as_large(reached, differing).mean()), True)

    generator = np.random.default_rng(seed)
    larger, chunk = 1, max(1, DRAWS_AT_ONCE // len(differing))
    for start in range(0, samples, chunk):
        kept = generator.random((min(chunk, samples - start), len(differing))) < 0.5
        larger += int(_as_large(2 * (kept @ differing) - differing.sum(), differing).sum())
    return PairedTest(value, larger / (samples + 1), False)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, in the same order, raised so that all those below a level may be believed at once.

    The chance of even one false one is then at most the level, however the tests hang together (Holm 1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    raised, highest = [0.0] * len(order), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * p_values[index]))
        raised[index] = highest
    return raised


def _grouped(
    values: ArrayLike, baseline: ArrayLike | None, groups: Sequence[object] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values, or differences [n], and of each group their sum and number."""
    numbers = np.asarray(values, dtype=np.float64)
    if baseline is not None:
        other = np.asarray(baseline, dtype=np.float64)
        if other.shape != numbers.shape:
            raise ValueError(f"a paired difference needs as many values of both: {numbers.shape} and {other.shape}")
        numbers = numbers - other
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"expected finite values [n] with n > 0, got shape {numbers.shape}")

    if groups is None:
        return numbers, numbers, np.ones(len(numbers))
    if len(groups) != len(numbers):
        raise ValueError(f"expected one group per value: {len(groups)} groups for {len(numbers)} values")
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return numbers, np.bincount(index, numbers), np.bincount(index).astype(np.float64)


def _whole(differences: np.ndarray) -> np.ndarray | None:
    """The differences as the smallest whole numbers in the same proportion (hits in percent are multiples of 100)."""
    if (differences != np.rint(differences)).any() or np.abs(differences).sum() > 2**53:
        return None
    numbers = differences.astype(np.int64)
    return numbers // max(1, np.gcd.reduce(numbers))


def _counted(differences: np.ndarray) -> float:
    """The two-sided p-value of whole differences [G], from the chances of every sum that their signs can reach."""
    sizes = np.abs(differences)
    chances = np.zeros(sizes.sum() + 1)  # of the sum of those that are positive
    chances[0] = 1.0
    for size in sizes:
        chances *= 0.5
        chances[size:] += chances[:-size].copy()
    reached = 2 * np.arange(len(chances)) - sizes.sum()
    return min(1.0, float(chances[np.abs(reached) >= abs(differences.sum())].sum()))


def _as_large(reached: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """Where a sum of signed differences is at least as large as the observed one, but for the rounding of the sums."""
    return np.abs(reached) >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
