"""The data source `segmentation`: images with a mask each, for zero-shot semantic segmentation.

The layouts of Pascal VOC, Pascal Context, ADE20K, COCO-Stuff and Cityscapes differ in folders and endings alone:

    <root>/<image_folder>/<stem><image_suffix>
    <root>/<mask_folder>/<stem><mask_suffix>     a PNG file, the number of a class for each pixel

The stems are the lines of `split_file`, or those of all masks; they may have folders (`frankfurt/frankfurt_000000_000294`).
The set of classes has the data set's name. docs/segmentation.md says where each is to be had.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fast_goal.config import number
from fast_goal.data import prompts
from fast_goal.data.archives import unpack
from fast_goal.data.benchmarks import Origin, bring
from fast_goal.data.fetch import ManualStep, downloads_folder
from fast_goal.data.masks import MOST, NoMask, Numbers, read_mask
from fast_goal.data.samples import Sample, Skipped, draw, look, storable, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import digest, write_json
from fast_goal.progress import Progress

AT_ONCE = 256  # masks that are looked at between two lines of progress


@dataclass(frozen=True)
class SegmentationConfig(prompts.PromptedConfig):
    """archives: unpacked into the data set's own folder; none: the files are there already. root: the folder that holds them,
    in the archives or, where there are none, of this path or below the downloads folder. steps: what a person has to do where
    it is not there. split_file: the stems of the images, one a line; null: all that have a mask. names: of the classes, each
    at the place of its number in the masks; null where a number is no class, and its pixels do not count. ignored: more such
    numbers."""

    archives: list[Origin]
    root: str
    steps: list[str]
    image_folder: str
    image_suffix: str
    mask_folder: str
    mask_suffix: str
    split_file: str | None
    names: list[str | None]
    ignored: list[int] = number(0, MOST - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name in self.names if name is not None]
        if not names or not all(name.strip() for name in names):
            raise ConfigError(f"names = {self.names}: expected the name of each class; null where a number is none")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"names: {twice} stand twice: no pixel could be told to be of one of them")
        if both := [place for place in self.ignored if place < len(self.names) and self.names[place] is not None]:
            raise ConfigError(f"ignored = {self.ignored}: {both} are the numbers of {[self.names[place] for place in both]}")

    @property
    def values(self) -> list[int]:
        """The number of each class."""
        return [place for place, name in enumerate(self.names) if name is not None]

    @property
    def uncounted(self) -> list[int]:
        """The numbers of pixels that do not count."""
        return sorted({*self.ignored, *(place for place, name in enumerate(self.names) if name is None)})


class _Layout(NamedTuple):
    """Paths below the data set's root."""

    images: str
    masks: str
    image_suffix: str
    mask_suffix: str
    split_file: str | None

    def image(self, stem: str) -> str:
        return f"{self.images}/{stem}{self.image_suffix}"

    def mask(self, stem: str) -> str:
        return f"{self.masks}/{stem}{self.mask_suffix}"

    def is_wanted(self, member: str) -> bool:
        """Whether a file is an image or a mask."""
        return any(
            member.startswith(f"{folder}/") and member.endswith(suffix)
            for folder, suffix in ((self.images, self.image_suffix), (self.masks, self.mask_suffix))
        )


