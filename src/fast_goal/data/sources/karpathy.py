"""The data source `karpathy`: MSCOCO and Flickr30k with the splits of Karpathy and Fei-Fei (2015).

The split file (`dataset_coco.json`, `dataset_flickr30k.json`) is an object with `images`, each with `filename`, in MSCOCO
also `filepath` (the folder of its archive: train2014, val2014), `split` (train, restval, val, test) and `sentences`, each
with its text as `raw`. Captions are short; there is no long one. Only images of the splits asked for are unpacked.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_goal.config import Split, number
from fast_goal.data.archives import unpack
from fast_goal.data.fetch import Remote, fetch, fetch_all, require_manual
from fast_goal.data.samples import Sample, Skipped, look, texts, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import DataError
from fast_goal.files import digest


@dataclass(frozen=True)
class ManualArchive:
    """An archive that has to be asked for. `file` is its name in the downloads' folder; `steps` say how to get it."""

    file: str
    steps: list[str]


@dataclass(frozen=True)
class KarpathyConfig:
    """archives: by the `filepath` of their images in the split file. manual: the archive of all images that have no
    `filepath`. splits: from the publication's split to ours; null leaves it out."""

    captions: Remote
    split_file: str  # in the archive of the captions
    archives: dict[str, Remote]
    manual: ManualArchive | None
    splits: dict[str, Split | None]
    captions_per_image: int | None = number(1)  # the first ones; null: all


@source("karpathy", KarpathyConfig)
def load(config: KarpathyConfig, name: str, folder: Path) -> Loaded:
    """Fetches what the splits asked for need, unpacks it to `folder/<split>/<filepath>/` and looks at every image.

    Captions are kept as published. Those beyond `captions_per_image` are left out, one row of `skipped` an image.
    Raises ManualStep where an archive has to be asked for, DataError for a split file that cannot be understood and for a
    split that it does not have.
    """
    where = f"download.datasets.{name}"
    entries, path = _entries(config, where, folder)
    published = Counter(str(entry.get("split")) for _, entry in entries)
    if unknown := sorted({split for split, own in config.splits.items() if own} - set(published)):
        raise DataError(f"{where}.splits: {path.name} has no image in {unknown}; its splits are {dict(published)}")

    skipped = Skipped()
    left_out = [split for split in published if config.splits.get(split) is None]
    notes = [f"the split {split} ({published[split]:,} images) is left out, as {where}.splits says" for split in left_out]
    wanted: dict[tuple[str, str], set[str]] = {}  # (published split, filepath) -> file names
    samples, fewer = [], 0
    for row, entry in entries:
        split = config.splits.get(str(entry.get("split")))
        if split is None:
            continue
        file, filepath = entry.get("filename"), entry.get("filepath", "")
        if not isinstance(file, str) or not isinstance(filepath, str) or posixpath.basename(file) != file or not file:
            skipped.note("", row, "no image named", f"filename {file!r}, filepath {filepath!r}"[:200])
            continue
        place = f"{entry['split']}/{filepath or 'images'}"
        sample = Sample(posixpath.splitext(file)[0], f"{place}/{file}", split, row=row)
        sentences = entry.get("sentences")
        raw = [text.get("raw") if isinstance(text, dict) else text for text in sentences] if isinstance(sentences, list) else []
        sample.captions = texts(raw, sample.image_id, row, skipped)
        if not sample.captions:
            skipped.note(sample.image_id, row, "no caption", "its `sentences` hold no text")
            continue
        if config.captions_per_image is not None:
            beyond = sample.captions[config.captions_per_image :]
            del sample.captions[config.captions_per_image :]
            fewer += len(sample.captions) < config.captions_per_image
            if beyond:
                skipped.note(sample.image_id, row, "captions beyond captions_per_image", json.dumps(beyond, ensure_ascii=False))
        wanted.setdefault((entry["split"], filepath), set()).add(file)
        samples.append(sample)
    if fewer:
        notes.append(f"images with fewer than {config.captions_per_image} captions: {fewer}")
    samples = unique(samples, skipped)
    _unpack(config, where, folder, wanted)
    rows, hashes = look(samples, folder, "karpathy", f"download {name}", skipped)
    if not rows:
        reasons = Counter(entry["reason"] for entry in skipped)
        raise DataError(f"{where}: none of the images of {path.name} can be used: {dict(reasons)}")
    return Loaded(root=folder, rows=rows, skipped=list(skipped), notes=notes, hashes=hashes, published=dict(published))


def _entries(config: KarpathyConfig, where: str, folder: Path) -> tuple[list[tuple[int, dict[str, Any]]], Path]:
    """The images of the split file, each with its number from 1."""
    path = again = fetch(config.captions)
    if path.suffix != ".json":
        archive, path = path, folder / "captions" / config.split_file
        again = path.parent
        unpack(
            archive,
            path.parent,
            select=lambda member: posixpath.basename(member) == config.split_file,
            asked=config.split_file,
        )
        if not path.is_file():
            found = sorted(path.parent.rglob(config.split_file))
            if not found:
                raise DataError(f"{archive}: there is no {config.split_file} in it; set {where}.split_file")
            path = found[0]
    try:
        content = json.loads(path.read_bytes())  # bytes: with or without a byte-order mark
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}. Delete {again} and run the step again.") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(entry, dict) for entry in images):
        raise DataError(f"{path}: expected an object with a list `images` of objects, as in dataset_coco.json")
    return list(enumerate(images, 1)), path


def _unpack(config: KarpathyConfig, where: str, folder: Path, wanted: dict[tuple[str, str], set[str]]) -> None:
    filepaths = sorted({filepath for _, filepath in wanted})
    remote = [filepath for filepath in filepaths if filepath in config.archives]
    archives: dict[str, Path] = {}
    for filepath in filepaths:
        if filepath in config.archives:
            continue
        if filepath or config.manual is None:
            raise DataError(
                f"{where}.archives: the images of the folder {filepath!r} are asked for, but no archive is given; "
                f"there is one for {sorted(config.archives)}"
            )
        archives[filepath] = require_manual(config.manual.file, config.manual.steps)
    archives |= dict(zip(remote, fetch_all([config.archives[filepath] for filepath in remote]), strict=True))
    for (split, filepath), files in sorted(wanted.items()):
        # a folder for each split and archive: the splits asked for may change
        target = folder / split / (filepath or "images")
        unpack(
            archives[filepath],
            target,
            strip=1,
            select=lambda member, files=files: posixpath.basename(member) in files,
            asked=digest(sorted(files)),  # another split file may name others
        )
