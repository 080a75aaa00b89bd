"""The batches of a training, made by processes beside it: in the order of EpochBatches, and with an end that is noticed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from fast_goal.environment import prepare
from fast_goal.errors import DataError, FastGoalError
from fast_goal.training.batches import Batch, PairDataset
from fast_goal.training.distributed import end_with
from fast_goal.training.gpu_decoding import Encoded, GpuDecoder
from fast_goal.training.order import EpochBatches

ENDED = ("exited unexpectedly", "killed by signal")  # torch's words for a dead worker
LOOK = 5.0  # seconds between two looks at the workers while a batch is waited for
T = TypeVar("T")
R = TypeVar("R")


class Loader:
    """Batches of a PairDataset, made by `workers` processes (0: in this one) in the order of EpochBatches."""

    def __init__(
        self,
        samples: PairDataset,
        batch_size: int,
        seed: int,
        workers: int = 0,
        pin_memory: bool = False,
        length_groups: bool = False,
        section: str = "finetune",
    ):
        self._samples, self._section = samples, section
        self._order = EpochBatches(len(samples), batch_size, seed, samples.groups, samples.lengths if length_groups else None)
        self.steps, self.batch_size = self._order.steps, self._order.batch_size
        context = None
        if workers:
            # Not fork: the parent has threads, and on a GPU a CUDA context. The server imports once for all workers.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        self._loader = DataLoader(
            _Guarded(samples, seed),
            sampler=_Told(self._order),
            batch_size=None,  # the sampler yields whole batches
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            persistent_workers=workers > 0,
            multiprocessing_context=context,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        # the end of this process waits for its children, and the workers do not heed the SIGTERM that it sends them before
        self._close = weakref.finalize(self, _shut_down, self._loader)
        self._decoder = None if samples.gpu is None else GpuDecoder(samples.views, samples.gpu)

    def close(self) -> None:
        """Ends the workers; so does the end of this process."""
        self._close()

    def image_ids(self, step: int) -> list[str]:
        """Of which images the batch of a step, counted from 0 over all epochs, is made."""
        epoch, within = divmod(step, self.steps)
        return [self._samples.image_ids[index] for index in self._order.at(epoch, within)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on.

        Raises DataError, which names the image that cannot be used, and FastGoalError where a worker process was killed.
        """
        if start >= self.steps:
            return
        self._order.start(epoch, start)
        loaded = self._loaded()
        if self._decoder is None:
            yield from loaded
            return
        for batch, images in ahead(loaded, lambda item: (item[0], self._decoder(item[1]))):
            if images.is_cuda:  # made on another stream: not to be given away while this one reads them
                images.record_stream(torch.cuda.current_stream(images.device))
            yield dataclasses.replace(batch, images=images)

    def _loaded(self) -> Iterator[Batch | tuple[Batch, Encoded]]:
        """What the workers hand over."""
        # A SIGTERM to all processes, as systemd and torchrun send it, is the trainer's matter: it still needs the step at hand.
        # What is blocked here stays so in the fork server and the workers, which end with the trainer.
        resource_tracker.ensure_running()  # as it starts, it would unblock the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        following = _Following(batches) if self._loader.num_workers else functools.partial(next, batches, None)
        while True:
            try:
                batch = following()
            except (RuntimeError, EOFError, ConnectionError) as error:  # the last two: while it handed a batch over
                if isinstance(error, RuntimeError) and not any(words in str(error) for words in ENDED):
                    raise
                reason = str(error) or type(error).__name__
                raise FastGoalError(
                    f"A process that decodes images ended ({reason}), as when the system kills it for lack of memory: lower "
                    f"{self._section}.workers or {self._section}.batch_size, and run the step again."
                ) from None
            if batch is None:
                return
            if isinstance(batch, DataError):
                raise batch
            yield batch


def ahead(items: Iterable[T], function: Callable[[T], R]) -> Iterator[R]:
    """`function` of each item in turn, computed by a thread while the result before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[R] | None = None
        for item in items:
            following = pool.submit(function, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


class _Told(Sampler[tuple[int, list[int]]]):
    """Each batch with the number of its epoch, of which worker processes would not know."""

    def __init__(self, order: EpochBatches):
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch = self._order.epoch
        return ((epoch, indices) for indices in self._order)


class _Guarded(TorchDataset):
    """Returns the error of an unreadable image instead of raising it: the DataLoader would wrap it in a traceback."""

    def __init__(self, samples: PairDataset, seed: int):
        self._samples, self._seed = samples, seed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, told: tuple[int, list[int]]) -> Batch | tuple[Batch, Encoded] | DataError:
        epoch, indices = told
        try:
            return self._samples.batch(indices, self._seed, epoch)
        except DataError as error:
            return error


class _Following:
    """The next batch of the workers, None after the last, read by a thread: of a batch that a worker did not finish writing as
    it was killed, the read never ends, and torch, which does not look at the workers meanwhile, would wait with it."""

    def __init__(self, batches: Iterator[Batch]):
        self._workers = batches._workers
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=_read_on, args=(batches, self._wanted, self._read), daemon=True).start()
        weakref.finalize(self, self._wanted.put, False)

    def __call__(self) -> Batch | None:
        self._wanted.put(True)
        dead = False
        while True:
            with contextlib.suppress(queue.Empty):
                batch, error = self._read.get(timeout=LOOK)
                if error is not None:
                    raise error
                return batch
            if dead:
                raise RuntimeError(f"a worker {ENDED[0]} as it handed a batch over")
            dead = not all(worker.is_alive() for worker in self._workers)  # what came before its end may still be read


def _read_on(batches: Iterator[Batch], wanted: queue.SimpleQueue, read: queue.SimpleQueue) -> None:
    while wanted.get():
        try:
            read.put((next(batches, None), None))
        except BaseException as error:
            read.put((None, error))


def _shut_down(loader: DataLoader) -> None:
    """Ends the workers, also those of an epoch that an error cut short and whose traceback somebody still holds."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()


def _unchanged(batch: T) -> T:
    return batch


def _start_worker(trainer: int, worker: int) -> None:
    """`trainer` is the process the worker decodes for, and ends with: a `kill -9` of it leaves no workers behind. The torch
    watchdog looks at the fork server, which outlives it."""
    prepare()
    threading.Thread(target=end_with, args=(trainer,), daemon=True).start()
