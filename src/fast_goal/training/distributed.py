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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.objectives import Features

TIMEOUT = timedelta(hours=1)  # the others wait while rank 0 measures on the validation split
GLOBAL = ("image_global", "text_global")  # features [B, D]
LOCAL = ("image_local", "text_local", "region", "sentence")  # features [P, D]
WEIGHTS = ("region_weight", "sentence_weight", "local_weight")  # [P]


@dataclass(frozen=True)
class Group:
    """The processes of a training; this one has the number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0


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
    """The group that torchrun made, joined and left; a group of one where there is no torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Group()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The device of this process: with GPUs, the one of its number on its machine."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def check_batch(batch_size: int, group: Group, samples: int | None = None) -> None:
    """Raises ConfigError for a batch that the processes cannot share evenly; of fewer `samples` than that it holds them all."""
    size = batch_size if samples is None else min(batch_size, samples)
    if size % group.world == 0:
        return
    share = size // group.world * group.world
    if size < batch_size:
        raise ConfigError(
            f"finetune.batch_size = {batch_size}, but there are only {size} samples, which {group.world} processes cannot "
            f"share evenly. Set it to {share}."
            if share
            else f"finetune.processes: {group.world} processes cannot share {size} samples. Set it to {size}."
        )
    raise ConfigError(
        f"finetune.batch_size = {batch_size} is that of all {group.world} processes together, and is no multiple of them. "
        f"Set it to {share or group.world}."
    )


def check_step(step: int, path: Path | str, group: Group, device: torch.device) -> None:
    """Raises FastGoalError where the processes would not all begin at the same step."""
    if any_rank(step != _of_main(step, group, device), group, device):
        raise FastGoalError(
            f"The processes do not begin at the same step, here after {step}: not all of them read the same resume state "
            f"{path}. Run every machine in the same folder of a shared file system, or remove the state to begin anew."
        )


def _of_main(value: int, group: Group, device: torch.device) -> int:
    if group.world == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.broadcast(found, 0)
    return int(found)


def any_rank(value: bool, group: Group, device: torch.device) -> bool:
    """Whether it is true on any of the processes; all must ask."""
    if group.world == 1:
        return value
    found = torch.tensor(float(value), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def gathered(features: Features, pairs: Sequence[int], group: Group) -> Features:
    """The features of all processes in the order of their ranks, those of the global rows and of the local pairs apart.

    features: of this process, B / world samples and pairs[rank] local pairs; `pairs` counts them for every rank. Gradients
    flow into this process's rows alone: every process computes the same loss of the whole batch, so that its own rows get
    their whole gradient here. The logit scale, which all have, gets a share of 1 / world.
    """
    if group.world == 1:
        return features
    rows = len(features.image_global)
    joined = {}
    whole = torch.cat([getattr(features, name) for name in GLOBAL], dim=1)  # [B / world, 2 D]
    width = features.image_global.shape[1]
    for name, value in zip(GLOBAL, _all(whole, [rows] * group.world, group).split(width, dim=1), strict=True):
        joined[name] = value
    columns = [getattr(features, name) for name in LOCAL]
    columns += [getattr(features, name)[:, None] for name in WEIGHTS] + [features.local_boxes]
    # float32 holds row numbers exactly up to 2**24
    columns.append((features.local_rows + group.rank * rows).to(whole.dtype)[:, None])
    local = _all(torch.cat(columns, dim=1), pairs, group)
    *parts, boxes, row = local.split([width] * len(LOCAL) + [1] * len(WEIGHTS) + [4, 1], dim=1)
    for name, value in zip((*LOCAL, *WEIGHTS), parts, strict=True):
        joined[name] = value if name in LOCAL else value[:, 0].detach()
    scale = features.scale
    scale = scale.detach() + (scale - scale.detach()) / group.world
    return Features(**joined, local_boxes=boxes.detach(), local_rows=row[:, 0].detach().long(), scale=scale)


def _all(own: torch.Tensor, counts: Sequence[int], group: Group) -> torch.Tensor:
    """The rows of all processes, `counts[r]` of rank r; only this process's own ones carry a gradient."""
    longest = max(counts)
    padded = own.new_zeros(longest, own.shape[1])
    padded[: len(own)] = own.detach()
    found = [torch.empty_like(padded) for _ in range(group.world)]
    if longest:
        dist.all_gather(found, padded)
    parts = [part[:count] for part, count in zip(found, counts, strict=True)]
    parts[group.rank] = own
    return torch.cat(parts)
