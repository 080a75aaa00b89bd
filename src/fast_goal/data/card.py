"""The data card: what a data set is, in Markdown and a few pictures, for people who will use it.

It holds no date and no path of this machine: the same data give the same card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fast_goal.data import card_pictures
from fast_goal.data.caption_checks import CaptionLengths
from fast_goal.data.quality import Subject
from fast_goal.data.records import SPLITS
from fast_goal.data.validation import Findings

EXAMPLES = 3  # skipped samples named for each reason
NOT_STATED = "not stated by the source"
LICENCES = {
    "scenes": "drawn by this project's own generator",
    "rich_scenes": "drawn by this project's own generator",
    "docci": "CC BY 4.0 (images and descriptions)",
    "dci": "descriptions: see github.com/facebookresearch/DCI; images: that of SA-1B",
    "sharegpt4v": "captions: see sharegpt4v.github.io; images: that of SA-1B",
}
EXPLANATIONS = {
    "scenes": "Procedurally drawn scenes with long and short captions and true boxes.",
    "rich_scenes": "Procedurally drawn scenes of many kinds of objects, with long and short captions and true boxes.",
    "folder": "A folder of images with a table of captions.",
    "docci": "DOCCI: photographs with long descriptions written by people (Onoe et al., 2024).",
    "dci": "DCI: images of SA-1B with dense descriptions written by people (Urbanek et al., 2024).",
    "karpathy": "Photographs with several short captions each, in the splits of Karpathy and Fei-Fei (2015).",
    "urban1k": "Urban1k: 1,000 street scenes with long captions (Long-CLIP, Zhang et al., 2024).",
    "sharegpt4v": "ShareGPT4V: images with captions by GPT-4V (Chen et al., 2023).",
    "webdataset": "Tar shards of images with their captions.",
    "glit100k": "GLIT100k: images of SA-1B with LLaVA-NeXT captions and one local pair each (FAST-GOAL).",
    "captioned": "A folder of images, captioned by an image-to-text model.",
}
PICTURES = {
    "captions": "Length of the long captions in words and tokens",
    "examples": "Images with their captions and best local pairs",
    "boxes": "Where the boxes of the local pairs lie",
    "near_duplicates": "The closest near-duplicates",
}


def draw(found: Findings, folder: Path, seed: int) -> dict[str, str]:
    """Draws the pictures that the data set has the data for. Returns their file names in `folder` by the words of
    PICTURES."""
    subject = found.subject
    names = {word: f"{subject.name}_{word}.png" for word in PICTURES}
    drawn = dict.fromkeys(PICTURES, False)
    if len(found.lengths.tokens):
        card_pictures.draw_lengths(found.lengths, subject.name, folder / names["captions"])
        drawn["captions"] = True
        drawn["examples"] = card_pictures.draw_examples(subject, seed, folder / names["examples"])
    if subject.pairs is not None and len(subject.pairs):
        card_pictures.draw_boxes(subject, folder / names["boxes"])
        drawn["boxes"] = True
    if found.near is not None and len(found.near):
        path = folder / names["near_duplicates"]
        drawn["near_duplicates"] = card_pictures.draw_near_duplicates(subject.dataset, found.near, found.near_origins, path)
    return {word: names[word] for word in PICTURES if drawn[word]}


def describe(found: Findings, pictures: dict[str, str]) -> str:
    """The card of one data set; `pictures` comes from `draw`."""
    subject = found.subject
    records, source = subject.dataset.records, subject.dataset.source
    about = {
        "Source": source,
        "Licence": LICENCES.get(source, NOT_STATED),
        "Digest of the records": f"`{subject.dataset.digest}`",
    }
    parts = [
        f"## {subject.name}",
        EXPLANATIONS.get(source, ""),
        "\n".join(f"* {fact}: {value}" for fact, value in about.items()),
        _picture(pictures, "examples"),
        "### Images",
        _table(["split", "images", "with a long caption", "short captions"], _split_rows(records)),
        _published(found.facts),
        _table(["pixels", *_QUANTILE_NAMES], [[side, *_quantiles(records[side].to_numpy())] for side in ("width", "height")]),
        "### Long captions",
        _captions(found.lengths),
        _picture(pictures, "captions"),
    ]
    if subject.regions is not None and subject.pairs is not None:
        parts += ["### Regions and pairs", _regions(subject), _pairs(subject), _picture(pictures, "boxes")]
    parts += ["### Near-duplicates", _picture(pictures, "near_duplicates")] if "near_duplicates" in pictures else []
    parts += ["### What was looked at", "\n".join(f"* {note}" for note in found.notes)]
    parts += ["### Skipped samples", _skipped(subject)]
    return "\n\n".join(part for part in parts if part)


def _picture(pictures: dict[str, str], word: str) -> str:
    return f"![{PICTURES[word]}]({pictures[word]})" if word in pictures else ""


def _published(facts: pd.DataFrame) -> str:
    if not len(facts):
        return ""
    columns = facts[["fact", "published", "found"]].itertuples(index=False, name=None)
    rows = [[fact, *(f"{value:,.10g}" for value in values)] for fact, *values in columns]
    return _table(["fact", "published", "found"], rows)


_QUANTILE_NAMES = ["mean", "min", "5 %", "median", "95 %", "max"]


def _quantiles(values: np.ndarray, form: str = ".4g") -> list[str]:
    if len(values) == 0:
        return ["–"] * len(_QUANTILE_NAMES)
    low, early, middle, late, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return [format(float(value), form) for value in (np.mean(values), low, early, middle, late, high)]


def _split_rows(records: pd.DataFrame) -> list[list[str]]:
    names = sorted(records["split"].unique(), key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    rows = []
    for name, part in [*((name, records[records["split"] == name]) for name in names), ("all", records)]:
        long = int(part["long_caption"].fillna("").str.strip().ne("").sum())
        short = int(part["captions"].map(len).sum())
        rows.append([name, f"{len(part):,}", f"{long:,}", f"{short:,}"])
    return rows


def _captions(lengths: CaptionLengths) -> str:
    if len(lengths.words) == 0:
        return "None."
    rows = [[unit, *_quantiles(getattr(lengths, unit))] for unit in ("words", "sentences", "tokens")]
    counted = f"Of {len(lengths.tokens):,} captions {lengths.beyond()}."
    sampled = "" if len(lengths.sentences) == len(lengths.words) else f" Sentences: of {len(lengths.sentences):,} captions."
    return f"{_table(['per caption', *_QUANTILE_NAMES], rows)}\n\n{counted}{sampled}"


def _regions(subject: Subject) -> str:
    counts = subject.regions.groupby("image_id").size().to_numpy()
    rows = [["regions per image", *_quantiles(counts)]]
    if len(subject.pairs):
        rows.append(["similarity of the pairs", *_quantiles(subject.pairs["similarity"].to_numpy(), ".3f")])
    return _table(["", *_QUANTILE_NAMES], rows)


def _pairs(subject: Subject) -> str:
    pairs, total = subject.pairs, max(len(subject.pairs), 1)
    rows = [
        [kind, f"{(subject.regions['kind'] == kind).sum():,}", f"{count:,}", f"{count / total:.1%}"]
        for kind in sorted(set(subject.regions["kind"]) | set(pairs["kind"]))
        for count in [int((pairs["kind"] == kind).sum())]
    ]
    asked = int(subject.dataset.records["split"].isin(subject.flism_splits).sum())
    paired = pairs["image_id"].nunique()
    share = f"{paired:,} of the {asked:,} images FLISM was asked for ({', '.join(subject.flism_splits)}) have a pair."
    return f"{_table(['kind', 'regions', 'pairs', 'share of the pairs'], rows)}\n\n{share}"


def _skipped(subject: Subject) -> str:
    skipped = subject.skipped
    if len(skipped) == 0:
        return "None."
    rows = []
    for (step, reason), part in sorted(skipped.groupby(["step", "reason"]), key=lambda item: (-len(item[1]), item[0])):
        first = part.head(EXAMPLES)
        examples = (_example(subject, sample, row) for sample, row in zip(first["sample"], first["row"], strict=True))
        rows.append([step, reason, f"{len(part):,}", "; ".join(examples)])
    share = f"{subject.skipped_share:.2%} of all samples."
    return f"{_table(['step', 'reason', 'rows', 'examples'], rows)}\n\n{share}"


def _example(subject: Subject, sample: str, row: int) -> str:
    path = Path(sample)
    if path.is_absolute():
        root = subject.dataset.root.resolve()
        sample = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return f"{sample} (row {row})" if row >= 0 else sample


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
