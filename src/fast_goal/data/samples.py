"""What the sources share: samples before their images were looked at, and the list of what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_goal.data.inspection import inspect_images


@dataclass
class Sample:
    """One image with its captions. `image_path` is relative to the root; `row` is its place in the source's own table,
    from 1, or -1; a `split` of None is drawn once the image's content is known."""

    image_id: str
    image_path: str
    split: str | None
    long_caption: str = ""
    captions: list[str] = field(default_factory=list)
    row: int = -1


class Skipped(list[dict[str, Any]]):
    """Rows of the table `skipped`."""

    def note(self, sample: str, row: int, reason: str, detail: str = "") -> None:
        """Adds a row; `reason` is one of a few words, to count by."""
        values = {"sample": storable(sample), "row": row, "step": "download", "reason": reason, "detail": storable(detail)}
        self.append(values)


def storable(text: str) -> str:
    """The text as a table can hold it: half a surrogate pair, which JSON and file names can hold, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def texts(values: Sequence[Any], sample: str, row: int, skipped: Skipped) -> list[str]:
    """The captions as published; what is no text, is empty or stands there twice is left out and noted."""
    kept: list[str] = []
    for value in values:
        if not isinstance(value, str):
            skipped.note(sample, row, "caption is not text", f"{value!r} is {type(value).__name__}"[:80])
        elif not value.strip():
            skipped.note(sample, row, "empty caption")
        elif (text := storable(value)) in kept:
            skipped.note(sample, row, "duplicate caption", text[:80])
        else:
            kept.append(text)
    return kept


def unique(samples: Iterable[Sample], skipped: Skipped) -> list[Sample]:
    """The first sample of each id; the others are noted."""
    first: dict[str, Sample] = {}
    for sample in samples:
        other = first.setdefault(sample.image_id, sample)
        if other is not sample:
            detail = f"the id {sample.image_id!r} belongs to {other.image_path} (row {other.row})"
            skipped.note(sample.image_path, sample.row, "duplicate id", detail)
    return list(first.values())


def look(
    samples: Sequence[Sample], root: Path, source: str, label: str, skipped: Skipped
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Decodes every image: rows of RECORDS, with the split left open where it is None, and of HASHES.

    A sample whose id or path no table can hold is noted, not renamed: the files on the disk have these bytes as names.
    """
    rows, hashes = [], []
    samples = [sample for sample in samples if _nameable(sample, skipped)]
    found = inspect_images([root / sample.image_path for sample in samples], label)
    for sample, result in zip(samples, found, strict=True):
        if isinstance(result, tuple):
            skipped.note(sample.image_id, sample.row, *result)
            continue
        rows.append(
            {
                "image_id": sample.image_id,
                "image_path": sample.image_path,
                "width": result.width,
                "height": result.height,
                "split": sample.split,
                "long_caption": sample.long_caption,
                "captions": sample.captions,
                "source": source,
                "content_hash": result.content_hash,
            }
        )
        hashes.append({"image_id": sample.image_id, "perceptual_hash": result.perceptual_hash})
    return rows, hashes


def _nameable(sample: Sample, skipped: Skipped) -> bool:
    for name in (sample.image_id, sample.image_path):
        if storable(name) != name:
            skipped.note(sample.image_id, sample.row, "name is not UTF-8", f"{name!r}; rename it, or encode it as UTF-8")
            return False
    return True


def draw(content: str, seed: int) -> float:
    """A number in [0, 1) that depends on an image's content and the seed alone, so that copies fall together."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()[:8], "big") / 2**64
