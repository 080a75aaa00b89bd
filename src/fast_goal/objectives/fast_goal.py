"""The FAST-GOAL objective: L = L_global + 0.5 L_local + L_TSL (FAST-GOAL section III-D).

L_global and L_local are CLIP's loss of whole images with long captions and of crops with sentences (`clip_loss`); L_TSL is
the sum of `tsl_loss` of regions (tokens pooled and projected by equation 11) and of sentences (equation 12). The ablations
of Table VI are the same sum with other weights: `objective=global`, `local`, `global_local`; `goal` has the authors' earlier
mapping to tokens, `hard_negatives` the in-image negatives of Table XIV.

Letters: P local pairs.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from fast_goal.config import number
from fast_goal.errors import ConfigError
from fast_goal.objectives import Features, Plain, at_least_float32, check_weights, objective
from fast_goal.objectives.contrastive import clip_loss
from fast_goal.objectives.tsl import TargetMatrix, tsl_loss

TERMS = ("global", "local", "tsl_image", "tsl_text")
LOCAL_TERMS, POOLED_TERMS = TERMS[1:], TERMS[2:]
SAME_SENTENCE = 1 - 1e-5  # cosine; equal texts are encoded equally up to rounding


@dataclasses.dataclass(frozen=True)
class FastGoalConfig:
    """The weight of each term, and what the cosines of TSL are compared with (see `tsl_loss`).

    in_image_negatives: the largest IoU of two regions of one image whose pairs are negatives of each other in the local
    term (Table XIV), from 0 to 1; at 1 all are whose region and sentence differ. None: pairs of one image never are.
    alignment: see training/alignment.py.
    """

    weights: dict[str, float]
    target_matrix: TargetMatrix
    in_image_negatives: float | None = number(0, 1)
    alignment: Literal["exact", "goal"]

    def __post_init__(self) -> None:
        check_weights(self.weights, TERMS)
        if self.in_image_negatives is not None and not self.weights["local"]:
            raise ConfigError(
                f"in_image_negatives = {self.in_image_negatives} acts on the local term alone, whose weight is 0: set "
                "weights.local above 0, or in_image_negatives=null"
            )


@objective("fast_goal", FastGoalConfig)
class FastGoal(Plain):
    """The weighted sum of the terms; a term of weight 0 is neither computed nor reported."""

    def __init__(self, config: FastGoalConfig):
        self.config = config

    @property
    def needs_local(self) -> bool:
        """Whether a term that looks at local pairs has a weight."""
        return any(self.config.weights[term] for term in LOCAL_TERMS)

    @property
    def needs_pooled(self) -> bool:
        """Whether a TSL term has a weight."""
        return any(self.config.weights[term] for term in POOLED_TERMS)

    @property
    def alignment(self) -> str:
        """How boxes become patches and sentences become spans."""
        return self.config.alignment

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """The terms and their weighted sum `loss`, computed in float32 at least, also under autocast."""
        with torch.autocast(features.image_global.device.type, enabled=False):
            terms = {term: self._term(term, at_least_float32(features)) for term in TERMS if self.config.weights[term]}
        return {**terms, "loss": sum(self.config.weights[term] * value for term, value in terms.items())}

    def _term(self, term: str, features: Features) -> Tensor:
        match term:
            case "global":
                return clip_loss(features.image_global, features.text_global, features.scale)
            case "local":
                excluded = _not_negatives(features, self.config.in_image_negatives)
                return clip_loss(features.image_local, features.text_local, features.scale, features.local_weight, excluded)
            case "tsl_image":
                weight = _product(features.region_weight, features.local_weight)
                return tsl_loss(features.region, features.image_local, weight, self.config.target_matrix, features.local_rows)
            case "tsl_text":
                weight = _product(features.sentence_weight, features.local_weight)
                return tsl_loss(features.sentence, features.text_local, weight, self.config.target_matrix, features.local_rows)
        raise ValueError(term)


def _not_negatives(features: Features, max_iou: float | None) -> Tensor | None:
    """bool [P, P]: the pairs of one image; with `max_iou` only those of one region, of regions whose IoU is above it, or of
    one sentence. None: there are none."""
    rows, boxes, sentences = features.local_rows, features.local_boxes, features.text_local.detach()
    if rows is None:
        return None
    same_image = rows[:, None] == rows[None, :]
    if max_iou is None:
        return same_image
    if boxes is None:
        raise ValueError("in-image negatives need the regions: local_boxes is None")
    sides = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    overlap, area = sides.clamp(min=0).prod(-1), (boxes[:, 2:] - boxes[:, :2]).prod(-1)  # [P, P], [P]
    union = area[:, None] + area[None, :] - overlap
    same_region = (boxes[:, None] == boxes[None, :]).all(-1)  # also where an IoU of 1 is not above max_iou
    return same_image & (same_region | (overlap > max_iou * union) | (sentences @ sentences.T > SAME_SENTENCE))


def _product(visible: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return visible if weight is None else weight if visible is None else visible * weight
