"""Fine-tuning CLIP on long captions and local pairs (METHOD section 3); run by `fast-goal finetune`.

Every input is encoded once: the global images and the local crops in one batch, the long captions and the sentences in
one pass each, trimmed separately.

Letters: B samples of a batch, P of them with a local pair, D embedding width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fast_goal.config import FinetuneConfig
from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError
from fast_goal.model.clip import Clip
from fast_goal.model.tokens import masked_mean, patch_mask, span_mask
from fast_goal.objectives import Features, Objective
from fast_goal.progress import Progress
from fast_goal.training.batches import Batch, Loader, PairDataset
from fast_goal.training.checkpoint import load_state, save_state
from fast_goal.training.recorder import OnStep, Recorder
from fast_goal.training.schedule import learning_rate, make_optimizer, set_rate

_log = logging.getLogger(__name__)


def finetune(
    clip: Clip,
    dataset: Dataset,
    pairs: pd.DataFrame | None,
    objective: Objective,
    config: FinetuneConfig,
    *,
    seed: int,
    device: torch.device,
    state_path: Path | str,
    state_key: str,
    split: str = "train",
    on_step: OnStep | None = None,
    on_epoch: Callable[[Clip, int], dict[str, float] | None] | None = None,
) -> dict[str, Any]:
    """Trains `clip` in place on one split and returns a summary; the last epoch's weights are the result.

    `config.view` becomes the model's own view, so that whoever uses it shows it images as the training did.

    A state at `state_path` with the key `state_key` is continued. `on_step(step, record)` gets a record every
    `config.log_every` steps and at the end of each epoch: step and epoch from 1, loss, every term, learning_rate,
    samples_per_second, logit_scale; on a resume it gets the former ones first. `on_epoch(clip, epoch)` may measure the
    model after an epoch; what it returns becomes a record of its own. The caller removes the state once it has saved the
    model.

    Raises DataError for an image that cannot be read, FastGoalError when the loss is not finite or the disk is full.
    """
    started = time.perf_counter()
    clip.view_mode = config.view
    samples = PairDataset(dataset, split, pairs, clip, local=objective.needs_local)
    loader = Loader(samples, config.batch_size, seed, config.workers, pin_memory=device.type == "cuda")
    total = config.epochs * loader.steps
    dtype = autocast_dtype(config.precision, device)
    clip.to(device).train()
    optimizer = make_optimizer(clip.parameters(), config.learning_rate, config.weight_decay)
    progress = load_state(state_path, state_key, clip, optimizer) or {"step": 0, "seconds": 0.0, "history": []}
    step, first = progress["step"], progress["step"]
    recorder = Recorder("finetune", on_step, progress["history"])

    def seconds() -> float:
        return progress["seconds"] + time.perf_counter() - started

    def save() -> None:
        now = {"step": step, "seconds": seconds(), "history": recorder.history}
        save_state(state_path, state_key, clip, optimizer, now)
        recorder.pause()

    with Progress("finetune", total, "steps", done=step) as line:
        for epoch in range(step // loader.steps, config.epochs):
            for batch in loader.epoch(epoch, start=step - epoch * loader.steps):
                rate = learning_rate(step, total, config.learning_rate, config.warmup_steps)
                set_rate(optimizer, rate)
                values = train_step(clip, batch.to(device), objective, optimizer, dtype, config.gradient_clip)
                step += 1
                recorder.add(step, len(batch.long_tokens), values)
                if step % config.log_every == 0 or step % loader.steps == 0:
                    record = recorder.flush()
                    recorder.write({"step": step, "epoch": epoch + 1, **record, "learning_rate": rate})
                    line.update(0, epoch=epoch + 1, loss=record["loss"])
                line.update()
                if step % config.save_every == 0 and step % loader.steps:
                    save()
            if on_epoch is not None:
                clip.eval()
                measured = on_epoch(clip, epoch + 1)
                clip.train()
                if measured:
                    recorder.write({"step": step, "epoch": epoch + 1, **measured})
            save()
    clip.eval()
    final = next(record for record in reversed(recorder.history) if "loss" in record)
    return {
        "steps": step,
        "resumed_at_step": first,
        "epochs": config.epochs,
        "batch_size": loader.batch_size,
        "precision": "fp32" if dtype is None else "bf16",
        "seconds": seconds(),
        "samples_per_second": recorder.rate,
        "final": {name: value for name, value in final.items() if name not in ("step", "epoch", "samples_per_second")},
        "counts": samples.counts,
    }


def train_step(
    clip: Clip,
    batch: Batch,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None = None,
    gradient_clip: float | None = None,
) -> dict[str, torch.Tensor]:
    """One update. Returns the objective's scalars and the logit scale, on the device and detached."""
    optimizer.zero_grad(set_to_none=True)
    features = batch_features(clip, batch, dtype)
    terms = objective(features)
    terms["loss"].backward()
    if gradient_clip is not None:
        torch.nn.utils.clip_grad_norm_(clip.parameters(), gradient_clip)
    optimizer.step()
    return {name: value.detach() for name, value in terms.items()} | {"logit_scale": features.scale.detach()}


def batch_features(clip: Clip, batch: Batch, dtype: torch.dtype | None = None) -> Features:
    """What the objective compares, in float32: each image, caption and sentence goes through its tower once.

    `region` [P, D] is the mean of the global image's patch tokens over the box, `sentence` [P, D] the mean of the long
    caption's tokens over the sentence's span, both through CLIP's own norm and projection. A box or span of which nothing
    is visible has the weight 0. `dtype` is that of autocast, None for none.
    """
    rows = batch.local_rows
    count = len(batch.long_tokens)
    with torch.autocast(batch.images.device.type, dtype=dtype, enabled=dtype is not None):
        encoded = clip(images=batch.images, tokens=batch.long_tokens)
        if len(rows):
            local_text = clip(tokens=batch.sentence_tokens).text_features
            in_box = patch_mask(batch.boxes, clip.image_size, clip.patch_size)
            in_span = span_mask(batch.spans, batch.long_tokens.shape[1])
            region = clip.project_image(masked_mean(encoded.image_tokens[rows], in_box))
            sentence = clip.project_text(masked_mean(encoded.text_tokens[rows], in_span))
            region_weight, sentence_weight = in_box.any(dim=1), in_span.any(dim=1)
        else:
            local_text = region = sentence = encoded.text_features[:0]
            region_weight = sentence_weight = rows
    return Features(
        image_global=encoded.image_features[:count].float(),
        text_global=encoded.text_features.float(),
        image_local=encoded.image_features[count:].float(),
        text_local=local_text.float(),
        region=region.float(),
        sentence=sentence.float(),
        region_weight=region_weight.float(),
        sentence_weight=sentence_weight.float(),
        scale=clip.logit_scale.float(),
    )


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 where it is asked for, or `auto` on a GPU that has it; None for float32. The weights stay float32.

    Raises ConfigError for bf16 on a GPU without it.
    """
    if precision == "fp32" or (precision == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if precision == "auto":
            return None
        raise ConfigError(
            f"finetune.precision = 'bf16': {torch.cuda.get_device_name(device)} has no bfloat16. Set it to fp32 or auto."
        )
    return torch.bfloat16
