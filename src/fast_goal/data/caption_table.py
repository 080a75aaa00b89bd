"""Reads a user's table of captions: CSV, JSON, JSONL or parquet, into plain rows with their place in the file."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_goal.errors import DataError

KINDS = (".csv", ".json", ".jsonl", ".parquet")


@dataclass
class CaptionTable:
    """rows: (row, values) with the line number of a CSV or JSONL file, else the record's number from 1.
    bad: (row, detail) of rows that could not be read. columns: in the order of the file."""

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)


def read_caption_table(path: Path | str) -> CaptionTable:
    """Reads the table, its kind by its suffix. Raises DataError, with file, line and fix, for a file that is missing,
    empty, not UTF-8 (or UTF-16 with a byte order mark), or not of its kind."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise DataError(f"{path}: a table of captions ends in {', '.join(KINDS)}")
    if not path.is_file():
        raise DataError(f"{path}: the table of captions does not exist")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the table of captions is empty (0 bytes)")
    if kind == ".parquet":
        return _parquet(path)
    return {".csv": _csv, ".json": _json, ".jsonl": _jsonl}[kind](path, _text(path))


def _text(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind its mark
        at = error.start + (3 if encoding == "utf-8-sig" and data.startswith(codecs.BOM_UTF8) else 0)
        line = data.count(b"\n", 0, at) + 1
        raise DataError(
            f"{path}: line {line} is not {encoding.removesuffix('-sig').upper()} (byte {at} of the file is 0x{data[at]:02x}). "
            f"Save it as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > {path.stem}_utf8{path.suffix}"
        ) from None


def _csv(path: Path, text: str) -> CaptionTable:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a caption of 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    table = CaptionTable(path, [])
    begin = 1
    try:
        for values in reader:
            line, begin = begin, reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = table.columns = [name.strip() for name in values]
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise DataError(f"{path}: the header names the columns {twice} more than once")
            elif len(values) != len(header):
                table.bad.append(
                    (line, f"{len(values)} fields instead of {len(header)}: a text with a comma needs double quotes around it")
                )
            else:
                table.rows.append((line, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"{path}: the row that begins in line {begin} is not valid CSV ({error}). "
            'Check its double quotes: a text is "quoted", and a quote in it is doubled ("").'
        ) from None
    if header is None:
        raise DataError(f"{path}: the table of captions has no header line")
    return table


def _json(path: Path, text: str) -> CaptionTable:
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON: {error}. One object per line belongs in a file that ends in .jsonl."
        ) from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of objects, one per image or caption, found {type(records).__name__}")
    return _objects(path, enumerate(records, 1))


def _jsonl(path: Path, text: str) -> CaptionTable:
    broken: list[tuple[int, str]] = []
    records = []
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other line separators
        if not content.strip():
            continue
        try:
            records.append((line, json.loads(content)))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            broken.append((line, f"not valid JSON: {error}"))
    table = _objects(path, records)
    table.bad += broken
    return table


def _objects(path: Path, records: Any) -> CaptionTable:
    table = CaptionTable(path, [])
    columns: dict[str, None] = {}
    for row, record in records:
        if isinstance(record, dict):
            columns.update(dict.fromkeys(record))
            table.rows.append((row, record))
        else:
            table.bad.append((row, f"expected an object with named values, found {type(record).__name__}"))
    table.columns = list(columns)
    return table


def _parquet(path: Path) -> CaptionTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from None
    return CaptionTable(path, table.column_names, list(enumerate(table.to_pylist(), 1)))
