"""Bootstrap intervals: how far a measured mean, or the difference of two models, could move with other test images.

Percentile method (Efron 1979): resample with replacement, take the 2.5 % and 97.5 % quantiles of the statistic.
Two models are compared on the same resamples, so what both find hard or easy cancels out. Where several values belong
to one image (five captions, several sentences), images are resampled, not values: the values of one image are not
independent, and treating them so gives intervals that are too narrow.

The interval speaks of the choice of test images only, not of the training seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
DRAWS_AT_ONCE = 4_000_000  # a guess: resampled indices held in memory at one time, 32 MB


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval, in the unit of the values."""

    value: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        """True where the interval of a difference leaves out zero."""
        return self.low > 0 or self.high < 0


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
    numbers = np.asarray(values, dtype=np.float64)
    if baseline is not None:
        other = np.asarray(baseline, dtype=np.float64)
        if other.shape != numbers.shape:
            raise ValueError(f"a paired difference needs as many values of both: {numbers.shape} and {other.shape}")
        numbers = numbers - other
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"expected finite values [n] with n > 0, got shape {numbers.shape}")

    if groups is None:
        sums, counts = numbers, np.ones(len(numbers))
    else:
        if len(groups) != len(numbers):
            raise ValueError(f"expected one group per value: {len(groups)} groups for {len(numbers)} values")
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = np.bincount(index, numbers), np.bincount(index).astype(np.float64)

    generator = np.random.default_rng(seed)
    means = []
    chunk = max(1, DRAWS_AT_ONCE // len(sums))
    for start in range(0, samples, chunk):
        drawn = generator.integers(len(sums), size=(min(chunk, samples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(numbers.mean()), float(low), float(high))
