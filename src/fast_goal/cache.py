"""Results that are kept by what they were made from: embeddings, detections and sentence bounds, in SQLite.

One database for each model, detector or splitter, named by its digest, under .fast_goal/embeddings/; within it a row is
found by the content of the image or text alone. Values come back to the last bit as they were put in, so that a result
is the same with and without the cache. Nothing here is precious: a damaged file or row is computed again, a disk that
is full costs the cache and not the run. To free the space, delete the folder.

`K` boxes, `D` embedding width, `S` sentences.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

VERSION = 1  # of the tables; a file of another version is moved aside
BUSY_SECONDS = 60  # how long a writer waits for another process
_AT_ONCE = 500  # keys in one query; SQLite takes 999 at least
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

_log = logging.getLogger(__name__)
Row = tuple[bytes, bytes, bytes]  # key, head, body
T = TypeVar("T")


class Store:
    """Tables of rows (key, head, body) in one SQLite file; threads and processes may share it.

    `tables` says of each whether a key has one row (a later one replaces it) or collects several. What cannot be written
    is counted in `lost` and warned of once; what cannot be read counts as not there.
    """

    def __init__(self, path: Path | str, tables: Mapping[str, bool]):
        self.path, self._tables = Path(path), dict(tables)
        self.lost = 0  # rows
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._attempt(self._open, None)

    def get(self, table: str, keys: Iterable[bytes]) -> dict[bytes, list[tuple[bytes, bytes]]]:
        """The sound rows (head, body) of each key that has any, the oldest first."""
        wanted = list(dict.fromkeys(keys))
        found: dict[bytes, list[tuple[bytes, bytes]]] = {}

        def read(connection: sqlite3.Connection) -> None:
            found.clear()
            for start in range(0, len(wanted), _AT_ONCE):
                part = wanted[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, head, body, checksum FROM {table} WHERE key IN ({marks}) ORDER BY rowid"
                for key, head, body, checksum in connection.execute(query, part):
                    if _checksum(key, head, body) == checksum:
                        found.setdefault(key, []).append((head, body))

        self._attempt(lambda: read(self._connection) if self._connection else None, found.clear)
        return found

    def add(self, table: str, rows: Sequence[Row]) -> None:
        """Adds the rows in one transaction, so that all of them are there or none."""
        if not rows:
            return
        values = [(key, head, body, _checksum(key, head, body)) for key, head, body in rows]

        def write() -> bool:
            if self._connection is None:
                return False
            with self._connection as transaction:
                transaction.execute("BEGIN IMMEDIATE")
                transaction.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", values)
            return True

        if not self._attempt(write, None):
            self.lost += len(rows)

    def close(self) -> None:
        """Closes the file. Rows that were lost are warned of with their number."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
        if self.lost:
            _log.warning("%s: %d results could not be kept; another run will compute them again.", self.path, self.lost)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # isolation_level None: transactions are begun and ended here and nowhere else
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        try:
            _retried(lambda: connection.execute("PRAGMA journal_mode = WAL"))  # this one does not wait by itself
            connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last rows, never the file
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"version {version}, expected {VERSION}")
            with connection as transaction:
                transaction.execute("BEGIN IMMEDIATE")
                for table, unique in self._tables.items():
                    transaction.execute(
                        f"CREATE TABLE IF NOT EXISTS {table} "
                        "(key BLOB NOT NULL, head BLOB NOT NULL, body BLOB NOT NULL, checksum INTEGER NOT NULL)"
                    )
                    kind = "UNIQUE INDEX" if unique else "INDEX"
                    transaction.execute(f"CREATE {kind} IF NOT EXISTS {table}_key ON {table} (key)")
                transaction.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _attempt(self, action: Callable[[], T], undo: Callable[[], None] | None) -> T | None:
        """The action's result; None where the file failed, after what can be done about it."""
        with self._lock:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if _code(error) in _DAMAGED:
                    self._replace(error)
                elif _code(error) not in _BUSY:  # no space, no permission, a disk that fails
                    self._give_up(error)
            except sqlite3.DatabaseError as error:
                self._replace(error)
            except OSError as error:
                self._give_up(error)
            if undo is not None:
                undo()
            return None

    def _replace(self, error: Exception) -> None:
        """Moves a damaged file aside and begins a new one."""
        self._drop()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        _log.warning("%s is damaged (%s): moved to %s and begun anew.", self.path, error, aside.name)
        try:
            self.path.rename(aside)
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # another process was faster
        except OSError as failure:
            self._give_up(failure)
            return
        try:
            self._open()
        except (sqlite3.Error, OSError) as failure:
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        self._drop()
        _log.warning("%s cannot be used (%s): the run goes on without it.", self.path, error)

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class EmbeddingCache:
    """The embeddings of one model: of crops by the image's content and the integer pixel box, and of sentences."""

    def __init__(self, folder: Path | str, digest: str):
        self.store = Store(Path(folder) / f"model-{digest}.sqlite", {"crops": False, "sentences": True})

    def crops(self, images: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """image (its content hash and how it was decoded) -> boxes int32 [K, 4], embeddings float32 [K, D]. A box that
        two processes embedded stands in it twice; the first holds."""
        names = {_key(image): image for image in images}
        result = {}
        for key, rows in self.store.get("crops", names).items():
            boxes = np.concatenate([np.frombuffer(head, np.int32).reshape(-1, 4) for head, _ in rows])
            parts = [np.frombuffer(body, np.float32).reshape(len(head) // 16, -1) for head, body in rows]
            result[names[key]] = boxes, np.concatenate(parts)
        return result

    def add_crops(self, rows: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> None:
        """Adds (image, boxes, embeddings); boxes that the image has already are to be left out."""
        self.store.add(
            "crops",
            [(_key(image), _bytes(boxes, np.int32), _bytes(values, np.float32)) for image, boxes, values in rows],
        )

    def sentences(self, texts: Iterable[str]) -> dict[str, tuple[np.ndarray, bool]]:
        """text -> embedding float32 [D], and whether the text was longer than the model reads."""
        names = {_key(text): text for text in texts}
        found = self.store.get("sentences", names)
        return {names[key]: (np.frombuffer(rows[-1][1], np.float32), rows[-1][0] == b"1") for key, rows in found.items()}

    def add_sentences(self, rows: Iterable[tuple[str, np.ndarray, bool]]) -> None:
        """Adds (text, embedding, truncated)."""
        self.store.add(
            "sentences", [(_key(text), b"1" if cut else b"0", _bytes(value, np.float32)) for text, value, cut in rows]
        )


class DetectionCache:
    """What one detector, thresholds included, found in images, by their content."""

    def __init__(self, folder: Path | str, digest: str):
        self.store = Store(Path(folder) / f"detector-{digest}.sqlite", {"detections": True})

    def detections(self, images: Iterable[str]) -> dict[str, tuple[np.ndarray, list[str], np.ndarray]]:
        """image -> boxes float64 [K, 4], labels, scores float64 [K]."""
        names = {_key(image): image for image in images}
        result = {}
        for key, rows in self.store.get("detections", names).items():
            head, body = rows[-1]
            values = np.frombuffer(body, np.float64).reshape(-1, 5)
            result[names[key]] = values[:, :4].copy(), json.loads(head), values[:, 4].copy()
        return result

    def add_detections(self, rows: Iterable[tuple[str, np.ndarray, list[str], np.ndarray]]) -> None:
        """Adds (image, boxes, labels, scores)."""
        made = []
        for image, boxes, labels, scores in rows:
            values = np.concatenate([np.reshape(boxes, (-1, 4)), np.reshape(scores, (-1, 1))], axis=1)
            made.append((_key(image), json.dumps(labels).encode(), _bytes(values, np.float64)))
        self.store.add("detections", made)


class SplitCache:
    """Where the sentences of captions start and end, as one version of the splitter sees it."""

    def __init__(self, folder: Path | str, digest: str):
        self.store = Store(Path(folder) / f"sentences-{digest}.sqlite", {"spans": True})

    def spans(self, captions: Iterable[str]) -> dict[str, np.ndarray]:
        """caption -> int32 [S, 2], start and end of each sentence in characters."""
        names = {_key(caption): caption for caption in captions}
        found = self.store.get("spans", names)
        return {names[key]: np.frombuffer(rows[-1][1], np.int32).reshape(-1, 2) for key, rows in found.items()}

    def add_spans(self, rows: Iterable[tuple[str, np.ndarray]]) -> None:
        """Adds (caption, spans)."""
        self.store.add("spans", [(_key(caption), b"", _bytes(spans, np.int32)) for caption, spans in rows])


def _retried(action: Callable[[], object]) -> None:
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            action()
            return
        except sqlite3.OperationalError as error:
            if _code(error) not in _BUSY or time.monotonic() > end:
                raise
            time.sleep(0.02)


def _key(text: str) -> bytes:
    # surrogatepass: a caption may hold half a character pair, which is no UTF-8
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _bytes(values: np.ndarray, kind: type) -> bytes:
    return np.ascontiguousarray(values, dtype=kind).tobytes()


def _checksum(key: bytes, head: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(head, zlib.crc32(key)))


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits tell variants apart
