"""Which object each pixel shows: what the table MASKS has of a scene, and the classes.

Two masks of an image, with the suites of `labels`: the shape of the object, and the word for its colour, which its outline,
its stripes and its dots have too. Pixels of the background are 0, which is no class.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from fast_goal.data.sources.scenes.drawing import Drawing
from fast_goal.data.sources.scenes.labels import COLOURS, SHAPES, classes
from fast_goal.data.sources.scenes.vocabulary import Scene, Style

BACKGROUND = 0


def make_masks(scene: Scene, drawing: Drawing, style: Style) -> dict[str, bytes]:
    """By suite a PNG of the image's size; a pixel's number is the place of its class among the names, from 1."""
    owners = drawing.owners()
    numbers = {
        SHAPES: [style.shapes.index(thing.shape) + 1 for thing in scene.things],
        COLOURS: [style.colours.index(thing.colour) + 1 for thing in scene.things],
    }
    return {suite: _png(np.array([BACKGROUND, *found], dtype=np.uint8)[owners]) for suite, found in numbers.items()}


def segments(style: Style) -> dict[str, dict[str, list[Any]]]:
    """The suites, as `data.records.Dataset.segments`: names and templates are those of the objects to be named."""
    return {
        suite: {**found, "values": list(range(1, len(found["names"]) + 1)), "ignored": [BACKGROUND]}
        for suite, found in classes(style).items()
    }


def _png(numbers: np.ndarray) -> bytes:
    image = Image.fromarray(numbers)
    image.putpalette(_palette())  # for whoever opens the file: the numbers are small, and would all be black
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=2)
    return stream.getvalue()


@cache
def _palette() -> bytes:
    """A colour for each number as in the masks of Pascal VOC: the bits of the number in turn go to red, green and blue."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = 3 * place + channel
            if bit < 8:
                colours[:, channel] |= ((numbers >> bit & 1) << (7 - place)).astype(np.uint8)
    return colours.tobytes()
