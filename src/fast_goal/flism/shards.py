"""The finished parts of a FLISM run on disk, so that a killed run goes on where it stopped.

A shard is three tables and a mark (JSON: the positions of its images in the run's order, and counts). The mark is
written last: tables without one are the leavings of a kill, and are written over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, read_table, write_table
from fast_goal.errors import DataError
from fast_goal.files import read_json, write_json

SCHEMAS = {"regions": REGIONS, "pairs": PAIRS, "skipped": SKIPPED}


@dataclass
class Shard:
    """The result for some images: their positions in the run's order, the tables by name, and summed counts."""

    positions: list[int]
    tables: dict[str, pd.DataFrame]
    counts: dict[str, float]


class ShardStore:
    """The shards of one run, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self) -> list[Shard]:
        """The finished shards, in the order of their images. One that cannot be read counts as not finished."""
        shards = []
        for mark in sorted(self.folder.glob("shard-*.json")):
            try:
                content: dict[str, Any] = read_json(mark)
                tables = {name: read_table(self._table(mark.stem, name), schema) for name, schema in SCHEMAS.items()}
                shards.append(Shard(content["positions"], tables, content["counts"]))
            except (DataError, ValueError, KeyError, OSError):
                mark.unlink(missing_ok=True)
        return shards

    def discard(self, shard: Shard) -> None:
        """Makes a shard unfinished again."""
        self._mark(shard.positions).unlink(missing_ok=True)

    def save(self, positions: list[int], rows: dict[str, list[dict[str, Any]]], counts: dict[str, float]) -> Shard:
        """Writes a shard, its mark last, and returns it. Raises DataError where it cannot be written (disk full)."""
        mark = self._mark(positions)
        stem = mark.stem
        try:
            tables = {}
            for name, schema in SCHEMAS.items():
                write_table(self._table(stem, name), rows[name], schema)
                tables[name] = read_table(self._table(stem, name), schema)
            write_json(mark, {"positions": positions, "counts": counts})
        except OSError as error:
            raise DataError(
                f"{self.folder / stem}: cannot be written ({error.strerror or error}). Free some space and run the step again: "
                "it goes on after the last finished shard."
            ) from error
        return Shard(positions, tables, counts)

    def _mark(self, positions: list[int]) -> Path:
        return self.folder / f"shard-{positions[0]:08d}.json"

    def _table(self, stem: str, name: str) -> Path:
        return self.folder / f"{stem}.{name}.parquet"
