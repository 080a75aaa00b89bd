"""The data source `glit100k`: images with long captions and local pairs, as this project publishes them, or as released.

The copy lies in a folder (`root`), or is fetched from an address (`remote`) to there. With a `dataset.json` in it, it is a
publication of `data/publication.py`, in any of its layouts (docs/dataset_layout.md); else it is read as `released` says:
JSON lists of images with their captions and, in each, the list of local pairs, in the style of the authors' earlier files.

The pairs become `local_pairs.parquet` (the columns of PAIRS) in the data set's folder. The step `flism` makes its own, with
the settings of params.yaml; the published ones stay for comparison.
"""

from __future__ import annotations

import json
import posixpath
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fast_goal.config import Split, number
from fast_goal.data.archives import disk_error
from fast_goal.data.captions import split_sentences
from fast_goal.data.fetch import ManualStep, Remote, WrongDigest, downloads_folder, fetch, fetch_all
from fast_goal.data.publication import CHECKSUMS_FILE, DATASET_FILE, FORMAT, LAYOUTS, inside, read_checksums
from fast_goal.data.records import PAIRS, RECORDS, SPLITS, write_table
from fast_goal.data.sa1b import take_photos
from fast_goal.data.samples import Sample, Skipped, look, texts, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.data.sources.webdataset import grouped
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import atomic_path, digest, file_digest, read_json, write_json
from fast_goal.progress import Progress

PAIRS_FILE = "local_pairs.parquet"
BOX = ("x1", "y1", "x2", "y2")
_AT_ONCE = 32  # images of a parquet file in memory


@dataclass(frozen=True)
class Keys:
    """Names in the released JSON: of an entry its image, caption and list of pairs; of a pair the other three. null: there
    is none. The box is an object with x1, y1, x2, y2 in pixels."""

    image: str
    caption: str
    pairs: str | None
    sentence: str
    box: str
    similarity: str | None


@dataclass(frozen=True)
class Released:
    """files: JSON list below root -> split. similarity_scale: what makes a cosine of the released similarity."""

    files: dict[str, Split]
    keys: Keys
    similarity_scale: float = number(above=0)


@dataclass(frozen=True)
class Glit100kConfig:
    """root: folder of the copy; null: that of the data set's name in the downloads' folder. copy_steps: what a person has to
    do to get it. images: folder of the images of a publication that has none of its own; null: `images` in root. photos:
    folder of SA-1B's archives or photographs, for what was released, below the downloads' folder. missing_photos: `stop` asks
    for those that are missing, `skip` goes on without them."""

    remote: str | None
    root: str | None
    copy_steps: list[str]
    images: str | None
    photos: str
    missing_photos: Literal["stop", "skip"]
    released: Released


@source("glit100k", Glit100kConfig)
def load(config: Glit100kConfig, name: str, folder: Path) -> Loaded:
    """Reads the copy and looks at every image; those that the copy holds are extracted to `folder/images/`.

    Raises ManualStep where the copy or its images are missing; DataError for a file that differs from its checksum or cannot
    be understood, and where no image can be used.
    """
    where = f"download.datasets.{name}"
    root = Path(config.root) if config.root else downloads_folder() / name
    if config.remote and config.root:
        raise ConfigError(f"{where}: set remote or root, not both; what is remote is fetched to the downloads' folder")
    if config.remote:
        _fetch_copy(config, name)
    if (root / DATASET_FILE).is_file():
        return _Publication(root, config, name, folder).load()
    if all((root / file).is_file() for file in config.released.files):
        return _load_released(config, name, root, folder)
    files = ", ".join(config.released.files)
    raise ManualStep(
        f"{where}: {DATASET_FILE} (this project's layout) or {files} (the released layout; {where}.released)",
        config.copy_steps,
        root,
    )


def _fetch_copy(config: Glit100kConfig, name: str) -> None:
    """Fetches a publication file by file, each held against its published checksum; or else the released files."""
    base = (config.remote or "").rstrip("/")

    def remote(path: str, sha256: str | None = None) -> Remote:
        return Remote(f"{base}/{path}", f"{name}/{path}", sha256, None)

    from fast_goal.data.origins import Missing

    try:
        sums = read_checksums(fetch(remote(CHECKSUMS_FILE)))
    except Missing:
        fetch_all([remote(file) for file in config.released.files])
        return
    try:
        fetch_all([remote(path, sum_) for path, sum_ in sums.items() if path.startswith("data/") or path == DATASET_FILE])
    except WrongDigest as error:
        raise DataError(
            f"{error} The checksums are those of {downloads_folder() / name / CHECKSUMS_FILE}: if the copy was published anew "
            f"since, delete that file, and the same command fetches them again."
        ) from None


