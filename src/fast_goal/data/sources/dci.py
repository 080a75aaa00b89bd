"""The data source `dci`: Densely Captioned Images (Urbanek et al., 2023; github.com/facebookresearch/DCI).

`dci.tar.gz` has, in `densely_captioned_images/`, `annotations/` with a JSON file per image (`image`, `short_caption`,
`extra_caption`, `mask_data`: by key, masks with `label`, `mask_quality` and `bounds`) and `splits.json` (train, valid, test:
names of those files). The photographs are those of SA-1B. The extra caption is the long one; 7,602 of 7,805 images have one.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fast_goal.config import Split, number
from fast_goal.data.archives import unpack
from fast_goal.data.cleaning import Cleaner, Rule
from fast_goal.data.fetch import Remote, fetch
from fast_goal.data.sa1b import FOLDER, take_photos
from fast_goal.data.samples import Sample, Skipped, draw, look, storable, texts, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import ConfigError, DataError
from fast_goal.progress import Progress

ROOT = "densely_captioned_images"  # in the archive
PUBLISHED: dict[str, Split] = {"train": "train", "valid": "val", "test": "test"}
BAD_MASK = 2  # mask_quality: 0 is good, 1 has a label only


@dataclass(frozen=True)
class DciConfig:
    """photos: the folder of SA-1B's archives or photographs, below the downloads folder. missing_photos: `stop` asks for
    them, `skip` goes on without. long_caption: `extra`, or `short_and_extra`, with a line break between. split: `test` (all
    images are), `drawn` (`test_images` of those with a long caption by `seed`, the others train), `published`. objects:
    whether the labelled masks' boxes become the table of objects. clean: rules of `data.cleaning`."""

    annotations: Remote
    photos: str
    missing_photos: Literal["stop", "skip"]
    long_caption: Literal["extra", "short_and_extra"]
    split: Literal["test", "drawn", "published"]
    objects: bool
    clean: list[Rule]
    test_images: int = number(1)
    seed: int = number(0)  # of `drawn`


@source("dci", DciConfig)
def load(config: DciConfig, name: str, folder: Path) -> Loaded:
    """Fetches the annotations, takes the photographs that have a long caption from SA-1B, and looks at each.

    An annotation that cannot be used is a row of `skipped`, numbered by its place in the order of the file names; so is one
    without a long caption. Which images are drawn for the test depends on the annotations and the seed alone, not on the
    photographs at hand. Raises ManualStep for photographs that are not there, DataError where nothing can be used.
    """
    where = f"download.datasets.{name}"
    wanted = (f"{ROOT}/annotations/", f"{ROOT}/splits.json")
    unpack(
        fetch(config.annotations), folder / "annotations", select=lambda member: member.removeprefix("./").startswith(wanted)
    )
    base = folder / "annotations" / ROOT
    files = sorted((base / "annotations").glob("*.json"))
    if not files:
        raise DataError(f"{config.annotations.url} has no {ROOT}/annotations/*.json; correct {where}.annotations")
    skipped, cleaner = Skipped(), Cleaner(config.clean)
    splits, in_two = _published_splits(base / "splits.json", where) if config.split == "published" else (None, 0)
    samples: list[Sample] = []
    masks: dict[str, list[tuple[str, Sequence[float]]]] = {}
    no_objects = 0
    with Progress(f"download {name}", len(files), "annotations") as progress:
        for row, path in enumerate(files, 1):
            progress.update()
            entry = _annotation(path, row, skipped)
            if entry is None:
                continue
            sample = _sample(entry, path, row, config, cleaner, skipped)
            if sample is not None and splits is not None:
                sample.split = splits.get(path.name)
                if sample.split is None:
                    skipped.note(sample.image_id, row, "unknown split", f"{path.name} is in none of splits.json")
                    continue
            if sample is not None:
                samples.append(sample)
                found, others = _masks(entry)
                no_objects += others
                masks.setdefault(sample.image_id, found)
    samples = unique(samples, skipped)
    with_long = len(samples)
    _split(samples, config, where)

    take_photos(samples, config.photos, folder, config.missing_photos)
    rows, hashes = look(samples, folder, "dci", f"download {name}", skipped)
    if not rows:
        reasons = dict(Counter(entry["reason"] for entry in skipped))
        raise DataError(f"{where}: none of the {len(files)} images of {base / 'annotations'} can be used: {reasons}")
    notes = cleaner.notes
    if in_two:
        notes.append(f"{in_two:,} names stand in two splits of splits.json; the later of {', '.join(PUBLISHED)} holds")
    objects = None
    if config.objects:
        objects, lost = _objects(rows, masks)
        notes.append(f"{len(objects):,} labelled masks are objects; {lost:,} masks have a box without an area in the image")
        notes.append(f"{no_objects:,} masks have no label or no box, or are marked as bad; they are no objects")
    published = {"images": len(files), "long_captions": with_long}
    if splits is not None:
        published |= Counter(split for split in splits.values() if split)
    return Loaded(folder, rows, list(skipped), objects=objects, notes=notes, hashes=hashes, published=published)


