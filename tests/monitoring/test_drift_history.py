"""The history of drift: lines that survive a kill, and models that measure otherwise than before."""

import json
import logging
from pathlib import Path

import pytest

from fast_goal.monitoring.history import append, read, unsteady


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "drift/history.jsonl"


def test_lines_are_read_as_they_were_added(path):
    assert read(path) == []
    lines = [{"time": str(number), "tests": [number]} for number in range(3)]
    for line in lines:
        append(path, line)
    assert read(path) == lines
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_that_was_cut_short_costs_no_other_line(path, cut, caplog):
    for number in range(2):
        append(path, {"number": number, "more": "é"})
    path.write_bytes(path.read_bytes()[:-cut])
    before = read(path)
    append(path, {"number": 2})
    append(path, {"number": 3})
    with caplog.at_level(logging.WARNING):
        found = read(path)
    assert [line["number"] for line in found] == ([0, 1] if cut == 1 else [0]) + [2, 3]
    assert found[: len(before)] == before
    assert ("1 broken lines" in caplog.text) == (cut > 1)


def test_other_text_is_passed_over(path):
    path.parent.mkdir()
    path.write_bytes(b'12\n\n{"number": 1}\n\xff\xfe\n')
    append(path, {"number": 2})
    assert read(path) == [{"number": 1}, {"number": 2}]


def test_what_is_no_json_is_refused_and_leaves_the_file_as_it_was(path):
    append(path, {"number": 1})
    with pytest.raises(ValueError):
        append(path, {"number": float("nan")})
    assert json.loads(path.read_text()) == {"number": 1}


def model(digest, recall):
    return {"digest": digest, "R@1": {"text_to_image": recall, "image_to_text": 50.0}}


def line(probe, **models):
    return {"probe": {"digest": probe, "models": models}}


def test_a_model_that_measures_otherwise_with_the_same_weights_is_told():
    history = [line("p", champion=model("a", 10.0)), line("p", champion=model("a", 20.0)), line("q", champion=model("a", 70.0))]
    assert unsteady({"champion": model("a", 20.0)}, "p", history) == []
    assert unsteady({"champion": model("a", 30.0)}, "p", history) == ["champion"]
    assert unsteady({"previous": model("a", 10.0)}, "p", history) == ["previous"], "under another name"
    assert unsteady({"champion": model("b", 30.0)}, "p", history) == [], "other weights"
    assert unsteady({"champion": model("a", 30.0)}, "r", history) == [], "another probe set"
    assert unsteady({"champion": model("a", 30.0)}, "p", []) == []