class _Publication:
    """A copy in this project's layout."""

    def __init__(self, root: Path, config: Glit100kConfig, name: str, folder: Path):
        self.root, self.config, self.name, self.folder = root, config, name, folder
        self.where = f"download.datasets.{name}"
        try:
            info = read_json(root / DATASET_FILE)
            self.layout = info["layout"]
            self.splits = {split: [str(file) for file in values["files"]] for split, values in info["splits"].items()}
            self.published = {split: int(values["images"]) for split, values in info["splits"].items()}
            known = info["format"] == FORMAT and self.layout in LAYOUTS and set(self.splits) <= set(SPLITS)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{root / DATASET_FILE} is no description of a published data set ({error!r})") from None
        if not known:
            raise DataError(
                f"{root / DATASET_FILE}: format {info['format']!r}, layout {self.layout!r}; this version reads {FORMAT!r} with "
                f"the layouts {', '.join(LAYOUTS)}"
            )
        self.sums = read_checksums(self._there(CHECKSUMS_FILE))

    def load(self) -> Loaded:
        """The images are at their `image_path` below `folder/images`, or below the folder of images for `table`."""
        skipped, pairs = Skipped(), []
        samples: list[Sample] = []
        published: dict[str, dict[str, Any]] = {}
        embedded = self.layout != "table"
        images = self.folder / "images" if embedded else _image_folder(self.config, self.root)
        files = [file for files in self.splits.values() for file in files]
        with Progress(f"reading {self.name}", len(files), "files") as progress:
            for file in files:
                for row in self._rows(file, images, skipped):
                    if not inside(row["image_path"]):
                        skipped.note(row["image_id"], -1, "path outside the data root", row["image_path"])
                        continue
                    sample = Sample(row["image_id"], row["image_path"], row["split"], row["long_caption"], row["captions"])
                    samples.append(sample)
                    published.setdefault(row["image_id"], row)
                progress.update()
        samples = unique(samples, skipped)
        rows, hashes = look(samples, images, "glit100k", f"download {self.name}", skipped)
        kept = []
        for row in rows:
            own = published[row["image_id"]]
            if row["content_hash"] != own["content_hash"]:
                # with a table, the images come from elsewhere: another file under the name may have another size
                skipped.note(row["image_id"], -1, "image changed", "its SHA-256 is not the published one")
                continue
            kept.append(row | {"source": own["source"]})
            pairs += [{"image_id": row["image_id"], **pair} for pair in own["pairs"]]
        if not kept:
            reasons = dict(Counter(row["reason"] for row in skipped))
            raise DataError(f"{self.where}: none of the images in {self.root} can be used: {reasons}")
        ids = {row["image_id"] for row in kept}
        hashes = [row for row in hashes if row["image_id"] in ids]
        write_table(self.folder / PAIRS_FILE, pairs, PAIRS)
        notes = [f"{len(pairs)} published local pairs are in {self.folder / PAIRS_FILE}; the step flism makes its own"]
        return Loaded(images, kept, list(skipped), notes=notes, hashes=hashes, published=self.published)

    def _there(self, file: str) -> Path:
        path = self.root / file
        if not inside(file) or not path.is_file():
            raise DataError(f"{path} does not exist, and {DATASET_FILE} names it; fetch it again")
        return path

    def _rows(self, file: str, images: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
        """The rows of a data file; its images are extracted, once, which a mark with its digest remembers."""
        path = self._there(file)
        stat = path.stat()
        key = digest([file, stat.st_size, stat.st_mtime_ns, self.sums.get(file)])
        mark = self.folder / "files" / f"{Path(file).stem}.json"
        if self.layout != "table" and mark.is_file():
            try:
                content = read_json(mark)
            except ValueError:
                content = {}
            if content.get("key") == key and all((images / image).is_file() for image in content["images"]):
                skipped += content["skipped"]
                yield from content["rows"] if self.layout == "webdataset" else self._table(path)
                return
        if file_digest(path, 64) != self.sums.get(file):
            raise DataError(f"{path} differs from its checksum in {self.root / CHECKSUMS_FILE}; fetch it again")
        if self.layout == "table":
            yield from self._table(path)
            return
        lost, rows, extracted = Skipped(), [], []
        contents = self._parquet(path) if self.layout == "parquet" else self._tar(path, lost)
        try:
            for row, image in contents:
                rows.append(row)
                if inside(row["image_path"]):
                    with atomic_path(images / row["image_path"]) as temporary:
                        temporary.write_bytes(image)
                    extracted.append(row["image_path"])
            kept = rows if self.layout == "webdataset" else []
            write_json(mark, {"key": key, "images": extracted, "skipped": list(lost), "rows": kept})
        except OSError as error:
            raise disk_error(error, path, self.folder) from error
        skipped += lost
        yield from rows

    def _table(self, path: Path) -> list[dict[str, Any]]:
        names = [*RECORDS.names, "pairs"]
        try:
            found = pq.read_table(path, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read as parquet: {error}") from None
        if missing := set(names) - set(found.column_names):
            raise DataError(f"{path}: the columns {sorted(missing)} are missing")
        return found.to_pylist()

    def _parquet(self, path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
        try:
            batches = pq.ParquetFile(path).iter_batches(_AT_ONCE, columns=[*RECORDS.names, "pairs", "image"])
            for batch in batches:
                for row in batch.to_pylist():
                    image = row.pop("image")
                    yield row, image["bytes"]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{path} cannot be read as a published parquet file: {error}") from None

    def _tar(self, path: Path, lost: Skipped) -> Iterator[tuple[dict[str, Any], bytes]]:
        names = {*RECORDS.names, "pairs"}
        for sample in grouped(path, path.stem, lost):
            where = f"{path.stem}/{sample['__key__']}"
            endings = [ending for ending in sample if not ending.startswith("__") and ending != "json"]
            try:
                row = json.loads(sample["json"])
                row = {name: row[name] for name in row if name in names}
            except (KeyError, ValueError, TypeError) as error:
                lost.note(where, -1, "unreadable row", repr(error)[:200])
                continue
            if set(row) != names or len(endings) != 1:
                lost.note(where, -1, "unreadable row", f"columns {sorted(row)}, images {endings}"[:200])
                continue
            yield row, sample[endings[0]]


def _image_folder(config: Glit100kConfig, root: Path) -> Path:
    """The folder of images that do not come with the copy."""
    path = Path(config.images) if config.images else root / "images"
    if not path.is_dir():
        raise ManualStep(
            f"the images of {root}, which holds a table without them,",
            ["Get the images from their source, which the card (README.md) names, with the paths of the column image_path."],
            path,
        )
    return path


def _load_released(config: Glit100kConfig, name: str, root: Path, folder: Path) -> Loaded:
    skipped = Skipped()
    samples: list[Sample] = []
    own_pairs: dict[str, list[dict[str, Any]]] = {}
    published: dict[str, int] = {}
    for file, split in config.released.files.items():
        entries = _entries(root / file)
        published[split] = published.get(split, 0) + len(entries)
        for row, entry in enumerate(entries, 1):
            sample, pairs = _released_sample(config.released, entry, row, split, skipped)
            if sample is not None:
                samples.append(sample)
                own_pairs.setdefault(sample.image_id, pairs)
    samples = unique(samples, skipped)
    shutil.rmtree(folder / "images", ignore_errors=True)  # of another layout, read before
    take_photos(samples, config.photos, folder, config.missing_photos)
    rows, hashes = look(samples, folder, "glit100k", f"download {name}", skipped)
    if not rows:
        reasons = dict(Counter(row["reason"] for row in skipped))
        raise DataError(f"download.datasets.{name}: none of the images can be used: {reasons}")
    pairs = [pair for row in rows for pair in own_pairs[row["image_id"]]]
    write_table(folder / PAIRS_FILE, pairs, PAIRS)
    notes = [f"{len(pairs)} released local pairs are in {folder / PAIRS_FILE}; the step flism makes its own"]
    return Loaded(folder, rows, list(skipped), notes=notes, hashes=hashes, published=published)


def _entries(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, found {type(content).__name__}")
    return content


def _released_sample(
    released: Released, entry: Any, row: int, split: str, skipped: Skipped
) -> tuple[Sample | None, list[dict[str, Any]]]:
    keys = released.keys
    named = entry.get(keys.image) if isinstance(entry, Mapping) else None
    if not isinstance(named, str) or not named:
        skipped.note("", row, "no image named", f"there is no text at {keys.image!r}")
        return None, []
    file = posixpath.basename(named)  # its folder is that of another machine
    image_id = posixpath.splitext(file)[0]
    captions = texts([entry.get(keys.caption)], image_id, row, skipped)
    if not captions:
        return None, []
    pairs = entry.get(keys.pairs) if keys.pairs else []
    pairs = _released_pairs(released, pairs if isinstance(pairs, list) else [pairs], captions[0], image_id, row, skipped)
    return Sample(image_id, file, split, captions[0], row=row), pairs


def _released_pairs(
    released: Released, given: list[Any], caption: str, image_id: str, row: int, skipped: Skipped
) -> list[dict[str, Any]]:
    """Rows of PAIRS, best first; the span is looked up in the caption, where the sentence must stand as it is."""
    keys, rows = released.keys, []
    ends = [sentence.end for sentence in split_sentences(caption)] if given else []
    for index, pair in enumerate(given):
        try:
            sentence, box = pair[keys.sentence], [float(pair[keys.box][corner]) for corner in BOX]
            similarity = float(pair[keys.similarity]) * released.similarity_scale if keys.similarity else 0.0
        except (KeyError, TypeError, ValueError) as error:
            skipped.note(image_id, row, "unreadable local pair", f"pair {index}: {error!r}"[:200])
            continue
        start = caption.find(sentence) if isinstance(sentence, str) and sentence else -1
        if start < 0:
            skipped.note(image_id, row, "local sentence not in its caption", str(sentence)[:200])
            continue
        rows.append(
            {
                "image_id": image_id,
                "rank": 0,
                "sentence_index": sum(end <= start for end in ends),
                "sentence": sentence,
                "char_start": start,
                "char_end": start + len(sentence),
                "region_index": index,
                **dict(zip(BOX, box, strict=True)),
                "kind": "released",  # the files do not say what made the box
                "similarity": similarity,
                "weight": 0.0,
            }
        )
    rows.sort(key=lambda pair: -pair["similarity"])
    return [pair | {"rank": rank, "weight": 1.0 / len(rows)} for rank, pair in enumerate(rows, 1)]
