"""The data set that the FLISM tests run on."""

import hashlib

import numpy as np
import pytest
from colours import COLOURS, paint

from fast_goal.data.records import Dataset, load_dataset, write_dataset


@pytest.fixture
def scenes(tmp_path) -> Dataset:
    """Eleven images in train and val and one in pretrain without a long caption, with true boxes."""
    rows, truth, objects = [], [], []
    rng = np.random.default_rng(0)
    for number in range(12):
        name = f"image{number:02d}"
        boxes = {}
        for slot, colour in enumerate(rng.permutation(list(COLOURS))[: 1 + number % 3]):
            x, y = 4 + 20 * slot + int(rng.integers(4)), 6 + int(rng.integers(20))
            boxes[str(colour)] = (x, y, x + 9 + number % 4, y + 12)
        paint(tmp_path / "data" / f"{name}.png", boxes)
        caption = "The picture is grey."
        for index, (colour, box) in enumerate(boxes.items(), 1):
            start = len(caption) + 1
            caption += f" There is a {colour} box in picture {number}."
            place = dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))
            span = {"char_start": start, "char_end": len(caption)}
            truth.append({"image_id": name, "sentence_index": index, **span, **place, "label": colour})
            kind = {"label": colour, "colour": colour, "pattern": "plain", "size": "small"}
            objects.append({"image_id": name, "object_index": index, **kind, **place})
        rows.append(
            {
                "image_id": name,
                "image_path": f"{name}.png",
                "width": 64,
                "height": 48,
                "split": "pretrain" if number == 11 else "val" if number > 7 else "train",
                "long_caption": "" if number == 11 else caption,
                "captions": ["A picture."],
                "source": "test",
                "content_hash": hashlib.sha256((tmp_path / "data" / f"{name}.png").read_bytes()).hexdigest(),
            }
        )
    folder = tmp_path / "records"
    write_dataset("boxes", tmp_path / "data", rows, [], truth=truth, objects=objects, source="test", folder=folder)
    return load_dataset("boxes", folder)
