"""Objects to be named by their shape or their colour: what the table LABELS has of a scene, and the classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fast_goal.data.sources.scenes.drawing import Drawing
from fast_goal.data.sources.scenes.language import UNPLACED
from fast_goal.data.sources.scenes.vocabulary import Scene, Style

SHAPES, COLOURS = "scenes_shapes", "scenes_colours"  # suites
PER_IMAGE = 2  # objects; more of them would cost more crops to embed than there are images
MIN_SIDE = 8  # pixels of the box's shorter side
MOST_HIDDEN = 0.01  # of the object's area
MOST_SHARED = 0.1  # of the box's area that the box of another object may cover
TEMPLATES = (UNPLACED[0], UNPLACED[4])


class Label(NamedTuple):
    """thing: the index of the object whose box is shown; label: one of the names of the suite's classes."""

    suite: str
    thing: int
    label: str


def make_labels(generator: np.random.Generator, scene: Scene, drawing: Drawing) -> list[Label]:
    """The shape and the colour of up to PER_IMAGE objects that lie free and are large enough to be seen."""
    low, high = drawing.boxes[:, :2], drawing.boxes[:, 2:]
    areas = np.prod(high - low, axis=1)
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # [N, N, 2]
    shared = np.prod(np.maximum(shared, 0), axis=-1)
    np.fill_diagonal(shared, 0)
    free = (drawing.visible >= 1 - MOST_HIDDEN) & (shared.max(axis=1) <= MOST_SHARED * areas)
    seen = (high - low).min(axis=1) >= MIN_SIDE
    chosen = sorted(generator.permutation(np.flatnonzero(free & seen))[:PER_IMAGE].tolist())
    things = scene.things
    return [Label(SHAPES, thing, things[thing].shape) for thing in chosen] + [
        Label(COLOURS, thing, things[thing].colour) for thing in chosen
    ]


def classes(style: Style) -> dict[str, dict[str, list[str]]]:
    """The classes of the suites with the templates of their captions, as `data.records.Dataset.classes`.

    Each template comes with all sizes: together they say nothing of the size, and "a small" goes with every word, where "a"
    would be wrong before some of them.
    """
    suites = ((SHAPES, "{}", style.shapes), (COLOURS, "{} object", style.colours))
    return {
        suite: {
            "names": list(names),
            "templates": [template.format(thing=f"a {size} {what}") for template in TEMPLATES for size in style.sizes],
        }
        for suite, what, names in suites
    }
