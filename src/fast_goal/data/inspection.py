"""Looks at image files: decodes each in full, and takes its size, its content's SHA-256 and its perceptual hash.

What was found is remembered in `.fast_goal/inspection.sqlite` by path, size and time of change, so that a `download` that
was killed goes on where it stopped, and one that is run again only looks at what is new.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fast_goal.data.images import open_image
from fast_goal.errors import DataError
from fast_goal.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

MEMORY = Path(".fast_goal/inspection.sqlite")
_CHUNK = 512  # images between two commits; bounds what a kill loses, and the queue of a large folder


@dataclass(frozen=True)
class Inspected:
    """An image that decodes. width, height: pixels after the EXIF rotation. content_hash: SHA-256 of the file.
    perceptual_hash: 64-bit pHash (ImageHash) as 16 hexadecimal digits."""

    width: int
    height: int
    content_hash: str
    perceptual_hash: str


def inspect_images(paths: Sequence[Path], label: str) -> list[Inspected | tuple[str, str]]:
    """Decodes every image in threads; `label` stands in the progress line.

    For an image that cannot be used there is (reason, detail) instead: `image missing` or `unreadable image`. Only what
    could be used is remembered; the others are looked at again.
    """
    found: list[Inspected | tuple[str, str]] = []
    with (
        _Memory(MEMORY) as memory,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Progress(label, len(paths), "images") as progress,
    ):
        for begin in range(0, len(paths), _CHUNK):
            chunk = paths[begin : begin + _CHUNK]
            keys = [_key(path) for path in chunk]
            known = memory.recall([key for key in keys if key is not None])
            new: dict[tuple[bytes, int, int], Inspected] = {}
            work = [None if key in known else pool.submit(_inspect, path) for path, key in zip(chunk, keys, strict=True)]
            for key, future in zip(keys, work, strict=True):
                result = known[key] if future is None else future.result()
                if future is not None and key is not None and isinstance(result, Inspected):
                    new[key] = result
                found.append(result)
                progress.update()
            memory.keep(new)
    return found


def _key(path: Path) -> tuple[bytes, int, int] | None:
    """What a file is known by; None where there is none. The path as bytes: its name may be no UTF-8."""
    try:
        state = path.stat()
        return os.fsencode(path.absolute()), state.st_size, state.st_mtime_ns
    except (OSError, ValueError):
        return None


def _inspect(path: Path) -> Inspected | tuple[str, str]:
    import imagehash  # brings scipy, which no other step of a GPU machine needs

    try:
        if not path.is_file():
            return "image missing", f"{path} does not exist"
        content = path.read_bytes()
        image = open_image(path, content)
        return Inspected(*image.size, hashlib.sha256(content).hexdigest(), str(imagehash.phash(_reduced(image))))
    except DataError as error:
        return "unreadable image", str(error)
    except (OSError, ValueError) as error:  # a name too long or with odd characters, no permission, a failing disk
        return "unreadable image", f"{path}: {error}"


def _reduced(image: Image.Image) -> Image.Image:
    """A large image by a whole factor smaller, at least 128 pixels a side: pHash shrinks it to 32 anyway, and takes a fifth
    of the time. At most 2 of the 64 bits differed in 80 photographs."""
    factor = min(image.size) // 128
    return image.reduce(factor) if factor > 1 else image


class _Memory:
    """The table of what was found. A database that cannot be used costs time, not the step: it is made anew, or done
    without."""

    def __init__(self, path: Path):
        self._path, self._connection = path, None

    def __enter__(self) -> _Memory:
        try:
            self._connection = self._open()
        except sqlite3.OperationalError:  # locked for long, no permission
            self._connection = None
        except (sqlite3.DatabaseError, OSError):
            try:
                for ending in ("", "-wal", "-shm"):  # an old log would be played into the new file
                    self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
                self._connection = self._open()
            except (sqlite3.Error, OSError):
                self._connection = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._connection is not None:
            self._connection.close()

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=60)
        connection.execute("PRAGMA journal_mode = WAL")
        # a table for each version of what decodes and hashes: the next one may find other values
        self._table = f'"found by Pillow {version("pillow")}, ImageHash {version("ImageHash")}"'
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {self._table} (path BLOB PRIMARY KEY, bytes INTEGER, changed INTEGER, "
            "width INTEGER, height INTEGER, content_hash TEXT, perceptual_hash TEXT) WITHOUT ROWID"
        )
        return connection

    def recall(self, keys: Sequence[tuple[bytes, int, int]]) -> dict[tuple[bytes, int, int] | None, Inspected]:
        """What is known of the files with these keys."""
        if self._connection is None or not keys:
            return {}
        marks = ", ".join("?" * len(keys))
        query = f"SELECT * FROM {self._table} WHERE path IN ({marks})"
        try:
            rows = self._connection.execute(query, [path for path, _, _ in keys]).fetchall()
        except sqlite3.Error:
            return {}
        wanted = set(keys)
        return {tuple(row[:3]): Inspected(*row[3:]) for row in rows if tuple(row[:3]) in wanted}

    def keep(self, new: dict[tuple[bytes, int, int], Inspected]) -> None:
        """Remembers what was found."""
        if self._connection is None or not new:
            return
        rows = [(*key, *astuple(found)) for key, found in new.items()]
        try:
            with self._connection:
                self._connection.executemany(f"INSERT OR REPLACE INTO {self._table} VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error:  # a full disk: what is to be written next will say so
            pass
