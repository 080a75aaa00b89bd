"""The data source `docci`: Descriptions of Connected and Contrasting Images (Onoe et al., 2024; google.github.io/docci).

`docci_descriptions.jsonlines` has an object a line with `example_id`, `split` (train, test, qual_dev, qual_test),
`image_file` and `description`; `docci_images.tar.gz` has the photographs in `images/`. The description is the long caption;
there are no short ones.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_goal.config import Split
from fast_goal.data.archives import unpack
from fast_goal.data.cleaning import Cleaner, Rule
from fast_goal.data.fetch import Remote, fetch_all
from fast_goal.data.samples import Sample, Skipped, look, texts, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import DataError

FIELDS = ("example_id", "split", "image_file", "description")


@dataclass(frozen=True)
class DocciConfig:
    """splits: from the publication's split to ours; null leaves it out. clean: rules of `data.cleaning`."""

    descriptions: Remote
    images: Remote
    splits: dict[str, Split | None]
    clean: list[Rule]


@source("docci", DocciConfig)
def load(config: DocciConfig, name: str, folder: Path) -> Loaded:
    """Fetches the descriptions and the images, unpacks these to `folder/images/` and looks at each that is asked for.

    A line that cannot be used is a row of `skipped`; the images of a split that is mapped to null are only counted. Raises
    DataError where no line can be used, and for a split in `splits` that the file does not have.
    """
    where = f"download.datasets.{name}"
    descriptions, images = fetch_all([config.descriptions, config.images])
    skipped, cleaner = Skipped(), Cleaner(config.clean)
    published: Counter[str] = Counter()
    samples = []
    for row, entry in _entries(descriptions, skipped):
        sample = entry["example_id"]
        published[entry["split"]] += 1
        if entry["split"] not in config.splits:
            skipped.note(sample, row, "unknown split", f"{entry['split']!r} is not in {where}.splits: {sorted(config.splits)}")
            continue
        split = config.splits[entry["split"]]
        if split is None:
            continue
        file = entry["image_file"]
        if not file or posixpath.basename(file) != file:
            skipped.note(sample, row, "no image named", f"image_file {file!r} is no file name")
        elif captions := texts([cleaner(entry["description"])], sample, row, skipped):
            samples.append(Sample(sample, f"images/{file}", split, long_caption=captions[0], row=row))
    if not published:
        found = "; ".join(f"line {entry['row']}: {entry['detail']}" for entry in skipped[:3]) or "it is empty"
        raise DataError(
            f"{descriptions} has no line that can be read: expected a JSON object a line with {', '.join(FIELDS)}. {found}. "
            f"Correct {where}.descriptions, or delete the file to have it fetched again."
        )
    if unknown := sorted(split for split, ours in config.splits.items() if ours is not None and split not in published):
        raise DataError(
            f"{where}.splits: {descriptions} has no line of the split {', '.join(unknown)}; it has {dict(published)}"
        )
    unpack(images, folder)
    rows, hashes = look(unique(samples, skipped), folder, "docci", f"download {name}", skipped)
    if not rows:
        reasons = dict(Counter(entry["reason"] for entry in skipped))
        raise DataError(f"{where}: none of the {published.total()} lines of {descriptions} can be used: {reasons}")
    left_out = [split for split, ours in config.splits.items() if ours is None]
    notes = [f"the split {split} ({published[split]:,} images) is left out, as {where}.splits says" for split in left_out]
    return Loaded(folder, rows, list(skipped), notes=[*notes, *cleaner.notes], hashes=hashes, published=dict(published))


def _entries(path: Path, skipped: Skipped) -> Iterator[tuple[int, dict[str, Any]]]:
    """The usable lines with their numbers from 1; the others are noted."""
    with path.open("rb") as stream:
        for row, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                skipped.note("", row, "unreadable row", f"{path.name} is no JSON here: {error}")
                continue
            if not isinstance(entry, dict):
                skipped.note("", row, "unreadable row", f"expected an object, found {type(entry).__name__}")
            elif wrong := [field for field in FIELDS if not isinstance(entry.get(field), str)]:
                sample = entry.get("example_id")
                detail = f"{', '.join(wrong)}: expected text, found {', '.join(repr(entry.get(field)) for field in wrong)}"
                skipped.note(sample if isinstance(sample, str) else "", row, "unreadable row", detail[:200])
            elif not entry["example_id"]:
                skipped.note("", row, "unreadable row", "example_id is empty")
            else:
                yield row, entry
