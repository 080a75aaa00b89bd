"""Several processes of one training: started here on one machine, or by torchrun on any number of them.

    fast-goal finetune                                                  one process for each GPU of this machine
    torchrun --nnodes 2 --nproc-per-node 8 ... -m fast_goal finetune    on each of two machines

Every process takes its share of each batch, gathers the features of all, and computes the loss of the whole batch; so the
result is that of one process with the large batch. Rank 0 alone writes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.objectives import Features, Shares, given

TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 measures on the validation split
LOST = ("gloo", "NCCL")  # in the messages of torch's errors about a connection
GLOBAL = ("image_global", "text_global", "teacher_image", "teacher_text")  # features [B, D]
LOCAL = (  # features [P, D], weights [P] and boxes [P, 4]
    *("image_local", "text_local", "region", "sentence"),
    *("region_weight", "sentence_weight", "local_weight", "local_boxes"),
)
NEGATIVE = ("text_negatives", "teacher_negatives")  # features [N, D]
OWN = ("patches", "sub_queries", "sub_choices")  # that each process keeps to itself; the objective exchanges texts alone


@dataclass(frozen=True)
class Group:
    """The processes of a training; this one has the number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


class Disconnected(FastGoalError):
    """Another process of the group has gone."""


def rank() -> int:
    """This process's number as torchrun gives it, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def processes(wanted: int) -> int:
    """How many processes `finetune.processes` means here: 0 is one for each GPU, 1 without GPUs, or the device that
    FAST_GOAL_DEVICE names."""
    if wanted:
        return wanted
    return 1 if os.environ.get("FAST_GOAL_DEVICE") else max(torch.cuda.device_count(), 1)


def launch(count: int, arguments: Sequence[str]) -> None:
    """Runs `python arguments...` in `count` processes of this machine and waits for them; when one dies the others are
    stopped. Raises FastGoalError, which says which one and how; SystemExit or KeyboardInterrupt after a signal, once they have
    ended: those were sent SIGTERM."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as error:
        raise KeyboardInterrupt if error.sigval == signal.SIGINT else SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        failed, failure = error.get_first_failure()
        raise FastGoalError(
            f"Process {failed} of {count} ended with exit status {failure.exitcode} (its message is above), and the others "
            "were stopped. Run the step again: it continues at the last resume state."
        ) from None


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group that torchrun made, joined and left; a group of one where there is no torchrun.

    A process of a group ends with the one that started it: a `kill -9` of that leaves none behind, which would train on, and
    hold the GPUs, beside those that continue."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Group()
        return
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # gloo beside nccl: what the processes agree on between two steps waits for no GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def end_with(process: int, every: float = 5.0) -> None:
    """Ends this one, at once, when that process is gone; for a thread of its own. `every`: seconds between two looks."""
    while True:
        time.sleep(every)
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            os._exit(1)


@contextmanager
def connected(group: Group) -> Iterator[None]:
    """Raises Disconnected, instead of what torch makes of it, where another process of the group has gone."""
    try:
        yield
    except RuntimeError as error:
        if group.world == 1 or not (isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)):
            raise
        raise Disconnected(
            f"Process {group.rank} of {group.world} has lost another one, whose message tells why it ended "
            f"({str(error).splitlines()[0]}). Run the step again: it continues at the last resume state."
        ) from None


