"""`fast-goal evaluate`: measures the base and the fine-tuned model on the same questions, and writes the report.

Writes to `models/reports/`: metrics.json, recall.csv and history.csv (for `dvc plots`), report.md, report.html and the
pictures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params, to_dict
from fast_goal.files import digest, read_json, write_json, write_text

if TYPE_CHECKING:
    import torch

    from fast_goal.evaluation.comparison import Study
    from fast_goal.evaluation.report import Picture
    from fast_goal.model.clip import Clip
    from fast_goal.tracking import Tracker

FLISM, BASE, FINETUNE, OUTPUT = Path("data/flism"), Path("models/base"), Path("models/finetune"), Path("models/reports")
# Where each step before this one wrote down how long it took.
TIMES = {
    "download": Path("data/records/metrics.json"),
    "base": BASE / "metrics.json",
    "flism": FLISM / "metrics.json",
    "validate": Path("data/validation/summary.json"),
    "intermediate": Path("models/intermediate/metrics.json"),
    "finetune": FINETUNE / "metrics.json",
}
SHOWN = 5  # images per query in the retrieval picture
PICTURE_SEED = 0  # fixed: the examples are drawn, not chosen


def main(params: Params, track: Tracker) -> None:
    """Runs the step. Raises DataError for a missing data set or an image that cannot be read, ModelError for a model."""
    from fast_goal import environment
    from fast_goal.data.records import load_dataset
    from fast_goal.evaluation import comparison, embedding, features, pictures, tasks
    from fast_goal.evaluation.report import Picture, write_report
    from fast_goal.model.clip import Clip

    begin = time.monotonic()
    config, device = params.evaluate, environment.device()
    clips = {"base": Clip.load(BASE / "clip"), "finetuned": Clip.load(FINETUNE)}
    stores = {
        model: features.FeatureStore(features.FOLDER, clip, device, config.batch_size, config.precision)
        for model, clip in clips.items()
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)

    metrics: dict[str, Any] = {}
    drawn: list[Picture] = []
    recall: list[dict[str, Any]] = []
    for name in config.datasets:
        dataset = load_dataset(name)
        track.input(dataset, "evaluation")
        study = comparison.Study(embedding.questions(dataset, config.split, _pairs(name)), stores, config)
        metrics[name] = tasks.measure(study, config.tasks, f"evaluate {name}")
        recall += comparison.recall_rows(name, metrics[name], config.ks)
        drawn += _draw(name, study, metrics[name])

    history = _history(FINETUNE / "history.jsonl")
    if pictures.draw_losses(history, OUTPUT / "loss.png"):
        drawn.append(Picture("loss.png", "The training loss and its terms, before weighting, over the steps of fine-tuning."))
    if pictures.draw_validation(history, OUTPUT / "validation.png"):
        drawn.append(Picture("validation.png", "What was measured on the validation split after each epoch."))
    _write_csv(OUTPUT / "recall.csv", recall, ["dataset", "captions", "direction", "k", "model", "recall"])
    _write_csv(OUTPUT / "history.csv", [row for row in history if "loss" in row], ["step", "loss"])
    seconds = time.monotonic() - begin
    write_report(OUTPUT, metrics, _facts(params, clips, device, seconds), drawn)
    write_json(OUTPUT / "metrics.json", {**metrics, "seconds": seconds})

    track.metrics(comparison.flatten({**metrics, "seconds": seconds}))
    track.headline(_headline(metrics))
    for file in ("report.md", "report.html", *(picture.file for picture in drawn)):
        track.artifact(OUTPUT / file)


def _pairs(name: str) -> Any:
    """The FLISM pairs of a data set, None if FLISM was not asked for it."""
    from fast_goal.data.records import PAIRS, read_table

    path = FLISM / name / "pairs.parquet"
    return read_table(path, PAIRS) if path.exists() else None


def _draw(name: str, study: Study, metrics: Mapping[str, Any]) -> list[Picture]:
    """Draws the pictures of one data set."""
    from fast_goal.evaluation import pictures
    from fast_goal.evaluation.report import Picture

    config, drawn = study.config, []

    def add(kind: str, text: str) -> None:
        drawn.append(Picture(f"{name}_{kind}.png", text, name))

    if pictures.draw_recall(metrics, config.ks, name, OUTPUT / f"{name}_recall.png"):
        add("recall", f"Recall at k on {name}, of the fine-tuned model (solid), the base (dashed) and chance (dotted).")
    if "long" in metrics and config.pictures:
        queries = _retrievals(study, config.pictures)
        pictures.draw_retrievals(queries, OUTPUT / f"{name}_retrieval.png")
        add(
            "retrieval",
            f"The first {SHOWN} images for {len(queries)} long captions of {name}, drawn at random, not chosen. A tick and a "
            "thick blue frame mark the image described, a cross any other; beside each row, the rank of the image described.",
        )
    if "localisation" in metrics:
        pictures.draw_hits(metrics["localisation"], config.patch_ks, name, OUTPUT / f"{name}_hits.png")
        add("hits", f"How often one of the k patches most similar to a sentence lies in its box, on {name}.")
        if config.pictures and (examples := _localisations(study, config.pictures)):
            pictures.draw_localisations(examples, OUTPUT / f"{name}_localisation.png")
            add(
                "localisation",
                f"The similarity of each patch with a sentence, for {len(examples)} sentences of {name} drawn at random, not "
                "chosen. Dashed: the sentence's box. A tick or a cross: the most similar patch, inside or outside.",
            )
    return drawn


def _retrievals(study: Study, count: int) -> list[Any]:
    """Queries drawn at random, from the captions that exceed CLIP's own context if there are enough of them."""
    import numpy as np

    from fast_goal.evaluation.comparison import CLIP_CONTEXT
    from fast_goal.evaluation.pictures import Retrieval

    asked, paths = study.asked, study.asked.paths
    lengths = study.lengths(study.whole)
    long = np.flatnonzero(lengths > CLIP_CONTEXT)
    candidates = long if len(long) >= count else np.arange(len(lengths))
    chosen = np.sort(np.random.default_rng(PICTURE_SEED).permutation(candidates)[:count])
    ranks = {model: study.ranks(model, study.whole)["best"].text_to_image for model in study.stores}
    queries = []
    for query in chosen:
        text, own = asked.long.texts[query], int(asked.long.images[query])
        top = {}
        for model, store in study.stores.items():
            scores = (study.image_features[model].double() @ store.texts([text])[0][0].double()).float()
            top[model] = scores.sort(descending=True, stable=True).indices[:SHOWN].tolist()
        queries.append(
            Retrieval(
                caption=text,
                image=paths[own],
                top={model: [paths[row] for row in rows] for model, rows in top.items()},
                hits={model: [row == own for row in rows] for model, rows in top.items()},
                ranks={model: int(ranks[model][query]) for model in study.stores},
            )
        )
    return queries


