"""Sentences about a scene. One set of templates serves the long and the short captions; the rich scenes have more of them,
sentences that count, and remarks that are true of every scene.

A sentence is planned first (which thing, which wording, what about its place) and worded afterwards, so that the twin of
a scene gets the same plan: its caption differs only in the words for what differs in the picture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fast_goal.data.sources.scenes.vocabulary import (
    ALL_NUMBERS,
    DIAGONALS,
    PATTERN_ENDINGS,
    POSITIONS,
    RELATIONS,
    Scene,
    Thing,
)

POSITION_SHARE, RELATION_SHARE = 0.46, 0.23  # a little above the shares wanted, as not every place can be told
SIZE_SHARE, ENDING_SHARE = 0.75, 0.3
CELL_MARGIN = 0.02  # a centre this close to a line of the 3x3 grid has no position
NEAR, APART = 0.5, 0.15  # distance of two centres in a relation: at most, and at least along the relation's axis

# {thing} takes "a red star", {Thing} the same capitalised, {place} "at the top" or "above the blue cup".
PLACED = (
    "There is {thing} {place}.",
    "{Thing} is {place}.",
    "{Thing} can be seen {place}.",
    "{Place}, there is {thing}.",
    "{Place} is {thing}.",
    "You can see {thing} {place}.",
    "{Thing} was drawn {place}.",
    "One object is {thing} {place}.",
)
UNPLACED = (
    "There is {thing} in the picture.",
    "{Thing} can be seen in the picture.",
    "In this picture, you can see {thing}.",
    "One object in the picture is {thing}.",
    "The picture shows {thing}.",
    "{Thing} is visible here.",
)
OVERALL = (
    "There are {number} objects on {background}.",
    "{Number} objects lie on {background}.",
    "The picture shows {number} objects on {background}.",
    "On {background}, {number} objects can be seen.",
    "{Background} holds {number} objects.",
)


@dataclass(frozen=True)
class Wording:
    """How scenes of a style are spoken of.

    positions: sets of words for the 3x3 grid. diagonal: whether DIAGONALS are said too. remarks: sentences that are true of
    every scene, and so tell nothing. counts: templates for how many things share a colour or a pattern. short_overall: how
    often the sentence about the whole is a short caption too, in the split pretrain.
    """

    placed: tuple[str, ...]
    unplaced: tuple[str, ...]
    overall: tuple[str, ...]
    positions: tuple[tuple[tuple[str, ...], ...], ...] = (POSITIONS,)
    diagonal: bool = False
    remarks: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    short_overall: float = 0.0


PLAIN = Wording(PLACED, UNPLACED, OVERALL)
RICH = Wording(
    placed=(
        *PLACED,
        "{Place}, you can see {thing}.",
        "{Place} lies {thing}.",
        "{Thing} was put {place}.",
        "The artist drew {thing} {place}.",
        "Somebody drew {thing} {place}.",
        "Look {place}: there is {thing}.",
        "What you see {place} is {thing}.",
        "It also has {thing} {place}.",
    ),
    unplaced=(
        *UNPLACED,
        "Among the objects is {thing}.",
        "The artist drew {thing}.",
        "Somewhere there is {thing}.",
        "It also has {thing}.",
        "One can make out {thing}.",
        "{Thing} is part of the picture.",
    ),
    overall=(
        *OVERALL,
        "This is a picture of {number} objects on {background}.",
        "Altogether {number} objects were drawn on {background}.",
        "{Background} with {number} objects on it.",
        "Behind the {number} objects is {background}.",
    ),
    positions=(
        POSITIONS,
        (
            ("at the upper left", "near the upper edge, in the centre", "at the upper right"),
            ("at the left, halfway up", "in the centre", "at the right, halfway up"),
            ("at the lower left", "near the lower edge, in the centre", "at the lower right"),
        ),
    ),
    diagonal=True,
    remarks=(
        "The objects have dark outlines.",
        "Nobody is to be seen here.",
        "The light casts no shadows.",
        "It is a drawing, not a photograph.",
        "There is no writing in it.",
        "The colours are flat.",
        "It was made with simple means.",
        "Everything in it lies still.",
    ),
    counts=(
        "{Number} of the objects are {value}.",
        "There are {number} {value} objects in it.",
        "{Number} {value} objects can be counted.",
    ),
    short_overall=0.3,
)
REMARK_SHARE, COUNT_SHARE = 0.6, 0.5  # of the long captions of a wording that has them
# Of the templates for one thing, those that stay good English with "a red star and a blue cup" in its place
_FITS_TWO = re.compile(r"(there is|see|shows|drew|has|make out) \{thing\}|\{thing\} can be", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """How one thing is described.

    `place` is None, (row, column) of the 3x3 grid, or (relation, index of the other thing). `positions` are the words for the
    grid, `diagonal` is that of the wording.
    """

    thing: int
    template: str
    say_size: bool
    pattern_last: bool
    place: tuple[int, int] | tuple[str, int] | None = None
    positions: tuple[tuple[str, ...], ...] = POSITIONS
    diagonal: bool = False


@dataclass(frozen=True)
class Count:
    """That `number` things of the scene have this `value` of the `attribute`, which is colour or pattern."""

    attribute: str
    value: str
    number: int
    template: str


@dataclass(frozen=True)
class Said:
    """A sentence of a caption: its span, and the thing it is about (None where it is about no single one)."""

    thing: int | None
    start: int
    end: int


def plan_thing(
    generator: np.random.Generator, thing: int, boxes: np.ndarray, others: list[int], wording: Wording = PLAIN
) -> Plan:
    """Draws the wording for one thing; a place only if it is true of `boxes` [N, 4], fractions of the image.

    A relation names one of `others`.
    """
    roll = generator.random()
    place: tuple[int, int] | tuple[str, int] | None = None
    if roll < POSITION_SHARE:
        place = cell(boxes[thing])
    elif roll < POSITION_SHARE + RELATION_SHARE:
        known = [(relation(boxes[thing], boxes[other], wording.diagonal), other) for other in others if other != thing]
        true = [(word, other) for word, other in known if word is not None]
        place = true[int(generator.integers(len(true)))] if true else None
    templates = wording.placed if place else wording.unplaced
    template = templates[int(generator.integers(len(templates)))]
    say_size, pattern_last = generator.random(2) < (SIZE_SHARE, ENDING_SHARE)
    # drawn only where there is a choice: the plain captions are to stay as they are
    words = wording.positions[int(generator.integers(len(wording.positions))) if len(wording.positions) > 1 else 0]
    return Plan(thing, template, bool(say_size), bool(pattern_last), place, words, wording.diagonal)


def plan_count(generator: np.random.Generator, scene: Scene, wording: Wording) -> Count | None:
    """Draws a colour or pattern that several things of the scene share; None where there is none."""
    found = [
        (attribute, value, values.count(value))
        for attribute in ("colour", "pattern")
        for values in [[getattr(thing, attribute) for thing in scene.things]]
        for value in dict.fromkeys(values)
        if value != "plain" and 2 <= values.count(value) < len(values)
    ]
    if not found:
        return None
    attribute, value, number = found[int(generator.integers(len(found)))]
    return Count(attribute, value, number, wording.counts[int(generator.integers(len(wording.counts)))])


def centre(box: np.ndarray) -> tuple[float, float]:
    """The middle of a box, (x, y)."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def cell(box: np.ndarray) -> tuple[int, int] | None:
    """Row and column of the 3x3 grid of the box's centre, None too near a line of the grid."""
    x, y = centre(box)
    near_line = any(abs(value - line) < CELL_MARGIN for value in (x, y) for line in (1 / 3, 2 / 3))
    return None if near_line else (int(3 * y), int(3 * x))


