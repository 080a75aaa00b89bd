"""What a training measures, step by step, without waiting for the device between two logged steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from fast_goal.errors import FastGoalError

OnStep = Callable[[int, dict[str, Any]], None]


class NotFinite(FastGoalError):
    """A training gave a value that is no number, at `step`."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Recorder:
    """The history of a training: one record per logged step, handed to `on_step(step, record)` as it is made.

    A resumed training starts with the history of its state, which is handed to `on_step` again: whoever writes it down
    (a file, a tracking run) starts empty and ends complete, with no step twice.
    """

    def __init__(self, section: str, on_step: OnStep | None = None, history: list[dict[str, Any]] | None = None):
        """`section` is where the training's settings stand in params.yaml, for error messages."""
        self._section = section
        self.history: list[dict[str, Any]] = []
        self._on_step = on_step
        self._names: list[str] = []
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._samples = 0
        self._clock = time.perf_counter()
        self._total_samples, self._total_seconds = 0, 0.0
        for record in history or []:
            self.write(record)

    def add(self, step: int, samples: int, values: dict[str, torch.Tensor]) -> None:
        """Notes the scalars of one step, numbered from 1; they stay on the device until `flush`."""
        self._names = list(values)
        self._pending.append((step, torch.stack([value.detach().float() for value in values.values()])))
        self._samples += samples

    def flush(self) -> dict[str, float]:
        """The last step's values and the `samples_per_second` since the last flush or `pause`.

        Raises NotFinite when any value since the last flush is not finite; it names the first such step.
        """
        steps = [step for step, _ in self._pending]
        rows = torch.stack([row for _, row in self._pending]).tolist()
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        rate = self._samples / seconds
        self._total_samples += self._samples
        self._total_seconds += seconds
        self._pending = []
        self.pause()
        for step, row in zip(steps, rows, strict=True):
            if not all(math.isfinite(value) for value in row):
                terms = ", ".join(f"{name} = {value:.6g}" for name, value in zip(self._names, row, strict=True))
                raise NotFinite(
                    f"The loss is not finite at step {step}: {terms}. Lower {self._section}.learning_rate or raise "
                    f"{self._section}.warmup_steps; a loss that jumps may need a gradient clip, or fp32.",
                    step,
                )
        return dict(zip(self._names, rows[-1], strict=True)) | {"samples_per_second": rate}

    @property
    def rate(self) -> float:
        """Samples per second over all flushes of this process, without the pauses; 0 before the first."""
        return self._total_samples / self._total_seconds if self._total_seconds else 0.0

    def pause(self) -> None:
        """Leaves what came before (a save, an evaluation) out of the next rate."""
        self._samples = 0
        self._clock = time.perf_counter()

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, which has its `step`, to the history and hands it on."""
        self.history.append(record)
        if self._on_step is not None:
            self._on_step(record["step"], record)
