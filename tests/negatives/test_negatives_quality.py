"""Every expectation on negatives holds on a good table, and each planted defect fails its own."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fast_goal.config import NEGATIVE_TYPES, Params, build
from fast_goal.configure import compose
from fast_goal.data.expectations import check, stop_on_failure
from fast_goal.errors import ValidationError
from fast_goal.negatives.quality import suites
from fast_goal.negatives.sheet import sheet

CAPTION = "A red cup is on the small table near the old wooden door of a house."
GERMAN = "Eine rote Tasse steht auf dem kleinen Tisch neben der alten Holztür des Hauses."
GOOD = {
    "reshuffle": "The old wooden door is on the small table near a red cup of a house.",
    "swap_nouns": "A red table is on the small cup near the old wooden door of a house.",
    "swap_adjectives": "A small cup is on the red table near the old wooden door of a house.",
    "replace_adjectives": "A blue cup is on the small table near the old wooden door of a house.",
    "replace_nouns": "A red star is on the small table near the old wooden door of a house.",
}


@pytest.fixture(scope="module")
def config():
    made = build(Params, compose(["negatives=rules"]), "params.yaml").negatives
    return replace(made, max_similarity=0.99, min_share=0.9)


def rows(images, more=()):
    made = [(f"{n}", CAPTION, text, kind) for n in range(images) for kind, text in GOOD.items()]
    table = pd.DataFrame([*made, *more], columns=["image_id", "caption", "negative", "type"])
    return table.assign(generator="rules-1", seed=0)


def outcomes(tmp_path, config, table, reasons, similarities=None, false=None):
    captions = pd.DataFrame({"image_id": [str(n) for n in range(len(reasons))], "caption": CAPTION, "reason": reasons})
    true = {image: {CAPTION, "A cup."} for image in captions["image_id"]}
    similarities = np.full(len(table), 0.9) if similarities is None else similarities
    made = suites("photos", table, captions, true, similarities, false, config)
    return check(made, tmp_path / "docs")


def test_a_good_table(tmp_path, config):
    found = outcomes(tmp_path, config, rows(10), [""] * 9 + ["nothing to change"], false=[True, None] * 25)
    assert [outcome for outcome in found if not outcome.passed] == []
    assert len(found) == 12
    stop_on_failure(found, tmp_path / "summary.md", tmp_path / "docs")


def test_each_defect_fails_its_own_expectation(tmp_path, config):
    planted = [
        ("1", CAPTION, CAPTION, "swap_nouns", "differs"),
        ("2", CAPTION, GOOD["swap_nouns"], "swap_nouns", "negatives_unique"),
        ("3", CAPTION, "A cup.", "replace_nouns", "not_true"),  # and too short
        ("4", CAPTION, CAPTION + " It is very nice there, and " + CAPTION, "reshuffle", "length"),
        ("5", CAPTION, GOOD["replace_nouns"], "swap_nouns", "edit_size"),
        ("6", CAPTION, GOOD["reshuffle"], "replace_nouns", "edit_size"),
        ("7", CAPTION, GERMAN, "reshuffle", "language"),
        (
            "8",
            CAPTION,
            "A large cup is on the red table near the old wooden door of a house.",
            "swap_adjectives",
            "no_paraphrase",
        ),
        ("9", CAPTION, "A tiny cup is on the small table near the old wooden door of a house.", "invented", "types_known"),
    ]
    table = rows(10, [row[:4] for row in planted])
    similarities = np.full(len(table), 0.9)
    similarities[57] = 0.995
    false = [True] * 40 + [False] * 19
    found = outcomes(tmp_path, config, table, [""] * 5 + ["nothing to change"] * 5, similarities, false)
    failed = {outcome.rule.name: outcome for outcome in found if not outcome.passed}
    expected = {row[4] for row in planted} | {"captions_with_negatives", "false_of_scene"}
    assert set(failed) == expected
    assert {name: outcome.failing for name, outcome in failed.items()} == dict.fromkeys(expected, 1) | {
        "not_true": 2,  # the caption itself is one of the image
        "length": 2,
        "edit_size": 3,  # and the words of another language
        "negatives_unique": 6,  # images 5 and 6 have their text under its own type too
        "captions_with_negatives": 5,
        "false_of_scene": 19,
    }
    assert any(line.startswith("row 57, image_id '8'") for line in failed["no_paraphrase"].examples)
    with pytest.raises(ValidationError) as caught:
        stop_on_failure(found, tmp_path / "summary.md", tmp_path / "docs")
    message = str(caught.value)
    assert message.startswith(f"{len(expected) - 1} critical expectations failed; {tmp_path / 'summary.md'}")
    assert "row 50, image_id '1', type 'swap_nouns'" in message
    assert "row 5, image_id '5', reason 'nothing to change'" in message


def test_a_type_that_is_too_rare_is_a_warning(tmp_path, config):
    table = rows(10)
    table = table[table["type"] != "swap_nouns"]
    found = outcomes(tmp_path, config, table, [""] * 10)
    (failed,) = [outcome for outcome in found if not outcome.passed]
    assert (failed.rule.name, failed.rule.severity) == ("share_per_type", "warning")
    assert "type 'swap_nouns'" in failed.examples[0]


def test_an_empty_table_fails(tmp_path, config):
    found = outcomes(tmp_path, replace(config, min_share=0.0, max_similarity=None), rows(0), ["no words"])
    failed = [outcome.rule.name for outcome in found if not outcome.passed]
    assert "not_empty" in failed and "captions_with_negatives" not in failed


def test_the_sheet_shows_what_differs():
    text = sheet("photos", rows(1), NEGATIVE_TYPES, 0)
    assert "## swap_nouns (1)" in text
    assert "* caption: A red **cup** is on the small **table** near" in text
    assert "* negative: A red **table** is on the small **cup** near" in text
    long = "word " * 50
    table = rows(1, [("1", f"{long}a *red* cup_s {long}", f"{long}a *blue* cup_s {long}", "replace_adjectives")])
    assert r"… word word word word word word word a **\*red\*** cup\_s word word word word word word word …" in sheet(
        "photos", table, NEGATIVE_TYPES, 0
    )
    assert sheet("photos", table, NEGATIVE_TYPES, 0) == sheet("photos", table[::-1], NEGATIVE_TYPES, 0)