def _localisations(study: Study, count: int) -> list[Any]:
    """Sentences drawn at random, of different images, whose box every model can see."""
    import numpy as np

    from fast_goal.evaluation.embedding import patch_hits, patch_maps
    from fast_goal.evaluation.pictures import Localisation

    regions = study.asked.regions
    found = {model: patch_hits(store, study.asked) for model, store in study.stores.items()}
    visible = np.flatnonzero(np.all([hits.patches_inside > 0 for hits in found.values()], axis=0))
    drawn = np.random.default_rng(PICTURE_SEED).permutation(visible)
    _, first = np.unique(regions.images[drawn], return_index=True)
    chosen = drawn[np.sort(first)][:count].tolist()
    maps = {model: patch_maps(store, study.asked, chosen) for model, store in study.stores.items()}
    return [
        Localisation(
            sentence=regions.sentences[row],
            maps={model: maps[model][index] for model in maps},
            hits={model: bool(found[model].first_hits[row] == 1) for model in maps},
        )
        for index, row in enumerate(chosen)
    ]


def _history(path: Path) -> list[dict[str, Any]]:
    """The records of the fine-tuning, none if it wrote none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line] if path.exists() else []


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Writes a CSV with at least the named columns, so that a plot of it never lacks one."""
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=None if rows else list(columns))
    write_text(path, frame.to_csv(index=False))


def _facts(params: Params, clips: Mapping[str, Clip], device: torch.device, seconds: float) -> Any:
    from fast_goal.evaluation.report import Facts
    from fast_goal.evaluation.tasks import section
    from fast_goal.tracking.identity import git_commit, git_dirty

    times = {step: read_json(path).get("seconds") for step, path in TIMES.items() if path.exists()}
    commit = git_commit()
    return Facts(
        experiment=params.experiment,
        command="dvc repro",
        commit=commit if commit == "none" else commit[:9] + ("+changes" if git_dirty() else ""),
        params_digest=digest(to_dict(params)),
        base_kind=params.base.kind,
        base_name=clips["base"].name,
        scratch_split=params.base.scratch.split,
        objective=params.objective,
        first_stage=_first_stage(params),
        views={model: clip.view_mode for model, clip in clips.items()},
        split=params.evaluate.split,
        tasks={name: section(name, params.evaluate) for name in params.evaluate.tasks},
        precision=params.evaluate.precision,
        device=str(device),
        bootstrap_samples=params.evaluate.bootstrap_samples,
        seconds={**{step: value for step, value in times.items() if value is not None}, "evaluate": seconds},
    )


def _first_stage(params: Params) -> dict[str, Any]:
    """The first stage of the training in a few words, empty if there was none."""
    first = params.intermediate
    if first.dataset is None:
        return {}
    return {"dataset": first.dataset, "epochs": first.training.epochs, **first.objective}


def _headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers that stand for the whole run."""
    from fast_goal.evaluation.comparison import MODELS, flatten

    chosen: dict[str, Any] = {}
    for name, values in metrics.items():
        for kind in ("long", "short"):
            if kind in values:
                for model in MODELS:
                    recall = values[kind][model]
                    chosen[f"{name}.{kind}.{model}"] = {
                        way: {key: recall[way][key] for key in list(recall[way])[:1]} for way in recall
                    }
        if "localisation" in values:
            for model in (*MODELS, "chance"):
                found = values["localisation"][model]
                chosen[f"{name}.localisation.{model}"] = {key: found[key] for key in list(found)[:1]}
    return flatten(chosen)
