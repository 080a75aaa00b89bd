"""Which of the evaluation's numbers a tracking store gets.

metrics.json has some 800 for a data set: a store shows a chart for each, and nobody finds the few that matter. Kept are the
scores of both models, and of a model with text-conditioned pooling those of each mode and the time that a query takes; of
tasks beside `IN_FULL` only those at the first k; of suites those of the whole suite. Slices, groups, classes, differences with
their intervals and p, and what the tasks count, stand in metrics.json and in the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fast_goal.evaluation.headline import MODELS, MODES, flatten

IN_FULL = ("long", "short", "localisation")
SCORE = re.compile(r"(R|hit|mAP)(?P<k>\d+)|mrr|median_rank|accuracy|macro|mIoU|pixel_accuracy")
SECONDS = "seconds_per_query"
PARTS = ("slices", "groups", "families", "classes")  # how the names of parts of a test begin


def tracked(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Dotted names and values, as `flatten` makes them. metrics: by data set, as in metrics.json."""
    found: dict[str, float] = {}
    for dataset, tasks in metrics.items():
        for task, values in tasks.items():
            if isinstance(values, Mapping):
                flat = flatten(values)
                first = None if task in IN_FULL else _first_k(flat)
                found |= {f"{dataset}.{task}.{name}": value for name, value in flat.items() if _is_kept(name, first)}
    return found


def _is_kept(name: str, first: int | None) -> bool:
    *path, last = name.split(".")
    if SECONDS in path:
        return last in MODES
    score = SCORE.fullmatch(last)
    measured = any(part in path for part in (*MODELS, *MODES, "attention"))
    of_a_model = measured and not any(part.startswith(PARTS) for part in path)
    return score is not None and of_a_model and "difference" not in path and first in (None, int(score["k"] or 0))


def _first_k(flat: Mapping[str, float]) -> int | None:
    ks = [int(score["k"]) for name in flat if (score := SCORE.fullmatch(name.split(".")[-1])) and score["k"]]
    return min(ks, default=None)
