"""Embeds a folder of images, or the texts of a table, to one parquet file.

    fast-goal embed my_photos --output photos.parquet
    fast-goal embed captions.csv --column caption --output captions.parquet

Features go to the store of the evaluation (.fast_goal/features), by the content of the image or text, as they are computed:
a run that was killed goes on, and an image that was added costs only itself. The file is written when all are there. What
could not be embedded stands in OUTPUT.skipped.parquet with the reason.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fast_goal.environment import device, prepare
from fast_goal.errors import DataError
from fast_goal.files import atomic_path, digest, file_digest
from fast_goal.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from fast_goal.evaluation.features import FeatureStore
    from fast_goal.tracking.located import Located

CHUNK = 512  # images or texts between two writes, a guess: a kill costs at most the work on these
AHEAD = 3  # batches that are decoded while the model is busy
WRITTEN = 8192  # rows in a row group
KEY = "fast_goal.key"  # in the file's metadata: all that the rows depend on


@dataclass(frozen=True)
class Source:
    """What is to be embedded, in the order of the output. columns: the output's columns beside `embedding`, names and
    values. skipped: what is already known not to be usable, (row or path, reason)."""

    kind: str  # "images" or "texts"
    items: list[Any]  # paths, or texts
    columns: dict[str, list[Any]]
    skipped: list[tuple[str, str]]
    digest: str


class _Image(NamedTuple):
    """An image file as a thread found it: its content's digest, and pixels [3, P, P] unless the store has it, or a reason."""

    content: str
    pixels: np.ndarray | None
    reason: str


def run(source: Path, output: Path, model: str, batch_size: int = 64, column: str = "text") -> str:
    """Writes `output` and OUTPUT.skipped.parquet; returns a line on what was done.

    Nothing is computed where `output` is already that of this source and model. Raises DataError for a source with nothing
    to embed, ModelError for a model that is not there.
    """
    if output.suffix != ".parquet":
        raise DataError(f"--output {output}: the file is written as parquet; give it a name that ends in .parquet")
    found = _images(source) if source.is_dir() else _texts(source, column)
    prepare()
    from fast_goal.evaluation.features import FOLDER, FeatureStore, store_key
    from fast_goal.model.clip import Clip
    from fast_goal.tracking.located import locate

    located = locate(model)
    clip = Clip.load(located.folder)
    key = digest([found.kind, found.digest, store_key(clip, "fp32")])
    skipped_file = output.with_name(f"{output.stem}.skipped.parquet")
    if _key(output) == key and skipped_file.is_file():
        return f"{output} is that of this source and model already: nothing to do"
    store = FeatureStore(FOLDER, clip, device(), batch_size)
    embed = _embed_images if found.kind == "images" else _embed_texts
    kept, features, notes = embed(store, found)
    skipped = sorted(found.skipped)
    _write_skipped(skipped_file, skipped)
    if not kept:
        raise DataError(f"{source}: none of the {len(skipped)} {found.kind} can be embedded; {skipped_file} has the reasons")
    about = {KEY: key, **_about(located, found, source), **notes}
    _write(output, found, kept, features, clip.embed_dim, about)
    told = f"; {len(skipped)} skipped, with reasons in {skipped_file}" if skipped else ""
    return f"{output}: {len(kept)} {found.kind}, {clip.embed_dim} numbers each{told}{_cut_note(notes, len(kept))}"


