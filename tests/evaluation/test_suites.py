"""How suites are summed up: by hand-made answers, and against slow loops."""

import itertools
import random
import statistics

import numpy as np
import pytest

from fast_goal.evaluation.bootstrap import interval, macro_interval
from fast_goal.evaluation.suites import Answered, Rule, compare_suite
from fast_goal.evaluation.tasks.composition import RULES


def answers(groups):
    """groups: (name, right of the base, right of the fine-tuned, cases). Each case is an image of its own."""
    names, base, tuned = [], [], []
    for name, first, second, cases in groups:
        names += [name] * cases
        base += [True] * first + [False] * (cases - first)
        tuned += [True] * second + [False] * (cases - second)
    return np.array(names, dtype=object), {"base": np.array(base), "finetuned": np.array(tuned)}


def compare(groups, rule, units=None, **options):
    names, right = answers(groups)
    none = np.zeros(len(names), bool)
    answered = {model: Answered(found, none) for model, found in right.items()}
    units = np.arange(len(names)) if units is None else units
    return compare_suite(answered, names, np.full(len(names), 0.5), units, rule, 50, **options)


def test_sugarcrepe_is_the_mean_of_its_files_and_families_are_those_of_theirs():
    files = [
        ("replace_obj", 8, 9, 10),
        ("replace_att", 3, 6, 6),
        ("swap_obj", 1, 1, 2),
        ("add_obj", 0, 4, 4),
        ("add_att", 2, 0, 2),
    ]
    found = compare(files, RULES["sugarcrepe"])
    assert found["base"]["accuracy"] == pytest.approx(100 * 14 / 24)
    assert found["base"]["macro"] == pytest.approx((80 + 50 + 50 + 0 + 100) / 5)
    assert found["base"]["families"] == pytest.approx({"replace": 65, "swap": 50, "add": 50})
    assert found["finetuned"]["families"] == pytest.approx({"replace": 95, "swap": 50, "add": 50})
    assert found["difference"]["families"]["replace"]["value"] == pytest.approx(30)
    assert found["difference"]["macro"]["value"] == pytest.approx(found["finetuned"]["macro"] - found["base"]["macro"])
    assert found["base"]["groups"]["replace_att"] == {"accuracy": 50.0, "cases": 6, "ties": 0}
    assert found["difference"]["groups"]["replace_att"]["accuracy"]["value"] == 50
    assert next(iter(found["difference"])) == "macro" and found["cases"] == 24
    assert found["chance"]["macro"] == found["chance"]["families"]["add"] == 50


def test_an_attribute_pair_counts_from_25_cases():
    found = compare([("red_old", 25, 0, 25), ("a_b", 0, 24, 24), ("c_d", 13, 13, 26)], RULES["vg_attribution"])
    assert found["base"]["macro"] == 75 and found["finetuned"]["macro"] == 25
    assert list(found["base"]["groups"]) == ["red_old", "c_d"]
    assert found["not_in_macro"] == {"groups": 1, "cases": 24}
    assert found["base"]["accuracy"] == pytest.approx(100 * 38 / 75), "which counts all cases"


def test_relations_that_hold_both_ways_are_left_out():
    found = compare([("near", 4, 0, 4), ("on", 1, 2, 4), ("driving down", 1, 1, 1), ("under", 3, 4, 4)], RULES["vg_relation"])
    assert found["base"]["macro"] == 50 and list(found["base"]["groups"]) == ["on", "under"]
    assert found["not_in_macro"] == {"groups": 2, "cases": 5}


def test_valse_is_the_mean_of_its_pieces():
    pieces = [("counting-hard", 1, 1, 2), ("counting-adversarial", 2, 2, 2), ("actant-swap", 0, 0, 1), ("existence", 1, 1, 5)]
    found = compare(pieces, RULES["valse"])
    assert found["base"]["macro"] == pytest.approx((50 + 100 + 0 + 20) / 4)
    assert found["base"]["families"] == pytest.approx({"counting": 75, "actions": 0})


def test_a_suite_without_a_rule_is_the_share_of_its_cases():
    found = compare([("a", 1, 2, 4), ("b", 0, 0, 1)], Rule())
    assert next(iter(found["difference"])) == "accuracy"
    assert found["base"]["accuracy"] == 20 and found["base"]["macro"] == 12.5 and found["base"]["families"] == {}
    listed = compare([("a", 1, 2, 4), ("b", 0, 0, 1)], Rule(), details=False)
    assert listed["base"]["groups"] == listed["difference"]["groups"] == {} and listed["base"]["macro"] == 12.5


