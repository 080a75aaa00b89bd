"""How long conditioned scores take: `python benchmarks/conditioned.py [--device cuda] [--threads 1]`.

All images with all texts, from projected patches and projected texts on: `ConditionedScorer` beside the formulation that FLAIR
published (src/flair/train.py of its repository), one image at a time through `nn.MultiheadAttention`, which makes the queries
of all texts anew for each image. Random inputs of two sizes: those of the demo, and those of a ViT-B/16. Beside them, what
`rerank` scores again, 128 texts of each image, and `global`, one product of matrices. Variants take turns; their scores have to
agree. CPU seconds are those of all threads: they tell more than seconds where other work runs beside (and count the waiting of
one thread for another as work). Writes benchmarks/results/conditioned.{json,md}, a part for each size, device and threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import listed, machine, ratio, spread_of, synchronize, write

from fast_goal.model.conditioned import ConditionedScorer
from fast_goal.model.pooling import TextConditionedPooling

RESULTS = Path(__file__).parent / "results"
SIZES = {"demo": (36, 128, 8), "ViT-B/16": (196, 512, 8)}  # patches, embedding width, heads
TOP_K = 128
WANTED = 5  # times as fast as published
NAMES = {
    "published": "published: one image at a time",
    "blocks": "`conditioned`: blocks",
    "rerank": f"`rerank`: {TOP_K} texts of each image",
    "global": "`global`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's, of a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "conditioned")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    threads = torch.get_num_threads()
    where = device.type if device.type != "cpu" else f"cpu, {threads} thread{'s' * (threads > 1)}"
    given = [f"--{name} {getattr(asked, name)}" for name in ("images", "texts", "repeats", "threads") if getattr(asked, name)]
    for name in asked.sizes:
        command = " ".join(["python benchmarks/conditioned.py", *given, f"--sizes {name} --device {asked.device}"])
        found = {"command": command, **machine(device), "images": asked.images, "texts": asked.texts}
        found |= measured(*SIZES[name], asked.images, asked.texts, asked.repeats, device)
        write(asked.output, "Conditioned scores", f"{name} ({where})", found, dict.fromkeys(SIZES, lines))
        print("\n".join(lines(found)))


def measured(
    patches: int, width: int, heads: int, images: int, texts: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Seconds and CPU seconds of every variant, in turns, and how far the scores are from the published ones."""
    pooling, tokens, queries = made(patches, width, heads, images, texts, device)
    rows = torch.arange(images).repeat_interleave(min(TOP_K, texts))
    columns = torch.rand(images, texts, generator=torch.Generator().manual_seed(1)).topk(min(TOP_K, texts)).indices.flatten()
    pooled, units = F.normalize(tokens.mean(1), dim=1), F.normalize(queries, dim=1)
    variants: dict[str, Callable[[], Tensor]] = {
        "published": lambda: published(pooling, tokens, queries),
        "blocks": lambda: blocks(pooling, tokens, queries),
        "rerank": lambda: rerank(pooling, tokens, queries, rows, columns),
        "global": lambda: pooled @ units.T,
    }
    scores = {name: variant().cpu() for name, variant in variants.items()}  # which warms them up
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        for name in list(variants) if number % 2 == 0 else reversed(list(variants)):
            synchronize()
            begin, worked = time.perf_counter(), time.process_time()
            variants[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - worked)
    return {
        "patches": patches,
        "width": width,
        "heads": heads,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "difference": {
            "blocks": (scores["blocks"] - scores["published"]).abs().max().item(),
            "rerank": (scores["rerank"] - scores["published"][rows, columns]).abs().max().item(),
        },
    }


def made(
    patches: int, width: int, heads: int, images: int, texts: int, device: torch.device
) -> tuple[TextConditionedPooling, Tensor, Tensor]:
    """A pooling with biases, patches [I, N, D] and texts [T, D], all random."""
    torch.manual_seed(0)
    pooling = TextConditionedPooling(width, heads).eval()
    torch.nn.init.normal_(pooling.attention.in_proj_bias, std=0.1)
    torch.nn.init.normal_(pooling.attention.out_proj.bias, std=0.1)
    return pooling.to(device), torch.randn(images, patches, width).to(device), torch.randn(texts, width).to(device)


@torch.no_grad()
def published(pooling: TextConditionedPooling, tokens: Tensor, queries: Tensor) -> Tensor:
    """[I, T] as published: each image alone, and the cosines of what is pooled on the CPU."""
    units, found = F.normalize(queries, dim=-1).cpu(), []
    for image in tokens.split(1):
        pooled = pooling.attention(
            pooling.norm_query(queries[None]), pooling.norm_key(image), pooling.norm_value(image), need_weights=False
        )[0]
        pooled = F.normalize(pooled, dim=-1).cpu().contiguous().view(-1, queries.shape[1])
        found.append(torch.einsum("ij,ij->i", pooled, units)[None])
    return torch.cat(found)


def blocks(pooling: TextConditionedPooling, tokens: Tensor, queries: Tensor) -> Tensor:
    """[I, T] as the evaluation has them."""
    scorer = ConditionedScorer(pooling)
    texts = scorer.texts(queries)
    return torch.cat([scorer.scores(scorer.images(some), texts) for some in tokens.split(64)])


def rerank(pooling: TextConditionedPooling, tokens: Tensor, queries: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The scores of some pairs, [P]; rows ascending."""
    scorer = ConditionedScorer(pooling)
    texts = scorer.texts(queries)

    def parts() -> Iterator[Tensor]:
        for start in range(0, len(tokens), 64):
            mine = (rows >= start) & (rows < start + 64)
            yield scorer.pairs(scorer.images(tokens[start : start + 64]), texts, rows[mine] - start, columns[mine])

    return torch.cat(list(parts()))


def lines(size: dict[str, Any]) -> list[str]:
    """The table of a part."""
    told = [
        f"{size['images']:,} images of {size['patches']} patches, {size['texts']:,} texts, width {size['width']}, "
        f"{size['heads']} heads. Ratios are medians over the runs, with quartiles.",
        "",
        "| | seconds, median | of each run | times as fast | CPU seconds, median | times less |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for variant, seconds in size["seconds"].items():
        cpu = size["cpu_seconds"][variant]
        faster = less = ""
        if variant in ("blocks", "rerank"):
            faster = spread_of(ratio(size["seconds"]["published"], seconds))
            less = spread_of(ratio(size["cpu_seconds"]["published"], cpu))
        told.append(
            f"| {NAMES[variant]} | {statistics.median(seconds):.3f} | {listed(seconds, '.3f')} | {faster} "
            f"| {statistics.median(cpu):.3f} | {less} |"
        )
    reached = ratio(size["seconds"]["published"], size["seconds"]["blocks"])["median"]
    told += [
        "",
        f"The scores differ by {max(size['difference'].values()):.1e} at most. {WANTED} times as fast as published is "
        + ("reached." if reached >= WANTED else f"**not reached**: {reached:.2f}."),
    ]
    return told


if __name__ == "__main__":
    sys.exit(main())
