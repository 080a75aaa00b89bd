"""Files written so that a kill, a full disk or a second reader never meets half of one."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it takes the name `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path | str) -> Iterator[Path]:
    """Yields an empty temporary folder beside `folder`; it takes that name, and the place of an older folder, only when the
    block ends without an error. What a killed writer left beside it is removed."""
    folder = Path(folder)
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if leftover.suffix in (".tmp", ".old"):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Writes indented JSON atomically, keys in the order given; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def digest(value: Any, length: int = 16) -> str:
    """A short stable hash of a JSON-able value: the name of a cache entry or of a resume state."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: Path | str, length: int = 16) -> str:
    """A short SHA-256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:length]


def tree_digest(folder: Path | str, keep: Callable[[Path], bool] = lambda path: True, length: int = 16) -> str:
    """A short SHA-256 over the names and bytes of the files below `folder`, in name order."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and keep(path))
    return digest([[path.relative_to(folder).as_posix(), file_digest(path)] for path in paths], length)
