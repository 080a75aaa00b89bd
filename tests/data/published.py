"""A small data set with local pairs, as the steps before `publish` leave it, for the tests of publishing and reading back."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fast_goal.config import PublishConfig
from fast_goal.data.records import PAIRS, SKIPPED, Dataset

SENTENCES = ["A dog – brown, not “tan” – runs 🐕.", "The house | behind it is white.", "Nothing else."]
CAPTION = " ".join(SENTENCES)


def config(layout: str, shard_size: int = 3) -> PublishConfig:
    return PublishConfig(layout=layout, licence="cc-by-4.0", shard_size=shard_size)


def make(root: Path, count: int = 8) -> tuple[Dataset, pd.DataFrame, pd.DataFrame]:
    """Images in two folders and three formats; ids with dots and slashes; the last one has no pair, the first two have two."""
    records, pairs = [], []
    for number in range(count):
        ending = ("jpg", "png", "webp")[number % 3]
        path = f"photos/{'a' if number % 2 else 'b.c'}/{number}.v1.{ending}"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / path)
        image_id = f"id/{number}.x"
        records.append(
            {
                "image_id": image_id,
                "image_path": path,
                "width": 40,
                "height": 30 + number,
                "split": ["train", "train", "train", "val", "test"][number % 5],
                "long_caption": CAPTION,
                "captions": [] if number % 4 == 3 else [f"Short {number}.", "A dog."],
                "source": "folder",
                "content_hash": hashlib.sha256((root / path).read_bytes()).hexdigest(),
            }
        )
        for rank in range(1, 1 + (number < count - 1) + (number < 2)):
            start = CAPTION.index(SENTENCES[rank - 1])
            pairs.append(
                {
                    "image_id": image_id,
                    "rank": rank,
                    "sentence_index": rank - 1,
                    "sentence": SENTENCES[rank - 1],
                    "char_start": start,
                    "char_end": start + len(SENTENCES[rank - 1]),
                    "region_index": 4,
                    "x1": 1.25,
                    "y1": 2.0,
                    "x2": 30.0 + number / 3,
                    "y2": 20.5,
                    "kind": ("detector", "centre")[rank - 1],
                    "similarity": 0.3 - rank / 7 + number / 100,
                    "weight": 1.0 if number >= 2 else 0.5,
                }
            )
    skipped = pd.DataFrame(
        [{"sample": "id/old", "row": 4, "step": "flism", "reason": "no sentence", "detail": ""}], columns=SKIPPED.names
    )
    dataset = Dataset("dogs", root, pd.DataFrame(records), source="folder", digest="0123456789abcdef")
    return dataset, pd.DataFrame(pairs)[PAIRS.names], skipped
