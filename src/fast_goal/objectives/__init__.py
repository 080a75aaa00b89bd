"""Training objectives by name: one module of this package per objective.

A module declares itself with `@objective("name", ConfigClass)`; modules are found by name on first use. The section
`objective` of params.yaml chooses one by its key `name`; the other keys are those of its config class.

Letters: B pairs of whole image and long caption in the batch, P local pairs of them (an image may have none or several), D
embedding width; b of the B pairs are this process's own, N patches, K sub-captions of a long caption.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fast_goal.config import Params, build, number
from fast_goal.errors import ConfigError
from fast_goal.model.pooling import PoolingHead


@dataclasses.dataclass(frozen=True)
class SubCaptions:
    """What is drawn from a long caption in each epoch: `count` texts, each of 1 to `most_sentences` of its sentences (each
    number is as likely), which with the probability `consecutive` follow each other and else come from anywhere in it."""

    count: int = number(1)
    most_sentences: int = number(1)
    consecutive: float = number(0, 1)


class Shares:
    """How the rows of a batch lie with the processes that share it; of itself, one process that has all of them.

    `first`: the number, in the whole batch, of this process's first sample.
    """

    first = 0

    def rows(self, own: Tensor) -> Tensor:
        """The rows of all processes in the order of their ranks; a gradient goes back to the process whose row it is, summed
        over all that used the row."""
        return own

    def total(self, own: Tensor) -> Tensor:
        """The sum over the processes; the gradient is that of the own part."""
        return own


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
    text_negatives [N, D]: hard negative captions, `negative_rows` [N] the row of the caption that each belongs to, ascending,
    `negative_slots` [N] its number among those of that caption, from 0, below `negative_count`. May be empty.
    teacher_image, teacher_text [B, D], teacher_negatives [N, D]: the same images and texts as the teacher embeds them, without
    a gradient.
    scale: the logit scale, exponentiated, a scalar.
    patches [b, N, D], sub_queries [b, K, D]: of this process alone, the projected patches of its whole images and its projected
    sub-captions, neither of them normalised. sub_choices int64 [b, B]: which sub-caption of each image of the batch stands for
    that image where it is a negative of an own one. shares: of the processes. pooling: the model's head.
    The local ones may be None if the objective's `needs_local` is False; region and sentence, with their weights, also where
    `needs_pooled` is. text_global may be None if `needs_captions` is False. The negatives are None if `needs_negatives` is
    False, the teacher's if `teacher_decay` is None; patches, sub_queries, sub_choices and pooling if `sub_captions` is.
    """

    image_global: Tensor
    text_global: Tensor | None = None
    image_local: Tensor | None = None
    text_local: Tensor | None = None
    region: Tensor | None = None
    sentence: Tensor | None = None
    region_weight: Tensor | None = None
    sentence_weight: Tensor | None = None
    local_rows: Tensor | None = None
    local_weight: Tensor | None = None
    local_boxes: Tensor | None = None
    text_negatives: Tensor | None = None
    negative_rows: Tensor | None = None
    negative_slots: Tensor | None = None
    negative_count: int = 0
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    teacher_negatives: Tensor | None = None
    patches: Tensor | None = None
    sub_queries: Tensor | None = None
    sub_choices: Tensor | None = None
    shares: Shares = dataclasses.field(default_factory=Shares)
    pooling: PoolingHead | None = None
    scale: Tensor


def given(features: Features, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the named features that are there."""
    return {name: value for name in names if (value := getattr(features, name)) is not None}


def at_least_float32(features: Features) -> Features:
    """The features, with those of half precision as float32."""
    values = {field.name: getattr(features, field.name) for field in dataclasses.fields(features)}
    half = {
        name: v.float() for name, v in values.items() if isinstance(v, Tensor) and v.dtype in (torch.float16, torch.bfloat16)
    }
    return dataclasses.replace(features, **half)


def check_weights(weights: Mapping[str, float], terms: Sequence[str]) -> None:
    """Raises ConfigError where a config's `weights` are not one number for each of the terms, at least one of them above 0."""
    for term, weight in weights.items():
        if term not in terms:
            raise ConfigError(f"weights.{term} = {weight}: unknown term. Known here: {', '.join(terms)}.")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"weights.{term} = {weight}: expected a number, at least 0")
    for term in terms:
        if term not in weights:
            raise ConfigError(f"weights.{term} is missing; 0 leaves the term out.")
    if not any(weights.values()):
        raise ConfigError(f"weights = {dict(weights)}: at least one has to be above 0")


