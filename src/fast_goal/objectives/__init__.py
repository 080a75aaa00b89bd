"""Training objectives by name: one module of this package per objective.

A module declares itself with `@objective("name", ConfigClass)`; modules are found by name on first use. The section
`objective` of params.yaml chooses one by its key `name`; the other keys are those of its config class.

Letters: B pairs of whole image and long caption in the batch, P local pairs of them (an image may have none or several), D
embedding width.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fast_goal.config import build
from fast_goal.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """What one batch gives an objective. Every feature row is L2-normalised.

    image_global, text_global [B, D]: whole images and long captions.
    image_local, text_local [P, D]: region crops and sentences, encoded by themselves.
    region, sentence [P, D]: the same region and sentence pooled from the tokens of their whole image and long caption.
    region_weight, sentence_weight [P]: 0 where nothing of the region or sentence is visible there, else 1.
    local_rows [P]: the row of the whole image that a local pair belongs to; None: every pair has an image of its own.
    local_weight [P]: how much a pair counts, those of one image together 1; None: every pair counts 1.
    local_boxes [P, 4]: the regions, in pixels of their original image.
    scale: the logit scale, exponentiated, a scalar.
    The local ones may be None if the objective's `needs_local` is False; region and sentence, with their weights, also where
    `needs_pooled` is.
    """

    image_global: Tensor
    text_global: Tensor
    image_local: Tensor | None = None
    text_local: Tensor | None = None
    region: Tensor | None = None
    sentence: Tensor | None = None
    region_weight: Tensor | None = None
    sentence_weight: Tensor | None = None
    local_rows: Tensor | None = None
    local_weight: Tensor | None = None
    local_boxes: Tensor | None = None
    scale: Tensor


def given(features: Features, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the named features that are there."""
    return {name: value for name in names if (value := getattr(features, name)) is not None}


class Objective(Protocol):
    """A loss over the features of one batch."""

    @property
    def needs_local(self) -> bool:
        """False if the crops, the sentences and the pooled tokens are not looked at, so that nobody need compute them."""

    @property
    def needs_pooled(self) -> bool:
        """False if the regions and sentences pooled from tokens are not looked at."""

    @property
    def alignment(self) -> str:
        """How boxes become patches and sentences become spans: `exact` or `goal` (training/alignment.py)."""

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """Every term by its name, without its weight, and their weighted sum as `loss`; all scalars."""


_OBJECTIVES: dict[str, tuple[Callable[[Any], Objective], type]] = {}
T = TypeVar("T")


def objective(name: str, config_class: type) -> Callable[[T], T]:
    """Registers an objective: a class, or function, that takes its config and gives an Objective."""

    def register(make: T) -> T:
        if name in _OBJECTIVES:
            raise ValueError(f"two objectives are named {name!r}")
        _OBJECTIVES[name] = (make, config_class)
        return make

    return register


def objective_config(values: Mapping[str, Any], where: str = "objective") -> tuple[Callable[[Any], Objective], Any]:
    """The registered maker and its typed config. Raises ConfigError, which names the key below `where`."""
    _discover()
    if not isinstance(values, Mapping) or "name" not in values:
        raise ConfigError(f"missing key {where}.name. Known objectives: {', '.join(sorted(_OBJECTIVES))}.")
    rest = dict(values)
    name = rest.pop("name")
    if name not in _OBJECTIVES:
        raise ConfigError(f"{where}.name = {name!r}: expected one of {', '.join(sorted(_OBJECTIVES))}")
    make, config_class = _OBJECTIVES[name]
    return make, build(config_class, rest, where)


def make_objective(values: Mapping[str, Any]) -> Objective:
    """The objective of the section `objective` of params.yaml."""
    make, config = objective_config(values)
    return make(config)


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
