"""Embeds one split of a data set with one model: every image and every distinct text once.

Patch localisation is decided batch by batch in the same pass, so that patch tokens need not be kept.

Letters: `I` images, `T` texts, `U` distinct texts, `S` sentences with a box, `N` patches, `D` embedding width. Boxes are
xyxy; of the original image in `Questions`, of the model's input wherever `input` is said. Everything is computed in
float32.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from fast_goal.data.captions import tokenize, trim
from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.errors import DataError
from fast_goal.evaluation.localisation import centres_inside, first_hits
from fast_goal.model.clip import Clip
from fast_goal.progress import Progress

BATCHES_AHEAD = 3  # decoded while the model is busy; a guess that keeps memory small


class Captions(NamedTuple):
    """Texts and the row of the image each belongs to."""

    texts: list[str]
    images: np.ndarray  # int64 [T]


class Regions(NamedTuple):
    """Sentences, each with the box of the thing it speaks of."""

    sentences: list[str]
    images: np.ndarray  # int64 [S], ascending
    boxes: np.ndarray  # float64 [S, 4], pixels of the original image
    source: Literal["truth", "flism", "none"]  # of the boxes


@dataclass(frozen=True)
class Questions:
    """What the models are asked about one split; the same for every model."""

    image_ids: list[str]
    paths: list[Path]
    sizes: np.ndarray  # int64 [I, 2], width and height in pixels of the original image
    long: Captions
    short: Captions
    regions: Regions


@dataclass(frozen=True)
class Answers:
    """What one model made of the questions; features are unit float32 on the CPU."""

    image_features: Tensor  # [I, D]
    text_features: Tensor  # [U, D]
    text_lengths: np.ndarray  # int64 [U], token ids with BOS and EOS before any truncation
    text_rows: dict[str, int]  # distinct text -> row
    first_hits: np.ndarray  # int64 [S], rank of the best patch whose centre is in the box; N + 1 if there is none
    patches_inside: np.ndarray  # int64 [S], patches whose centre is in the box
    patches: int  # N
    context_length: int
    seconds: float

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """The rows of `texts` in `text_features` and `text_lengths`: int64 [T]."""
        return np.array([self.text_rows[text] for text in texts], dtype=np.int64)


def questions(dataset: Dataset, split: str, pairs: pd.DataFrame | None = None) -> Questions:
    """Collects captions and boxes of a split.

    An image without a long caption is a candidate in long-caption retrieval but asks nothing; so with short ones. The
    boxes are the data set's own truth, or else those of the best FLISM pair of each image (`pairs`), or there are none.

    Raises DataError if the split has no image.
    """
    records = dataset.split(split).reset_index(drop=True)
    if records.empty:
        raise DataError(f"data set {dataset.name!r} has no image in the split {split!r}, which evaluate.split asks for")
    row_of = {image_id: row for row, image_id in enumerate(records.image_id)}
    long_rows = [row for row, caption in enumerate(records.long_caption) if caption]
    short = [(text, row) for row, captions in enumerate(records.captions) for text in captions if text]

    source: Literal["truth", "flism", "none"] = "none"
    boxes: pd.DataFrame | None = None
    if dataset.truth is not None:
        source, boxes = "truth", dataset.truth[dataset.truth.image_id.isin(row_of)].copy()
        captions = boxes.image_id.map(records.set_index("image_id").long_caption)
        spans = zip(captions, boxes.char_start, boxes.char_end, strict=True)
        boxes["sentence"] = [caption[start:end] for caption, start, end in spans]
    elif pairs is not None:
        source, boxes = "flism", pairs[pairs.image_id.isin(row_of) & (pairs["rank"] == 1)].copy()
    if boxes is None or boxes.empty:
        regions = Regions([], np.zeros(0, np.int64), np.zeros((0, 4)), "none")
    else:
        boxes["row"] = boxes.image_id.map(row_of)
        boxes = boxes.sort_values(["row", "sentence_index"], kind="stable")
        corners = boxes[["x1", "y1", "x2", "y2"]].to_numpy(np.float64)
        regions = Regions(boxes.sentence.tolist(), boxes.row.to_numpy(np.int64), corners, source)

    return Questions(
        image_ids=records.image_id.tolist(),
        paths=[dataset.path(path) for path in records.image_path],
        sizes=records[["width", "height"]].to_numpy(np.int64),
        long=Captions([records.long_caption[row] for row in long_rows], np.array(long_rows, dtype=np.int64)),
        short=Captions([text for text, _ in short], np.array([row for _, row in short], dtype=np.int64)),
        regions=regions,
    )


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # else a GPU rounds the patch embedding to 10 bits
def answer(clip: Clip, asked: Questions, batch_size: int, device: torch.device, name: str = "evaluate") -> Answers:
    """Embeds everything that `asked` holds.

    Args:
        clip: moved to `device` and set to evaluation; it sees the images through its own view.
        batch_size: images, and texts, encoded at once; the results do not depend on it.
        name: of the progress lines.

    Raises:
        DataError: an image that cannot be read.
    """
    begin = time.perf_counter()
    clip.to(device).eval()
    texts = list(dict.fromkeys([*asked.long.texts, *asked.short.texts, *asked.regions.sentences]))
    text_rows = {text: row for row, text in enumerate(texts)}
    text_features, text_lengths = _embed_texts(clip, texts, batch_size, device, name)

    sentences = text_features[[text_rows[sentence] for sentence in asked.regions.sentences]]  # [S, D]
    starts = np.searchsorted(asked.regions.images, np.arange(len(asked.paths) + 1))  # the sentences of image i: [i], [i + 1]
    image_features, hits, inside = [], [], []
    with Progress(f"{name}: images", len(asked.paths), "images") as progress:
        for first, images in _decoded(clip, asked.paths, batch_size):
            encoded = clip(images=images.to(device, non_blocking=True))
            image_features.append(encoded.image_features.float().cpu())
            mine = slice(starts[first], starts[first + len(images)])
            if mine.stop > mine.start:
                rows = asked.regions.images[mine]
                held = centres_inside(_input_boxes(clip, asked, mine), clip.image_size, clip.patch_size)  # [s, N]
                patches = clip.project_image(encoded.image_tokens).float()  # [B, N, D]
                similarity = torch.einsum("snd,sd->sn", patches[torch.from_numpy(rows - first)], sentences[mine].to(device))
                hits.append(first_hits(similarity.cpu(), held).numpy())
                inside.append(held.sum(1).numpy())
            progress.update(len(images))
    return Answers(
        image_features=torch.cat(image_features),
        text_features=text_features,
        text_lengths=text_lengths,
        text_rows=text_rows,
        first_hits=np.concatenate(hits) if hits else np.zeros(0, np.int64),
        patches_inside=np.concatenate(inside) if inside else np.zeros(0, np.int64),
        patches=(clip.image_size // clip.patch_size) ** 2,
        context_length=clip.context_length,
        seconds=time.perf_counter() - begin,
    )


class PatchMap(NamedTuple):
    """One sentence over one image, as the model sees it."""

    image: Image.Image  # the model's input as a picture
    similarity: np.ndarray  # float [rows, columns], cosine of the sentence with each patch
    box: tuple[float, float, float, float]  # xyxy in input pixels


@torch.inference_mode()
def patch_maps(clip: Clip, asked: Questions, regions: Sequence[int], device: torch.device) -> list[PatchMap]:
    """The similarity maps of a few sentences, rows of `asked.regions`, for a picture."""
    clip.to(device).eval()
    side = clip.image_size // clip.patch_size
    maps = []
    for index in regions:
        image = open_image(asked.paths[asked.regions.images[index]])
        view = clip.view(*image.size)
        tokens, _ = tokenize([asked.regions.sentences[index]], clip.context_length)
        encoded = clip(images=view.apply(image)[None].to(device), tokens=trim(tokens).to(device))
        patches = clip.project_image(encoded.image_tokens)[0].float()  # [N, D]
        similarity = patches @ encoded.text_features[0].float()
        box = _input_boxes(clip, asked, slice(index, index + 1))[0]
        maps.append(PatchMap(view.pixels(image), similarity.reshape(side, side).cpu().numpy(), tuple(box.tolist())))
    return maps


def _embed_texts(clip: Clip, texts: list[str], batch_size: int, device: torch.device, name: str) -> tuple[Tensor, np.ndarray]:
    """Features [U, D] and untruncated lengths [U]. Texts of like length share a batch, so that little is padded."""
    if not texts:
        return torch.zeros(0, clip.embed_dim), np.zeros(0, np.int64)
    tokens, lengths = tokenize(texts, clip.context_length)
    lengths = np.asarray(lengths, dtype=np.int64)
    features = torch.zeros(len(texts), clip.embed_dim)
    order = torch.from_numpy(np.argsort(lengths, kind="stable"))
    with Progress(f"{name}: texts", len(texts), "texts") as progress:
        for rows in order.split(batch_size):
            features[rows] = clip(tokens=trim(tokens[rows]).to(device)).text_features.float().cpu()
            progress.update(len(rows))
    return features, lengths


def _input_boxes(clip: Clip, asked: Questions, which: slice) -> Tensor:
    """The boxes of some sentences in pixels of the model's input: [s, 4]."""
    rows = zip(asked.regions.images[which], asked.regions.boxes[which], strict=True)
    return torch.tensor([clip.view(*asked.sizes[image].tolist()).box(tuple(box.tolist())) for image, box in rows])


def _decoded(clip: Clip, paths: list[Path], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """The first row and the pixels [B, 3, S, S] of each batch, decoded by threads ahead of the one who asks."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        waiting: deque = deque()
        starts = iter(range(0, len(paths), batch_size))

        def submit() -> None:
            for start in starts:
                waiting.append((start, [pool.submit(_pixels, clip, path) for path in paths[start : start + batch_size]]))
                return

        for _ in range(BATCHES_AHEAD):
            submit()
        while waiting:
            start, futures = waiting.popleft()
            images = torch.stack([future.result() for future in futures])
            submit()
            yield start, images


def _pixels(clip: Clip, path: Path) -> Tensor:
    image = open_image(path)
    return clip.view(*image.size).apply(image)
