"""Hard negative captions: captions that a few changed words make false.

A generator makes candidates: a class in the file of its name, registered with `@generator(name)` and made with the section
`negatives` of the settings. `choice.py` says which candidates are kept, `quality.py` checks the table, `sheet.py` shows it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fast_goal.config import NegativesConfig


@dataclass(frozen=True)
class Candidate:
    """A text that may be false where the caption is true. type: one of config.NEGATIVE_TYPES."""

    text: str
    type: str


@dataclass
class Made:
    """candidates: of each caption, the best first, more than `negatives.per_caption` where there are more. reasons: why a
    caption has none, in a few words, by its place; notes: sentences for the log."""

    candidates: list[list[Candidate]]
    reasons: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Generator(Protocol):
    """Made with the section `negatives`."""

    name: str  # for the table: the rules with their version, or the language model

    def make(self, captions: Sequence[str]) -> Made:
        """Candidates for each of the captions, which differ from each other; the same for the same caption and settings,
        whatever the others are: but the rules take their words from all of them."""
        ...


C = TypeVar("C", bound=Callable[[NegativesConfig], Generator])
_GENERATORS: dict[str, Callable[[NegativesConfig], Generator]] = {}


def generator(name: str) -> Callable[[C], C]:
    """Registers a class under the word that stands in `negatives.generator`."""

    def register(cls: C) -> C:
        _GENERATORS[name] = cls
        return cls

    return register


def load_generator(config: NegativesConfig) -> Generator:
    """The generator that `config` names. Raises ModelError for a language model that cannot be had."""
    importlib.import_module(f"{__name__}.{config.generator}")
    return _GENERATORS[config.generator](config)
