"""Metrics of two made-up models whose ranks are known."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from fake_store import FakeStore, caption, questions, settings, slow_recall, study, unit

from fast_goal.evaluation.bootstrap import interval, paired_test
from fast_goal.evaluation.comparison import (
    MODELS,
    Study,
    Variant,
    compare_retrieval,
    difference,
    recall_rows,
)
from fast_goal.evaluation.headline import flatten

LENGTHS = [10, 77, 78, 128, 129, 248, 249, 400]
TEXTS = [f"text {index}" for index in range(8)]


class Known(FakeStore):
    """The features of text t are the t-th row of the identity, so that an image's vector holds its scores."""

    def __init__(self, scores, texts=TEXTS, context_length=248):
        super().__init__(scores, context_length=context_length, lengths=dict(zip(texts, LENGTHS, strict=False)))
        self.order = texts

    def vector(self, text, tokens=None):
        return np.eye(len(self.order))[self.order.index(text)]


def one_each(texts, images, **options):
    return Variant("long", [(text,) for text in texts], np.array(images), **options)


@pytest.fixture(scope="module")
def known():
    """8 images and long captions: the base finds the even ones, the fine-tuned model all."""
    base = np.eye(8)
    for wrong in (1, 3, 5, 7):
        base[wrong, wrong], base[wrong - 1, wrong] = 0.1, 0.5
    asked = questions(TEXTS, [TEXTS[:2], [], TEXTS[2:3]] + [[]] * 5, objects=np.array([1, 2, 3, 4, 5, 6, 7, 40]))
    return Study(asked, {"base": Known(base), "finetuned": Known(np.eye(8))}, settings(ks=[1, 2, 50], bootstrap_samples=200))


@pytest.fixture(scope="module")
def long(known):
    return compare_retrieval(known, known.whole)


def test_recall_difference_and_interval(long):
    assert long["base"]["text_to_image"]["R@1"] == 50
    assert long["base"]["text_to_image"]["R@2"] == long["finetuned"]["text_to_image"]["R@1"] == 100
    difference = long["difference"]["text_to_image"]["R@1"]
    assert difference["value"] == 50 and 0 < difference["low"] < 50 < difference["high"] < 100
    assert difference["p"] == pytest.approx(2 / 2**4), "four images that differ, all in one direction"
    assert long["difference"]["text_to_image"]["R@50"] == {"value": 0, "low": 0, "high": 0, "p": 1}
    assert long["base"]["text_to_image"]["mean_rank"] == 1.5


def test_slices(long):
    assert {name: values["captions"] for name, values in long["slices"].items()} == {
        "up to 77": 2,
        "78 to 128": 2,
        "129 to 248": 2,
        "over 248": 2,
    }
    assert all(values["base"]["R@1"] == 50 and values["finetuned"]["R@1"] == 100 for values in long["slices"].values())
    assert {name: values["captions"] for name, values in long["slices_by_objects"].items()} == {
        "up to 3": 3,
        "4": 1,
        "5": 1,
        "6": 1,
        "7 to 9": 1,
        "over 9": 1,
    }
    assert long["slices_by_objects"]["4"]["base"]["R@1"] == 0 and long["slices_by_objects"]["5"]["base"]["R@1"] == 100
    assert list(long["slices_by_sentences"]) == ["up to 3"]
    assert long["truncated"] == {"base": 2, "finetuned": 2}
    assert long["over_77_tokens"] == 75


def test_a_slice_is_nothing_but_its_queries(known):
    captions = one_each(TEXTS, range(8), sentences=np.array([1, 2, 4, 4, 5, 6, 12, 10]))
    found = compare_retrieval(known, captions)["slices_by_sentences"]
    assert {name: (part["captions"], part["base"]["R@1"]) for name, part in found.items()} == {
        "up to 3": (2, 50),
        "4 to 6": (4, 50),
        "over 9": (2, 50),
    }
    hits = np.array([100.0, 0.0, 100.0, 0.0])
    expected = {**interval([100.0] * 4, hits, 200)._asdict(), "p": paired_test([1.0] * 4, hits / 100).p_value}
    assert found["4 to 6"]["difference"]["R@1"] == pytest.approx(expected)


def test_slices_follow_the_context_of_the_models():
    asked = questions(TEXTS)
    stores = {model: Known(np.eye(8), context_length=context) for model, context in (("base", 77), ("finetuned", 130))}
    found = compare_retrieval(Study(asked, stores, settings()), one_each(TEXTS, range(8)))
    assert list(found["slices"]) == ["up to 77", "78 to 128", "129 to 130", "over 130"]
    assert found["truncated"] == {"base": 6, "finetuned": 3} and found["context_length"] == {"base": 77, "finetuned": 130}
    short = compare_retrieval(Study(asked, stores, settings()), one_each(TEXTS, range(8), tokens=100))
    assert short["truncated"] == {"base": 6, "finetuned": 5}


