"""Recall by a whole-numbered property of the queries: tokens of a caption, its sentences, objects in the image.

`Q` queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fast_goal.evaluation.bootstrap import interval


def slices(numbers: ArrayLike, edges: Sequence[int]) -> dict[str, np.ndarray]:
    """Which queries lie in each slice: bool [Q] by the slice's name, those of empty slices left out.

    numbers: whole, [Q]; edges: the last number of each slice but the open one, ascending. Edges 77 and 128 make the slices
    `up to 77`, `78 to 128` and `over 128`; edges 1 and 2 make `up to 1`, `2` and `over 2`.

    Raises:
        ValueError: numbers that are not whole, edges that do not ascend.
    """
    values = np.asarray(numbers)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"expected whole numbers [Q], got {values.dtype} of shape {values.shape}")
    if not edges or any(upper <= lower for lower, upper in pairwise(edges)):
        raise ValueError(f"expected ascending edges, got {list(edges)}")
    names = [f"up to {edges[0]}"]
    for lower, upper in pairwise(edges):
        names.append(f"{lower + 1} to {upper}" if lower + 1 < upper else f"{upper}")
    names.append(f"over {edges[-1]}")
    index = np.searchsorted(np.asarray(edges), values)  # an edge belongs to the slice that it ends
    return {name: index == place for place, name in enumerate(names) if (index == place).any()}


def sliced_recall(
    ranks: ArrayLike,
    numbers: ArrayLike,
    edges: Sequence[int],
    ks: Sequence[int],
    baseline: ArrayLike | None = None,
    samples: int = 1000,
    seed: int = 0,
    groups: Sequence[object] | np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Recall at each k in percent with its interval, for every slice that is not empty.

    Args:
        ranks: [Q], 1 is the best.
        numbers: [Q], and edges, as for `slices`.
        ks: of recall at k.
        baseline: [Q], ranks of another model; the recalls are then differences in percent points, ours minus that one's.
        samples, seed, groups: as for `bootstrap.interval`.

    Returns:
        By slice: `queries`, their number; `groups`, the number of their groups; and `R@k`, with value, low and high.
    """
    found = np.asarray(ranks)
    other = None if baseline is None else np.asarray(baseline)
    owners = np.arange(len(found)) if groups is None else np.asarray(groups)
    chosen = slices(numbers, edges)
    if any(len(part) != len(found) for part in (np.asarray(numbers), owners, found if other is None else other)):
        raise ValueError(f"expected a number, a group and a baseline for each of {len(found)} ranks")
    result: dict[str, dict[str, Any]] = {}
    for name, mine in chosen.items():
        result[name] = {"queries": int(mine.sum()), "groups": len(np.unique(owners[mine]))}
        for k in ks:
            hits = 100.0 * (found[mine] <= k)
            rivals = None if other is None else 100.0 * (other[mine] <= k)
            result[name][f"R@{k}"] = interval(hits, rivals, samples, seed, owners[mine])._asdict()
    return result
