"""How long the validation of a large data set takes: `python benchmarks/validate.py [--rows 100000 1000000]`.

Generates records, pairs and perceptual hashes (captions of 159 words on average, as in GLIT100k), and times everything
that the step `validate` does with them but for decoding. Beside it, the rate of the decode check on generated JPEGs
against `open_image` in as many threads. Writes benchmarks/results/validate.{json,md}.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image

from fast_goal.config import ValidateConfig, build
from fast_goal.configure import compose
from fast_goal.data import captions, quality, validation
from fast_goal.data.expectations import check
from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
FILES, JPEGS = 500, 400
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    asked = parser.parse_args()
    captions.tokenize(["warm"], 77)  # imports and loads the tokenizer: 6 s, once for a process
    import great_expectations  # noqa: F401

    results: dict[str, Any] = {"command": f"python benchmarks/validate.py --rows {' '.join(map(str, asked.rows))}"}
    results["commit"] = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    results["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    with tempfile.TemporaryDirectory() as folder:
        results["decoding"] = decoding(Path(folder) / "jpegs")
        results["runs"] = [measured(rows, Path(folder)) for rows in asked.rows]
    write_json(RESULTS / "validate.json", results)
    write_text(RESULTS / "validate.md", report(results))
    print(report(results))


def measured(rows: int, folder: Path) -> dict[str, Any]:
    """Seconds of each part for a data set of `rows` images."""
    subject = generated(rows, folder / f"files{rows}")
    config = replace(build(ValidateConfig, compose([])["validate"], "params.yaml"), max_decoded=0)
    base = validation.Base("none", 224, 248)
    settings = validation.Settings(config, [subject.dataset], detector_only=False, top_k=1, base=base)
    cpu = time.process_time()
    images, files = timed(lambda: quality.inspect_images(subject.dataset, 0))
    found, tables = timed(lambda: validation.examine(subject, images, settings, None))
    outcomes, expectations = timed(lambda: check(found.suites, folder / f"docs{rows}"))
    cpu = time.process_time() - cpu
    failing = [f"{outcome.suite}.{outcome.rule.name}" for outcome in outcomes if not outcome.passed]
    seconds = {"files looked up": files, "checks of the tables": tables, "Great Expectations and Data Docs": expectations}
    near = found.near["row"].nunique()
    return {
        "rows": rows,
        "seconds": seconds,
        "total": sum(seconds.values()),
        "cpu": cpu,
        "failing": failing,
        "near_duplicates": near,
    }


def generated(rows: int, root: Path) -> quality.Subject:
    """A clean data set but for 50 near-duplicates in the split train."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True)
    for number in range(FILES):
        (root / f"{number}.jpg").write_bytes(b"x")
    words = np.array(
        [
            "red",
            "image",
            "table",
            "street",
            "large",
            "of",
            "building",
            "window",
            "standing",
            "left",
            "with",
            "and",
            "children",
            "wall",
            "light",
        ]
    )
    sentences = np.array([" ".join(generator.choice(words, 17)).capitalize() + "." for _ in range(20_000)], dtype=object)
    start = generator.integers(len(sentences), size=(rows, 1))
    chosen = sentences[(start + np.arange(9) * 2221) % len(sentences)]  # nine different ones
    ids = np.array([f"image{number:08d}" for number in range(rows)], dtype=object)
    firsts = np.array([f"This is picture number {number} of all of them." for number in range(rows)], dtype=object)
    width, height = generator.integers(900, 1100, rows), generator.integers(700, 900, rows)
    records = pd.DataFrame(
        {
            "image_id": ids,
            "image_path": np.array([f"{number}.jpg" for number in range(FILES)], dtype=object)[np.arange(rows) % FILES],
            "width": width,
            "height": height,
            "split": np.where(np.arange(rows) % 50, "train", "test"),
            "long_caption": [" ".join(parts) for parts in zip(firsts, *chosen.T, strict=True)],
            "captions": [[]] * rows,
            "source": "generated",
            "content_hash": ids,
        }
    )
    box = {"x1": 0.0, "y1": 0.0, "x2": width / 2, "y2": height / 2, "kind": "quadrant"}
    spans = {"sentence_index": 0, "sentence": firsts, "char_start": 0, "char_end": [len(text) for text in firsts]}
    place = {"image_id": ids, "region_index": 0, **box}
    pairs = pd.DataFrame({**place, "rank": 1, **spans, "similarity": 0.3, "weight": 1.0})
    regions = pd.DataFrame({**place, "label": "", "score": 1.0})
    numbers = generator.integers(2**64, size=rows, dtype=np.uint64)
    numbers[1:50] = numbers[51:100] ^ np.uint64(0b101)
    hashes = pd.DataFrame({"image_id": ids, "perceptual_hash": [f"{number:016x}" for number in numbers.tolist()]})
    facts = {"counts": {"all": rows}, "mean_words": 162, "captions": 0, "pairs": 1}
    dataset = Dataset("generated", root, records, source="generated", hashes=hashes, facts=facts)
    skipped = pd.DataFrame(columns=["sample", "row", "step", "reason", "detail"])
    return quality.Subject(dataset, regions, pairs, skipped, ("train", "test"))


def decoding(root: Path) -> dict[str, float]:
    """Images a second of the decode check, and of `open_image` alone in as many threads; the best of three each."""
    root.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(20):
        small = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        small.resize((1024, 768), Image.Resampling.BICUBIC).save(root / f"{number}.jpg", quality=90)
    paths = [f"{number % 20}.jpg" for number in range(JPEGS)]
    records = pd.DataFrame({"image_path": paths, "width": 1024, "height": 768})
    dataset = Dataset("jpegs", root, records)

    def plain() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda path: open_image(root / path).size, paths))  # the pictures are not kept

    seconds = {"check": [], "open_image": []}
    for _ in range(3):
        seconds["open_image"].append(timed(plain)[1])
        seconds["check"].append(timed(lambda: quality.inspect_images(dataset))[1])
    return {name: JPEGS / min(times) for name, times in seconds.items()}


def timed(work: Callable[[], T]) -> tuple[T, float]:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def report(results: dict[str, Any]) -> str:
    parts = list(results["runs"][0]["seconds"])
    lines = [
        "# Validation of large sets",
        "",
        f"`{results['command']}` at commit {results['commit']} (with the changes on top of it), {results['machine']}.",
        "Records, regions, pairs and perceptual hashes are generated, with captions of 162 words. Seconds, without decoding",
        "and without the 6 s that importing torch and Great Expectations takes once:",
        "",
        f"| records | {' | '.join(parts)} | total | CPU of all threads |",
        f"| {' | '.join(['---:'] * (len(parts) + 3))} |",
    ]
    for run in results["runs"]:
        cells = [
            f"{run['rows']:,}",
            *(f"{run['seconds'][part]:.1f}" for part in parts),
            f"{run['total']:.1f}",
            f"{run['cpu']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rates = results["decoding"]
    lines += [
        "",
        f"Decode check of JPEGs of 1024 x 768 pixels: {rates['check']:,.0f} images/s; `open_image` alone in as many threads: "
        f"{rates['open_image']:,.0f} images/s ({rates['check'] / rates['open_image']:.0%}).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