def test_chance_of_a_random_order(known, long):
    assert long["chance"]["text_to_image"] == pytest.approx({"R@1": 12.5, "R@2": 25, "R@50": 100})
    short = compare_retrieval(known, one_each(known.asked.short.texts, known.asked.short.images))
    # three texts; image 0 owns two of them, image 2 one
    pairs = list(combinations(range(3), 2))
    both = np.mean([np.mean([bool({0, 1} & set(pair)) for pair in pairs]), np.mean([2 in pair for pair in pairs])])
    assert short["chance"]["image_to_text"] == pytest.approx({"R@1": 50, "R@2": 100 * both, "R@50": 100})
    assert short["captions"] == 3 and short["images"] == 8


def test_ties_are_counted():
    stores = {"base": Known([[1.0, 1.0]] * 2, TEXTS[:2]), "finetuned": Known(np.eye(2), TEXTS[:2])}
    found = compare_retrieval(Study(questions(TEXTS[:2]), stores, settings()), one_each(TEXTS[:2], range(2)))
    assert found["base"]["text_to_image"]["tied"] == 100
    assert found["finetuned"]["text_to_image"]["tied"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_retrieval_agrees_with_loops(seed):
    """Queries of one or several texts, any number for an image."""
    draw = random.Random(seed)
    made = study(questions([caption(draw) for _ in range(9)]), seed)
    owners = sorted(draw.choices(range(9), k=20))
    queries = [tuple(caption(draw, 1) for _ in range(draw.choice([1, 1, 3]))) for _ in owners]
    tokens = draw.choice([None, 6])
    found = compare_retrieval(made, Variant("x", queries, np.array(owners), tokens=tokens))
    for model in MODELS:
        store = made.stores[model]
        vectors = [unit(np.mean([store.vector(text, tokens) for text in query], axis=0)) for query in queries]
        for k in (1, 2, 5):
            forward, backward = slow_recall(store.vectors, vectors, owners, k)
            assert found[model]["text_to_image"][f"R@{k}"] == pytest.approx(forward)
            assert found[model]["image_to_text"][f"R@{k}"] == pytest.approx(backward)
    assert found["mean_tokens"] == np.mean([2 + sum(len(text.split()) for text in query) for query in queries])


def test_an_averaged_query_has_unit_length():
    made = study(questions(["a b. c d.", "e f. g h."]))
    queries = [("a b.", "c d.", "c d."), ("e f.", "g h.")]
    found = made.features("base", Variant("x", queries, np.arange(2)))
    expected = [unit(np.mean([made.stores["base"].vector(text) for text in query], axis=0)) for query in queries]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert found.dtype == torch.float32


def test_images_of_one_scene_are_no_independent_evidence():
    """Every image twice: the interval is that of half as many, not the narrower one of as many as there are rows."""
    draw = np.random.default_rng(0)
    hits = {"base": draw.random(40) < 0.3, "finetuned": draw.random(40) < 0.6}
    twice = {model: np.repeat(values, 2) for model, values in hits.items()}
    once = difference(hits, np.arange(40), 500)
    assert difference(twice, np.repeat(np.arange(40), 2), 500) == pytest.approx(once)
    naive = difference(twice, np.arange(80), 500)
    assert naive["high"] - naive["low"] < 0.85 * (once["high"] - once["low"]) and naive["p"] < once["p"]

    base = np.eye(8)
    base[1, 1] = base[3, 3] = 0
    base[0, 1] = base[2, 3] = 0.5
    stores = {"base": Known(base), "finetuned": Known(np.eye(8))}
    for scenes, p in ((None, 0.5), (np.repeat(np.arange(4), 2), 0.5), (np.array([0, 9, 1, 9, 2, 3, 4, 5]), 1.0)):
        found = compare_retrieval(Study(questions(TEXTS, scenes=scenes), stores, settings()), one_each(TEXTS, range(8)))
        assert found["difference"]["text_to_image"]["R@1"]["p"] == p


def test_flat_names_and_rows_for_the_plot(long):
    metrics = {"long": long, "short": long, "skipped": {"joint": "boxes"}}
    flat = flatten({"d": metrics})
    assert flat["d.long.difference.text_to_image.R1.value"] == 50
    assert flat["d.long.slices.up_to_77.base.R1"] == 50
    assert not any("@" in name or " " in name or "skipped" in name for name in flat)
    rows = recall_rows("d", metrics, [1, 50])
    assert len(rows) == 2 * 2 * 3 * 2
    assert {"dataset": "d", "captions": "long", "direction": "text_to_image", "k": 1, "model": "base", "recall": 50.0} in rows
