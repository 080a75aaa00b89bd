"""Every check at its bound and to both sides of it."""

import math
from dataclasses import replace

import pytest

from fast_goal.config import GateConfig
from fast_goal.promotion.gate import decide
from fast_goal.promotion.latency import Times
from fast_goal.promotion.measure import Compared, Measured

CONFIG = GateConfig(margin=1.0, significance=0.05, short_tolerance=1.0, latency_ratio=1.25, latency_ms=20.0)
CLEAN = {
    "datasets": {"scenes": {}, "photos": {}},
    "expectations": {"passed": 9, "failed": 1, "critical": 0, "warnings": 1},
    "outcomes": [
        {"suite": "scenes_records", "expectation": "aspect", "severity": "warning", "passed": False, "observed": "3 rows"},
        {"suite": "scenes_records", "expectation": "decodes", "severity": "critical", "passed": True, "observed": ""},
    ],
}
NAN = float("nan")


def compared(difference, p=0.5):
    return Compared(30 + difference, 30, difference, difference - 2, difference + 2, p)


def measured(**changes):
    good = Measured(
        "scenes",
        {"scenes": compared(5.0)},
        {"scenes": compared(0.0)},
        compared(5.0),
        {"text": Times(10, 10, 1.0), "image": Times(10, 10, 1.0)},
    )
    return replace(good, **changes)


def failed(found):
    return [check.name for check in found.checks if not check.passed]


def test_all_good():
    found = decide(measured(), CONFIG, CLEAN)
    assert found.decision == "promoted" and not failed(found)
    assert [check.name for check in found.checks] == [
        "long better",
        "long better, ties against",
        "short not worse",
        "validation clean",
        "latency ratio, text",
        "latency, text",
        "latency ratio, image",
        "latency, image",
        "finite numbers",
    ]
    assert "35.00 % against 30.00 %, a difference of +5.00 points (95 % interval +3.00 to +7.00, p = 0.5)" in found.reasons[0]
    assert "aspect (3 rows)" in found.checks[3].text and "decodes" not in found.checks[3].text


@pytest.mark.parametrize(
    ("difference", "p", "passes"),
    [
        (1.0, 1.0, True),  # at the margin
        (100 * 16 / 1600, 1.0, True),
        (sum([0.1] * 10), 1.0, True),  # 1 but for the last bits
        (0.999, 0.05, False),  # p has to be below
        (0.999, 0.049, True),
        (1e-6, 0.001, True),
        (0.0, 0.001, False),
        (-3.0, 0.001, False),  # significantly worse
        (NAN, NAN, False),
    ],
)
@pytest.mark.parametrize("where", ["long better", "long better, ties against"])
def test_long_better(difference, p, passes, where):
    one = compared(difference, p)
    changes = {"long": {"scenes": one}} if where == "long better" else {"against_ties": one}
    found = decide(measured(**changes), CONFIG, CLEAN)
    assert (where not in failed(found)) == passes
    assert (found.decision == "promoted") == passes
    assert len(found.checks) == 9, "the others are looked at as well"


def test_without_significance_the_margin_alone_counts():
    config = replace(CONFIG, significance=None)
    found = decide(measured(long={"scenes": compared(0.999, 1e-9)}), config, CLEAN)
    assert failed(found) == ["long better"] and "or above 0" not in found.checks[0].text
    assert decide(measured(long={"scenes": compared(1.0, 1.0)}), config, CLEAN).decision == "promoted"


@pytest.mark.parametrize(("difference", "passes"), [(-1.0, True), (-sum([0.1] * 10), True), (-1.001, False), (4, True)])
def test_short_not_worse(difference, passes):
    found = decide(measured(short={"scenes": compared(difference, 0.9)}), CONFIG, CLEAN)
    assert failed(found) == ([] if passes else ["short not worse"])
    if not passes:
        [reason] = found.reasons
        assert "29.00 % against 30.00 %" in reason and "asked: at least -1" in reason


def test_without_short_captions_that_is_said_and_passed():
    found = decide(measured(short={}), CONFIG, CLEAN)
    [check] = [check for check in found.checks if check.name == "short not worse"]
    assert check.passed and check.measured is None and "scenes has no short captions: not possible" in check.text
    assert found.decision == "promoted"


def test_a_further_data_set_must_not_get_worse():
    both = {"scenes": compared(5.0), "photos": compared(-1.0)}
    assert decide(measured(long=both), CONFIG, CLEAN).decision == "promoted"
    found = decide(measured(long={**both, "photos": compared(-1.2)}, short={**both, "photos": compared(-9)}), CONFIG, CLEAN)
    assert failed(found) == ["long not worse on photos", "short not worse on photos"]


def test_validation():
    found = decide(measured(), CONFIG, None)
    assert failed(found) == ["validation clean"] and "data/validation/summary.json does not exist" in found.reasons[0]
    found = decide(measured(), CONFIG, {**CLEAN, "datasets": {"photos": {}}})
    assert failed(found) == ["validation clean"] and "does not speak of scenes" in found.reasons[0]
    broken = {**CLEAN, "expectations": {**CLEAN["expectations"], "critical": 1}}
    broken["outcomes"] = [{**CLEAN["outcomes"][1], "passed": False, "observed": "2 rows"}]
    found = decide(measured(), CONFIG, broken)
    assert failed(found) == ["validation clean"] and "scenes_records: decodes (2 rows)" in found.reasons[0]


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize(
    ("times", "wrong"),
    [
        (Times(12.5, 10, 1.25), []),
        (Times(12.51, 10, 1.251), ["latency ratio"]),
        (Times(20.0, 20, 1.0), []),
        (Times(20.01, 20, 1.0), ["latency"]),
        (Times(26, 20, 1.3), ["latency ratio", "latency"]),
    ],
)
def test_latency(kind, times, wrong):
    latency = {**measured().latency, kind: times}
    found = decide(measured(latency=latency), CONFIG, CLEAN)
    assert failed(found) == [f"{name}, {kind}" for name in wrong]
    free = replace(CONFIG, latency_ratio=None, latency_ms=None)
    assert decide(measured(latency=latency), free, CLEAN).decision == "promoted"


def test_a_candidate_that_diverged_is_rejected_with_all_checks():
    nothing = Compared(NAN, 30.0, NAN, NAN, NAN, NAN)
    found = decide(measured(long={"scenes": nothing}, short={"scenes": nothing}, against_ties=nothing), CONFIG, CLEAN)
    assert failed(found) == ["long better", "long better, ties against", "short not worse", "finite numbers"]
    last = found.checks[-1]
    assert last.measured == 11 and "scenes.long.candidate" in last.text and math.isfinite(last.measured)
