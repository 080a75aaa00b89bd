"""The tables that the steps hand to each other, and the data set they make up.

One schema each, here and nowhere else; it is checked when a table is written and when it is read. A data set `NAME`
is, in `data/records/`: `NAME.parquet` (records), `NAME.json` (where its files are, counts, digest),
`NAME_skipped.parquet`; `NAME_hashes.parquet` where the images were decoded; where the source knows what is in the
pictures, `NAME_truth.parquet` and `NAME_objects.parquet`; and, where there are true and false captions to choose from,
classes to tell apart or pixels to be named, `NAME_choices.parquet`, `NAME_labels.parquet` and `NAME_masks.parquet`.

Boxes are float pixels of the original image after its EXIF rotation, x2 and y2 exclusive.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fast_goal.errors import ConfigError, DataError
from fast_goal.files import atomic_path, read_json, write_json

RECORDS_FOLDER = Path("data/records")
DATASETS_FOLDER = Path("data/datasets")
SPLITS = ("pretrain", "train", "val", "test")
UNNAMED = "not in the table"  # reason of SKIPPED for an image file that nobody asked for: reported, but no loss

_BOX = {"x1": pa.float64(), "y1": pa.float64(), "x2": pa.float64(), "y2": pa.float64()}


def _schema(table: str, step: str, columns: dict[str, pa.DataType]) -> pa.Schema:
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    return pa.schema(fields, metadata={"table": table, "step": step})


RECORDS = _schema(
    "records",
    "download",
    {
        "image_id": pa.string(),  # unique within a data set
        "image_path": pa.string(),  # relative to the data set's root
        "width": pa.int64(),
        "height": pa.int64(),
        "split": pa.string(),  # one of SPLITS
        "long_caption": pa.string(),  # "" where there is none (split pretrain)
        "captions": pa.list_(pa.string()),  # short captions
        "source": pa.string(),
        "content_hash": pa.string(),  # SHA-256 of the image file
    },
)
TRUTH = _schema(
    "truth",
    "download",
    {
        "image_id": pa.string(),
        "sentence_index": pa.int64(),
        "char_start": pa.int64(),  # of the sentence in long_caption
        "char_end": pa.int64(),
        **_BOX,  # of the object that the sentence is about
        "label": pa.string(),
    },
)
OBJECTS = _schema(
    "objects",
    "download",
    {
        "image_id": pa.string(),
        "object_index": pa.int64(),
        "label": pa.string(),
        "colour": pa.string(),
        "pattern": pa.string(),
        "size": pa.string(),
        **_BOX,
    },
)
REGIONS = _schema(
    "regions",
    "flism",
    {
        "image_id": pa.string(),
        "region_index": pa.int64(),
        **_BOX,
        "kind": pa.string(),  # detector, quadrant, centre
        "label": pa.string(),  # "" for spatial regions
        "score": pa.float64(),  # 1 for spatial regions
    },
)
PAIRS = _schema(
    "pairs",
    "flism",
    {
        "image_id": pa.string(),
        "rank": pa.int64(),  # 1 = best
        "sentence_index": pa.int64(),
        "sentence": pa.string(),
        "char_start": pa.int64(),  # long_caption[char_start:char_end] == sentence
        "char_end": pa.int64(),
        "region_index": pa.int64(),
        **_BOX,
        "kind": pa.string(),
        "similarity": pa.float64(),  # cosine
        "weight": pa.float64(),  # of the pair among those of its image, which add up to 1
    },
)
HASHES = _schema(
    "hashes",
    "download",
    {
        "image_id": pa.string(),
        "perceptual_hash": pa.string(),  # 64-bit pHash as 16 hexadecimal digits
    },
)
SKIPPED = _schema(
    "skipped",
    "download",
    {
        "sample": pa.string(),  # image id, or path where there is no id yet
        "row": pa.int64(),  # line or record number in the source's own table, from 1; -1 if none
        "step": pa.string(),
        "reason": pa.string(),  # one of a few words, to count by
        "detail": pa.string(),
    },
)

CHOICES = _schema(
    "choices",
    "download",
    {
        "image_id": pa.string(),
        **_BOX,  # what of the image is shown: the whole of it, where the suite cuts nothing out
        "suite": pa.string(),  # evaluation/tasks/composition.py says how each is summed up
        "group": pa.string(),  # within the suite: a kind of foil, a relation, a piece
        "caption": pa.string(),
        "foils": pa.list_(pa.string()),  # one at least; false of what is shown
    },
)
LABELS = _schema(
    "labels",
    "download",
    {
        "image_id": pa.string(),
        **_BOX,  # what of the image is shown
        "suite": pa.string(),  # the set of classes, a key of `Dataset.classes`
        "label": pa.string(),  # one of its names
    },
)
MASKS = _schema(
    "masks",
    "download",
    {
        "image_id": pa.string(),
        "suite": pa.string(),  # the set of classes, a key of `Dataset.segments`
        "mask_path": pa.string(),  # relative to the data set's root: a PNG of the image's size, one number for each pixel
        "content_hash": pa.string(),  # SHA-256 of the file
    },
)
NEGATIVES = _schema(
    "negatives",
    "negatives",
    {
        "image_id": pa.string(),
        "caption": pa.string(),  # the true one, in full
        "negative": pa.string(),
        "type": pa.string(),  # one of config.NEGATIVE_TYPES
        "generator": pa.string(),
        "seed": pa.int64(),
    },
)

_SUFFIXES = {
    "records": "",
    "skipped": "_skipped",
    "truth": "_truth",
    "objects": "_objects",
    "hashes": "_hashes",
    "choices": "_choices",
    "labels": "_labels",
    "masks": "_masks",
}


def write_table(path: Path | str, rows: pd.DataFrame | Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Writes rows as parquet, atomically, with exactly the columns of `schema`.

    Raises DataError, naming file, column and row, for a column that is missing, unknown, of another type or has nulls.
    """
    table = _table(rows, schema, path)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: Path | str, schema: pa.Schema) -> pd.DataFrame:
    """Reads a table; the columns come in the order of `schema`, lists as Python lists.

    Raises DataError, naming the file, the column and the step that writes it, where the file is missing, is not
    parquet, or lacks a column or has it with another type.
    """
    step = schema.metadata[b"step"].decode()
    remedy = f"The step `{step}` writes it: `dvc repro --force --single-item {step}`."
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. {remedy}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet ({error}). {remedy}") from None
    for field in schema:
        if field.name not in table.column_names:
            raise DataError(f"{path}: the column {field.name!r} is missing; it has {table.column_names}. {remedy}")
        found = table.schema.field(field.name).type
        if found != field.type:
            raise DataError(f"{path}: the column {field.name!r} is {found}, expected {field.type}. {remedy}")
    table = table.select(schema.names)
    _refuse_nulls(table, path)
    frame = table.to_pandas()
    for field in schema:
        if pa.types.is_list(field.type):
            frame[field.name] = [list(value) for value in frame[field.name]]
    return frame


