"""How fast a training step is: against a slow formulation, with TSL and without, on synthetic batches, fed from files.

    python benchmarks/train_step.py               # all parts, on the device of this machine; 8 minutes on two CPU cores
    python benchmarks/train_step.py --reference   # or some: --reference --tsl --throughput --loader --accumulation
    python benchmarks/train_step.py --h200        # all parts with the paper's models; ends at once where there is no GPU
    python benchmarks/train_step.py --smoke       # whether all parts run, in seconds; no figures to quote

Every part is written to benchmarks/results/train_step.{json,md} when it is done, beside those of earlier calls. Inputs are
made below .fast_goal/benchmarks/train, once. A sample is a global image, a local crop, a long caption and a sentence.

reference: our step against the authors' earlier formulation (train_reference.py), with its improvements one by one; loss
and gradient have to be equal. tsl: what the two TSL terms cost. throughput: synthetic batches on the device, by model,
precision, compilation, checkpointing and batch size, with peak memory and utilisation. loader: JPEG files through the
loader, and training fed by it. accumulation: what exact accumulation, checkpointing and batches of similar length cost.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_inputs as inputs
import train_loader
from measuring import ROOT, in_turns, machine, ratio, spread_of, timed, write
from train_reference import SHORT_CONTEXT, Samples, SlowStep, ladder

from fast_goal.environment import device as default_device
from fast_goal.environment import prepare
from fast_goal.model.clip import Clip
from fast_goal.training.batches import Batch, PairDataset
from fast_goal.training.loader import Loader
from fast_goal.training.loop import autocast_dtype
from fast_goal.training.step import TrainStep, batch_features

PARTS = ("reference", "tsl", "throughput", "loader", "accumulation")
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # of the norm of the difference, relative to the gradient's
WANTED_RATIO, WANTED_TSL, WANTED_RATE = 2.5, 0.05, 1200  # of the project's goals; the rate on an H200 at batch 256 in bf16
PEAKS = (  # the words of a device's name -> published dense bfloat16 peak, TFLOP/s; the first that fits
    ("B200", 2250),
    ("GH200", 989),
    ("H200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("A100", 312),
    ("L40S", 362),
    ("A30", 165),
    ("L4", 121),
)
MISSING = "python benchmarks/train_step.py --h200"
T = TypeVar("T")


@dataclass
class Run:
    """What the parts share: the options, the device and where things lie."""

    options: argparse.Namespace
    device: torch.device
    part: str = ""

    @property
    def work(self) -> Path:
        """The folder of the inputs."""
        return self.options.work

    def sized(self, smoke: T, cpu: T, gpu: T) -> T:
        """What a part does in a smoke run, on a CPU and on a GPU."""
        return smoke if self.options.smoke else gpu if self.device.type == "cuda" else cpu

    def repeats(self, factor: float = 1) -> int:
        """How often a part repeats what it measures."""
        return 1 if self.options.smoke else max(2, round(self.options.repeats * factor))

    def model(self, name: str) -> Clip:
        """A model on the device, in training mode."""
        return inputs.model(name).to(self.device).train()

    def precision(self) -> torch.dtype | None:
        """The training's own choice: bfloat16 on a GPU, None for float32 on a CPU."""
        return autocast_dtype("auto", self.device)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{self.part}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Runs the chosen parts and writes each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true", help=f"the part {part}; without any of them: all")
    parser.add_argument("--h200", action="store_true", help=f"a GPU; the goal of {WANTED_RATE:,} samples/s on an H200")
    parser.add_argument("--smoke", action="store_true", help="hardly any model, few samples, one repeat")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts; some parts take more of them, or fewer")
    parser.add_argument("--models", nargs="+", help="of throughput, as open_clip names them, or `demo`")
    parser.add_argument(
        "--variants",
        nargs="+",
        type=variant_of,
        help="of throughput: bf16 or fp32, with +compile and +checkpointing, and :N,N to take those batch sizes only",
    )
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes of throughput")
    parser.add_argument("--workers", nargs="+", type=int, help="numbers of the loader's processes")
    parser.add_argument("--work", type=Path, default=ROOT / ".fast_goal/benchmarks/train", help="folder of the inputs, kept")
    parser.add_argument("--output", type=Path, help="without the ending; benchmarks/results/train_step, or of a smoke run WORK")
    options = parser.parse_args()
    if options.h200 and not torch.cuda.is_available():
        parser.error("--h200 needs a CUDA device; without it, the parts take the figures of the CPU")
    options.work, options.output = options.work.absolute(), options.output and options.output.absolute()
    results = options.work / "smoke" if options.smoke else ROOT / "benchmarks/results/train_step"
    prepare()
    os.chdir(ROOT)  # the tables name the images' folder relative to the project where it lies below
    run = Run(options, default_device())
    measure(run, [part for part in PARTS if getattr(options, part)] or PARTS, options.output or results)


