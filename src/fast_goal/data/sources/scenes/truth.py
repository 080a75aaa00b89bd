"""Reads captions in the language of the scenes and says whether they are false of a picture.

The grammar is made of the templates and words that the captions are made of (`language`, `vocabulary`). Words for places mean
what they mean there: "at the top of the picture" is not "in the top left corner". What those do not say because it is
doubtful (a centre near a line of the grid, things askew or far apart) is neither true nor false here.

It also reads what the captions do not say but changed ones do: adjectives in another order or left out, "the" for "a", words
of the background for an object and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from fast_goal.data.records import Dataset
from fast_goal.data.sources.scenes.language import APART, CELL_MARGIN, NEAR, cell, centre, direction
from fast_goal.data.sources.scenes.samples import STYLES
from fast_goal.data.sources.scenes.vocabulary import ALL_NUMBERS, DIAGONALS, PATTERN_ENDINGS, RELATIONS
from fast_goal.errors import DataError

_SENTENCE_END = re.compile(r"(?<=\.)\s+")
_TWO = "{thing} and {thing}"
# The signs of dx and dy that a word for a relation asks for
_SIGNS: dict[str, tuple[int, int]] = dict(zip(RELATIONS, ((-1, 0), (1, 0), (0, -1), (0, 1)), strict=True)) | dict(
    zip(DIAGONALS, ((-1, -1), (1, -1), (-1, 1), (1, 1)), strict=True)
)


class _Noun(NamedTuple):
    """What is said of an object; None where nothing is."""

    label: str
    colour: str | None
    pattern: str | None
    size: str | None


class _Things(NamedTuple):
    """That there are such objects at this place: (row, column) of the grid, or a relation to such an object."""

    nouns: tuple[_Noun, ...]
    place: tuple[int, int] | tuple[str, _Noun] | None


class _Whole(NamedTuple):
    """That there are so many objects, on such a background."""

    number: int
    texture: str | None
    colour: str | None


class _Count(NamedTuple):
    """That so many objects have this colour, pattern or size."""

    number: int
    value: str


class _Remark(NamedTuple):
    """What is true of every scene."""


_Claim = _Things | _Whole | _Count | _Remark


@dataclass
class _Picture:
    """objects: as rows of OBJECTS; boxes [N, 4]: fractions of the image; background: where it is known."""

    objects: list[Any]
    boxes: np.ndarray
    background: _Whole | None


def falsehoods(captions: Sequence[str], image_ids: Sequence[str], dataset: Dataset) -> list[bool | None]:
    """For each caption whether it is false of the image with the id beside it.

    True: one of its sentences is false. None: none is, but one is no sentence of the language, or cannot be judged; so is
    every caption of a close-up, whose other objects the table OBJECTS does not have. The background is that which the image's
    own captions tell. Raises DataError for a data set that is no scenes or does not have the image.
    """
    if dataset.source not in STYLES or dataset.objects is None:
        raise DataError(
            f"data set {dataset.name}: its source {dataset.source!r} knows no truth about sentences; "
            f"those that do are {', '.join(STYLES)}"
        )
    grammar, pictures = _grammar(dataset.source), _pictures(dataset, set(image_ids))
    found: list[bool | None] = []
    for caption, image_id in zip(captions, image_ids, strict=True):
        picture = pictures[image_id]
        if picture is None:
            found.append(None)
            continue
        true = _all(
            None if claim is None else _is_true(claim, picture, grammar.diagonal)
            for claim in map(grammar.read, _SENTENCE_END.split(caption.strip()))
        )
        found.append(None if true is None else not true)
    return found


class _Grammar:
    """The language of a style; `read` is the inverse of `language.word`."""

    def __init__(self, source: str) -> None:
        style, wording = STYLES[source]
        self.diagonal = wording.diagonal
        # of objects and of backgrounds: a changed caption may exchange them
        colours, patterns = {*style.colours, *style.backgrounds}, {*style.patterns, *style.textures}
        self._kinds = dict.fromkeys(colours, "colour") | dict.fromkeys(patterns, "pattern") | dict.fromkeys(style.sizes, "size")
        self._endings = {ending: pattern for pattern, ending in PATTERN_ENDINGS.items() if pattern in style.patterns}
        self._cells = {
            words: (row, column)
            for grid in wording.positions
            for row, line in enumerate(grid)
            for column, words in enumerate(line)
        }
        relations = RELATIONS + DIAGONALS if wording.diagonal else RELATIONS
        noun = (
            rf"(?:an?|the) (?P<adjectives>(?:{_any(self._kinds)} )*)(?P<label>{_any(style.shapes)})"
            rf"(?: (?P<ending>{_any(self._endings)}))?"
        )
        self._parts = re.compile(rf"\b(?:(?P<cell>{_any(self._cells)})|(?:(?P<relation>{_any(relations)}) )?{noun})\b")
        self._things = {template.lower() for template in wording.placed + wording.unplaced}
        words = {
            "number": rf"(?P<number>{_any(ALL_NUMBERS.values())})",
            "value": rf"(?P<value>{_any(self._kinds)})",
            "background": rf"an? (?P<background>(?:{_any(colours | patterns)} )+)background",
        }
        templates = [re.escape(template.lower()) for template in wording.overall + wording.counts]
        for name, pattern in words.items():
            templates = [template.replace(rf"\{{{name}\}}", pattern) for template in templates]
        self._wholes = [re.compile(template) for template in templates]
        self._remarks = {remark.lower() for remark in wording.remarks}
        self._numbers = {word: number for number, word in ALL_NUMBERS.items()}
        self.read = lru_cache(maxsize=200_000)(self._read)  # changed captions keep most of their sentences

    def _read(self, sentence: str) -> _Claim | None:
        """What a sentence says; None where it is none of the language."""
        text = sentence.lower()
        if text in self._remarks:
            return _Remark()
        things: list[_Noun | None] = []
        places: list[Any] = []

        def part(match: re.Match[str]) -> str:
            if match["cell"]:
                places.append(self._cells[match["cell"]])
                return "{place}"
            noun = self._noun(match)
            if match["relation"]:
                places.append(noun and (match["relation"], noun))
                return "{place}"
            things.append(noun)
            return "{thing}"

        blank = self._parts.sub(part, text).replace(_TWO, "{thing}")
        if blank in self._things:
            return None if None in things or None in places else _Things(tuple(filter(None, things)), *(places or [None]))
        return next((self._whole(match) for whole in self._wholes if (match := whole.fullmatch(text))), None)

    def _noun(self, match: re.Match[str]) -> _Noun | None:
        said = self._adjectives(match["adjectives"])
        if said is None or (match["ending"] and "pattern" in said):
            return None
        pattern = self._endings[match["ending"]] if match["ending"] else said.get("pattern")
        return _Noun(match["label"], said.get("colour"), pattern, said.get("size"))

    def _whole(self, match: re.Match[str]) -> _Claim | None:
        number, said = self._numbers[match["number"]], match.groupdict()
        if "value" in said:
            return _Count(number, said["value"])
        adjectives = self._adjectives(said["background"])
        return None if adjectives is None else _Whole(number, adjectives.get("pattern"), adjectives.get("colour"))

    def _adjectives(self, text: str) -> dict[str, str] | None:
        """By kind; None for two of a kind."""
        words = text.split()
        said = {self._kinds[word]: word for word in words}
        return said if len(said) == len(words) else None


_grammar = cache(_Grammar)


def _pictures(dataset: Dataset, image_ids: set[str]) -> dict[str, _Picture | None]:
    """The images by id; None for close-ups."""
    style, _ = STYLES[dataset.source]
    grammar = _grammar(dataset.source)
    objects: dict[str, list[Any]] = {}
    for row in dataset.objects[dataset.objects["image_id"].isin(image_ids)].itertuples():
        objects.setdefault(row.image_id, []).append(row)
    pictures: dict[str, _Picture | None] = {}
    for record in dataset.records[dataset.records["image_id"].isin(image_ids)].itertuples():
        rows = objects.get(record.image_id, [])
        if len(rows) < min(style.numbers):
            pictures[record.image_id] = None
            continue
        boxes = np.array([(row.x1, row.y1, row.x2, row.y2) for row in rows])
        texts = [record.long_caption, *record.captions]
        claims = [grammar.read(sentence) for text in texts for sentence in _SENTENCE_END.split(text)]
        background = next((claim for claim in claims if isinstance(claim, _Whole)), None)
        pictures[record.image_id] = _Picture(rows, boxes / ([record.width, record.height] * 2), background)
    if missing := sorted(image_ids - pictures.keys()):
        raise DataError(f"data set {dataset.name}: there is no image {missing[0]!r} ({len(missing)} such ids)")
    return pictures


def _is_true(claim: _Claim, picture: _Picture, diagonal: bool) -> bool | None:
    match claim:
        case _Remark():
            return True
        case _Count(number, value):
            return sum(value in (row.colour, row.pattern, row.size) for row in picture.objects) == number
        case _Whole(number, texture, colour):
            known = picture.background
            said = [
                None if known is None else word == told
                for word, told in ((texture, known and known.texture), (colour, known and known.colour))
                if word is not None
            ]
            return _all([number == len(picture.objects), *said])
        case _Things(nouns, place):
            return _all(_any_true(_lies(thing, place, picture, diagonal) for thing in _such(noun, picture)) for noun in nouns)


def _such(noun: _Noun, picture: _Picture) -> list[int]:
    """The objects that a noun fits."""
    return [
        index
        for index, row in enumerate(picture.objects)
        if row.label == noun.label
        and noun.colour in (None, row.colour)
        and noun.pattern in (None, row.pattern)
        and noun.size in (None, row.size)
    ]


def _lies(thing: int, place: Any, picture: _Picture, diagonal: bool) -> bool | None:
    """Whether an object lies at a place of a claim."""
    if place is None:
        return True
    first, second = place
    if not isinstance(first, str):
        return _in_cell(picture.boxes[thing], place)
    others = [other for other in _such(second, picture) if other != thing]
    return _any_true(_related(picture.boxes[thing], picture.boxes[other], first, diagonal) for other in others)


def _in_cell(box: np.ndarray, place: tuple[int, int]) -> bool | None:
    if (found := cell(box)) is not None:
        return found == place
    x, y = centre(box)
    near = [{int(3 * (value + shift)) for shift in (-CELL_MARGIN, CELL_MARGIN)} for value in (y, x)]
    return None if all(index in indices for index, indices in zip(place, near, strict=True)) else False


def _related(box: np.ndarray, other: np.ndarray, word: str, diagonal: bool) -> bool | None:
    (x, y), (other_x, other_y) = centre(box), centre(other)
    dx, dy = x - other_x, y - other_y
    if max(abs(dx), abs(dy)) < APART:
        return None
    found = direction(dx, dy, diagonal)
    if found is None:  # between two words
        return False if any(sign and sign * shift <= 0 for sign, shift in zip(_SIGNS[word], (dx, dy), strict=True)) else None
    if found != word:
        return False
    return True if np.hypot(dx, dy) <= NEAR else None


def _all(values: Iterable[bool | None]) -> bool | None:
    """False if one is, else None if one is."""
    values = list(values)
    return False if False in values else None if None in values else True


def _any_true(values: Iterable[bool | None]) -> bool | None:
    """True if one is, else None if one is."""
    values = list(values)
    return True if True in values else None if None in values else False


def _any(words: Iterable[str]) -> str:
    """A regular expression for one of the words, the longest that fits."""
    return f"(?:{'|'.join(map(re.escape, sorted(words, key=lambda word: (-len(word), word))))})"
