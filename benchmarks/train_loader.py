"""The part `loader` of `benchmarks/train_step.py`: JPEG files through the loader, alone and feeding the training."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import count as numbers
from typing import TYPE_CHECKING, Any

import pandas as pd
import train_inputs as inputs
from measuring import in_turns, ratio, spread_of, synchronize

from fast_goal.config import PublishConfig
from fast_goal.data.publication import write_publication
from fast_goal.data.records import SKIPPED, Dataset
from fast_goal.training.batches import PairDataset
from fast_goal.training.loader import Loader
from fast_goal.training.step import TrainStep

if TYPE_CHECKING:
    from train_step import Run

WANTED_SHARE = 0.9  # of the rate on batches that are there, where a GPU trains
SECONDS = 10  # after which the loading of an epoch is not looked at any further
THERE = "a batch that is there"


def measured(run: Run) -> dict[str, Any]:
    """Samples/s of loading by the way images are read and the number of workers, and the step's rate when fed by it."""
    name, total, alone, fed = run.sized(("tiny", 8, 2, 4), ("demo", 192, 32, 64), ("ViT-B-16", 4096, 64, 256))
    workers = run.options.workers or run.sized([0, 1], [0, 2, 4, 8], [0, 2, 4, 8, 16])
    most = max(number for number in workers if number <= max(os.cpu_count() or 1, min(workers)))
    clip = run.model(name)
    dataset, pairs = inputs.captioned(run.work, total, "jpegs")
    ways = {
        way: PairDataset(dataset, "train", pairs, clip, **options) for way, options in ways_to_read(run, dataset, pairs).items()
    }
    rates = []
    for way, samples in ways.items():
        for number in workers if way == "files" else [most]:
            rates += loading(run, way, samples, alone, number)
    loaders = {
        way: Loader(samples, fed, 0, most, run.device.type == "cuda")
        for way, samples in ways.items()
        if run.device.type == "cuda" or way in ("files", "pixel cache")  # the others differ little where the step is slow
    }
    return {
        "models": f"{name} with random weights",
        "images": total,
        "batch_alone": alone,
        "rates": rates,
        "megabytes": sum(path.stat().st_size for path in dataset.root.glob("*.jpg")) / 1e6 / total,
        **fed_training(run, clip, loaders),
        "workers": most,
    }


def ways_to_read(run: Run, dataset: Dataset, pairs: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The ways to read images, as arguments of PairDataset; the pixel cache is empty."""
    pixels, shards = run.work / "pixels", run.work / f"{dataset.name}_shards"
    shutil.rmtree(pixels, ignore_errors=True)
    if not shards.exists():
        config = PublishConfig(layout="webdataset", licence="generated", shard_size=1024)
        write_publication(dataset, pairs, pd.DataFrame(columns=SKIPPED.names), config, shards)
    ways: dict[str, dict[str, Any]] = {
        "files": {},
        "scaled decoding": {"scaled": True},
        "shards": {"shards": shards},
        "pixel cache": {"pixel_cache": pixels},
    }
    return ways | ({"GPU decoding": {"gpu": run.device}} if run.device.type == "cuda" else {})


def loading(run: Run, way: str, samples: PairDataset, batch_size: int, workers: int) -> Iterator[dict[str, Any]]:
    """Rows with the samples/s of an epoch, batches copied to the device; of a pixel cache the first epoch and the second."""
    loader = Loader(samples, batch_size, 0, workers, run.device.type == "cuda")
    for _ in loader.epoch(0, start=loader.steps - 1):  # the workers start
        pass
    for epoch, state in enumerate((" cold", " warm") if way == "pixel cache" else ("",), 1):
        synchronize()
        begin, seen = time.perf_counter(), 0
        for batch in loader.epoch(epoch):
            seen += len(batch.to(run.device))
            if way != "pixel cache" and time.perf_counter() - begin > SECONDS:  # of which the first epoch has to fill all
                break
        synchronize()
        rate = seen / (time.perf_counter() - begin)
        run.say(f"{way}{state}, {workers} workers: {rate:,.0f} samples/s")
        yield {"way": way + state, "workers": workers, "rate": rate}


def fed_training(run: Run, clip: Any, loaders: dict[str, Loader]) -> dict[str, Any]:
    """Seconds of an epoch of training fed by each loader, and of as many steps on a batch that is on the device."""
    train = TrainStep(clip, inputs.objective(), inputs.optimizer(clip), run.precision())
    epochs = numbers()

    def epoch_of(loader: Loader) -> None:
        for batch in loader.epoch(next(epochs)):
            train([part.to(run.device) for part in batch.split(1)])

    first = next(iter(loaders.values()))
    batch = next(first.epoch(0)).to(run.device)

    def there() -> None:
        for _ in range(first.steps):
            train([batch])

    seconds = in_turns({THERE: there, **{way: partial(epoch_of, loader) for way, loader in loaders.items()}}, run.repeats(0.4))
    for way in loaders:
        run.say(f"fed by {way}: {ratio(seconds[THERE], seconds[way])['median']:.0%} of the rate on {THERE}")
    return {
        "seconds": seconds,
        "samples": first.steps * first.batch_size,
        "batch": first.batch_size,
        "shares": {way: ratio(seconds[THERE], seconds[way]) for way in loaders},
        "caption_tokens": batch.caption_tokens.shape[1],
        "sentence_tokens": batch.sentence_tokens.shape[1],
    }


def show(result: dict[str, Any]) -> list[str]:
    """Loading alone, and training fed by it."""
    lines = ["| loading alone | workers | samples/s |", "|---|---:|---:|"]
    lines += [f"| {row['way']} | {row['workers']} | {row['rate']:,.0f} |" for row in result["rates"]]
    width, height = inputs.JPEG
    lines += [
        "",
        f"{result['images']:,} JPEGs of {width:,} x {height} pixels, {result['megabytes']:.2f} MB each, from the page cache, "
        f"one crop of each; batches of {result['batch_alone']}.",
        "",
        "| training fed by | samples/s | of the rate on a batch that is there |",
        "|---|---:|---:|",
    ]
    for way, seconds in result["seconds"].items():
        share = spread_of(result["shares"][way]) if way in result["shares"] else ""
        lines.append(f"| {way} | {result['samples'] / statistics.median(seconds):,.1f} | {share} |")
    return [
        *lines,
        "",
        f"Batches of {result['batch']}, trimmed to {result['caption_tokens']} and {result['sentence_tokens']} tokens, "
        f"{result['workers']} workers, the pixel cache warm. Wanted of a GPU: {WANTED_SHARE:.0%} or more. On a CPU loading and "
        "training share the cores.",
    ]