@dataclass(frozen=True)
class Dataset:
    """A data set as the steps see it.

    `root` is the folder that `image_path` is relative to. `truth` and `objects` are None where the source does not
    know what is in the pictures, `hashes` where it did not decode the images. `digest` changes with any value of the
    records, the images' content included. `published` counts the samples of the publication's own splits, under its own
    names, before anything was left out; `facts` is what is published about the set (`data.sources.Facts` as a mapping).
    `choices`, `labels` and `masks` are None where nothing is to be chosen, classified or segmented; `classes` maps each suite
    of `labels` to the `names` of its classes and the `templates` of their captions, in which {} stands for the name;
    `segments` each suite of `masks` to the same, the `values` that the pixels of each class have, in the order of the names,
    and those of pixels that are `ignored`.
    """

    name: str
    root: Path
    records: pd.DataFrame
    truth: pd.DataFrame | None = None
    objects: pd.DataFrame | None = None
    source: str = ""
    digest: str = ""
    hashes: pd.DataFrame | None = None
    published: Mapping[str, int] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] | None = None
    choices: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None
    classes: Mapping[str, Mapping[str, list[str]]] = dataclasses.field(default_factory=dict)
    masks: pd.DataFrame | None = None
    segments: Mapping[str, Mapping[str, list[Any]]] = dataclasses.field(default_factory=dict)

    def split(self, *names: str) -> pd.DataFrame:
        """The records of the named splits, in the order of the table, numbered from 0. Raises DataError for a word
        that is no split; a split without images is an empty table."""
        unknown = [name for name in names if name not in SPLITS]
        if unknown:
            raise DataError(f"data set {self.name}: {unknown} is no split; the splits are {list(SPLITS)}")
        return self.records[self.records["split"].isin(names)].reset_index(drop=True)

    def path(self, image: Any) -> Path:
        """The image file of a record (anything with `image_path`, by key or attribute) or of an `image_path`."""
        if not isinstance(image, str):
            image = image["image_path"] if isinstance(image, Mapping | pd.Series) else image.image_path
        return self.root / image


