"""Where sentences look, against a loop over images and torch's own attention."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from fake_store import settings
from squares import CPU, tiny_clip, write_squares

from fast_goal.evaluation import attention as looking
from fast_goal.evaluation import embedding, examples
from fast_goal.evaluation.comparison import Study
from fast_goal.evaluation.features import FeatureStore
from fast_goal.evaluation.tasks import measure


@pytest.fixture
def dataset(tmp_path):
    return write_squares(tmp_path)


@pytest.fixture
def made(dataset):
    """A study of which the fine-tuned model has a pooling."""
    clips = {"base": tiny_clip(1), "finetuned": tiny_clip(2)}
    clips["finetuned"].add_pooling(4, seed=5)
    with torch.no_grad():  # a fresh head has biases of zero
        for value in clips["finetuned"].pooling.parameters():
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    stores = {model: FeatureStore(None, clip, CPU, 4) for model, clip in clips.items()}
    config = settings(patch_ks=[1, 3], tasks=["localisation"])
    return Study(embedding.questions(dataset, "test"), stores, config)


def slow(store, file, text):
    """The weights [N] of one text and one image, by torch's own module, with the key of zeros as the last."""
    pooling, tokens, query = store.clip.pooling.pooling, store.tokens([file]), store.queries([text])
    with torch.inference_mode():
        keys, values = pooling.norm_key(tokens), pooling.norm_value(tokens)
        _, weights = pooling.attention(pooling.norm_query(query)[None], keys, values, average_attn_weights=True)
    return weights[0, 0, :-1].numpy()


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_the_weights_are_those_of_torchs_attention(made, monkeypatch, at_once):
    monkeypatch.setattr(looking, "AT_ONCE", at_once)
    store, files = made.stores["finetuned"], made.asked.files
    sentences = [(4, "a thing"), (0, "number 1"), (4, "number 0"), (1, "a thing"), (0, "a thing"), (4, "a thing")]
    found = looking.attention(store, files, sentences).numpy()
    for row, (image, text) in enumerate(sentences):
        np.testing.assert_allclose(found[row], slow(store, files[image], text), atol=1e-6)
    assert (found.sum(1) < 1).all() and (found >= 0).all() and looking.attention(store, files, []).shape == (0, 16)


def test_hits_of_the_attention(made):
    store, asked = made.stores["finetuned"], made.asked
    found = looking.attention_hits(store, asked)
    assert len(found) == len(asked.regions.sentences) > 3
    for row, (image, text) in enumerate(embedding.held(asked)):
        weights = slow(store, asked.files[image], text)
        x1, y1, x2, y2 = store.clip.view(*asked.files[image].size).boxes(asked.regions.boxes[row : row + 1])[0]
        inside = [x1 <= 16 * (n % 4) + 8 < x2 and y1 <= 16 * (n // 4) + 8 < y2 for n in range(16)]
        order = sorted(range(16), key=lambda n: (-weights[n], n))
        ranks = [rank for rank, n in enumerate(order, 1) if inside[n]]
        assert found[row] == (ranks[0] if ranks else 17)
    measured = measure(made, ["localisation"])["localisation"]
    assert measured["attention"] == {f"hit@{k}": pytest.approx(100 * (found <= k).mean()) for k in (1, 3)}


def test_without_a_pooling_nothing_is_said(made):
    made.stores["finetuned"].clip.pooling = None
    assert not looking.has_pooling(made.stores["finetuned"])
    assert "attention" not in measure(made, ["localisation"])["localisation"]


def test_examples_of_attention(made):
    found = examples.attentions(made, 3)
    assert len(found) == 3
    store, sentences = made.stores["finetuned"], embedding.held(made.asked)
    for each in found:
        images = [image for image, text in sentences if text == each.text]
        grids = [slow(store, made.asked.files[image], each.text) for image in images]
        assert min(np.abs(grid - each.attention.grid.ravel()).max() for grid in grids) < 1e-6
        assert each.attention.grid.shape == (4, 4) and each.attention.hit in (True, False)
        assert set(each.similarity) == {"base", "finetuned"} and each.similarity["base"].grid.max() <= 1
        assert each.words and all(word in each.text.lower() for word in each.words)
    again = examples.attentions(made, 3)
    assert [each.text for each in again] == [each.text for each in found], "drawn, but always the same"


def test_examples_without_boxes(made, dataset):
    asked = embedding.questions(dataclasses.replace(dataset, truth=None), "test")
    found = examples.attentions(Study(asked, made.stores, made.config), 2)
    assert len(found) == 2
    for each in found:
        assert any(each.text in caption for caption in asked.long.texts)
        assert each.attention.box is None and each.attention.hit is None
    none = embedding.Captions([], np.zeros(0, np.int64))
    found = examples.attentions(Study(dataclasses.replace(asked, long=none), made.stores, made.config), 2)
    assert len(found) == 2 and {each.text for each in found} <= set(asked.short.texts)
    nothing = dataclasses.replace(asked, long=none, short=none)
    assert examples.attentions(Study(nothing, made.stores, made.config), 2) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("You can see a dotted pink tree, top corner.", ["dotted pink tree", "dotted", "pink", "tree", "top"]),
        ("A corner at the top.", ["top", "corner"]),
        ("It is the.", []),
        ("", []),
    ],
)
def test_words_that_ask_alone(text, words):
    counts = Counter({"tree": 1, "pink": 2, "dotted": 3, "top": 4, "corner": 5})
    assert examples._alone(text, counts) == words
