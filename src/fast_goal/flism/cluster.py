"""FLISM's shards on a Ray cluster (`flism.engine=ray`, extra `[ray]`), and the only user of ray.

A cluster of this machine is started, or the one at RAY_ADDRESS is joined. There, images and models have to be at the
same paths on every machine (a shared disk), and results are written by the machine that started the run. Ray retries
what a lost machine had begun.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, FastGoalError, ModelError
from fast_goal.flism.pipeline import Done, Record
from fast_goal.flism.workers import Spec


class _Actor:
    """A worker of the pool; it lives as long as the run, with models of its own."""

    def __init__(self, packed: bytes, device: str, threads: int, folder: str):
        prepare()
        if Path(folder).is_dir():
            os.chdir(folder)  # the paths of images and models are relative to the project
        if device == "cpu":
            torch.set_num_threads(threads)
        self._pipeline = pickle.loads(packed).pipeline(torch.device(device), threads, 0)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": pickle.dumps(self._pipeline.process(pickle.loads(row["job"])))}
        except FastGoalError as error:  # as a value: ray would wrap it, and try again
            return {"result": pickle.dumps(error)}


def run_ray(
    spec: Spec,
    jobs: Sequence[Sequence[Record]],
    processes: int,
    device: torch.device,
    on_image: Callable[[str | None], None] = lambda reason: None,
) -> Iterator[Done]:
    """Processes the jobs with `processes` actors (0: one for each GPU of the cluster, or one); the results come as they
    finish. Raises ConfigError without ray, ModelError where an actor fails for good, and what a shard raises."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError('flism.engine = ray needs ray: pip install "fast-goal[ray]", or set flism.engine=local') from None

    started = not ray.is_initialized()
    if started:
        # without RAY_ADDRESS a cluster of this machine alone, even if another one runs here
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, **({"include_dashboard": False} if address == "local" else {}), log_to_driver=False)
    try:
        yield from _results(ray, spec, jobs, processes, device, on_image)
    finally:
        if started:
            ray.shutdown()


def _results(
    ray: Any,
    spec: Spec,
    jobs: Sequence[Sequence[Record]],
    processes: int,
    device: torch.device,
    on_image: Callable[[str | None], None],
) -> Iterator[Done]:
    resources = ray.cluster_resources()
    on_gpu = device.type == "cuda"
    wanted = processes or (int(resources.get("GPU", 0)) if on_gpu else 1)
    count = max(1, min(wanted, len(jobs)))
    cores = int(resources.get("CPU", 1))
    threads = max(1, min(16, cores // count))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # this program has its own
    rows = ray.data.from_items([{"job": pickle.dumps(list(job))} for job in jobs], override_num_blocks=min(len(jobs), 4096))
    results = rows.map(
        _Actor,
        fn_constructor_args=(spec.packed(), "cuda" if on_gpu else "cpu", threads, str(Path.cwd())),
        concurrency=count,
        # one core less than there are, in all: ray needs one to read what it was given
        num_cpus=max(1, min(threads, (cores - 1) // count)),
        num_gpus=1 if on_gpu else 0,
    )
    try:
        for row in results.iter_rows():
            done = pickle.loads(row["result"])
            if isinstance(done, FastGoalError):
                raise done
            for outcome in done.outcomes:
                on_image(outcome.reason)
            yield done
    except ray.exceptions.RayError as error:
        raise ModelError(
            f"a worker of the ray cluster failed: {error}\nWhat was finished stays: run the step again."
        ) from error
