"""Whether a candidate replaces the champion: every check on what was measured, each with its numbers and its bound.

The first data set of `evaluate.datasets` that has long captions is the one to be better on. On it, short captions, and on
every further data set long and short ones, must not get worse by more than `gate.short_tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fast_goal.config import GateConfig
from fast_goal.promotion.measure import Compared, Measured

ROUNDING = 1e-9  # percent points; a difference that is the bound but for the last bits of a sum counts as the bound
PROMOTED, REJECTED = "promoted", "rejected"


@dataclass(frozen=True)
class Check:
    """One condition: what was measured, what it is held against (None where there is no one number), and both in a sentence."""

    name: str
    passed: bool
    measured: float | None
    bound: float | None
    text: str


@dataclass(frozen=True)
class Decision:
    """`promoted` if every check passed, else `rejected`. reasons: the sentences that say why."""

    decision: str
    checks: list[Check]
    reasons: list[str]


def decide(measured: Measured, config: GateConfig, validation: Mapping[str, Any] | None) -> Decision:
    """Goes through all checks, also after one that failed. validation: data/validation/summary.json, None if there is none."""
    checks = [
        *_better(measured, config),
        *_not_worse(measured, config),
        _validation(validation, [*measured.long, *measured.short]),
        *_latency(measured, config),
        _finite(measured),
    ]
    failed = [check.text for check in checks if not check.passed]
    if failed:
        return Decision(REJECTED, checks, failed)
    return Decision(PROMOTED, checks, [checks[0].text, f"All {len(checks)} checks passed."])


def _better(measured: Measured, config: GateConfig) -> Iterator[Check]:
    about = f"R@1 with long captions on {measured.dataset}"
    yield _gain("long better", about, measured.long[measured.dataset], config)
    # a model that gives everything the same embedding has an R@1 of 100 % where ties count for the query
    yield _gain("long better, ties against", f"{about}, tied candidates counted as mistakes", measured.against_ties, config)


def _gain(name: str, about: str, found: Compared, config: GateConfig) -> Check:
    enough = found.difference >= config.margin - ROUNDING
    sure = config.significance is not None and found.difference > 0 and found.p < config.significance
    asked = f"at least {config.margin:+g}"
    if config.significance is not None:
        asked += f", or above 0 with p below {config.significance:g}"
    if enough:
        verdict = "that is enough"
    elif sure:
        verdict = f"less than {config.margin:+g}, but significant"
    else:
        verdict = "not enough"
    return Check(name, enough or sure, found.difference, config.margin, f"{about}: {_words(found)}; asked: {asked}; {verdict}.")


def _not_worse(measured: Measured, config: GateConfig) -> Iterator[Check]:
    bound = -config.short_tolerance
    for dataset in dict.fromkeys([measured.dataset, *measured.long, *measured.short]):
        kinds = {"long": measured.long, "short": measured.short}
        if dataset == measured.dataset:
            del kinds["long"]
        for kind, found in kinds.items():
            name = f"{kind} not worse" + ("" if dataset == measured.dataset else f" on {dataset}")
            if dataset not in found:
                yield Check(name, True, None, bound, f"{dataset} has no {kind} captions: not possible, counted as passed.")
                continue
            one = found[dataset]
            text = f"R@1 with {kind} captions on {dataset}: {_words(one)}; asked: at least {bound:+g}."
            yield Check(name, one.difference >= bound - ROUNDING, one.difference, bound, text)


def _words(found: Compared) -> str:
    return (
        f"{found.candidate:.2f} % against {found.champion:.2f} %, a difference of {found.difference:+.2f} points "
        f"(95 % interval {found.low:+.2f} to {found.high:+.2f}, p = {found.p:.3g})"
    )


def _validation(validation: Mapping[str, Any] | None, datasets: list[str]) -> Check:
    name = "validation clean"
    if validation is None:
        return Check(name, False, None, 0, "data/validation/summary.json does not exist; `dvc repro validate` writes it.")
    missing = [dataset for dataset in dict.fromkeys(datasets) if dataset not in validation["datasets"]]
    if missing:
        return Check(
            name,
            False,
            None,
            0,
            f"data/validation/summary.json does not speak of {', '.join(missing)}; run `dvc repro validate`.",
        )
    counts = validation["expectations"]
    critical, warnings = counts["critical"], counts["warnings"]
    text = f"Of the expectations on the data {critical} critical ones and {warnings} warnings failed; asked: no critical one."
    named = [
        f"{outcome['suite']}: {outcome['expectation']} ({outcome['observed']})"
        for outcome in validation["outcomes"]
        if not outcome["passed"] and outcome["severity"] in ("critical", "warning")
    ]
    if named:
        text += f" Failed: {'; '.join(named)}."
    return Check(name, critical == 0, critical, 0, text)


def _latency(measured: Measured, config: GateConfig) -> Iterator[Check]:
    for kind, times in measured.latency.items():
        seen = f"Median time for one {kind}: {times.candidate:.2f} ms against {times.champion:.2f} ms"
        name, text = f"latency ratio, {kind}", f"{seen}, {times.ratio:.2f} times between the fastest rounds"
        if config.latency_ratio is None:
            yield Check(name, True, times.ratio, None, f"{text}; no bound is set.")
        else:
            text = f"{text}; asked: at most {config.latency_ratio:g} times."
            yield Check(name, times.ratio <= config.latency_ratio, times.ratio, config.latency_ratio, text)
        name = f"latency, {kind}"
        if config.latency_ms is None:
            yield Check(name, True, times.candidate, None, f"{seen}; no bound in milliseconds is set.")
        else:
            text = f"{seen}; asked: at most {config.latency_ms:g} ms."
            yield Check(name, times.candidate <= config.latency_ms, times.candidate, config.latency_ms, text)


def _finite(measured: Measured) -> Check:
    numbers = measured.numbers()
    wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
    if wrong:
        some = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        text = f"{len(wrong)} of {len(numbers)} measured numbers are not finite: {some}. The candidate's training diverged."
        return Check("finite numbers", False, len(wrong), 0, text)
    return Check("finite numbers", True, 0, 0, f"All {len(numbers)} measured numbers are finite.")
