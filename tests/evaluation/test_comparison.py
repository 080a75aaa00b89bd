"""Metrics of two made-up models whose ranks are known."""

from itertools import combinations

import numpy as np
import pytest
import torch

from fast_goal.evaluation.comparison import compare, flatten, recall_rows
from fast_goal.evaluation.embedding import Answers, Captions, Questions, Regions

LENGTHS = [10, 77, 78, 128, 129, 248, 249, 400]


def model(scores: list[list[float]], texts: list[str], first_hits: list[int], inside: tuple[int, ...] = (1, 0, 4)) -> Answers:
    """scores[i][t] of image i and text t."""
    return Answers(
        image_features=torch.tensor(scores),
        text_features=torch.eye(len(texts)),
        text_lengths=np.array(LENGTHS[: len(texts)]),
        text_rows={text: row for row, text in enumerate(texts)},
        first_hits=np.array(first_hits),
        patches_inside=np.array(inside),
        patches=4,
        context_length=248,
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def found():
    """8 images and long captions: the base finds the even ones, the fine-tuned model all. One image has 2 short captions."""
    texts = [f"text {index}" for index in range(8)]
    tuned = torch.eye(8).tolist()
    base = torch.eye(8)
    for wrong in (1, 3, 5, 7):
        base[wrong, wrong], base[wrong - 1, wrong] = 0.1, 0.5
    boxes = Regions(["text 0"] * 3, np.array([0, 0, 2]), np.zeros((3, 4)), "truth")
    asked = Questions([], [], np.zeros((0, 2)), Captions(texts, np.arange(8)), Captions(texts[:3], np.array([0, 0, 2])), boxes)
    answers = {"base": model(base.tolist(), texts, [5, 5, 1], (0, 0, 4)), "finetuned": model(tuned, texts, [1, 5, 1])}
    return compare(asked, answers, [1, 2, 50], [1, 3, 9], 200)


def test_recall_difference_and_interval(found):
    long = found["long"]
    assert long["base"]["text_to_image"]["R@1"] == 50
    assert long["base"]["text_to_image"]["R@2"] == long["finetuned"]["text_to_image"]["R@1"] == 100
    difference = long["difference"]["text_to_image"]["R@1"]
    assert difference["value"] == 50 and 0 < difference["low"] < 50 < difference["high"] < 100
    assert long["difference"]["text_to_image"]["R@50"] == {"value": 0, "low": 0, "high": 0}
    assert long["base"]["text_to_image"]["mean_rank"] == 1.5


def test_slices_by_length(found):
    slices = found["long"]["slices"]
    assert {name: values["captions"] for name, values in slices.items()} == {
        "up to 77": 2,
        "78 to 128": 2,
        "129 to 248": 2,
        "over 248": 2,
    }
    assert all(values["base"]["R@1"] == 50 and values["finetuned"]["R@1"] == 100 for values in slices.values())
    assert found["long"]["truncated"] == {"base": 2, "finetuned": 2}
    assert found["long"]["over_77_tokens"] == 75


def test_chance_of_a_random_order(found):
    assert found["long"]["chance"]["text_to_image"] == pytest.approx({"R@1": 12.5, "R@2": 25, "R@50": 100})
    # three texts; image 0 owns two of them, image 2 one
    pairs = list(combinations(range(3), 2))
    both = np.mean([np.mean([bool({0, 1} & set(pair)) for pair in pairs]), np.mean([2 in pair for pair in pairs])])
    assert found["short"]["chance"]["image_to_text"] == pytest.approx({"R@1": 50, "R@2": 100 * both, "R@50": 100})


def test_localisation(found):
    places = found["localisation"]
    assert places["base"] == pytest.approx({"hit@1": 100 / 3, "hit@3": 100 / 3, "hit@9": 100 / 3})
    assert places["finetuned"] == pytest.approx({"hit@1": 200 / 3, "hit@3": 200 / 3, "hit@9": 200 / 3})
    assert places["chance"] == pytest.approx(
        {"hit@1": 100 * (0.25 + 0 + 1) / 3, "hit@3": 100 * (0.75 + 1) / 3, "hit@9": 200 / 3}
    )
    assert (places["without_centre"], places["sentences"], places["images"]) == ({"base": 2, "finetuned": 1}, 3, 2)
    assert places["chance_of_base"] == pytest.approx({"hit@1": 100 / 3, "hit@3": 100 / 3, "hit@9": 100 / 3})
    assert places["difference"]["hit@1"]["value"] == pytest.approx(100 / 3)


def test_ties_are_counted():
    texts = ["a", "b"]
    asked = Questions(
        [],
        [],
        np.zeros((0, 2)),
        Captions(texts, np.arange(2)),
        Captions([], np.arange(0)),
        Regions([], np.arange(0), np.zeros((0, 4)), "none"),
    )
    collapsed = model([[1.0, 1.0], [1.0, 1.0]], texts, [])
    found = compare(asked, {"base": collapsed, "finetuned": model([[1.0, 0.0], [0.0, 1.0]], texts, [])}, [1], [1], 10)
    assert found["long"]["base"]["text_to_image"]["tied"] == 100
    assert found["long"]["finetuned"]["text_to_image"]["tied"] == 0
    assert set(found) == {"long", "seconds"}


def test_flat_names_and_rows_for_the_plot(found):
    flat = flatten({"d": found})
    assert flat["d.long.difference.text_to_image.R1.value"] == 50
    assert flat["d.long.slices.up_to_77.base.R1"] == 50
    assert not any("@" in name or " " in name for name in flat)
    rows = recall_rows("d", found, [1, 50])
    assert len(rows) == 2 * 2 * 3 * 2
    assert {"dataset": "d", "captions": "long", "direction": "text_to_image", "k": 1, "model": "base", "recall": 50.0} in rows