def write_dataset(
    name: str,
    root: Path | str,
    rows: pd.DataFrame | Iterable[Mapping[str, Any]],
    skipped: pd.DataFrame | Iterable[Mapping[str, Any]],
    truth: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    objects: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    hashes: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    choices: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    labels: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    masks: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    *,
    classes: Mapping[str, Mapping[str, list[str]]] | None = None,
    segments: Mapping[str, Mapping[str, list[Any]]] | None = None,
    source: str,
    published: Mapping[str, int] | None = None,
    facts: Mapping[str, Any] | None = None,
    folder: Path = RECORDS_FOLDER,
) -> None:
    """Writes the files of a data set; `<name>.json` comes last and marks it complete.

    Raises ConfigError for a name that cannot be a file name or collides with one, DataError for two records with the
    same image_id, for an unknown split, and for choices, labels or masks of an image that has no record.
    """
    check_name(name)
    frame = _table(rows, RECORDS, f"data set {name}").to_pandas()
    twice = frame["image_id"][frame["image_id"].duplicated()]
    if len(twice):
        raise DataError(f"data set {name}: image_id {twice.iloc[0]!r} stands in more than one record; ids must be unique")
    unknown = frame[~frame["split"].isin(SPLITS)]
    if len(unknown):
        raise DataError(
            f"data set {name}: image {unknown['image_id'].iloc[0]!r} has the split {unknown['split'].iloc[0]!r}; "
            f"expected one of {list(SPLITS)}"
        )
    where = f"data set {name}, of the source {source!r}"
    choices = None if choices is None else _of_records(choices, CHOICES, frame["image_id"], where)
    labels = None if labels is None else _of_records(labels, LABELS, frame["image_id"], where)
    masks = None if masks is None else _of_records(masks, MASKS, frame["image_id"], where)
    paths = _paths(name, folder)
    (folder / f"{name}.json").unlink(missing_ok=True)
    write_table(paths["records"], frame, RECORDS)
    write_table(paths["skipped"], skipped, SKIPPED)
    others = (
        ("truth", truth, TRUTH),
        ("objects", objects, OBJECTS),
        ("hashes", hashes, HASHES),
        ("choices", choices, CHOICES),
        ("labels", labels, LABELS),
        ("masks", masks, MASKS),
    )
    for table, values, schema in others:
        if values is None:
            paths[table].unlink(missing_ok=True)
        else:
            write_table(paths[table], values, schema)
    info = {
        "name": name,
        "root": _project_path(root).as_posix(),
        "source": source,
        "images": len(frame),
        "splits": {split: int((frame["split"] == split).sum()) for split in SPLITS},
        "digest": _digest(frame),
        "published": dict(published or {}),
        "facts": dict(facts) if facts is not None else None,
        "classes": {suite: dict(values) for suite, values in (classes or {}).items()},
        "segments": {suite: dict(values) for suite, values in (segments or {}).items()},
    }
    write_json(folder / f"{name}.json", info)


def load_dataset(name: str, folder: Path = RECORDS_FOLDER) -> Dataset:
    """Reads a data set that `write_dataset` wrote. Raises DataError, naming the file and the step that writes it."""
    info_path = Path(folder) / f"{name}.json"
    if not info_path.is_file():
        known = sorted(path.stem for path in dataset_files(folder))
        raise DataError(
            f"{info_path} does not exist. The step `download` writes it for each of download.datasets "
            f"({'here: ' + ', '.join(known) if known else 'there is none yet'})."
        )
    info = read_json(info_path)
    paths = _paths(name, Path(folder))
    return Dataset(
        name=name,
        root=Path(info["root"]),
        records=read_table(paths["records"], RECORDS),
        truth=read_table(paths["truth"], TRUTH) if paths["truth"].exists() else None,
        objects=read_table(paths["objects"], OBJECTS) if paths["objects"].exists() else None,
        source=info["source"],
        digest=info["digest"],
        hashes=read_table(paths["hashes"], HASHES) if paths["hashes"].exists() else None,
        published=info["published"],
        facts=info["facts"],
        choices=read_table(paths["choices"], CHOICES) if paths["choices"].exists() else None,
        labels=read_table(paths["labels"], LABELS) if paths["labels"].exists() else None,
        classes=info.get("classes", {}),
        masks=read_table(paths["masks"], MASKS) if paths["masks"].exists() else None,
        segments=info.get("segments", {}),
    )


def load_skipped(name: str, folder: Path = RECORDS_FOLDER) -> pd.DataFrame:
    """What the step `download` left out of a data set, with the reasons (columns of SKIPPED)."""
    return read_table(_paths(name, Path(folder))["skipped"], SKIPPED)


def captions_of(records: pd.DataFrame, which: str) -> list[list[str]]:
    """The captions of each record, `long` or `short`, that say anything."""
    texts = ([text] for text in records["long_caption"]) if which == "long" else records["captions"]
    return [[text for text in own if text.strip()] for own in texts]


def dataset_files(folder: Path = RECORDS_FOLDER) -> list[Path]:
    """The `<name>.json` of every complete data set in `folder`."""
    return sorted(path for path in Path(folder).glob("*.json") if path.name != "metrics.json")


