"""Joint global+local mean average precision (GOAL, CVPR 2025): whole images and their regions in one pool.

An item is a whole image with its long caption, or a local one: a region (or another crop) of it with a sentence of that
caption. Letters: `N` items, one image feature each; `T` texts, each once though several items may have it; `D` embedding
width; `P` relevant pairs of an item and a text; `M` the most relevant candidates of a query that can count, at most k.

Relevant for a whole image: its own caption and the sentences of all its local items. For a local item: its own sentence and
the caption of its whole image, not the sentences of its siblings. For a text: the images of the items that it is relevant
for. Items are linked by the id of the image (`link`), scores and the tie rule are those of `evaluation.retrieval`.

AP@k of a query = (the sum of j / position, over the j-th of its relevant candidates where that stands within k) / divisor.
The divisor is the number of its relevant candidates (`relevant`, as GOAL's published code has it: AP then stays below 1 where
there are more than k), or the number that fit within k, min(k, relevant) (`reachable`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fast_goal.evaluation.retrieval import Ties, below, check_features, count_above, scores_of_pairs

Divisor = Literal["relevant", "reachable"]


class JointPrecision(NamedTuple):
    """AP@k of every query as a fraction; mAP@k is the mean of a direction."""

    image_to_text: Tensor  # float64 [N], of each item's image
    text_to_image: Tensor  # float64 [T], of each text


class _Slots(NamedTuple):
    """The relevant pairs of one direction, by the slot each takes among those of its query, the best score first."""

    order: Tensor  # int64 [P], the pairs by query and falling score
    query: Tensor  # int64 [P], of each pair in that order; as are the following
    slot: Tensor  # int64 [P], from 0
    higher: Tensor  # int64 [P], relevant candidates of the query that score strictly above
    least: Tensor  # int64 [P], those that score at least as much, itself among them
    sizes: Tensor  # int64 [Q], relevant candidates of each query


def link(image_ids: Sequence[Hashable], local_image_ids: Sequence[Hashable]) -> Tensor:
    """The whole image's row of every item: int64 [N], the whole images first and then the local items.

    image_ids: of the whole images, each once; local_image_ids: of the image that each local item is part of.

    Raises:
        ValueError: an id that stands twice among the whole images, a local item whose image is not among them.
    """
    rows = {image: row for row, image in enumerate(image_ids)}
    if len(rows) < len(image_ids):
        twice = next(image for row, image in enumerate(image_ids) if rows[image] != row)
        raise ValueError(f"the image {twice!r} stands more than once among the whole images")
    if lost := [image for image in local_image_ids if image not in rows]:
        raise ValueError(f"{len(lost)} local items belong to no whole image, the first to {lost[0]!r}")
    return torch.tensor([*rows.values(), *(rows[image] for image in local_image_ids)], dtype=torch.long)


def joint_precision(
    image_features: Tensor,
    text_features: Tensor,
    item_texts: Tensor,
    originals: Tensor,
    k: int = 10,
    divisor: Divisor = "relevant",
    ties: Ties = "best",
    chunk: int = 1024,
) -> JointPrecision:
    """AP@k of both directions.

    Args:
        image_features: [N, D], of each item.
        text_features: [T, D], of the texts; every one belongs to at least one item.
        item_texts: [N], row of the text of each item.
        originals: [N], row of the item that is the whole image of each item; its own for a whole image. See `link`.
        k: candidates looked at.
        divisor: what the sum of precisions is divided by; see the head of this file.
        ties: whether a wrong candidate of the same score stands behind a relevant one (`best`) or before it (`worst`).
        chunk: rows of either side per block, as for `retrieval.ranks`.

    Raises:
        ValueError: what `retrieval.ranks` refuses, rows that do not exist, an original that is a local item itself, a text
            of no item, k < 1.
    """
    items, texts = image_features.detach(), text_features.detach()
    check_features(items, texts, chunk)
    item_texts, originals = _checked(item_texts, originals, len(items), len(texts), items.device)
    if k < 1:
        raise ValueError(f"k = {k}: expected at least 1")

    own = torch.arange(len(items), device=items.device)
    related = torch.cat(  # rows of items (i, j): i's image and j's text are relevant for each other
        [torch.stack([own, own], 1), torch.stack([own, originals], 1), torch.stack([originals, own], 1)]
    )
    pairs = torch.stack([related[:, 0], item_texts[related[:, 1]]], 1).unique(dim=0)  # [P, 2], item and text
    scores = scores_of_pairs(items, texts, pairs[:, 0], pairs[:, 1], chunk)  # [P]

    sides = [_slots(pairs[:, side], scores, count) for side, count in enumerate((len(items), len(texts)))]
    bars = [_bars(side, scores if ties == "best" else below(scores), k) for side in sides]
    counts = count_above(items, texts, *bars, chunk)
    return JointPrecision(*(_precision(*both, k, divisor, ties) for both in zip(sides, counts, strict=True)))


def _slots(query: Tensor, scores: Tensor, queries: int) -> _Slots:
    """query: [P], the query that each pair belongs to; scores: [P]."""
    order = scores.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    query, scores = query[order], scores[order]
    sizes = query.bincount(minlength=queries)
    starts = (sizes.cumsum(0) - sizes)[query]
    places = torch.arange(len(query), device=query.device)
    fresh = torch.ones_like(query, dtype=torch.bool)  # the first of its query, or scored below the one before it
    fresh[1:] = (query[1:] != query[:-1]) | (scores[1:] != scores[:-1])
    group = fresh.cumsum(0) - 1  # of equal scores of one query
    first = places[fresh][group]
    return _Slots(order, query, places - starts, first - starts, first - starts + group.bincount()[group], sizes)


def _bars(side: _Slots, scores: Tensor, k: int) -> Tensor:
    """The scores [P] by query and slot: float32 [Q, M], inf where there are fewer."""
    width = min(k, int(side.sizes.max()))
    kept = side.slot < width  # the j-th relevant candidate stands at j or later
    bars = torch.full((len(side.sizes), width), torch.inf, device=scores.device)
    bars[side.query[kept], side.slot[kept]] = scores[side.order][kept]
    return bars


def _precision(side: _Slots, counts: Tensor, k: int, divisor: Divisor, ties: Ties) -> Tensor:
    """AP@k of each query, from the number of candidates [Q, M] that score above its relevant ones: float64 [Q]."""
    kept = side.slot < counts.shape[1]
    query, slot = side.query[kept], side.slot[kept]
    relevant = (side.higher if ties == "best" else side.least)[kept]
    position = counts[query, slot] - relevant + slot + 1
    gained = torch.where(position <= k, (slot + 1).double() / position, 0.0)
    total = torch.zeros(len(side.sizes), dtype=torch.float64, device=counts.device).index_add_(0, query, gained)
    return total / (side.sizes if divisor == "relevant" else side.sizes.clamp(max=k))


def _checked(item_texts: Tensor, originals: Tensor, items: int, texts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    found = []
    for name, rows, limit in (("item_texts", item_texts, texts), ("originals", originals, items)):
        rows = torch.as_tensor(rows, device=device)
        if rows.shape != (items,) or rows.is_floating_point() or rows.min() < 0 or rows.max() >= limit:
            raise ValueError(f"{name} must hold a row from 0 to {limit - 1} for each of {items} items")
        found.append(rows.long())
    item_texts, originals = found
    if len(local := (originals[originals] != originals).nonzero()):
        raise ValueError(f"the original of item {local[0].item()} is a local item itself")
    if (missing := texts - len(item_texts.unique())) > 0:
        raise ValueError(f"{missing} of {texts} texts belong to no item")
    return item_texts, originals
