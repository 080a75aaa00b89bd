"""Images inside tar shards, read at their place instead of being extracted.

The shards are those that `fast-goal publish` writes with the layout `webdataset` (docs/dataset_layout.md), whose image ids
stand in the JSON files, or a plain WebDataset, whose images are called `<shard>/<key>`, as the source `webdataset` does.

Where an image lies is found once, from the tar headers, and kept in a small file; a shard whose size or time has changed is
walked through again.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fast_goal.data.archives import locked
from fast_goal.data.images import SUFFIXES
from fast_goal.errors import DataError
from fast_goal.files import atomic_path, digest
from fast_goal.progress import Progress

VERSION = 1  # of the index
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key and ending, as webdataset takes a file's name apart
_ENDINGS = {suffix.removeprefix(".") for suffix in SUFFIXES} | {"img"}
_BLOCK = 512  # bytes of a tar block
_INDEX = pa.schema(
    [
        ("shard", pa.int64()),  # number in the list of shards
        ("image_id", pa.string()),
        ("ending", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("content_hash", pa.string()),  # "" where the shard does not say it
    ]
)


class ShardImages:
    """The images of these ids, by their number, from the tar files below `folder`.

    paths: what the records call the images; of several in one sample, the one with that ending is taken. hashes: SHA-256 of
    the files, where the records have it. `index` is the folder where it is kept what is where.

    Raises DataError, which names the id and the shard, for an image that is in no shard or twice, and for one that was
    published with another content.
    """

    def __init__(self, folder: Path, ids: Sequence[str], paths: Sequence[str], hashes: Sequence[str] | None, index: Path):
        shards, table = shard_index(folder, index)
        # absolute, because the workers may start in another folder
        self._shards = [(Path(path).absolute(), size, changed) for path, size, changed, _ in shards]
        wanted = pd.DataFrame({"image_id": ids, "suffix": [PurePosixPath(path).suffix.lower() for path in paths]})
        found = table.merge(wanted, on="image_id")
        alone = ~found["image_id"].duplicated(keep=False)
        found = found[alone | (("." + found["ending"]).str.extract(r"(\.[^.]*)$")[0] == found["suffix"])]
        twice = found[found["image_id"].duplicated(keep=False)]
        if len(twice):
            name = twice["image_id"].iloc[0]
            places = twice[twice["image_id"] == name]
            where = " and ".join(f"{self._shards[row.shard][0]} (byte {row.offset:,})" for row in places.itertuples())
            raise DataError(f"image {name!r} stands more than once in the shards: in {where}. Remove all but one.")
        found = found.set_index("image_id").reindex(ids)
        missing = found["shard"].isna()
        if missing.any():
            damaged = [f"{path} is damaged ({damage})" for path, _, _, damage in shards if damage]
            raise DataError(
                f"image {found.index[missing][0]!r}, one of {missing.sum():,} that are missing, is in none of the "
                f"{len(shards):,} tar files below {folder}. " + "; ".join([*damaged[:3], "publish or download them again."])
            )
        self._ids = list(ids)
        self._rows = found[["shard", "offset", "size"]].astype("int64").to_numpy()
        for name, published, known in zip(ids, found["content_hash"], hashes or (), strict=False):
            if published and published != known:
                raise DataError(
                    f"image {name!r} has another content in {self._place(self._ids.index(name))[0]} than in the records. "
                    "Run `fast-goal publish` again."
                )

    def path(self, index: int) -> Path:
        """What errors call the image: the shard, and the id."""
        return self._place(index)[0] / self._ids[index]

    def read(self, index: int) -> bytes:
        """The image file's bytes. Raises DataError, which names the shard and the id."""
        shard, size, changed, offset, length = self._place(index)
        try:
            descriptor = os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise self._error(index, f"cannot be opened ({error.strerror or error})") from None
        try:
            found = os.fstat(descriptor)
            if (found.st_size, found.st_mtime_ns) != (size, changed):
                raise self._error(index, "was changed since the training began. Run the step again")
            content = os.pread(descriptor, length, offset)
        except OSError as error:
            raise self._error(index, f"cannot be read ({error.strerror or error})") from None
        finally:
            os.close(descriptor)
        if len(content) < length:
            raise self._error(index, f"has {len(content):,} of {length:,} bytes at byte {offset:,}")
        return content

    def state(self, index: int) -> str:
        """The image's place, and size and time of the last change of its shard."""
        return "|".join(map(str, self._place(index)))

    def _place(self, index: int) -> tuple[Path, int, int, int, int]:
        shard, offset, size = self._rows[index].tolist()
        return (*self._shards[shard], offset, size)

    def _error(self, index: int, what: str) -> DataError:
        return DataError(f"{self._place(index)[0]}, of which image {self._ids[index]!r} is to be read, {what}.")


