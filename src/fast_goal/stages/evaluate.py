"""`fast-goal evaluate`: measures the base and the fine-tuned model on the same questions, and writes the report.

Writes to `models/reports/`: metrics.json with every number, headline.json with the few for `dvc metrics`; recall.csv,
localisation.csv, history.csv and validation.csv for `dvc plots`; report.md, report.html, the pictures, and report.json, what
else the report tells: `fast-goal report` makes the two reports from it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params, to_dict
from fast_goal.files import digest, read_json, write_json

if TYPE_CHECKING:
    import torch

    from fast_goal.evaluation.comparison import Study
    from fast_goal.evaluation.report import Picture
    from fast_goal.model.clip import Clip
    from fast_goal.tracking import Tracker

FLISM, BASE, FINETUNE, OUTPUT = Path("data/flism"), Path("models/base"), Path("models/finetune"), Path("models/reports")
INTERMEDIATE, RECORDS = Path("models/intermediate"), Path("data/records")
# Where each step before this one wrote down how long it took.
TIMES = {
    "download": RECORDS / "metrics.json",
    "base": BASE / "metrics.json",
    "flism": FLISM / "metrics.json",
    "validate": Path("data/validation/summary.json"),
    "intermediate": INTERMEDIATE / "metrics.json",
    "finetune": FINETUNE / "metrics.json",
}


def main(params: Params, track: Tracker) -> None:
    """Runs the step. Raises DataError for a missing data set or an image that cannot be read, ModelError for a model."""
    from fast_goal import environment
    from fast_goal.data.records import load_dataset
    from fast_goal.evaluation import comparison, embedding, exchange, features, headline, tasks
    from fast_goal.evaluation.report import write_report
    from fast_goal.evaluation.tracked import tracked
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
    for name in config.datasets:
        dataset = load_dataset(name)
        track.input(dataset, "evaluation")
        study = comparison.Study(embedding.questions(dataset, config.split, _pairs(name)), stores, config)
        metrics[name] = tasks.measure(study, config.tasks, f"evaluate {name}")
        drawn += _draw(name, study, metrics[name])

    history = _history(FINETUNE)
    drawn += _draw_training("loss", "validation", "", history)
    if params.intermediate.dataset is not None:
        drawn += _draw_training("intermediate_loss", "intermediate_validation", " of the first stage", _history(INTERMEDIATE))
    exchange.write(OUTPUT, metrics, history, config.ks, config.patch_ks)
    seconds = time.monotonic() - begin
    write_json(OUTPUT / "metrics.json", {**metrics, "seconds": seconds})
    write_report(OUTPUT, metrics, _facts(params, clips, device, seconds), drawn)

    track.metrics({**tracked(metrics), "seconds": seconds})
    track.headline(headline.headline(metrics))
    for file in ("metrics.json", "report.md", "report.html", "report.json", *(picture.file for picture in drawn)):
        track.artifact(OUTPUT / file)


def _pairs(name: str) -> Any:
    """The FLISM pairs of a data set, None if FLISM was not asked for it."""
    from fast_goal.data.records import PAIRS, read_table

    path = FLISM / name / "pairs.parquet"
    return read_table(path, PAIRS) if path.exists() else None


def _draw(name: str, study: Study, metrics: Mapping[str, Any]) -> list[Picture]:
    """Draws the pictures of one data set, those for which it has something to show."""
    from fast_goal.evaluation import examples, pictures
    from fast_goal.evaluation.report import Picture

    config, count, drawn = study.config, study.config.pictures, []

    def file(kind: str) -> Path:
        return OUTPUT / f"{name}_{kind}.png"

    def add(kind: str, title: str, text: str) -> None:
        drawn.append(Picture(file(kind).name, title, text, name))

    if pictures.draw_recall(metrics, config.ks, name, file("recall")):
        text = f"Recall at k on {name}, of the fine-tuned model (solid), the base (dashed) and chance (dotted)."
        add("recall", "Recall at k", text)
    if "long" in metrics:
        if pictures.draw_lengths(examples.recall_by_length(study), name, file("lengths")):
            add(
                "lengths",
                "Recall by length",
                f"Text-to-image R@1 on {name} over the tokens of the long caption, with 95 % intervals: the fine-tuned model "
                "(solid) and the base (dashed).",
            )
        if count:
            queries = examples.retrievals(study, count)
            pictures.draw_retrievals(queries, file("retrieval"))
            add(
                "retrieval",
                "What is found first",
                f"The first {examples.SHOWN} images for {len(queries)} long captions of {name}, drawn at random, not chosen. A "
                "tick and a thick blue frame mark the image described, a cross any other; beside each row, the rank of the "
                "image described.",
            )
        if count and (mistakes := examples.mistakes(study, count)):
            pictures.draw_mistakes(mistakes, file("mistakes"))
            add(
                "mistakes",
                "What is confused",
                f"{len(mistakes)} long captions of {name} for which the fine-tuned model finds a wrong image first, drawn at "
                "random from all such: at the left the query and its image, at the right the image found first and that one's "
                "caption. Bold, coloured and underlined: the words in which a sentence differs from the most similar one of "
                "the other caption.",
            )
    if "localisation" in metrics:
        pictures.draw_hits(metrics["localisation"], config.patch_ks, name, file("hits"))
        text = f"How often one of the k patches most similar to a sentence lies in its box, on {name}."
        add("hits", "Localisation at k", text)
        if count and (located := examples.localisations(study, count)):
            pictures.draw_localisations(located, file("localisation"))
            add(
                "localisation",
                "Sentences on patches",
                f"The similarity of each patch with a sentence, for {len(located)} sentences of {name} drawn at random, not "
                "chosen. Dashed: the sentence's box. A tick or a cross: the most similar patch, inside or outside.",
            )
    _draw_by_patches(name, study, metrics, file, add)
    for task, title, asked in (
        ("composition", "True and false captions", "told its own caption from all the foils"),
        ("zero_shot", "Classification", "found the right class"),
    ):
        if task in metrics:
            pictures.draw_suites(metrics[task], name, file(task))
            text = f"How often each model {asked}, by suite and group of {name}; dotted, how often chance would."
            add(task, title, text)
    if count:
        pictures.draw_components(examples.components(study, count), file("components"))
        add(
            "components",
            "What the patches tell apart",
            f"Images of {name}, drawn at random, and their patches after the last block of the base and of the fine-tuned "
            "model, coloured by their first three principal components. Patches of like colour are alike to that model; "
            "colours of different models do not compare.",
        )
    if count and study.asked.long.texts:
        planes = examples.planes(study)
        pictures.draw_planes(planes, name, file("map"))
        add(
            "map",
            "Images and captions on a map",
            f"{len(planes['base'].images)} images of {name} (squares) and their long captions (circles), drawn at random, on "
            "the first two principal components of their features, the base beside the fine-tuned model; a line joins what "
            "belongs together.",
        )
    return drawn


def _draw_by_patches(
    name: str,
    study: Study,
    metrics: Mapping[str, Any],
    file: Callable[[str], Path],
    add: Callable[[str, str, str], None],
) -> None:
    """The part of `_draw` that is about text-conditioned pooling and segmentation. file: where a picture of a kind goes; add:
    takes its kind, title and text."""
    from fast_goal.evaluation import examples, patch_pictures
    from fast_goal.evaluation.attention import has_pooling

    config, count = study.config, study.config.pictures
    if metrics.get("conditioned"):
        patch_pictures.draw_modes(metrics["conditioned"], config.ks, name, file("modes"))
        add(
            "modes",
            "Recall by mode",
            f"Recall at k on {name} of the fine-tuned model, asked by its plain embeddings (global, dashed), by those that "
            "each text pools (conditioned, solid), and by the plain ones first and the best again by the others (rerank, "
            "dash-dotted).",
        )
    if count and has_pooling(study.stores["finetuned"]) and (looks := examples.attentions(study, count)):
        patch_pictures.draw_attention(looks, file("attention"))
        box = ", with the box of what it speaks of (dashed)" if looks[0].attention.box is not None else ""
        add(
            "attention",
            "Where a sentence looks",
            f"{len(looks)} sentences of {name}, drawn at random, not chosen: the image{box}; how much the pooling of the "
            "fine-tuned model takes from each patch, the mean over its heads; and the cosine of each patch with the sentence, "
            "of both models. A mark stands on the patch of the largest number: a tick inside the box, a cross outside.",
        )
        patch_pictures.draw_words(looks, file("words"))
        add(
            "words",
            "Where words look",
            "The same sentences, and where words of them look when they ask alone, as they stand, in no prompt: the "
            f"{examples.WORDS} words that the fewest captions of {name} have, and the phrase of the rarest. The box is that of "
            "the whole sentence.",
        )
    for suite, found in metrics.get("segmentation", {}).items() if count else ():
        shown, kind = examples.segmentations(study, suite, count), f"segmentation_{suite}"
        names = list(study.asked.masks.segments[suite]["names"])
        patch_pictures.draw_segmentation(shown, names, f"The class of each pixel ({suite})", file(kind))
        add(
            kind,
            f"Classes of pixels: {suite}",
            f"{len(shown)} images of {name}, drawn at random, not chosen: the true class of each pixel, and the class that "
            f"each model finds among the {found['names']} of {suite}. Grey: no class, or not seen. Pale: what a model says of "
            "pixels that have no class, which do not count.",
        )


def _draw_training(loss: str, validation: str, stage: str, history: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draws the curves of a training, those for which it has records."""
    from fast_goal.evaluation import pictures
    from fast_goal.evaluation.report import Picture

    drawn, training = [], "fine-tuning" if not stage else "the first stage of fine-tuning"
    if pictures.draw_losses(history, OUTPUT / f"{loss}.png", stage):
        text = f"The training loss and its terms, before weighting, over the steps of {training}."
        drawn.append(Picture(f"{loss}.png", f"Loss{stage}", text))
    if pictures.draw_validation(history, OUTPUT / f"{validation}.png", stage):
        text = f"What was measured on the validation split after each epoch of {training}."
        drawn.append(Picture(f"{validation}.png", f"Validation{stage}", text))
    return drawn


