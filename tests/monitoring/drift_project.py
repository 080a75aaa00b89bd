"""A data set with the split `train`, of plain coloured images, for the tests of drift."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from fast_goal.data.records import REGIONS, load_dataset, write_dataset, write_table

SIDE = 32
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "white": (245, 245, 245)}


def write_training_set(name="scenes", numbers=range(40), shifted=(), test=12, regions=True, order=1):
    """An image and a caption for each number, the same for the same number; those of `shifted` are dark, have longer captions
    and more objects. Returns the data set."""
    root = Path("data/datasets") / name
    root.mkdir(parents=True, exist_ok=True)
    rows, boxes = [], []
    for number in [*numbers, *shifted, *range(-test, 0)][::order]:
        generator = np.random.default_rng(number + 1000)
        odd = number in shifted
        colour = list(COLOURS)[int(generator.integers(4))]
        pixels = np.clip(generator.normal(COLOURS[colour], 12, (SIDE, SIDE, 3)), 0, 255) * (0.15 if odd else 1)
        path = root / f"{number}{'s' if odd else ''}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        words = " ".join(generator.choice(["far", "near", "old", "new", "left", "right"], int(generator.integers(2, 9))))
        caption = f"Number {number} is a {colour} square. It is {words}."
        if odd:
            caption += f" It is night, and nothing of number {number} can be seen, wherever one looks for it. It is cold."
        found = int(generator.integers(1, 4)) + (3 if odd else 0)
        for index in range(found):
            box = {"x1": 0.0, "y1": 0.0, "x2": 16.0, "y2": 16.0}
            label = ["cat", "dog", "lamp"][2 if odd else int(generator.integers(2))]
            rest = {"region_index": 5 + index, **box, "kind": "detector", "label": label, "score": 0.9}
            boxes.append({"image_id": path.stem, **rest})
        centre = {"region_index": 4, "x1": 8.0, "y1": 8.0, "x2": 24.0, "y2": 24.0, "kind": "centre", "label": "", "score": 1.0}
        boxes.append({"image_id": path.stem, **centre})
        rows.append(
            {
                "image_id": path.stem,
                "image_path": path.name,
                "width": SIDE,
                "height": SIDE,
                "split": "train" if number >= 0 else "test",
                "long_caption": caption,
                "captions": [],
                "source": "squares",
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    write_dataset(name, root, rows, [], source="squares")
    if regions:
        trained = {row["image_id"] for row in rows if row["split"] == "train"}
        write_table(
            Path("data/flism") / name / "regions.parquet", [box for box in boxes if box["image_id"] in trained], REGIONS
        )
    return load_dataset(name)
