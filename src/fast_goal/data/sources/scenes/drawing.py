"""A scene as pixels: flat colours with a dark outline, drawn twice as large and averaged down.

Drawing also yields the boxes of what is visible, so that they cannot disagree with the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from fast_goal.data.sources.scenes.shapes import parts
from fast_goal.data.sources.scenes.vocabulary import BACKGROUNDS, COLOURS, MORE_BACKGROUNDS, MORE_COLOURS, RGB, Scene, Thing

SUPERSAMPLING = 2
INK: RGB = (24, 24, 24)
# Stripes and dots are white but where that would hardly be seen; black on white and white on black would look alike.
MARK: RGB = (252, 252, 248)
OTHER_MARKS: dict[str, RGB] = {"white": (135, 135, 135), "black": (170, 170, 170)} | dict.fromkeys(
    ("yellow", "pink", "cyan", "lime"), (64, 64, 64)
)
_COLOURS = COLOURS | MORE_COLOURS
_BACKGROUNDS = BACKGROUNDS | MORE_BACKGROUNDS

# Fractions of the image's side at zoom 1. A stripe is then 2 pixels wide at 96 pixels: the smallest that is still seen.
STROKE = 0.011
PATTERN_PERIOD = 0.046
TEXTURE_PERIOD = 0.11

# Codes of the canvas on which one object is drawn
_NOTHING, _FILL, _INK = 0, 1, 2


@dataclass(frozen=True)
class Drawing:
    """The image, and for each thing the pixel box of its visible part (x2/y2 exclusive) and the visible share of its area.

    `owners` tells which thing each pixel shows.
    """

    image: Image.Image
    boxes: np.ndarray  # [N, 4], whole numbers as float; zeros where nothing is visible
    visible: np.ndarray  # [N], fraction of the thing's area, parts beyond the image's edge counted as hidden
    points: np.ndarray | None = None  # uint8 [2 S, 2 S], before it is averaged down: the thing's number from 1, 0: background

    def owners(self) -> np.ndarray:
        """uint8 [S, S]: the number of the thing, from 1, that each pixel shows, or 0 for the background.

        A pixel is averaged of several points; it shows what most of them do, and of those with as many what was drawn last.
        """
        assert self.points is not None
        side = len(self.points) // SUPERSAMPLING
        cells = self.points.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).transpose(1, 3, 0, 2).reshape(-1, side, side)
        ranks = np.empty(cells.shape, dtype=np.int32)
        for place, cell in enumerate(cells):
            ranks[place] = (cells == cell).sum(axis=0) * 256 + cell
        return (ranks.max(axis=0) & 255).astype(np.uint8)


def draw(scene: Scene, size: int) -> Drawing:
    """Draws the scene as a square RGB image with `size` pixels a side."""
    side = size * SUPERSAMPLING
    canvas = _background(scene, side)
    labels = Image.new("L", (side, side), 0)
    areas = []
    for number, thing in enumerate(scene.things, start=1):
        codes, corner = _codes(thing, scene.zoom, side)
        covered, filled = _mask(codes != _NOTHING), _mask(codes == _FILL)
        areas.append(np.count_nonzero(codes))
        canvas.paste(INK, corner, covered)
        canvas.paste(_shifted(_COLOURS[thing.colour], thing.tint), corner, filled)
        if thing.pattern != "plain":
            marks = _marks(thing, PATTERN_PERIOD * scene.zoom * side, covered.size)
            canvas.paste(OTHER_MARKS.get(thing.colour, MARK), corner, ImageChops.darker(filled, marks))
        labels.paste(number, corner, covered)
    owner = np.asarray(labels)
    boxes, visible = np.zeros((len(areas), 4)), np.zeros(len(areas))
    for index, area in enumerate(areas):
        mine = owner == index + 1
        columns, rows = np.flatnonzero(mine.any(axis=0)), np.flatnonzero(mine.any(axis=1))
        if len(columns):
            low = np.array([columns[0], rows[0]]) // SUPERSAMPLING
            high = np.array([columns[-1], rows[-1]]) // SUPERSAMPLING + 1
            boxes[index] = [*low, *high]
            visible[index] = np.count_nonzero(mine) / area
    return Drawing(canvas.reduce(SUPERSAMPLING), boxes, visible, owner)


def _shifted(colour: RGB, tint: RGB) -> RGB:
    red, green, blue = (min(max(value + shift, 0), 255) for value, shift in zip(colour, tint, strict=True))
    return red, green, blue


def _background(scene: Scene, side: int) -> Image.Image:
    colour = _shifted(_BACKGROUNDS[scene.background], scene.tint)
    shade: RGB = tuple(round(value * 0.88) for value in colour)  # type: ignore[assignment]
    image = Image.new("RGB", (side, side), colour)
    pen = ImageDraw.Draw(image)
    period = TEXTURE_PERIOD * scene.zoom * side
    left, top = (-shift * 2 * period for shift in scene.phase)
    count = math.ceil(side / period) + 3
    if scene.texture == "checkered":
        for row in range(count):
            for column in range(row % 2, count, 2):
                x, y = left + column * period, top + row * period
                pen.rectangle((x, y, x + period, y + period), fill=shade)
    elif scene.texture == "wavy":
        x = np.linspace(0, side, max(math.ceil(6 * side / period), 12))
        wave = 0.22 * period * np.sin((x - left) * 2 * math.pi / (2 * period))
        for row in range(count):
            y = top + row * period + wave
            pen.line(np.stack([x, y], axis=1).ravel().tolist(), fill=shade, width=max(round(0.24 * period), 1))
    elif scene.texture == "striped":
        for column in range(count):
            x = left + column * period
            pen.rectangle((x, 0, x + 0.4 * period, side), fill=shade)
    elif scene.texture == "dotted":
        radius = 0.26 * period
        for row in range(count):
            for column in range(count):
                x, y = left + (column + row % 2 / 2) * period, top + row * period
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    return image


def _codes(thing: Thing, zoom: float, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The object as an array of codes just large enough for it, and where its corner lies in the image."""
    stroke = max(round(STROKE * zoom * side), SUPERSAMPLING)
    angle = math.radians(thing.angle)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    shape = parts(thing.shape)
    contours = [(part.points @ turn * (thing.extent * side / 2), part.outwards @ turn * (stroke / 2)) for part in shape]
    everything = np.concatenate([points for points, _ in contours])
    low, high = everything.min(axis=0) - stroke, everything.max(axis=0) + stroke
    centre = np.array([thing.x, thing.y]) * side
    corner = np.floor(centre + low).astype(int)
    width, height = (np.ceil(centre + high).astype(int) - corner + 1).tolist()
    codes = Image.new("L", (width, height), _NOTHING)
    pen = ImageDraw.Draw(codes)
    for part, (points, border) in zip(shape, contours, strict=True):
        placed = points + centre - corner
        pen.polygon((placed + border).ravel().tolist(), fill=_INK)
        pen.polygon((placed - border).ravel().tolist(), fill={"solid": _FILL, "hole": _NOTHING, "ink": _INK}[part.kind])
    return np.asarray(codes), (int(corner[0]), int(corner[1]))


