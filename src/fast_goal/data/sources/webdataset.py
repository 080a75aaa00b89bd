"""The data source `webdataset`: tar shards in which the files of a sample share the name before the first dot
(`000000012.jpg`, `000000012.txt`, `000000012.json`), as img2dataset writes CC3M and CC12M.

Every shard is read once: its images go to `images/<shard>/`, its captions into the mark `shards/<shard>.json`, written
last. A second run reads the marks; a shard that was half done, or has changed since, is done again.

The library webdataset skips what it cannot read; here the tar is walked file by file, so that all that is lost is named.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from fast_goal.config import Split, number, to_dict
from fast_goal.data.archives import disk_error, locked
from fast_goal.data.fetch import Remote, fetch_all
from fast_goal.data.samples import Sample, Skipped, look, texts
from fast_goal.data.sources import Loaded, source
from fast_goal.data.sources.folder import Fractions, draw_split
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import atomic_path, digest, read_json, write_json
from fast_goal.progress import Progress

LARGEST = 256 * 2**20  # bytes of a file in a shard; a guess well above any photograph
_BLOCK = 512  # bytes of a tar block


@dataclass(frozen=True)
class WebDatasetConfig:
    """shards: paths or URLs, with {00000..00331} for a range and, in paths, * and ?. A caption's place is an ending (`txt`)
    or a key of a JSON file (`json:caption`) whose value is a text or a list of texts. splits: from a pattern of the shard's
    name to a split, the first that fits; null leaves the shard out, and images of the other shards are drawn by
    `fractions`."""

    shards: list[str]
    images: list[str]  # endings; a sample's image is the first of them that it has
    captions: list[str]  # places of the short captions
    long_caption: str | None  # place
    splits: dict[str, Split | None]
    fractions: Fractions
    seed: int = number(0)  # of the fractions

    def __post_init__(self) -> None:
        if not self.captions and self.long_caption is None:
            raise ConfigError("captions is empty and long_caption is null: there would be no captions")


@source("webdataset", WebDatasetConfig)
def load(config: WebDatasetConfig, name: str, folder: Path) -> Loaded:
    """Fetches shards that are remote, extracts them, and looks at every image. `image_id` is `<shard>/<key>`.

    Raises DataError where a pattern matches nothing, two shards have one name, or no image can be used.
    """
    where = f"download.datasets.{name}"
    shards = {stem: path for stem, path in _shards(config.shards, name).items() if _split(config, stem)[0]}
    _remove_others(folder, set(shards))
    samples: list[Sample] = []
    skipped = Skipped()
    with Progress(f"extracting {name}", len(shards), "shards") as progress:
        for stem, path in shards.items():
            content = extract(config, path, stem, folder)
            split = _split(config, stem)[1]
            samples += [Sample(split=split, **values) for values in content["samples"]]
            skipped += content["skipped"]
            progress.update(1, samples=len(samples))
    rows, hashes = look(samples, folder, "webdataset", f"download {name}", skipped)
    if not rows:
        raise DataError(f"{where}: none of the samples can be used: {dict(Counter(row['reason'] for row in skipped))}")
    for row in rows:
        row["split"] = row["split"] or draw_split(row["content_hash"], config.seed, config.fractions)
    damaged = sum(row["reason"] == "damaged shard" for row in skipped)
    notes = [f"{damaged} of {len(shards)} shards are damaged; what comes after the damage is lost"] if damaged else []
    return Loaded(root=folder, rows=rows, skipped=list(skipped), notes=notes, hashes=hashes)


def extract(config: WebDatasetConfig, shard: Path, stem: str, folder: Path) -> dict[str, Any]:
    """The samples of one shard and what was left out, from its mark if that still holds, else from the shard."""
    mark = folder / "shards" / f"{stem}.json"
    facts = shard.stat()
    settings = {key: value for key, value in to_dict(config).items() if key in ("images", "captions", "long_caption")}
    key = digest([str(shard), facts.st_size, facts.st_mtime_ns, settings])
    try:
        with locked(mark):
            return _extracted(config, shard, stem, folder, mark, key)
    except OSError as error:
        raise disk_error(error, shard, folder) from error


def _extracted(config: WebDatasetConfig, shard: Path, stem: str, folder: Path, mark: Path, key: str) -> dict[str, Any]:
    if mark.is_file():
        try:
            content = read_json(mark)
            if content["key"] == key and all((folder / sample["image_path"]).is_file() for sample in content["samples"]):
                return content
        except (ValueError, KeyError, TypeError):
            pass  # no mark of this version: as if there were none
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder / "images" / stem, ignore_errors=True)
    skipped = Skipped()
    samples = []
    for number_of, sample in enumerate(grouped(shard, stem, skipped), 1):
        made = _sample(config, sample, stem, number_of, skipped)
        if made is None:
            continue
        values, ending = made
        with atomic_path(folder / values["image_path"]) as path:
            path.write_bytes(sample[ending])
        samples.append(values)
    content = {"key": key, "samples": samples, "skipped": list(skipped)}
    write_json(mark, content)
    return content


def _shards(patterns: list[str], name: str) -> dict[str, Path]:
    """The shards by their name without its endings; remote ones are fetched."""
    from webdataset.shardlists import expand_urls  # imports torch

    places = [place for pattern in patterns for place in expand_urls(pattern)]
    where = f"download.datasets.{name}"
    urls = [place for place in places if "://" in place]
    remotes = [Remote(url, f"{name}/{PurePosixPath(urlsplit(url).path).name}", None, None) for url in urls]
    fetched = dict(zip(urls, fetch_all(remotes), strict=True))
    found: dict[str, Path] = {}
    for place in places:
        paths = [fetched[place]] if place in fetched else [Path(path) for path in sorted(glob.glob(place))]  # noqa: PTH207
        if not paths:
            raise DataError(f"{where}.shards: {place} matches no file")
        for path in paths:
            stem = re.sub(r"(\.tar)?(\.(gz|bz2|xz|tgz))?$", "", path.name) or path.name
            if found.setdefault(stem, path) != path:
                raise DataError(f"{where}.shards: {found[stem]} and {path} have one name; it names their images, so rename one")
    if not found:
        raise DataError(f"{where}.shards is empty")
    return found


def _split(config: WebDatasetConfig, stem: str) -> tuple[bool, Split | None]:
    """(is wanted, split or None to draw it) of a shard."""
    for pattern, split in config.splits.items():
        if fnmatch.fnmatchcase(stem, pattern):
            return split is not None, split
    return True, None


def grouped(shard: Path, stem: str, skipped: Skipped) -> Iterator[dict[str, Any]]:
    """The samples of a shard, as webdataset groups its files; a key that comes back later is noted."""
    from webdataset.tariterators import group_by_keys

    def handler(error: Exception) -> bool:
        skipped.note(stem, -1, "file twice in its sample", str(error.args[0])[:200])
        return True

    seen: set[str] = set()
    for sample in group_by_keys(tar_files(shard, stem, skipped), handler=handler):
        if sample["__key__"] in seen:
            endings = sorted(ending for ending in sample if not ending.startswith("__"))
            skipped.note(f"{stem}/{sample['__key__']}", -1, "key twice in its shard", f"again with {', '.join(endings)}")
            continue
        seen.add(sample["__key__"])
        yield sample


def tar_files(shard: Path, stem: str, skipped: Skipped) -> Iterator[dict[str, Any]]:
    """The files of a tar, as group_by_keys takes them."""
    from webdataset.tariterators import base_plus_ext

    read = 0
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                tar.members = []  # else it remembers them all
                if member.isdir():
                    continue
                if not member.isreg():
                    skipped.note(f"{stem}/{member.name}", -1, "no regular file", "a link or a device; only files are read")
                elif base_plus_ext(member.name)[0] is None:
                    skipped.note(f"{stem}/{member.name}", -1, "file without an ending", "it belongs to no sample")
                elif member.size > LARGEST:
                    skipped.note(f"{stem}/{member.name}", -1, "file too large", f"{member.size:,} bytes")
                else:
                    stream = tar.extractfile(member)
                    assert stream is not None  # it is a regular file
                    yield {"fname": member.name, "data": stream.read(), "__url__": str(shard)}
                    read += 1
            # tarfile takes a header that it cannot read for the end
            tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
            block = tar.fileobj.read(_BLOCK)  # type: ignore[union-attr]
            if block.strip(b"\0"):
                skipped.note(stem, -1, "damaged shard", f"after {read} files: no tar header at byte {tar.offset:,}")
            elif len(block) < _BLOCK:
                skipped.note(stem, -1, "damaged shard", f"it ends after {read} files without the mark of its end")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        skipped.note(stem, -1, "damaged shard", f"after {read} files: {error}")


def _sample(
    config: WebDatasetConfig, sample: dict[str, Any], stem: str, number_of: int, skipped: Skipped
) -> tuple[dict[str, Any], str] | None:
    """The values of Sample, but for the split, and the ending of its image; None, noted, if it cannot be used."""
    image_id = f"{stem}/{sample['__key__']}"
    endings = [ending for ending in sample if not ending.startswith("__")]
    ending = next((ending for ending in config.images if ending in endings), None)
    if ending is None:
        skipped.note(image_id, number_of, "no image", f"its endings are {', '.join(endings)}")
        return None
    captions = texts(_values(config.captions, sample, image_id, number_of, skipped), image_id, number_of, skipped)
    long = [] if config.long_caption is None else _values([config.long_caption], sample, image_id, number_of, skipped)
    long_captions = texts(long, image_id, number_of, skipped)
    if config.long_caption is not None and not long_captions:
        skipped.note(image_id, number_of, "no long caption", f"{config.long_caption} has none")
        return None
    if len(long_captions) > 1:
        skipped.note(image_id, number_of, "second long caption", long_captions[1][:80])
    if not captions and not long_captions:
        skipped.note(image_id, number_of, "no caption", f"{', '.join(config.captions)} have none")
        return None
    values = {
        "image_id": image_id,
        # not the key, which may be any path
        "image_path": f"images/{stem}/{number_of:08d}{PurePosixPath(f'x.{ending}').suffix}",
        "long_caption": long_captions[0] if long_captions else "",
        "captions": captions,
        "row": number_of,
    }
    return values, ending


def _values(places: list[str], sample: dict[str, Any], image_id: str, row: int, skipped: Skipped) -> list[Any]:
    """What stands at the places; a missing place is nothing, one that cannot be read is noted."""
    values: list[Any] = []
    for place in places:
        ending, _, key = place.partition(":")
        if ending not in sample:
            continue
        try:
            value = sample[ending].decode("utf-8-sig")
            if key:
                value = json.loads(value)
                value = value.get(key) if isinstance(value, dict) else None
        except (ValueError, RecursionError) as error:
            skipped.note(image_id, row, "unreadable caption file", f"{ending}: {error}"[:200])
            continue
        values += value if isinstance(value, list) else [] if value is None else [value]
    return values


def _remove_others(folder: Path, stems: set[str]) -> None:
    """Removes what is left of shards that are no longer asked for."""
    for path in (folder / "shards").glob("*.json"):
        if path.stem not in stems:
            path.unlink()
    for path in (folder / "images").glob("*"):
        if path.name not in stems:
            shutil.rmtree(path, ignore_errors=True)
