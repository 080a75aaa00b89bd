"""A data set of six images with regions and pairs, in which every expectation holds."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fast_goal.config import ValidateConfig
from fast_goal.data import expectations, quality, validation
from fast_goal.data.records import Dataset

SENTENCES = ["A red ball lies on the left.", "A blue box stands on the right, near the wall."]
COLOURS = ["white", "grey", "brown", "green", "yellow", "black"]
CAPTIONS = [" ".join([*SENTENCES, f"The floor is {colour}."]) for colour in COLOURS]  # by image, in the order of SPLITS
WORDS = 21
SPLITS = {"p0": "pretrain", "a0": "train", "a1": "train", "a2": "train", "v0": "val", "t0": "test"}
WIDTH, HEIGHT = 40, 30
BASE = validation.Base("tiny CLIP", image_size=24, context_length=77)
CONFIG = ValidateConfig(
    expected_counts={"pretrain": 1, "train": 3, "val": 1, "test": 1},
    max_skipped=0.25,
    min_mean_words=5,
    max_mean_words=50,
    min_pairs=0.5,
    max_cut_off=0.05,
    language="en",
    max_aspect=5,
    near_duplicate_bits=4,
    max_decoded=1000,
    caption_sample=1000,
    quality_pairs=100,
    seed=0,
)


def make_subject(root: Path) -> quality.Subject:
    """The good data set; its images are written below `root`."""
    records, regions, pairs = [], [], []
    for number, (name, split) in enumerate(SPLITS.items()):
        Image.new("RGB", (WIDTH, HEIGHT), (40 * number, 0, 0)).save(root / f"{name}.png")
        records.append(
            {
                "image_id": name,
                "image_path": f"{name}.png",
                "width": WIDTH,
                "height": HEIGHT,
                "split": split,
                "long_caption": "" if split == "pretrain" else CAPTIONS[number],
                "captions": ["A red ball."],
                "source": "folder",
                "content_hash": hashlib.sha256((root / f"{name}.png").read_bytes()).hexdigest(),
            }
        )
        if split == "pretrain":
            continue
        boxes = [
            (0, 0, 20, 15, "quadrant"),
            (20, 0, 40, 15, "quadrant"),
            (10, 7.5, 30, 22.5, "centre"),
            (1, 2, 9, 8, "detector"),
        ]
        for index, (x1, y1, x2, y2, kind) in enumerate(boxes):
            place = {"image_id": name, "region_index": index, "x1": x1, "y1": y1, "x2": x2, "y2": y2, "kind": kind}
            regions.append({**place, "label": "", "score": 0.7 if kind == "detector" else 1.0})
            if index < 2:  # sentence and region alike
                start = CAPTIONS[number].index(SENTENCES[index])
                span = {"char_start": start, "char_end": start + len(SENTENCES[index])}
                words = {"rank": index + 1, "sentence_index": index, "sentence": SENTENCES[index], **span}
                pairs.append({**place, **words, "similarity": 0.5 - index / 10, "weight": 0.5})
    skipped = pd.DataFrame(
        [
            {
                "sample": "gone",
                "row": 7,
                "step": "download",
                "reason": "missing image",
                "detail": f"{root}/gone.png: no such file",
            }
        ]
    )
    dataset = Dataset("tiny", root, pd.DataFrame(records), source="folder", digest="0123456789abcdef")
    frames = [
        pd.DataFrame(regions).astype(dict.fromkeys(quality.BOX, float)),
        pd.DataFrame(pairs).astype(dict.fromkeys(quality.BOX, float)),
    ]
    return quality.Subject(dataset, *frames, skipped, ("train", "val", "test"))


def with_records(subject: quality.Subject, records: pd.DataFrame) -> quality.Subject:
    """The same with other records."""
    return replace(subject, dataset=replace(subject.dataset, records=records.reset_index(drop=True)))


def change(table: pd.DataFrame, where: int | np.ndarray, **values: object) -> pd.DataFrame:
    """A copy with some cells of the rows `where` (a row number or a mask) changed."""
    table = table.copy()
    for column, value in values.items():
        for row in np.flatnonzero(where) if np.ndim(where) else [where]:
            table.at[table.index[row], column] = value
    return table


def find(
    subject: quality.Subject,
    config: ValidateConfig = CONFIG,
    training: Dataset | None = None,
    detector_only: bool = False,
    top_k: int = 2,
    base: validation.Base | None = BASE,
    cosines: validation.Cosines | None = None,
) -> validation.Findings:
    """What is found in the subject, which is the training data set unless another one is given."""
    images = quality.inspect_images(subject.dataset, config.max_decoded, config.seed, workers=2)
    settings = validation.Settings(config, [training or subject.dataset], detector_only, top_k, base)
    return validation.examine(subject, images, settings, cosines)


def suites(subject: quality.Subject, **options: object) -> list[expectations.Suite]:
    """The suites of the subject, as `find`."""
    return find(subject, **options).suites
