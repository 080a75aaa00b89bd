"""The demo over several seeds: base, global-only and FAST-GOAL fine-tuning, with spreads and wall times.

    python benchmarks/demo.py --seeds 0 1 2 --output benchmarks/results/demo

Every row is a real `dvc repro evaluate` in a clone of this repository's HEAD, so that the working tree stays as it is;
steps that arms share (data, base, FLISM) are taken from DVC's cache, also those that `make repro` left there. The arm
`global, equal compute` trains for as many more epochs as a FAST-GOAL step costs more than a global one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fast_goal.configure import compose

ROOT = Path(__file__).resolve().parents[1]
ARMS = {  # name -> overrides of `fast-goal configure`
    "global": ["experiment=demo_global"],
    "FAST-GOAL": ["experiment=demo"],
}
EQUAL_COMPUTE = "global, equal compute"
METRICS = {  # column -> path in models/reports/metrics.json of the fine-tuned model; `base` stands in the same place
    "long T2I R@1": ("long", "{model}", "text_to_image", "R@1"),
    "long I2T R@1": ("long", "{model}", "image_to_text", "R@1"),
    "long T2I R@5": ("long", "{model}", "text_to_image", "R@5"),
    "long I2T R@5": ("long", "{model}", "image_to_text", "R@5"),
    "short T2I R@1": ("short", "{model}", "text_to_image", "R@1"),
    "short I2T R@1": ("short", "{model}", "image_to_text", "R@1"),
    "top-1 patch in the box": ("localisation", "{model}", "hit@1"),
    "chance": ("localisation", "chance", "hit@1"),
}


def main() -> None:
    """Runs every arm and seed, then writes OUTPUT.json and OUTPUT.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/demo")
    parser.add_argument("--work", type=Path, help="folder of the clone; kept, so that a second run continues")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="fast-goal-demo-"))
    clone = prepare(work)
    rows = []
    for seed in arguments.seeds:
        for arm, overrides in ARMS.items():
            rows += measure(clone, arm, seed, overrides)
            write(arguments.output, rows, commit(clone))
    for seed in arguments.seeds:
        epochs = equal_compute_epochs(rows, seed)
        rows += measure(clone, EQUAL_COMPUTE, seed, [*ARMS["global"], f"finetune.epochs={epochs}"])
        write(arguments.output, rows, commit(clone))
    print(arguments.output.with_suffix(".md").read_text())


def prepare(work: Path) -> Path:
    """A clone of HEAD in `work` that shares this repository's DVC cache: what `make repro` has made is not made again."""
    clone = work / "clone"
    if not clone.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        cache = str(ROOT / ".dvc/cache")
        subprocess.run(["dvc", "config", "--local", "cache.dir", cache], cwd=clone, check=True)
    return clone


def measure(clone: Path, arm: str, seed: int, overrides: list[str]) -> list[dict]:
    """Runs one arm; its row, and for the first arm of a seed also the base's row."""
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(clone / "src")}
    for command in (["fast-goal", "configure", *overrides, f"seed={seed}"], ["dvc", "repro", "evaluate"]):
        print(f"[{arm}, seed {seed}] {' '.join(command)}", file=sys.stderr, flush=True)
        subprocess.run(command, cwd=clone, env=environment, check=True)
    report = json.loads((clone / "models/reports/metrics.json").read_text())
    seconds = {
        step: json.loads((clone / folder / "metrics.json").read_text())["seconds"]
        for step, folder in {
            "base": "models/base",
            "flism": "data/flism",
            "finetune": "models/finetune",
            "evaluate": "models/reports",
        }.items()
    }
    rows = [row("finetuned", arm, seed, report["scenes"], seconds)]
    if arm == next(iter(ARMS)):
        rows.insert(0, row("base", "base", seed, report["scenes"], seconds))
    return rows


def row(model: str, arm: str, seed: int, metrics: dict, seconds: dict[str, float]) -> dict:
    """One row of the table: every figure in percent, times in seconds."""
    values = {}
    for column, path in METRICS.items():
        value = metrics
        for key in path:
            value = value[key.format(model=model)]
        values[column] = value
    return {
        "arm": arm,
        "seed": seed,
        **values,
        "seconds": seconds["base"] if arm == "base" else seconds["finetune"],
        "steps": seconds,
    }


def equal_compute_epochs(rows: list[dict], seed: int) -> int:
    """Epochs of global fine-tuning that take as long as the default ones of FAST-GOAL."""
    seconds = {row["arm"]: row["seconds"] for row in rows if row["seed"] == seed}
    default = compose(ARMS["global"])["finetune"]["epochs"]
    return max(default + 1, round(default * seconds["FAST-GOAL"] / seconds["global"]))


def write(output: Path, rows: list[dict], revision: str) -> None:
    """Rows as JSON; mean and standard deviation over the seeds as a Markdown table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({"commit": revision, "rows": rows}, indent=1) + "\n")
    columns = [*METRICS, "seconds"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"Made by `python benchmarks/demo.py --seeds {' '.join(map(str, seeds))}` at commit {revision}; "
        f"percent, mean ± standard deviation over {len(seeds)} seeds; `seconds` is the training time of the row's model.",
        "",
        "| model | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for column in columns:
            values = [row[column] for row in rows if row["arm"] == arm]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.0f}" if column == "seconds" else f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def commit(clone: Path) -> str:
    """The short hash of the code that was measured."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
