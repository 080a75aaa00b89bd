"""The finished parts of FLISM runs on disk, so that a killed run goes on and a grown data set costs only what is new.

A shard is three tables and a mark, a JSON file with what is to be said of each of its images. The mark is written last:
tables without one are the leavings of a kill. An image is known by its fingerprint (id, content, size, caption), not by
its data set or position: it is looked up wherever it was done.

One folder holds the shards of one set of models, settings and code. `prune` removes folders that no run has used for 90
days; embeddings are kept elsewhere (`fast_goal.cache`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, read_table, write_table
from fast_goal.errors import DataError
from fast_goal.files import digest, read_json, write_json, write_text

SCHEMAS = {"regions": REGIONS, "pairs": PAIRS, "skipped": SKIPPED}
FILE_REASONS = ("unreadable image", "changed image")  # of a skipped image: its file may be mended
KEEP_DAYS = 90  # a guess: longer than a study, shorter than a disk
_USED = "used.json"  # in each folder: what it is for; its time says when it was used


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the mark says of an image. `reason`: why it was skipped, or None; `dropped`: detections left out, by reason."""

    fingerprint: str
    image_id: str
    reason: str | None
    sentences: int
    truncated: int
    dropped: dict[str, int]


@dataclass
class Shard:
    """The images of a shard that count, their rows of the three tables, and the seconds that each image took."""

    outcomes: list[Outcome]
    tables: dict[str, pd.DataFrame]
    seconds: float


def fingerprint(image_id: str, content_hash: str, width: int, height: int, caption: str) -> str:
    """What the result for an image depends on, beside models, settings and code."""
    return digest([image_id, content_hash, int(width), int(height), caption], length=24)


class ShardStore:
    """The shards of one key, in a folder of their own."""

    def __init__(self, folder: Path | str, settings: dict[str, Any]):
        self.folder, self._settings = Path(folder), settings

    def load(self, wanted: Collection[str]) -> list[Shard]:
        """The finished work on the images with these fingerprints, each image once.

        A shard that cannot be read counts as not finished. So does an image that was skipped for its file: it may have
        been mended, and to see that is to decode it.
        """
        missing, shards = set(wanted), []
        for mark in sorted(self.folder.glob("shard-*.json")):
            try:
                content = read_json(mark)
                outcomes = [Outcome(**values) for values in content["images"]]
                chosen = [one for one in outcomes if one.fingerprint in missing and one.reason not in FILE_REASONS]
                if not chosen:
                    continue
                tables = {name: read_table(self._table(mark.stem, name), schema) for name, schema in SCHEMAS.items()}
                if len(chosen) < len(outcomes):
                    ids = {one.image_id for one in chosen}
                    for name, table in tables.items():
                        tables[name] = table[table["sample" if name == "skipped" else "image_id"].isin(ids)]
                shards.append(Shard(chosen, tables, content["seconds_per_image"]))
            except (DataError, ValueError, KeyError, TypeError, OSError):
                mark.unlink(missing_ok=True)
                continue
            missing.difference_update(one.fingerprint for one in chosen)
        return shards

    def save(self, outcomes: Sequence[Outcome], tables: dict[str, pd.DataFrame], seconds: float) -> Shard:
        """Writes a shard, its mark last, and returns it. Raises DataError where it cannot be written (disk full)."""
        stem = f"shard-{digest([one.fingerprint for one in outcomes])}"
        per_image = seconds / len(outcomes)
        try:
            for name, schema in SCHEMAS.items():
                write_table(self._table(stem, name), tables[name], schema)
            mark = {"seconds_per_image": per_image, "images": [asdict(one) for one in outcomes]}
            write_text(self.folder / f"{stem}.json", json.dumps(mark))
        except OSError as error:
            raise DataError(
                f"{self.folder / stem}: cannot be written ({error.strerror or error}). Free some space and run the step again: "
                "it goes on after the last finished shard."
            ) from error
        # as a later run will see them
        read = {name: read_table(self._table(stem, name), schema) for name, schema in SCHEMAS.items()}
        return Shard(list(outcomes), read, per_image)

    def touch(self) -> None:
        """Notes that the folder is in use, and by which settings."""
        try:
            write_json(self.folder / _USED, self._settings)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror or error}). Free some space.") from error

    def _table(self, stem: str, name: str) -> Path:
        return self.folder / f"{stem}.{name}.parquet"


def prune(root: Path | str, keep: Iterable[Path] = (), days: float = KEEP_DAYS) -> list[Path]:
    """Removes the folders of shards below `root` that no run has used for `days`; returns them."""
    kept, removed = {Path(path).resolve() for path in keep}, []
    for used in sorted(Path(root).glob(f"*/{_USED}")):
        if used.parent.resolve() in kept or time.time() - used.stat().st_mtime < days * 86400:
            continue
        used.unlink()  # first: a folder half removed is not taken for a whole one
        for mark in used.parent.glob("shard-*.json"):
            mark.unlink()
        shutil.rmtree(used.parent, ignore_errors=True)
        removed.append(used.parent)
    return removed
