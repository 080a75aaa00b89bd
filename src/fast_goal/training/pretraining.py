"""A small CLIP trained from scratch on short captions alone: the base where no pretrained weights can be had.

Run by `fast-goal base` with `base.kind=scratch`. Having seen short captions only, such a model has CLIP's weakness on
long ones; it is weak in every other way too.

Letters: B batch, S input size, L token positions after trimming.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast_goal.config import ScratchConfig
from fast_goal.data.captions import tokenize, trim
from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.errors import DataError
from fast_goal.model.clip import Clip
from fast_goal.objectives.contrastive import clip_loss
from fast_goal.progress import Progress
from fast_goal.training.checkpoint import load_state, save_state
from fast_goal.training.order import epoch_generator
from fast_goal.training.recorder import OnStep, Recorder
from fast_goal.training.schedule import learning_rate, make_optimizer, set_rate

MAX_LOG_SCALE = math.log(100)  # CLIP's own limit (arXiv 2103.00020, section 2.5)
CACHE_BYTES = 2**31  # of decoded images kept in memory; a guess that suits a laptop
LOG_EVERY = 25  # steps
SAVE_EVERY = 200  # steps
_log = logging.getLogger(__name__)


def train_scratch(
    clip: Clip,
    dataset: Dataset,
    config: ScratchConfig,
    *,
    seed: int,
    device: torch.device,
    state_path: Path | str,
    state_key: str,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Trains `clip` in place on `config.split` and returns a summary.

    An epoch visits every image once, with one of its short captions drawn at random, so no batch holds two captions of one
    image. A state at `state_path` with the key `state_key` is continued; the caller removes it once it has saved the
    model. Raises DataError for a split without short captions or an image that cannot be read, FastGoalError when the
    loss is not finite or the disk is full.
    """
    started = time.perf_counter()
    samples = CaptionSamples(dataset, config.split, clip)
    batch_size = min(config.batch_size, len(samples))
    if batch_size < config.batch_size:
        _log.warning("Only %d images for a batch of %d: every batch holds them all.", batch_size, config.batch_size)
    steps_per_epoch = len(samples) // batch_size
    clip.to(device).train()
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (clip.mean, clip.std))
    optimizer = make_optimizer(clip.parameters(), config.learning_rate, config.weight_decay)
    progress = load_state(state_path, state_key, clip, optimizer) or {"step": 0, "seconds": 0.0, "history": []}
    first = progress["step"]
    recorder = Recorder("base.scratch", on_step, progress["history"])
    epoch = -1
    with Progress("base", config.steps, "steps", done=first) as line:
        for done in range(first, config.steps):
            if done // steps_per_epoch != epoch:
                epoch = done // steps_per_epoch
                order, captions = samples.visits(seed, epoch)
            start = done % steps_per_epoch * batch_size
            rows = order[start : start + batch_size]
            images = (samples.images(rows).to(device, non_blocking=True).float() / 255 - mean) / std
            tokens = samples.tokens(captions[rows]).to(device, non_blocking=True)
            rate = learning_rate(done, config.steps, config.learning_rate, config.warmup_steps)
            set_rate(optimizer, rate)
            step = done + 1
            recorder.add(step, batch_size, _train_step(clip, images, tokens, optimizer))
            if step % LOG_EVERY == 0 or step == config.steps:
                record = recorder.flush()
                recorder.write({"step": step, "epoch": epoch + 1, **record, "learning_rate": rate})
                line.update(0, loss=record["loss"], accuracy=record["accuracy"])
            line.update()
            if step % SAVE_EVERY == 0 or step == config.steps:
                seconds = progress["seconds"] + time.perf_counter() - started
                now = {"step": step, "seconds": seconds, "history": recorder.history}
                save_state(state_path, state_key, clip, optimizer, now)
                recorder.pause()
    clip.eval()
    last = recorder.history[-1]
    return {
        "steps": config.steps,
        "resumed_at_step": first,
        "images": len(samples),
        "without_caption": samples.without_caption,
        "truncated_captions": samples.truncated,
        "batch_size": batch_size,
        "seconds": progress["seconds"] + time.perf_counter() - started,
        "loss": last["loss"],
        "accuracy": last["accuracy"],
    }


