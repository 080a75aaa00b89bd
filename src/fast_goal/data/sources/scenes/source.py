"""The data sources `scenes` and `rich_scenes`: draw the images of all splits and hand over their captions and true boxes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fast_goal.config import number, to_dict
from fast_goal.data.sources import Loaded, source
from fast_goal.data.sources.scenes.labels import classes
from fast_goal.data.sources.scenes.masks import segments
from fast_goal.data.sources.scenes.samples import MASKS_FOLDER, SPLIT_NUMBERS, STYLES, make_samples
from fast_goal.files import atomic_path, digest, read_json, tree_digest, write_text
from fast_goal.progress import Progress

CHUNK = 50  # indices a process draws at a time
WORTH_PROCESSES = 400  # indices; fewer are drawn sooner than a second process starts

TABLES = ("records", "truth", "objects", "choices", "labels", "masks")
Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class ScenesConfig:
    """The section of the data set. `val` and `test` count scenes; each has a twin, so they give twice as many images."""

    seed: int = number(0)
    image_size: int = number(32)  # pixels
    pretrain: int = number(0)
    train: int = number(0)
    val: int = number(0)
    test: int = number(0)


@source("scenes", ScenesConfig)
def load(config: ScenesConfig, name: str, folder: Path) -> Loaded:
    """Draws the data set into `folder/<split>/<image_id>.png`, its masks into `folder/masks/<suite>/<image_id>.png`.

    What is drawn depends on `config` alone (its own seed, not the run's `seed`), to the byte. Images are written
    atomically; a killed run goes on where it stopped, a finished one is drawn anew, which takes no longer than checking it.
    Other files in these folders are removed. An image that equals an earlier one is left out, counted as skipped.
    """
    return draw_all(config, name, folder, min(os.cpu_count() or 1, 16))


@source("rich_scenes", ScenesConfig)
def load_rich(config: ScenesConfig, name: str, folder: Path) -> Loaded:
    """As `load`, with more shapes, colours, patterns, backgrounds, relations, objects and ways to say it."""
    return draw_all(config, name, folder, min(os.cpu_count() or 1, 16), "rich_scenes")


def draw_all(config: ScenesConfig, name: str, folder: Path, processes: int, source: str = "scenes") -> Loaded:
    """As `load`, on `processes` processes; their number does not change the result. `source`: one of `samples.STYLES`."""
    # Test first: of two equal images the one that is kept is never the one in a training split.
    splits = sorted(SPLIT_NUMBERS, key=SPLIT_NUMBERS.__getitem__, reverse=True)
    chunks = [
        (split, range(start, min(start + CHUNK, getattr(config, split))))
        for split in splits
        for start in range(0, getattr(config, split), CHUNK)
    ]
    total = sum(len(indices) for _, indices in chunks)
    rows: Rows = {table: [] for table in TABLES}
    drawn_before = folder / f".drawn-{digest([to_dict(config), source, tree_digest(Path(__file__).parent, _is_code)])}"
    for other in set(folder.glob(".drawn-*")) - {drawn_before}:
        shutil.rmtree(other)
    work = partial(_draw_chunk, config.seed, config.image_size, folder, source, drawn_before)
    with Progress(f"drawing {name}", total, "scenes") as progress, _mapper(processes if total >= WORTH_PROCESSES else 1) as run:
        for (_, indices), drawn in zip(chunks, run(work, chunks), strict=True):
            for table, values in drawn.items():
                rows[table] += values
            progress.update(len(indices))
    rows, skipped = drop_repeated(rows)
    kept = _files(folder, rows)
    for place in (*splits, f"{MASKS_FOLDER}/*"):
        for path in folder.glob(f"{place}/*"):  # also what a killed run left half written
            if path not in kept:
                path.unlink()
    shutil.rmtree(drawn_before, ignore_errors=True)
    return Loaded(
        root=folder,
        rows=rows["records"],
        skipped=skipped,
        truth=rows["truth"],
        objects=rows["objects"],
        choices=rows["choices"] or None,
        labels=rows["labels"] or None,
        classes=classes(STYLES[source][0]) if rows["labels"] else {},
        masks=rows["masks"] or None,
        segments=segments(STYLES[source][0]) if rows["masks"] else {},
    )


def drop_repeated(rows: Rows) -> tuple[Rows, list[dict[str, Any]]]:
    """Leaves out every image that equals an earlier one, with its rows in the other tables; rows of SKIPPED say which."""
    first: dict[str, str] = {}
    skipped = []
    for record in rows["records"]:
        original = first.setdefault(record["content_hash"], record["image_id"])
        if original != record["image_id"]:
            sample = {"sample": record["image_id"], "row": -1, "step": "download"}
            skipped.append(sample | {"reason": "duplicate image", "detail": f"the same image as {original}"})
    gone = {row["sample"] for row in skipped}
    return {table: [row for row in values if row["image_id"] not in gone] for table, values in rows.items()}, skipped


@contextmanager
def _mapper(processes: int) -> Iterator[Any]:
    """A `map` that keeps the order, in this process or over several."""
    if processes <= 1:
        yield map
        return
    # Not forked: the caller may have threads (of torch), which a fork leaves in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _draw_chunk(
    seed: int, image_size: int, folder: Path, source: str, drawn_before: Path, chunk: tuple[str, Iterable[int]]
) -> Rows:
    """Draws a chunk, or takes the rows of one that a killed run has drawn: their file is written after the images."""
    split, indices = chunk
    mark = drawn_before / f"{split}-{next(iter(indices)):08d}.json"
    if mark.exists():
        found: Rows = read_json(mark)
        if all(path.exists() for path in _files(folder, found)):
            return found
    rows: Rows = {table: [] for table in TABLES}
    for index in indices:
        for sample in make_samples(seed, split, index, image_size, source):
            with atomic_path(folder / sample.record["image_path"]) as path:
                path.write_bytes(sample.png)
            for place, png in sample.mask_files.items():
                with atomic_path(folder / place) as path:
                    path.write_bytes(png)
            rows["records"].append(sample.record)
            for table in TABLES[1:]:
                rows[table] += getattr(sample, table)
    write_text(mark, json.dumps(rows))
    return rows


def _files(folder: Path, rows: Rows) -> set[Path]:
    """The files that the rows are about."""
    paths = [row["image_path"] for row in rows["records"]] + [row["mask_path"] for row in rows["masks"]]
    return {folder / path for path in paths}


def _is_code(path: Path) -> bool:
    return path.suffix == ".py"
