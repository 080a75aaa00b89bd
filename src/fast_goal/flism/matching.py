"""Region-sentence matching (METHOD: "FLISM", step 4). torch alone.

`R` regions, `S` sentences, `D` embedding width, `G` images of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64  # images in one matrix product: at 30 regions, 20 sentences and a width of 512, 13 MB


class Match(NamedTuple):
    """One local pair: the indices of its sentence and its region, and their cosine similarity."""

    sentence: int
    region: int
    similarity: float


def match(region_embeddings: Tensor, sentence_embeddings: Tensor, top_k: int = 1) -> list[Match]:
    """The `top_k` local pairs of one image, best first.

    Every sentence takes its most similar region; of these pairs the `top_k` most similar are kept (fewer if there are
    fewer sentences). No threshold, and several sentences may share a region. A sentence between equally similar regions
    takes the lower region index; of equally similar pairs the lower sentence index comes first.

    `region_embeddings` [R, D] and `sentence_embeddings` [S, D] need not be normalised. Without regions or sentences the
    result is empty. Raises ValueError for shapes that do not fit, embeddings that are not finite, or top_k < 1.
    """
    return match_many([region_embeddings], [sentence_embeddings], top_k)[0]


def match_many(regions: Sequence[Tensor], sentences: Sequence[Tensor], top_k: int = 1) -> list[list[Match]]:
    """`match` for many images at once: regions [R, D] and sentences [S, D] of each, all of one D and type.

    Similarities are computed in double precision and rounded, so that they do not depend on the images beside.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}: expected at least 1")
    found: list[list[Match]] = [[] for _ in regions]
    full = [index for index, pair in enumerate(zip(regions, sentences, strict=True)) if len(pair[0]) and len(pair[1])]
    for start in range(0, len(full), GROUP):
        group = full[start : start + GROUP]
        results = _match_group([regions[index] for index in group], [sentences[index] for index in group], top_k)
        for index, result in zip(group, results, strict=True):
            found[index] = result
    return found


def rematch(regions: Tensor, sentences: Tensor, pairs: Sequence[tuple[int, int]]) -> list[Match]:
    """Pairs (sentence, region) that were chosen otherwise, in their order, with their similarities."""
    if not pairs:
        return []
    chosen = torch.tensor(pairs)
    similarities = (_unit(sentences[chosen[:, 0]]) * _unit(regions[chosen[:, 1]])).sum(1).clamp(-1, 1)
    if not similarities.isfinite().all():
        raise ValueError("embeddings hold NaN or infinity")
    return [Match(*pair, value) for pair, value in zip(pairs, similarities.float().tolist(), strict=True)]


def pair_weights(similarities: Sequence[float], kind: Literal["uniform", "similarity"]) -> list[float]:
    """The weights of the pairs of one image, which add up to 1 (Table VIII).

    uniform: 1 / k each. similarity: in proportion to the cosine similarity; a negative one counts as 0, and where none
    is positive, which says nothing about the order of the pairs' worth, the weights are uniform.
    """
    if kind not in ("uniform", "similarity"):
        raise ValueError(f"pair_weights = {kind!r}: expected uniform or similarity")
    positive = [max(value, 0.0) for value in similarities]
    total = sum(positive)
    if kind == "uniform" or total <= 0:
        return [1.0 / len(positive) for _ in positive]
    return [value / total for value in positive]


def _match_group(regions: list[Tensor], sentences: list[Tensor], top_k: int) -> list[list[Match]]:
    for region, sentence in zip(regions, sentences, strict=True):
        if region.ndim != 2 or sentence.shape[1:] != region.shape[1:]:
            raise ValueError(f"expected [R, D] and [S, D], got {list(region.shape)} and {list(sentence.shape)}")
    kind = torch.promote_types(torch.promote_types(regions[0].dtype, sentences[0].dtype), torch.float32)
    device = regions[0].device
    counts = torch.tensor([len(region) for region in regions], device=device)  # [G]
    padded = [torch.nn.utils.rnn.pad_sequence([_unit(part) for part in parts], True) for parts in (sentences, regions)]
    # a product of other sizes sums in another order: rounded from double, equal vectors keep equal similarities
    similarity = (padded[0] @ padded[1].transpose(1, 2)).clamp(-1, 1).to(kind)  # [G, S, R]
    if not similarity.isfinite().all():
        raise ValueError("embeddings hold NaN or infinity")
    index = torch.arange(similarity.shape[2], device=device)  # [R]
    similarity = similarity.masked_fill((index >= counts[:, None])[:, None], -2.0)
    best = similarity.amax(2)  # [G, S]
    # argmax promises no order among equals
    chosen = index.expand_as(similarity).where(similarity == best[..., None], len(index)).amin(2)  # [G, S]
    present = torch.arange(best.shape[1], device=device) < torch.tensor([[len(part)] for part in sentences], device=device)
    values, order = best.masked_fill(~present, -3.0).sort(dim=1, descending=True, stable=True)  # [G, S]
    order, values = order[:, :top_k], values[:, :top_k]
    rows = zip(order.tolist(), chosen.gather(1, order).tolist(), values.tolist(), sentences, strict=True)
    return [[Match(*pair) for pair in zip(*row[:3], strict=True)][: len(row[3])] for row in rows]


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.double(), dim=-1)
