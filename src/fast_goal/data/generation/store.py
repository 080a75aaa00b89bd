"""Answers kept as they come: one SQLite file for each model and its settings, by a hash of what was asked about.

A run that was killed goes on where it stopped, and a question that is added costs only itself. The file holds the model's
own words, so other rules of reading them need no new answers. Removing the file asks everything again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from fast_goal.data.generation import Answer
from fast_goal.errors import DataError

_AT_ONCE = 500  # hashes in one look-up; SQLite takes 999 at least
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    content_hash TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, model TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class AnswerStore:
    """`facts` stand in the file for its reader: model, prompt, settings. Several processes may write to one file."""

    def __init__(self, key: str, facts: Mapping[str, str], folder: Path):
        self.path = folder / f"{key}.sqlite"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            # what is committed survives the end of this process; a power cut may cost the last few
            self._connection = sqlite3.connect(self.path, timeout=60)
            self._connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;{_TABLES}")
            with self._connection:
                self._connection.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?)", facts.items())
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, hashes: Iterable[str]) -> dict[str, Answer]:
        """The answers there are for these hashes."""
        wanted, found = list(dict.fromkeys(hashes)), {}
        try:
            for begin in range(0, len(wanted), _AT_ONCE):
                part = wanted[begin : begin + _AT_ONCE]
                places = ", ".join("?" * len(part))
                rows = self._connection.execute(
                    f"SELECT content_hash, text, finish, model FROM answers WHERE content_hash IN ({places})", part
                )
                found |= {content: Answer(_text(text), finish, model) for content, text, finish, model in rows}
            return found
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Adds answers, or replaces them; they are in the file when this returns."""
        rows = [(content, _bytes(answer.text), answer.finish, answer.model) for content, answer in answers.items()]
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path}: {error}. The answers before this one are kept; free some disk space and run again."
            ) from None

    def _unusable(self, error: sqlite3.DatabaseError) -> DataError:
        return DataError(
            f"{self.path}, the answers of a model, cannot be used: {error}. "
            "Free some disk space, or move the file away: what it held is asked again."
        )


def _bytes(text: str) -> str | bytes:
    """SQLite's text is UTF-8; what JSON can hold beyond it (half a surrogate pair) is kept as a blob."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
