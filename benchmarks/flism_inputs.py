"""Data sets and models of `benchmarks/flism.py`. All are made here; nothing is downloaded.

Speed does not depend on what weights are, but on what the detector finds: the demo's small detector is truly trained, and
for large photographs a detector with random weights runs in full, after which fixed boxes take the place of what it found.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from fast_goal.config import BaseConfig, DetectorConfig, FlismConfig, ScratchConfig, build
from fast_goal.configure import compose
from fast_goal.data.images import CLIP_MEAN, CLIP_STD
from fast_goal.data.records import Dataset, load_dataset, write_dataset
from fast_goal.flism.detectors import RegionDetector, load_detector, obtain_detector
from fast_goal.flism.regions import Detections
from fast_goal.model.clip import Clip, build_scratch

LARGE = (2000, 1500)
SMALL = (64, 48)
WORTH_PROCESSES = 64  # images; fewer are drawn sooner than a process starts
SENTENCES = 7  # of a caption; DOCCI's have 7.1 on average
TINY_CLIP = {"image_size": 32, "patch_size": 16, "embed_dim": 32, "vision_width": 32, "vision_layers": 1}
WORDS = {
    "size": ["small", "large", "narrow", "wide", "tall", "low", "heavy", "slender", "round", "flat"],
    "colour": ["red", "green", "blue", "yellow", "white", "black", "brown", "grey", "orange", "purple"],
    "thing": [
        "house",
        "tree",
        "car",
        "dog",
        "bicycle",
        "bench",
        "lamp",
        "boat",
        "fence",
        "window",
        "bottle",
        "chair",
        "flower",
        "bird",
        "sign",
        "wall",
    ],
    "verb": ["stands", "lies", "leans", "rests", "hangs", "waits", "shines"],
    "place": [
        "on the left",
        "on the right",
        "in the middle",
        "near the edge",
        "in the distance",
        "in the foreground",
        "by the road",
    ],
}


def demo_base_config() -> BaseConfig:
    """The demo's section `base`."""
    return build(BaseConfig, compose(["experiment=demo"])["base"], "base")


def settings(**changes: Any) -> FlismConfig:
    """The demo's section `flism` over the split train, with changes."""
    return replace(build(FlismConfig, compose(["experiment=demo"])["flism"], "flism"), **{"splits": ["train"], **changes})


def scenes(folder: Path, images: int, detector: bool = True) -> Dataset:
    """The demo's drawn scenes: `images` of them in the split train, and others for the detector; made once."""
    from fast_goal.data.sources.scenes.source import ScenesConfig, draw_all

    name = f"scenes{images}"
    if not (folder / "records" / f"{name}.json").exists():
        # the detector learns from scenes of two and more objects, which is about every third
        pretrain = 4 * demo_base_config().detector.images if detector else 0
        config = ScenesConfig(seed=0, image_size=192, pretrain=pretrain, train=images, val=0, test=0)
        loaded = draw_all(config, name, folder / name, os.cpu_count() or 1)
        tables = {"truth": loaded.truth, "objects": loaded.objects}
        write_dataset(name, folder / name, loaded.rows, loaded.skipped, **tables, source="scenes", folder=folder / "records")
    return load_dataset(name, folder / "records")


def demo_base(folder: Path, dataset: Dataset) -> Path:
    """A folder like models/base: the demo's detector, trained as the demo does it, and its CLIP without training."""
    config = demo_base_config()
    if not (folder / "detector" / "detector.json").exists():
        obtain_detector(config.detector, folder / "detector", dataset, 0)
    if not (folder / "clip").exists():
        clip = build_scratch(config.scratch, seed=0)
        clip.stretched(config.context_length, config.keep_positions).save(folder / "clip", {"step": "base"})
    return folder


