"""The objective of DeGLA (arXiv 2504.16801): contrast with hard negative captions, and distillation from an averaged teacher.

L = L_global + 0.1 L_IGC + 0.1 L_TGC + 0.005 L_distillation. The global term contrasts each image with the captions and all
hard negatives of the batch; IGC and TGC draw image and caption away from their own ones; the distillation holds the
embeddings near those of the teacher, an average of the weights over the steps that begins with those the training starts
from. With the global term alone it is plain fine-tuning with hard negatives, as NegCLIP does (`objective=negclip`). What
differs from the published code: docs/degla.md.

Letters: B pairs, K hard negative captions of each caption at most, N of the batch, D embedding width. All features are
L2-normalised. A mask [B, K] is True for the negatives that exist; the others may hold anything finite.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_goal.config import number
from fast_goal.objectives import Features, Plain, at_least_float32, check_weights, objective

TERMS = ("global", "igc", "tgc", "distillation")
TEACHER_TERMS = TERMS[2:]
Reduction = Literal["sum", "mean"]


@dataclasses.dataclass(frozen=True)
class DeglaConfig:
    """The weight of each term, and the paper's constants.

    distillation: `sum` or `mean`, see `distillation_loss`. tgc_scale: the logit scale of TGC. teacher_decay: of the teacher,
    per step, from 0 to 1; at 1 it stays what the training starts from.
    """

    weights: dict[str, float]
    distillation: Reduction
    tgc_scale: float = number(above=0)
    teacher_decay: float = number(0, 1)

    def __post_init__(self) -> None:
        check_weights(self.weights, TERMS)


@objective("degla", DeglaConfig)
class Degla(Plain):
    """The weighted sum of the terms; a term of weight 0 is neither computed nor reported.

    A caption without a negative takes no part in IGC and TGC, which are means over those that have one, and 0, with zero
    gradients, where none has. In the global term it is told from the negatives of the others; without any in the batch that
    term is CLIP's loss.
    """

    def __init__(self, config: DeglaConfig):
        self.config = config

    needs_negatives = True  # every term looks at them

    @property
    def teacher_decay(self) -> float | None:
        """The teacher's decay, None if no term that looks at it has a weight."""
        return self.config.teacher_decay if any(self.config.weights[term] for term in TEACHER_TERMS) else None

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """The terms and their weighted sum `loss`, computed in float32 at least, also under autocast."""
        with torch.autocast(features.image_global.device.type, enabled=False):
            features = at_least_float32(features)
            negatives, mask = padded_negatives(features)
            terms = {term: self._term(term, features, negatives, mask) for term in TERMS if self.config.weights[term]}
        return {**terms, "loss": sum(self.config.weights[term] * value for term, value in terms.items())}

    def _term(self, term: str, features: Features, negatives: Tensor, mask: Tensor) -> Tensor:
        image, text, scale = features.image_global, features.text_global, features.scale
        match term:
            case "global":
                return global_loss(image, text, features.text_negatives, scale)
            case "igc":
                return _of_those_with_negatives(igc_loss(image, text, negatives, scale, mask), mask)
            case "tgc":
                loss = tgc_loss(text, features.teacher_text, negatives, self.config.tgc_scale, mask)
                return _of_those_with_negatives(loss, mask)
            case "distillation":
                teacher = (features.teacher_image, features.teacher_text, features.teacher_negatives)
                return distillation_loss(image, text, features.text_negatives, *teacher, self.config.distillation)
        raise ValueError(term)


def padded_negatives(features: Features) -> tuple[Tensor, Tensor]:
    """The hard negatives of each caption, [B, K, D] with zeros where there are fewer than K, and where they are, [B, K]."""
    negatives, batch, count = features.text_negatives, len(features.text_global), features.negative_count
    place = features.negative_rows * count + features.negative_slots  # [N]
    padded = negatives.new_zeros(batch * count, negatives.shape[1]).index_copy(0, place, negatives)
    mask = torch.zeros(batch * count, dtype=torch.bool, device=negatives.device).index_fill(0, place, True)
    return padded.view(batch, count, negatives.shape[1]), mask.view(batch, count)


def global_loss(image: Tensor, text: Tensor, negatives: Tensor, scale: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE in which each image also has to tell its caption from the hard negatives of the whole batch.

    image, text [B, D]; negatives [B, K, D] with a mask [B, K], or [N, D], as whose they are makes no difference here; scale is
    the exponentiated logit scale. Image to text runs over the B captions and all negatives; text to image over the B images,
    as no image belongs to a negative. A scalar.
    """
    batch = len(image)
    target = torch.arange(batch, device=image.device)
    logits = scale * (image @ torch.cat([text, negatives.flatten(0, -2)]).T)  # [B, B+N]
    text_to_image = F.cross_entropy(logits[:, :batch].T, target)
    if mask is not None:
        logits = logits.masked_fill(F.pad(~mask.flatten(), (batch, 0)), -torch.inf)
    return (F.cross_entropy(logits, target) + text_to_image) / 2


def igc_loss(image: Tensor, text: Tensor, negatives: Tensor, scale: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Image-grounded contrast: each image has to tell its own caption from that caption's hard negatives.

    image, text [B, D]; negatives [B, K, D]; scale is the exponentiated logit scale. A scalar.
    """
    return _own_negatives(image, text, negatives, scale, mask)


def tgc_loss(text: Tensor, teacher_text: Tensor, negatives: Tensor, scale: float = 10.0, mask: Tensor | None = None) -> Tensor:
    """Text-grounded contrast: each caption against the teacher's embedding of it and its own hard negatives.

    text [B, D] and negatives [B, K, D] are the student's, teacher_text [B, D] the teacher's. A scalar.
    The scale is the paper's constant. The published code picks mostly negatives of other images by a slip in its mask;
    here, as the paper describes it, each caption meets its own.
    """
    return _own_negatives(text, teacher_text, negatives, scale, mask)


def distillation_loss(
    image: Tensor,
    text: Tensor,
    negatives: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_negatives: Tensor,
    reduction: Reduction = "sum",
) -> Tensor:
    """Self-distillation: the squared distances of the embeddings from those of the teacher, images and all texts together.

    image, text and their teacher's [B, D]; negatives and their teacher's [N, D]. "sum", as published, adds up the distances
    of all images, captions and negatives: its strength beside the other terms, which are means, grows with the batch. "mean"
    is that sum divided by B, the number of pairs: a pair and its negatives together count the same in a batch of any size,
    and one with more negatives counts more, as in the sum. A scalar.
    """
    pairs = ((image, teacher_image), (text, teacher_text), (negatives, teacher_negatives))
    total = sum((own - taught).square().sum() for own, taught in pairs)
    return total / len(image) if reduction == "mean" else total


def _of_those_with_negatives(mean: Tensor, mask: Tensor) -> Tensor:
    """The mean over the B captions, as one over those that have a negative; the others added 0 to it."""
    return mean * len(mask) / mask.any(1).sum().clamp(min=1)


def _own_negatives(query: Tensor, positive: Tensor, negatives: Tensor, scale: Tensor | float, mask: Tensor | None) -> Tensor:
    positive_logit = scale * (query * positive).sum(-1, keepdim=True)  # [B, 1]
    negative_logits = scale * torch.einsum("bd,bkd->bk", query, negatives)
    if mask is not None:
        negative_logits = negative_logits.masked_fill(~mask, -torch.inf)
    logits = torch.cat([positive_logit, negative_logits], dim=1)  # [B, 1+K]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