def _mask(chosen: np.ndarray) -> Image.Image:
    return Image.fromarray(chosen.astype(np.uint8) * 255)


def _marks(thing: Thing, period: float, size: tuple[int, int]) -> Image.Image:
    """The stripes, dots or checks as a mask of `size`, around the middle of the canvas."""
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    angle = math.radians(thing.pattern_angle)
    across, along = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
    middle = np.array(size) / 2
    reach = math.hypot(*size) / 2
    count = math.ceil(reach / period)
    if thing.pattern == "striped":
        for step in range(-count, count + 1):
            point = middle + step * period * across
            ends = [*(point - reach * along), *(point + reach * along)]
            pen.line(ends, fill=255, width=max(round(0.45 * period), 1))
    elif thing.pattern == "checkered":
        corners = 0.5 * period * np.array([across + along, along - across, -across - along, across - along])
        for row in range(-count, count + 1):
            for column in range(-count + row % 2, count + 1, 2):
                centre = middle + period * (row * along + column * across)
                pen.polygon((centre + corners).ravel().tolist(), fill=255)
    else:
        radius = 0.33 * period
        rows, columns = np.mgrid[-count : count + 1, -count - 1 : count + 2]
        steps = 1.1 * period * np.stack([rows, columns + rows % 2 / 2], axis=-1).reshape(-1, 2)
        centres = middle + steps @ np.stack([across, along])
        near = ((centres > -radius) & (centres < np.array(size) + radius)).all(axis=1)
        for x, y in centres[near].tolist():
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask
