"""Sub-captions: what one to a few sentences of a long caption say, drawn anew in each epoch (FLAIR, section 3.2).

The sentences are those of FLISM, and their bounds lie in the same cache. What a large data set lacks there is split by
processes beside (data/splitter.py).

Letters: S sentences of a caption, K sub-captions of it.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fast_goal.cache import SplitCache
from fast_goal.data import captions as captions_module
from fast_goal.data.splitter import Splitter, split
from fast_goal.files import digest, file_digest
from fast_goal.progress import Progress

LARGE = 2000  # captions, from which cache and processes pay: some two seconds
TEXTS, CHOICES = 0, 1  # what is drawn for a sample in an epoch, each from random numbers of its own


class Sentences:
    """The sentences of captions, by the number of the caption. `cache`: a folder of bounds, for large data sets."""

    def __init__(self, captions: Sequence[str], cache: Path | None = None, keep: bool = True):
        bounds = sentence_bounds(captions, cache, keep)
        self._captions, self._first = list(captions), np.cumsum([0, *map(len, bounds)])
        self._bounds = np.concatenate([np.zeros((0, 2), np.int32), *bounds])

    @property
    def counts(self) -> np.ndarray:
        """How many sentences each caption has."""
        return np.diff(self._first)

    def __getitem__(self, index: int) -> list[str]:
        caption = self._captions[index]
        own = self._bounds[self._first[index] : self._first[index + 1]]
        return [caption[start:end] for start, end in own.tolist()]


def draw(
    sentences: Sequence[str], count: int, most_sentences: int, consecutive: float, random: np.random.Generator
) -> list[str]:
    """`count` sub-captions of one caption, its sentences joined with a blank.

    Each has 1 to `most_sentences` sentences, every number as likely; where the caption has no more than that, it is all of
    them. With the probability `consecutive` they are neighbours, every window as likely (the published code never takes the
    last one); else different ones from anywhere, in random order, as published.
    """
    made, total = [], len(sentences)
    numbers = random.integers(1, most_sentences, size=count, endpoint=True).tolist()
    for number, in_a_row in zip(numbers, (random.random(count) < consecutive).tolist(), strict=True):
        if number >= total:
            chosen = range(total)
        elif in_a_row:
            start = int(random.integers(total - number, endpoint=True))
            chosen = range(start, start + number)
        else:
            chosen = random.permutation(total)[:number].tolist()
        made.append(" ".join(sentences[place] for place in chosen))
    return made


def choices(count: int, images: int, random: np.random.Generator) -> np.ndarray:
    """int64 [images]: for each image of a batch, which of its `count` sub-captions another one is asked."""
    return random.integers(count, size=images)


def drawing(seed: int, epoch: int, sample: int, what: int) -> np.random.Generator:
    """The random numbers of a sample in an epoch, whoever draws them and whatever was drawn before. `what`: TEXTS, CHOICES."""
    return np.random.default_rng([seed, epoch, sample, what])


@functools.cache
def splitter_digest() -> str:
    """By which the cache knows this version of the splitter."""
    path = Path(captions_module.__file__)
    return digest([[f"data/{path.name}", file_digest(path)]])


def sentence_bounds(captions: Sequence[str], cache: Path | None = None, keep: bool = True) -> list[np.ndarray]:
    """Of each caption the characters at which its sentences start and end, int32 [S, 2], as `split_sentences` finds them.

    Few captions are split here; of many, those that the folder `cache` does not know are split in processes, and then kept
    there, unless `keep` is False: of several processes that want the same one is enough to write.
    """
    distinct = list(dict.fromkeys(captions))
    if len(distinct) < LARGE:
        found = dict(zip(distinct, _split(distinct), strict=True))
        return [found[caption] for caption in captions]
    store = None if cache is None else SplitCache(cache, splitter_digest())
    found = {} if store is None else store.spans(distinct)
    new = [caption for caption in distinct if caption not in found]
    made = list(zip(new, _split_beside(new, shown=keep) if len(new) >= LARGE else _split(new), strict=True))
    found |= made
    if store is not None:
        if keep:
            store.add_spans(made)
        store.store.close()
    return [found[caption] for caption in captions]


def _split(captions: Sequence[str]) -> list[np.ndarray]:
    return [found.spans for found in split(captions)]


def _split_beside(captions: Sequence[str], shown: bool) -> list[np.ndarray]:
    """As `_split`, in a process for each core that this one of several trainers has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    made: list[np.ndarray] = []
    with (
        Splitter(None, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) as splitter,
        Progress("sentences", len(captions), "captions", stream=None if shown else io.StringIO()) as line,
    ):
        for future in splitter.submit(captions):
            found = [one.spans for one in future.result()]
            made += found
            line.update(len(found))
    return made