def _history(folder: Path) -> list[dict[str, Any]]:
    """The records of a training, none if it wrote none."""
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line] if path.exists() else []


def _facts(params: Params, clips: Mapping[str, Clip], device: torch.device, seconds: float) -> Any:
    from fast_goal.evaluation.comparison import MODELS
    from fast_goal.evaluation.published import recipe_of
    from fast_goal.evaluation.report import Facts
    from fast_goal.evaluation.tasks import section
    from fast_goal.tracking.identity import git_commit, git_dirty

    times = {step: read_json(path).get("seconds") for step, path in TIMES.items() if path.exists()}
    commit, first = git_commit(), params.intermediate
    return Facts(
        experiment=params.experiment,
        command="dvc repro",
        commit=commit if commit == "none" else commit[:9] + ("+changes" if git_dirty() else ""),
        params=to_dict(params),
        params_digest=digest(to_dict(params)),
        base_kind=params.base.kind,
        base_name=clips["base"].name,
        backbone=params.base.model,
        scratch_split=params.base.scratch.split if params.base.scratch.steps else "",
        recipes={model: recipe_of(params, model) for model in MODELS},
        objective=params.objective,
        epochs=params.finetune.epochs,
        batch_size=params.finetune.batch_size,
        first_stage={}
        if first.dataset is None
        else {"dataset": first.dataset, "epochs": first.training.epochs, **first.objective},
        views={model: clip.view_mode for model, clip in clips.items()},
        split=params.evaluate.split,
        datasets=_datasets(params),
        skipped=_skipped([*params.training_datasets, *params.evaluate.datasets]),
        tasks={name: section(name, params.evaluate) for name in params.evaluate.tasks},
        precision=params.evaluate.precision,
        device=str(device),
        bootstrap_samples=params.evaluate.bootstrap_samples,
        seconds={**{step: value for step, value in times.items() if value is not None}, "evaluate": seconds},
    )


