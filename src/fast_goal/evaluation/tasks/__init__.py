"""What is measured, by name: one module of this package per task; `evaluate.tasks` lists those to run.

A retrieval task is a function that makes the queries:

    @task("shuffled", "Sentences in another order", "The sentences of each long caption in random order.")
    def shuffled(study: Study) -> list[Variant]: ...

All of them are measured by `comparison.compare_retrieval`. A task of another kind is a class with the methods of `Task`. A
task that the data set gives nothing to ask raises NotAsked. A new task is a new file here and its word in
`config.EvaluateConfig.tasks`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from fast_goal.config import EvaluateConfig
from fast_goal.evaluation.comparison import MODELS, Study, Variant, compare_retrieval
from fast_goal.evaluation.features import Box, embed_images


class NotAsked(Exception):
    """The data set has nothing that the task could ask; the message names what is wanting in the split."""


@dataclass
class Needs:
    """What has to be embedded for a task, beside the images."""

    texts: list[tuple[str, int | None]] = field(default_factory=list)  # with the tokens to show; their `queries` come along
    crops: list[tuple[int, Box | None]] = field(default_factory=list)  # row of the image, whole pixels of it
    sentences: list[tuple[int, str]] = field(default_factory=list)  # row of the image whose patches they are held against
    patches: bool = False  # whether `FeatureStore.tokens` of all images are read
    patches_of: Sequence[str] = MODELS  # by which models


class Task(Protocol):
    """Measures something."""

    def needs(self, study: Study) -> Needs:
        """What it will read. Raises NotAsked."""
        ...

    def measure(self, study: Study) -> dict[str, Any]:
        """Its part of metrics.json."""
        ...


class Section(NamedTuple):
    """What the report says of a task."""

    title: str
    about: str


class _Retrieval:
    """Variants of one retrieval; several stand under their names, one that is named as the task by itself."""

    def __init__(self, name: str, variants: Callable[[Study], list[Variant]]):
        self._name, self._variants = name, variants

    def needs(self, study: Study) -> Needs:
        """See Task."""
        return Needs([(text, variant.tokens) for variant in self._variants(study) for text in variant.texts])

    def measure(self, study: Study) -> dict[str, Any]:
        """See Task."""
        found = {variant.name: compare_retrieval(study, variant) for variant in self._variants(study)}
        return found[self._name] if list(found) == [self._name] else found

    def variants(self, study: Study) -> list[Variant]:
        """What is asked. Raises NotAsked."""
        return self._variants(study)


_TASKS: dict[str, tuple[Task, Section]] = {}
T = TypeVar("T")


def task(name: str, title: str, about: str) -> Callable[[T], T]:
    """Registers a task. title: of its section in the report; about: a sentence for it, in which {config.KEY} stands for a
    setting."""

    def register(made: T) -> T:
        if name in _TASKS:
            raise ValueError(f"two tasks are named {name!r}")
        _TASKS[name] = (made() if inspect.isclass(made) else _Retrieval(name, made)), Section(title, about)
        return made

    return register


def generator(name: str, seed: int, text: str) -> np.random.Generator:
    """The random numbers of a task for one text: they depend on no other text of the data set."""
    drawn = hashlib.sha256(f"{name}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, int.from_bytes(drawn[:8], "big")])


def known_tasks() -> list[str]:
    """The names of all tasks."""
    _discover()
    return sorted(_TASKS)


def queries_of(study: Study, name: str) -> list[Variant]:
    """What the retrieval task of that name asks. Raises NotAsked."""
    _discover()
    found = _TASKS[name][0]
    assert isinstance(found, _Retrieval), name
    return found.variants(study)


def section(name: str, config: EvaluateConfig) -> Section:
    """What the report says of a task."""
    _discover()
    found = _TASKS[name][1]
    return Section(found.title, found.about.format(config=config))


def measure(study: Study, names: Sequence[str], progress: str = "evaluate") -> dict[str, Any]:
    """Runs the tasks and gives their metrics by name.

    Everything that any of them needs is embedded first, together. `images`, `independent`: the images, and their groups for
    the bootstrap. `seconds`: that each model was at work. `skipped`: the tasks that had nothing to ask, and what is wanting.
    """
    _discover()
    needs, skipped = {}, {}
    for name in names:
        try:
            needs[name] = _TASKS[name][0].needs(study)
        except NotAsked as reason:
            skipped[name] = str(reason)
    before = {model: study.stores[model].seconds for model in MODELS}
    _embed(study, list(needs.values()), progress)
    found: dict[str, Any] = {name: _TASKS[name][0].measure(study) for name in needs}
    groups = study.asked.groups
    return {
        **found,
        "images": len(groups),
        "independent": len(np.unique(groups)),
        "seconds": {model: study.stores[model].seconds - before[model] for model in MODELS},
        "skipped": skipped,
    }


def _embed(study: Study, needs: Sequence[Needs], progress: str) -> None:
    for model in MODELS:
        study.stores[model].add_texts([text for need in needs for text in need.texts], f"{progress}, {model}")
    whole = [(row, None) for row in range(len(study.asked.files))]
    crops = [crop for need in needs for crop in need.crops]
    sentences = [sentence for need in needs for sentence in need.sentences]
    read = [study.stores[model] for model in MODELS if any(need.patches and model in need.patches_of for need in needs)]
    stores = [study.stores[model] for model in MODELS]
    embed_images(stores, study.asked.files, [*whole, *crops], sentences, progress, read)


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