def tiny_base(folder: Path, dataset: Dataset) -> Path:
    """A folder like models/base with hardly any model in it: what is left is the engine."""
    if not (folder / "clip").exists():
        rest = {"text_width": 32, "text_layers": 1, "head_width": 16, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
        config = build(ScratchConfig, {"split": "train", **TINY_CLIP, **rest, "weight_decay": 0, "warmup_steps": 0}, "scratch")
        build_scratch(config, 77, seed=0).save(folder / "clip", {"step": "base"})
    config = replace(demo_base_config().detector, kind="none")
    obtain_detector(config, folder / "detector", dataset, 0)
    return folder


def vit(name: str = "ViT-B-16", context_length: int = 248) -> Clip:
    """One of open_clip's CLIPs with random weights, its text context stretched as the paper's."""
    import open_clip

    config = open_clip.get_model_config(name)
    torch.manual_seed(0)
    clip = Clip(open_clip.CLIP(**config), config, {"mean": CLIP_MEAN, "std": CLIP_STD}, f"{name} with random weights")
    return clip.stretched(context_length)


class FixedBoxes:
    """Runs a detector in full, and hands over 5 to 10 boxes drawn from the image's id instead of what it found.

    Random weights find nothing, or the same anywhere; the crops of photographs shall be as many, and as large, as a trained
    detector's: their sides are 8 to 60 percent of the image's.
    """

    reads_pixels = True
    names = ("object",)

    def __init__(self, detector: RegionDetector):
        self._detector = detector
        self.digest = f"fixed boxes after {detector.digest}"

    def prepare(self, image: Image.Image) -> tuple[Any, tuple[int, int]]:
        """What the detector makes of the image before it needs the device, and the image's size."""
        prepare = getattr(self._detector, "prepare", None)
        return (prepare(image) if prepare else image), image.size

    def detect(self, images: Sequence[Any], image_ids: Sequence[str]) -> list[Detections]:
        """The boxes of each image, or of what `prepare` made of it; the wrapped detector's are thrown away."""
        prepared = [self.prepare(image) if isinstance(image, Image.Image) else image for image in images]
        self._detector.detect([one for one, _ in prepared], image_ids)
        return [self._boxes(size, image_id) for (_, size), image_id in zip(prepared, image_ids, strict=True)]

    @staticmethod
    def _boxes(size: tuple[int, int], image_id: str) -> Detections:
        generator = np.random.default_rng(list(image_id.encode()))
        count = int(generator.integers(5, 11))
        sides = generator.uniform(0.08, 0.6, (count, 2))
        corners = generator.uniform(0, 1 - sides)
        boxes = np.concatenate([corners, corners + sides], 1) * [*size, *size]
        return Detections(boxes, ["object"] * count, np.linspace(0.95, 0.3, count))


def yolo(size: str, folder: Path, dataset: Dataset, config: FlismConfig, device: torch.device) -> RegionDetector:
    """A YOLO11 of the size `n`, `s`, `m`, `l` or `x` with random weights and fixed boxes, 640 pixels, on `device`."""
    target = folder / f"yolo11{size}"
    if not (target / "detector.json").exists():
        from fast_goal.flism.detectors.ultralytics import prepare_ultralytics

        prepare_ultralytics()
        from ultralytics import YOLO

        torch.manual_seed(0)
        target.mkdir(parents=True, exist_ok=True)
        weights = target / f"yolo11{size}.pt"
        YOLO(f"yolo11{size}.yaml", task="detect").save(str(weights))
        # opening a pickle runs what it holds: this one was written a line above
        values = {"kind": "ultralytics", "weights": str(weights), "trust_pickle": True, "split": "train", "image_size": 640}
        obtain_detector(DetectorConfig(**values, images=1, epochs=1, batch_size=1), target, dataset, 0)
        weights.unlink()
    found = load_detector(target, config, dataset, device)
    assert found is not None
    return FixedBoxes(found)


def one_by_one(detector: RegionDetector | None) -> RegionDetector | None:
    """The detector with a batch of one image. Our own fills every batch up with black to its full size; whoever detects
    image by image would not, and shall not be charged for it."""
    if detector is None:
        return None
    single = copy.copy(detector)
    if isinstance(single, FixedBoxes):
        single._detector = one_by_one(single._detector)
    if hasattr(single, "_batch"):
        single._batch = 1
    return single


def photographs(folder: Path, count: int, source: Path | None = None) -> Dataset:
    """`count` different JPEGs of 2,000 x 1,500 pixels with captions of seven sentences; made once.

    Drawn like photographs (smooth light, shapes with edges, sensor noise), or enlarged from the pictures in `source`.
    """
    paths = sorted(path for path in source.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")) if source else []
    name = f"photographs{count}" + ("-of-" + hashlib.sha256(str(source).encode()).hexdigest()[:8] if source else "")
    return generated(name, folder, count, LARGE, SENTENCES, partial(draw_photograph, paths=tuple(paths)))


def specks(folder: Path, count: int) -> Dataset:
    """`count` different JPEGs of 64 x 48 pixels with captions of two sentences; made once."""
    return generated(f"specks{count}", folder, count, SMALL, 2, draw_speck)


def caption(index: int, sentences: int) -> str:
    """A caption of its own for every index."""
    choose = random.Random(index)
    texts = []
    for _ in range(sentences):
        word = {kind: choose.choice(words) for kind, words in WORDS.items()}
        behind = f"{choose.choice(WORDS['colour'])} {choose.choice(WORDS['thing'])}"
        texts.append(
            f"A {word['size']} {word['colour']} {word['thing']} {word['verb']} {word['place']}, "
            f"number {choose.randrange(10**6)}, and behind it one sees a {behind} in soft light."
        )
    return " ".join(texts)


def generated(
    name: str,
    folder: Path,
    count: int,
    size: tuple[int, int],
    sentences: int | Sequence[int],
    draw: Callable[[int, Path], None],
) -> Dataset:
    """`count` images of the size that `draw(index, path)` makes, with captions of so many sentences, all alike or each its
    own; made once."""
    if not (folder / "records" / f"{name}.json").exists():
        root = folder / name
        root.mkdir(parents=True, exist_ok=True)
        if count < WORTH_PROCESSES:
            digests = [_write(root, draw, index) for index in range(count)]
        else:
            with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
                digests = list(pool.map(partial(_write, root, draw), range(count), chunksize=16))
        rows = [
            {
                "image_id": f"{index:06d}",
                "image_path": f"{index:06d}.jpg",
                "width": size[0],
                "height": size[1],
                "split": "train",
                "long_caption": caption(index, sentences if isinstance(sentences, int) else sentences[index]),
                "captions": [],
                "source": name,
                "content_hash": digests[index],
            }
            for index in range(count)
        ]
        write_dataset(name, root, rows, [], source=name, folder=folder / "records")
    return load_dataset(name, folder / "records")


def _write(root: Path, draw: Callable[[int, Path], None], index: int) -> str:
    path = root / f"{index:06d}.jpg"
    draw(index, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw_speck(index: int, path: Path) -> None:
    """A picture of 64 x 48 pixels: coloured noise."""
    pixels = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(SMALL, Image.Resampling.BICUBIC).save(path, quality=80)


def draw_photograph(index: int, path: Path, paths: Sequence[Path] = (), size: tuple[int, int] = LARGE) -> None:
    """A picture like a photograph, or an enlarged one of `paths`."""
    generator = np.random.default_rng(index)
    width, height = size
    if paths:
        image = Image.open(paths[index % len(paths)]).convert("RGB")
        scale = max(width / image.width, height / image.height)
        box = (0, 0, width / scale, height / scale)
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    else:
        pixels = np.zeros((height, width, 3), dtype=np.float32)
        for octave in range(2, 8):  # the spectrum of photographs falls with the frequency
            cells = generator.integers(0, 256, (3 * 2**octave // 4 + 1, 2**octave, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC), np.float32) / 2**octave
        image = Image.fromarray((pixels / pixels.max() * 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(30):
            x, y = int(generator.integers(width)), int(generator.integers(height))
            w, h = (int(side) for side in generator.integers(30, height // 3, 2))
            shape = draw.ellipse if generator.integers(2) else draw.rectangle
            shape((x, y, x + w, y + h), fill=tuple(generator.integers(0, 256, 3).tolist()))
    noise = generator.integers(-6, 7, (height, width, 1), dtype=np.int16)
    noisy = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, quality=90)
