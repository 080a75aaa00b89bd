"""A small CLIP trained from scratch on short captions alone: the base where no pretrained weights can be had.

Run by `fast-goal base` with `base.kind=scratch`. Having seen short captions only, such a model has CLIP's weakness on
long ones; a small one is weak in every other way too. On a GPU it computes in bf16, and the pixels lie in its memory where they
fit. The loss is that of the whole batch, in one pass.

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
from fast_goal.files import digest
from fast_goal.model.clip import Clip
from fast_goal.objectives.contrastive import clip_loss
from fast_goal.progress import Progress
from fast_goal.training.checkpoint import load_state, save_state
from fast_goal.training.loop import autocast_dtype
from fast_goal.training.order import epoch_generator
from fast_goal.training.pixels import Slots, decoder
from fast_goal.training.recorder import OnStep, Recorder
from fast_goal.training.schedule import learning_rate, make_optimizer, set_rate
from fast_goal.training.stopping import STATUS, stop_requested

MAX_LOG_SCALE = math.log(100)  # CLIP's own limit (arXiv 2103.00020, section 2.5)
CACHE_BYTES = 2**31  # of decoded images kept in memory, beyond which they go to a file; a guess that suits a laptop
DEVICE_SHARE = 0.5  # of a GPU's free memory that they may take, a guess: the rest is for the activations of a large batch
CHUNK = 1024  # images decoded together
LOG_EVERY = 25  # steps
SAVE_EVERY = 200  # steps, of a model up to LARGE; a larger one is saved more rarely, in proportion
LARGE = 12_000_000  # parameters; the demo's has 7.6 million
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
    pixels_folder: Path | str | None = None,
) -> dict[str, Any]:
    """Trains `clip` in place on `config.split` and returns a summary.

    An epoch visits every image once, with one of its short captions drawn at random, so no batch holds two captions of one
    image. A state at `state_path` with the key `state_key` is continued; the caller removes it once it has saved the
    model. A SIGTERM ends the training after the step at hand, with its state written. `pixels_folder`: where the decoded
    images of a large split are kept for later epochs and runs; without it they are decoded at every visit.

    Raises DataError for a split without short captions or an image that cannot be read, FastGoalError when the loss is not
    finite or the disk is full.
    """
    started = time.perf_counter()
    samples = CaptionSamples(dataset, config.split, clip, folder=pixels_folder)
    batch_size = min(config.batch_size, len(samples))
    if batch_size < config.batch_size:
        _log.warning("Only %d images for a batch of %d: every batch holds them all.", batch_size, config.batch_size)
    steps_per_epoch = len(samples) // batch_size
    clip.to(device).train()
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (clip.mean, clip.std))
    optimizer = make_optimizer(clip.parameters(), config.learning_rate, config.weight_decay)
    samples.move(device)
    dtype = autocast_dtype("auto", device, "base.scratch")
    save_every = SAVE_EVERY * max(1, sum(parameter.numel() for parameter in clip.parameters()) // LARGE)
    progress = load_state(state_path, state_key, clip, optimizer) or {"step": 0, "seconds": 0.0, "history": []}
    first = progress["step"]
    recorder = Recorder("base.scratch", on_step, progress["history"])
    epoch = -1
    with stop_requested() as stopped, Progress("base", config.steps, "steps", done=first) as line:
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
            recorder.add(step, batch_size, _train_step(clip, images, tokens, optimizer, dtype))
            if step % LOG_EVERY == 0 or step == config.steps:
                record = recorder.flush()
                recorder.write({"step": step, "epoch": epoch + 1, **record, "learning_rate": rate})
                line.update(0, loss=record["loss"], accuracy=record["accuracy"])
            line.update()
            if step % save_every == 0 or step == config.steps or stopped.is_set():
                recorder.check(step, clip.parameters())  # no state holds weights that are spoilt
                seconds = progress["seconds"] + time.perf_counter() - started
                now = {"step": step, "seconds": seconds, "history": recorder.history}
                save_state(state_path, state_key, clip, optimizer, now)
                recorder.pause()
            if stopped.is_set():
                raise SystemExit(STATUS)
    clip.eval()
    last = recorder.history[-1]
    return {
        "steps": config.steps,
        "resumed_at_step": first,
        "images": len(samples),
        "without_caption": samples.without_caption,
        "truncated_captions": samples.truncated,
        "batch_size": batch_size,
        "precision": "fp32" if dtype is None else "bf16",
        "samples_per_second": recorder.rate,
        "seconds": progress["seconds"] + time.perf_counter() - started,
        "loss": last["loss"],
        "accuracy": last["accuracy"],
    }


def _train_step(
    clip: Clip,
    images: torch.Tensor,
    tokens: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """One update; `dtype` is that of autocast, None for none.

    `accuracy` is the fraction of the batch's images and captions that find their own partner.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
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

    The pixels are decoded once and kept: in memory when they fit into `cache_bytes`, else in a file of `folder`, where a later
    run finds them. Without a folder they are decoded at every visit.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        clip: Clip,
        cache_bytes: int = CACHE_BYTES,
        folder: Path | str | None = None,
    ):
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
        self._pixels: torch.Tensor | None = None
        self._slots: Slots | None = None
        if self._bytes <= cache_bytes:
            self._load(torch.empty(len(kept), 3, size, size, dtype=torch.uint8))
        elif folder is not None:
            self._slots = self._open(Path(folder), digest([decoder(), dataset.digest, split, str(self._view)]))

    @property
    def _bytes(self) -> int:
        return len(self) * 3 * self._view.size**2

    def _open(self, folder: Path, key: str) -> Slots:
        folder.mkdir(parents=True, exist_ok=True)
        slots = Slots(folder / f"base-{key}.views", len(self), 3 * self._view.size**2)
        try:
            slots.allocate()
        except OSError as error:
            raise DataError(
                f"{slots.path}: no room for {len(self):,} decoded images, {self._bytes / 1e9:.1f} GB "
                f"({error.strerror or error}). Free some space, or train on a smaller split."
            ) from None
        return slots

    def _load(self, pixels: torch.Tensor) -> None:
        """Fills `pixels`, which may lie on a GPU, and keeps them."""
        with Progress("decode", len(self), "images") as line:
            for rows in torch.arange(len(self)).split(CHUNK):
                pixels[rows[0] : rows[-1] + 1] = self.images(rows).to(pixels.device)
                line.update(len(rows))
        self._pixels = pixels

    def move(self, device: torch.device) -> None:
        """Brings the pixels into the memory of a GPU, where they leave enough of it free."""
        if device.type != "cuda" or self._bytes > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
            return
        if self._pixels is not None:
            self._pixels = self._pixels.to(device)
        else:
            size = self._view.size
            self._load(torch.empty(len(self), 3, size, size, dtype=torch.uint8, device=device))

    def __len__(self) -> int:
        return len(self._paths)

    def visits(self, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the images in an epoch, and for each image (by its number, not its place) the caption it comes with."""
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(len(self), generator=generator)
        drawn = (torch.rand(len(self), generator=generator, dtype=torch.float64) * self._counts).long()
        return order, self._firsts + drawn

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, S, S], uint8, on the device where they lie."""
        if self._pixels is not None:
            return self._pixels[rows.to(self._pixels.device)]
        size = self._view.size
        found = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        flat, numbers = found.numpy().reshape(len(rows), -1), rows.numpy()
        there = np.zeros(len(rows), dtype=bool) if self._slots is None else self._slots.read(numbers, flat)
        places = np.flatnonzero(~there).tolist()
        if places:
            with ThreadPoolExecutor(_threads()) as pool:
                for place, image in zip(places, pool.map(self._decode, numbers[places].tolist()), strict=True):
                    found[place] = image
                    if self._slots is not None:
                        self._slots.write(int(numbers[place]), flat[place])
        return found

    def tokens(self, captions: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L] of these captions, trimmed."""
        return trim(self._tokens[captions])

    def _decode(self, row: int) -> torch.Tensor:
        image = open_image(self._paths[row])
        picture = dataclasses.replace(self._view, width=image.width, height=image.height).pixels(image)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