def _annotation(path: Path, row: int, skipped: Skipped) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        skipped.note(path.stem, row, "unreadable annotation", f"{path.name}: {error}")
        return None
    if not isinstance(entry, dict):
        skipped.note(path.stem, row, "unreadable annotation", f"{path.name}: expected an object, found {type(entry).__name__}")
        return None
    return entry


def _sample(
    entry: dict[str, Any], path: Path, row: int, config: DciConfig, cleaner: Cleaner, skipped: Skipped
) -> Sample | None:
    image = entry.get("image")
    file = posixpath.basename(image) if isinstance(image, str) else ""
    image_id = storable(file.removesuffix(posixpath.splitext(file)[1]))
    if not image_id:
        skipped.note(path.stem, row, "no image named", f"{path.name}: `image` is {image!r}"[:200])
        return None
    short_caption = entry.get("short_caption", "")
    short = texts([cleaner(short_caption) if isinstance(short_caption, str) else short_caption], image_id, row, skipped)
    extra = entry.get("extra_caption")
    if extra is not None and not isinstance(extra, str):
        skipped.note(image_id, row, "caption is not text", f"{path.name}: `extra_caption` is {type(extra).__name__}")
        return None
    if not extra or not (long_caption := storable(cleaner(extra))).strip():
        skipped.note(image_id, row, "no long caption", f"{path.name}: `extra_caption` is empty")
        return None
    if config.long_caption == "short_and_extra":
        long_caption = "\n".join([*short, long_caption])
    return Sample(image_id, f"{FOLDER}/{file}", None, long_caption, short, row)


def _split(samples: list[Sample], config: DciConfig, where: str) -> None:
    """Fills in `split`, but for `published`."""
    if config.split == "test":
        for sample in samples:
            sample.split = "test"
    elif config.split == "drawn":
        if config.test_images >= len(samples):
            raise ConfigError(
                f"{where}.test_images = {config.test_images}: there are {len(samples)} images with a long caption, and some "
                f"have to be left for training; set a smaller number, or {where}.split = test"
            )
        drawn = sorted(samples, key=lambda sample: (draw(sample.image_id, config.seed), sample.image_id))[: config.test_images]
        test = {sample.image_id for sample in drawn}
        for sample in samples:
            sample.split = "test" if sample.image_id in test else "train"


def _published_splits(path: Path, where: str) -> tuple[dict[str, str], int]:
    """Our split by the name of the annotation, and how many names stand in more than one.

    Raises DataError for a file that cannot be understood.
    """
    try:
        content = json.loads(path.read_bytes())
        splits = {name: ours for split, ours in PUBLISHED.items() for name in content[split]}
        return splits, sum(len(set(content[split])) for split in PUBLISHED) - len(splits)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected the lists {', '.join(PUBLISHED)} of file names ({error!r}); set {where}.split to test or drawn"
        ) from None


def _masks(entry: dict[str, Any]) -> tuple[list[tuple[str, Sequence[float]]], int]:
    """(label, box) of every usable mask, in the order of the file, and how many others there are."""
    masks = entry.get("mask_data")
    masks = masks if isinstance(masks, dict) else {}
    found = []
    for mask in masks.values():
        if not isinstance(mask, dict) or mask.get("mask_quality") == BAD_MASK:
            continue
        label, box = mask.get("label"), _box(mask.get("bounds"))
        if isinstance(label, str) and label.strip() and box is not None:
            found.append((storable(label.strip()), box))
    return found, len(masks) - len(found)


def _box(bounds: Any) -> tuple[float, float, float, float] | None:
    """xyxy of `bounds`, which is {topLeft: {x, y}, bottomRight: {x, y}}; the README says [[x, y], [x, y]]."""
    try:
        if isinstance(bounds, dict):
            first, last = bounds["topLeft"], bounds["bottomRight"]
            return float(first["x"]), float(first["y"]), float(last["x"]), float(last["y"])
        (x1, y1), (x2, y2) = bounds
        return float(x1), float(y1), float(x2), float(y2)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _objects(
    rows: list[dict[str, Any]], masks: dict[str, list[tuple[str, Sequence[float]]]]
) -> tuple[list[dict[str, Any]], int]:
    """Rows of OBJECTS, boxes clipped to the image, and how many have no area there."""
    objects, lost = [], 0
    for row in rows:
        index = 0
        for label, (x1, y1, x2, y2) in masks[row["image_id"]]:
            x1, x2 = (min(max(value, 0.0), float(row["width"])) for value in (x1, x2))
            y1, y2 = (min(max(value, 0.0), float(row["height"])) for value in (y1, y2))
            if not (x1 < x2 and y1 < y2):
                lost += 1
                continue
            unknown = {"colour": "", "pattern": "", "size": ""}
            box = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
            objects.append({"image_id": row["image_id"], "object_index": index, "label": label, **unknown, **box})
            index += 1
    return objects, lost
