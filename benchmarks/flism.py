"""How fast FLISM is, where its time goes, how much memory it takes, and that a kill costs nothing.

    python benchmarks/flism.py                  # all parts, on the device of this machine
    python benchmarks/flism.py --share          # or some: --baseline --share --large --memory --kills
    python benchmarks/flism.py --h200           # a GPU: baseline, share and large with ViT-B/16 and as many images as it needs

Every part is written to benchmarks/results/flism.{json,md} when it is done, beside those of earlier calls. Inputs are made
below .fast_goal/benchmarks/flism, once.

baseline: the same computation image by image, one crop and one sentence at a time, against the engine with an empty cache.
The results have to be equal. share: the wall time outside of the models' forward passes. large: photographs of 2,000 x
1,500 pixels, CLIP ViT-B/16, YOLO n and x. memory: 1,000 and 20,000 small images, a process each. kills: five SIGKILLs.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import flism_inputs as inputs
from measuring import ROOT, Forwards, Sampler, listed, machine, synchronize, watch_memory, write

from fast_goal.config import FlismConfig, build
from fast_goal.data import captions
from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.images import crop, open_image
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, Dataset, load_dataset, read_table, write_table
from fast_goal.environment import device as default_device
from fast_goal.environment import prepare
from fast_goal.files import read_json, write_json
from fast_goal.flism.detectors import RegionDetector, load_detector
from fast_goal.flism.engine import FlismResult, extract
from fast_goal.flism.regions import Detections, candidate_regions
from fast_goal.model.clip import Clip
from fast_goal.model.inference import arithmetic

PARTS = ("baseline", "share", "large", "memory", "kills")
BOX = ["x1", "y1", "x2", "y2"]
TABLES = {"regions": REGIONS, "pairs": PAIRS, "skipped": SKIPPED}
TOLERANCE = 1e-5  # of similarities, and of boxes as a fraction of the image's side
GPU_TOLERANCE = 1e-2  # half precision or TF32, and other kernels for other batch sizes
MEMORY_IMAGES = (1_000, 20_000)
KILLS = 5


@dataclass
class Run:
    """What the parts share: the options, the device and where things lie."""

    options: argparse.Namespace
    device: torch.device
    work: Path
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether the models run on a GPU: then they are the paper's size, else the demo's."""
        return self.device.type == "cuda"

    def images(self, on_cpu: int, on_gpu: int) -> int:
        """The number of images of a part."""
        return self.options.count or (on_gpu if self.on_gpu else on_cpu)

    def fresh(self) -> Path:
        """An empty folder for a cache."""
        (self.work / "caches").mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.work / "caches"))

    def models(self, images: int, size: str = "n") -> tuple[Dataset, Clip, RegionDetector | None, FlismConfig]:
        """Data and models of the parts baseline and share: the demo's, or on a GPU photographs, ViT-B/16 and a YOLO."""
        config = inputs.settings(precision=self.options.precision or "fp32")
        if self.on_gpu or self.options.large_models:
            dataset = inputs.photographs(self.work, images, self.options.images)
            return dataset, *large_models(self, dataset, config, size), config
        dataset = inputs.scenes(self.work, images)
        folder = self.options.base or inputs.demo_base(self.work / "demo_base", dataset)
        clip = Clip.load(folder / "clip").to(self.device).eval()
        return dataset, clip, load_detector(folder / "detector", config, dataset, self.device), config


