"""A project before `base`, in the working directory: coloured rectangles with captions and one local pair each."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.data.records import PAIRS, write_dataset, write_table
from fast_goal.tracking import NullTracker

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (235, 210, 50)}
SPLITS = {"pretrain": 8, "train": 9, "val": 3}
BOX = {"x1": 10.0, "y1": 10.0, "x2": 34.0, "y2": 30.0}  # pixels


class RecordingTracker(NullTracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.numbers: dict[str, float] = {}
        self.artifacts: list[str] = []
        self.inputs: list[str] = []

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        assert all(isinstance(value, float) for value in values.values())
        if step is None:
            self.numbers |= values
        else:
            self.curve.append((step, values))

    def artifact(self, path: Path | str, folder: str = "") -> None:
        assert Path(path).exists()
        self.artifacts.append(Path(path).name)

    def input(self, dataset: Any, context: str = "") -> None:
        self.inputs.append(dataset.name)


def write_project(splits: dict[str, int] | None = None, name: str = "scenes", brightness: int = 0) -> None:
    """Writes the data set `name` and its pairs; `brightness` is that of the darkest background."""
    root = Path("data/datasets") / name
    root.mkdir(parents=True)
    rows, pairs = [], []
    for split, count in (splits or SPLITS).items():
        for index in range(count):
            colour = list(COLOURS)[index % len(COLOURS)]
            image_id = f"{split}-{index}"
            pixels = np.full((48, 64, 3), brightness + 12 * index, np.uint8)
            pixels[10:30, 10:34] = COLOURS[colour]
            Image.fromarray(pixels).save(root / f"{image_id}.png")
            sentence = f"A {colour} box is at the left."
            caption = "" if split == "pretrain" else f"This is picture number {index}. {sentence}"
            rows.append(
                {
                    "image_id": image_id,
                    "image_path": f"{image_id}.png",
                    "width": 64,
                    "height": 48,
                    "split": split,
                    "long_caption": caption,
                    "captions": [f"A {colour} box.", f"The box is {colour}."],
                    "source": "scenes",
                    "content_hash": f"{len(rows) + 1000 * brightness:064x}",
                }
            )
            if caption:
                pairs.append(
                    {
                        "image_id": image_id,
                        "rank": 1,
                        "sentence_index": 1,
                        "sentence": sentence,
                        "char_start": len(caption) - len(sentence),
                        "char_end": len(caption),
                        "region_index": 0,
                        **BOX,
                        "kind": "detector",
                        "similarity": 0.3,
                        "weight": 1.0,
                    }
                )
    write_dataset(name, root, rows, [], source="scenes")
    write_table(Path("data/flism") / name / "pairs.parquet", pairs, PAIRS)


def params(*overrides: str) -> Params:
    """The demo, shrunk; the detector is left out."""
    small = {
        "base.detector.kind": "none",
        **{f"base.scratch.{name}": size for name, size in tiny.CLIP.items()},
        "base.scratch.steps": 6,
        "base.scratch.batch_size": 4,
        "finetune.epochs": 3,
        "finetune.batch_size": 4,
        "finetune.workers": 0,
        "finetune.log_every": 1,
        "finetune.save_every": 1,
    }
    small |= {key.replace("finetune", "intermediate.training"): value for key, value in small.items() if "finetune" in key}
    return build(Params, compose([*(f"{key}={value}" for key, value in small.items()), *overrides]), "params.yaml")
