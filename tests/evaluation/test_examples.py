"""What the pictures show, against slow and obvious ways to find it."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from fake_store import caption, questions, study
from squares import CPU, tiny_clip, write_squares

from fast_goal.evaluation import embedding, examples
from fast_goal.evaluation.comparison import Study
from fast_goal.evaluation.features import FeatureStore


@pytest.fixture
def asked():
    draw = random.Random(0)
    captions = [caption(draw, words=6) for _ in range(60)]
    return study(questions(["", *captions]), bootstrap_samples=20)


def scores(made, model):
    """[I, T]"""
    store = made.stores[model]
    vectors = np.array([store.vector(text) for text in made.asked.long.texts])
    return (torch.tensor(np.array(store.vectors)).float() @ torch.tensor(vectors).float().T).numpy()


def test_retrievals_show_what_each_model_puts_first(asked):
    found = examples.retrievals(asked, 4)
    assert len(found) == 4 == len({query.caption for query in found})
    for query in found:
        row = asked.asked.long.texts.index(query.caption)
        own = asked.asked.paths[row + 1]
        assert query.image == own
        for model in ("base", "finetuned"):
            column = scores(asked, model)[:, row]
            best = [asked.asked.paths[image] for image in np.argsort(-column)[:5]]
            assert query.top[model] == best and query.hits[model] == [path == own for path in best]
            assert query.ranks[model] == 1 + (column > column[row + 1]).sum()


def test_mistakes_are_queries_with_a_wrong_image_first(asked):
    found = examples.mistakes(asked, 5)
    assert len(found) == 5
    table = scores(asked, "finetuned")
    for mistake in found:
        row = asked.asked.long.texts.index(mistake.caption)
        first = int(table[:, row].argmax())
        assert first != row + 1 and mistake.ranks["finetuned"] > 1
        assert mistake.image == asked.asked.paths[row + 1] and mistake.confused == asked.asked.paths[first]
        assert mistake.confused_caption == ("" if first == 0 else asked.asked.long.texts[first - 1])
    assert examples.mistakes(asked, 5) == found
    wrong = sum(int(table[:, row].argmax()) != row + 1 for row in range(60))
    assert len(examples.mistakes(asked, 1000)) == wrong < 60


def test_no_mistakes_of_a_perfect_model():
    made = study(questions(["A red dog.", "A blue cat."]))
    for store in made.stores.values():
        store.vectors = [store.vector(text) for text in made.asked.long.texts]
    assert examples.mistakes(made, 3) == []


def test_recall_by_length(asked, monkeypatch):
    monkeypatch.setattr(examples, "LEAST", 10)
    found = examples.recall_by_length(asked)
    lengths = asked.lengths(asked.whole)
    for model, points in found.items():
        hits = scores(asked, model).argmax(0) == np.arange(60) + 1
        assert 2 <= len(points) <= examples.POINTS and sum(point.captions for point in points) == 60
        assert [point.tokens for point in points] == sorted(point.tokens for point in points)
        assert sum(point.tokens * point.captions for point in points) == pytest.approx(lengths.sum())
        assert sum(point.value * point.captions for point in points) == pytest.approx(100 * hits.sum())
        assert all(point.low <= point.value <= point.high for point in points)
        shortest = lengths <= sorted(lengths)[points[0].captions - 1]
        assert points[0].value == pytest.approx(100 * hits[shortest].mean())


def test_too_few_captions_or_one_length_make_no_curve(asked, monkeypatch):
    assert len(examples.recall_by_length(asked)["base"]) == 2, "60 captions, 25 behind a point"
    monkeypatch.setattr(examples, "LEAST", 31)
    assert examples.recall_by_length(asked) == {}
    monkeypatch.setattr(examples, "LEAST", 2)
    assert examples.recall_by_length(study(questions([f"A w{number}." for number in range(8)]))) == {}
    assert examples.recall_by_length(study(questions(["", ""]))) == {}


def test_principal_components():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(40, 5)) * [5, 3, 1, 0.5, 0.1] + 7
    points, share = examples.principal(values, 2)
    weights, axes = np.linalg.eigh(np.cov(values.T))
    assert share == pytest.approx(weights[-2:].sum() / weights.sum())
    for place in range(2):
        axis = axes[:, -1 - place]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        np.testing.assert_allclose(points[:, place], (values - values.mean(0)) @ axis, atol=1e-9)
    points, share = examples.principal(np.ones((3, 2)), 3)
    assert (points == 0).all() and points.shape == (3, 3) and share == 0


def test_the_map_joins_each_image_with_its_caption(asked, monkeypatch):
    monkeypatch.setattr(examples, "PAIRS", 8)
    for model, plane in examples.planes(asked).items():
        assert plane.images.shape == plane.texts.shape == (8, 2) and 0 < plane.share <= 1
        table = scores(asked, model)
        matches = [abs(table[row + 1, row] - plane.own) for row in range(60)]
        assert min(table[1:].diagonal()) <= plane.own <= max(table[1:].diagonal()) and len(matches) == 60
        assert plane.own > plane.other
    alone = examples.planes(study(questions(["A dog."])))["base"]
    assert alone.other is None and alone.images.shape == (1, 2)


def test_components_of_the_patches(tmp_path):
    dataset = dataclasses.replace(write_squares(tmp_path), truth=None)
    asked = embedding.questions(dataset, "test")
    clips = {"base": tiny_clip(1), "finetuned": tiny_clip(2)}
    stores = {model: FeatureStore(None, clip, CPU, 4) for model, clip in clips.items()}
    made = Study(asked, stores, study(questions(["A dog."])).config)
    found = examples.components(made, 3)
    again = examples.components(made, 3)
    for model, clip in clips.items():
        assert found[model].maps.shape == (3, 4, 4, 3) and len(found[model].images) == 3
        np.testing.assert_array_equal(found[model].maps, again[model].maps)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in found[model].images])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.mean, clip.std))
        with torch.inference_mode():
            tokens = clip(images=(pixels / 255 - mean) / std).image_tokens.double().reshape(48, -1).numpy()
        centred = tokens - tokens.mean(0)
        _, sizes, axes = np.linalg.svd(centred)
        expected = centred @ axes[:3].T
        np.testing.assert_allclose(np.abs(found[model].maps.reshape(48, 3)), np.abs(expected), atol=1e-4)
        assert found[model].share == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum(), abs=1e-5)
    assert ((found["base"].maps * found["finetuned"].maps).sum((0, 1, 2)) >= 0).all(), "no sign is turned round"
