"""Publishes a data set with its local pairs, in a layout that others can read; docs/dataset_layout.md describes it.

    README.md, dataset.json, checksums.sha256, skipped.parquet, examples/ (not with `table`)
    data/<split>-00000-of-00003.parquet   or .tar

Layouts: `table` (parquet without the images), `parquet` (with their bytes, as Hugging Face's `datasets` reads them),
`webdataset` (tar shards). The source `glit100k` reads all three back. The same data set gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fast_goal.config import PublishConfig
from fast_goal.data.publication_card import draw_example, write_card
from fast_goal.data.records import PAIRS, RECORDS, SKIPPED, SPLITS, Dataset, write_table
from fast_goal.errors import DataError
from fast_goal.files import file_digest, write_json, write_text
from fast_goal.progress import Progress

FORMAT = "fast_goal dataset 1"
DATASET_FILE, CHECKSUMS_FILE = "dataset.json", "checksums.sha256"
LAYOUTS = {"table": "parquet", "parquet": "parquet", "webdataset": "tar"}  # layout -> ending of its data files
EXAMPLES = 3
GROUP_ROWS, GROUP_BYTES = 256, 64 * 2**20  # of a parquet row group: what is held in memory at once
READ_AHEAD = 64  # images

PAIR = pa.struct([pa.field(name, PAIRS.field(name).type) for name in PAIRS.names if name != "image_id"])
BEST = ("char_start", "char_end", "x1", "y1", "x2", "y2", "kind", "similarity")  # of the best pair, as columns of their own
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # Hugging Face's Image


def publication_schema(layout: str) -> pa.Schema:
    """The columns of the data files. Those of the best pair (`local_sentence` and BEST) are null where there is none;
    `pairs` holds all, best first. `parquet` has the images in `image`; in `webdataset` a row is a JSON object."""
    fields = [pa.field(name, RECORDS.field(name).type, nullable=False) for name in RECORDS.names]
    fields.append(pa.field("local_sentence", pa.string()))
    fields += [pa.field(name, PAIRS.field(name).type) for name in BEST]
    fields.append(pa.field("pairs", pa.list_(PAIR), nullable=False))
    if layout != "parquet":
        return pa.schema(fields)
    # how `datasets` knows that a struct is an image
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    return pa.schema([pa.field("image", IMAGE), *fields], metadata={"huggingface": json.dumps(features)})


def write_publication(
    dataset: Dataset,
    pairs: pd.DataFrame,
    skipped: pd.DataFrame,
    config: PublishConfig,
    folder: Path,
    made: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `folder` anew, all of it or nothing, and returns what stands in its dataset.json.

    pairs: of PAIRS; images without one are published too. skipped: what earlier steps left out; an image whose file is
    gone, cannot be read or has changed since `download` is added to it (in the layout `table` only one that is gone).
    made: how the data set came about, for the card: section -> name -> value.

    Raises DataError for pairs of images that are not in the records or of other captions than theirs, paths that leave the
    data root, a data set of which no image can be published, and a full disk.
    """
    _check(dataset, pairs)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "data").mkdir(parents=True)
        info = _write(dataset, pairs, skipped, config, partial, made or {})
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror or error}). Free some space and run the step again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def _write(
    dataset: Dataset, pairs: pd.DataFrame, skipped: pd.DataFrame, config: PublishConfig, folder: Path, made: Mapping[str, Any]
) -> dict[str, Any]:
    lost: list[dict[str, Any]] = []
    counts = _Counts()
    grouped = _pairs_by_image(pairs)
    files: dict[str, list[str]] = {}
    with Progress(f"publish {dataset.name}", len(dataset.records), "images") as progress:
        for split in SPLITS:
            rows = _rows(dataset, split, grouped, config.layout, lost, progress)
            if written := _write_split(rows, split, config, folder, counts):
                files[split] = written
    if not files:
        first = lost[0]["detail"] if lost else "it has no records"
        raise DataError(f"data set {dataset.name}: there is no image to publish ({len(lost)} skipped; {first})")
    left_out = pd.concat([skipped, pd.DataFrame(lost, columns=SKIPPED.names)], ignore_index=True) if lost else skipped
    write_table(folder / "skipped.parquet", left_out, SKIPPED)
    # what has no images holds no small ones either: it is for images that may not be passed on
    pictures = folder if config.layout != "table" else None
    examples = _examples(dataset, pairs, {row["sample"] for row in lost}, pictures)
    sums = {path: file_digest(folder / path, 64) for written in files.values() for path in written}
    info = {
        "format": FORMAT,
        "name": dataset.name,
        "layout": config.layout,
        "licence": config.licence,
        "source": dataset.source,
        "images": sum(counts.images.values()),
        "pairs": counts.pairs,
        "images_with_pair": counts.paired,
        "short_captions": counts.short,
        "long_captions": counts.long,
        "mean_words_long": round(counts.words / counts.long, 2) if counts.long else 0.0,
        "mean_similarity": round(counts.similarity / counts.paired, 4) if counts.paired else None,
        "pairs_by_kind": dict(sorted(counts.kinds.items())),
        "skipped": len(left_out),
        "skipped_here": len(lost),
        "splits": {split: {"images": counts.images[split], "files": written} for split, written in files.items()},
        "digest": _digest(sums),  # of the data files
        "records_digest": dataset.digest,
        "made": dict(made),
    }
    write_json(folder / DATASET_FILE, info)
    write_card(folder / "README.md", info, publication_schema(config.layout), left_out, examples)
    listed = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sums |= {path: file_digest(folder / path, 64) for path in listed if path not in sums}
    write_text(folder / CHECKSUMS_FILE, "".join(f"{sums[path]}  {path}\n" for path in listed))
    return info