class Objective(Protocol):
    """A loss over the features of one batch. `Plain` has what most of them say."""

    @property
    def needs_local(self) -> bool:
        """False if the crops, the sentences and the pooled tokens are not looked at, so that nobody need compute them."""

    @property
    def needs_pooled(self) -> bool:
        """False if the regions and sentences pooled from tokens are not looked at."""

    @property
    def needs_negatives(self) -> bool:
        """Whether hard negative captions are looked at."""

    @property
    def teacher_decay(self) -> float | None:
        """The decay per step of the teacher, a moving average of the weights that begins with those the training starts from;
        None if no teacher is looked at."""

    @property
    def alignment(self) -> str:
        """How boxes become patches and sentences become spans: `exact` or `goal` (training/alignment.py)."""

    @property
    def needs_captions(self) -> bool:
        """False if whole captions are not looked at."""

    @property
    def sub_captions(self) -> SubCaptions | None:
        """What is drawn from long captions; None if neither sub-captions nor patches are looked at."""

    @property
    def heads(self) -> int | None:
        """Of the text-conditioned pooling that the model is to have; None if none is looked at."""

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """Every term by its name, without its weight, and their weighted sum as `loss`; all scalars."""


class Plain:
    """What an objective says that looks at nothing but whole images and captions."""

    needs_local = needs_pooled = needs_negatives = False
    needs_captions = True
    teacher_decay: float | None = None
    alignment = "exact"
    sub_captions: SubCaptions | None = None
    heads: int | None = None


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


def check_captions(objective: Objective, captions: str, section: str) -> None:
    """Raises ConfigError where the objective looks for sentences in captions without them. `section`: of `captions`."""
    if objective.sub_captions is not None and captions == "short":
        raise ConfigError(
            f"{section}.captions = 'short': the sub-captions of the objective are sentences of the long caption. Set "
            f"{section}.captions=long, or an objective without sub-captions, such as objective=global"
        )
    if objective.needs_pooled and captions == "short":
        raise ConfigError(
            f"{section}.captions = 'short': the TSL terms of the objective look for sentences of the long caption. Set "
            f"{section}.captions=long, or an objective without TSL, such as objective=global_local"
        )


def check_objectives(params: Params) -> None:
    """Raises ConfigError where an objective is unknown, or does not fit the training, the local pairs or the hard negatives
    it is used with."""
    stages = [("objective", params.objective, "finetune", params.finetune)]
    if params.intermediate.dataset is not None:
        first = params.intermediate
        stages.append(("intermediate.objective", first.objective, "intermediate.training", first.training))
    else:
        objective_config(params.intermediate.objective, "intermediate.objective")
    heads: dict[int, str] = {}
    for name, values, section, training in stages:
        make, config = objective_config(values, name)
        made = make(config)
        if made.heads is not None:
            heads[made.heads] = f"{name}.heads = {made.heads}"
        check_captions(made, training.captions, section)
        width = params.base.scratch.embed_dim if params.base.kind == "scratch" else None  # of others the model tells
        if made.heads is not None and width is not None and width % made.heads:
            raise ConfigError(
                f"{name}.heads = {made.heads} does not divide base.scratch.embed_dim = {width}. Set "
                f"{name}.heads={math.gcd(8, width)}, or another divisor of it"
            )
        if made.needs_local and not params.flism.splits:
            raise ConfigError(
                f"{name}.name = {values['name']!r} needs local pairs, but flism.splits = []: nothing is matched. Set "
                "flism.splits=[train], or an objective without local terms, such as objective=degla or objective=global"
            )
        if not made.needs_negatives:
            continue
        negatives = params.negatives
        if negatives.generator == "none":
            raise ConfigError(
                f"{name}.name = {values['name']!r} needs hard negative captions, but negatives.generator = 'none': add "
                "negatives=rules to `fast-goal configure`"
            )
        if negatives.captions != training.captions:
            raise ConfigError(
                f"negatives.captions = {negatives.captions!r}, but {section}.captions = {training.captions!r}: {name} needs "
                f"hard negatives of the captions that are trained on. Set negatives.captions={training.captions}"
            )
    if len(heads) > 1:
        raise ConfigError(
            f"{' and '.join(heads.values())}: the second stage goes on with the pooling of the first. Set the same for both"
        )


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
