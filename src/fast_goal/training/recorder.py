"""What a training measures, step by step, without waiting for the device between two logged steps."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fast_goal.errors import FastGoalError
from fast_goal.files import write_text

OnStep = Callable[[int, dict[str, Any]], None]

# logged losses in a row, a guess: one batch may be hard by chance, and a run lost to more of them costs time
DIVERGED_RECORDS = 3


class BadLoss(FastGoalError):
    """A loss with which training cannot go on, seen at `step`. A state of before step `since` is not touched by it."""

    def __init__(self, message: str, step: int, since: int):
        super().__init__(message)
        self.step, self.since = step, since


class Recorder:
    """The history of a training: one record per logged step, handed to `on_step(step, record)` as it is made.

    A resumed training starts with the history of its state, which is handed to `on_step` again: whoever writes it down
    (a file, a tracking run) starts empty and ends complete, with no step twice.
    """

    def __init__(
        self,
        section: str,
        on_step: OnStep | None = None,
        history: list[dict[str, Any]] | None = None,
        diverged: float | None = None,
    ):
        """`section` is where the training's settings stand in params.yaml, for error messages. `diverged`: how many times its
        first logged value the loss may reach; None: any."""
        self._section, self._diverged = section, math.inf if diverged is None else diverged
        self._first_loss: float | None = None
        self._high: list[int] = []  # the last logged steps, all in a row, with a loss that is too high
        self.history: list[dict[str, Any]] = []
        self._on_step = on_step
        self._names: list[str] = []
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._samples = 0
        self._clock = time.perf_counter()
        self._total_samples, self._total_seconds = 0, 0.0
        for record in history or []:
            self._append(record)

    def add(self, step: int, samples: int, values: dict[str, torch.Tensor]) -> None:
        """Notes the scalars of one step, numbered from 1; they stay on the device until `flush`."""
        self._names = list(values)
        self._pending.append((step, torch.stack([value.detach().float() for value in values.values()])))
        self._samples += samples

    def check(self, step: int, weights: Iterable[torch.Tensor] = ()) -> None:
        """Raises BadLoss when any value since the last flush is not finite, naming the first such step, or one of the weights
        after `step`: a loss may be finite, and its gradient not. Waits for the device."""
        self._rows()
        sums = [weight.detach().sum() for weight in weights]
        if sums and not bool(torch.stack(sums).isfinite().all()):
            raise BadLoss(f"The weights are not finite after step {step}, though its loss is. {self._advice}", step, since=step)

    def flush(self) -> dict[str, float]:
        """The last step's values and the `samples_per_second` since the last flush or `pause`. Raises BadLoss, as `check`."""
        rows = self._rows()
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        rate = self._samples / seconds
        self._total_samples += self._samples
        self._total_seconds += seconds
        self._pending = []
        self.pause()
        return dict(zip(self._names, rows[-1], strict=True)) | {"samples_per_second": rate}

    def _rows(self) -> list[list[float]]:
        """The values of every step since the last flush. Waits for the device."""
        if not self._pending:
            return []
        rows = torch.stack([row for _, row in self._pending]).tolist()
        for (step, _), row in zip(self._pending, rows, strict=True):
            if not all(math.isfinite(value) for value in row):
                terms = ", ".join(f"{name} = {value:.6g}" for name, value in zip(self._names, row, strict=True))
                raise BadLoss(f"The loss is not finite at step {step}: {terms}. {self._advice}", step, since=step)
        return rows

    @property
    def _advice(self) -> str:
        return (
            f"Lower {self._section}.learning_rate or raise {self._section}.warmup_steps; a loss that jumps may need a gradient "
            "clip, or fp32."
        )

    @property
    def rate(self) -> float:
        """Samples per second over all flushes of this process, without the pauses; 0 before the first."""
        return self._total_samples / self._total_seconds if self._total_seconds else 0.0

    def pause(self) -> None:
        """Leaves what came before (a save, an evaluation) out of the next rate."""
        self._samples = 0
        self._clock = time.perf_counter()

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record, which has its `step`, to the history and hands it on. Raises BadLoss where it shows a training
        that has diverged; a resumed one decides alike, by its history."""
        self._append(record)
        if len(self._high) >= DIVERGED_RECORDS:
            section, limit = self._section, self._diverged
            raise BadLoss(
                f"The loss has diverged: {record['loss']:.6g} at step {record['step']}, and for {len(self._high)} logged steps "
                f"above {section}.diverged = {limit:g} times its first value {self._first_loss:.6g}. Lower "
                f"{section}.learning_rate, raise {section}.warmup_steps or set {section}.gradient_clip; where such a loss is "
                f"expected, set {section}.diverged to null.",
                record["step"],
                since=self._high[0],
            )

    def _append(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if "loss" in record:
            if not self._first_loss:  # nor 0: the first batch may have had no local pair
                self._first_loss = record["loss"]
            high = record["loss"] > self._diverged * self._first_loss if self._first_loss else False
            self._high = [*self._high, record["step"]] if high else []
        if self._on_step is not None:
            self._on_step(record["step"], record)


class CsvLog:
    """The records of a training as CSV, for `on_step`: the file starts anew and is complete after every record.

    A record may bring columns that the former ones lack; their cells are empty there.
    """

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self._columns: list[str] = []
        self._records: list[dict[str, Any]] = []
        self._path.unlink(missing_ok=True)

    def __call__(self, step: int, record: dict[str, Any]) -> None:
        """Adds a record, which has its `step` itself."""
        self._records.append(record)
        added = [name for name in record if name not in self._columns]
        if added:
            self._columns += added
            write_text(self._path, self._text(header=True, records=self._records))
        else:
            with self._path.open("a", encoding="utf-8", newline="") as stream:
                stream.write(self._text(header=False, records=[record]))

    def _text(self, header: bool, records: list[dict[str, Any]]) -> str:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, self._columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(records)
        return stream.getvalue()
