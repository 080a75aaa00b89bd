"""A data set of coloured boxes, and a CLIP and a detector that see colours: what FLISM must find can be told by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fast_goal.config import FlismConfig, MatcherConfig
from fast_goal.data.captions import tokenize
from fast_goal.data.images import View
from fast_goal.flism.regions import Detections

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
GREY = 40


def flism_config(**changes) -> FlismConfig:
    values = {
        "splits": ["train", "val"],
        "regions": "both",
        "matcher": MatcherConfig(None, None),
        "choice": "best",
        "pair_weights": "uniform",
        "classes": None,
        "merge_iou": None,
        "scaled_decoding": False,
        "precision": "fp32",
        "engine": "local",
        "processes": 0,
        "top_k": 2,
        "confidence": 0.25,
        "iou": 0.7,
        "max_detections": 10,
        "min_area": 0.0,
        "batch_size": 3,
        "shard_size": 4,
    }
    return FlismConfig(**(values | changes))


class ColourClip(torch.nn.Module):
    """Embeds an image as its mean colour and a text as the colour words in it (and a little of its last token)."""

    def __init__(self, context_length: int = 16):
        super().__init__()
        self.context_length, self.embed_dim = context_length, 3
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.word_ids = [int(tokenize([word], 8)[0][0, 1]) for word in COLOURS]
        self.images_seen: list[int] = []
        self.texts_seen: list[int] = []

    def view(self, width: int, height: int, mode: str = "crop") -> View:
        return View(width, height, 8, mode, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 8, 8) and images.dtype == torch.float32
        self.images_seen.append(len(images))
        return torch.nn.functional.normalize(images.mean((2, 3)) + 1e-3, dim=1) * self.scale

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts_seen.append(len(tokens))
        counts = torch.stack([(tokens == word).sum(1) for word in self.word_ids], 1).float()
        return torch.nn.functional.normalize(counts + 1e-3 * torch.tensor([1.0, 2.0, 3.0]), dim=1) * self.scale


class ColourDetector:
    """Finds the box of each colour. Stops the run after `limit` images, as a kill would."""

    digest, reads_pixels, names = "colours", True, None

    def __init__(self, limit: int = 10**9):
        self.limit, self.seen = limit, 0

    def detect(self, images, image_ids=()) -> list[Detections]:
        found = []
        for image in images:
            self.seen += 1
            if self.seen > self.limit:
                raise KeyboardInterrupt
            pixels = np.asarray(image)
            boxes, labels = [], []
            for name, colour in COLOURS.items():
                rows, columns = np.nonzero((pixels == colour).all(2))
                if len(rows):
                    boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    labels.append(name)
            found.append(Detections(np.array(boxes, dtype=float).reshape(-1, 4), labels, np.full(len(labels), 0.9)))
        return found


def paint(path: Path, boxes: dict[str, tuple[int, int, int, int]], size: tuple[int, int] = (64, 48)) -> None:
    """Writes a grey image with coloured boxes."""
    pixels = np.full((size[1], size[0], 3), GREY, dtype=np.uint8)
    for name, (x1, y1, x2, y2) in boxes.items():
        pixels[y1:y2, x1:x2] = COLOURS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
