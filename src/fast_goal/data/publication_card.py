"""The card of a published data set: README.md in Hugging Face's form, with small pictures of a few local pairs.

It holds no date and no path of this machine: the same data give the same card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml
from PIL import Image, ImageDraw

from fast_goal.data.images import open_image
from fast_goal.files import atomic_path, write_text

SIDE = 256  # pixels of the pictures' longer side
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)
NAMED = 5  # skipped samples named for each reason
AROUND = 600  # characters of an example's caption that are shown on either side of its sentence
MEANING = {
    "image": "the image: `bytes` as the file has them, and `path`",
    "image_id": "unique in the data set",
    "image_path": "of the image file, relative to the data root",
    "width": "pixels, after the EXIF rotation",
    "height": "pixels, after the EXIF rotation",
    "split": "pretrain, train, val or test",
    "long_caption": "the description; empty if there is none",
    "captions": "short captions",
    "source": "where the image and its captions come from",
    "content_hash": "SHA-256 of the image file",
    "local_sentence": "the sentence of the best local pair; null if the image has none",
    "char_start": "`long_caption[char_start:char_end] == local_sentence`, in Unicode characters",
    "char_end": "exclusive",
    "x1": "left edge of the region, pixels of the image after its EXIF rotation",
    "y1": "top edge",
    "x2": "right edge, exclusive",
    "y2": "bottom edge, exclusive",
    "kind": "of the region: detector, quadrant or centre",
    "similarity": "cosine of region and sentence",
    "pairs": "all local pairs of the image, best first, with `rank`, `sentence_index`, `region_index` and `weight`",
}
LAYOUT_TEXT = {
    "table": "Parquet files without the images: `image_path` is relative to the folder of the images, which you must have.",
    "parquet": "Parquet files with the images' own bytes; `datasets.load_dataset` reads them.",
    "webdataset": "WebDataset tar files: `<number>.<ending of the image>` and `<number>.json`, which holds the columns below.",
}
LIMITS = """* The local pairs are chosen by a model, not by people. The pair of an image is its most similar one: there is no
  threshold, so some describe their region badly. `similarity` allows to filter.
* A region is a detection or one of five fixed parts of the image; it may hold more than its sentence speaks of.
"""
PUBLISHED_CAPTIONS = "* Captions are kept as their source published them, mistakes included."
WRITTEN_CAPTIONS = """* The long captions were written by a model that was shown the image: no person has
  checked them, and they may speak of what is not there."""


def write_card(
    path: Path,
    info: Mapping[str, Any],
    schema: pa.Schema,
    skipped: pd.DataFrame,
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the card. info: what stands in dataset.json. examples: pairs with `picture` (None: none is
    shown) and `long_caption`."""
    parts = [
        f"---\n{yaml.safe_dump(_header(info), sort_keys=False, allow_unicode=True)}---",
        f"# {_escaped(info['name'])}",
        _opening(info),
        "## Counts",
        _counts(info),
        "## How it was made",
        _made(info),
        "## Layout",
        _layout(info, schema),
        "## Examples",
        _examples(examples),
        "## What was left out",
        _skipped(skipped),
        "## Limits",
        (LIMITS if info["pairs"] else "") + (WRITTEN_CAPTIONS if "captions" in info["made"] else PUBLISHED_CAPTIONS),
    ]
    write_text(path, "\n\n".join(parts) + "\n")


def draw_example(image_path: Path, pair: Mapping[str, Any], path: Path) -> None:
    """A small JPEG with the pair's box. Raises DataError for an image that cannot be read."""
    image = open_image(image_path)
    scale = min(1.0, SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BICUBIC)
    x1, y1, x2, y2 = (pair[name] * scale for name in ("x1", "y1", "x2", "y2"))
    box = (max(0.0, x1), max(0.0, y1), max(x1, min(x2, size[0]) - 1), max(y1, min(y2, size[1]) - 1))
    draw = ImageDraw.Draw(small)
    draw.rectangle(box, outline=(255, 255, 255), width=4)
    draw.rectangle(box, outline=(204, 51, 17), width=2)
    with atomic_path(path) as temporary:
        small.save(temporary, format="JPEG", quality=85)