def _train_step(
    clip: Clip, images: torch.Tensor, tokens: torch.Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """One update. `accuracy` is the fraction of the batch's images and captions that find their own partner."""
    optimizer.zero_grad(set_to_none=True)
    encoded = clip(images=images, tokens=tokens)
    loss = clip_loss(encoded.image_features, encoded.text_features, clip.logit_scale)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        clip.model.logit_scale.clamp_(max=MAX_LOG_SCALE)
        similarity = encoded.image_features @ encoded.text_features.T
        own = torch.arange(len(images), device=images.device)
        hits = torch.cat([similarity.argmax(dim=1) == own, similarity.argmax(dim=0) == own])
    return {"loss": loss, "accuracy": hits.float().mean(), "logit_scale": clip.logit_scale.detach()}


class CaptionSamples:
    """The images of a split that have short captions, as uint8 pixels of the model's view, and their tokens.

    The pixels are decoded once and kept when they fit into `cache_bytes`, else decoded at every visit.
    """

    def __init__(self, dataset: Dataset, split: str, clip: Clip, cache_bytes: int = CACHE_BYTES):
        records = dataset.split(split)
        captions = [[text for text in texts if text.strip()] for texts in records["captions"]]
        kept = [row for row, texts in enumerate(captions) if texts]
        self.without_caption = len(records) - len(kept)
        if len(kept) < 2:
            raise DataError(
                f"Data set {dataset.name!r} has {len(kept)} images with a short caption in the split {split!r}; training from "
                f"scratch needs at least 2. Set base.scratch.split to a split that has them, or use base.kind=pretrained."
            )
        if self.without_caption:
            _log.warning(
                "%s, split %s: %d of %d images have no short caption and are left out.",
                dataset.name,
                split,
                self.without_caption,
                len(records),
            )
        chosen = records.iloc[kept]
        self._paths = [dataset.path(path) for path in chosen["image_path"]]
        self._view = clip.view(1, 1)
        # the captions of image i have the numbers firsts[i] to firsts[i] + counts[i] - 1
        self._counts = torch.tensor([len(captions[row]) for row in kept])
        self._firsts = self._counts.cumsum(0) - self._counts
        tokens, lengths = tokenize([text for row in kept for text in captions[row]], clip.context_length)
        self._tokens = trim(tokens)
        self.truncated = int((lengths > clip.context_length).sum())
        size = self._view.size
        self._pixels = None
        if len(kept) * 3 * size * size <= cache_bytes:
            self._pixels = torch.empty(len(kept), 3, size, size, dtype=torch.uint8)
            with ThreadPoolExecutor(_threads()) as pool, Progress("decode", len(kept), "images") as line:
                for row, pixels in enumerate(pool.map(self._decode, range(len(kept)))):
                    self._pixels[row] = pixels
                    line.update()

    def __len__(self) -> int:
        return len(self._paths)

    def visits(self, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the images in an epoch, and for each image (by its number, not its place) the caption it comes with."""
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(len(self), generator=generator)
        drawn = (torch.rand(len(self), generator=generator, dtype=torch.float64) * self._counts).long()
        return order, self._firsts + drawn

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, S, S], uint8."""
        if self._pixels is not None:
            return self._pixels[rows]
        with ThreadPoolExecutor(_threads()) as pool:
            return torch.stack(list(pool.map(self._decode, rows.tolist())))

    def tokens(self, captions: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L] of these captions, trimmed."""
        return trim(self._tokens[captions])

    def _decode(self, row: int) -> torch.Tensor:
        image = open_image(self._paths[row])
        picture = dataclasses.replace(self._view, width=image.width, height=image.height).pixels(image)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
