"""Fine-tuning CLIP on long captions and local pairs (METHOD section 3); run by `fast-goal finetune`."""

from __future__ import annotations

import io
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fast_goal.config import FinetuneConfig
from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.model.clip import Clip
from fast_goal.objectives import Objective
from fast_goal.progress import Progress
from fast_goal.training.average import Average
from fast_goal.training.batches import Batch, pair_dataset
from fast_goal.training.best import Best
from fast_goal.training.checkpoint import load_state, save_state, states
from fast_goal.training.distributed import Disconnected, Group, any_rank, check_batch, check_step, connected
from fast_goal.training.loader import Loader
from fast_goal.training.recorder import BadLoss, OnStep, Recorder
from fast_goal.training.schedule import learning_rate, make_optimizer, parameter_groups, set_rate
from fast_goal.training.step import TrainStep, fit_pooling
from fast_goal.training.stopping import STATUS, stop_requested

OnEpoch = Callable[[Clip, int], dict[str, float] | None]
SHOWN_IDS = 8  # of a batch, in an error
NOT_FINAL = ("step", "epoch", "samples_per_second", "gpu_peak_memory_gb")  # of a record, in the summary
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
    on_epoch: OnEpoch | None = None,
    section: str = "finetune",
    negatives: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Trains `clip` in place on one split and returns a summary. The result are the weights of the last epoch, or of the best
    with `config.result` "best"; with `config.ema` their average.

    `negatives` is the table of hard negatives (data.records.NEGATIVES), for an objective that needs them. An objective that
    needs a teacher has an average of the weights that starts with those the training starts with; it is kept in the state. One
    that looks at a text-conditioned pooling gives a model without one a fresh one, which is trained with it.

    `config.view` becomes the model's own view, so that whoever uses it shows it images as the training did. `section` is where
    the settings stand in params.yaml, for messages.

    Of the processes of `group`, which share every batch of `config.batch_size`, all call this and all end with the same
    weights, but for those of the best epoch, which only the first has; `on_epoch` is called, and the state written, by the
    first alone.

    A state of `state_path` with the key `state_key` is continued; the last `config.keep_states` are kept. `on_step(step,
    record)` gets a record every `config.log_every` steps and at the end of each epoch: step and epoch from 1, loss, every
    term, learning_rate, samples_per_second, logit_scale, and on a GPU gpu_peak_memory_gb; on a resume it gets the former ones
    first. `on_epoch(clip, epoch)` may measure the model after an epoch; what it returns becomes a record of its own, and the
    mean of its values says which epoch is the best. A SIGTERM, to any of the processes, ends the training of all after the
    step at hand, with its state written; what was still to be measured after an epoch is measured by the resumed one. The
    caller removes the states once it has saved the model.

    Raises DataError for an image that cannot be read, ConfigError for a batch that cannot be shared, a best epoch that nothing
    measures, hard negatives that are needed and not there, or a pooling that does not fit, FastGoalError when the loss is not
    finite or has diverged, memory does not suffice, the disk is full, or another process has gone.
    """
    started = time.perf_counter()
    group = group or Group()
    check_batch(config.batch_size, group, section=section)
    for name, value in (("result", config.result), ("patience", config.patience)):
        if on_epoch is None and value not in ("last", None):
            raise ConfigError(
                f"{section}.{name} = {value!r} needs a split `val` with {config.captions} captions of two images or more, and "
                f"data set {dataset.name!r} has none. Set it to {'last' if name == 'result' else 'null'}."
            )
    clip.view_mode = config.view
    fit_pooling(clip, objective, seed)
    samples = pair_dataset(dataset, split, pairs, clip, objective, config, group, device, section, negatives)
    check_batch(config.batch_size, group, len(samples), section)
    pinned = device.type == "cuda"
    loader = Loader(samples, config.batch_size, seed, config.workers, pinned, config.length_groups, section)
    training = _Training(
        clip, objective, config, loader, device, group, section, Path(state_path), state_key, on_step, on_epoch, started
    )
    training.run()
    return training.summary() | {"counts": samples.counts}


class _Training:
    """What `finetune` carries from one step to the next, beginning with the newest state."""

    def __init__(
        self,
        clip: Clip,
        objective: Objective,
        config: FinetuneConfig,
        loader: Loader,
        device: torch.device,
        group: Group,
        section: str,
        state_path: Path,
        state_key: str,
        on_step: OnStep | None,
        on_epoch: OnEpoch | None,
        started: float,
    ):
        self.clip, self.config, self.loader, self.device, self.group = clip, config, loader, device, group
        self.section, self.state_path, self.state_key, self.on_epoch = section, state_path, state_key, on_epoch
        self.total = config.epochs * loader.steps
        self.dtype = autocast_dtype(config.precision, device, section)
        clip.to(device).train()
        clip.checkpointed(config.checkpointing)
        groups = parameter_groups(clip, config.decayed, config.layer_decay, config.freeze, section, config.head_rate)
        self.optimizer = make_optimizer(groups, config.learning_rate, config.weight_decay, config.betas, config.adam_epsilon)
        self.average = None if config.ema is None else Average(clip, config.ema)
        self.result = clip if self.average is None else self.average.model
        decay = objective.teacher_decay
        self.teacher = None if decay is None else Average(clip, decay, from_start=True)
        if self.teacher is not None:
            self.teacher.model.eval().checkpointed(False)  # without a graph there is nothing to compute again
        progress = load_state(state_path, state_key, clip, self.optimizer, _model(self.average), _model(self.teacher))
        progress = progress or {"step": 0, "seconds": 0.0, "history": []}
        if config.compile:
            clip.compile()
            if self.teacher is not None:
                self.teacher.model.compile()
        self.step = self.first_step = progress["step"]
        self.started = started - progress["seconds"]
        self.processor_seconds = 0.0  # of the steps that this process took
        check_step(self.step, state_path, group)
        self.recorder = Recorder(section, on_step, progress["history"], config.diverged)
        self.best = Best(Path(f"{state_path}.best"), self.recorder.history, keep=config.result == "best")
        self.train_step = TrainStep(
            clip,
            objective,
            self.optimizer,
            self.dtype,
            config.gradient_clip,
            config.max_logit_scale,
            group,
            _model(self.teacher),
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def run(self) -> None:
        """Takes the steps that are left, and gives `clip` the weights that are the result."""
        name, stream = self.section.split(".")[0], None if self.group.main else io.StringIO()
        with (
            _terminated() as self.stopped,
            connected(self.group),
            self._explained(),
            Progress(name, self.total, "steps", done=self.step, stream=stream) as self.line,
        ):
            # A state of the end of an epoch begins with that epoch: no batch of it is left, but perhaps what follows its last.
            for epoch in range(max(self.step - 1, 0) // self.loader.steps, self.config.epochs):
                for batch in self.loader.epoch(epoch, start=self.step - epoch * self.loader.steps):
                    self._take(batch, epoch)
                if not self._end_of(epoch):
                    break
        if self.average is not None:
            self.clip.load_state_dict(self.average.model.state_dict())
        if self.config.result == "best" and self.group.main:
            self.best.restore(self.clip)
        self.clip.checkpointed(False)
        self.clip.requires_grad_(True).eval()

    def summary(self) -> dict[str, Any]:
        """What the training did, for its metrics."""
        final = next(record for record in reversed(self.recorder.history) if "loss" in record)
        return {
            "steps": self.step,
            "resumed_at_step": self.first_step,
            "epochs": -(-self.step // self.loader.steps),
            "best_epoch": self.best.epoch,
            "batch_size": self.loader.batch_size,
            "precision": "fp32" if self.dtype is None else "bf16",
            "seconds": self._seconds(),
            "samples_per_second": self.recorder.rate,
            "step_seconds": self._step_seconds(),
            **self._gpu(),
            "final": {name: value for name, value in final.items() if name not in NOT_FINAL},
        }

    def _take(self, batch: Batch, epoch: int) -> None:
        """One step, and what is due after it."""
        config, begin = self.config, time.process_time()
        rate = learning_rate(self.step, self.total, config.learning_rate, config.warmup_steps)
        set_rate(self.optimizer, rate)
        with _memory_advice(config, self.loader.batch_size // self.group.world, self.section):
            values = self.train_step([part.to(self.device) for part in batch.split(config.accumulate)])
        self.step += 1
        self.processor_seconds += time.process_time() - begin
        for average in (self.average, self.teacher):
            if average is not None:
                average.update(self.step)
        self.recorder.add(self.step, self.loader.batch_size, values)
        last = self.step % self.loader.steps == 0
        if last or self.step % config.log_every == 0:
            values = self.recorder.flush()
            self.recorder.write({"step": self.step, "epoch": epoch + 1, **values, "learning_rate": rate, **self._gpu()})
            self.line.update(0, epoch=epoch + 1, loss=values["loss"])
        self.line.update()
        if any_rank(self.stopped.is_set(), self.group):
            self._save()
            self._leave()
        if self.step % config.save_every == 0 and not last:
            self._save()

    def _end_of(self, epoch: int) -> bool:
        """Measures and keeps what an epoch has led to. Whether another one may follow."""
        if self.on_epoch is not None and self.group.main and "loss" in self.recorder.history[-1]:  # not measured yet
            self._measure(self.on_epoch, epoch)
        self._save()
        if self.group.main:
            self.best.store(epoch + 1, self.result)
        if any_rank(self.stopped.is_set(), self.group):
            self._leave()
        # the others do not know what was measured since the state they began with
        ended = any_rank(self.group.main and self.best.exhausted(epoch + 1, self.config.patience), self.group)
        if ended and self.group.main:
            message = "%s: %d epochs without a better one than epoch %d: ended early."
            _log.warning(message, self.section, self.config.patience, self.best.epoch)
        return not ended

    def _measure(self, on_epoch: OnEpoch, epoch: int) -> None:
        self.result.eval()
        with torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext():  # not for so few passes
            measured = on_epoch(self.result, epoch + 1)
        self.result.train()
        if measured:
            self.recorder.write({"step": self.step, "epoch": epoch + 1, **measured})
            self.best.offer(epoch + 1, measured)

    def _save(self) -> None:
        self.recorder.check(self.step, self.clip.parameters())  # no state holds weights that are spoilt
        if self.group.main:
            now = {"step": self.step, "seconds": self._seconds(), "history": self.recorder.history}
            average, teacher, keep = _model(self.average), _model(self.teacher), self.config.keep_states
            save_state(self.state_path, self.state_key, self.clip, self.optimizer, now, average, keep, teacher)
            self.recorder.pause()

    def _leave(self) -> None:
        # together: whoever waits for the processes kills the others, also one that still writes, when the first has gone
        any_rank(True, self.group)
        raise SystemExit(STATUS)

    def _seconds(self) -> float:
        """Of the whole training, with those before a resume."""
        return time.perf_counter() - self.started

    def _step_seconds(self) -> float | None:
        """What a step costs, to compare trainings by: without a GPU the seconds of all cores, its input not counted, which
        other work on the machine hardly changes; with one the median of the time that passes. None where none was taken."""
        if self.device.type == "cpu":
            taken = self.step - self.first_step
            return self.processor_seconds / taken if taken else None
        rates = [record["samples_per_second"] for record in self.recorder.history if "samples_per_second" in record]
        return self.loader.batch_size / statistics.median(rates) if rates else None

    def _gpu(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"gpu_peak_memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Names the images of the batch in which a loss went wrong, and the last state from before."""
        try:
            yield
        except BadLoss as error:
            ids = self.loader.image_ids(error.step - 1)
            shown = ", ".join(ids[:SHOWN_IDS]) + (f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else "")
            good = next((file for step, file in states(self.state_path).items() if step < error.since), None)
            state = "No state from before it is kept." if good is None else f"The last good state is {good}."
            raise FastGoalError(f"{error} Its batch: {shown}. {state}") from None