@source("segmentation", SegmentationConfig)
def load(config: SegmentationConfig, name: str, folder: Path) -> Loaded:
    """Fetches and unpacks what is to be had; looks at each image and its mask.

    An image is a row of `skipped` where it or its mask is missing, cannot be read, has another size than the other, or where
    the mask has numbers that mean nothing. Raises ManualStep where a person has to bring something, DataError where a folder
    is not there or nothing can be used.
    """
    where = f"download.datasets.{name}"
    root, layout, stems = _unpacked(config, folder, where) if config.archives else _found(config, where)
    skipped = Skipped()
    samples = []
    for row, stem in enumerate(stems, 1):
        if ".." in PurePosixPath(stem).parts or PurePosixPath(stem).is_absolute():
            skipped.note(stem, row, "path outside the data root", f"line {row} of {config.split_file}")
        else:
            samples.append(Sample(stem, layout.image(stem), config.split, row=row))
    samples, notes = unique(samples, skipped), []
    count = len(samples)
    if config.images is not None and config.images < count:
        drawn = sorted(samples, key=lambda sample: (draw(sample.image_id, config.seed), sample.image_id))[: config.images]
        chosen = {sample.image_id for sample in drawn}
        samples = [sample for sample in samples if sample.image_id in chosen]
        notes.append(f"{len(samples):,} of {count:,} images were drawn, as {where}.images says")
    rows, hashes = look(samples, root, "segmentation", f"download {name}", skipped)
    places = {sample.image_id: sample.row for sample in samples}
    masks, empty = [], 0
    for row, seen in _looked_at(rows, root, layout, Numbers(config.values, config.uncounted), f"download {name}"):
        if not isinstance(seen, _Seen):
            skipped.note(row["image_id"], places[row["image_id"]], *seen)
            continue
        empty += seen.empty
        path = layout.mask(row["image_id"])
        masks.append({"image_id": row["image_id"], "suite": name, "mask_path": path, "content_hash": seen.content_hash})
    kept = {mask["image_id"] for mask in masks}
    if not kept:
        reasons = {reason: sum(row["reason"] == reason for row in skipped) for reason in {row["reason"] for row in skipped}}
        raise DataError(f"{where}: none of the {count:,} images below {root / layout.images} can be used: {reasons}")
    if empty:
        notes.append(f"masks without a pixel of any class: {empty:,}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "SOURCE.json", {"source": "segmentation", "root": str(root)})
    names = [storable(entry) for entry in config.names if entry is not None]
    return Loaded(
        root,
        [row for row in rows if row["image_id"] in kept],
        list(skipped),
        notes=notes,
        hashes=[row for row in hashes if row["image_id"] in kept],
        published={config.split: count},
        masks=masks,
        segments={
            name: {
                "names": names,
                "values": config.values,
                "ignored": config.uncounted,
                "templates": prompts.templates(config.templates),
            }
        },
    )


def _unpacked(config: SegmentationConfig, folder: Path, where: str) -> tuple[Path, _Layout, list[str]]:
    """Brings the archives and unpacks what is asked for. A list of stems is unpacked first: it says which images."""
    layout = _layout(config, config.root)
    archives = bring(config.archives)
    split_file = layout.split_file
    if split_file is None:
        for archive in archives:
            unpack(archive, folder, select=layout.is_wanted, asked=digest(layout))
        return folder, layout, _stems(folder, layout, where)
    for archive in archives:
        if not (folder / split_file).is_file():
            unpack(archive, folder, select=lambda member: member == split_file, asked=digest([split_file]))
    stems = _stems(folder, layout, where)
    wanted = {path(stem) for stem in stems for path in (layout.image, layout.mask)}
    for archive in archives:
        unpack(archive, folder, select=wanted.__contains__, asked=digest([layout, sorted(wanted)]))
    return folder, layout, stems


def _found(config: SegmentationConfig, where: str) -> tuple[Path, _Layout, list[str]]:
    """The folder that is there already."""
    layout = _layout(config, "")
    for root in (Path(config.root).expanduser(), downloads_folder() / config.root):
        if (root / layout.masks).is_dir():
            return root, layout, _stems(root, layout, where)
    if config.steps:
        raise ManualStep(f"The folder {config.root}", config.steps, downloads_folder() / config.root)
    raise DataError(
        f"{where}: there is no folder {config.root}/{layout.masks}, nor below {downloads_folder()}; set {where}.root"
    )


def _layout(config: SegmentationConfig, root: str) -> _Layout:
    """With normal paths, as they are in archives."""
    images, masks = (str(PurePosixPath(root, place)) for place in (config.image_folder, config.mask_folder))
    split_file = None if config.split_file is None else str(PurePosixPath(root, config.split_file))
    return _Layout(images, masks, config.image_suffix, config.mask_suffix, split_file)


def _stems(root: Path, layout: _Layout, where: str) -> list[str]:
    """Raises DataError where the list or a folder is not there, or is empty."""
    if layout.split_file is not None:
        path = root / layout.split_file
        if not path.is_file():
            raise DataError(f"{path} does not exist; set {where}.split_file to the list of the images, or to null")
        stems = [line.strip() for line in path.read_text("utf-8-sig", "replace").splitlines() if line.strip()]
    else:
        stems = sorted(_below(root / layout.masks, layout.mask_suffix))
    if not stems:
        what = layout.split_file or f"{layout.masks}/*{layout.mask_suffix}"
        raise DataError(f"{root / what}: no images are named there; correct {where}.root, mask_folder or mask_suffix")
    return stems


def _below(folder: Path, suffix: str) -> Iterator[str]:
    for path in folder.rglob(f"*{suffix}"):
        if path.is_file() and not path.name.startswith("."):
            yield path.relative_to(folder).as_posix().removesuffix(suffix)


class _Seen(NamedTuple):
    content_hash: str
    empty: bool  # no pixel is of any class


def _looked_at(
    rows: Sequence[dict[str, Any]], root: Path, layout: _Layout, numbers: Numbers, label: str
) -> Iterator[tuple[dict[str, Any], _Seen | tuple[str, str]]]:
    """Each record with what its mask is, or with reason and detail where it cannot be used."""

    def seen(row: dict[str, Any]) -> _Seen | tuple[str, str]:
        return _look_at(root / layout.mask(row["image_id"]), (row["width"], row["height"]), numbers)

    with Progress(f"{label}: masks", len(rows), "masks") as progress, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            yield from zip(some, pool.map(seen, some), strict=True)
            progress.update(len(some))


def _look_at(path: Path, size: tuple[int, int], numbers: Numbers) -> _Seen | tuple[str, str]:
    try:
        content = path.read_bytes()
        mask = read_mask(path, content)
    except FileNotFoundError:
        return "mask missing", str(path)
    except NoMask as error:
        return "mask without class numbers", str(error)
    except (DataError, OSError) as error:
        return "unreadable mask", str(error)
    if mask.shape[::-1] != size:
        return "mask of another size", f"{path}: {mask.shape[1]} x {mask.shape[0]}, the image {size[0]} x {size[1]}"
    if unknown := numbers.unknown(mask):
        return "mask with unknown numbers", f"{path}: {unknown[:5]} are no class, and not among those to ignore"
    return _Seen(hashlib.sha256(content).hexdigest(), not np.isin(mask, numbers.values).any())
