"""The objective of FLAIR (arXiv 2412.03561): a text decides which patches of an image count, learned from parts of captions.

L = (TCS + MPS) / 2. TCS, the text-conditioned sigmoid loss, asks of each image, as each of several texts pools its patches,
whether that text is its own: its K sub-captions are, one sub-caption of every other image is not. MPS, the multi-positive
sigmoid loss, asks the same of the images as they are, of all sub-captions of the batch. Both are yes-or-no questions with a
logit scale and a bias that are learned with the pooling (model/pooling.py). What differs from the published code:
docs/flair.md.

Each process asks about its own images alone, and holds their rows of the logits; what it needs of the others' are their
texts (`Shares`). A block of texts is pooled, compared and forgotten, and pooled again in the backward pass.

Letters: B images of the whole batch, b of this process, N patches, K sub-captions of each image, Q texts asked of each image,
M columns of a logit matrix, D embedding width.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fast_goal.config import number
from fast_goal.model.pooling import TextConditionedPooling as TextConditionedPooling
from fast_goal.objectives import Features, Plain, SubCaptions, at_least_float32, check_weights, objective

TERMS = ("tcs", "mps")
BLOCK = 128  # texts that are pooled at once for each image, a guess: b * BLOCK * D numbers


@dataclasses.dataclass(frozen=True)
class FlairConfig:
    """The weight of each term, what is drawn from a caption, and the heads of the pooling."""

    weights: dict[str, float]
    sub_captions: SubCaptions
    heads: int = number(1)

    def __post_init__(self) -> None:
        check_weights(self.weights, TERMS)


@objective("flair", FlairConfig)
class Flair(Plain):
    """The weighted sum of the terms; a term of weight 0 is neither computed nor reported."""

    needs_captions = False

    def __init__(self, config: FlairConfig):
        self.config = config

    @property
    def sub_captions(self) -> SubCaptions | None:
        """What is drawn from long captions."""
        return self.config.sub_captions

    @property
    def heads(self) -> int | None:
        """Of the pooling."""
        return self.config.heads

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """The terms and their weighted sum `loss`, computed in float32 at least, also under autocast; beside them the scale
        and the bias of the logits, `sigmoid_scale` and `sigmoid_bias`."""
        with torch.autocast(features.image_global.device.type, enabled=False):
            features = at_least_float32(features)
            head = features.pooling
            scale, bias = head.logit_scale.exp(), head.logit_bias
            texts = features.shares.rows(features.sub_queries)  # [B, K, D]
            terms = {}
            if self.config.weights["tcs"]:
                own = conditioned_loss(
                    head.pooling, features.patches, texts, features.sub_choices, features.shares.first, scale, bias
                )
                terms["tcs"] = features.shares.total(own)
            if self.config.weights["mps"]:
                own = multi_positive_loss(_own_rows(features), texts, features.shares.first, scale, bias)
                terms["mps"] = features.shares.total(own)
        told = {"sigmoid_scale": scale.detach(), "sigmoid_bias": bias.detach().clone()}  # as they are before the step
        return {**terms, **told, "loss": sum(self.config.weights[term] * value for term, value in terms.items())}


def conditioned_loss(
    pooling: TextConditionedPooling,
    patches: Tensor,
    texts: Tensor,
    choices: Tensor,
    first: int,
    scale: Tensor | float,
    bias: Tensor | float,
    block: int = BLOCK,
) -> Tensor:
    """The text-conditioned sigmoid loss (equations 3 and 5), of the images from `first` on: their part of a sum over all
    images.

    patches [b, N, D], texts [B, K, D], not normalised; choices int64 [b, B]: which of the K texts of another image is asked of
    an own one (those of the image itself all are). The logit is scale * cos(image as the text pools it, text) + bias; the sum
    of -log sigmoid is divided by B + K - 1, the texts asked of an image. A scalar.
    """
    own, batch, count = len(patches), len(texts), texts.shape[1]
    rows = torch.arange(own, device=patches.device)
    others = torch.arange(batch - 1, device=patches.device)
    others = others[None] + (others[None] >= first + rows[:, None])  # [b, B-1]: every image but the own one
    queries, units = pooling.queries(texts).flatten(0, 1), F.normalize(texts, dim=-1).flatten(0, 1)  # each text once
    keys, values = pooling.keys_values(patches)
    asked = torch.cat(
        [(first + rows)[:, None] * count + torch.arange(count, device=rows.device), others * count + choices.gather(1, others)],
        1,
    )  # [b, K+B-1], rows of `queries`: the own ones come first

    def part(keys: Tensor, values: Tensor, queries: Tensor, units: Tensor, which: Tensor, own_ones: int) -> Tensor:
        pooled = F.normalize(pooling.attend(queries[which], keys, values), dim=-1)
        return _log_sigmoid((pooled * units[which]).sum(-1), own_ones, scale, bias)

    total = patches.new_zeros(())
    for start in range(0, asked.shape[1], block):
        which, own_ones = asked[:, start : start + block], max(count - start, 0)
        total = total + checkpoint(part, keys, values, queries, units, which, own_ones, use_reentrant=False)
    return total / asked.shape[1]


def multi_positive_loss(images: Tensor, texts: Tensor, first: int, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """The multi-positive sigmoid loss (equation 6), of the images from `first` on: their part of a sum over all images.

    images [b, D], L2-normalised; texts [B, K, D], not normalised. Every text is asked of every image; the sum of -log sigmoid
    is divided by B * K. A scalar.
    """
    batch, count = texts.shape[:2]
    logits = scale * images @ F.normalize(texts, dim=-1).flatten(0, 1).T + bias  # [b, B*K]
    owner = torch.arange(batch * count, device=images.device) // count
    positives = owner[None] == first + torch.arange(len(images), device=images.device)[:, None]
    return sigmoid_loss(logits, positives)


def sigmoid_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Sigmoid loss (equations 5 and 6): every entry is a yes-or-no question of its own.

    logits [B, M], scaled and shifted; positives [B, M] bool. The sum of -log sigmoid(+logit) over the positives and of
    -log sigmoid(-logit) over the others, divided by M as in the published code. A scalar.
    """
    signs = positives.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / logits.shape[1]


def _log_sigmoid(cosines: Tensor, own: int, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """The sum of -log sigmoid over cosines [b, Q] of which the first `own` columns are positives."""
    positives = torch.arange(cosines.shape[1], device=cosines.device) < own
    return sigmoid_loss(scale * cosines + bias, positives.expand_as(cosines)) * cosines.shape[1]


def _own_rows(features: Features) -> Tensor:
    """Of the whole images of the batch those of this process: [b, D]."""
    first = features.shares.first
    return features.image_global[first : first + len(features.patches)]
