"""The data source `urban1k`: 1,000 city scenes with long captions (Zhang et al., 2024: Long-CLIP).

The archive has `Urban1k/image/<number>.jpg` and `Urban1k/caption/<number>.txt`, which belong together by their stems. All
are test images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fast_goal.config import Split
from fast_goal.data.archives import unpack
from fast_goal.data.cleaning import Cleaner, Rule
from fast_goal.data.fetch import Remote, fetch
from fast_goal.data.images import SUFFIXES
from fast_goal.data.samples import Sample, Skipped, look, texts, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import DataError


@dataclass(frozen=True)
class Urban1kConfig:
    """images, captions: folders in the archive. clean: rules of `data.cleaning`."""

    archive: Remote
    images: str
    captions: str
    split: Split
    clean: list[Rule]


@source("urban1k", Urban1kConfig)
def load(config: Urban1kConfig, name: str, folder: Path) -> Loaded:
    """Fetches and unpacks the archive; pairs captions and images; looks at each.

    The order is that of the stems, numbers by their value; a row of `skipped` has the place in it. Raises DataError where a
    folder is not there or nothing can be used.
    """
    where = f"download.datasets.{name}"
    unpack(fetch(config.archive), folder)
    skipped, cleaner = Skipped(), Cleaner(config.clean)
    images = _by_stem(folder / config.images, SUFFIXES, f"{where}.images", skipped)
    captions = _by_stem(folder / config.captions, {".txt"}, f"{where}.captions", skipped)
    samples = []
    for row, stem in enumerate(sorted(images.keys() | captions.keys(), key=_order), 1):
        if stem not in captions:
            skipped.note(stem, row, "no caption", f"{images[stem]} has no caption file")
            continue
        image = images.get(stem, folder / config.images / f"{stem}.jpg")  # one that is not there is noted as missing
        try:
            caption = captions[stem].read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            skipped.note(stem, row, "caption is not text", f"{captions[stem]} is not UTF-8: {error}")
            continue
        if kept := texts([cleaner(caption)], stem, row, skipped):
            samples.append(Sample(stem, image.relative_to(folder).as_posix(), config.split, long_caption=kept[0], row=row))
    rows, hashes = look(unique(samples, skipped), folder, "urban1k", f"download {name}", skipped)
    if not rows:
        reasons = dict(Counter(entry["reason"] for entry in skipped))
        raise DataError(f"{where}: none of the images of {folder / config.images} can be used: {reasons}")
    return Loaded(folder, rows, list(skipped), notes=cleaner.notes, hashes=hashes, published={config.split: len(captions)})


def _by_stem(folder: Path, suffixes: frozenset[str] | set[str], key: str, skipped: Skipped) -> dict[str, Path]:
    """The first file of each stem; the others are noted."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not in the archive; set {key} to the folder that is")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith("."))
    first: dict[str, Path] = {}
    for path in files:
        if path.is_file() and (other := first.setdefault(path.stem, path)) is not path:
            skipped.note(path.name, -1, "duplicate id", f"{path} and {other} have one stem; the second is left out")
    return first


def _order(stem: str) -> tuple[int, int, str]:
    return (0, int(stem), stem) if stem.isascii() and stem.isdigit() else (1, 0, stem)
