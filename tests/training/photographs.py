"""A few pictures with something of everything that a decoder may meet, and local pairs in them."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fast_goal.data.images import View, image_size
from fast_goal.data.records import Dataset
from fast_goal.training.views import Files, Views

CAPTION = "A picture of many colours. There is a box at the left."
START = CAPTION.index("There")


def photograph(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth, as photographs are, with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (max(height // 40, 2), max(width // 40, 2), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def photographs(folder: Path) -> list[Path]:
    """JPEG files: large, of odd size, small, grey; then what a GPU is not asked: rotated by EXIF, CMYK, PNG, a strip."""
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "large.jpg": (photograph(0, 640, 480), {}),
        "odd.jpg": (photograph(1, 333, 401), {"subsampling": 0}),
        "small.jpg": (photograph(2, 40, 36), {}),
        "grey.jpg": (photograph(3, 300, 200, "L"), {}),
        "rotated.jpg": (photograph(4, 501, 301), {"exif": exif}),
        "cmyk.jpg": (photograph(5, 280, 240, "CMYK"), {}),
        "drawn.png": (photograph(6, 420, 260), {}),
        "strip.jpg": (photograph(7, 1200, 34), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return [folder / name for name in made]


def crops(paths: list[Path]) -> np.ndarray:
    """One box for each image, with broken edges, in its lower right."""
    sizes = np.array([image_size(path) for path in paths])
    return np.concatenate([sizes * [0.213, 0.177], sizes * [0.911, 0.957]], axis=1)


def views(paths: list[Path], size: int = 32, mode: str = "crop", **options) -> Views:
    """A pair for each image but the last."""
    first = np.append(np.arange(len(paths)), len(paths) - 1)
    sizes = np.array([image_size(path) for path in paths])
    return Views(Files(paths), sizes, View(1, 1, size, mode), first, crops(paths)[:-1], **options)


def dataset(folder: Path) -> tuple[Dataset, pd.DataFrame]:
    """The pictures as a data set, complete as the step `download` leaves it, with a pair for each."""
    paths = photographs(folder / "images")
    sizes = [image_size(path) for path in paths]
    records = pd.DataFrame(
        {
            "image_id": [f"id/{path.name}" for path in paths],
            "image_path": [f"images/{path.name}" for path in paths],
            "width": [width for width, _ in sizes],
            "height": [height for _, height in sizes],
            "split": "train",
            "long_caption": CAPTION,
            "captions": [["a picture"]] * len(paths),
            "source": "folder",
            "content_hash": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
        }
    )
    pairs = pd.DataFrame(crops(paths), columns=["x1", "y1", "x2", "y2"]).assign(
        image_id=records["image_id"],
        rank=1,
        sentence_index=1,
        sentence=CAPTION[START:],
        char_start=START,
        char_end=len(CAPTION),
        region_index=0,
        kind="detector",
        similarity=0.25,
        weight=1.0,
    )
    return Dataset("photographs", folder, records), pairs
