"""Stop-watches of the benchmarks: time inside the models' forward passes, where threads spend theirs, several ways to do the
same in turns, peak memory, the machine; and how their results are written.

`B` is a batch.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fast_goal.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "/src/fast_goal/"
SAMPLE_SECONDS = 0.004
CROPPING = {"crop", "pixels", "apply", "boxes", "resized", "offset", "view", "_outwards"}  # functions of data/images.py
PARTS = {  # file, or file:function, of the package -> part of the work; the innermost frame that is named here counts
    "flism/pipeline.py:_decode": "decode",  # the file's digest among it
    "flism/embedder.py:cut": "crop",
    "flism/embedder.py:pixel_boxes": "crop",
    "flism/embedder.py": "embed",
    "data/splitter.py": "split",
    "model/clip.py": "embed",
    "data/captions.py": "split",
    "flism/detectors/": "detect",
    "flism/regions.py": "match",
    "flism/matching.py": "match",
    "flism/shards.py": "write",
    "flism/metrics.py": "write",
    "data/records.py": "write",
    "cache.py": "write",
    "files.py": "write",
}
WAITING = (
    "/threading.py",
    "/queue.py",
    "/concurrent/futures/",
    "/multiprocessing/",
    "/selectors.py",
    "/subprocess.py",
    "/torch/cuda/streams.py",
)


class Forwards:
    """The forward passes of CLIP and of the detector: when each ran, and on inputs of which shape.

    On a CPU times are taken around the call, on a GPU by events on its stream, which do not hold up anything.
    """

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = {"detect": [], "embed": []}  # seconds
        self.inputs: list[tuple[str, torch.nn.Module, dict[str, Any]]] = []  # part, model, shape and type by argument
        self._events: dict[str, list[tuple[Any, Any]]] = {"detect": [], "embed": []}

    def seconds(self, part: str | None = None) -> float:
        """Time during which at least one pass of the part, or of any, ran; on a GPU the sum of the passes' times there."""
        parts = [part] if part else list(self.spans)
        synchronize()
        total = sum(begin.elapsed_time(end) / 1000 for name in parts for begin, end in self._events[name])
        reached = float("-inf")
        for begin, end in sorted(span for name in parts for span in self.spans[name]):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return total

    def replay(self) -> float:
        """Seconds that the same passes, on random inputs of the same shapes, take with nothing else running."""
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        with torch.inference_mode():
            for _, model, arguments in self.inputs:
                made = {}
                for name, (shape, dtype, device) in arguments.items():
                    if dtype.is_floating_point:
                        made[name] = torch.rand(shape, generator=generator).to(device, dtype)
                    else:
                        made[name] = torch.randint(1, 40_000, shape, generator=generator).to(device, dtype)
                synchronize()
                begin = time.perf_counter()
                model(**made)
                synchronize()
                total += time.perf_counter() - begin
        return total

    @contextmanager
    def measured(self) -> Iterator[Forwards]:
        """Watches every CLIP and every ultralytics model of this process for the length of the block."""
        from fast_goal.flism.detectors.ultralytics import prepare_ultralytics
        from fast_goal.model.clip import Clip

        patched = [(Clip, "embed")]
        try:
            prepare_ultralytics()
            from ultralytics.nn.tasks import BaseModel

            patched.append((BaseModel, "detect"))
        except ImportError:
            pass
        originals = [(cls, cls.forward) for cls, _ in patched]
        for cls, part in patched:
            cls.forward = self._timed(cls.forward, part)
        try:
            yield self
        finally:
            for cls, forward in originals:
                cls.forward = forward

    def _timed(self, forward: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed_forward(model: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
            tensors = {"images" if part == "embed" else "x": value for value in arguments if isinstance(value, torch.Tensor)}
            tensors |= {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
            first = next(iter(tensors.values()), None)
            self.inputs.append((part, model, {name: (v.shape, v.dtype, v.device) for name, v in tensors.items()}))
            if first is not None and first.is_cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                result = forward(model, *arguments, **named)
                end.record()
                self._events[part].append((begin, end))
                return result
            start = time.perf_counter()
            result = forward(model, *arguments, **named)
            self.spans[part].append((start, time.perf_counter()))
            return result

        return timed_forward


class Sampler:
    """Looks every few milliseconds at what each thread is doing, and counts by part of the work.

    Shares of a sampled time are estimates: a thread is seen when it lets go of the interpreter.
    """

    def __init__(self) -> None:
        self.main: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self._stop = threading.Event()

    def __enter__(self) -> Sampler:
        self._main = threading.get_ident()
        self._begin = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._seconds = time.perf_counter() - self._begin

    def table(self) -> dict[str, dict[str, float]]:
        """Per part: `main`, the share of the calling thread's time, and `threads`, the other threads' working time as a
        multiple of the wall time (their waiting is left out)."""
        looks = max(sum(self.main.values()), 1)
        parts = [*sorted({*self.main, *self.others} - {"waiting"}), "waiting"]
        return {
            part: {"main": self.main[part] / looks, "threads": 0.0 if part == "waiting" else self.others[part] / looks}
            for part in parts
        }

    def _run(self) -> None:
        own = threading.get_ident()
        while not self._stop.wait(SAMPLE_SECONDS):
            for thread, frame in sys._current_frames().items():
                if thread == self._main:
                    self.main[part_of(frame)] += 1
                elif thread != own and (part := part_of(frame)) != "waiting":
                    self.others[part] += 1


def part_of(frame: FrameType | None) -> str:
    """The part of the work that the innermost known function of a stack belongs to; `other` for the rest."""
    if frame is not None and any(place in frame.f_code.co_filename for place in WAITING):
        return "waiting"
    while frame is not None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        if PACKAGE in name:
            place = name.partition(PACKAGE)[2]
            if place == "data/images.py":
                return "crop" if function in CROPPING else "decode"
            for known, part in PARTS.items():
                if f"{place}:{function}".startswith(known):
                    return part
        frame = frame.f_back
    return "other"


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, calls: int = 1, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of a call of each variant, `repeats` times, each the mean of `calls` in a row.

    All variants take their turn before the next repeat begins, there and back alternately, so that what slows the machine
    down for a while slows all of them. With `warm` a call of each before them is not counted.
    """
    for variant in variants.values() if warm else ():
        variant()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        for name in list(variants) if number % 2 == 0 else reversed(list(variants)):
            seconds[name].append(timed(variants[name], calls))
    return seconds


def timed(work: Callable[[], object], calls: int = 1) -> float:
    """Seconds of one call, the mean of `calls` in a row."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    return (time.perf_counter() - begin) / calls


def ratio(slow: Sequence[float], quick: Sequence[float]) -> dict[str, float]:
    """How many times as long the one takes as the other, from repeats in turns: the median over the repeats, and the
    quartiles."""
    ratios = [one / other for one, other in zip(slow, quick, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "low": low, "high": high}


def spread_of(ratios: dict[str, float], digits: int = 2) -> str:
    """What `ratio` returned: the median and, in brackets, the quartiles."""
    return "{median:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**ratios, d=digits)


def watch_memory(process: subprocess.Popen[Any], interval: float = 0.02) -> dict[str, Any]:
    """Samples the resident memory of a process and its children until it ends; MB (of 1,000,000 bytes).

    peak: the highest sum. series: (seconds, MB), at most about 400 of them.
    """
    import psutil

    begin = time.monotonic()
    watched = psutil.Process(process.pid)
    series: list[tuple[float, float]] = []
    while process.poll() is None:
        total = 0
        try:
            for one in (watched, *watched.children(recursive=True)):
                total += one.memory_info().rss
        except psutil.Error:
            continue
        if total:
            series.append((time.monotonic() - begin, total / 1e6))
        time.sleep(interval)
    thinned = series[:: max(1, len(series) // 400)]
    return {"peak": max(value for _, value in series), "series": [(round(at, 2), round(value, 1)) for at, value in thinned]}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken with."""
    import os

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else ""),
        "device": f"{device.type} ({name})",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def write(
    output: Path,
    title: str,
    part: str,
    result: dict[str, Any],
    show: Mapping[str, Callable[[dict[str, Any]], list[str]]],
    ending: Callable[[dict[str, Any]], list[str]] | None = None,
) -> None:
    """Puts the result of a part, such as `share (cpu)`, into OUTPUT.json and writes OUTPUT.md from all that is there.

    show: the parts by their first word, in order, each with what makes its lines. ending: what makes the last lines of all.
    """
    path = output.with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    known[part] = result
    write_json(path, known)
    lines = [f"# {title}", ""]
    for name in sorted(known, key=lambda key: (list(show).index(key.split()[0]), key)):
        lines += [f"## {name}", "", heading(known[name]), "", *show[name.split()[0]](known[name]), ""]
    lines += ending(known) if ending else []
    write_text(output.with_suffix(".md"), "\n".join(lines).rstrip() + "\n")


def heading(result: dict[str, Any]) -> str:
    """How a part's figures came to be."""
    return (
        f"Made by `{result['command']}` at commit {result['commit']}; {result['device']}, {result['cores']} cores, "
        f"torch {result['torch']} with {result['torch_threads']} threads, load average before {result['load_average']}."
        + (f" Models, in {result['precision']}: {result['models']}." if "models" in result else "")
    )


def listed(values: Sequence[float], form: str = ".1f") -> str:
    """Numbers in a row."""
    return ", ".join(format(value, form) for value in values)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
