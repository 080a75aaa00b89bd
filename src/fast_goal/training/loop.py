"""Fine-tuning CLIP on long captions and local pairs (METHOD section 3); run by `fast-goal finetune`."""

from __future__ import annotations

import io
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fast_goal.config import FinetuneConfig
from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.model.clip import Clip
from fast_goal.objectives import Objective
from fast_goal.progress import Progress
from fast_goal.training.batches import Loader, PairDataset
from fast_goal.training.best import Best
from fast_goal.training.checkpoint import load_state, save_state
from fast_goal.training.distributed import Group, any_rank, check_batch, check_step
from fast_goal.training.recorder import NotFinite, OnStep, Recorder
from fast_goal.training.schedule import learning_rate, make_optimizer, parameter_groups, set_rate
from fast_goal.training.step import TrainStep

SHOWN_IDS = 8  # of a batch, in an error
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
    group: Group | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[Clip, int], dict[str, float] | None] | None = None,
) -> dict[str, Any]:
    """Trains `clip` in place on one split and returns a summary. The result are the weights of the last epoch, or of the best
    with `config.result` "best"; with `config.ema` their average.

    `config.view` becomes the model's own view, so that whoever uses it shows it images as the training did.

    Of the processes of `group`, which share every batch of `config.batch_size`, all call this and all end with the same
    weights, but for those of the best epoch, which only the first has; `on_epoch` is called, and the state written, by the
    first alone.

    A state at `state_path` with the key `state_key` is continued. `on_step(step, record)` gets a record every
    `config.log_every` steps and at the end of each epoch: step and epoch from 1, loss, every term, learning_rate,
    samples_per_second, logit_scale; on a resume it gets the former ones first. `on_epoch(clip, epoch)` may measure the
    model after an epoch; what it returns becomes a record of its own, and the mean of its values says which epoch is the
    best. A SIGTERM ends the training after the step at hand, with its state written; what was still to be measured after
    an epoch is measured by the resumed one. The caller removes the state once it has saved the model.

    Raises DataError for an image that cannot be read, ConfigError for a batch that cannot be shared or a best epoch that
    nothing measures, FastGoalError when the loss is not finite or the disk is full.
    """
    started = time.perf_counter()
    group = group or Group()
    check_batch(config.batch_size, group)
    for name, value in (("result", config.result), ("patience", config.patience)):
        if on_epoch is None and value not in ("last", None):
            raise ConfigError(
                f"finetune.{name} = {value!r} needs a split `val` with long captions of two images or more, and data set "
                f"{dataset.name!r} has none. Set it to {'last' if name == 'result' else 'null'}."
            )
    clip.view_mode = config.view
    samples = PairDataset(
        dataset, split, pairs, clip, objective.needs_local, config.pairs == "best", group, objective.alignment
    )
    check_batch(config.batch_size, group, len(samples))
    pinned = device.type == "cuda"
    loader = Loader(samples, config.batch_size, seed, config.workers, pinned, config.length_groups)
    total = config.epochs * loader.steps
    dtype = autocast_dtype(config.precision, device)
    clip.to(device).train()
    clip.checkpointed(config.checkpointing)
    groups = parameter_groups(clip, config.decayed, config.layer_decay, config.freeze)
    optimizer = make_optimizer(groups, config.learning_rate, config.weight_decay)
    average = None if config.ema is None else AveragedModel(clip, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    progress = load_state(state_path, state_key, clip, optimizer, average) or {"step": 0, "seconds": 0.0, "history": []}
    if config.compile:
        clip.compile()
    step, first = progress["step"], progress["step"]
    check_step(step, state_path, group, device)
    recorder = Recorder("finetune", on_step, progress["history"])
    train_step = TrainStep(clip, objective, optimizer, dtype, config.gradient_clip, config.max_logit_scale, group)

    def seconds() -> float:
        return progress["seconds"] + time.perf_counter() - started

    def save() -> None:
        if not group.main:
            return
        now = {"step": step, "seconds": seconds(), "history": recorder.history}
        save_state(state_path, state_key, clip, optimizer, now, average)
        recorder.pause()

    best = Best(Path(f"{state_path}.best"), recorder.history, keep=config.result == "best")
    with (
        _terminated(group) as stopped,
        Progress("finetune", total, "steps", done=step, stream=None if group.main else io.StringIO()) as line,
    ):
        # A state of the end of an epoch begins with that epoch: no batch of it is left, but perhaps what follows its last.
        for epoch in range(max(step - 1, 0) // loader.steps, config.epochs):
            for batch in loader.epoch(epoch, start=step - epoch * loader.steps):
                rate = learning_rate(step, total, config.learning_rate, config.warmup_steps)
                set_rate(optimizer, rate)
                with _memory_advice(config, loader.batch_size // group.world):
                    values = train_step([part.to(device) for part in batch.split(config.accumulate)])
                if average is not None:
                    average.update_parameters(clip)
                step += 1
                recorder.add(step, loader.batch_size, values)
                if step % config.log_every == 0 or step % loader.steps == 0:
                    record = _finite(recorder, loader, state_path)
                    recorder.write({"step": step, "epoch": epoch + 1, **record, "learning_rate": rate})
                    line.update(0, epoch=epoch + 1, loss=record["loss"])
                line.update()
                if stopped.is_set() and group.main:  # the others are stopped by whoever started them
                    save()
                    raise SystemExit(128 + signal.SIGTERM)
                if step % config.save_every == 0 and step % loader.steps:
                    save()
            current = clip if average is None else average.module
            if on_epoch is not None and group.main and "loss" in recorder.history[-1]:  # not measured yet
                current.eval()
                with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():  # not for so few passes
                    measured = on_epoch(current, epoch + 1)
                current.train()
                if measured:
                    recorder.write({"step": step, "epoch": epoch + 1, **measured})
                    best.offer(epoch + 1, measured)
            save()
            if group.main:
                best.store(epoch + 1, current)
                if stopped.is_set():
                    raise SystemExit(128 + signal.SIGTERM)
            # the others do not know what was measured since the state they began with
            if any_rank(group.main and best.exhausted(epoch + 1, config.patience), group, device):
                if group.main:
                    _log.warning(
                        "finetune: %d epochs without a better one than epoch %d: ended early.", config.patience, best.epoch
                    )
                break
    if average is not None:
        clip.load_state_dict(average.module.state_dict())
    if config.result == "best" and group.main:
        best.restore(clip)
    clip.checkpointed(False)
    clip.requires_grad_(True).eval()
    final = next(record for record in reversed(recorder.history) if "loss" in record)
    return {
        "steps": step,
        "resumed_at_step": first,
        "epochs": -(-step // loader.steps),
        "best_epoch": best.epoch,
        "batch_size": loader.batch_size,
        "precision": "fp32" if dtype is None else "bf16",
        "seconds": seconds(),
        "samples_per_second": recorder.rate,
        "final": {name: value for name, value in final.items() if name not in ("step", "epoch", "samples_per_second")},
        "counts": samples.counts,
    }


def _finite(recorder: Recorder, loader: Loader, state_path: Path | str) -> dict[str, float]:
    """The recorder's last values. Raises FastGoalError, which names the images of the first batch that went wrong."""
    try:
        return recorder.flush()
    except NotFinite as error:
        ids = loader.image_ids(error.step - 1)
        shown = ", ".join(ids[:SHOWN_IDS]) + (f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else "")
        state = f"The last good state is {state_path}." if Path(state_path).exists() else "There is no earlier state."
        raise FastGoalError(f"{error} Its batch: {shown}. {state}") from None


@contextmanager
def _memory_advice(config: FinetuneConfig, batch_size: int) -> Iterator[None]:
    """Says which setting helps where the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        parts = f"finetune.accumulate={config.accumulate * 2}"
        ways = [f"{parts} (the same result, a second forward pass)"]
        if not config.checkpointing:
            ways.append("finetune.checkpointing=true (the same result, about a third slower)")
        if config.precision == "fp32":
            ways.append("finetune.precision=bf16")
        ways.append("a smaller finetune.batch_size (another result: fewer negatives)")
        raise FastGoalError(
            f"Out of GPU memory with {batch_size} samples in {config.accumulate} part(s) on this GPU: set "
            f"{', or '.join(ways)}. ({str(error).splitlines()[0]})"
        ) from None


@contextmanager
def _terminated(group: Group) -> Iterator[threading.Event]:
    """An event that a SIGTERM sets, so that the step at hand is finished and its state written before the process ends."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        yield stopped
    except RuntimeError:
        if group.main or not stopped.is_set():
            raise
        raise SystemExit(128 + signal.SIGTERM) from None  # the first process, told the same, has left the group
    finally:
        signal.signal(signal.SIGTERM, before)


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
