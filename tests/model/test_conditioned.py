"""Conditioned scores in blocks: equal to one image and text at a time, by loops and by the pooling itself."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fast_goal.model.conditioned import ConditionedScorer, conditioned_scores
from fast_goal.model.pooling import TextConditionedPooling

SIZES = [(5, 7, 4, 16, 2), (1, 1, 1, 8, 1), (3, 40, 9, 24, 3), (6, 2, 5, 12, 4), (2, 33, 3, 10, 1)]  # I, T, N, D, H


def pooling_of(dim, heads, seed=0, gain=1.0):
    """A pooling in which no weight or bias stays what it is made with."""
    torch.manual_seed(seed)
    made = TextConditionedPooling(dim, heads).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            value += 0.2 * torch.randn_like(value)
            if name == "attention.in_proj_weight":
                value *= gain
    return made


def inputs(images, texts, patches, dim, seed=1):
    torch.manual_seed(seed)
    return torch.randn(images, patches, dim) * 2 + 0.3, torch.randn(texts, dim) * 3 - 0.1


def slow_score(pooling, patches, text):
    """One image, patches [N, D], and one text [D], in float64, head by head and patch by patch."""
    weight = {name: value.detach().double().numpy() for name, value in pooling.named_parameters()}

    def normal(row, name):
        centred = row - row.mean()
        return centred / math.sqrt((centred**2).mean() + 1e-5) * weight[f"{name}.weight"] + weight[f"{name}.bias"]

    dim, heads = len(text), pooling.heads
    width = dim // heads
    projections = [
        (weight["attention.in_proj_weight"][part * dim :][:dim], weight["attention.in_proj_bias"][part * dim :][:dim])
        for part in range(3)
    ]
    (wq, bq), (wk, bk), (wv, bv) = projections
    query = wq @ normal(text, "norm_query") + bq
    keys = [wk @ normal(row, "norm_key") + bk for row in patches]
    values = [wv @ normal(row, "norm_value") + bv for row in patches]
    context = np.zeros(dim)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = [query[part] @ key[part] / math.sqrt(width) for key in keys] + [0.0]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        for power, value in zip(powers, values, strict=False):
            context[part] += power / sum(powers) * value[part]
    pooled = weight["attention.out_proj.weight"] @ context + weight["attention.out_proj.bias"]
    return pooled @ text / np.linalg.norm(pooled) / np.linalg.norm(text)


def slow_scores(pooling, tokens, queries):
    images, texts = tokens.double().numpy(), queries.double().numpy()
    return torch.tensor([[slow_score(pooling, image, text) for text in texts] for image in images]).reshape(
        len(images), len(texts)
    )


@pytest.mark.parametrize("block", [None, 1, 37, 300])
@pytest.mark.parametrize("sizes", SIZES)
def test_scores_are_those_of_loops(sizes, block):
    images, texts, patches, dim, heads = sizes
    pooling, (tokens, queries) = pooling_of(dim, heads), inputs(images, texts, patches, dim)
    found = conditioned_scores(pooling, tokens, queries, block)
    assert found.shape == (images, texts) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), slow_scores(pooling, tokens, queries), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("patches", "dim", "heads"), [(36, 128, 8), (49, 64, 4)])
def test_scores_are_those_of_the_pooling_one_image_at_a_time(patches, dim, heads):
    pooling, (tokens, queries) = pooling_of(dim, heads, 3), inputs(9, 70, patches, dim, 4)
    with torch.no_grad():
        rows = [F.cosine_similarity(pooling(image[None], queries[None])[0], queries, dim=-1) for image in tokens]
    for block in (None, 5000):
        torch.testing.assert_close(conditioned_scores(pooling, tokens, queries, block), torch.stack(rows), atol=2e-6, rtol=0)


@pytest.mark.parametrize("block", [None, 1, 50, 1000])
def test_pairs_are_the_entries_of_the_whole(block):
    pooling, (tokens, queries) = pooling_of(16, 2), inputs(6, 11, 4, 16)
    scorer = ConditionedScorer(pooling, block)
    images, texts = scorer.images(tokens), scorer.texts(queries)
    draw = torch.Generator().manual_seed(2)
    rows = torch.cat([torch.randint(6, (40,), generator=draw), torch.full((30,), 2), torch.tensor([5])])
    columns = torch.randint(11, (71,), generator=draw)
    expected = scorer.scores(images, texts)[rows, columns]
    torch.testing.assert_close(scorer.pairs(images, texts, rows, columns), expected, atol=1e-6, rtol=0)
    assert scorer.pairs(images, texts, rows[:0], columns[:0]).shape == (0,)


def test_nothing_to_score():
    pooling, (tokens, queries) = pooling_of(16, 2), inputs(3, 4, 4, 16)
    assert conditioned_scores(pooling, tokens[:0], queries).shape == (0, 4)
    assert conditioned_scores(pooling, tokens, queries[:0]).shape == (3, 0)


@pytest.mark.parametrize("gain", [3.0, 12.0, 200.0])
def test_large_logits_neither_overflow_nor_vanish(gain):
    pooling, (tokens, queries) = pooling_of(16, 2, gain=gain), inputs(4, 9, 6, 16)
    scorer = ConditionedScorer(pooling)
    images, texts = scorer.images(tokens), scorer.texts(queries)
    assert scorer._may_overflow(images, texts) == (gain > 3)
    # a logit of thousands is off by what float32 rounds it by
    expected = slow_scores(pooling, tokens, queries)
    torch.testing.assert_close(scorer.scores(images, texts).double(), expected, atol=2e-6 * gain, rtol=0)


def test_shifted_and_plain_powers_agree(monkeypatch):
    pooling, (tokens, queries) = pooling_of(24, 3), inputs(4, 9, 6, 24)
    plain = conditioned_scores(pooling, tokens, queries)
    monkeypatch.setattr("fast_goal.model.conditioned.MOST", -1.0)
    torch.testing.assert_close(conditioned_scores(pooling, tokens, queries), plain, atol=1e-6, rtol=0)


def test_an_image_of_which_nothing_is_left_scores_0():
    pooling, (tokens, queries) = pooling_of(16, 2), inputs(2, 3, 4, 16)
    with torch.no_grad():
        pooling.attention.out_proj.weight.zero_()
        pooling.attention.out_proj.bias.zero_()
    assert torch.equal(conditioned_scores(pooling, tokens, queries), torch.zeros(2, 3))


def test_memory_is_bounded_by_the_block():
    block, (tokens, queries) = 2000, inputs(8, 300, 9, 16)
    scorer = ConditionedScorer(pooling_of(16, 2), block)
    scorer.scores(scorer.images(tokens), scorer.texts(queries))
    assert sum(kept.numel() for kept in scorer._spaces.values()) < 4 * block


def test_the_caller_s_modes_do_not_matter():
    pooling, (tokens, queries) = pooling_of(16, 2), inputs(3, 4, 4, 16)
    expected = conditioned_scores(pooling, tokens, queries)
    assert not expected.requires_grad
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scorer = ConditionedScorer(pooling)
        images, texts = scorer.images(tokens), scorer.texts(queries)
        found = scorer.scores(images, texts)
    assert torch.equal(found, expected)
    assert torch.equal(scorer.scores(images, texts), expected), "made in inference mode, used outside"
    found += 1
    assert torch.equal(scorer.scores(images, texts), expected)


def test_double_precision_stays_so():
    pooling, (tokens, queries) = pooling_of(12, 3), inputs(3, 4, 4, 12)
    found = conditioned_scores(pooling.double(), tokens, queries)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, slow_scores(pooling, tokens, queries), atol=1e-12, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [None, 5000])
def test_a_gpu_gives_the_same_scores(block):
    pooling, (tokens, queries) = pooling_of(64, 4), inputs(9, 70, 16, 64)
    expected = conditioned_scores(pooling, tokens, queries)
    found = conditioned_scores(pooling.cuda(), tokens.cuda(), queries, block)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)
