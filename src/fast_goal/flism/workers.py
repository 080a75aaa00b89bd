"""FLISM's shards in worker processes of one machine: one for each GPU, or as many as are asked for.

A worker holds its own models, reads the caches, and sends finished shards back; only the process that started it writes.
It ends with that process, however that ends.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from fast_goal.config import FlismConfig
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, FastGoalError, ModelError
from fast_goal.flism.detectors import RegionDetector
from fast_goal.flism.pipeline import Caches, Done, Pipeline, Record, cores
from fast_goal.model.clip import Clip

IN_FLIGHT = 2  # shards at a worker: it decodes the next one while it embeds this one
REPORT_SECONDS = 0.5  # between two messages on how far a worker is


class Models(Protocol):
    """How a worker gets its models; it is pickled."""

    def __call__(self, device: torch.device) -> tuple[Clip, RegionDetector | None]:
        """CLIP and detector on the device."""
        ...


class Own:
    """The models of the calling process, copied by way of its memory."""

    def __init__(self, clip: Clip, detector: RegionDetector | None):
        self._clip, self._detector = clip, detector

    def __call__(self, device: torch.device) -> tuple[Clip, RegionDetector | None]:
        """See `Models`. A detector goes to the device by its method `to`, if it has one."""
        move = getattr(self._detector, "to", None)
        return self._clip.to(device).eval(), move(device) if move is not None else self._detector

    def __getstate__(self) -> dict[str, Any]:
        return {"_clip": copy.deepcopy(self._clip).cpu(), "_detector": self._detector}


@dataclass(frozen=True)
class CacheNames:
    """Where the caches are: the folder and the digests of `Caches.open`, and the machine that the folder is on."""

    folder: str
    embeddings: str
    detections: str | None
    splits: str
    host: str = socket.gethostname()

    def open(self) -> Caches:
        """Opens the caches."""
        return Caches.open(self.folder, self.embeddings, self.detections, self.splits)

    def open_here(self) -> Caches | None:
        """The caches on their own machine; None on another, where SQLite could not share them even if it saw the file."""
        return self.open() if self.host == socket.gethostname() else None


@dataclass(frozen=True)
class Spec:
    """All that a worker needs to know; it can be pickled if the models can."""

    models: Models
    config: FlismConfig
    caches: CacheNames

    def packed(self) -> bytes:
        """Pickled. Raises ConfigError where a model cannot be."""
        try:
            return pickle.dumps(self)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the models cannot be sent to worker processes ({error}). Set flism.processes=1 and flism.engine=local, or "
                "give `models` to `extract`."
            ) from None

    def pipeline(self, device: torch.device, threads: int | None, images: int) -> Pipeline:
        """A pipeline with models of its own."""
        clip, detector = self.models(device)
        return Pipeline(clip, detector, self.config, self.caches.open_here(), device, threads, images)


def devices(device: torch.device, processes: int) -> list[torch.device]:
    """The device of each worker: the visible GPUs in turn, or the one given."""
    if device.type != "cuda" or device.index is not None:
        return [device] * processes
    return [torch.device("cuda", index % torch.cuda.device_count()) for index in range(processes)]


def run_workers(
    spec: Spec,
    jobs: Sequence[Sequence[Record]],
    processes: int,
    device: torch.device,
    on_image: Callable[[str | None], None] = lambda reason: None,
) -> Iterator[Done]:
    """Processes the jobs in `processes` workers; the results come as they finish.

    Raises what a worker raises, and ModelError where one dies (killed, out of memory). All workers end with the
    generator.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads and a GPU's context, and hang
    packed = spec.packed()
    count = min(processes, len(jobs))
    threads = max(1, cores() // count)
    workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
    load: dict[Connection, int] = {}
    waiting = list(reversed(jobs))
    try:
        for chosen in devices(device, count):
            here, there = context.Pipe()
            images = sum(map(len, jobs)) // count
            process = context.Process(target=_work, args=(there, packed, str(chosen), threads, images), daemon=True)
            process.start()
            there.close()
            workers[here], load[here] = process, 0
        for _ in range(IN_FLIGHT):
            for connection in workers:
                if waiting:
                    _give(connection, workers, waiting.pop())
                    load[connection] += 1
        for connection in workers:
            if not waiting:
                _give(connection, workers, None)
        while any(load.values()):
            for connection in wait([one for one in workers if load[one]]):
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    raise _died(workers[connection]) from None
                if kind == "images":
                    for reason in value:
                        on_image(reason)
                elif kind == "error":
                    raise value
                else:
                    load[connection] -= 1
                    if waiting:
                        _give(connection, workers, waiting.pop())
                        load[connection] += 1
                        if not waiting:
                            for one in workers:
                                _give(one, workers, None)
                    yield value
    finally:
        for connection, process in workers.items():
            connection.close()
            process.terminate()
        for process in workers.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _give(connection: Connection, workers: dict[Connection, Any], job: Any) -> None:
    try:
        connection.send(job)
    except OSError:
        raise _died(workers[connection]) from None


def _died(process: Any) -> ModelError:
    process.join(5)
    return ModelError(
        f"a worker process of flism ended by itself (exit code {process.exitcode}; -9 is mostly a lack of memory). What was "
        "finished stays: run the step again, perhaps with a smaller flism.processes or flism.batch_size."
    )


class _Inbox:
    """The source of a worker: jobs that come through the connection, None at the end.

    A thread receives them, so that the parent never waits with a job while the worker waits with a result. Where the
    parent is gone, nobody wants the rest: the process ends at once.
    """

    def __init__(self, connection: Connection):
        self._connection, self._jobs, self._ended = connection, queue.SimpleQueue(), False
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        try:
            while True:
                self._jobs.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(1)

    def take(self, wait: bool) -> list[Record] | None:
        """See `pipeline.Source`."""
        if self._ended:
            return None
        try:
            job = self._jobs.get(block=wait)
        except queue.Empty:
            return None
        self._ended = job is None
        return job


def _work(connection: Connection, packed: bytes, device: str, threads: int, images: int) -> None:
    """The worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its workers
    seen: list[str | None] = []
    reported = time.monotonic()

    def on_image(reason: str | None) -> None:
        nonlocal reported
        seen.append(reason)
        if time.monotonic() - reported > REPORT_SECONDS:
            connection.send(("images", list(seen)))
            seen.clear()
            reported = time.monotonic()

    try:
        prepare()
        if not device.startswith("cuda"):
            torch.set_num_threads(threads)
        with pickle.loads(packed).pipeline(torch.device(device), threads, images) as pipeline:
            for done in pipeline.run(_Inbox(connection), on_image):
                connection.send(("images", list(seen)))
                seen.clear()
                connection.send(("done", done))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception as error:  # it is the parent that tells it to the user
        known = isinstance(error, FastGoalError)
        told = error if known else ModelError(f"a worker process of flism failed:\n{traceback.format_exc()}")
        connection.send(("error", told))
