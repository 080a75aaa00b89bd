"""Random scenes: what is in them, where it lies, and the near-duplicates that differ in one attribute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fast_goal.data.sources.scenes.drawing import Drawing, draw
from fast_goal.data.sources.scenes.vocabulary import PLAIN, RGB, Scene, Style, Thing

MIN_VISIBLE = 0.6  # share of an object's area; below it the pattern of a small object is lost
FILL = (0.4, 0.95)  # of a close-up's side, the extent of its subject


def random_scene(generator: np.random.Generator, image_size: int, style: Style = PLAIN) -> tuple[Scene, Drawing]:
    """Some things on a loose grid; they overlap a little, the smaller ones in front.

    No two things look the same (pattern, colour and shape), none has the background's colour, and of each at least
    MIN_VISIBLE can be seen; a random scene that breaks this is thrown away and the next one tried.
    """
    count = int(generator.choice(list(style.numbers)))
    while True:
        scene = _background(generator, style)
        things = []
        for cell in generator.permutation(style.grid**2)[:count]:
            size = _pick(generator, tuple(style.sizes))
            extent = generator.uniform(*style.sizes[size])
            place = (np.array([cell % style.grid, cell // style.grid]) + 0.5) / style.grid
            centre = place + generator.uniform(-style.jitter, style.jitter, 2)
            x, y = np.clip(centre, 0.53 * extent, 1 - 0.53 * extent)
            things.append(_thing(generator, style, scene.background, size, extent, float(x), float(y)))
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


def twins(
    generator: np.random.Generator, scene: Scene, image_size: int, style: Style = PLAIN
) -> Iterator[tuple[Scene, Drawing]]:
    """The scenes that differ from `scene` in the colour, the shape or the pattern of one thing, in random order.

    The attribute is drawn first, so that each is as frequent as the others; only scenes that keep the promises of
    `random_scene` are given.
    """
    looks = {thing.look for thing in scene.things}
    for attribute in generator.permutation(list(style.contrasts)).tolist():
        changes = [(index, value) for index in range(len(scene.things)) for value in style.contrasts[attribute]]
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


def _background(generator: np.random.Generator, style: Style) -> Scene:
    background, texture = _pick(generator, style.backgrounds), _pick(generator, style.textures)
    x, y = generator.uniform(0, 1, 2).tolist()
    return Scene(background, texture, _tint(generator, 5), (x, y), 1.0, ())


def _thing(
    generator: np.random.Generator, style: Style, background: str, size: str, extent: float, x: float, y: float
) -> Thing:
    return Thing(
        shape=_pick(generator, style.shapes),
        colour=_pick(generator, tuple(colour for colour in style.colours if colour != background)),
        pattern=_pick(generator, style.patterns),
        size=size,
        x=x,
        y=y,
        extent=float(extent),
        angle=float(generator.uniform(-15, 15)),
        pattern_angle=float(generator.uniform(0, 180)),
        tint=_tint(generator, 10),
    )
