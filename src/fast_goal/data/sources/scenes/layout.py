"""Random scenes: what is in them, where it lies, and the near-duplicates that differ in one attribute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fast_goal.data.sources.scenes.drawing import Drawing, draw
from fast_goal.data.sources.scenes.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    PATTERNS,
    RGB,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
)

MIN_VISIBLE = 0.6  # share of an object's area; below it the pattern of a small object is lost
JITTER = 0.085  # of an object's centre around the centre of its grid cell
FILL = (0.4, 0.95)  # of a close-up's side, the extent of its subject
CONTRASTS = {"colour": tuple(COLOURS), "shape": SHAPES, "pattern": PATTERNS}


def random_scene(generator: np.random.Generator, image_size: int) -> tuple[Scene, Drawing]:
    """Four to six things on a loose 3x3 grid; they overlap a little, the smaller ones in front.

    No two things look the same (pattern, colour and shape), none has the background's colour, and of each at least
    MIN_VISIBLE can be seen; a random scene that breaks this is thrown away and the next one tried.
    """
    count = int(generator.choice(list(NUMBERS)))
    while True:
        scene = _background(generator)
        things = []
        for cell in generator.permutation(9)[:count]:
            size = _pick(generator, tuple(SIZES))
            extent = generator.uniform(*SIZES[size])
            centre = (np.array([cell % 3, cell // 3]) + 0.5) / 3 + generator.uniform(-JITTER, JITTER, 2)
            x, y = np.clip(centre, 0.53 * extent, 1 - 0.53 * extent)
            things.append(_thing(generator, scene.background, size, extent, float(x), float(y)))
        things.sort(key=lambda thing: -thing.extent)
        scene = dataclasses.replace(scene, things=tuple(things))
        if len({thing.look for thing in things}) == count:
            drawing = draw(scene, image_size)
            if drawing.visible.min() >= MIN_VISIBLE:
                return scene, drawing


def random_close_up(generator: np.random.Generator, scene: Scene, thing: int, image_size: int) -> tuple[Scene, Drawing]:
    """A detail of `scene`, drawn sharp: one of its things fills a good part of the image, others may show at the edges."""
    focus = scene.things[thing]
    fill = float(np.exp(generator.uniform(*np.log(FILL))))
    factor = fill / focus.extent
    x, y = 0.5 + generator.uniform(-0.5, 0.5, 2) * (1 - fill)
    things = tuple(
        dataclasses.replace(
            other,
            x=float(x + (other.x - focus.x) * factor),
            y=float(y + (other.y - focus.y) * factor),
            extent=other.extent * factor,
        )
        for other in scene.things
    )
    detail = dataclasses.replace(scene, zoom=scene.zoom * factor, things=things)
    return detail, draw(detail, image_size)


def twins(generator: np.random.Generator, scene: Scene, image_size: int) -> Iterator[tuple[Scene, Drawing]]:
    """The scenes that differ from `scene` in the colour, the shape or the pattern of one thing, in random order.

    The attribute is drawn first, so that each is as frequent as the others; only scenes that keep the promises of
    `random_scene` are given.
    """
    looks = {thing.look for thing in scene.things}
    for attribute in generator.permutation(list(CONTRASTS)).tolist():
        changes = [(index, value) for index in range(len(scene.things)) for value in CONTRASTS[attribute]]
        for choice in generator.permutation(len(changes)):
            index, value = changes[choice]
            changed = dataclasses.replace(scene.things[index], **{attribute: value})
            if changed.look in looks or changed.colour == scene.background:
                continue
            twin = dataclasses.replace(scene, things=(*scene.things[:index], changed, *scene.things[index + 1 :]))
            drawing = draw(twin, image_size)
            if drawing.visible.min() >= MIN_VISIBLE:
                yield twin, drawing


def _pick(generator: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(generator.integers(len(options)))]


def _tint(generator: np.random.Generator, most: int) -> RGB:
    red, green, blue = generator.integers(-most, most + 1, 3).tolist()
    return red, green, blue


def _background(generator: np.random.Generator) -> Scene:
    background, texture = _pick(generator, tuple(BACKGROUNDS)), _pick(generator, TEXTURES)
    x, y = generator.uniform(0, 1, 2).tolist()
    return Scene(background, texture, _tint(generator, 5), (x, y), 1.0, ())


def _thing(generator: np.random.Generator, background: str, size: str, extent: float, x: float, y: float) -> Thing:
    return Thing(
        shape=_pick(generator, SHAPES),
        colour=_pick(generator, tuple(colour for colour in COLOURS if colour != background)),
        pattern=_pick(generator, PATTERNS),
        size=size,
        x=x,
        y=y,
        extent=float(extent),
        angle=float(generator.uniform(-15, 15)),
        pattern_angle=float(generator.uniform(0, 180)),
        tint=_tint(generator, 10),
    )
