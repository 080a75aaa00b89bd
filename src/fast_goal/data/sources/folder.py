"""A user's own folder of images with a table of captions (CSV, JSON, JSONL or parquet).

One or more rows per image: short captions are kept as a list; the long caption has a column of its own or is made of
the short ones. What cannot be used is skipped with its reason; a table that cannot be understood stops the step.
"""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fast_goal.config import number
from fast_goal.data.caption_table import CaptionTable, read_caption_table
from fast_goal.data.images import SUFFIXES, open_image
from fast_goal.data.records import UNNAMED
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import file_digest, write_json
from fast_goal.progress import Progress

SPLITS = ("train", "val", "test")
_CHUNK = 512  # images checked between two collections of results; bounds the queue of a large folder


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
            raise ConfigError("columns.caption and columns.long_caption are both null: there would be no captions")


@dataclass(frozen=True)
class Fractions:
    """Shares of the images; they add up to 1."""

    train: float = number(0, 1)
    val: float = number(0, 1)
    test: float = number(0, 1)

    def __post_init__(self) -> None:
        total = self.train + self.val + self.test
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ConfigError(f"fractions: train {self.train} + val {self.val} + test {self.test} = {total:g}, expected 1")


@dataclass(frozen=True)
class FolderConfig:
    """`images` and `captions` are below `root`; the table's image column names files below `images`."""

    root: str
    images: str
    captions: str
    columns: Columns
    fractions: Fractions
    seed: int = number(0)  # of the splits


@dataclass
class _Sample:
    """The rows of one image."""

    path: str  # below root, with forward slashes
    image_id: str
    row: int
    split: str | None = None
    captions: list[str] = field(default_factory=list)
    long_caption: str = ""


class _Skipped(list):
    """The rows of the table `skipped`."""

    def note(self, sample: str, row: int, reason: str, detail: str = "") -> None:
        # a file's name may be no UTF-8, which no table can hold
        sample = sample.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        self.append({"sample": sample, "row": row, "step": "download", "reason": reason, "detail": detail})


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
    skipped = _Skipped()
    for row, detail in table.bad:
        skipped.note("", row, "unreadable row", detail)

    named: set[str] = set()
    samples = _samples(table, config, where, skipped, named)
    samples = list(_with_captions(samples, config.columns, skipped))
    samples = list(_unique_ids(samples, skipped))
    rows = list(_checked(samples, root, name, skipped))
    for path in _unnamed(root, config.images, named):
        skipped.note(path, -1, UNNAMED, "no row of the table names this image")
    if not rows:
        raise DataError(f"{where}: none of the images can be used. {_reasons(skipped)}")
    notes = _assign_splits(rows, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "SOURCE.json", {"source": "folder", "root": config.root, "images": config.images, "captions": config.captions}
    )
    return Loaded(root=root, rows=rows, skipped=list(skipped), notes=notes)


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


def _samples(table: CaptionTable, config: FolderConfig, where: str, skipped: _Skipped, named: set[str]) -> list[_Sample]:
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
            sample = samples[path] = _Sample(path, given or plain.removesuffix(posixpath.splitext(plain)[1]), row, split)
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


def _add_captions(sample: _Sample, values: dict[str, Any], columns: Columns, row: int, skipped: _Skipped) -> None:
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
            yield cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "").strip(), ""
        else:
            yield "", f"{cell!r} is {type(cell).__name__}"[:80]


def _word(cell: Any) -> str:
    """A name or number of the table as text; "" for none."""
    return "" if isinstance(cell, dict | list) else next(_texts([str(cell) if isinstance(cell, int) else cell]))[0]


def _with_captions(samples: Iterable[_Sample], columns: Columns, skipped: _Skipped) -> Iterator[_Sample]:
    for sample in samples:
        if columns.long_caption is None:
            sample.long_caption = join_captions(sample.captions)
        if sample.long_caption:
            yield sample
        elif sample.captions:
            skipped.note(sample.image_id, sample.row, "no long caption", f"no row of {sample.path} has one")
        else:
            skipped.note(sample.image_id, sample.row, "no caption", f"no row of {sample.path} has a caption that can be used")


