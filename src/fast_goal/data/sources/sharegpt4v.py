"""The data source `sharegpt4v`: the 1,000 image-caption pairs that Long-CLIP (Zhang et al., 2024) holds out for its tests.

They are the first 1,000 records of `share-captioner_coco_lcs_sam_1246k_1107.json` of ShareGPT4V (Chen et al., 2023), a list
of objects with `image` (such as sam/images/sa_545504.jpg) and `conversations`, whose second turn is the caption. The
photographs are those of SA-1B. All are test images.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fast_goal.config import Split, number
from fast_goal.data.cleaning import Cleaner, Rule
from fast_goal.data.fetch import Remote, fetch
from fast_goal.data.sa1b import FOLDER, take_photos
from fast_goal.data.samples import Sample, Skipped, look, storable, texts, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import DataError

_CHUNK = 1 << 20  # characters read at once; the whole file has 1.4 GB
_LONGEST = 1 << 24  # characters of a record; where one seems to be longer, it is no JSON


@dataclass(frozen=True)
class ShareGpt4vConfig:
    """records: how many of the first ones. photos: the folder of SA-1B's archives or photographs, below the downloads
    folder. missing_photos: `stop` asks for them, `skip` goes on without. clean: rules of `data.cleaning`."""

    captions: Remote
    photos: str
    missing_photos: Literal["stop", "skip"]
    split: Split
    clean: list[Rule]
    records: int = number(1)


@source("sharegpt4v", ShareGpt4vConfig)
def load(config: ShareGpt4vConfig, name: str, folder: Path) -> Loaded:
    """Fetches the captions, takes the photographs of the first records from SA-1B, and looks at each.

    Raises ManualStep for photographs that are not there, DataError for a file that is no such list or has fewer records.
    """
    where = f"download.datasets.{name}"
    path = fetch(config.captions)
    skipped, cleaner = Skipped(), Cleaner(config.clean)
    samples, count = [], 0
    for count, entry in enumerate(first_records(path, config.records), 1):
        image = entry.get("image") if isinstance(entry, dict) else None
        file = posixpath.basename(image) if isinstance(image, str) else ""
        image_id = storable(file.removesuffix(posixpath.splitext(file)[1]))
        if not image_id:
            skipped.note("", count, "no image named", f"`image` is {image!r}"[:200])
            continue
        caption = _caption(entry)
        if kept := texts([cleaner(caption) if isinstance(caption, str) else caption], image_id, count, skipped):
            samples.append(Sample(image_id, f"{FOLDER}/{file}", config.split, long_caption=kept[0], row=count))
    if count < config.records:
        raise DataError(f"{path} has {count} records; {where}.records = {config.records} are asked for")
    samples = unique(samples, skipped)
    take_photos(samples, config.photos, folder, config.missing_photos)
    rows, hashes = look(samples, folder, "sharegpt4v", f"download {name}", skipped)
    if not rows:
        reasons = dict(Counter(entry["reason"] for entry in skipped))
        raise DataError(f"{where}: none of the first {config.records} records of {path} can be used: {reasons}")
    return Loaded(folder, rows, list(skipped), notes=cleaner.notes, hashes=hashes, published={config.split: count})


def _caption(entry: dict[str, Any]) -> Any:
    turns = entry.get("conversations")
    turn = turns[1] if isinstance(turns, list) and len(turns) > 1 else None
    return turn.get("value") if isinstance(turn, dict) else None


def first_records(path: Path, count: int) -> Iterator[Any]:
    """Up to `count` first elements of a JSON list, without reading what follows them. Raises DataError with the place of
    what is no JSON."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as stream:
        buffer, position, consumed, begun = "", 0, 0, False
        for index in range(count):
            while True:
                # the mark before the element: [ or ,
                position = _blanks(buffer, position)
                try:
                    mark = buffer[position]
                    if mark == "]" and begun:
                        return
                    if mark != ("," if begun else "["):
                        raise DataError(f"{path}: expected a JSON list; at character {consumed + position} is {mark!r}")
                    start = _blanks(buffer, position + 1)
                    if buffer[start] == "]" and not begun:
                        return
                    value, position = decoder.raw_decode(buffer, start)
                    break
                except (IndexError, json.JSONDecodeError) as error:
                    try:
                        more = "" if len(buffer) - position > _LONGEST else stream.read(_CHUNK)
                    except UnicodeDecodeError as broken:
                        raise DataError(f"{path} is not UTF-8 text: {broken}") from None
                    if not more:
                        raise DataError(
                            f"{path}: record {index + 1}, at character {consumed + position}, is no JSON or cut off ({error})"
                        ) from None
                    consumed += position
                    buffer, position = buffer[position:] + more, 0
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
                    raise DataError(f"{path}: record {index + 1}, at character {consumed + position}: {error}") from None
            begun = True
            yield value


def _blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
