"""Turns the answers of two models into the metrics of the report: base, fine-tuned, and their difference.

Shares are in percent. The difference is fine-tuned minus base, with a 95 % bootstrap interval over images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fast_goal.evaluation.bootstrap import interval
from fast_goal.evaluation.embedding import Answers, Captions, Questions
from fast_goal.evaluation.localisation import chance
from fast_goal.evaluation.retrieval import DIRECTIONS, Ranks, ranks, summary

MODELS = ("base", "finetuned")
# Token ids with BOS and EOS: what CLIP's own context holds, then halfway, then the stretched context, then what is cut off.
LENGTH_SLICES = {"up to 77": (0, 77), "78 to 128": (78, 128), "129 to 248": (129, 248), "over 248": (249, None)}


def compare(
    asked: Questions, answers: Mapping[str, Answers], ks: Sequence[int], patch_ks: Sequence[int], samples: int
) -> dict[str, Any]:
    """All metrics of one data set; `answers` has the keys of MODELS.

    Returns `long`, `short` and `localisation`, each only where the data set has such questions, and `seconds`, the time
    each model took to embed.
    """
    found: dict[str, Any] = {}
    for name, captions in (("long", asked.long), ("short", asked.short)):
        if captions.texts:
            found[name] = compare_retrieval(captions, answers, ks, samples)
    if asked.regions.sentences:
        found["localisation"] = compare_localisation(asked, answers, patch_ks, samples)
    found["seconds"] = {model: answers[model].seconds for model in MODELS}
    return found


def compare_retrieval(captions: Captions, answers: Mapping[str, Answers], ks: Sequence[int], samples: int) -> dict[str, Any]:
    """Retrieval with one kind of caption.

    `tied` is the share of queries whose rank would be worse if tied candidates stood before the positive: recall does
    not mean much where it is large. `chance` is the recall to expect of a random order.
    """
    best = {model: caption_ranks(captions, answers[model]) for model in MODELS}
    worst = {model: caption_ranks(captions, answers[model], ties="worst") for model in MODELS}
    images = len(answers["base"].image_features)
    queries = best["base"].query_images.numpy()
    resampled = {"text_to_image": captions.images, "image_to_text": queries}
    lengths = {model: answers[model].text_lengths[answers[model].rows(captions.texts)] for model in MODELS}

    found: dict[str, Any] = {
        "images": images,
        "captions": len(captions.texts),
        "mean_tokens": float(lengths["base"].mean()),
        "over_77_tokens": _percent(lengths["base"] > 77),
        "truncated": {model: int((lengths[model] > answers[model].context_length).sum()) for model in MODELS},
        "context_length": {model: answers[model].context_length for model in MODELS},
    }
    for model in MODELS:
        found[model] = {}
        for direction in DIRECTIONS:
            mine, other = getattr(best[model], direction), getattr(worst[model], direction)
            found[model][direction] = {**summary(mine, ks), "tied": _percent((mine != other).numpy())}
    found["difference"] = {
        direction: _differences(
            {model: getattr(best[model], direction).numpy() for model in MODELS}, "R", ks, resampled[direction], samples
        )
        for direction in DIRECTIONS
    }
    own = np.bincount(captions.images, minlength=images)[queries]
    found["chance"] = {
        "text_to_image": {f"R@{k}": 100 * chance(images, 1, k) for k in ks},
        "image_to_text": {f"R@{k}": 100 * _mean_chance(len(captions.texts), own, k) for k in ks},
    }
    found["slices"] = _slices(best, lengths["base"], captions.images, samples)
    return found


def compare_localisation(asked: Questions, answers: Mapping[str, Answers], ks: Sequence[int], samples: int) -> dict[str, Any]:
    """Patch localisation: hit@k of both models, their difference, and what random patches would hit.

    A sentence whose box holds no patch centre (`without_centre`) is a miss, with chance 0. Both depend on the view of the
    images: `chance` is that of the fine-tuned model, `chance_of_base` differs from it only where the views do.
    """
    base = answers["base"]
    found: dict[str, Any] = {
        "boxes": asked.regions.source,
        "sentences": len(asked.regions.sentences),
        "images": len(np.unique(asked.regions.images)),
        "patches": base.patches,
        "without_centre": {model: int((answers[model].patches_inside == 0).sum()) for model in MODELS},
    }
    for model in MODELS:
        found[model] = {f"hit@{k}": _percent(answers[model].first_hits <= min(k, base.patches)) for k in ks}
    hits = {model: answers[model].first_hits for model in MODELS}
    found["difference"] = _differences(hits, "hit", ks, asked.regions.images, samples, most=base.patches)
    for name, model in (("chance", "finetuned"), ("chance_of_base", "base")):
        found[name] = {f"hit@{k}": 100 * _mean_chance(base.patches, answers[model].patches_inside, k) for k in ks}
    return found


def caption_ranks(captions: Captions, answers: Answers, **options: Any) -> Ranks:
    """The ranks of one model with one kind of caption; options as for `retrieval.ranks`."""
    features = answers.text_features[answers.rows(captions.texts)]
    return ranks(answers.image_features, features, torch.from_numpy(captions.images), **options)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a nested mapping under its dotted name, without `@`, which not every tracking store allows."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}".replace("@", "").replace(" ", "_")
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, int | float):
            flat[name] = float(value)
    return flat


def recall_rows(dataset: str, metrics: Mapping[str, Any], ks: Sequence[int]) -> list[dict[str, Any]]:
    """Long-format rows for a plot: dataset, captions, direction, k, model, recall in percent."""
    return [
        {"dataset": dataset, "captions": captions, "direction": direction, "k": k, "model": model, "recall": values[f"R@{k}"]}
        for captions in ("long", "short")
        if captions in metrics
        for direction in DIRECTIONS
        for model in (*MODELS, "chance")
        for values in [metrics[captions][model][direction]]
        for k in ks
    ]


def _differences(
    found: Mapping[str, np.ndarray], name: str, ks: Sequence[int], groups: np.ndarray, samples: int, most: int | None = None
) -> dict[str, dict[str, float]]:
    """Fine-tuned minus base of the share of ranks within k, in percent points, for each k."""
    differences = {}
    for k in ks:
        limit = k if most is None else min(k, most)
        hits = {model: 100.0 * (found[model] <= limit) for model in MODELS}
        differences[f"{name}@{k}"] = interval(hits["finetuned"], hits["base"], samples, groups=groups)._asdict()
    return differences


def _slices(best: Mapping[str, Ranks], lengths: np.ndarray, images: np.ndarray, samples: int) -> dict[str, Any]:
    """Text-to-image R@1 by the length of the caption in tokens; empty slices are left out."""
    found = {}
    for name, (low, high) in LENGTH_SLICES.items():
        mine = (lengths >= low) & (lengths <= (high if high is not None else np.inf))
        if not mine.any():
            continue
        hits = {model: 100.0 * (best[model].text_to_image.numpy()[mine] == 1) for model in MODELS}
        difference = interval(hits["finetuned"], hits["base"], samples, groups=images[mine])
        found[name] = {
            "captions": int(mine.sum()),
            **{model: {"R@1": float(hits[model].mean())} for model in MODELS},
            "difference": {"R@1": difference._asdict()},
        }
    return found


def _mean_chance(total: int, good: np.ndarray, k: int) -> float:
    kinds, counts = np.unique(good, return_counts=True)
    shares = [chance(total, int(kind), k) * int(count) for kind, count in zip(kinds, counts, strict=True)]
    return sum(shares) / len(good)


def _percent(hits: np.ndarray) -> float:
    return 100 * float(np.mean(hits))