def variant_of(text: str) -> str:
    """An argument of --variants, as it is. Raises ArgumentTypeError for one that is none."""
    if not re.fullmatch(r"(bf16|fp32)(\+compile|\+checkpointing)*(:\d+(,\d+)*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected such as bf16, fp32+checkpointing or bf16+compile:128,256")
    return text


def measure(run: Run, parts: list[str] | tuple[str, ...], output: Path) -> None:
    """Runs the parts one after the other, writes each below `output`, and prints all that is there."""
    shown = {name: globals()[f"show_{name}"] for name in PARTS}
    for run.part in parts:
        before = machine(run.device)
        result = {"command": " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]]), **before}
        result |= {"precision": "bf16" if run.precision() else "fp32", **globals()[run.part](run)}
        part = f"{run.part} ({run.device.type})"
        write(output, "Training step: speed, memory, and what it costs to be exact", part, result, shown, show_missing)
        free()
    print(output.with_suffix(".md").read_text())


# --- the parts ---------------------------------------------------------------------------------------------------


def reference(run: Run) -> dict[str, Any]:
    """Our step against the published formulation and its improvements, in turns; loss and gradient compared."""
    # model, batch size, and the part of the repeats that is run; ViT-B/16 takes 20 s a step on two cores
    cases = run.sized([("tiny", 4, 1)], [("demo", 64, 1), ("ViT-B-16", 2, 0.4)], [("ViT-B-16", 64, 2)])
    rows = {}
    for name, count, share in cases:
        clip = run.model(name)
        given = given_samples(run, name, clip, count)
        differences = assert_equal(clip, given)
        run.say(f"{name}: loss and gradient are equal")
        plain, fused = plain_optimizer(clip), inputs.optimizer(clip)
        rungs = {
            rung: SlowStep(clip, form, given, inputs.tokenizer().encode, fused if form.fused else plain, run.precision())
            for rung, form in ladder(clip.context_length).items()
        }
        rungs["TrainStep"] = partial(TrainStep(clip, inputs.objective(), fused, run.precision()), [given.batch])
        seconds = in_turns(rungs, run.repeats(share), warm=share >= 1)
        rows[name] = {
            "batch": count,
            "image_size": clip.image_size,
            "caption_tokens": tokens(given.batch.caption_tokens),
            "sentence_tokens": tokens(given.batch.sentence_tokens),
            "seconds": seconds,
            "ratio": ratio(seconds["published"], seconds["TrainStep"]),
            "ratio_short": ratio(seconds[f"sentences padded to {SHORT_CONTEXT}"], seconds["TrainStep"]),
            **differences,
        }
        run.say(f"{name}: {rows[name]['ratio']['median']:.2f} times")
    return {"models": "random weights", "cases": rows}


def tsl(run: Run) -> dict[str, Any]:
    """The step of global + local with both TSL terms, and without them, where no tokens are pooled."""
    name, count = run.sized(("tiny", 4), ("demo", 64), ("ViT-B-16", 256))
    clip = run.model(name)
    batch = given_samples(run, name, clip, count).batch
    optimizer = inputs.optimizer(clip)
    steps = {
        objective: TrainStep(clip, inputs.objective(objective), optimizer, run.precision())
        for objective in ("global_local", "fast_goal")
    }

    variants = {
        "global + local": partial(steps["global_local"], [batch]),
        "global + local + TSL": partial(steps["fast_goal"], [batch]),
    }
    seconds = in_turns(variants, run.repeats(3), calls=run.sized(1, 1, 5))
    with_tsl = seconds["global + local + TSL"]
    costs = {name: ratio(with_tsl, values) for name, values in seconds.items() if values is not with_tsl}
    return {"models": f"{name} with random weights", "batch": count, "seconds": seconds, "ratios": costs}


def throughput(run: Run) -> dict[str, Any]:
    """Samples/s, peak memory and utilisation on synthetic batches; a variant ends with the batch size that does not fit."""
    options = run.options
    names = options.models or run.sized(["tiny"], ["demo"], ["ViT-B-16", "ViT-L-14"])
    # compiled anew for every shape, which takes a minute each
    variants = options.variants or run.sized(
        ["fp32", "fp32+checkpointing"],
        ["fp32", "fp32+checkpointing"],
        ["bf16", "bf16+checkpointing", "bf16+compile:256", "fp32:64,128"],
    )
    sizes = options.batches or run.sized([2, 4], [16, 32, 64], [64, 128, 256, 512])
    rows, flops = [], {}
    for name in names:
        base = inputs.model(name).train()
        flops[name] = flops_per_sample(base, run.device)
        run.say(f"{name}: {flops[name] / 1e9:,.0f} GFLOP a sample")
        for variant in variants:
            settings, _, own = variant.partition(":")
            for count in [int(size) for size in own.split(",")] if own else sizes:
                row = {"model": name, "variant": settings, "batch": count, **synthetic_rate(run, base, settings, count)}
                rows.append(row)
                free()
                run.say(f"{name} {settings}, batch {count}: {rate_of(row)}")
                if row["seconds"] is None:
                    break
    peak = peak_flops(torch.cuda.get_device_name(run.device)) if run.device.type == "cuda" else None
    return {"rows": rows, "flops_per_sample": flops, "peak_flops": peak}


def loader(run: Run) -> dict[str, Any]:
    """JPEG files through the loader, by the ways to read them, and training fed by it against a batch that is there."""
    return train_loader.measured(run)


def accumulation(run: Run) -> dict[str, Any]:
    """The step with the batch in 1, 2 and 4 parts, checkpointed and not, and over batches of similar lengths and of any."""
    name, count, total = run.sized(("tiny", 8, 32), ("demo", 32, 512), ("ViT-B-16", 256, 4096))
    clip = run.model(name)
    dataset, pairs = inputs.captioned(run.work, total, "spread")
    whole = inputs.samples(dataset, pairs, clip, count, torch.device("cpu")).batch
    train = TrainStep(clip, inputs.objective(), inputs.optimizer(clip), run.precision())

    def step(parts: list[Batch], checkpointed: bool) -> torch.Tensor:
        clip.checkpointed(checkpointed)
        return train(parts)["loss"]

    variants, peaks, losses = {}, {}, {}
    for checkpointed in (False, True):
        for number in (1, 2, 4):
            key = f"{number}{' checkpointed' * checkpointed}"
            variants[key] = partial(step, [part.to(run.device) for part in whole.split(number)], checkpointed)
            peaks[key], losses[key] = with_peak(run.device, lambda key=key: float(variants[key]()))
    seconds = in_turns(variants, run.repeats())
    run.say("accumulation and checkpointing are measured")
    clip.checkpointed(False)
    every = PairDataset(dataset, "train", pairs, clip)
    epochs = {}
    for grouped in (False, True):
        batches = Loader(every, count, seed=0, length_groups=grouped).epoch(0)
        epochs["similar lengths" if grouped else "any lengths"] = [[batch.to(run.device)] for batch in batches]
    of_epochs = in_turns({key: partial(all_steps, train, epoch) for key, epoch in epochs.items()}, run.repeats(0.5), warm=False)
    return {
        "models": f"{name} with random weights",
        "batch": count,
        "seconds": seconds,
        "ratios": {key: ratio(values, seconds["1"]) for key, values in seconds.items()},
        "peaks": peaks,
        "largest_loss_difference": max(abs(value - losses["1"]) for value in losses.values()),
        "epochs": of_epochs,
        "epoch_ratio": ratio(of_epochs["any lengths"], of_epochs["similar lengths"]),
        "epoch_steps": len(epochs["any lengths"]),
        "epoch_lengths": {
            key: statistics.mean(part.caption_tokens.shape[1] for (part,) in epoch) for key, epoch in epochs.items()
        },
        "caption_tokens": statistics.mean(every.lengths),
    }


# --- what they are made of ---------------------------------------------------------------------------------------


def given_samples(run: Run, name: str, clip: Clip, count: int) -> Samples:
    """The demo's scenes for its model, for the others captions that fill the context."""
    made = inputs.scenes(run.work, count + count // 2) if name == "demo" else inputs.captioned(run.work, count, "full")
    return inputs.samples(*made, clip, count, run.device)


def plain_optimizer(clip: Clip) -> torch.optim.AdamW:
    """Torch's default AdamW: on a CPU parameter by parameter, on a GPU in lists of them. Learning rate 0, as ours."""
    return torch.optim.AdamW(clip.parameters(), lr=0.0, weight_decay=inputs.settings().weight_decay)


def assert_equal(clip: Clip, given: Samples) -> dict[str, float]:
    """Raises AssertionError where our step and the published formulation, in float32, differ in a term or the gradient."""
    published = ladder(clip.context_length)["published"]
    expected = SlowStep(clip, published, given, inputs.tokenizer().encode, plain_optimizer(clip))()
    gradient = [parameter.grad for parameter in clip.parameters()]
    terms = TrainStep(clip, inputs.objective(), inputs.optimizer(clip))([given.batch])
    pairs = [(parameter.grad, other) for parameter, other in zip(clip.parameters(), gradient, strict=True)]
    distance = sum((own - other).square().sum() for own, other in pairs).sqrt()
    relative = float(distance / sum(other.square().sum() for _, other in pairs).sqrt())
    loss = max(abs(float(terms[name] - value)) for name, value in expected.items())
    assert loss <= LOSS_TOLERANCE, f"a term differs by {loss}"
    assert relative <= GRADIENT_TOLERANCE, f"the gradient differs by {relative} of its norm"
    return {"largest_loss_difference": loss, "gradient_difference": relative}


def all_steps(train: TrainStep, batches: list[list[Batch]]) -> None:
    """A step for each of the batches, which are on the device."""
    for parts in batches:
        train(parts)


def synthetic_rate(run: Run, base: Clip, variant: str, count: int) -> dict[str, Any]:
    """Seconds of a step of each repeat, and the peak memory; None for what does not fit into the device's memory.

    variant: `bf16` or `fp32`, with `+compile` and `+checkpointing`.
    """
    precision, *more = variant.split("+")
    try:
        clip = copy.deepcopy(base).to(run.device)
        clip.checkpointed("checkpointing" in more)
        if "compile" in more:
            torch.compiler.reset()
            clip.compile()
        train = TrainStep(clip, inputs.objective(), inputs.optimizer(clip), autocast_dtype(precision, run.device))
        step = partial(train, [inputs.synthetic(clip, count, run.device)])
        step()
        peak, once = with_peak(run.device, partial(timed, step))
        calls = run.sized(1, 1, max(1, min(20, round(1 / once))))  # a second's worth
        return {"seconds": [timed(step, calls) for _ in range(run.repeats(0.6))], "peak": peak}
    except torch.OutOfMemoryError:
        return {"seconds": None, "peak": None}


def flops_per_sample(base: Clip, device: torch.device, count: int = 2) -> float:
    """Floating-point operations of forward and backward, counted as they are dispatched; a multiplication and an addition
    are two. Nothing computed twice is among them."""
    clip = copy.deepcopy(base).to(device)
    batch = inputs.synthetic(clip, count, device)
    # of the fused kernels for attention not all are known to the counter
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        inputs.objective()(batch_features(clip, batch))["loss"].backward()
    return counter.get_total_flops() / count


def peak_flops(name: str) -> float | None:
    """The device's published dense bfloat16 peak in FLOP/s; None for one that is not in the table."""
    words = re.split(r"[ -]", name)
    return next((peak * 1e12 for known, peak in PEAKS if {*known.split()} <= {*words}), None)


def with_peak(device: torch.device, work: Callable[[], T]) -> tuple[float | None, T]:
    """The GPU memory that was allocated at most while `work` ran, in bytes, None on a CPU; and what it returned."""
    if device.type != "cuda":
        return None, work()
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    return torch.cuda.max_memory_allocated(device), result


def free() -> None:
    """Gives back what nobody uses, so that the next peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- results -----------------------------------------------------------------------------------------------------


def show_reference(result: dict[str, Any]) -> list[str]:
    """The ladder from the published formulation to ours, one table for each model."""
    lines = []
    for name, case in result["cases"].items():
        seconds, count = case["seconds"], case["batch"]
        repeats = len(seconds["published"])
        lines += [
            f"**{name}: {spread_of(case['ratio'])} times the samples/s** of the published formulation, wanted at least "
            f"{WANTED_RATIO} (batch {count}, {case['image_size']} px, captions of {case['caption_tokens']} tokens, sentences "
            f"of {case['sentence_tokens']}; {repeats} repeats in turns). Against sentences padded to {SHORT_CONTEXT} instead "
            f"of the whole context: {spread_of(case['ratio_short'])}. The loss's terms are equal within "
            f"{case['largest_loss_difference']:.0e}, the gradient within {case['gradient_difference']:.0e} of its norm, in "
            "float32.",
            "",
            "| with this, and all above it | samples/s | seconds a step | times the line above |",
            "|---|---:|---:|---:|",
        ]
        above = None
        for rung, values in seconds.items():
            middle = statistics.median(values)
            gain = "" if above is None else f"{ratio(seconds[above], values)['median']:.2f}"
            lines.append(f"| {rung} | {count / middle:,.1f} | {middle:.3f} | {gain} |")
            above = rung
        lines.append("")
    return lines[:-1]


def show_tsl(result: dict[str, Any]) -> list[str]:
    """The steps with and without TSL."""
    rows = ["| | seconds a step, median | quartiles | with TSL takes |", "|---|---:|---:|---:|"]
    for name, values in result["seconds"].items():
        low, middle, high = statistics.quantiles(values * 2 if len(values) < 2 else values, n=4, method="inclusive")
        more = spread_of(result["ratios"][name], 3) + " times" if name in result["ratios"] else ""
        rows.append(f"| {name} | {middle:.4f} | {low:.4f} to {high:.4f} | {more} |")
    cost = result["ratios"]["global + local"]["median"] - 1
    count = len(result["seconds"]["global + local"])
    return [
        f"**TSL costs {cost:+.1%} of the step**, wanted at most {WANTED_TSL:.0%}: against a step of global + local that pools "
        f"no tokens (batch {result['batch']}, {count} repeats in turns; in brackets the quartiles of the repeats).",
        "",
        *rows,
    ]


def show_throughput(result: dict[str, Any]) -> list[str]:
    """Rates and memory by model, variant and batch size."""
    lines = ["| model | variant | batch | samples/s | s a step | peak GB | utilisation |", "|---|---|---:|---:|---:|---:|---:|"]
    for row in result["rows"]:
        start = f"| {row['model']} | {row['variant']} | {row['batch']} |"
        if row["seconds"] is None:
            lines.append(f"{start} out of memory | | | |")
            continue
        seconds = statistics.median(row["seconds"])
        peak = "" if row["peak"] is None else f"{row['peak'] / 1e9:.1f}"
        used = result["flops_per_sample"][row["model"]] * row["batch"] / seconds
        known = result["peak_flops"] and "bf16" in row["variant"]
        utilisation = f"{used / result['peak_flops']:.1%}" if known else ""
        lines.append(f"{start} {row['batch'] / seconds:,.1f} | {seconds:.3f} | {peak} | {utilisation} |")
    flops = ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in result["flops_per_sample"].items())
    note = f"GFLOP of a sample, forward and backward, as torch counts what it dispatches: {flops}."
    if result["peak_flops"]:
        note += f" Utilisation is that of {result['peak_flops'] / 1e12:,.0f} TFLOP/s, the device's published dense bf16 peak."
    if "H200" in result["device"]:
        note += f" Wanted of ViT-B-16, bf16, batch 256: {WANTED_RATE:,} samples/s."
    return [*lines, "", note]


def show_loader(result: dict[str, Any]) -> list[str]:
    """Loading alone, and training fed by it."""
    return train_loader.show(result)


def show_accumulation(result: dict[str, Any]) -> list[str]:
    """What accumulation, checkpointing and batches of similar lengths cost and bring."""
    lines = ["| parts of the batch | seconds a step | times one part | peak GB |", "|---|---:|---:|---:|"]
    for key, values in result["seconds"].items():
        peak = "" if result["peaks"][key] is None else f"{result['peaks'][key] / 1e9:.1f}"
        lines.append(f"| {key} | {statistics.median(values):.3f} | {spread_of(result['ratios'][key])} | {peak} |")
    lengths = ", ".join(f"{key} {value:.0f}" for key, value in result["epoch_lengths"].items())
    return [
        *lines,
        "",
        f"Batch {result['batch']}; the losses are equal within {result['largest_loss_difference']:.0e}. Batches of similar "
        f"lengths: {spread_of(result['epoch_ratio'])} times as quick over {result['epoch_steps']} steps on captions of "
        f"{result['caption_tokens']:.0f} tokens on average, spread as DOCCI's; trimmed to, on average: {lengths}.",
    ]


def show_missing(known: dict[str, Any]) -> list[str]:
    """Which figures only a GPU can give, where there are none yet, and the command that makes them."""
    parts = [part for part in PARTS if f"{part} (cuda)" not in known]
    if not parts:
        return []
    return [
        "## Missing: no GPU has run these parts yet",
        "",
        f"{', '.join(parts)}. Made by `{MISSING}` on a machine with one, or part by part: `{MISSING} --{parts[0]}`. With it "
        f"come ViT-B/16 and ViT-L/14 in bf16, compiled or not, their samples/s (wanted of ViT-B/16 on an H200 at batch 256: "
        f"{WANTED_RATE:,}), utilisation and peak memory for each batch size, and how much of that is left when JPEG files "
        f"feed it (wanted: {train_loader.WANTED_SHARE:.0%}).",
    ]


def rate_of(row: dict[str, Any]) -> str:
    """Samples/s of a row of throughput, in words."""
    return "out of memory" if row["seconds"] is None else f"{row['batch'] / statistics.median(row['seconds']):,.1f} samples/s"


def tokens(texts: torch.Tensor) -> int:
    """The mean number of tokens of texts padded with zeros."""
    ends = texts.argmax(dim=1) + 1  # the end token has the highest id
    return round(float(ends.float().mean()))


if __name__ == "__main__":
    main()
