"""Learning curves of the demo: five objectives, several seeds of fine-tuning, by steps and by wall time.

    make repro                               # data, base and local pairs of the demo
    python benchmarks/learning_curves.py     # about 25 minutes on two cores; killed, it goes on with the next run
    python benchmarks/learning_curves.py --draw    # draws again what was measured

All runs start from the same base and learn from the same pairs; the seed chooses the order of the batches. Measured on the
validation split before training and after every epoch: R@1 on long captions, mean of both directions, and how often the
patch that is most similar to a sentence lies in its box. Wall time is that of the training without the measuring.
Writes benchmarks/results/learning_curves.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import ROOT, machine

from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.data.records import PAIRS, Dataset, load_dataset, read_table
from fast_goal.environment import device as default_device
from fast_goal.environment import prepare
from fast_goal.evaluation.comparison import caption_ranks
from fast_goal.evaluation.embedding import answer, questions
from fast_goal.files import digest, read_json, tree_digest, write_json, write_text
from fast_goal.model.clip import Clip
from fast_goal.objectives import make_objective
from fast_goal.training.checkpoint import remove_state
from fast_goal.training.loop import finetune

OBJECTIVES = {  # name -> overrides of `fast-goal configure`, each with the learning rate that did best on the validation split
    "fast_goal": [],
    "goal": ["objective=goal"],
    "global_local": ["objective=global_local"],
    "local": ["objective=local"],
    "global": ["experiment=demo_global"],
}
TITLES = {
    "fast_goal": "FAST-GOAL",
    "goal": "the same with the earlier code's boxes and spans",
    "global_local": "global + local",
    "local": "local alone",
    "global": "global alone",
}
TERMS = ("global", "local", "tsl_image", "tsl_text")
MEASURED = {"long R@1": "long captions, R@1 (%)", "localisation": "best patch in the sentence's box (%)"}
COLOURS = dict(zip(OBJECTIVES, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"), strict=True))
DASHES = dict(zip(OBJECTIVES, ("-", (0, (4, 2)), "-.", ":", "--"), strict=True))
LOG_EVERY = 5  # steps
OUTPUT = ROOT / "benchmarks/results/learning_curves"


def main() -> None:
    """Runs what has not run yet, then writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="without suffix")
    parser.add_argument("--draw", action="store_true", help="draw and tabulate the results that are there")
    options = parser.parse_args()
    prepare()
    if not options.draw:
        write_json(options.output.with_suffix(".json"), measure_all(options.seeds, options.objectives, options.set))
    found = read_json(options.output.with_suffix(".json"))
    draw(found["runs"], options.output.with_suffix(".png"))
    write_text(options.output.with_suffix(".md"), table(found))
    print(options.output.with_suffix(".md").read_text())


