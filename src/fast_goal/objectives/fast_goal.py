"""The FAST-GOAL objective: L = L_global + 0.5 L_local + L_TSL (FAST-GOAL section III-D).

The ablations of its Table VI are the same sum with other weights: `objective=global`, `local`, `global_local`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from fast_goal.errors import ConfigError
from fast_goal.objectives import Features, objective
from fast_goal.objectives.contrastive import clip_loss
from fast_goal.objectives.tsl import TargetMatrix, tsl_loss

TERMS = ("global", "local", "tsl_image", "tsl_text")
LOCAL_TERMS = TERMS[1:]


@dataclasses.dataclass(frozen=True)
class FastGoalConfig:
    """The weight of each term, and what the cosines of TSL are compared with (see `tsl_loss`).

    in_image_negatives: the largest IoU of two regions of one image whose pairs are negatives of each other in the local
    term (Table XIV); None: pairs of one image never are. alignment: see training/alignment.py.
    """

    weights: dict[str, float]
    target_matrix: TargetMatrix
    in_image_negatives: float | None
    alignment: Literal["exact", "goal"]

    def __post_init__(self) -> None:
        for term, weight in self.weights.items():
            if term not in TERMS:
                raise ConfigError(f"unknown key objective.weights.{term} = {weight}. Known here: {', '.join(TERMS)}.")
            if not 0 <= weight < math.inf:
                raise ConfigError(f"objective.weights.{term} = {weight}: expected a number, at least 0")
        for term in TERMS:
            if term not in self.weights:
                raise ConfigError(f"missing key objective.weights.{term}; 0 leaves the term out.")
        if not any(self.weights.values()):
            raise ConfigError(f"objective.weights = {self.weights}: at least one has to be above 0")


@objective("fast_goal", FastGoalConfig)
class FastGoal:
    """The weighted sum of the terms; a term of weight 0 is neither computed nor reported."""

    def __init__(self, config: FastGoalConfig):
        self.config = config

    @property
    def needs_local(self) -> bool:
        """Whether a term that looks at local pairs has a weight."""
        return any(self.config.weights[term] for term in LOCAL_TERMS)

    @property
    def alignment(self) -> str:
        """How boxes become patches and sentences become spans."""
        return self.config.alignment

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """The terms and their weighted sum `loss`, computed in float32 at least, also under autocast."""
        with torch.autocast(features.image_global.device.type, enabled=False):
            terms = {term: self._term(term, _at_least_float32(features)) for term in TERMS if self.config.weights[term]}
        return {**terms, "loss": sum(self.config.weights[term] * value for term, value in terms.items())}

    def _term(self, term: str, features: Features) -> Tensor:
        match term:
            case "global":
                return clip_loss(features.image_global, features.text_global, features.scale)
            case "local":
                weight, rows = features.local_weight, features.local_rows
                return clip_loss(features.image_local, features.text_local, features.scale, weight, rows)
            case "tsl_image":
                weight = _product(features.region_weight, features.local_weight)
                return tsl_loss(features.region, features.image_local, weight, self.config.target_matrix, features.local_rows)
            case "tsl_text":
                weight = _product(features.sentence_weight, features.local_weight)
                return tsl_loss(features.sentence, features.text_local, weight, self.config.target_matrix, features.local_rows)
        raise ValueError(term)


def _product(visible: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return visible if weight is None else weight if visible is None else visible * weight


def _at_least_float32(features: Features) -> Features:
    values = {field.name: getattr(features, field.name) for field in dataclasses.fields(features)}
    half = (torch.float16, torch.bfloat16)
    return Features(**{name: v.float() if v is not None and v.dtype in half else v for name, v in values.items()})