def _model(average: Average | None) -> Clip | None:
    return None if average is None else average.model


@contextmanager
def _memory_advice(config: FinetuneConfig, batch_size: int, section: str) -> Iterator[None]:
    """Says which setting helps where the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = [f"{section}.accumulate={config.accumulate * 2} (the same result, a second forward pass)"]
        if not config.checkpointing:
            ways.append(f"{section}.checkpointing=true (the same result, about a third slower)")
        if config.precision == "fp32":
            ways.append(f"{section}.precision=bf16")
        ways.append(f"a smaller {section}.batch_size (another result: fewer negatives)")
        raise FastGoalError(
            f"Out of GPU memory with {batch_size} samples in {config.accumulate} part(s) on this GPU: set "
            f"{', or '.join(ways)}. ({str(error).splitlines()[0]})"
        ) from None


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """`stop_requested`, also where the signal reached another process first, which is gone by now."""
    with stop_requested() as stopped:
        try:
            yield stopped
        except Disconnected:
            if not stopped.is_set():
                raise
            raise SystemExit(STATUS) from None  # another one died, and whoever started them ends all


def autocast_dtype(precision: str, device: torch.device, section: str = "finetune") -> torch.dtype | None:
    """bfloat16 where it is asked for, or `auto` on a GPU that has it; None for float32. The weights stay float32.

    Raises ConfigError for bf16 on a GPU without it.
    """
    if precision == "fp32" or (precision == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if precision == "auto":
            return None
        raise ConfigError(
            f"{section}.precision = 'bf16': {torch.cuda.get_device_name(device)} has no bfloat16. Set it to fp32 or auto."
        )
    return torch.bfloat16
