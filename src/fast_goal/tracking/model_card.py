"""The model card: what a registered model is, what it was trained on, how good it is, and what it must not be used for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fast_goal.config import FinetuneConfig, Params, parts_of

IN_FULL = ("long", "short", "localisation")  # tasks of which the table has metrics themselves, not only what they come down to
KS = 2  # of these tasks, the first so many k; the report has all
GAP = "&emsp;"  # MLflow's page puts no space between the columns of a table
COLUMNS = ("metric (%)", "base", "fine-tuned", "difference", "95 % interval", "chance")
NAMES = {"text_to_image": "text → image", "image_to_text": "image → text"}


@dataclass(frozen=True)
class Comparison:
    """One metric of both models. Shares in percent; `low` and `high` bound the difference (95 %)."""

    name: str
    base: float
    finetuned: float
    difference: float
    low: float
    high: float
    chance: float | None


def comparisons(metrics: Mapping[str, Any], path: Sequence[str] = ()) -> Iterator[Comparison]:
    """Every metric in models/reports/metrics.json that compares the two models, wherever it stands.

    Such metrics come in blocks: the same keys below `base`, `finetuned` and `difference` (value, low, high), and below
    `chance` where it is known.
    """
    if all(isinstance(metrics.get(key), Mapping) for key in ("base", "finetuned", "difference")):
        for keys, interval in _leaves(metrics["difference"]):
            base, finetuned = _at(metrics["base"], keys), _at(metrics["finetuned"], keys)
            if base is not None and finetuned is not None:
                yield Comparison(
                    " · ".join(NAMES.get(key, key) for key in (*path, *keys)),
                    base,
                    finetuned,
                    interval["value"],
                    interval["low"],
                    interval["high"],
                    _at(metrics.get("chance"), keys),
                )
    for key, value in metrics.items():
        if isinstance(value, Mapping) and key not in ("base", "finetuned", "difference", "chance"):
            yield from comparisons(value, (*path, str(key)))


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """The comparisons as a Markdown table, a sentence if there are none. The slices are left out, and all but the first `KS`
    k; of the tasks beside retrieval and localisation there is only what they come down to."""
    rows = _first_ks([row for row in comparisons(metrics) if _in_table(row.name.split(" · "))])
    if not rows:
        return "No metrics compare the two models."
    lines = [
        "| " + " | ".join(f"{title}{GAP}" for title in COLUMNS) + " |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        chance = "" if row.chance is None else f"{row.chance:.1f}"
        lines.append(
            f"| {row.name} | {row.base:.1f} | {row.finetuned:.1f} | {row.difference:+.1f} "
            f"| {row.low:+.1f} to {row.high:+.1f} | {chance} |"
        )
    return "\n".join(lines)


def _first_ks(rows: Sequence[Comparison]) -> list[Comparison]:
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        block = row.name.rpartition("@")[0]
        seen[block] += 1
        if not block or seen[block] <= KS:
            kept.append(row)
    return kept


def _in_table(path: Sequence[str]) -> bool:
    if any(part.startswith("slices") for part in path):
        return False
    suite = path[-1] in ("accuracy", "macro") and "groups" not in path
    return any(task in path for task in IN_FULL) or "drop" in path or path[-1].startswith("mAP") or suite


def model_card(
    params: Params,
    datasets: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    tags: Mapping[str, str],
    heads: int | None = None,
) -> str:
    """The card as Markdown.

    datasets: the contents of data/records/<name>.json, those trained on first. metrics: models/reports/metrics.json.
    tags: what the registered version carries (commit, digests). heads: of the model's text-conditioned pooling, None if it has
    none.
    """
    base, first = params.base, params.intermediate
    scratch = base.kind == "scratch"
    trained = f"trained from scratch for {base.scratch.steps} steps on short captions"
    origin = (
        f"a small CLIP {trained if base.scratch.steps else 'with weights as they are drawn'}"
        if scratch
        else f"open_clip's `{base.model}`" + (f" with the weights `{base.pretrained}`" if base.pretrained else "")
    )
    limits = [
        "Descriptions in English. Text beyond the context length is cut off.",
        "Measured on the split named below and nothing else; the intervals speak of the choice of test images, not of "
        "the training seed.",
        "It inherits the biases of its base and of the captions. Not for identifying people, and not for decisions about them.",
    ]
    if scratch:
        limits.insert(0, "**The base is weak**: trained from scratch on little data, it knows only the words and things of it.")
    licence = (
        "No third-party weights are in it. The terms of the training images and captions apply."
        if scratch
        else f"The weights derive from `{base.model}` / `{base.pretrained}`: its licence applies, and the terms of the images "
        "and captions do too."
    )
    return "\n".join(
        [
            f"# {params.register.model_name}: CLIP fine-tuned for long descriptions",
            "",
            "Embeds images and long, detailed texts into one space, for search and ranking.",
            "",
            "## How to load it",
            "```python",
            "import mlflow, pandas",
            f'model = mlflow.pyfunc.load_model("models:/{params.register.model_name}@{params.register.alias}")',
            'model.predict(pandas.DataFrame({"text": ["A red kite flies over a green field."]}))["embedding"]',
            "```",
            "A row has either `text` or `image` (the bytes of an image file, or their base64 text). The embeddings have unit "
            "length; their dot product is the similarity. Needed is what the model's requirements.txt lists. The files below "
            "`data/` are an open_clip folder: `open_clip.create_model_and_transforms('local-dir:...')` loads it.",
            "",
            *_pooling(heads),
            "## Method",
            f"From {origin}, fine-tuned "
            + (f"first on `{first.dataset}` {_training(first.objective, first.training)}; then " if first.dataset else "")
            + f"on `{params.download.train_dataset}` {_training(params.objective, params.finetune)}. Seed {params.seed}. Text "
            f"context: {base.context_length} tokens.{_local_pairs(params)}{_sub_captions(params)}{_hard_negatives(params)}",
            "",
            "## Data",
            *[_dataset_line(info, params) for info in datasets],
            "",
            "## Limits",
            *[f"* {limit}" for limit in limits],
            "",
            "## Licence",
            licence,
            "",
            "## Where it comes from",
            *[f"* {name}: `{value}`" for name, value in tags.items()],
            "",
            # last, because MLflow's descriptions have a limit, and many data sets make a long table
            "## Results",
            f"Split `{params.evaluate.split}`, in percent; the difference with its 95 % bootstrap interval. The report, an "
            "artifact of the run `evaluate`, has more.",
            "",
            metrics_table(metrics),
            "",
        ]
    )


def _training(objective: Mapping[str, Any], training: FinetuneConfig) -> str:
    return (
        f"with the objective `{objective.get('name')}` ({_terms(objective) or 'no weights'}) for {training.epochs} epochs: "
        f"batch {training.batch_size}, learning rate {training.learning_rate:g}, weight decay {training.weight_decay:g}"
    )


def _local_pairs(params: Params) -> str:
    flism = params.flism
    if not flism.splits:
        return ""
    return f" Pairs of region and sentence were found by FLISM (regions: {flism.regions}, best {flism.top_k} per image)."


def _pooling(heads: int | None) -> list[str]:
    """How to ask a model with text-conditioned pooling."""
    if heads is None:
        return []
    return [
        "## Text-conditioned pooling",
        f"Beside its embeddings the model has a pooling of {heads} heads (FLAIR, `pooling.safetensors`): each text decides "
        "which patches of an image count for it. Rows of images and texts are compared with",
        "```python",
        'model.predict(rows, params={"output": "scores", "mode": "conditioned"})["scores"]',
        "```",
        "`conditioned`: every image as each text sees it; slower, without an embedding to keep. `global` (no `mode` given): "
        "the product of the embeddings. `rerank`: `conditioned` only for the best `top_k` (128) texts of each image and images "
        "of each text by `global`; the others have no score. open_clip loads the model without its pooling: that is `global`.",
        "",
    ]


def _sub_captions(params: Params) -> str:
    """What is drawn from the captions, for the objective or a part of it."""
    parts = [params.objective, *(parts_of(params.objective) or {}).values()]
    drawn = next((part["sub_captions"] for part in parts if part.get("sub_captions")), None)
    if drawn is None:
        return ""
    return (
        f" {drawn['count']} sub-captions of each caption and epoch, of 1 to {drawn['most_sentences']} sentences, "
        f"{100 * drawn['consecutive']:.0f} % of them in a row."
    )


def _hard_negatives(params: Params) -> str:
    made = params.negatives
    if made.generator == "none":
        return ""
    return (
        f" Hard negatives of the {made.captions} captions: generator `{made.generator}`, at most {made.per_caption} for each."
    )


def _terms(objective: Mapping[str, Any]) -> str:
    """The weights of an objective's terms, or of its parts and theirs."""
    if parts := parts_of(objective):
        return "; ".join(f"{objective['parts'][name]['weight']:g} {name} ({_terms(part)})" for name, part in parts.items())
    return ", ".join(f"{term} {weight:g}" for term, weight in (objective.get("weights") or {}).items())


def _dataset_line(info: Mapping[str, Any], params: Params) -> str:
    counts = ", ".join(f"{split} {count:,}" for split, count in info["splits"].items() if count)
    role = "training" if info["name"] in params.training_datasets else "evaluation only"
    what = f"* `{info['name']}` ({role}; source `{info['source']}`)"
    return f"{what}: {info['images']:,} images ({counts}), digest `{info['digest']}`."


def _leaves(values: Mapping[str, Any], keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, float]]]:
    for key, value in values.items():
        if not isinstance(value, Mapping):
            continue
        if {"value", "low", "high"} <= value.keys():
            yield (*keys, str(key)), value
        else:
            yield from _leaves(value, (*keys, str(key)))


def _at(values: Any, keys: Sequence[str]) -> float | None:
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return float(values) if isinstance(values, int | float) else None