def measure_all(seeds: Sequence[int], objectives: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """Every objective with every seed; a finished run is kept below .fast_goal and not made again."""
    device = default_device()
    runs = []
    for seed in seeds:
        for name in objectives:
            params = build(
                Params, compose([*OBJECTIVES[name], *settings, f"seed={seed}", f"finetune.log_every={LOG_EVERY}"]), ""
            )
            key = digest([name, seed, params.objective, vars(params.finetune), tree_digest(Path("models/base/clip"))])
            path = Path(f".fast_goal/benchmarks/learning_curves/{name}-{seed}-{key[:12]}.json")
            if not path.exists():
                print(f"[{name}, seed {seed}]", file=sys.stderr, flush=True)
                write_json(path, measure(name, seed, params, device, path.with_suffix(".pt")))
            runs.append(read_json(path))
    return {"machine": machine(device), "settings": list(settings), "runs": runs}


def measure(name: str, seed: int, params: Params, device: torch.device, state: Path) -> dict[str, Any]:
    """One training: its records, with `seconds` of training before each."""
    dataset = load_dataset(params.download.train_dataset)
    objective = make_objective(params.objective)
    pairs = read_table(Path("data/flism") / dataset.name / "pairs.parquet", PAIRS) if objective.needs_local else None
    clip = Clip.load("models/base/clip")
    score = scorer(dataset, params, device)
    records = [{"step": 0, "seconds": 0.0, **score(clip.to(device).eval())}]
    clock = {"begin": time.perf_counter(), "paused": 0.0}

    def seconds() -> float:
        return time.perf_counter() - clock["begin"] - clock["paused"]

    def on_step(step: int, record: dict[str, Any]) -> None:
        if "loss" in record:
            records.append({"step": step, "seconds": seconds(), **{term: record[term] for term in TERMS if term in record}})

    def on_epoch(model: Clip, epoch: int) -> dict[str, float]:
        begin = time.perf_counter()
        at = {"step": records[-1]["step"], "seconds": seconds()}
        records.append({**at, **score(model)})
        clock["paused"] += time.perf_counter() - begin
        return {}

    finetune(
        clip,
        dataset,
        pairs,
        objective,
        params.finetune,
        seed=seed,
        device=device,
        state_path=state,
        state_key=f"{seed}-{time.time()}",  # curves have times: a killed run begins anew
        on_step=on_step,
        on_epoch=on_epoch,
    )
    remove_state(state)
    return {"objective": name, "seed": seed, "learning_rate": params.finetune.learning_rate, "records": records}


def scorer(dataset: Dataset, params: Params, device: torch.device) -> Callable[[Clip], dict[str, float]]:
    """Measures a model on the validation split."""
    asked = questions(dataset, "val")

    def score(clip: Clip) -> dict[str, float]:
        found = answer(clip, asked, params.evaluate.batch_size, device, name="measure")
        ranks = caption_ranks(asked.long, found)
        recall = [100 * float((way == 1).float().mean()) for way in (ranks.text_to_image, ranks.image_to_text)]
        return {"long R@1": statistics.mean(recall), "localisation": 100 * float((found.first_hits == 1).mean())}

    return score


def curve(runs: Sequence[dict[str, Any]], value: str, against: str) -> tuple[list[float], list[float], list[float]]:
    """Over the seeds of one objective at each measured point: the abscissa (median: a machine may be busy for a while), the
    mean, the standard deviation (0 of one run)."""
    rows = [[record for record in run["records"] if value in record] for run in runs]
    points = list(zip(*rows, strict=True))
    across = [statistics.median(record[against] for record in point) for point in points]
    mean = [statistics.mean(record[value] for record in point) for point in points]
    spread = [statistics.stdev(record[value] for record in point) if len(point) > 1 else 0.0 for point in points]
    return across, mean, spread


def grouped(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each objective."""
    return {name: own for name in OBJECTIVES if (own := [run for run in runs if run["objective"] == name])}


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Two rows of what was measured, by steps and by wall time, and one of the terms of the loss."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    measured, terms = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    panels = measured.subplots(1, 4)
    places = [(value, against) for value in MEASURED for against in ("step", "seconds")]
    for panel, (value, against) in zip(panels, places, strict=True):
        panel.set(title=MEASURED[value], xlabel="step" if against == "step" else "seconds of training")
        lines(panel, runs, value, against)
        panel.set_ylim(bottom=0)
    for panel, term in zip(terms.subplots(1, 4), TERMS, strict=True):
        panel.set(title=f"loss term {term}, unweighted", xlabel="step")
        lines(panel, runs, term, "step")
        panel.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    measured.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=100)


def lines(panel: Any, runs: Sequence[dict[str, Any]], value: str, against: str) -> None:
    """One line an objective, with a band of one standard deviation over the seeds."""
    for name, own in grouped(runs).items():
        across, mean, spread = curve(own, value, against)
        if not across:
            continue
        marker = "o" if value in MEASURED else ""
        panel.plot(across, mean, color=COLOURS[name], linestyle=DASHES[name], marker=marker, markersize=4, label=TITLES[name])
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        panel.fill_between(across, low, high, color=COLOURS[name], alpha=0.13, linewidth=0)


def table(found: dict[str, Any]) -> str:
    """The last measured values and the time of each objective."""
    about = found["machine"]
    runs = found["runs"]
    seeds = sorted({run["seed"] for run in runs})
    text = [
        "# Learning curves of the demo\n",
        f"`python benchmarks/learning_curves.py --seeds {' '.join(map(str, seeds))}`, commit {about['commit']}, "
        f"{about['device']}, {about['cores']} cores, torch {about['torch']} with {about['torch_threads']} threads. Mean ± "
        f"standard deviation over {len(seeds)} seeds of fine-tuning from one base; the validation split of the scenes; seconds "
        "are the median over the seeds.\n",
        "![Learning curves](learning_curves.png)\n",
        "| objective | learning rate | long R@1, % | best patch in the box, % | seconds of training |",
        "|---|---:|---:|---:|---:|",
    ]
    base = {value: statistics.mean(run["records"][0][value] for run in runs) for value in MEASURED}
    text.append(f"| base | | {base['long R@1']:.1f} | {base['localisation']:.1f} | |")
    for name, own in grouped(runs).items():
        cells = []
        for value in MEASURED:
            _, mean, spread = curve(own, value, "step")
            cells.append(f"{mean[-1]:.1f} ± {spread[-1]:.1f}")
        seconds = statistics.median(run["records"][-1]["seconds"] for run in own)
        text.append(f"| {TITLES[name]} | {own[0]['learning_rate']:g} | {' | '.join(cells)} | {seconds:.0f} |")
    if found["settings"]:
        text.append(f"\nFurther settings: {json.dumps(found['settings'])}")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
