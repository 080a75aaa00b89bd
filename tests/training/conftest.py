"""A tiny data set on disk and a tiny CLIP: real files, real model, fractions of a second."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flair_settings import flair_config
from PIL import Image
from tiny import scratch_config

from fast_goal.data.captions import split_sentences
from fast_goal.data.records import Dataset

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white", "brown", "pink", "cyan", "grey"]


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small, threads that wait for each other cost more than they bring, many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_scratch_config() -> Callable:
    """Makes the config of the tiny CLIP, with changes."""
    return scratch_config


@pytest.fixture
def tiny_clip():
    """Makes a CLIP of width 16 that reads 40 tokens; equal weights at every call."""
    from fast_goal.model.clip import build_scratch

    return lambda context_length=40, seed=0: build_scratch(scratch_config(), context_length=context_length, seed=seed)


@pytest.fixture
def make_scenes(tmp_path) -> Callable[..., tuple[Dataset, pd.DataFrame]]:
    """Makes `count` images of one coloured rectangle each, in the splits train and pretrain, with pairs about it."""

    def make(count: int = 12, root: Path = tmp_path) -> tuple[Dataset, pd.DataFrame]:
        rows, pairs = [], []
        for index in range(count):
            colour = COLOURS[index % len(COLOURS)]
            rng = np.random.default_rng(index)
            width, height = 60 + index, 40
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            # near the left edge, so that the centre crop cuts some of it
            box = (float(8 + index), 5.0, float(30 + index), 25.5)
            pixels[5:25, 8 + index : 30 + index] = [20 * index, 255 - 20 * index, (index * 67) % 256]
            (root / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / "images" / f"{index}.png")
            caption = f"A noisy picture number {index}. There is a {colour} box at the left. Nothing else is seen."
            sentence = split_sentences(caption)[1]
            rows.append(
                {
                    "image_id": f"image{index}",
                    "image_path": f"images/{index}.png",
                    "width": width,
                    "height": height,
                    "long_caption": caption,
                    "captions": [f"a {colour} box", f"one {colour} rectangle"],
                }
            )
            pairs.append(
                {
                    "image_id": f"image{index}",
                    "rank": 1,
                    "sentence": sentence.text,
                    "char_start": sentence.start,
                    "char_end": sentence.end,
                    **dict(zip(["x1", "y1", "x2", "y2"], box, strict=True)),
                    "weight": 1.0,
                }
            )
        records = pd.concat([pd.DataFrame(rows).assign(split=split) for split in ("train", "pretrain")])
        return Dataset(name="tiny", root=root, records=records), pd.DataFrame(pairs)

    return make


@pytest.fixture
def make_negatives() -> Callable[..., pd.DataFrame]:
    """Makes hard negatives of the scenes' captions: of image i there are i % 4 for every caption, another colour in each, in a
    table whose order is not that of the images."""

    def make(dataset: Dataset) -> pd.DataFrame:
        rows = []
        for number in range(3):
            for index, record in enumerate(dataset.split("train").itertuples()):
                colour, other = (COLOURS[(index + shift) % len(COLOURS)] for shift in (0, number + 1))
                for caption in (*record.captions, record.long_caption):
                    negative = caption.replace(colour, other)
                    if number < index % 4:
                        rows.append({"image_id": record.image_id, "caption": caption, "negative": negative})
        return pd.DataFrame(rows).assign(type="replace_adjectives", generator="test", seed=0)

    return make


@pytest.fixture
def flair():
    """Makes the objective for the tiny CLIP, with changes of its settings."""
    from fast_goal.objectives import make_objective

    return lambda **changes: make_objective(flair_config(**changes))


@pytest.fixture
def degla():
    """Makes the objective, with the weights given."""
    from fast_goal.objectives import make_objective

    def make(**weights: float):
        weights = {"global": 1.0, "igc": 0.5, "tgc": 0.5, "distillation": 0.3} | weights
        return make_objective(
            {"name": "degla", "weights": weights, "distillation": "sum", "tgc_scale": 10.0, "teacher_decay": 0.5}
        )

    return make
