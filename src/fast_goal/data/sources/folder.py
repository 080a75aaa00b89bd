"""A user's own folder of images with a table of captions (CSV, JSON, JSONL or parquet).

One or more rows per image: short captions are kept as a list; the long caption has a column of its own or is made of
the short ones. What cannot be used is skipped with its reason; a table that cannot be understood stops the step.
"""

from __future__ import annotations

import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fast_goal.config import number
from fast_goal.data.caption_table import CaptionTable, read_caption_table
from fast_goal.data.images import SUFFIXES
from fast_goal.data.records import UNNAMED
from fast_goal.data.samples import Sample, Skipped, draw, look, storable, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import write_json

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Columns:
    """Names of the table's columns. `caption` or `long_caption` may be null, not both; `id` null takes the image's path
    without its suffix; `split` null draws the split by `fractions`."""

    image: str
    caption: str | None
    long_caption: str | None
    id: str | None
    split: str | None

    def __post_init__(self) -> None:
        if self.caption is None and self.long_caption is None:
            raise ConfigError("caption and long_caption are both null: there would be no captions")


@dataclass(frozen=True)
class Fractions:
    """Shares of the images; they add up to 1."""

    train: float = number(0, 1)
    val: float = number(0, 1)
    test: float = number(0, 1)

    def __post_init__(self) -> None:
        total = self.train + self.val + self.test
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ConfigError(f"train = {self.train}, val = {self.val}, test = {self.test}: the sum is {total:g}, expected 1")


@dataclass(frozen=True)
class FolderConfig:
    """`images` and `captions` are below `root`; the table's image column names files below `images`."""

    root: str
    images: str
    captions: str
    columns: Columns
    fractions: Fractions
    seed: int = number(0)  # of the splits


@source("folder", FolderConfig)
def load(config: FolderConfig, name: str, folder: Path) -> Loaded:
    """Reads the table, checks every image by decoding it, and divides the images into splits.

    The split of an image is drawn from its content and the seed, so it does not change when others are added, and
    copies of a picture fall together. Raises DataError for a table that cannot be understood (file, row or column, fix)
    and where nothing is left.
    """
    root = Path(config.root)
    where = f"download.datasets.{name}"
    if not (root / config.images).is_dir():
        raise DataError(f"{where}: the folder of images {root / config.images} does not exist; set {where}.root or .images")
    if root.resolve().is_relative_to(folder.parent.resolve()):
        raise DataError(f"{where}.root = {config.root}: {folder.parent} is rewritten by this step; keep your images elsewhere")
    table = read_caption_table(root / config.captions)
    _check_columns(table, config.columns, where)
    skipped = Skipped()
    for row, detail in table.bad:
        skipped.note("", row, "unreadable row", detail)

    named: set[str] = set()
    samples = _samples(table, config, where, skipped, named)
    samples = list(_with_captions(samples, config.columns, skipped))
    samples = unique(samples, skipped)
    rows, hashes = look(samples, root, "folder", f"download {name}", skipped)
    for path in image_files(root, config.images):
        if path in named:
            continue
        skipped.note(path, -1, UNNAMED, "no row of the table names this image")
    if not rows:
        raise DataError(f"{where}: none of the images can be used. {_reasons(skipped)}")
    notes = assign_splits(rows, config.seed, config.fractions, given=config.columns.split is not None)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "SOURCE.json", {"source": "folder", "root": config.root, "images": config.images, "captions": config.captions}
    )
    return Loaded(root=root, rows=rows, skipped=list(skipped), notes=notes, hashes=hashes)


def join_captions(captions: Iterable[str]) -> str:
    """One text of several captions; each that lacks a sentence end gets a full stop, the others stay as they are."""
    return " ".join(caption if _ends(caption) else f"{caption}." for caption in captions)


def _ends(caption: str) -> bool:
    return caption.rstrip("\"'”’»)] ").endswith((".", "!", "?", "…", "。", "！", "？"))


def _check_columns(table: CaptionTable, columns: Columns, where: str) -> None:
    for column in fields(columns):
        wanted = getattr(columns, column.name)
        if wanted is not None and wanted not in table.columns:
            raise DataError(
                f"{table.path}: there is no column {wanted!r}; it has {table.columns}. "
                f"Set {where}.columns.{column.name} to one of them"
                f"{'' if column.name == 'image' else ', or to null'}."
            )


def _samples(table: CaptionTable, config: FolderConfig, where: str, skipped: Skipped, named: set[str]) -> list[Sample]:
    """Gathers the rows of each image, in the order of the table. `named` collects every image that a row names."""
    columns, samples = config.columns, {}
    for row, values in table.rows:
        image = _word(values.get(columns.image))
        if not image:
            skipped.note("", row, "no image named", f"the column {columns.image!r} is empty")
            continue
        path = posixpath.normpath(posixpath.join(config.images, image))
        if path.startswith(("/", "../")) or path == "..":
            skipped.note(image, row, "path outside the data root", f"{image} leaves the folder {config.root}")
            continue
        named.add(path)
        split = _split(values, columns, table, row, where)
        sample = samples.get(path)
        if sample is None:
            given = _word(values.get(columns.id)) if columns.id else ""
            plain = posixpath.normpath(image)
            image_id = given or plain.removesuffix(posixpath.splitext(plain)[1])
            sample = samples[path] = Sample(image_id, path, split, row=row)
        elif split != sample.split:
            raise DataError(
                f"{table.path}: {image} is in the split {sample.split!r} in row {sample.row} and {split!r} in row {row}"
            )
        _add_captions(sample, values, columns, row, skipped)
    return list(samples.values())


