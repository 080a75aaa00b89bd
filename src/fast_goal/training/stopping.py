"""A training that is asked to end: by SIGTERM, of a user, a scheduler or a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM  # with which the process ends


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that a SIGTERM sets, so that the step at hand is finished and its state written before the process ends."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
