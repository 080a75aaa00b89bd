"""Several objectives in one run: the sum of their losses, each with a weight, as in `objective=fast_goal_degla`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fast_goal.errors import ConfigError
from fast_goal.objectives import Features, Objective, Plain, objective, objective_config

ANY = ("needs_local", "needs_pooled", "needs_negatives", "needs_captions")
ONE = ("teacher_decay", "sub_captions", "heads")  # of a run, beside the alignment
NAME = re.compile(r"[a-z][a-z0-9_]*")  # of a part: it becomes part of the names of metrics


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """objective: as the section `objective` describes one, with its name. weight: of its loss; 0 leaves it out."""

    objective: dict[str, Any]
    weight: float

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"weight = {self.weight}: expected a number, at least 0")
        try:
            objective_config(self.objective, "objective")
        except ConfigError as error:
            message = str(error)
            if message.startswith("objective."):
                raise
            # of an unknown or a missing key; the section, which is put before it, is the beginning of the key's name
            raise ConfigError(f"objective: {message.replace('objective.', '')}") from None

    def make(self) -> Objective:
        """The objective of this part."""
        make, config = objective_config(self.objective)
        return make(config)


@dataclasses.dataclass(frozen=True)
class WeightedConfig:
    """The objectives, by names of their own. Those with a weight have to agree on what a run has only one of."""

    parts: dict[str, PartConfig]

    def __post_init__(self) -> None:
        for name in self.parts:
            if not NAME.fullmatch(name):
                raise ConfigError(f"parts.{name}: expected a name of small letters, digits and _")
        made = self.make()
        if not made:
            raise ConfigError(f"parts = {', '.join(self.parts) or 'none'}: at least one has to have a weight above 0")
        for word, found in _shared(made).items():
            if len(set(found.values())) > 1:
                told = ", ".join(f"{value} in {name}" for name, value in found.items())
                raise ConfigError(f"parts: {word} is {told}; set it to the same in all")

    def make(self) -> dict[str, Objective]:
        """The objectives with a weight, by name."""
        return {name: part.make() for name, part in self.parts.items() if part.weight}


@objective("weighted", WeightedConfig)
class Weighted(Plain):
    """The weighted sum of the losses of the parts. Needs what any of them needs; of what a run has only one of, takes that of
    the parts that look at it, which they share."""

    def __init__(self, config: WeightedConfig):
        self.config = config
        self.parts = config.make()
        for name in ANY:
            setattr(self, name, any(getattr(part, name) for part in self.parts.values()))
        for name, found in _shared(self.parts).items():
            setattr(self, name, next(iter(found.values()), getattr(Plain, name)))

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """The terms of each part as `part/term`, without its weight or that of the part, and the weighted sum as `loss`."""
        found = {name: part(features) for name, part in self.parts.items()}
        terms = {f"{name}/{term}": value for name, part in found.items() for term, value in part.items() if term != "loss"}
        return {**terms, "loss": sum(self.config.parts[name].weight * part["loss"] for name, part in found.items())}


def _shared(parts: Mapping[str, Objective]) -> dict[str, dict[str, Any]]:
    """Of what a run has only one of: what the parts that look at it say, by their names."""
    aligned = {part: made.alignment for part, made in parts.items() if made.needs_local}
    others = {name: {part: value for part, made in parts.items() if (value := getattr(made, name)) is not None} for name in ONE}
    return {"alignment": aligned, **others}