def _split(values: dict[str, Any], columns: Columns, table: CaptionTable, row: int, where: str) -> str | None:
    if columns.split is None:
        return None
    split = _word(values.get(columns.split))
    if split not in SPLITS:
        raise DataError(
            f"{table.path}: row {row} has {split!r} in the column {columns.split!r}; expected one of {', '.join(SPLITS)}. "
            f"Mend the table, or set {where}.columns.split to null to draw the splits."
        )
    return split


def _add_captions(sample: Sample, values: dict[str, Any], columns: Columns, row: int, skipped: Skipped) -> None:
    long_caption = values.get(columns.long_caption) if columns.long_caption else None
    has_long = False
    for text, detail in _texts([long_caption]):
        has_long = bool(text)
        if detail:
            skipped.note(sample.image_id, row, "caption is not text", detail)
        elif text and not sample.long_caption:
            sample.long_caption = text
        elif text and text != sample.long_caption:
            skipped.note(sample.image_id, row, "second long caption", text[:80])
    if columns.caption is None:
        return
    cell = values.get(columns.caption)
    for text, detail in _texts(cell if isinstance(cell, list) else [cell]):
        if detail:
            skipped.note(sample.image_id, row, "caption is not text", detail)
        elif not text:
            if not has_long:
                skipped.note(sample.image_id, row, "empty caption")
        elif text in sample.captions:
            skipped.note(sample.image_id, row, "duplicate caption", text[:80])
        else:
            sample.captions.append(text)


def _texts(cells: list[Any]) -> Iterator[tuple[str, str]]:
    """(text, complaint) of each cell; an empty or missing cell is an empty text."""
    for cell in cells:
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            yield "", ""
        elif isinstance(cell, str):
            # Half a surrogate pair, which JSON can hold, cannot be stored.
            yield storable(cell).replace("\0", "").strip(), ""
        else:
            yield "", f"{cell!r} is {type(cell).__name__}"[:80]


def _word(cell: Any) -> str:
    """A name or number of the table as text; "" for none."""
    return "" if isinstance(cell, dict | list) else next(_texts([str(cell) if isinstance(cell, int) else cell]))[0]


def _with_captions(samples: Iterable[Sample], columns: Columns, skipped: Skipped) -> Iterator[Sample]:
    for sample in samples:
        if columns.long_caption is None:
            sample.long_caption = join_captions(sample.captions)
        if sample.long_caption:
            yield sample
        elif sample.captions:
            skipped.note(sample.image_id, sample.row, "no long caption", f"no row of {sample.image_path} has one")
        else:
            skipped.note(
                sample.image_id, sample.row, "no caption", f"no row of {sample.image_path} has a caption that can be used"
            )


def image_files(root: Path, images: str) -> list[str]:
    """Every image file in or below the folder of images, hidden ones apart, in order; paths as in `image_path`."""
    found = []
    for folder, folders, files in os.walk(root / images, followlinks=False):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES:
                found.append(posixpath.normpath(os.path.relpath(Path(folder) / file, root).replace(os.sep, "/")))
    return found


def assign_splits(rows: list[dict[str, Any]], seed: int, fractions: Fractions, given: bool = False) -> list[str]:
    """Fills in the column `split`; images of the same content get the split of the first. Returns notes for the log.

    given: the splits are the user's, so that each of them is expected to have images.
    """
    notes, split_of, moved, copies = [], {}, 0, 0
    for row in rows:
        content = row["content_hash"]
        copies += content in split_of
        wanted = row["split"] or draw_split(content, seed, fractions)
        row["split"] = split_of.setdefault(content, wanted)
        moved += row["split"] != wanted
    if copies:
        notes.append(
            f"{copies} images are copies of another; copies stay in one split ({moved} were moved to the split of the first)"
        )
    counts = Counter(row["split"] for row in rows)
    for split in SPLITS:
        if not counts[split] and (given or getattr(fractions, split) > 0):
            notes.append(f"no image fell into the split {split!r}")
    return notes


def draw_split(content: str, seed: int, fractions: Fractions) -> str:
    """The split of an image, from its content and the seed alone."""
    drawn = draw(content, seed)
    if drawn < fractions.train:
        return "train"
    # compared with 1 - test, so that rounding never gives an image to a split of fraction 0
    return "test" if drawn >= 1.0 - fractions.test and fractions.test > 0 else "val" if fractions.val > 0 else "train"


def _reasons(skipped: Skipped) -> str:
    first: dict[str, dict[str, Any]] = {}
    counts = Counter(entry["reason"] for entry in skipped)
    for entry in skipped:
        first.setdefault(entry["reason"], entry)
    return (
        " ".join(
            f"{reason}: {count} (first: {first[reason]['sample']} row {first[reason]['row']} {first[reason]['detail']})."
            for reason, count in counts.most_common()
        )
        or "The table has no rows."
    )