def relation(box: np.ndarray, other: np.ndarray, diagonal: bool = False) -> str | None:
    """Where `box` lies seen from `other`: one of RELATIONS, None if too far, too close or askew to say. With `diagonal` one of
    DIAGONALS where it lies nearly so, and RELATIONS only where it lies straighter than without."""
    (x, y), (other_x, other_y) = centre(box), centre(other)
    dx, dy = x - other_x, y - other_y
    if max(abs(dx), abs(dy)) < APART or np.hypot(dx, dy) > NEAR:
        return None
    return direction(dx, dy, diagonal)


def direction(dx: float, dy: float, diagonal: bool = False) -> str | None:
    """The word of `relation` for this way from the other's centre, however long it is; None where it is askew."""
    along, askew = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if diagonal and askew > 0.7 * along:
        return DIAGONALS[2 * (dy > 0) + (dx > 0)]
    if askew > (0.4 if diagonal else 0.6) * along:
        return None
    left, right, above, below = RELATIONS
    if abs(dx) > abs(dy):
        return left if dx < 0 else right
    return above if dy < 0 else below


def holds(plan: Plan, boxes: np.ndarray) -> bool:
    """Whether the place that the plan tells is true of `boxes`."""
    if plan.place is None:
        return True
    first, second = plan.place
    if isinstance(first, str):
        return relation(boxes[plan.thing], boxes[second], plan.diagonal) == first
    return cell(boxes[plan.thing]) == plan.place


