"""Region-sentence matching (METHOD: "FLISM", step 4). torch alone.

`R` regions, `S` sentences, `D` embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
    regions, sentences = region_embeddings.shape[0], sentence_embeddings.shape[0]
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}: expected at least 1")
    if not (regions and sentences):
        return []
    if region_embeddings.ndim != 2 or sentence_embeddings.shape[1:] != region_embeddings.shape[1:]:
        raise ValueError(
            f"expected [R, D] and [S, D], got {list(region_embeddings.shape)} and {list(sentence_embeddings.shape)}"
        )
    similarity = (_unit(sentence_embeddings) @ _unit(region_embeddings).T).clamp(-1, 1)  # [S, R]
    if not similarity.isfinite().all():
        raise ValueError("embeddings hold NaN or infinity")
    best = similarity.amax(1)  # [S]
    # argmax promises no order among equals
    region_index = torch.arange(regions, device=similarity.device).expand_as(similarity)
    chosen = region_index.where(similarity == best[:, None], regions).amin(1)  # [S]
    values, order = best.sort(descending=True, stable=True)
    order, values = order[:top_k], values[:top_k]
    return [Match(*found) for found in zip(order.tolist(), chosen[order].tolist(), values.tolist(), strict=True)]


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