def main() -> None:
    """Runs the chosen parts and writes each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true", help=f"the part {part}; without any of them: all")
    parser.add_argument("--h200", action="store_true", help="baseline, share and large on a GPU, the goal of 170 images/s")
    parser.add_argument(
        "--count", type=int, help="images in baseline, share, large and kills, instead of the part's own number"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of baseline and share; the median counts")
    parser.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="flism.precision in baseline, share and large; else fp32, and bf16 for large on a GPU",
    )
    parser.add_argument("--sizes", nargs="+", default=["n", "x"], help="YOLO sizes of the part large")
    parser.add_argument(
        "--images", type=Path, help="folder of photographs to enlarge for the part large, instead of drawn ones"
    )
    parser.add_argument("--base", type=Path, help="a models/base to use in baseline, share and kills, instead of a new one")
    parser.add_argument("--large-models", action="store_true", help="baseline and share with the models of the part large")
    parser.add_argument("--work", type=Path, default=ROOT / ".fast_goal/benchmarks/flism", help="folder of the inputs, kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/flism", help="without the ending")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("work", "output", "images", "base"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.resolve())
    os.chdir(ROOT)  # the tables name the images' folder relative to the project where it lies below
    prepare()
    if options.child:
        child(options.child)
        return
    chosen = [part for part in PARTS if getattr(options, part)]
    if options.h200:
        chosen = chosen or ["baseline", "share", "large"]
        if not torch.cuda.is_available():
            parser.error("--h200 needs a CUDA device; without it, --large takes the figures of the CPU")
    run = Run(options, default_device(), options.work)
    for part in chosen or PARTS:
        print(f"[{part}]", file=sys.stderr, flush=True)
        before = machine(run.device)
        result = {"command": " ".join(["python", "benchmarks/flism.py", *sys.argv[1:]]), **before, **globals()[part](run)}
        shown = {name: globals()[f"show_{name}"] for name in PARTS}
        write(options.output, "FLISM: speed, shares, memory, kills", f"{part} ({run.device.type})", result, shown)
        shutil.rmtree(run.work / "caches", ignore_errors=True)
    print(options.output.with_suffix(".md").read_text())


# --- the parts ---------------------------------------------------------------------------------------------------


def baseline(run: Run) -> dict[str, Any]:
    """The engine against `per_image`, each with nothing computed before, in turns; their results compared."""
    count = run.images(200, 48)
    dataset, clip, detector, config = run.models(count)
    warm_up(run, dataset, clip, detector, config)
    slow, fast, differences = [], [], {}
    for _ in range(run.options.repeats):
        synchronize()
        begin = time.perf_counter()
        expected = per_image(dataset, clip, inputs.one_by_one(detector), config, run.device, dataset.split("train"))
        slow.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        result = extract(dataset, clip, detector, config, run.fresh(), run.device)
        fast.append(time.perf_counter() - begin)
        differences = assert_equal(expected, result, dataset, GPU_TOLERANCE if run.on_gpu else TOLERANCE)
    return {
        "images": count,
        "models": names(clip, detector, run),
        "precision": config.precision,
        "regions_per_image": len(result.regions) / count,
        "per_image_seconds": slow,
        "engine_seconds": fast,
        "per_image_rate": count / statistics.median(slow),
        "engine_rate": count / statistics.median(fast),
        "ratio": statistics.median(slow) / statistics.median(fast),
        **differences,
    }


def share(run: Run) -> dict[str, Any]:
    """The share of the wall time outside of the models' forward passes, and where the time goes."""
    count = run.images(200, 512)
    dataset, clip, detector, config = run.models(count)
    warm_up(run, dataset, clip, detector, config)
    rounds = [profile(run, dataset, clip, detector, config) for _ in range(run.options.repeats)]
    middle = sorted(rounds, key=lambda one: one["own_share"])[len(rounds) // 2]
    return {
        "images": count,
        "models": names(clip, detector, run),
        "precision": config.precision,
        **middle,
        "own_shares": [one["own_share"] for one in rounds],
        "own_shares_alone": [one["own_share_alone"] for one in rounds],
    }


def large(run: Run) -> dict[str, Any]:
    """Photographs of 2,000 x 1,500 pixels, ViT-B/16, and detectors of several sizes."""
    count = run.images(8, 2048)
    config = inputs.settings(precision=run.options.precision or ("bf16" if run.on_gpu else "fp32"))
    dataset = inputs.photographs(run.work, count, run.options.images)
    rows = {}
    for size in run.options.sizes:
        clip, detector = large_models(run, dataset, config, size)
        warm_up(run, dataset, clip, detector, config)
        rows[size] = profile(run, dataset, clip, detector, config, replay=not run.on_gpu)
        print(f"[large] {size}: {rows[size]['rate']:.2f} images/s", file=sys.stderr, flush=True)
    megabytes = sum(path.stat().st_size for path in dataset.root.glob("*.jpg")) / 1e6 / count
    return {
        "images": count,
        "models": names(clip, detector, run),
        "precision": config.precision,
        "megabytes_per_image": megabytes,
        "sizes": rows,
    }


def memory(run: Run) -> dict[str, Any]:
    """Peak memory of a process with 1,000 and one with 20,000 images, beside the size of their tables."""
    rows = {}
    for count in MEMORY_IMAGES:
        dataset = inputs.specks(run.work, count)
        base = inputs.tiny_base(run.work / "tiny_base", dataset)
        spec, output = child_spec(run, dataset, base, inputs.settings(), "memory")
        process = subprocess.Popen([sys.executable, __file__, "--child", str(spec)], cwd=ROOT, stdout=subprocess.DEVNULL)
        seen = watch_memory(process)
        if process.returncode:
            raise RuntimeError(f"the run over {count} images ended with status {process.returncode}")
        rows[str(count)] = {**read_json(output / "child.json"), **seen}
    small, big = (rows[str(count)] for count in MEMORY_IMAGES)
    return {
        "images": list(MEMORY_IMAGES),
        "rows": rows,
        "peak_growth": big["peak"] - small["peak"],
        "table_growth": big["tables"] - small["tables"],
    }


def kills(run: Run) -> dict[str, Any]:
    """A run that is killed five times at random moments against one that is not."""
    count = run.images(600, 600)
    dataset = inputs.scenes(run.work, count)
    base = run.options.base or inputs.demo_base(run.work / "demo_base", dataset)
    config = inputs.settings(shard_size=16)  # a second of work or less, so that the kills find finished ones
    spec, output = child_spec(run, dataset, base, config, "whole")
    subprocess.run([sys.executable, __file__, "--child", str(spec)], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    whole, seconds = tables(output), read_json(output / "child.json")["seconds"]
    spec, output = child_spec(run, dataset, base, config, "killed")
    choose, moments = random.Random(), []  # the moments are in the results
    while len(moments) < KILLS:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", str(spec)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        process.stdout.readline()  # it says when it begins
        moment = choose.uniform(0.05, 0.19) * seconds
        time.sleep(moment)
        if process.poll() is not None:
            raise RuntimeError("the run was over before its kill: take more images (--count)")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        moments.append(moment)
    command = [sys.executable, __file__, "--child", str(spec)]
    last = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    found = re.search(r"resumed (\d+)", last.stderr)  # in the progress line
    resumed = int(found.group(1)) if found else 0
    if not resumed:
        raise RuntimeError("no killed run had finished a shard, so that nothing was resumed: take more images (--count)")
    again = tables(output)
    for name in TABLES:
        pd.testing.assert_frame_equal(whole[name], again[name], atol=TOLERANCE, rtol=0)
    return {
        "images": count,
        "seconds_whole": seconds,
        "killed_after": moments,
        "resumed": resumed,
        "seconds_last": read_json(output / "child.json")["seconds"],
        "bit_for_bit": all(whole[name].equals(again[name]) for name in TABLES),
    }


# --- what they are made of ---------------------------------------------------------------------------------------


def per_image(
    dataset: Dataset,
    clip: Clip,
    detector: RegionDetector | None,
    config: FlismConfig,
    device: torch.device,
    records: pd.DataFrame,
) -> dict[str, pd.DataFrame]:
    """FLISM as one would write it down: per image one detection, then one crop and one sentence at a time through CLIP.

    The same decoder, detector, crops, tokenizer (trimmed to the sentence's length) and CLIP as the engine's; only the rows
    of the tables that say what was found. An image of which nothing can be used is not among these data.
    """
    regions, pairs = [], []
    with arithmetic(config.precision, device):
        for record in records.itertuples():
            image = open_image(dataset.path(record))
            found = Detections.none() if detector is None else detector.detect([image], [record.image_id])[0]
            limits = (config.min_area, config.classes, config.max_detections, config.merge_iou)
            boxes = candidate_regions(record.width, record.height, found, config.regions, *limits)
            embeddings = []
            for index, box in enumerate(boxes.boxes):
                piece = crop(image, tuple(box))
                pixels = clip.view(*piece.size).apply(piece)
                embeddings.append(clip.encode_image(pixels[None].to(device))[0].float().cpu())
                row = (record.image_id, index, *box, boxes.kinds[index], boxes.labels[index], float(boxes.scores[index]))
                regions.append(row)
            candidates = []
            for index, sentence in enumerate(split_sentences(record.long_caption)):
                tokens = captions.trim(tokenize([sentence.text], clip.context_length)[0])
                text = clip.encode_text(tokens.to(device))[0].float().cpu()
                similarities = [float(torch.dot(text, embedding)) for embedding in embeddings]
                region = int(np.argmax(similarities))
                candidates.append((similarities[region], index, region, similarities))
            candidates.sort(key=lambda candidate: (-candidate[0], candidate[1]))
            for rank, (similarity, index, region, all_of_them) in enumerate(candidates[: config.top_k], 1):
                nearest = max((value for place, value in enumerate(all_of_them) if place != region), default=-1.0)
                second = max((value for value, other, *_ in candidates if other != index), default=-1.0)
                pairs.append((record.image_id, rank, index, region, similarity, max(nearest, second)))
    return {
        "regions": pd.DataFrame(regions, columns=["image_id", "region_index", *BOX, "kind", "label", "score"]),
        "pairs": pd.DataFrame(pairs, columns=["image_id", "rank", "sentence_index", "region_index", "similarity", "runner_up"]),
    }


def assert_equal(expected: dict[str, pd.DataFrame], result: FlismResult, dataset: Dataset, tolerance: float) -> dict[str, Any]:
    """Raises AssertionError where the tables differ by more than `tolerance`; returns the largest differences.

    Where two candidates are closer to each other than `tolerance`, either may have won; such pairs are counted (`ties`).
    So are images with a box so near to a whole pixel that the rounding of the detector's arithmetic makes another crop
    (`other_crops`): at most 2 in 100, and their similarities are not compared.
    """
    side = float(dataset.records[["width", "height"]].max().max())
    words = ["image_id", "region_index", "kind", "label"]
    pd.testing.assert_frame_equal(expected["regions"][words], result.regions[words])
    ours, theirs = result.regions[BOX].to_numpy(float), expected["regions"][BOX].to_numpy(float)
    boxes = np.abs(ours - theirs).max() / side
    assert boxes <= tolerance, f"boxes differ by {boxes} of the image's side"
    assert result.skipped.empty, result.skipped
    rounded = (np.floor(ours[:, :2]) != np.floor(theirs[:, :2])) | (np.ceil(ours[:, 2:]) != np.ceil(theirs[:, 2:]))
    other_crops = set(result.regions["image_id"][rounded.any(axis=1)])
    keys = ["image_id", "rank"]
    pd.testing.assert_frame_equal(expected["pairs"][keys], result.pairs[keys])
    same = ~expected["pairs"]["image_id"].isin(other_crops)
    assert same.mean() >= 0.98, f"{len(other_crops)} images have other crops"
    one, other = expected["pairs"][same], result.pairs[same]
    similarity = np.abs(one["similarity"] - other["similarity"]).max()
    assert similarity <= tolerance, f"similarities differ by {similarity}"
    chosen = ["sentence_index", "region_index"]
    differs = (one[chosen] != other[chosen]).any(axis=1)
    wrong = one[differs & (one["similarity"] - one["runner_up"] > 2 * tolerance)]
    assert wrong.empty, f"other pairs: {wrong.head().to_dict('records')}"
    return {
        "ties": int(differs.sum()),
        "other_crops": len(other_crops),
        "largest_similarity_difference": float(similarity),
        "largest_box_difference": float(boxes),
    }


def profile(
    run: Run,
    dataset: Dataset,
    clip: Clip,
    detector: RegionDetector | None,
    config: FlismConfig,
    replay: bool = True,
) -> dict[str, Any]:
    """One run with an empty cache under the stop-watches."""
    forwards, sampler = Forwards(), Sampler()
    synchronize()
    with forwards.measured(), sampler:
        begin = time.perf_counter()
        result = extract(dataset, clip, detector, config, run.fresh(), run.device)
        synchronize()
        wall = time.perf_counter() - begin
    inside = forwards.seconds()
    alone = forwards.replay() if replay else None
    return {
        "wall": wall,
        "rate": len(dataset.records[dataset.records["split"] == "train"]) / wall,
        "regions_per_image": len(result.regions) / max(result.regions["image_id"].nunique(), 1),
        "forward": {
            "detect": forwards.seconds("detect"),
            "embed": forwards.seconds("embed"),
            "together": inside,
            "alone": alone,
        },
        "own_share": 1 - inside / wall,
        "own_share_alone": None if alone is None else 1 - alone / wall,
        "parts": sampler.table(),
    }


def large_models(run: Run, dataset: Dataset, config: FlismConfig, size: str) -> tuple[Clip, RegionDetector]:
    """ViT-B/16 and a YOLO of the size, with random weights."""
    clip = inputs.vit().to(run.device).eval()
    return clip, inputs.yolo(size, run.work, dataset, config, run.device)


def warm_up(run: Run, dataset: Dataset, clip: Clip, detector: RegionDetector | None, config: FlismConfig) -> None:
    """A few images that are not measured: libraries are loaded and kernels chosen by then."""
    extract(dataset, clip, detector, config, run.fresh(), run.device, records=dataset.split("train")[: 64 if run.on_gpu else 4])


def names(clip: Clip, detector: RegionDetector | None, run: Run) -> str:
    """The models in words."""
    if isinstance(detector, inputs.FixedBoxes):
        return "CLIP ViT-B/16 and YOLO11 at 640 pixels, random weights; 5 to 10 fixed boxes after each detection"
    return (
        f"the base in {run.options.base.name}" if run.options.base else "the demo's CLIP untrained, the demo's detector trained"
    )


def child_spec(run: Run, dataset: Dataset, base: Path, config: FlismConfig, name: str) -> tuple[Path, Path]:
    """The file that tells a process of its own what to do, with an empty cache and output folder; and that folder."""
    folder = run.work / "children" / name
    shutil.rmtree(folder, ignore_errors=True)
    values = {"dataset": dataset.name, "records": str(run.work / "records"), "base": str(base), "config": asdict(config)}
    write_json(folder / "spec.json", {**values, "cache": str(folder / "cache"), "output": str(folder / "output")})
    return folder / "spec.json", folder / "output"


def child(spec_path: Path) -> None:
    """One run of the engine in this process; says `ready` when the models are loaded, and writes tables and figures."""
    import psutil

    spec = read_json(spec_path)
    device = default_device()
    config = build(FlismConfig, spec["config"], "flism")
    dataset = load_dataset(spec["dataset"], Path(spec["records"]))
    base = Path(spec["base"])
    clip = Clip.load(base / "clip").to(device).eval()
    detector = load_detector(base / "detector", config, dataset, device)
    loaded = psutil.Process().memory_info().rss / 1e6
    print("ready", flush=True)
    begin = time.perf_counter()
    result = extract(dataset, clip, detector, config, spec["cache"], device)
    seconds = time.perf_counter() - begin
    frames = {name: getattr(result, name) for name in TABLES}
    size = sum(int(frame.memory_usage(deep=True).sum()) for frame in [dataset.records, *frames.values()]) / 1e6
    for name, schema in TABLES.items():
        write_table(Path(spec["output"]) / f"{name}.parquet", frames[name], schema)
    write_json(Path(spec["output"]) / "child.json", {"seconds": seconds, "loaded": loaded, "tables": size})


def tables(output: Path) -> dict[str, pd.DataFrame]:
    """What a child has written."""
    return {name: read_table(output / f"{name}.parquet", schema) for name, schema in TABLES.items()}


# --- results -----------------------------------------------------------------------------------------------------


def show_baseline(result: dict[str, Any]) -> list[str]:
    """The table of the part baseline."""
    runs = len(result["engine_seconds"])
    return [
        "| | images/s | seconds of each run |",
        "|---|---:|---|",
        f"| per image, per crop | {result['per_image_rate']:.2f} | {listed(result['per_image_seconds'])} |",
        f"| engine, empty cache | {result['engine_rate']:.2f} | {listed(result['engine_seconds'])} |",
        "",
        f"**{result['ratio']:.1f} times** (medians of {runs} runs over {result['images']} images with "
        f"{result['regions_per_image']:.1f} regions each). Equal results: similarities within "
        f"{result['largest_similarity_difference']:.1e}, boxes within {result['largest_box_difference']:.1e} of the side, "
        f"{result['ties']} ties broken the other way, {result['other_crops']} images with a box that rounding moved over a "
        "pixel's edge.",
    ]


def show_share(result: dict[str, Any]) -> list[str]:
    """The table of the part share."""
    alone = result["own_share_alone"]
    lines = [
        f"**{result['own_share']:.1%}** of the wall time lies outside of the forward passes (runs: "
        f"{listed(result['own_shares'], '.1%')}); {result['rate']:.1f} images/s, {result['images']} images with "
        f"{result['regions_per_image']:.1f} regions each.",
    ]
    if alone is not None:
        lines[0] += (
            " Against the same passes with nothing running beside them, which decoding and cropping in other threads do: "
            f"{alone:.1%}."
        )
    return [*lines, "", *show_parts({"": result})]


def show_large(result: dict[str, Any]) -> list[str]:
    """The table of the part large."""
    rows = [
        "| YOLO | images/s | regions per image | wall s | detect forward s | embed forward s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for size, row in result["sizes"].items():
        forward = row["forward"]
        rows.append(
            f"| {size} | {row['rate']:.2f} | {row['regions_per_image']:.1f} | {row['wall']:.1f} | {forward['detect']:.1f} | "
            f"{forward['embed']:.1f} |"
        )
    note = (
        f"{result['images']} JPEGs of 2,000 x 1,500 pixels, {result['megabytes_per_image']:.1f} MB each, from the page cache."
    )
    return [*rows, "", note, "", *show_parts(result["sizes"])]


def show_parts(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Where the time goes, one pair of columns per run."""
    parts = sorted({part for run in runs.values() for part in run["parts"]}, key=lambda part: (part == "waiting", part))
    titles = [f"{title} {name}".strip() for name in runs for title in ("calling thread", "other threads")]
    lines = ["| of the wall time | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for part in parts:
        cells = [run["parts"].get(part, {"main": 0.0, "threads": 0.0}) for run in runs.values()]
        lines.append(f"| {part} | " + " | ".join(f"{cell['main']:.1%} | {cell['threads']:.1%}" for cell in cells) + " |")
    return lines


def show_memory(result: dict[str, Any]) -> list[str]:
    """The table of the part memory."""
    lines = [
        "| images | models loaded MB | peak MB | above loaded MB | tables MB | seconds |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for count, row in result["rows"].items():
        cells = [row["loaded"], row["peak"], row["peak"] - row["loaded"], row["tables"], row["seconds"]]
        lines.append(f"| {int(count):,} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |")
    growth = result["peak_growth"] / result["table_growth"]
    return [
        *lines,
        "",
        f"The peak grows by {result['peak_growth']:.0f} MB, the tables (records, regions, pairs) by "
        f"{result['table_growth']:.0f} MB: {growth:.2f} times.",
    ]


def show_kills(result: dict[str, Any]) -> list[str]:
    """The part kills in words."""
    equal = "bit for bit" if result["bit_for_bit"] else f"within {TOLERANCE}"
    return [
        f"{result['images']} images; uninterrupted {result['seconds_whole']:.1f} s. Killed {len(result['killed_after'])} "
        f"times, {listed(result['killed_after'])} s after the models were loaded; the last run found {result['resumed']} "
        f"images finished and took {result['seconds_last']:.1f} s. The tables are equal {equal}."
    ]


if __name__ == "__main__":
    main()