def fits_two(template: str) -> bool:
    """Whether a template for one thing can take two."""
    return bool(_FITS_TWO.search(template))


def word_thing(plan: Plan, scene: Scene, also: Thing | None = None) -> str:
    """The planned sentence about this scene. `also`: a second thing to be named, where the template `fits_two`."""
    place = ""
    if plan.place is not None:
        first, second = plan.place
        place = f"{first} the {_look(scene.things[second])}" if isinstance(first, str) else plan.positions[first][second]
    thing = _noun(scene.things[plan.thing], plan)
    if also is not None:
        thing = f"{thing} and {_noun(also, plan)}"
    return plan.template.format(thing=thing, Thing=_capital(thing), place=place, Place=_capital(place))


def word_overall(template: str, scene: Scene, things: int | None = None) -> str:
    """The sentence about the whole scene: number of things (`things` where it is to say another) and background."""
    number, background = ALL_NUMBERS[things or len(scene.things)], f"a {scene.texture} {scene.background} background"
    return template.format(number=number, Number=_capital(number), background=background, Background=_capital(background))


def word_count(count: Count) -> str:
    """The sentence that counts."""
    number = ALL_NUMBERS[count.number]
    return count.template.format(number=number, Number=_capital(number), value=count.value)


def still_counts(count: Count, scene: Scene) -> bool:
    """Whether the count is true of this scene."""
    return sum(getattr(thing, count.attribute) == count.value for thing in scene.things) == count.number


def word(plan: Plan | Count | str, scene: Scene) -> str:
    """The sentence of a plan; a text is the template of an overall sentence, or a remark."""
    if isinstance(plan, Count):
        return word_count(plan)
    return word_overall(plan, scene) if isinstance(plan, str) else word_thing(plan, scene)


def long_caption(plans: list[Plan | Count | str], scene: Scene) -> tuple[str, list[Said]]:
    """The sentences in the order of the plans, and their spans."""
    said, sentences, start = [], [word(plan, scene) for plan in plans], 0
    for plan, sentence in zip(plans, sentences, strict=True):
        said.append(Said(plan.thing if isinstance(plan, Plan) else None, start, start + len(sentence)))
        start += len(sentence) + 1
    return " ".join(sentences), said


def _look(thing: Thing) -> str:
    return " ".join(thing.look)


def _noun(thing: Thing, plan: Plan) -> str:
    """Such as "a large striped red star" or "an orange cup with dots"."""
    words = [thing.size] if plan.say_size else []
    words += [thing.colour, thing.shape, PATTERN_ENDINGS[thing.pattern]] if plan.pattern_last else thing.look
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