def test_without_a_group_that_counts_there_is_no_mean():
    found = compare([("a", 1, 2, 4)], RULES["vg_attribution"])
    assert "macro" not in found["base"] and next(iter(found["difference"])) == "accuracy"


def test_ties_are_counted_by_group():
    names = np.array(["a", "a", "b"], dtype=object)
    tied = Answered(np.array([True, False, False]), np.array([False, True, True]))
    none = Answered(np.array([False, True, True]), np.zeros(3, bool))
    found = compare_suite({"base": tied, "finetuned": none}, names, np.full(3, 0.5), np.arange(3), Rule(), 10)
    assert found["base"]["ties"] == 2 and found["finetuned"]["ties"] == 0
    assert [found["base"]["groups"][name]["ties"] for name in "ab"] == [1, 1]


def test_one_case():
    found = compare([("a", 0, 1, 1)], Rule())
    change = found["difference"]["accuracy"]
    assert (change["value"], change["low"], change["high"], change["p"]) == (100, 100, 100, 1)
    assert found["difference"]["macro"] == change


def test_the_cases_of_an_image_are_no_independent_evidence():
    groups = [("a", 0, 12, 12), ("b", 0, 0, 4)]
    alone, together = compare(groups, RULES["sugarcrepe"]), compare(groups, RULES["sugarcrepe"], np.arange(16) // 4)
    assert together["independent"] == 4 and alone["independent"] == 16
    for measure in ("accuracy", "macro"):
        # all signs alike: two of the 2^12, or 2^3, ways to give them
        assert alone["difference"][measure]["p"] == pytest.approx(2 / 2**12)
        assert together["difference"][measure]["p"] == pytest.approx(2 / 2**3)


def test_the_test_of_a_mean_of_means_weights_the_cases_by_their_groups():
    """Every way to swap the models image by image, gone through: a gains once in six, b once in one, c loses once in three."""
    found = compare([("a", 0, 1, 6), ("b", 0, 1, 1), ("c", 1, 0, 3)], RULES["sugarcrepe"])["difference"]
    signs = list(itertools.product((1, -1), repeat=3))

    def share(weights):
        reached = [abs(sum(sign * weight for sign, weight in zip(row, weights, strict=True))) for row in signs]
        return sum(value >= abs(sum(weights)) - 1e-9 for value in reached) / len(signs)

    assert found["macro"]["value"] == pytest.approx(100 * (1 / 6 + 1 - 1 / 3) / 3)
    assert found["macro"]["p"] == pytest.approx(share([1 / 6, 1, -1 / 3]))
    assert found["accuracy"]["p"] == pytest.approx(share([1, 1, -1])) != found["macro"]["p"]


def slow_macro(values, parts):
    by_part = {}
    for value, part in zip(values, parts, strict=True):
        by_part.setdefault(part, []).append(value)
    return statistics.mean(statistics.mean(found) for found in by_part.values())


def test_the_interval_of_a_mean_of_means_takes_the_means_anew():
    draw = random.Random(0)
    owners = [draw.randrange(9) for _ in range(40)]
    parts = [draw.choice("aaab") if owner else "c" for owner in owners]
    values, other = ([float(draw.randrange(2)) for _ in range(40)] for _ in range(2))
    found = macro_interval(values, other, parts, 200, seed=3, groups=owners)
    differences = [one - two for one, two in zip(values, other, strict=True)]
    assert found.value == pytest.approx(slow_macro(differences, parts))
    units, means = sorted(set(owners)), []
    for drawn in np.random.default_rng(3).integers(len(units), size=(200, len(units))):
        rows = [row for unit in drawn for row in range(40) if owners[row] == units[unit]]
        means.append(slow_macro([differences[row] for row in rows], [parts[row] for row in rows]))
    assert found[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_one_part_is_a_plain_mean():
    draw = np.random.default_rng(1)
    values, owners = draw.random(30), draw.integers(0, 8, 30)
    assert macro_interval(values, None, ["x"] * 30, 100, groups=owners) == pytest.approx(
        interval(values, None, 100, groups=owners)
    )
    with pytest.raises(ValueError, match="one part per value"):
        macro_interval([1.0, 2.0], None, ["a"])
