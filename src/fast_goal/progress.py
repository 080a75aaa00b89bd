"""One progress line for long work: step, done of total, percent, notes, rate, time left.

On a terminal the line is rewritten in place; in a log file a new line is written at most every `interval` seconds.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """`with Progress("flism", total, "images") as progress: progress.update(8, similarity="0.31")`.

    `done` starts above zero when work is resumed: the rate and the time left then count only the new work. A `total` of 0
    is not known yet. With a `scale`, what is counted is shown in units of it: bytes as "MB" with scale=1_000_000.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        done: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
        scale: int = 1,
    ):
        self.name, self.total, self.unit, self.scale = name, total, unit, scale
        self.done, self._start_done = done, done
        self._stream = stream or sys.stderr
        self._interval = 0.2 if self._stream.isatty() else interval
        self._begin = self._last = time.monotonic()
        self._notes = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._write(final=True)

    @property
    def rate(self) -> float:
        """Units per second since the start, without the resumed part."""
        return (self.done - self._start_done) / max(time.monotonic() - self._begin, 1e-9)

    def update(self, count: int = 1, **notes: object) -> None:
        """Counts `count` more units; `notes` (such as loss=1.23) stand in the line until the next ones."""
        self.done += count
        if notes:
            self._notes = "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in notes.items()
            )
        if time.monotonic() - self._last >= self._interval:
            self._write()

    def add(self, total: int, done: int) -> None:
        """More work becomes known (or, negative, is taken back), of which `done` was done before."""
        self.total += total
        self.done += done
        self._start_done += done

    def line(self) -> str:
        """The line as text."""
        percent = f"{100 * self.done / self.total:3.0f}%" if self.total else " --"
        left = (self.total - self.done) / self.rate if self.rate > 0 and self.total else float("inf")
        digits = 0 if self.scale == 1 else 1
        parts = [
            f"{self.name}: {self.done / self.scale:,.{digits}f}/{self.total / self.scale:,.{digits}f} {self.unit}",
            percent,
            self._notes,
            f"{self.rate / self.scale:,.1f} {self.unit}/s",
            f"left {clock(left)}",
        ]
        return "  ".join(part for part in parts if part)

    def _write(self, final: bool = False) -> None:
        self._last = time.monotonic()
        if self._stream.isatty():
            self._stream.write(f"\r\033[K{self.line()}" + ("\n" if final else ""))
        else:
            self._stream.write(f"{self.line()}\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if seconds == float("inf"):
        return "?"
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