def _unique_ids(samples: Iterable[_Sample], skipped: _Skipped) -> Iterator[_Sample]:
    first: dict[str, _Sample] = {}
    for sample in samples:
        other = first.setdefault(sample.image_id, sample)
        if other is sample:
            yield sample
        else:
            detail = f"the id {sample.image_id!r} belongs to {other.path} (row {other.row})"
            skipped.note(sample.path, sample.row, "duplicate id", detail)


def _checked(samples: list[_Sample], root: Path, name: str, skipped: _Skipped) -> Iterator[dict[str, Any]]:
    """Decodes every image in a pool of threads; yields rows of RECORDS in the order of the samples."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, Progress(f"download {name}", len(samples), "images") as progress:
        for begin in range(0, len(samples), _CHUNK):
            chunk = samples[begin : begin + _CHUNK]
            for sample, result in zip(chunk, pool.map(lambda sample: _inspect(root / sample.path), chunk), strict=True):
                progress.update()
                if len(result) == 2:
                    skipped.note(sample.image_id, sample.row, *result)
                    continue
                width, height, content_hash = result
                yield {
                    "image_id": sample.image_id,
                    "image_path": sample.path,
                    "width": width,
                    "height": height,
                    "split": sample.split,
                    "long_caption": sample.long_caption,
                    "captions": sample.captions,
                    "source": "folder",
                    "content_hash": content_hash,
                }


def _inspect(path: Path) -> tuple[str, str] | tuple[int, int, str]:
    """(width, height, hash) of an image that decodes, else (reason, detail)."""
    try:
        if not path.is_file():
            return "image missing", f"{path} does not exist"
        width, height = open_image(path).size
        return width, height, file_digest(path, length=64)
    except DataError as error:
        return "unreadable image", str(error)
    except (OSError, ValueError) as error:  # a name too long or with odd characters, no permission, a failing disk
        return "unreadable image", f"{path}: {error}"


def _unnamed(root: Path, images: str, named: set[str]) -> list[str]:
    """Image files below the folder of images that are not in `named`, hidden ones apart; paths as in `image_path`."""
    found = []
    for folder, folders, files in os.walk(root / images, followlinks=False):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES:
                path = posixpath.normpath(os.path.relpath(Path(folder) / file, root).replace(os.sep, "/"))
                if path not in named:
                    found.append(path)
    return found


def _assign_splits(rows: list[dict[str, Any]], config: FolderConfig) -> list[str]:
    """Fills in the column `split`; images of the same content get the split of the first. Returns notes for the log."""
    notes, split_of, moved, copies = [], {}, 0, 0
    for row in rows:
        content = row["content_hash"]
        copies += content in split_of
        wanted = row["split"] or _draw(content, config.seed, config.fractions)
        row["split"] = split_of.setdefault(content, wanted)
        moved += row["split"] != wanted
    if copies:
        notes.append(
            f"{copies} images are copies of another; copies stay in one split ({moved} were moved to the split of the first)"
        )
    counts = Counter(row["split"] for row in rows)
    for split in SPLITS:
        if not counts[split] and (config.columns.split is not None or getattr(config.fractions, split) > 0):
            notes.append(f"no image fell into the split {split!r}")
    return notes


def _draw(content: str, seed: int, fractions: Fractions) -> str:
    number_of = int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()[:8], "big") / 2**64
    if number_of < fractions.train:
        return "train"
    # compared with 1 - test, so that rounding never gives an image to a split of fraction 0
    return "test" if number_of >= 1.0 - fractions.test and fractions.test > 0 else "val" if fractions.val > 0 else "train"


def _reasons(skipped: _Skipped) -> str:
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