def _images(folder: Path) -> Source:
    """The image files below a folder, by their names."""
    from fast_goal.data.images import SUFFIXES

    paths = [
        (Path(parent) / name).relative_to(folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    ]
    if not paths:
        raise DataError(f"{folder}: no images in the folder or below it (files that end in {', '.join(sorted(SUFFIXES))})")
    names = sorted(path.as_posix() for path in paths)
    marks = []
    for name in names:
        try:
            status = (folder / name).stat()
            marks.append([name, status.st_size, status.st_mtime_ns])
        except OSError:  # a link that leads nowhere; reading it will say so
            marks.append([name, None, None])
    return Source("images", [folder / name for name in names], {"path": names}, [], digest(marks))


def _texts(path: Path, column: str) -> Source:
    """The texts of a table. Their `id` is the column of that name, else the number of the row."""
    from fast_goal.data.caption_table import read_caption_table
    from fast_goal.tracking.pyfunc import checked_text

    if not path.exists():
        raise DataError(f"{path} does not exist: expected a folder of images, or a table of texts")
    table = read_caption_table(path)
    if column not in table.columns:
        raise DataError(f"{path} has no column {column!r}; its columns are {table.columns}. Name one with --column.")
    ids: list[str] = []
    texts: list[str] = []
    skipped = [(str(row), reason) for row, reason in table.bad]
    for row, values in table.rows:
        name = str(values["id"]) if values.get("id") not in (None, "") else str(row)
        text = values.get(column)
        try:
            if text is None or (isinstance(text, str) and not text.strip()):
                raise DataError("the text is empty")
            texts.append(checked_text(text))
            ids.append(name)
        except DataError as error:
            skipped.append((name, str(error)))
    if not texts:
        raise DataError(f"{path}: the column {column!r} has no text that can be embedded ({len(skipped)} rows were looked at)")
    return Source("texts", texts, {"id": ids, "text": texts}, skipped, f"{column} {file_digest(path)}")


def _embed_images(store: FeatureStore, source: Source) -> tuple[list[int], Iterator[np.ndarray], dict[str, str]]:
    """The rows that could be embedded, and their features [.., D] in parts of WRITTEN rows."""
    from fast_goal.evaluation.features import ImageFile

    kept: list[ImageFile] = []
    rows: list[int] = []
    with Progress("embed", len(source.items), "images") as progress:
        try:
            for row, (path, image) in enumerate(zip(source.items, _read(source.items, store), strict=True)):
                file = ImageFile(path, (0, 0), image.content)
                if image.reason:
                    source.skipped.append((source.columns["path"][row], image.reason))
                else:
                    kept.append(file)
                    rows.append(row)
                if image.pixels is None and not image.reason:
                    progress.add(0, 1)  # it was there, and says nothing of the rate
                else:
                    if image.pixels is not None and store.lacks(file, None, []):
                        store.push(file, None, image.pixels, [])
                    progress.update(skipped=len(source.skipped))
                if row % CHUNK == CHUNK - 1:
                    store.compute()
                    store.flush()
            store.compute()
        finally:
            store.flush()
    parts = (store.images(kept[start : start + WRITTEN]).numpy() for start in range(0, len(kept), WRITTEN))
    return rows, parts, {}


def _read(paths: Sequence[Path], store: FeatureStore) -> Iterator[_Image]:
    """Each file in turn, read by threads ahead of the one who asks."""
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        waiting: deque[Future[_Image]] = deque()
        following = iter(paths)
        waiting.extend(pool.submit(_read_one, path, store) for path in islice(following, AHEAD * store.batch_size))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_read_one, path, store) for path in islice(following, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _read_one(path: Path, store: FeatureStore) -> _Image:
    import numpy as np

    from fast_goal.data.images import open_image
    from fast_goal.evaluation.features import ImageFile

    try:
        content = path.read_bytes()
    except OSError as error:
        return _Image("", None, f"the file cannot be read ({error.strerror or error})")
    name = hashlib.sha256(content).hexdigest()
    if not store.lacks(ImageFile(path, (0, 0), name), None, []):
        return _Image(name, None, "")
    try:
        image = open_image(path, content)
    except DataError as error:
        return _Image(name, None, str(error).removeprefix(f"{path}: "))
    return _Image(name, np.asarray(store.clip.view(*image.size).pixels(image)).transpose(2, 0, 1), "")


def _embed_texts(store: FeatureStore, source: Source) -> tuple[list[int], Iterator[np.ndarray], dict[str, str]]:
    """As `_embed_images`, and how many of the texts were cut off."""
    texts: list[str] = source.items
    store.add_texts(((text, None) for text in texts), "embed")
    cut = int((store.lengths(texts) > store.context_length).sum())
    parts = (store.texts(texts[start : start + WRITTEN])[0].numpy() for start in range(0, len(texts), WRITTEN))
    return list(range(len(texts))), parts, {"fast_goal.cut_off": str(cut)}


def _about(located: Located, found: Source, source: Path) -> dict[str, str]:
    version = {} if located.version is None else {"fast_goal.model_version": str(located.version)}
    return {
        "fast_goal.model": located.uri,
        "fast_goal.model_name": located.name,
        "fast_goal.model_digest": located.digest,
        "fast_goal.source": str(source),
        "fast_goal.skipped": str(len(found.skipped)),
        **version,
    }


def _cut_note(notes: dict[str, str], count: int) -> str:
    cut = int(notes.get("fast_goal.cut_off", 0))
    return f"; {cut} of {count} texts are longer than the model reads and were cut off" if cut else ""


def _write(
    output: Path, source: Source, kept: list[int], features: Iterator[np.ndarray], width: int, about: dict[str, str]
) -> None:
    """The table: the source's columns and `embedding`, float32 [D], of the rows that were kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [pa.field(name, pa.string()) for name in source.columns]
    schema = pa.schema([*fields, pa.field("embedding", pa.list_(pa.float32(), width))], metadata=about)
    with atomic_path(output) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        done = 0
        for part in features:
            rows = kept[done : done + len(part)]
            done += len(part)
            columns: list[pa.Array] = [
                pa.array([values[row] for row in rows], pa.string()) for values in source.columns.values()
            ]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1), pa.float32()), width)
            writer.write_table(pa.table([*columns, vectors], schema=schema))


def _write_skipped(path: Path, skipped: list[tuple[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, reasons = [name for name, _ in skipped], [reason for _, reason in skipped]
    table = pa.table({"item": pa.array(names, pa.string()), "reason": pa.array(reasons, pa.string())})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def _key(output: Path) -> str | None:
    """The key of an earlier output; None where there is none that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: Any = (pq.read_schema(output).metadata or {}).get(KEY.encode())
    except (OSError, pa.ArrowException):
        return None
    return None if found is None else found.decode()