@dataclass
class _Counts:
    images: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    paired: int = 0
    short: int = 0
    long: int = 0
    words: int = 0
    similarity: float = 0.0

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        self.images[split] = self.images.get(split, 0) + 1
        self.short += len(row["captions"])
        if row["long_caption"]:
            self.long += 1
            self.words += len(row["long_caption"].split())
        if row["pairs"]:
            self.paired += 1
            self.similarity += row["similarity"]
            self.pairs += len(row["pairs"])
            self.kinds[row["kind"]] = self.kinds.get(row["kind"], 0) + 1


def _check(dataset: Dataset, pairs: pd.DataFrame) -> None:
    strangers = pairs[~pairs["image_id"].isin(dataset.records["image_id"])]
    if len(strangers):
        raise DataError(
            f"data set {dataset.name}: the pairs speak of image {strangers['image_id'].iloc[0]!r}, which is not in the "
            "records; run the step `flism` again: `dvc repro --force --single-item flism`"
        )
    captions = dict(zip(dataset.records["image_id"], dataset.records["long_caption"], strict=True))
    spans = pairs[["image_id", "char_start", "char_end", "sentence"]].itertuples(index=False, name=None)
    for image_id, start, end, sentence in spans:
        found = captions[image_id][start:end]
        if found != sentence:
            raise DataError(
                f"data set {dataset.name}: image {image_id!r}: its long caption has {found[:80]!r} where the "
                f"pairs have the sentence {sentence[:80]!r}: the captions were changed after FLISM; run the step `flism` "
                "again: `dvc repro --force --single-item flism`"
            )
    for path in dataset.records["image_path"]:
        if not inside(path):
            raise DataError(
                f"data set {dataset.name}: image_path {path!r} leaves the data root, so it cannot stand in a publication"
            )


def inside(path: str) -> bool:
    """Whether a relative path stays below the folder that it is relative to."""
    plain = posixpath.normpath(path)
    return bool(path) and plain == path and not plain.startswith(("/", "../")) and plain not in (".", "..") and "\\" not in path


