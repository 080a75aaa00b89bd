"""Asks a captioner about many images: each content once, and nothing that is in the store already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fast_goal.config import to_dict
from fast_goal.data.captioning import Captioner, CaptionerConfig, captioner_key, load_captioner
from fast_goal.data.generation import Failure, Result
from fast_goal.data.generation.asking import ask_all
from fast_goal.data.generation.store import AnswerStore
from fast_goal.data.images import open_image
from fast_goal.errors import DataError
from fast_goal.files import digest
from fast_goal.progress import Progress

FOLDER = Path(".fast_goal/captions")


@dataclass
class Asked:
    """results: by content hash. new: how many were asked now. notes: sentences for the log."""

    results: dict[str, Result] = field(default_factory=dict)
    new: int = 0
    notes: list[str] = field(default_factory=list)

    def take(self, results: Mapping[str, Result]) -> None:
        self.results.update(results)
        self.new += len(results)


def ask_about(
    images: Mapping[str, Path], config: CaptionerConfig, prompt: str, where: str, label: str, folder: Path = FOLDER
) -> Asked:
    """The results for images by the hash of their content. Answers are kept as they come; failures are asked again by the
    next run. The model is loaded only if there is something to ask.

    Raises ModelError where the model cannot be had, and where one image after the other fails.
    """
    key = captioner_key(config, prompt)
    facts = {"model": config.model, "prompt": prompt, "prompt_digest": digest(prompt), "captioner": str(to_dict(config))}
    with AnswerStore(key, facts, folder) as store:
        asked = Asked(store.get(images))
        todo = [(content, path) for content, path in images.items() if content not in asked.results]
        if not todo:
            return asked
        captioner = load_captioner(config, prompt, where)
        try:
            with Progress(label, len(images), "images", done=len(asked.results)) as progress:
                size, parallel = captioner.batch_size, captioner.parallel
                ask = partial(_ask, captioner)
                ask_all(todo, ask, store, progress, asked.take, size, parallel, "the captioner", "images")
            asked.notes += captioner.notes()
        finally:
            captioner.close()
    return asked


def _ask(captioner: Captioner, paths: Sequence[Path]) -> list[Result]:
    """The results for some files; one that has become unreadable is a failure."""
    results: dict[int, Result] = {}
    images = []
    for index, path in enumerate(paths):
        try:
            images.append((index, open_image(path)))
        except DataError as error:
            results[index] = Failure("unreadable image", str(error))
    if images:
        answers = captioner.caption([image for _, image in images])
        results |= {index: answer for (index, _), answer in zip(images, answers, strict=True)}
    return [results[index] for index in range(len(paths))]