def _header(info: Mapping[str, Any]) -> dict[str, Any]:
    pattern = {split: f"data/{split}-*" for split in info["splits"]}
    size = next((name for limit, name in SIZES if info["images"] < limit), "100M<n<1B")
    return {
        "pretty_name": info["name"],
        "license": info["licence"],
        "task_categories": ["image-to-text", "text-to-image"],
        "tags": [
            *(["long-captions"] if info["long_captions"] else []),
            "image-text-retrieval",
            *(["region-sentence-pairs"] if info["pairs"] else []),
            "clip",
        ],
        "size_categories": [size],
        "configs": [
            {"config_name": "default", "data_files": [{"split": split, "path": path} for split, path in pattern.items()]}
        ],
    }


def _opening(info: Mapping[str, Any]) -> str:
    pairs = (
        f"{info['images_with_pair']:,} of them with a local pair: a region of the image and the sentence of its long caption "
        "that describes it"
        if info["pairs"]
        else "without local pairs"
    )
    words = f" Long captions have {info['mean_words_long']:g} words on average." if info["long_captions"] else ""
    return (
        f"{info['images']:,} images with captions, {pairs}.{words} Licence: {_escaped(info['licence'])}. Digest of the data "
        f"files: `{info['digest']}`."
    )


def _counts(info: Mapping[str, Any]) -> str:
    rows = [[split, f"{values['images']:,}", len(values["files"])] for split, values in info["splits"].items()]
    text = _table(["split", "images", "files"], rows)
    similarity = "" if info["mean_similarity"] is None else f"; mean similarity of the best pairs {info['mean_similarity']:.3f}"
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in info["pairs_by_kind"].items())
    return (
        f"{text}\n\nLong captions: {info['long_captions']:,}; short captions: {info['short_captions']:,}; local pairs: "
        f"{info['pairs']:,}{f' (best pairs by kind of region: {kinds})' if kinds else ''}{similarity}."
    )


def _made(info: Mapping[str, Any]) -> str:
    rows = [
        [part, name, "null" if value is None else f"`{value}`"]
        for part, values in info["made"].items()
        for name, value in values.items()
    ]
    text = f"Source of images and captions: `{info['source']}`, records digest `{info['records_digest']}`."
    if info["pairs"]:
        text += (
            " The local pairs were made by FLISM: every region (detections, quadrants, centre) and every sentence is embedded "
            "with CLIP, each sentence takes its most similar region, and the most similar of these pairs come first."
        )
    return f"{text}\n\n{_table(['part', 'setting', 'value'], rows)}" if rows else text


def _layout(info: Mapping[str, Any], schema: pa.Schema) -> str:
    rows = [[f"`{column.name}`", _type(column.type), MEANING[column.name]] for column in schema]
    files = (
        "`dataset.json` holds these counts for programs, `skipped.parquet` what was left out and why, `checksums.sha256` the "
        "digest of every file (`sha256sum --check checksums.sha256`)."
    )
    return f"{LAYOUT_TEXT[info['layout']]}\n\n{_table(['column', 'type', 'meaning'], rows)}\n\n{files}"


def _type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else str(kind)


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    if not examples:
        return "None: no image has a local pair."
    parts = []
    for example in examples:
        caption, start, end = example["long_caption"], example["char_start"], example["char_end"]
        before = ("… " if start > AROUND else "") + _escaped(caption[max(0, start - AROUND) : start])
        after = _escaped(caption[end : end + AROUND]) + (" …" if end + AROUND < len(caption) else "")
        name = _escaped(example["image_id"])
        box = ", ".join(f"{example[side]:.0f}" for side in ("x1", "y1", "x2", "y2"))
        text = f"{name}, {example['kind']} ({box}), similarity {example['similarity']:.3f}: "
        text += f"{before}**{_escaped(caption[start:end])}**{after}".strip()
        parts.append(f"![{name}]({example['picture']})\n\n{text}" if example["picture"] else text)
    return "\n\n".join(
        ["Evenly spread over the data set, not chosen; the box (pixels) and the sentence in bold are the best pair.", *parts]
    )


def _skipped(skipped: pd.DataFrame) -> str:
    if len(skipped) == 0:
        return "Nothing."
    rows = []
    for (step, reason), part in sorted(skipped.groupby(["step", "reason"]), key=lambda item: (-len(item[1]), item[0])):
        named = ", ".join(Path(sample).name if Path(sample).is_absolute() else sample for sample in part["sample"].head(NAMED))
        rows.append([step, reason, f"{len(part):,}", named])
    return _table(["step", "reason", "rows", "the first"], rows) + "\n\nAll of them: `skipped.parquet`."


def _escaped(text: str) -> str:
    """Text of a caption that Markdown shall not read."""
    text = re.sub(r"\s+", " ", text)
    return "".join(f"\\{letter}" if letter in "*_`[]<>#|\\" else letter for letter in text)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
