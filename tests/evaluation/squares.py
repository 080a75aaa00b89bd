"""A tiny data set of noise images with captions and boxes, and a tiny CLIP that says what it was given."""

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from fast_goal.config import ScratchConfig
from fast_goal.data.records import Dataset
from fast_goal.model.clip import Clip, build_scratch

CPU = torch.device("cpu")
CLASSES = {"names": ["red", "blue", "old {tree}"], "templates": ["A {} thing.", "{}", "It is {}."]}
SEGMENTS = {**CLASSES, "values": [4, 7, 300], "ignored": [0, 255]}
SIZES = [(96, 64), (64, 96), (64, 64), (150, 60), (64, 64), (80, 64), (64, 70)]


def tiny_clip(seed: int = 3, context_length: int = 32) -> Clip:
    """A CLIP of width 16 with 4 x 4 patches."""
    sizes = {"image_size": 64, "patch_size": 16, "embed_dim": 16, "vision_width": 32, "vision_layers": 1, "text_width": 32}
    rest = {"text_layers": 1, "head_width": 16, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.0}
    return build_scratch(ScratchConfig(split="train", warmup_steps=0, **sizes, **rest), context_length, seed=seed).eval()


def write_squares(root: Path) -> Dataset:
    """Image 2 has no long caption, 4 no short one; captions repeat; one caption exceeds the context of 32."""
    generator = np.random.default_rng(0)
    rows, truth = [], []
    for index, (width, height) in enumerate(SIZES):
        path = root / f"{index}.png"
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        caption = (
            ""
            if index == 2
            else f"First there is a thing. Then comes number {index}." + " and so on" * (20 if index == 5 else 0)
        )
        rows.append(
            {
                "image_id": f"i{index}",
                "image_path": path.name,
                "width": width,
                "height": height,
                "split": "val" if index == 6 else "test",
                "long_caption": caption,
                "captions": [] if index == 4 else ["a thing", f"number {index % 2}"],
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
        if caption and index != 4:
            span = {"image_id": f"i{index}", "char_start": 0, "char_end": 23, "label": "thing"}
            truth.append({**span, "sentence_index": 0, "x1": 0.0, "y1": 0.0, "x2": 30.0, "y2": 30.0})
            truth.append(
                {**span, "sentence_index": 1, "x1": width / 2, "y1": height / 2, "x2": width - 1.0, "y2": height - 1.0}
            )
    return Dataset("squares", root, pd.DataFrame(rows), pd.DataFrame(truth).iloc[::-1])


def with_choices(dataset: Dataset) -> Dataset:
    """Choices and labels about three images of the squares, one box the whole of its image, and one image of another split."""
    box = {
        "x1": [0.0, 10.2, 0.0, 0.0],
        "y1": [0.0, 5.0, 0.0, 0.0],
        "x2": [96.0, 40.7, 64.0, 9.0],
        "y2": [64.0, 60.0, 96.0, 9.0],
    }
    ids = {"image_id": ["i0", "i0", "i1", "i6"], **box}
    foils = [["a foil", "another"], ["a foil"], ["number 1"], ["a foil"]]
    captions = ["number 0", "a thing", "a thing", "number 6"]
    choices = pd.DataFrame({**ids, "suite": ["s"] * 4, "group": ["g"] * 4, "caption": captions, "foils": foils})
    labels = pd.DataFrame({**ids, "suite": ["few"] * 4, "label": ["red", "blue", "red", "blue"]})
    classes = {"few": CLASSES, "unused": {"names": [], "templates": []}}
    return dataclasses.replace(dataset, choices=choices, labels=labels, classes=classes)


def with_masks(dataset: Dataset) -> Dataset:
    """Masks of 16 bits with the suite `few` for all squares but image 3, and for image 0 one of another suite."""
    draw, rows = np.random.default_rng(0), []
    (dataset.root / "masks").mkdir()
    for index, record in enumerate(dataset.records.itertuples()):
        coarse = draw.integers(0, 5, (record.height // 8 + 1, record.width // 8 + 1))
        mask = np.array([0, 4, 7, 300, 255], dtype=np.uint16)[coarse].repeat(8, 0).repeat(8, 1)
        masks = {"few": mask[: record.height, : record.width]} if index != 3 else {}
        if index == 0:
            masks["one"] = np.full((record.height, record.width), 1, np.uint8)
        for suite, numbers in masks.items():
            content, path = png(numbers), f"masks/{index}-{suite}.png"
            (dataset.root / path).write_bytes(content)
            rows.append((record.image_id, suite, path, hashlib.sha256(content).hexdigest()))
    table = pd.DataFrame(rows, columns=["image_id", "suite", "mask_path", "content_hash"])
    one = {"names": ["thing", "nothing"], "values": [1, 2], "ignored": [], "templates": ["{}"]}
    return dataclasses.replace(dataset, masks=table, segments={"few": SEGMENTS, "one": one})


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Recording:
    """Notes every image and text that a model is given, each once per forward pass."""

    def __init__(self, clip: Clip):
        self._clip = clip
        self.images: list[bytes] = []
        self.texts: list[tuple[int, ...]] = []  # token ids without padding

    def __getattr__(self, name):
        return getattr(self._clip, name)

    def to(self, device):
        self._clip.to(device)
        return self

    def eval(self):
        self._clip.eval()
        return self

    def __call__(self, images=None, tokens=None):
        if images is not None:
            self.images += dict.fromkeys(image.numpy().tobytes() for image in images)
        if tokens is not None:
            self.texts += dict.fromkeys(tuple(row[: row.argmax() + 1].tolist()) for row in tokens)
        return self._clip(images=images, tokens=tokens)
