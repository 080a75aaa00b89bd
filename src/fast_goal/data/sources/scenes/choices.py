"""True and false captions of one scene to choose between: what the table CHOICES has of a scene.

A false caption is the true one, worded about a scene in which something is otherwise, or with another place or number. That
it is false follows from the scene, not from the words: a look (pattern, colour and shape) that it names is none of the
scene's, which are all different, or a place is not that of the one thing with this look.

What a caption says twice is changed twice, so that it does not contradict itself and cannot be told without the picture; but
who counts the sentences of a long caption finds that an added object, or another number, does not agree with the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from fast_goal.data.sources.scenes import language
from fast_goal.data.sources.scenes.language import Count, Plan, Wording
from fast_goal.data.sources.scenes.vocabulary import DIAGONALS, RELATIONS, Scene, Style, Thing

SENTENCES, CAPTIONS = "scenes_sentences", "scenes_captions"  # suites: one sentence, or a whole long caption
OPPOSITES = {
    word: words[index] for words in (RELATIONS[:2], RELATIONS[2:], DIAGONALS) for index, word in enumerate(words[::-1])
}

Place = tuple[int, int] | tuple[str, int]
_T = TypeVar("_T")


class Choice(NamedTuple):
    """A caption that is true of the scene, and one that is not."""

    suite: str
    group: str
    caption: str
    foil: str


@dataclass(frozen=True)
class _Told:
    """A scene and how it is told. boxes [N, 4]: fractions of the image; long: the plans of its long caption.

    relations: every one that is plain, as thing, word, other thing. pairs: of things, the lower index first, that with each
    other's colour both look like nothing in the scene.
    """

    scene: Scene
    boxes: np.ndarray
    long: list[Plan | Count | str]
    style: Style
    wording: Wording
    caption: str
    relations: list[tuple[int, str, int]]
    pairs: list[tuple[int, int]]

    def about(self, scene: Scene) -> str:
        """The long caption, were this the scene."""
        return language.long_caption(self.long, scene)[0]


def make_choices(
    generator: np.random.Generator,
    scene: Scene,
    boxes: np.ndarray,
    long: list[Plan | Count | str],
    style: Style,
    wording: Wording,
) -> list[Choice]:
    """One choice of each suite and group, but for those that this scene or its long caption, planned by `long`, has no case of.

    boxes [N, 4]: of the things, fractions of the image.
    """
    caption, _ = language.long_caption(long, scene)
    told = _Told(scene, boxes, long, style, wording, caption, _relations(boxes, wording.diagonal), _exchangeable(scene))
    makers = {
        SENTENCES: {
            "swap_colours": _colours_sentence,
            "swap_positions": _positions_sentence,
            "replace_shape": _shape_sentence,
            "add_object": _object_sentence,
            "count": _count_sentence,
        },
        CAPTIONS: {
            "swap_colours": _colours_caption,
            "swap_positions": _positions_caption,
            "replace_shape": _shape_caption,
            "add_object": _object_caption,
            "count": _count_caption,
        },
    }
    return [
        Choice(suite, group, *texts)
        for suite, groups in makers.items()
        for group, make in groups.items()
        if (texts := make(generator, told)) is not None
    ]


def _colours_sentence(generator: np.random.Generator, told: _Told) -> tuple[str, str] | None:
    if not told.pairs:
        return None
    related = [found for found in told.relations if (min(found[::2]), max(found[::2])) in told.pairs]
    if related:
        thing, word, other = _pick(generator, related)
        plan, changed = _plan(generator, told, thing, (word, other)), _exchanged(told.scene, thing, other)
        return language.word_thing(plan, told.scene), language.word_thing(plan, changed)
    thing, other = generator.permutation(_pick(generator, told.pairs)).tolist()
    plan, changed = _plan(generator, told, thing, None, two=True), _exchanged(told.scene, thing, other)
    return (
        language.word_thing(plan, told.scene, told.scene.things[other]),
        language.word_thing(plan, changed, changed.things[other]),
    )


def _colours_caption(generator: np.random.Generator, told: _Told) -> tuple[str, str] | None:
    if not told.pairs:
        return None
    return told.caption, told.about(_exchanged(told.scene, *_pick(generator, told.pairs)))


def _positions_sentence(generator: np.random.Generator, told: _Told) -> tuple[str, str] | None:
    """A place mirrored, a relation turned round, or the two things of a relation exchanged."""
    cells = [(thing, language.cell(box)) for thing, box in enumerate(told.boxes)]
    placed = [(thing, place) for thing, place in cells if place not in (None, (1, 1))]
    kinds = (["place"] if placed else []) + (["turned", "exchanged"] if told.relations else [])
    if not kinds:
        return None
    kind = _pick(generator, kinds)
    if kind == "place":
        thing, place = _pick(generator, placed)
        plan = _plan(generator, told, thing, place)
        false = dataclasses.replace(plan, place=_mirrored(generator, place))
    else:
        thing, word, other = _pick(generator, told.relations)
        plan = _plan(generator, told, thing, (word, other))
        false = _turned(plan) if kind == "turned" else dataclasses.replace(plan, thing=other, place=(word, thing))
    return language.word_thing(plan, told.scene), language.word_thing(false, told.scene)


def _positions_caption(generator: np.random.Generator, told: _Told) -> tuple[str, str] | None:
    """Two places exchanged, a place mirrored, or a relation turned round."""
    plans = [(index, plan) for index, plan in enumerate(told.long) if isinstance(plan, Plan) and plan.place is not None]
    related = [(index, plan) for index, plan in plans if isinstance(plan.place[0], str)]
    placed = [(index, plan) for index, plan in plans if not isinstance(plan.place[0], str)]
    pairs = [(one, two) for one in placed for two in placed if one[0] < two[0] and one[1].place != two[1].place]
    aside = [(index, plan) for index, plan in placed if plan.place != (1, 1)]
    kinds = [kind for kind, found in (("exchanged", pairs), ("mirrored", aside), ("turned", related)) if found]
    if not kinds:
        return None
    kind, long = _pick(generator, kinds), list(told.long)
    if kind == "exchanged":
        (first, one), (second, two) = _pick(generator, pairs)
        long[first] = dataclasses.replace(one, place=two.place)
        long[second] = dataclasses.replace(two, place=one.place)
    elif kind == "mirrored":
        index, plan = _pick(generator, aside)
        long[index] = dataclasses.replace(plan, place=_mirrored(generator, plan.place))
    else:
        index, plan = _pick(generator, related)
        long[index] = _turned(plan)
    return told.caption, language.long_caption(long, told.scene)[0]


def _shape_sentence(generator: np.random.Generator, told: _Told) -> tuple[str, str]:
    thing = int(generator.integers(len(told.scene.things)))
    plan = language.plan_thing(generator, thing, told.boxes, list(range(len(told.boxes))), told.wording)
    return language.word_thing(plan, told.scene), language.word_thing(plan, _reshaped(generator, told, thing))


def _shape_caption(generator: np.random.Generator, told: _Told) -> tuple[str, str]:
    thing = int(generator.integers(len(told.scene.things)))
    return told.caption, told.about(_reshaped(generator, told, thing))


def _object_sentence(generator: np.random.Generator, told: _Told) -> tuple[str, str]:
    thing = int(generator.integers(len(told.scene.things)))
    place = language.plan_thing(generator, thing, told.boxes, list(range(len(told.boxes))), told.wording).place
    plan = _plan(generator, told, thing, place, two=True)
    return language.word_thing(plan, told.scene), language.word_thing(plan, told.scene, _absent(generator, told))


def _object_caption(generator: np.random.Generator, told: _Told) -> tuple[str, str] | None:
    # "a cup with dots and a heart" could be misread
    plans = [
        plan for plan in told.long if isinstance(plan, Plan) and language.fits_two(plan.template) and not plan.pattern_last
    ]
    if not plans:
        return None
    chosen, absent = _pick(generator, plans), _absent(generator, told)
    sentences = [
        language.word_thing(chosen, told.scene, absent) if plan is chosen else language.word(plan, told.scene)
        for plan in told.long
    ]
    return told.caption, " ".join(sentences)


def _count_sentence(generator: np.random.Generator, told: _Told) -> tuple[str, str]:
    template = _pick(generator, told.wording.overall)
    number = _other_number(generator, told)
    return language.word_overall(template, told.scene), language.word_overall(template, told.scene, number)


def _count_caption(generator: np.random.Generator, told: _Told) -> tuple[str, str]:
    number = _other_number(generator, told)
    sentences = [
        language.word_overall(plan, told.scene, number)
        if isinstance(plan, str) and plan in told.wording.overall
        else language.word(plan, told.scene)
        for plan in told.long
    ]
    return told.caption, " ".join(sentences)


def _relations(boxes: np.ndarray, diagonal: bool) -> list[tuple[int, str, int]]:
    found = []
    for thing, box in enumerate(boxes):
        for other in range(thing):
            word = language.relation(box, boxes[other], diagonal)
            if word is not None:
                found += [(thing, word, other), (other, OPPOSITES[word], thing)]
    return found


def _exchangeable(scene: Scene) -> list[tuple[int, int]]:
    looks = {thing.look for thing in scene.things}
    found = []
    for second, two in enumerate(scene.things):
        for first, one in enumerate(scene.things[:second]):
            new = (one.pattern, two.colour, one.shape), (two.pattern, one.colour, two.shape)
            if looks.isdisjoint(new):
                found.append((first, second))
    return found


def _exchanged(scene: Scene, first: int, second: int) -> Scene:
    """The scene with the colours of two things exchanged."""
    things = list(scene.things)
    one, two = things[first], things[second]
    things[first] = dataclasses.replace(one, colour=two.colour)
    things[second] = dataclasses.replace(two, colour=one.colour)
    return dataclasses.replace(scene, things=tuple(things))


def _reshaped(generator: np.random.Generator, told: _Told, thing: int) -> Scene:
    """The scene with another shape for a thing, such that nothing in the scene looks like it."""
    things, looks = list(told.scene.things), {other.look for other in told.scene.things}
    candidates = [dataclasses.replace(things[thing], shape=shape) for shape in told.style.shapes]
    things[thing] = _pick(generator, [candidate for candidate in candidates if candidate.look not in looks])
    return dataclasses.replace(told.scene, things=tuple(things))


def _absent(generator: np.random.Generator, told: _Told) -> Thing:
    """A thing that the scene could have and has not."""
    colours = [colour for colour in told.style.colours if colour != told.scene.background]
    looks = {thing.look for thing in told.scene.things}
    while True:
        thing = dataclasses.replace(
            told.scene.things[0],
            shape=_pick(generator, told.style.shapes),
            colour=_pick(generator, colours),
            pattern=_pick(generator, told.style.patterns),
            size=_pick(generator, tuple(told.style.sizes)),
        )
        if thing.look not in looks:
            return thing


def _other_number(generator: np.random.Generator, told: _Told) -> int:
    return _pick(generator, [number for number in told.style.numbers if number != len(told.scene.things)])


def _plan(generator: np.random.Generator, told: _Told, thing: int, place: Place | None, two: bool = False) -> Plan:
    """A plan with this place; with `two`, one that a second thing fits into."""
    templates = told.wording.placed if place else told.wording.unplaced
    template = _pick(generator, [text for text in templates if language.fits_two(text)] if two else templates)
    say_size, pattern_last = generator.random(2) < (language.SIZE_SHARE, 0 if two else language.ENDING_SHARE)
    words = _pick(generator, told.wording.positions)
    return Plan(thing, template, bool(say_size), bool(pattern_last), place, words, told.wording.diagonal)


def _mirrored(generator: np.random.Generator, place: tuple[int, int]) -> tuple[int, int]:
    """Left for right or top for bottom; the middle of the grid has neither."""
    row, column = place
    return _pick(generator, [new for new in ((row, 2 - column), (2 - row, column)) if new != place])


def _turned(plan: Plan) -> Plan:
    word, other = plan.place
    return dataclasses.replace(plan, place=(OPPOSITES[word], other))


def _pick(generator: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(generator.integers(len(options)))]
