"""How long exact retrieval ranks take, and how much memory: `python benchmarks/retrieval.py [--images 5000 --texts 25000]`.

Random unit features with unequal numbers of texts per image, among them copies. `fast_goal.evaluation.retrieval.ranks` beside
the plain way: the whole score matrix in float64, rounded to float32, and a comparison of all of it in each direction. Every
variant runs in a process of its own; their ranks have to be equal. Writes benchmarks/results/retrieval.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import ROOT, machine, watch_memory

from fast_goal.evaluation.retrieval import Ranks, rank_bounds, ranks, recall_at_k
from fast_goal.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
KS = [1, 5, 10, 15, 25, 50]
SECONDS, MEBIBYTES = 15, 1024  # that ranks() may take of 5,000 images and 25,000 texts on two cores, and above the features
NAMES = {
    "ranks": "`ranks`: blocks of 1,024 x 1,024",
    "rank_bounds": "`rank_bounds`: both tie rules in one pass",
    "recall_at_k": "`recall_at_k`: ranks and six recalls",
    "plain": "plain full matrix",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "retrieval")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], Path(asked.child[1]))
        return
    results = measured(asked.images, asked.texts, asked.width, asked.repeats)
    write_json(asked.output.with_suffix(".json"), results)
    write_text(asked.output.with_suffix(".md"), report(results))
    print(report(results))


def measured(images: int, texts: int, width: int, repeats: int) -> dict[str, Any]:
    """Seconds and memory of every variant, in turns, and whether their ranks are equal."""
    command = f"python benchmarks/retrieval.py --images {images} --texts {texts} --width {width} --repeats {repeats}"
    results: dict[str, Any] = {"command": command, "images": images, "texts": texts, "width": width}
    results["machine"] = machine(torch.device("cpu"))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        made = features(images, texts, width)
        torch.save(made, Path(folder) / "features.pt")
        results["features_mb"] = sum(tensor.nbytes for tensor in made) / 1e6
        for number in range(repeats):
            for name in list(VARIANTS) if number % 2 == 0 else reversed(VARIANTS):
                runs[name].append(run(name, Path(folder)))
        results["variants"] = {
            name: {
                "seconds": [one["seconds"] for one in of_it],
                "median_seconds": statistics.median(one["seconds"] for one in of_it),
                "cpu_seconds": statistics.median(one["cpu_seconds"] for one in of_it),
                "mb_above_features": max(one["peak"] - one["loaded"] for one in of_it),
            }
            for name, of_it in runs.items()
        }
        results["equal"] = equal(Path(folder))
    return results


def features(images: int, texts: int, width: int) -> list[torch.Tensor]:
    """Unit features of images and texts, and each text's image. Of the images and the texts 1 % are copies of others."""
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(images, (texts,), generator=generator)
    image_features = torch.randn(images, width, generator=generator)
    text_features = 0.2 * image_features[owners] + torch.randn(texts, width, generator=generator)  # R@1 of about 70 %
    for rows in (image_features, text_features):
        copies = max(1, len(rows) // 100)
        rows[-copies:] = rows[:copies]
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in (image_features, text_features)]
    return [*unit, owners]


def plain(image_features: torch.Tensor, text_features: torch.Tensor, text_to_image: torch.Tensor) -> Ranks:
    """Ranks from the whole matrix, as one would write them down; the reference, which shares no code with the package."""
    scores = (image_features.double() @ text_features.double().T).float()  # [I, T]
    own = scores[text_to_image, torch.arange(len(text_features))]  # [T]
    queries = text_to_image.unique()
    mine = text_to_image[None] == queries[:, None]  # [Q, T]
    best = scores[queries].masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
    return Ranks((scores > own).sum(0) + 1, (scores[queries] > best).sum(1) + 1, queries)


VARIANTS: dict[str, Callable[..., Any]] = {
    "ranks": ranks,
    "rank_bounds": rank_bounds,
    "recall_at_k": lambda *given: recall_at_k(*given, KS),
    "plain": plain,
}


def run(name: str, folder: Path) -> dict[str, float]:
    """One variant in a process of its own: seconds, CPU seconds, MB with the features loaded, and at the peak."""
    command = [sys.executable, __file__, "--child", name, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peak = watch_memory(process, 0.005)["peak"]
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} ended with status {process.returncode}")
    found: dict[str, float] = json.loads(output)
    return {**found, "peak": max(peak, found["loaded"])}


def child(name: str, folder: Path) -> None:
    """Runs a variant on the features of the folder, keeps its ranks there and prints what it took."""
    import psutil

    given = torch.load(folder / "features.pt", weights_only=True)
    VARIANTS[name](*(part[:64] if part.is_floating_point() else part[:64] % 64 for part in given))  # threads, libraries
    loaded = psutil.Process().memory_info().rss / 1e6
    begin, cpu = time.perf_counter(), time.process_time()
    found = VARIANTS[name](*given)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    if isinstance(found, Ranks):
        torch.save(list(found), folder / f"{name}.pt")
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "loaded": loaded}))


def equal(folder: Path) -> dict[str, int]:
    """How many ranks of each direction differ from the plain ones."""
    ours, theirs = (Ranks(*torch.load(folder / f"{name}.pt", weights_only=True)) for name in ("ranks", "plain"))
    fields = ("text_to_image", "image_to_text", "query_images")
    return {field: int((getattr(ours, field) != getattr(theirs, field)).sum()) for field in fields}


def report(results: dict[str, Any]) -> str:
    where = results["machine"]
    lines = [
        "# Exact retrieval ranks",
        "",
        f"Made by `{results['command']}` at commit {where['commit']}; {where['device']}, {where['cores']} cores, torch "
        f"{where['torch']} with {where['torch_threads']} threads, load average before {where['load_average']}.",
        "",
        f"{results['images']:,} images, {results['texts']:,} texts, {results['width']} numbers each: features of "
        f"{results['features_mb']:.1f} MB. Each run in a process of its own; MB of 1,000,000 bytes.",
        "",
        "| | seconds, median | of each run | CPU seconds | MB above the features |",
        "|---|---:|---|---:|---:|",
    ]
    for name, found in results["variants"].items():
        each = ", ".join(f"{seconds:.2f}" for seconds in found["seconds"])
        lines.append(
            f"| {NAMES[name]} | {found['median_seconds']:.2f} | {each} | {found['cpu_seconds']:.2f} "
            f"| {found['mb_above_features']:,.0f} |"
        )
    wrong = sum(results["equal"].values())
    lines += ["", "The ranks are equal." if not wrong else f"**The ranks differ**: {results['equal']}."]
    if (results["images"], results["texts"]) == (5000, 25000):
        found = results["variants"]["ranks"]
        inside = found["median_seconds"] <= SECONDS and found["mb_above_features"] * 1e6 <= MEBIBYTES * 2**20
        verdict = "are kept" if inside else "**are not kept**"
        lines.append(f"The bounds, {SECONDS} s on 2 cores and 1 GiB above the features, {verdict}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
