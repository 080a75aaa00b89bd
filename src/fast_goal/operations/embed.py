"""Embeds a folder of images, or the texts of a table, to one parquet file.

    fast-goal embed my_photos --output photos.parquet
    fast-goal embed captions.csv --column caption --output captions.parquet

With --patches the file also has what a text-conditioned pooling (FLAIR) compares; with --against images and texts are
compared right away: operations/scores.py.

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
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fast_goal.environment import device, prepare
from fast_goal.errors import DataError
from fast_goal.files import atomic_path, digest, file_digest
from fast_goal.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from fast_goal.evaluation.features import FeatureStore, ImageFile
    from fast_goal.model.clip import Clip
    from fast_goal.tracking.located import Located

CHUNK = 512  # images or texts between two writes, a guess: a kill costs at most the work on these
AHEAD = 3  # batches that are decoded while the model is busy
WRITTEN = 8192  # rows in a row group
NUMBERS = 1 << 24  # in a row group with patches, which are many; a guess
KEY = "fast_goal.key"  # in the file's metadata: all that the rows depend on
CUT_OFF = "fast_goal.cut_off"  # texts
PATCHES = "fast_goal.patches"  # N and D of a row of patches, which is a flat list


@dataclass(frozen=True)
class Source:
    """What is to be embedded, in the order of the output. columns: the output's columns beside those of numbers, names and
    values. skipped: what is known not to be usable, (row or path, reason)."""

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


class Model(NamedTuple):
    """What embeds. key: all that its features depend on."""

    located: Located
    clip: Clip
    key: str

    def store(self, batch_size: int) -> FeatureStore:
        """The store of its features."""
        from fast_goal.evaluation.features import FOLDER, FeatureStore

        return FeatureStore(FOLDER, self.clip, device(), batch_size)

    def described(self) -> dict[str, str]:
        """For the metadata of a file."""
        located = self.located
        version = {} if located.version is None else {"fast_goal.model_version": str(located.version)}
        return {
            "fast_goal.model": located.uri,
            "fast_goal.model_name": located.name,
            "fast_goal.model_digest": located.digest,
            **version,
        }


def run(source: Path, output: Path, model: str, batch_size: int = 64, column: str = "text", patches: bool = False) -> str:
    """Writes `output` and OUTPUT.skipped.parquet; returns a line on what was done.

    patches: also the projected patches of the images, or the queries of the texts. Nothing is computed where `output` is
    already that of this source and model. Raises DataError for a source with nothing to embed, ModelError for a model that is
    not there.
    """
    check_output(output)
    found = find_images(source) if source.is_dir() else find_texts(source, column)
    opened = open_model(model)
    key = digest([found.kind, found.digest, opened.key, *["patches"] * patches])
    if is_made(output, key):
        return f"{output} is that of this source and model already: nothing to do"
    store = opened.store(batch_size)
    embed = _images_and_parts if found.kind == "images" else _texts_and_parts
    kept, parts, notes = embed(store, found, patches)
    skipped = write_skipped(output, found.skipped)
    if not kept:
        raise DataError(f"{source}: none of the {len(found.skipped)} {found.kind} can be embedded; {skipped} has the reasons")
    about = {KEY: key, **opened.described(), "fast_goal.source": str(source), "fast_goal.skipped": str(len(found.skipped))}
    columns = {name: [values[row] for row in kept] for name, values in found.columns.items()}
    _write(output, columns, parts, {**about, **notes})
    told = f"{output}: {len(kept)} {found.kind}, {store.clip.embed_dim} numbers each{_more_note(notes, patches)}"
    return f"{told}{skipped_note(found.skipped, skipped)}{cut_note(notes, len(kept))}"


def check_output(output: Path) -> None:
    """Raises DataError unless the name is that of a parquet file."""
    if output.suffix != ".parquet":
        raise DataError(f"--output {output}: the file is written as parquet; give it a name that ends in .parquet")


def open_model(uri: str) -> Model:
    """The model of a URI or folder. Raises ModelError."""
    prepare()
    from fast_goal.evaluation.features import store_key
    from fast_goal.model.clip import Clip
    from fast_goal.tracking.located import locate

    located = locate(uri)
    clip = Clip.load(located.folder)
    return Model(located, clip, store_key(clip, "fp32"))


def is_made(output: Path, key: str) -> bool:
    """Whether an earlier call with this key wrote the output."""
    return _key(output) == key and _skipped_file(output).is_file()


def find_images(folder: Path) -> Source:
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


def find_texts(path: Path, column: str) -> Source:
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


def embed_images(store: FeatureStore, source: Source, patches: bool = False) -> tuple[list[int], list[ImageFile]]:
    """Computes what the store lacks of the images, and of their patches if asked for; returns the rows that could be embedded,
    and their files. The reasons of the others are added to `source.skipped`."""
    from fast_goal.evaluation.features import ImageFile

    kept: list[ImageFile] = []
    rows: list[int] = []
    with Progress("embed", len(source.items), "images") as progress:
        try:
            for row, (path, image) in enumerate(zip(source.items, _read(source.items, store, patches), strict=True)):
                file = ImageFile(path, (0, 0), image.content)
                if image.reason:
                    source.skipped.append((source.columns["path"][row], image.reason))
                else:
                    kept.append(file)
                    rows.append(row)
                if image.pixels is None and not image.reason:
                    progress.add(0, 1)  # it was there, and says nothing of the rate
                else:
                    if image.pixels is not None and store.lacks(file, None, [], patches):
                        store.push(file, None, image.pixels, [], patches)
                    progress.update(skipped=len(source.skipped))
                if row % CHUNK == CHUNK - 1:
                    store.compute()
                    store.flush()
            store.compute()
        finally:
            store.flush()
    return rows, kept


def embed_texts(store: FeatureStore, texts: list[str]) -> dict[str, str]:
    """Computes what the store lacks of the texts; returns how many were cut off, for the metadata of a file."""
    store.add_texts(((text, None) for text in texts), "embed")
    return {CUT_OFF: str(int((store.lengths(texts) > store.context_length).sum()))}


def _images_and_parts(
    store: FeatureStore, source: Source, patches: bool
) -> tuple[list[int], Iterator[dict[str, np.ndarray]], dict[str, str]]:
    """The rows that could be embedded, the columns of their numbers [.., D] in parts, and notes for the metadata."""
    rows, files = embed_images(store, source, patches)
    width, count = store.clip.embed_dim, store.patch_count

    def part(some: list[ImageFile]) -> dict[str, np.ndarray]:
        own = {"patches": store.tokens(some).flatten(1).numpy()} if patches else {}
        return {"embedding": store.images(some).numpy(), **own}

    size = min(WRITTEN, max(1, NUMBERS // (count * width))) if patches else WRITTEN
    parts = (part(files[start : start + size]) for start in range(0, len(files), size))
    return rows, parts, {PATCHES: f"{count} {width}"} if patches else {}


def _texts_and_parts(
    store: FeatureStore, source: Source, patches: bool
) -> tuple[list[int], Iterator[dict[str, np.ndarray]], dict[str, str]]:
    """As `_images_and_parts`."""
    texts: list[str] = source.items
    notes = embed_texts(store, texts)

    def part(some: list[str]) -> dict[str, np.ndarray]:
        own = {"queries": store.queries(some).numpy()} if patches else {}
        return {"embedding": store.texts(some)[0].numpy(), **own}

    parts = (part(texts[start : start + WRITTEN]) for start in range(0, len(texts), WRITTEN))
    return list(range(len(texts))), parts, notes


def _read(paths: Sequence[Path], store: FeatureStore, patches: bool) -> Iterator[_Image]:
    """Each file in turn, read by threads ahead of the one who asks."""
    if patches:
        store.tokens([])  # opens their table: two threads that did it at once would each have their own
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        waiting: deque[Future[_Image]] = deque()
        following = iter(paths)
        waiting.extend(pool.submit(_read_one, path, store, patches) for path in islice(following, AHEAD * store.batch_size))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_read_one, path, store, patches) for path in islice(following, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _read_one(path: Path, store: FeatureStore, patches: bool) -> _Image:
    import numpy as np

    from fast_goal.data.images import open_image
    from fast_goal.evaluation.features import ImageFile

    try:
        content = path.read_bytes()
    except OSError as error:
        return _Image("", None, f"the file cannot be read ({error.strerror or error})")
    name = hashlib.sha256(content).hexdigest()
    if not store.lacks(ImageFile(path, (0, 0), name), None, [], patches):
        return _Image(name, None, "")
    try:
        image = open_image(path, content)
    except DataError as error:
        return _Image(name, None, str(error).removeprefix(f"{path}: "))
    return _Image(name, np.asarray(store.clip.view(*image.size).pixels(image)).transpose(2, 0, 1), "")


def skipped_note(skipped: list[tuple[str, str]], file: Path) -> str:
    """The end of a sentence on what was done."""
    return f"; {len(skipped)} skipped, with reasons in {file}" if skipped else ""


def cut_note(notes: dict[str, str], count: int) -> str:
    """As `skipped_note`, on `count` texts."""
    cut = int(notes.get(CUT_OFF, 0))
    return f"; {cut} of {count} texts are longer than the model reads and were cut off" if cut else ""


def _more_note(notes: dict[str, str], patches: bool) -> str:
    if PATCHES in notes:
        return f", and {notes[PATCHES].partition(' ')[0]} patches of as many"
    return ", and a query of as many" if patches else ""


def _write(output: Path, columns: dict[str, list[str]], parts: Iterator[dict[str, np.ndarray]], about: dict[str, str]) -> None:
    """The table: the columns, and those of numbers, float32 lists of fixed size, which come in parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = next(parts)
    fields = [pa.field(name, pa.string()) for name in columns]
    fields += [pa.field(name, pa.list_(pa.float32(), values.shape[1])) for name, values in first.items()]
    schema = pa.schema(fields, metadata=about)
    with atomic_path(output) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        done = 0
        for part in chain([first], parts):
            count = len(part["embedding"])
            words: list[pa.Array] = [pa.array(values[done : done + count], pa.string()) for values in columns.values()]
            lists = [
                pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), pa.float32()), values.shape[1])
                for values in part.values()
            ]
            writer.write_table(pa.table([*words, *lists], schema=schema))
            done += count


def write_skipped(output: Path, skipped: list[tuple[str, str]]) -> Path:
    """Writes what could not be embedded, with the reasons, beside `output`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, rows = _skipped_file(output), sorted(skipped)
    names, reasons = [name for name, _ in rows], [reason for _, reason in rows]
    table = pa.table({"item": pa.array(names, pa.string()), "reason": pa.array(reasons, pa.string())})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
    return path


def _skipped_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.skipped.parquet")


def _key(output: Path) -> str | None:
    """The key of an earlier output; None where there is none that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: Any = (pq.read_schema(output).metadata or {}).get(KEY.encode())
    except (OSError, pa.ArrowException):
        return None
    return None if found is None else found.decode()
