"""Where data sets come from: a registry with one file or package per source.

A source is a function with a config dataclass:

    @source("folder", FolderConfig)
    def load(config: FolderConfig, name: str, folder: Path) -> Loaded: ...

`name` is the data set's name, `folder` (`data/datasets/<name>`) is the source's own to write in. A source that
draws lots has a `seed` of its own: the data stay the same when the run's `seed`, that of training, changes.
A new one is a new file here and a new file in `conf/dataset/`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_goal.config import build
from fast_goal.errors import ConfigError


@dataclass
class Loaded:
    """What a source hands over: rows of the tables RECORDS, SKIPPED, TRUTH, OBJECTS, CHOICES, LABELS and MASKS of
    `data.records`.

    `root` is the folder that `image_path` is relative to; `notes` are sentences for the reader of the log; `hashes` are
    rows of HASHES, None where the images were not decoded; `published` counts the samples of the publication's own
    splits, under its own names, before anything is left out; `classes`, `segments`: see `data.records.Dataset`.
    """

    root: Path
    rows: list[dict[str, Any]]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    truth: list[dict[str, Any]] | None = None
    objects: list[dict[str, Any]] | None = None
    notes: list[str] = field(default_factory=list)
    hashes: list[dict[str, Any]] | None = None
    published: dict[str, int] = field(default_factory=dict)
    choices: list[dict[str, Any]] | None = None
    labels: list[dict[str, Any]] | None = None
    classes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    masks: list[dict[str, Any]] | None = None
    segments: dict[str, dict[str, list[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What is published about a data set, for the step `validate` to hold against it. null: nothing is known.

    counts: samples per split, under the publication's own names. mean_words: of the long captions. captions: short ones
    per image. pairs: local pairs per image.
    """

    counts: dict[str, int]
    mean_words: float | None
    captions: int | None
    pairs: int | None


Load = Callable[[Any, str, Path], Loaded]
_SOURCES: dict[str, tuple[Load, type]] = {}


def source(name: str, config: type) -> Callable[[Load], Load]:
    """Registers a source under the word that stands in `download.datasets.<name>.source`."""

    def register(load: Load) -> Load:
        _SOURCES[name] = (load, config)
        return load

    return register


def known_sources() -> list[str]:
    """The names of all sources."""
    _discover()
    return sorted(_SOURCES)


def source_config(values: Mapping[str, Any], where: str) -> tuple[Load, Any]:
    """The load function and the typed config of a data set's section.

    `where` is the section's full name, `download.datasets.<name>`. Raises ConfigError for an unknown source and for
    keys that the source's config refuses.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {values!r}")
    _discover()
    rest = dict(values)
    rest.pop("facts", None)
    name = rest.pop("source", None)
    if not isinstance(name, str) or name not in _SOURCES:
        raise ConfigError(f"{where}.source = {name!r}: expected one of {', '.join(sorted(_SOURCES))}")
    load, config = _SOURCES[name]
    return load, build(config, rest, where)


def source_facts(values: Mapping[str, Any], where: str) -> Facts | None:
    """The optional section `facts` of a data set. Raises ConfigError for what is no fact."""
    facts = values.get("facts")
    return None if facts is None else build(Facts, facts, f"{where}.facts")


def _discover() -> None:
    """Imports every module of this package, on first use and not on import."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