def _pairs_by_image(pairs: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    columns = [name for name in PAIRS.names if name != "image_id"]
    grouped: dict[str, list[dict[str, Any]]] = {}
    ordered = pairs.sort_values(["image_id", "rank"], kind="stable")
    for image_id, *values in ordered[["image_id", *columns]].itertuples(index=False, name=None):
        grouped.setdefault(image_id, []).append(dict(zip(columns, values, strict=True)))
    return grouped


def _rows(
    dataset: Dataset,
    split: str,
    grouped: Mapping[str, list[dict[str, Any]]],
    layout: str,
    lost: list[dict[str, Any]],
    progress: Progress,
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The rows of a split with their images' bytes, in the order of the records; files are read ahead by threads."""
    records = dataset.split(split)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for begin in range(0, len(records), READ_AHEAD):
            chunk = records.iloc[begin : begin + READ_AHEAD].to_dict("records")
            for record, content in zip(
                chunk, pool.map(lambda row: _content(dataset.path(row), row, layout), chunk), strict=True
            ):
                progress.update()
                if isinstance(content, tuple):
                    reason, detail = content
                    lost.append(
                        {"sample": record["image_id"], "row": -1, "step": "publish", "reason": reason, "detail": detail}
                    )
                    continue
                own = grouped.get(record["image_id"], [])
                best = own[0] if own else {}
                row = {name: record[name] for name in RECORDS.names}
                row["local_sentence"] = best.get("sentence")
                yield row | {name: best.get(name) for name in BEST} | {"pairs": own}, content


def _content(path: Path, record: Mapping[str, Any], layout: str) -> bytes | tuple[str, str]:
    """The image file's bytes, checked against the records; or (reason, detail)."""
    shown = record["image_path"]  # not the path, which is that of a machine
    if layout == "table":
        return b"" if path.is_file() else ("image missing", f"{shown} does not exist")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return "image missing", f"{shown} does not exist"
    except OSError as error:
        return "unreadable image", f"{shown}: {error.strerror or type(error).__name__}"
    if hashlib.sha256(content).hexdigest() != record["content_hash"]:
        return "image changed", f"{shown} is not the file that the step download saw"
    return content


class _Writer(Protocol):
    def add(self, row: dict[str, Any], image: bytes) -> None: ...

    def close(self) -> None: ...


class _ParquetWriter:
    """One parquet file, written in row groups so that only one of them is in memory."""

    def __init__(self, path: Path, layout: str):
        self._schema, self._images = publication_schema(layout), layout == "parquet"
        self._writer = pq.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def add(self, row: dict[str, Any], image: bytes) -> None:
        if self._images:
            row = {"image": {"bytes": image, "path": row["image_path"]}, **row}
        self._rows.append(row)
        self._bytes += len(image)
        if len(self._rows) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0


class _TarWriter:
    """One tar file: `<number>.<ending of the image>` and `<number>.json` for each row. `first`: number of its first row."""

    def __init__(self, path: Path, first: int):
        from webdataset import TarWriter  # imports torch

        self._stream = path.open("wb")
        # times and owners would make the bytes differ
        self._writer = TarWriter(self._stream, user="", group="", mtime=0, encoder=False)
        self._count = first

    def add(self, row: dict[str, Any], image: bytes) -> None:
        ending = PurePosixPath(row["image_path"]).suffix.lower().lstrip(".") or "img"
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
        # the key counts: an image's id may hold dots and slashes, which mean something in a WebDataset
        self._writer.write({"__key__": f"{self._count:09d}", ending: image, "json": text.encode()})
        self._count += 1

    def close(self) -> None:
        self._writer.close()
        self._stream.close()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a row")


def _write_split(
    rows: Iterable[tuple[dict[str, Any], bytes]], split: str, config: PublishConfig, folder: Path, counts: _Counts
) -> list[str]:
    """Writes the data files of a split and returns their paths below `folder`. Their names say how many there are, which
    is known at the end."""
    ending = LAYOUTS[config.layout]
    parts: list[Path] = []
    writer: _Writer | None = None
    in_part = 0
    try:
        for row, image in rows:
            if writer is None or in_part == config.shard_size:
                if writer is not None:
                    writer.close()
                    writer = None
                parts.append(folder / "data" / f"{split}-{len(parts):05d}.part")
                if config.layout == "webdataset":
                    writer = _TarWriter(parts[-1], counts.images.get(split, 0))
                else:
                    writer = _ParquetWriter(parts[-1], config.layout)
                in_part = 0
            writer.add(row, image)
            in_part += 1
            counts.add(split, row)
    finally:
        if writer is not None:
            writer.close()
    names = [f"data/{split}-{number:05d}-of-{len(parts):05d}.{ending}" for number in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    return names


def _examples(dataset: Dataset, pairs: pd.DataFrame, lost: set[str], folder: Path | None) -> list[dict[str, Any]]:
    """A few best pairs, evenly spread over the images with one, and below `folder` their pictures; None: no pictures."""
    best = pairs[(pairs["rank"] == 1) & ~pairs["image_id"].isin(lost)].sort_values("image_id")
    records = dataset.records.set_index("image_id")
    examples = []
    for row in np.unique(np.linspace(0, len(best) - 1, min(EXAMPLES, len(best))).astype(int)) if len(best) else []:
        pair = best.iloc[int(row)].to_dict()
        record = records.loc[pair["image_id"]]
        picture = f"examples/{len(examples) + 1}.jpg" if folder else None
        if folder and picture:
            try:
                draw_example(dataset.path(record), pair, folder / picture)
            except DataError:
                continue  # gone since it was published a moment ago
        examples.append({**pair, "picture": picture, "long_caption": record["long_caption"]})
    return examples


def _digest(sums: Mapping[str, str]) -> str:
    text = "".join(f"{sums[path]}  {path}\n" for path in sorted(sums))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_checksums(path: Path) -> dict[str, str]:
    """SHA-256 by path. Raises DataError for a line that is none."""
    sums: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not inside(name):
            raise DataError(f"{path}: line {number} is not a SHA-256 and a path below the folder: {line[:80]!r}")
        sums[name] = digest
    return sums
