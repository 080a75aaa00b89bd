"""From (seed, split, index) to finished samples: image bytes and rows of the tables, without touching the disk.

Every index has a random generator of its own, so that the result depends neither on the order nor on the number of
processes, and a larger data set begins with the images of a smaller one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fast_goal.data.sources.scenes import language
from fast_goal.data.sources.scenes.drawing import Drawing
from fast_goal.data.sources.scenes.language import Plan
from fast_goal.data.sources.scenes.layout import random_close_up, random_scene, twins
from fast_goal.data.sources.scenes.vocabulary import Scene

# The numbers enter the random seeds: another order would be another data set.
SPLIT_NUMBERS = {"pretrain": 0, "train": 1, "val": 2, "test": 3}
TWIN_SPLITS = ("val", "test")
CLOSE_UP_SHARE = 0.5  # of the split pretrain
TWIN_SUFFIX = "-twin"  # of the id of the second image of a scene
LARGE = 3  # the largest objects of a scene, which short captions are about


@dataclass(frozen=True)
class Sample:
    """One image: the scene, its PNG bytes, and its rows for the tables RECORDS, TRUTH and OBJECTS of `data.records`."""

    scene: Scene
    png: bytes
    record: dict[str, Any]
    truth: list[dict[str, Any]]
    objects: list[dict[str, Any]]


def make_samples(seed: int, split: str, index: int, image_size: int) -> list[Sample]:
    """The sample of an index, in `val` and `test` followed by its twin."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, SPLIT_NUMBERS[split], index]))
    image_id = f"{split}-{index:06d}"
    if split == "pretrain" and generator.random() < CLOSE_UP_SHARE:
        return [_close_up(generator, image_id, image_size)]
    while True:
        scene, drawing = random_scene(generator, image_size)
        boxes = drawing.boxes / image_size
        short = _plan_short(generator, boxes)
        long = [] if split == "pretrain" else _plan_long(generator, boxes)
        samples = [_sample(image_id, split, scene, drawing, long, short)]
        if split not in TWIN_SPLITS:
            return samples
        plans = [plan for plan in [*long, *short] if isinstance(plan, Plan)]
        for twin, twin_drawing in twins(generator, scene, image_size):
            if all(language.holds(plan, twin_drawing.boxes / image_size) for plan in plans):
                return [*samples, _sample(f"{image_id}{TWIN_SUFFIX}", split, twin, twin_drawing, long, short)]


def scene_of(image_id: str) -> str:
    """The id of the scene that an image shows: it and its twin have the same."""
    return image_id.removesuffix(TWIN_SUFFIX)


def _close_up(generator: np.random.Generator, image_id: str, image_size: int) -> Sample:
    """A detail of a scene, with a sentence that the whole scene would have for its subject, size and place included.

    So it is with details of photographs on the web. Were size and place told of whole scenes only, a CLIP would learn that
    these words mean a whole scene, and FLISM would match "a small ..." with any part of a scene that shows little.
    """
    scene, drawing = random_scene(generator, image_size)
    subject = int(generator.integers(len(scene.things)))
    boxes, everything = drawing.boxes / image_size, list(range(len(scene.things)))
    short = [language.plan_thing(generator, subject, boxes, everything) for _ in range(generator.integers(1, 3))]
    detail, drawing = random_close_up(generator, scene, subject, image_size)
    sample = _sample(image_id, "pretrain", detail, drawing, [], short)
    # the others are cut off: they are no example of what the detector is to find
    return dataclasses.replace(sample, objects=[sample.objects[subject]])


def _plan_long(generator: np.random.Generator, boxes: np.ndarray) -> list[Plan | str]:
    everything = list(range(len(boxes)))
    overall = language.OVERALL[int(generator.integers(len(language.OVERALL)))]
    plans = [overall, *(language.plan_thing(generator, thing, boxes, everything) for thing in everything)]
    return [plans[place] for place in generator.permutation(len(plans))]


def _plan_short(generator: np.random.Generator, boxes: np.ndarray) -> list[Plan]:
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    large = np.argsort(-areas, kind="stable")[:LARGE].tolist()
    subjects = generator.permutation(large)[: int(generator.integers(1, 3))].tolist()
    return [language.plan_thing(generator, thing, boxes, large) for thing in subjects]


def _sample(image_id: str, split: str, scene: Scene, drawing: Drawing, long: list[Plan | str], short: list[Plan]) -> Sample:
    png = _png(drawing.image)
    corners = [dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)) for box in drawing.boxes.tolist()]
    caption, said = language.long_caption(long, scene)
    record = {
        "image_id": image_id,
        "image_path": f"{split}/{image_id}.png",
        "width": drawing.image.width,
        "height": drawing.image.height,
        "split": split,
        "long_caption": caption,
        "captions": [language.word_thing(plan, scene) for plan in short],
        "source": "scenes",
        "content_hash": hashlib.sha256(png).hexdigest(),
    }
    truth = [
        {"image_id": image_id, "sentence_index": number, "char_start": sentence.start, "char_end": sentence.end}
        | corners[sentence.thing]
        | {"label": scene.things[sentence.thing].shape}
        for number, sentence in enumerate(said)
        if sentence.thing is not None
    ]
    objects = [
        {"image_id": image_id, "object_index": number, "label": thing.shape, "colour": thing.colour, "pattern": thing.pattern}
        | {"size": thing.size}
        | corners[number]
        for number, thing in enumerate(scene.things)
    ]
    return Sample(scene, png, record, truth, objects)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=2)  # a quarter of the time of the default, for files a tenth larger
    return stream.getvalue()