def own_device(device: torch.device) -> torch.device:
    """The device of this process: with GPUs, the one of its number on its machine."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def check_batch(batch_size: int, group: Group, samples: int | None = None, section: str = "finetune") -> None:
    """Raises ConfigError for a batch that the processes cannot share evenly; of fewer `samples` than that it holds them all."""
    size = batch_size if samples is None else min(batch_size, samples)
    if size % group.world == 0:
        return
    share = size // group.world * group.world
    if size < batch_size:
        raise ConfigError(
            f"{section}.batch_size = {batch_size}, but there are only {size} samples, which {group.world} processes cannot "
            f"share evenly. Set it to {share}."
            if share
            else f"{section}.processes: {group.world} processes cannot share {size} samples. Set it to {size}."
        )
    raise ConfigError(
        f"{section}.batch_size = {batch_size} is that of all {group.world} processes together, and is no multiple of them. "
        f"Set it to {share or group.world}."
    )


def check_step(step: int, path: Path | str, group: Group) -> None:
    """Raises FastGoalError where the processes would not all begin at the same step."""
    if any_rank(step != _of_main(step, group), group):
        raise FastGoalError(
            f"The processes do not begin at the same step, here after {step}: not all of them read the same resume state "
            f"{path}. Run every machine in the same folder of a shared file system, or remove the state to begin anew."
        )


def _of_main(value: int, group: Group) -> int:
    if group.world == 1:
        return value
    found = torch.tensor(value)
    dist.broadcast(found, 0)
    return int(found)


def any_rank(value: bool, group: Group) -> bool:
    """Whether it is true on any of the processes; all must ask, and wait for each other, but for no GPU."""
    if group.world == 1:
        return value
    found = torch.tensor(float(value))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def gathered(features: Features, pairs: Sequence[int], group: Group, negatives: Sequence[int] = ()) -> Features:
    """The features of all processes in the order of their ranks, those of the global rows, of the local pairs and of the hard
    negatives apart.

    features: of this process, B / world samples, pairs[rank] local pairs and, if there are any at all, negatives[rank] hard
    negatives; `pairs` and `negatives` count them for every rank. Gradients flow into this process's rows alone: every process
    computes the same loss of the whole batch, so that its own rows get their whole gradient here. The logit scale, which all
    have, gets a share of 1 / world. Patches and sub-captions stay those of this process, and `shares` leads to the others'.
    """
    if group.world == 1:
        return features
    rows = len(features.image_global)

    def shifted(own: torch.Tensor) -> torch.Tensor:
        # float32 holds row numbers exactly up to 2**24
        return (own + group.rank * rows).to(features.image_global.dtype)

    joined = _all(given(features, GLOBAL), [rows] * group.world, group)
    joined |= _all(given(features, LOCAL) | {"local_rows": shifted(features.local_rows)}, pairs, group)
    if features.text_negatives is not None:
        own = given(features, NEGATIVE) | {"negative_rows": shifted(features.negative_rows)}
        own["negative_slots"] = features.negative_slots.to(features.image_global.dtype)
        joined |= _all(own, negatives, group)
    joined |= {name: joined[name].long() for name in ("local_rows", "negative_rows", "negative_slots") if name in joined}
    scale = features.scale
    scale = scale.detach() + (scale - scale.detach()) / group.world
    return Features(
        **joined,
        **given(features, OWN),
        shares=RankShares(group, rows),
        pooling=features.pooling,
        negative_count=features.negative_count,
        scale=scale,
    )


class RankShares(Shares):
    """The shares of the processes of a group, each with as many samples; `samples`: of this one. All of them have to ask for
    the same in the same order."""

    def __init__(self, group: Group, samples: int):
        self._group, self.first = group, group.rank * samples

    def rows(self, own: torch.Tensor) -> torch.Tensor:
        """See `Shares`."""
        return _Rows.apply(own, self._group)

    def total(self, own: torch.Tensor) -> torch.Tensor:
        """See `Shares`."""
        return _Total.apply(own)


class _Rows(torch.autograd.Function):
    """own [b, ...] -> the rows of all processes, [world * b, ...]."""

    @staticmethod
    def forward(context: Any, own: torch.Tensor, group: Group) -> torch.Tensor:
        context.group = group
        found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(group.world)]
        dist.all_gather(found, own.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(context.group.world)[context.group.rank], None


class _Total(torch.autograd.Function):
    """The sum over the processes."""

    @staticmethod
    def forward(context: Any, own: torch.Tensor) -> torch.Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def mean_gradients(parameters: Iterable[torch.Tensor], group: Group) -> None:
    """Gives parameters that DistributedDataParallel leaves alone the mean of their gradients over the processes. Those without
    a gradient, which are the same in all, stay without."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if group.world == 1 or not gradients:
        return
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    parts = (joined / group.world).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _all(own: dict[str, torch.Tensor], counts: Sequence[int], group: Group) -> dict[str, torch.Tensor]:
    """The rows of all processes, `counts[r]` of rank r, exchanged at once; each tensor's own rows alone carry its gradient."""
    columns = [value.detach() if value.ndim == 2 else value.detach()[:, None] for value in own.values()]
    widths = [column.shape[1] for column in columns]
    sent = columns[0].new_zeros(max(counts), sum(widths))
    sent[: counts[group.rank]] = torch.cat(columns, dim=1)
    found = [torch.empty_like(sent) for _ in counts]
    if max(counts):
        dist.all_gather(found, sent)
    parts = [part[:count].split(widths, dim=1) for part, count in zip(found, counts, strict=True)]
    joined = {}
    for number, (name, value) in enumerate(own.items()):
        others = [part[number].reshape(-1, *value.shape[1:]) for part in parts]
        joined[name] = torch.cat([*others[: group.rank], value, *others[group.rank + 1 :]])
    return joined
