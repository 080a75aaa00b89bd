"""Ranks by text-conditioned pooling: equal to sorting whole lists, and to one image at a time for a real model."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_store import questions as made_up
from fake_store import settings, study
from squares import CPU, tiny_clip, write_squares

from fast_goal.evaluation import tasks
from fast_goal.evaluation.comparison import Study
from fast_goal.evaluation.conditioned import MODES, Asked, mode_ranks
from fast_goal.evaluation.embedding import questions
from fast_goal.evaluation.features import FeatureStore
from fast_goal.evaluation.retrieval import DIRECTIONS, TIES, rank_bounds
from fast_goal.evaluation.tasks import NotAsked


class TableScorer:
    """Scores from a table [pictures, kinds of text]; a patch is the number of its picture, a query that of its kind."""

    device = CPU

    def __init__(self, table):
        self.table = table
        self.most = 0

    def texts(self, queries):
        return queries.flatten().long()

    def images(self, tokens):
        self.most = max(self.most, len(tokens))
        return tokens.flatten().long()

    def scores(self, images, texts):
        return self.table[images][:, texts] + 1e-4 * torch.rand(len(images), len(texts))  # as a block that rounds otherwise

    def pairs(self, images, texts, rows, columns):
        return self.table[images[rows], texts[columns]]


class ExactScorer(TableScorer):
    def scores(self, images, texts):
        return self.table[images][:, texts]


def first_positive(order, positives):
    return next(place for place, candidate in enumerate(order, 1) if candidate in positives)


def slow_rank(plain, again, positives, mode, ties, top_k):
    """The place of the first positive, from scores of all candidates by `global` and by the pooling."""
    favour = -1 if ties == "best" else 1

    def ordered(candidates, scores):
        return sorted(candidates, key=lambda one: (-scores[one], favour * (one in positives), one))

    if mode == "conditioned":
        return first_positive(ordered(range(len(again)), again), positives)
    order = ordered(range(len(plain)), plain)
    if mode == "rerank":
        order = ordered(order[:top_k], again) + order[top_k:]
    return first_positive(order, positives)


@pytest.mark.parametrize("top_k", [1, 3, 6, 100])
@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_those_of_sorted_lists(seed, top_k):
    draw = random.Random(seed)
    images, texts, kinds, pictures = draw.choice([(7, 12, 9, 5), (5, 5, 5, 5), (10, 4, 3, 8), (1, 3, 3, 1), (6, 30, 30, 6)])
    picture = [*range(pictures), *(draw.randrange(pictures) for _ in range(images - pictures))]
    kind = [draw.randrange(kinds) for _ in range(texts)]
    owners = [draw.randrange(images) for _ in range(texts)]
    # few values, so that there are ties
    table = torch.tensor([[draw.randrange(-2, 3) / 2 for _ in range(kinds)] for _ in range(pictures)])
    image_vectors = torch.tensor([[draw.randrange(-2, 3) for _ in range(2)] for _ in range(pictures)], dtype=torch.float32)
    text_vectors = torch.tensor([[draw.randrange(-2, 3) for _ in range(2)] for _ in range(kinds)], dtype=torch.float32)
    asked = Asked(
        image_vectors[picture],
        text_vectors[kind],
        torch.tensor(kind, dtype=torch.float32)[:, None],
        torch.tensor(owners),
        torch.tensor(picture),
        lambda rows: torch.tensor([float(picture[row]) for row in rows])[:, None, None],
    )
    known = rank_bounds(asked.image_features, asked.text_features, asked.owners)
    plain = (asked.image_features @ asked.text_features.T).tolist()
    again = [[table[picture[i], kind[t]].item() for t in range(texts)] for i in range(images)]
    for block in (1, 2, 64):
        scorer = ExactScorer(table)
        found = mode_ranks(scorer, asked, known, top_k, block)
        assert list(found) == list(MODES) and scorer.most <= block
        for mode in MODES:
            for ties in TIES:
                mine = found[mode][ties]
                forward = [
                    slow_rank([row[t] for row in plain], [row[t] for row in again], {owners[t]}, mode, ties, top_k)
                    for t in range(texts)
                ]
                backward = [
                    slow_rank(plain[i], again[i], {t for t in range(texts) if owners[t] == i}, mode, ties, top_k)
                    for i in sorted(set(owners))
                ]
                assert mine.text_to_image.tolist() == forward, (mode, ties, block)
                assert mine.image_to_text.tolist() == backward, (mode, ties, block)
                assert mine.query_images.tolist() == sorted(set(owners))


def test_a_pair_has_one_score_wherever_it_is_computed():
    """Twins and texts that repeat tie with the positive, although a block rounds otherwise than the pairs before it."""
    picture, kind, owners = [0, 1, 0, 2], [0, 0, 1, 2], [0, 2, 1, 3]
    torch.manual_seed(0)
    table = torch.eye(3)
    asked = Asked(
        torch.randn(4, 2),
        torch.randn(4, 2),
        torch.tensor(kind, dtype=torch.float32)[:, None],
        torch.tensor(owners),
        torch.tensor(picture),
        lambda rows: torch.tensor([float(picture[row]) for row in rows])[:, None, None],
    )
    known = rank_bounds(asked.image_features, asked.text_features, asked.owners)
    found = mode_ranks(TableScorer(table), asked, known, 4, 2)["conditioned"]
    assert found["best"].text_to_image.tolist() == [1, 1, 1, 1]
    assert found["worst"].text_to_image.tolist() == [2, 2, 1, 1], "image 2 is image 0"
    assert found["worst"].image_to_text.tolist() == [2, 1, 2, 1], "text 1 is text 0"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two real models over the squares, the fine-tuned one with a pooling."""
    asked = questions(write_squares(tmp_path_factory.mktemp("images")), "test")
    clips = {"base": tiny_clip(0, 77), "finetuned": tiny_clip(1, 77)}
    clips["finetuned"].add_pooling(2, seed=4)
    with torch.no_grad():
        for value in clips["finetuned"].pooling.pooling.parameters():
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    stores = {model: FeatureStore(None, clip, CPU, 8) for model, clip in clips.items()}
    return Study(asked, stores, settings(conditioned_on=["long", "short", "sentences", "truncation"], rerank=2))