def shard_index(folder: Path, kept: Path) -> tuple[list[list[Any]], pd.DataFrame]:
    """[path, size, time of the last change, damage or ""] of each tar file below `folder`, and which images are where: the
    columns of the index. It is kept in the folder `kept`; processes that ask at the same time wait for the first."""
    shards = sorted(str(shard) for shard in folder.rglob("*.tar"))
    if not shards:
        raise DataError(f"shards: there is no .tar file below {folder}; set it to the folder that `fast-goal publish` wrote")
    path = kept / f"{digest(str(folder.resolve()))}.parquet"
    try:
        with locked(path):
            known = _kept(path)
            facts = {shard: [shard, found.st_size, found.st_mtime_ns] for shard in shards for found in [Path(shard).stat()]}
            stale = [shard for shard in shards if shard not in known or known[shard][0][:3] != facts[shard]]
            if stale:
                with Progress("index of shards", len(stale), "shards") as progress:
                    for shard in stale:
                        rows, damage = _walked(Path(shard), facts[shard][1])
                        known[shard] = [*facts[shard], damage], rows
                        progress.update()
            states = [known[shard][0] for shard in shards]
            table = pd.concat([known[shard][1].assign(shard=number) for number, shard in enumerate(shards)], ignore_index=True)
            if stale or len(known) > len(shards):
                metadata = {"version": str(VERSION), "shards": json.dumps(states)}
                made = pa.Table.from_pandas(table, _INDEX, preserve_index=False).replace_schema_metadata(metadata)
                with atomic_path(path) as temporary:
                    pq.write_table(made, temporary)
    except OSError as error:
        raise DataError(f"{path}: the index of the shards in {folder} cannot be made ({error.strerror or error})") from None
    return states, table


def _kept(path: Path) -> dict[str, tuple[list[Any], pd.DataFrame]]:
    """What an earlier index says, by shard; nothing where there is none that can be read."""
    try:
        found = pq.read_table(path)
        metadata = found.schema.metadata
        if metadata[b"version"] != str(VERSION).encode() or found.schema.names != _INDEX.names:
            return {}
        shards = json.loads(metadata[b"shards"])
        parts = dict(iter(found.to_pandas().groupby("shard")))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return {}
    empty = _INDEX.empty_table().to_pandas()
    return {state[0]: (state, parts.get(number, empty)) for number, state in enumerate(shards)}


def _walked(shard: Path, length: int) -> tuple[pd.DataFrame, str]:
    """The images of a shard of `length` bytes, and what is wrong with it; what comes after a damage is not known."""
    rows: list[dict[str, Any]] = []
    damage = ""
    sample = _Sample(shard.stem, "")
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in _members(tar):
                if member.offset_data + member.size > length:
                    damage = f"it ends within {member.name}"
                    break
                match = _SAMPLE.fullmatch(member.name)
                if match is None or not member.isreg() or member.issparse():
                    continue
                if match[1] != sample.key:
                    rows += sample.rows()
                    sample = _Sample(shard.stem, match[1])
                sample.files.append((match[2].lower(), member.offset_data, member.size))
                if match[2].lower() == "json":
                    stream = tar.extractfile(member)
                    assert stream is not None  # it is a regular file
                    sample.describe(stream.read())
            else:
                # tarfile takes a header that it cannot read for the end
                tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
                block = tar.fileobj.read(_BLOCK)  # type: ignore[union-attr]
                if block.strip(b"\0") or len(block) < _BLOCK:
                    damage = f"no tar header and no mark of the end at byte {tar.offset:,}"
    except (tarfile.TarError, EOFError, OSError) as error:
        damage = str(error)
    rows += sample.rows()
    return pd.DataFrame(rows, columns=_INDEX.names), damage


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members = []  # else it remembers them all
        yield member


class _Sample:
    """The files of one sample."""

    def __init__(self, shard: str, key: str):
        self.key, self.files = key, list[tuple[str, int, int]]()
        self._id, self._hash = f"{shard}/{key}", ""
        self._published = False

    def describe(self, content: bytes) -> None:
        """Takes the id from the JSON file, if it is a row of a published data set."""
        try:
            row = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(row, dict) and isinstance(row.get("image_id"), str) and isinstance(row.get("content_hash"), str):
            self._id, self._hash, self._published = row["image_id"], row["content_hash"], True

    def rows(self) -> list[dict[str, Any]]:
        """A row of the index for each image; the shard is left open."""
        return [
            {
                "shard": 0,
                "image_id": self._id,
                "ending": ending,
                "offset": offset,
                "size": size,
                "content_hash": self._hash,
            }
            for ending, offset, size in self.files
            if (ending != "json" if self._published else ending.rsplit(".", 1)[-1] in _ENDINGS)
        ]
