"""Several objectives in one run: the sum of their losses, each with a weight, as in `objective=fast_goal_degla`."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from torch import Tensor

from fast_goal.errors import ConfigError
from fast_goal.objectives import Features, Objective, SubCaptions, objective, objective_config

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
        alignments = {name: part.alignment for name, part in made.items() if part.needs_local}
        decays = {name: part.teacher_decay for name, part in made.items() if part.teacher_decay is not None}
        drawn = {name: part.sub_captions for name, part in made.items() if part.sub_captions is not None}
        heads = {name: part.heads for name, part in made.items() if part.heads is not None}
        every = ("alignment", alignments), ("teacher_decay", decays), ("sub_captions", drawn), ("heads", heads)
        for word, found in every:
            if len(set(found.values())) > 1:
                told = ", ".join(f"{value} in {name}" for name, value in found.items())
                raise ConfigError(f"parts: {word} is {told}; set it to the same in all")

    def make(self) -> dict[str, Objective]:
        """The objectives with a weight, by name."""
        return {name: part.make() for name, part in self.parts.items() if part.weight}


@objective("weighted", WeightedConfig)
class Weighted:
    """The weighted sum of the losses of the parts. Needs what any of them needs."""

    def __init__(self, config: WeightedConfig):
        self.config = config
        self.parts = config.make()

    @property
    def needs_local(self) -> bool:
        """Whether a part looks at local pairs."""
        return any(part.needs_local for part in self.parts.values())

    @property
    def needs_pooled(self) -> bool:
        """Whether a part looks at pooled tokens."""
        return any(part.needs_pooled for part in self.parts.values())

    @property
    def needs_negatives(self) -> bool:
        """Whether a part looks at hard negative captions."""
        return any(part.needs_negatives for part in self.parts.values())

    @property
    def teacher_decay(self) -> float | None:
        """That of the parts with a teacher, which they share."""
        return next((part.teacher_decay for part in self.parts.values() if part.teacher_decay is not None), None)

    @property
    def alignment(self) -> str:
        """That of the parts that look at local pairs."""
        return next((part.alignment for part in self.parts.values() if part.needs_local), "exact")

    @property
    def needs_captions(self) -> bool:
        """Whether a part looks at whole captions."""
        return any(part.needs_captions for part in self.parts.values())

    @property
    def sub_captions(self) -> SubCaptions | None:
        """Those of the parts that look at any, which they share."""
        return next((part.sub_captions for part in self.parts.values() if part.sub_captions is not None), None)

    @property
    def heads(self) -> int | None:
        """Those of the parts with a pooling, which they share."""
        return next((part.heads for part in self.parts.values() if part.heads is not None), None)

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """The terms of each part as `part/term`, without its weight or that of the part, and the weighted sum as `loss`."""
        found = {name: part(features) for name, part in self.parts.items()}
        terms = {f"{name}/{term}": value for name, part in found.items() for term, value in part.items() if term != "loss"}
        return {**terms, "loss": sum(self.config.parts[name].weight * part["loss"] for name, part in found.items())}