def naive(made, texts):
    """[I, T]: one image at a time through the pooling."""
    store = made.stores["finetuned"]
    pooling, queries = store.clip.pooling.pooling, store.queries(texts)
    with torch.no_grad():
        rows = [
            F.cosine_similarity(pooling(store.tokens([file]), queries[None])[0], queries, dim=-1) for file in made.asked.files
        ]
    return torch.stack(rows).double().numpy()


def test_a_real_model_in_three_modes(real):
    found = tasks.measure(real, ["conditioned"])["conditioned"]
    assert list(found) == ["long", "short", "sentences", "truncation_5", "truncation_8", "truncation_full"]
    for name, captions in (("long", real.asked.long), ("short", real.asked.short)):
        block, scores = found[name], naive(real, captions.texts)
        assert (block["images"], block["captions"], block["top_k"]) == (6, len(captions.texts), 2)
        plain = real.stores["finetuned"]
        cosines = (plain.images(real.asked.files).double() @ plain.texts(captions.texts)[0].double().T).float().numpy()
        scores = scores.round(6)  # texts that repeat
        for mode in MODES:
            for k in (1, 2, 5):
                forward = [
                    slow_rank(cosines[:, t], scores[:, t], {image}, mode, "best", 2) for t, image in enumerate(captions.images)
                ]
                backward = [
                    slow_rank(cosines[i], scores[i], set(np.flatnonzero(captions.images == i)), mode, "best", 2)
                    for i in sorted(set(captions.images))
                ]
                for direction, ranks in zip(DIRECTIONS, (forward, backward), strict=True):
                    assert block[mode][direction][f"R@{k}"] == pytest.approx(100 * np.mean(np.array(ranks) <= k)), (name, mode)
        for mode in MODES[1:]:
            for direction in DIRECTIONS:
                change = block["difference"][mode][direction]["R@1"]
                assert change["value"] == pytest.approx(
                    block[mode][direction]["R@1"] - block["global"][direction]["R@1"], abs=1e-9
                )
                assert change["low"] <= change["value"] <= change["high"] and 0 < change["p"] <= 1
        assert set(block["seconds_per_query"]) == set(MODES) and min(block["seconds_per_query"].values()) > 0
        assert block["timed_images"] == 6
    assert found["short"]["global"]["image_to_text"]["tied"] > 0, "short captions repeat"
    assert found["short"]["conditioned"]["image_to_text"]["tied"] > 0
    assert all(found["long"][mode] == found["truncation_full"][mode] for mode in MODES)


def test_global_is_what_the_plain_task_has(real):
    found = tasks.measure(real, ["long", "conditioned"])
    for direction in DIRECTIONS:
        assert found["conditioned"]["long"]["global"][direction] == found["long"]["finetuned"][direction]


def test_reranking_all_is_scoring_all_and_reranking_one_changes_nothing(real):
    def recalls(top_k):
        made = Study(real.asked, real.stores, dataclasses.replace(real.config, rerank=top_k, conditioned_on=["short"]))
        return tasks.measure(made, ["conditioned"])["conditioned"]["short"]

    everyone, one = recalls(1000), recalls(1)
    assert everyone["rerank"] == everyone["conditioned"]
    for direction in DIRECTIONS:
        recall = {key: value for key, value in one["rerank"][direction].items() if key != "tied"}
        assert recall == {key: one["global"][direction][key] for key in recall}
    assert everyone["conditioned"] == one["conditioned"] and everyone["conditioned"] != everyone["global"]


def test_only_the_patches_of_the_model_that_has_a_pooling_are_kept(real, tmp_path):
    stores = {model: FeatureStore(tmp_path, store.clip, CPU, 8) for model, store in real.stores.items()}
    tasks.measure(Study(real.asked, stores, real.config), ["conditioned"])
    assert [len(list(tmp_path.glob(f"{stores[model].folder.name}/tokens/*.npy"))) > 0 for model in stores] == [False, True]


def test_what_cannot_be_asked():
    caption = "A red square. A blue one."
    made = study(made_up([caption, ""], [["one"], []]), conditioned_on=["long"])
    with pytest.raises(NotAsked, match="a model with text-conditioned pooling"):
        tasks.conditioned.Conditioned().needs(made)
    assert "text-conditioned pooling" in tasks.measure(made, ["conditioned"])["skipped"]["conditioned"]
    made = study(made_up(["", ""], [["one"], []]), conditioned_on=["long", "sentences"])
    made.stores["finetuned"].clip = SimpleNamespace(pooling=object())
    with pytest.raises(NotAsked, match=r"^long captions$"):
        tasks.conditioned.Conditioned().needs(made)
    made = study(made_up(["", ""], [["one"], []]), conditioned_on=["long", "short"])
    made.stores["finetuned"].clip = SimpleNamespace(pooling=object())
    needs = tasks.conditioned.Conditioned().needs(made)
    assert needs.texts == [("one", None)] and needs.patches and needs.patches_of == ["finetuned"]