def remove_dataset(name: str, folder: Path = RECORDS_FOLDER, datasets: Path = DATASETS_FOLDER) -> None:
    """Removes a data set's tables, and the files that its source generated or fetched; a user's own files stay."""
    folder = Path(folder)
    info_path = folder / f"{name}.json"
    info = read_json(info_path)
    own = datasets / name
    generated = own.resolve() in (Path(info["root"]).resolve(), *Path(info["root"]).resolve().parents)
    if own.is_dir():
        if generated:
            shutil.rmtree(own)
        else:
            (own / "SOURCE.json").unlink(missing_ok=True)
            if not any(own.iterdir()):
                own.rmdir()
    info_path.unlink()
    for path in _paths(name, folder).values():
        path.unlink(missing_ok=True)


def check_name(name: str) -> None:
    """Raises ConfigError for a data set's name that cannot be a file name or would collide with another file."""
    endings = tuple(suffix for suffix in _SUFFIXES.values() if suffix)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name.endswith(endings) or name == "metrics":
        raise ConfigError(
            f"download.datasets.{name}: a data set's name is made of letters, digits, - and _, is not `metrics` and does "
            f"not end in {', '.join(endings)}; it names the files in {RECORDS_FOLDER}"
        )


def _name(schema: pa.Schema) -> str:
    return schema.metadata[b"table"].decode()


def _paths(name: str, folder: Path) -> dict[str, Path]:
    return {table: Path(folder) / f"{name}{suffix}.parquet" for table, suffix in _SUFFIXES.items()}


def _table(rows: pd.DataFrame | Iterable[Mapping[str, Any]], schema: pa.Schema, where: Path | str) -> pa.Table:
    """The rows as an arrow table of exactly this schema, column by column so that an error can name the column."""
    if isinstance(rows, pd.DataFrame):
        names: Iterable[str] = rows.columns
        columns: Mapping[str, Any] = rows
    else:  # not through pandas, which would make floats of whole numbers and fails on texts that are no Unicode
        rows = list(rows)
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
    names = set(names)
    if unknown := sorted(names.difference(schema.names)):
        raise DataError(f"{where}: columns {unknown} do not belong to the table {_name(schema)}: {schema.names}")
    if not names and not len(rows):
        return schema.empty_table()
    arrays = []
    for field in schema:
        if field.name not in names:
            raise DataError(f"{where}: the column {field.name!r} of the table {_name(schema)} is missing")
        try:
            arrays.append(_column(columns[field.name], field.type))
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise DataError(f"{where}: the column {field.name!r} cannot be stored as {field.type}: {error}") from None
    table = pa.Table.from_arrays(arrays, schema=schema)
    _refuse_nulls(table, where)
    return table


def _of_records(
    rows: pd.DataFrame | Iterable[Mapping[str, Any]], schema: pa.Schema, known: pd.Series, where: str
) -> pd.DataFrame:
    """The rows. Raises DataError for one of an image that is not among `known`: said here, at the source that is at fault, and
    not by `evaluate`, after the training."""
    frame = _table(rows, schema, where).to_pandas()
    lost = ~frame["image_id"].isin(known)
    if lost.any():
        row = int(lost.to_numpy().argmax())
        raise DataError(
            f"{where}: {int(lost.sum()):,} rows of the table {_name(schema)} are of images without a record, the first is row "
            f"{row} (suite {frame['suite'].iloc[row]!r}, image_id {frame['image_id'].iloc[row]!r}). A source that leaves out "
            "an image has to leave out its choices, labels and masks."
        )
    return frame


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    """The values as `kind`. Their own type is looked at first: given the type, arrow would cut 1.5 to 1 and take a text
    for a list of letters, and a cast alone would make texts of numbers. Raises ArrowException."""
    found = pa.array(values, from_pandas=True)
    families = (_is_text, _is_number, pa.types.is_list)
    if not pa.types.is_null(found.type) and not any(family(found.type) and family(kind) for family in families):
        raise pa.ArrowTypeError(f"found {found.type}")
    return found.cast(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _refuse_nulls(table: pa.Table, where: Path | str) -> None:
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DataError(f"{where}: the column {name!r} has {column.null_count} empty values, the first in record {row}")


def _project_path(root: Path | str) -> Path:
    """Relative to the project where the folder lies below it, so that the tables do not depend on where that is."""
    absolute = Path(root).resolve()
    project = Path.cwd().resolve()
    return absolute.relative_to(project) if absolute.is_relative_to(project) else absolute


def _digest(frame: pd.DataFrame) -> str:
    """A hash of the values, independent of the parquet writer's version."""
    hasher = hashlib.sha256()
    columns = [frame[name].tolist() for name in RECORDS.names]
    for row in zip(*columns, strict=True):
        plain = [list(value) if not isinstance(value, str | int) else value for value in row]
        hasher.update(json.dumps(plain).encode() + b"\n")
    return hasher.hexdigest()[:16]
