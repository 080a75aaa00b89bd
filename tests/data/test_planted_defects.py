"""Planted defects: each is found by the expected rule, which names its rows and no others; the clean set is clean."""

import re
from pathlib import Path

import pytest
from planted_defects import DEFECTS, clean_set, outcomes, plant, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "validation.md"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    return outcomes(plant(clean_set(root)), root / "docs")


def test_nothing_is_reported_of_the_clean_set(tmp_path):
    assert [name for name, outcome in outcomes(clean_set(tmp_path), tmp_path / "docs").items() if not outcome.passed] == []


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.what)
def test_a_planted_defect_is_found_and_named_with_its_rows(found, defect):
    outcome = found[defect.rule]
    assert not outcome.passed
    assert outcome.failing == len(defect.rows)
    assert tuple(int(re.match(r"row (\d+)", text)[1]) for text in outcome.examples) == defect.rows


def test_no_other_rule_fails(found):
    assert {name for name, outcome in found.items() if not outcome.passed} == {defect.rule for defect in DEFECTS}


def test_twenty_or_more_of_different_kinds():
    assert len(DEFECTS) == len({defect.rule for defect in DEFECTS}) >= 20


def test_the_table_in_the_documents_is_what_is_said(found):
    assert DOCUMENT.read_text(encoding="utf-8") == table(found), (
        "run: python tests/data/planted_defects.py > docs/validation.md"
    )
