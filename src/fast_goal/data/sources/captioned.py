"""A folder of images without captions: an image-to-text model writes them (METHOD section 4, the way GLIT100k was made).

The model's answers are kept in `.fast_goal/captions/`; `data/datasets/<name>/captions.jsonl` shows each image with its
caption and the answer it comes from, and can be read by the source `folder`.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_goal.config import number
from fast_goal.data.captioning import CaptionerConfig, Failure
from fast_goal.data.captioning.asking import ask_about
from fast_goal.data.captioning.editing import clean
from fast_goal.data.samples import Sample, Skipped, look, storable
from fast_goal.data.sources import Loaded, source
from fast_goal.data.sources.folder import Fractions, assign_splits, image_files
from fast_goal.errors import DataError
from fast_goal.files import digest, write_json, write_text

CAPTIONS_FILE = "captions.jsonl"


@dataclass(frozen=True)
class CaptionedConfig:
    """`images` is below `root`; every image in it and below it is taken, hidden ones apart."""

    root: str
    images: str
    prompt: str
    captioner: CaptionerConfig
    fractions: Fractions
    seed: int = number(0)  # of the splits


@source("captioned", CaptionedConfig)
def load(config: CaptionedConfig, name: str, folder: Path) -> Loaded:
    """Looks at every image, asks the model about those it has not seen, and divides the images into splits.

    Raises DataError where there are no images or none gets a caption, ModelError where the model cannot be had.
    """
    root, where = Path(config.root), f"download.datasets.{name}"
    if not (root / config.images).is_dir():
        raise DataError(f"{where}: the folder of images {root / config.images} does not exist; set {where}.root or .images")
    if not (root / config.images).resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where}.images = {config.images!r} is not below {where}.root = {config.root!r}")
    if root.resolve().is_relative_to(folder.parent.resolve()):
        raise DataError(f"{where}.root = {config.root}: {folder.parent} is rewritten by this step; keep your images elsewhere")
    skipped = Skipped()
    samples = _samples(image_files(root, config.images), config.images, skipped)
    rows, hashes = look(samples, root, "captioned", f"download {name}", skipped)
    if not rows:
        raise DataError(f"{where}: {root / config.images} has no image that can be used. {_counted(skipped)}")
    paths: dict[str, Path] = {}
    for row in rows:
        paths.setdefault(row["content_hash"], root / row["image_path"])
    asked = ask_about(paths, config.captioner, config.prompt, where, f"captioning {name}")

    kept, lines, rules = [], [], Counter[str]()
    for row in rows:
        result = asked.results[row["content_hash"]]
        caption = result if isinstance(result, Failure) else clean(result)
        if isinstance(caption, Failure):
            skipped.note(row["image_id"], -1, caption.reason, caption.detail)
        else:
            row["long_caption"] = caption.text
            rules.update(caption.rules)
            kept.append(row)
        lines.append(
            {
                "image": posixpath.relpath(row["image_path"], config.images),
                "caption": row["long_caption"],
                "skipped": caption.reason if isinstance(caption, Failure) else "",
                "rules": [] if isinstance(caption, Failure) else list(caption.rules),
                "raw": "" if isinstance(result, Failure) else storable(result.text),
                "finish": "" if isinstance(result, Failure) else result.finish,
                "model": config.captioner.model if isinstance(result, Failure) else result.model,
                "prompt_digest": digest(config.prompt),
            }
        )
    _write(lines, config, folder)
    if not kept:
        raise DataError(f"{where}: no image got a caption; see {folder / CAPTIONS_FILE}. {_counted(skipped)}")
    usable = {row["image_id"] for row in kept}
    notes = [f"captions by {config.captioner.model}: {asked.new:,} asked now, {len(paths) - asked.new:,} known before"]
    notes += asked.notes
    notes += [f"{rule}: {count:,} captions ({folder / CAPTIONS_FILE} has the answers)" for rule, count in rules.most_common()]
    return Loaded(
        root=root,
        rows=kept,
        skipped=list(skipped),
        notes=notes + assign_splits(kept, config.seed, config.fractions),
        hashes=[row for row in hashes if row["image_id"] in usable],
    )


def _samples(paths: list[str], images: str, skipped: Skipped) -> list[Sample]:
    """An image's id is its path below the folder of images without the suffix; images that differ in nothing else keep it."""
    named = []
    for path in paths:
        if storable(path) == path:
            named.append((path, posixpath.relpath(path, images)))
        else:  # a name that is no UTF-8, which no table can hold
            skipped.note(path, -1, "file name is not UTF-8", "rename the file")
    stems = Counter(posixpath.splitext(name)[0] for _, name in named)
    return [Sample(stem if stems[stem := posixpath.splitext(name)[0]] == 1 else name, path, split=None) for path, name in named]


def _write(lines: list[dict[str, Any]], config: CaptionedConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(folder / CAPTIONS_FILE, text)
    facts = {"root": config.root, "images": config.images, "model": config.captioner.model, "prompt": config.prompt}
    write_json(folder / "SOURCE.json", {"source": "captioned", **facts})


def _counted(skipped: Skipped) -> str:
    first: dict[str, dict[str, Any]] = {}
    for row in skipped:
        first.setdefault(row["reason"], row)
    counts = Counter(row["reason"] for row in skipped)
    return " ".join(
        f"{reason}: {count} (first: {first[reason]['sample']} {first[reason]['detail']})."
        for reason, count in counts.most_common()
    )
