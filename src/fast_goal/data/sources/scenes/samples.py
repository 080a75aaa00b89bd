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

from fast_goal.data.sources.scenes import language, vocabulary
from fast_goal.data.sources.scenes.choices import make_choices
from fast_goal.data.sources.scenes.drawing import Drawing
from fast_goal.data.sources.scenes.labels import make_labels
from fast_goal.data.sources.scenes.language import Count, Plan, Wording
from fast_goal.data.sources.scenes.layout import random_close_up, random_scene, twins
from fast_goal.data.sources.scenes.masks import make_masks
from fast_goal.data.sources.scenes.vocabulary import Scene, Style

# The numbers enter the random seeds: another order would be another data set.
SPLIT_NUMBERS = {"pretrain": 0, "train": 1, "val": 2, "test": 3}
TWIN_SPLITS = ("val", "test")
CLOSE_UP_SHARE = 0.5  # of the split pretrain
TWIN_SUFFIX = "-twin"  # of the id of the second image of a scene
STYLES: dict[str, tuple[Style, Wording]] = {  # by the name of the source
    "scenes": (vocabulary.PLAIN, language.PLAIN),
    "rich_scenes": (vocabulary.RICH, language.RICH),
}
MASKS_FOLDER = "masks"  # beside those of the splits
LARGE = 3  # the largest objects of a scene, which short captions are about


@dataclass(frozen=True)
class Sample:
    """One image: the scene, its PNG bytes, and its rows for the tables of `data.records`.

    Choices, labels and masks are for measuring: there are none but in TWIN_SPLITS. `mask_files`: the bytes of each
    `mask_path`.
    """

    scene: Scene
    png: bytes
    record: dict[str, Any]
    truth: list[dict[str, Any]]
    objects: list[dict[str, Any]]
    choices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    labels: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    masks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    mask_files: dict[str, bytes] = dataclasses.field(default_factory=dict)


def make_samples(seed: int, split: str, index: int, image_size: int, source: str = "scenes") -> list[Sample]:
    """The sample of an index, in `val` and `test` followed by its twin; `source` is one of STYLES."""
    style, wording = STYLES[source]
    entropy = [seed, SPLIT_NUMBERS[split], index]
    generator = np.random.default_rng(np.random.SeedSequence(entropy))
    image_id = f"{split}-{index:06d}"
    if split == "pretrain" and generator.random() < CLOSE_UP_SHARE:
        return [_close_up(generator, image_id, image_size, source)]
    while True:
        scene, drawing = random_scene(generator, image_size, style)
        boxes = drawing.boxes / image_size
        short: list[Plan | str] = [*_plan_short(generator, boxes, wording)]
        if split == "pretrain" and wording.short_overall and generator.random() < wording.short_overall:
            short.append(_overall(generator, wording))
        long = [] if split == "pretrain" else _plan_long(generator, scene, boxes, wording)
        sample = _sample(image_id, split, scene, drawing, long, short, source)
        if split not in TWIN_SPLITS:
            return [sample]
        plans = [plan for plan in [*long, *short] if isinstance(plan, Plan)]
        counts = [plan for plan in long if isinstance(plan, Count)]
        for twin, twin_drawing in twins(generator, scene, image_size, style):
            true = all(language.holds(plan, twin_drawing.boxes / image_size) for plan in plans)
            if true and all(language.still_counts(count, twin) for count in counts):
                other = _sample(f"{image_id}{TWIN_SUFFIX}", split, twin, twin_drawing, long, short, source)
                both = enumerate(((sample, drawing), (other, twin_drawing)))
                return [_asked(one, drawn, long, source, entropy, number) for number, (one, drawn) in both]


def scene_of(image_id: str) -> str:
    """The id of the scene that an image shows: it and its twin have the same."""
    return image_id.removesuffix(TWIN_SUFFIX)