def _datasets(params: Params) -> list[dict[str, Any]]:
    """The data sets in the order of their use: name, what for, source, digest, and the images of each split."""
    uses: dict[str, list[str]] = {}
    if params.intermediate.dataset is not None:
        uses[params.intermediate.dataset] = ["first stage"]
    uses.setdefault(params.download.train_dataset, []).append("training")
    for name in params.evaluate.datasets:
        uses.setdefault(name, []).append("evaluation")
    found = []
    for name, words in uses.items():
        path = RECORDS / f"{name}.json"
        known = read_json(path) if path.exists() else {}
        facts = {key: known.get(key, "unknown") for key in ("source", "digest")}
        found.append({"name": name, "use": ", ".join(words), **facts, "splits": known.get("splits", {})})
    return found


def _skipped(names: Sequence[str]) -> list[dict[str, Any]]:
    """How many samples of each data set were left out on the way here, by step and reason."""
    from fast_goal.data.records import SKIPPED, read_table

    found = []
    for name in dict.fromkeys(names):
        for path in (RECORDS / f"{name}_skipped.parquet", FLISM / name / "skipped.parquet"):
            if path.exists():
                counts = read_table(path, SKIPPED).groupby(["step", "reason"]).size()
                found += [
                    {"dataset": name, "step": step, "reason": reason, "count": int(count)}
                    for (step, reason), count in counts.items()
                ]
    return found
