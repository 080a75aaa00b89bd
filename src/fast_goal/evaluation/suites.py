"""Sums up the answers of both models to suites of single questions: which caption, which class.

A suite is a set of questions (cases), each in one group: a kind of foil, a relation, a class. `accuracy` is the percentage of
its cases answered rightly, `macro` the mean of the groups' accuracies, `families` those of some groups that belong together.
A tie is a wrong answer, and counted.

Letters: `C` cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from fast_goal.evaluation.bootstrap import macro_interval, paired_test
from fast_goal.evaluation.comparison import difference, percent
from fast_goal.evaluation.headline import MODELS


@dataclass(frozen=True)
class Rule:
    """How a suite is summed up.

    first: what stands for the suite where there is room for one number. least: cases from which a group counts in `macro` and
    has a line of its own. left_out: groups that never do. families: by name, how the names of their groups begin.
    """

    first: Literal["accuracy", "macro"] = "accuracy"
    least: int = 1
    left_out: frozenset[str] = frozenset()
    families: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Answered(NamedTuple):
    """The answers of one model."""

    right: np.ndarray  # bool [C]
    tied: np.ndarray  # bool [C], wrong for nothing but a tie


def compare_suite(
    answered: Mapping[str, Answered],
    groups: np.ndarray,
    chance: np.ndarray,
    units: np.ndarray,
    rule: Rule,
    samples: int,
    details: bool = True,
) -> dict[str, Any]:
    """Both models, their differences and chance, in percent.

    Args:
        answered: by the keys of MODELS.
        groups: str [C].
        chance: [C], how likely a random answer is right, between 0 and 1.
        units: int64 [C], what is resampled as a whole: the group of images that each case belongs to.
        rule: of the suite.
        samples: of the bootstrap.
        details: whether the groups are listed.

    Returns:
        `cases`; `independent`, the number of units; `not_in_macro`, groups and cases that `macro` leaves out; and below each
        model, `difference` and `chance` the same names: `accuracy`, `macro` (not there where no group counts), `groups`,
        `families`. The rule's `first` comes first in `difference`.
    """
    codes, names = pd.factorize(groups)  # in order of appearance
    counts = np.bincount(codes, minlength=len(names))
    counted = [place for place, name in enumerate(names) if counts[place] >= rule.least and _plain(name) not in rule.left_out]
    shown = counted if details else []
    families = {
        family: [place for place in counted if _plain(names[place]).startswith(beginnings)]
        for family, beginnings in rule.families.items()
    }
    families = {family: places for family, places in families.items() if places}

    def summed(values: np.ndarray) -> dict[str, Any]:
        means = 100 * np.bincount(codes, values, len(names)) / counts
        found: dict[str, Any] = {"accuracy": percent(values)}
        if counted:
            found["macro"] = float(means[counted].mean())
        found["groups"] = {names[place]: {"accuracy": float(means[place])} for place in shown}
        found["families"] = {family: float(means[places].mean()) for family, places in families.items()}
        return found

    result: dict[str, Any] = {
        "cases": len(codes),
        "independent": len(np.unique(units)),
        "not_in_macro": {"groups": len(names) - len(counted), "cases": int(counts.sum() - counts[counted].sum())},
    }
    for model in MODELS:
        right, tied = answered[model]
        result[model] = {**summed(right), "ties": int(tied.sum())}
        ties = np.bincount(codes[tied], minlength=len(names))
        for place in shown:
            result[model]["groups"][names[place]] |= {"cases": int(counts[place]), "ties": int(ties[place])}

    right = {model: answered[model].right for model in MODELS}
    change: dict[str, Any] = {"accuracy": difference(right, units, samples)}
    if counted:
        change["macro"] = _mean_difference(right, codes, counted, units, samples)
    if rule.first in change:
        change = {rule.first: change.pop(rule.first), **change}
    change["groups"] = {}
    for place in shown:
        mine = codes == place
        part = {model: right[model][mine] for model in MODELS}
        change["groups"][names[place]] = {"accuracy": difference(part, units[mine], samples)}
    change["families"] = {family: _mean_difference(right, codes, places, units, samples) for family, places in families.items()}
    return {**result, "difference": change, "chance": summed(chance)}


def _mean_difference(
    right: Mapping[str, np.ndarray], codes: np.ndarray, places: list[int], units: np.ndarray, samples: int
) -> dict[str, float]:
    """Fine-tuned minus base of the mean over some groups, in percent points: value, low, high and p."""
    chosen = np.isin(codes, places)
    parts, owners = codes[chosen], units[chosen]
    mine, other = (100.0 * right[model][chosen] for model in ("finetuned", "base"))
    # each case weighted so that the plain mean is that of the groups' means; all weights are 1 where these are of one size
    weights = len(parts) / (len(places) * np.bincount(parts)[parts])
    tested = paired_test(weights * mine, weights * other, owners)
    return {**macro_interval(mine, other, parts, samples, groups=owners)._asdict(), "p": tested.p_value}


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