def _close_up(generator: np.random.Generator, image_id: str, image_size: int, source: str) -> Sample:
    """A detail of a scene, with a sentence that the whole scene would have for its subject, size and place included.

    So it is with details of photographs on the web. Were size and place told of whole scenes only, a CLIP would learn that
    these words mean a whole scene, and FLISM would match "a small ..." with any part of a scene that shows little.
    """
    style, wording = STYLES[source]
    scene, drawing = random_scene(generator, image_size, style)
    subject = int(generator.integers(len(scene.things)))
    boxes, everything = drawing.boxes / image_size, list(range(len(scene.things)))
    short = [language.plan_thing(generator, subject, boxes, everything, wording) for _ in range(generator.integers(1, 3))]
    detail, drawing = random_close_up(generator, scene, subject, image_size)
    sample = _sample(image_id, "pretrain", detail, drawing, [], [*short], source)
    # the others are cut off: they are no example of what the detector is to find
    return dataclasses.replace(sample, objects=[sample.objects[subject]])


def _overall(generator: np.random.Generator, wording: Wording) -> str:
    return wording.overall[int(generator.integers(len(wording.overall)))]


def _plan_long(generator: np.random.Generator, scene: Scene, boxes: np.ndarray, wording: Wording) -> list[Plan | Count | str]:
    everything = list(range(len(boxes)))
    overall = _overall(generator, wording)
    plans: list[Plan | Count | str] = [
        overall,
        *(language.plan_thing(generator, thing, boxes, everything, wording) for thing in everything),
    ]
    if wording.remarks and generator.random() < language.REMARK_SHARE:
        plans.append(wording.remarks[int(generator.integers(len(wording.remarks)))])
    if wording.counts and generator.random() < language.COUNT_SHARE:
        count = language.plan_count(generator, scene, wording)
        plans += [count] if count else []
    return [plans[place] for place in generator.permutation(len(plans))]


def _plan_short(generator: np.random.Generator, boxes: np.ndarray, wording: Wording) -> list[Plan]:
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    large = np.argsort(-areas, kind="stable")[:LARGE].tolist()
    subjects = generator.permutation(large)[: int(generator.integers(1, 3))].tolist()
    return [language.plan_thing(generator, thing, boxes, large, wording) for thing in subjects]


def _sample(
    image_id: str,
    split: str,
    scene: Scene,
    drawing: Drawing,
    long: list[Plan | Count | str],
    short: list[Plan | str],
    source: str,
) -> Sample:
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
        "captions": [language.word(plan, scene) for plan in short],
        "source": source,
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


def _asked(
    sample: Sample, drawing: Drawing, long: list[Plan | Count | str], source: str, entropy: list[int], number: int
) -> Sample:
    """The sample with the rows of CHOICES and LABELS, from a random generator of their own: `number` tells the twins apart.
    And with its masks."""
    style, wording = STYLES[source]
    generator = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(number,)))
    width, height = drawing.image.size
    image = {"image_id": sample.record["image_id"], "x1": 0.0, "y1": 0.0, "x2": float(width), "y2": float(height)}
    choices = [
        image | {"suite": choice.suite, "group": choice.group, "caption": choice.caption, "foils": [choice.foil]}
        for choice in make_choices(generator, sample.scene, drawing.boxes / width, long, style, wording)
    ]
    labels = [
        {name: sample.objects[label.thing][name] for name in image} | {"suite": label.suite, "label": label.label}
        for label in make_labels(generator, sample.scene, drawing)
    ]
    masks, files = [], {}
    for suite, png in make_masks(sample.scene, drawing, style).items():
        path = f"{MASKS_FOLDER}/{suite}/{image['image_id']}.png"
        files[path] = png
        found = {"suite": suite, "mask_path": path, "content_hash": hashlib.sha256(png).hexdigest()}
        masks.append({"image_id": image["image_id"], **found})
    return dataclasses.replace(sample, choices=choices, labels=labels, masks=masks, mask_files=files)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=2)  # a quarter of the time of the default, for files a tenth larger
    return stream.getvalue()
