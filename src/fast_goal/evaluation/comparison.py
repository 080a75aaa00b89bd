"""Measures two models on the same questions: base, fine-tuned, and their difference.

One function measures every retrieval, whatever its queries are made of. Shares are in percent. A difference is fine-tuned
minus base, with a 95 % bootstrap interval and the p-value of a paired test, both over the test images (over scenes, where
an image has a twin).

Letters: `I` images, `T` queries, `Q` images that have one, `D` embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fast_goal.config import EvaluateConfig
from fast_goal.evaluation.bootstrap import interval, paired_test
from fast_goal.evaluation.embedding import Answers, Captions, Questions
from fast_goal.evaluation.features import FeatureStore
from fast_goal.evaluation.headline import MODELS
from fast_goal.evaluation.localisation import chance
from fast_goal.evaluation.retrieval import DIRECTIONS, Ranks, Ties, rank_bounds, ranks, summary
from fast_goal.evaluation.slices import slices

CLIP_CONTEXT = 77  # tokens that CLIP was pre-trained on
# Token ids with BOS and EOS at which a slice ends, below the context of the models: CLIP's own, halfway, Long-CLIP's.
LENGTH_EDGES = (CLIP_CONTEXT, 128, 248)
SENTENCE_EDGES = (3, 6, 9)
OBJECT_EDGES = (3, 4, 5, 6, 9)


@dataclass(frozen=True)
class Variant:
    """One retrieval. A query is a text, or several texts of which the unit embeddings are averaged and made unit again.

    tokens: how many of a text the models are shown, None: as many as they read. sentences: of each query, None where nobody
    counted. altered: whether the queries stand in for the long captions, one for one; the loss is then measured too.
    """

    name: str
    queries: list[tuple[str, ...]]  # [T]
    images: np.ndarray  # int64 [T], the row of the image that each belongs to
    tokens: int | None = None
    sentences: np.ndarray | None = None  # int64 [T]
    altered: bool = False

    @property
    def texts(self) -> list[str]:
        """Every text of every query."""
        return [text for query in self.queries for text in query]


@dataclass(frozen=True)
class Study:
    """The questions of one data set, the models that answer them, and how."""

    asked: Questions
    stores: Mapping[str, FeatureStore]  # with the keys of MODELS
    config: EvaluateConfig
    _ranks: dict[tuple[int, int | None, str], tuple[Variant, dict[Ties, Ranks]]] = field(default_factory=dict)

    @cached_property
    def image_features(self) -> dict[str, Tensor]:
        """Of each model, [I, D]."""
        return {model: store.images(self.asked.files) for model, store in self.stores.items()}

    @cached_property
    def whole(self) -> Variant:
        """The long captions as they are."""
        counts = np.array([len(sentences) for sentences in self.asked.sentences], dtype=np.int64)
        return Variant("long", [(text,) for text in self.asked.long.texts], self.asked.long.images, sentences=counts)

    def features(self, model: str, variant: Variant) -> Tensor:
        """The features [T, D] of the queries."""
        found, _ = self.stores[model].texts(variant.texts, variant.tokens)
        counts = torch.tensor([len(query) for query in variant.queries])
        if (counts == 1).all():
            return found
        owners = torch.arange(len(counts)).repeat_interleave(counts)
        sums = torch.zeros(len(counts), found.shape[1], dtype=torch.float64).index_add_(0, owners, found.double())
        return F.normalize(sums, dim=1).float()

    def lengths(self, variant: Variant) -> np.ndarray:
        """The token ids of each query with start and end token, before anything is cut off: int64 [T]."""
        counts = iter((self.stores["base"].lengths(variant.texts) - 2).tolist())
        return np.array([2 + sum(next(counts) for _ in query) for query in variant.queries], dtype=np.int64)

    def ranks(self, model: str, variant: Variant) -> dict[Ties, Ranks]:
        """The ranks with either tie rule, computed once."""
        key = (id(variant.queries), variant.tokens, model)
        if key not in self._ranks:
            owners = torch.from_numpy(variant.images)
            found = rank_bounds(self.image_features[model], self.features(model, variant), owners)
            self._ranks[key] = variant, found  # the variant too: its id stays its own
        return self._ranks[key][1]


def compare_retrieval(study: Study, variant: Variant) -> dict[str, Any]:
    """Both directions of one retrieval.

    `tied` is the share of queries whose rank would be worse if tied candidates stood before the positive: recall does
    not mean much where it is large. `chance` is the recall to expect of a random order. `truncated` counts the queries of
    which a model did not see all. `drop`, where the queries stand in for the long captions, is what R@1 (mean of both
    directions) falls by.
    """
    config, groups = study.config, study.asked.groups
    best = {model: study.ranks(model, variant)["best"] for model in MODELS}
    worst = {model: study.ranks(model, variant)["worst"] for model in MODELS}
    images, queries = len(study.asked.files), best["base"].query_images.numpy()
    resampled = {"text_to_image": groups[variant.images], "image_to_text": groups[queries]}
    lengths = study.lengths(variant)

    found: dict[str, Any] = {
        "images": images,
        "captions": len(variant.queries),
        "mean_tokens": float(lengths.mean()),
        "over_77_tokens": percent(lengths > CLIP_CONTEXT),
        "truncated": {model: _truncated(study, model, variant) for model in MODELS},
        "context_length": {model: study.stores[model].context_length for model in MODELS},
    }
    for model in MODELS:
        found[model] = {}
        for direction in DIRECTIONS:
            mine, other = getattr(best[model], direction), getattr(worst[model], direction)
            found[model][direction] = {**summary(mine, config.ks), "tied": percent((mine != other).numpy())}
    found["difference"] = {
        direction: differences(
            {model: getattr(best[model], direction).numpy() for model in MODELS},
            {f"R@{k}": k for k in config.ks},
            resampled[direction],
            config.bootstrap_samples,
        )
        for direction in DIRECTIONS
    }
    own = np.bincount(variant.images, minlength=images)[queries]
    found["chance"] = {
        "text_to_image": {f"R@{k}": 100 * chance(images, 1, k) for k in config.ks},
        "image_to_text": {f"R@{k}": 100 * mean_chance(len(variant.queries), own, k) for k in config.ks},
    }
    if variant.altered:
        found["drop"] = _drop(study, variant)
    context = max(found["context_length"].values())
    found["slices"] = _slices(study, variant, lengths, [*(edge for edge in LENGTH_EDGES if edge < context), context])
    if variant.sentences is not None:
        found["slices_by_sentences"] = _slices(study, variant, variant.sentences, SENTENCE_EDGES)
    if study.asked.objects is not None:
        found["slices_by_objects"] = _slices(study, variant, study.asked.objects[variant.images], OBJECT_EDGES)
    return found


def differences(
    found: Mapping[str, np.ndarray], limits: Mapping[str, int], groups: np.ndarray, samples: int
) -> dict[str, dict[str, float]]:
    """Fine-tuned minus base of the share of ranks within each limit, in percent points, by the limit's name."""
    return {
        name: difference({model: found[model] <= limit for model in MODELS}, groups, samples) for name, limit in limits.items()
    }


def difference(values: Mapping[str, np.ndarray], groups: np.ndarray, samples: int) -> dict[str, float]:
    """Fine-tuned minus base of the means of values between 0 and 1, in percent points: value, low, high and p."""
    mine, other = (np.asarray(values[model], dtype=np.float64) for model in ("finetuned", "base"))
    tested = paired_test(mine, other, groups)
    return {**interval(100 * mine, 100 * other, samples, groups=groups)._asdict(), "p": tested.p_value}


def caption_ranks(captions: Captions, answers: Answers, **options: Any) -> Ranks:
    """The ranks of one model with one kind of caption; options as for `retrieval.ranks`."""
    features = answers.text_features[answers.rows(captions.texts)]
    return ranks(answers.image_features, features, torch.from_numpy(captions.images), **options)


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


def mean_chance(total: int, good: np.ndarray, k: int) -> float:
    """The mean of `chance(total, good, k)` over the queries, each with its own number of good candidates."""
    kinds, counts = np.unique(good, return_counts=True)
    shares = [chance(total, int(kind), k) * int(count) for kind, count in zip(kinds, counts, strict=True)]
    return sum(shares) / len(good)


def percent(hits: np.ndarray) -> float:
    """The mean in percent."""
    return 100 * float(np.mean(hits))


def _truncated(study: Study, model: str, variant: Variant) -> int:
    store = study.stores[model]
    limit = min(variant.tokens or store.context_length, store.context_length)
    over = iter((store.lengths(variant.texts) > limit).tolist())
    return sum(any([next(over) for _ in query]) for query in variant.queries)


def _drop(study: Study, variant: Variant) -> dict[str, Any]:
    """What R@1 falls by, the mean of both directions, when the queries take the place of the long captions."""
    fallen = {}
    for model in MODELS:
        before, after = study.ranks(model, study.whole)["best"], study.ranks(model, variant)["best"]
        # as many queries one way as the other, so that the mean over all is that of the two directions
        pairs = [(getattr(before, direction) == 1, getattr(after, direction) == 1) for direction in DIRECTIONS]
        fallen[model] = torch.cat([one.double() - other.double() for one, other in pairs]).numpy()
    groups = np.tile(study.asked.groups[variant.images], len(DIRECTIONS))
    change = difference(fallen, groups, study.config.bootstrap_samples)
    return {**{model: {"R@1": percent(fallen[model])} for model in MODELS}, "difference": {"R@1": change}}


def _slices(study: Study, variant: Variant, numbers: np.ndarray, edges: Sequence[int]) -> dict[str, Any]:
    """Text-to-image R@1 by a number that each query has; empty slices are left out."""
    hits = {model: study.ranks(model, variant)["best"].text_to_image.numpy() == 1 for model in MODELS}
    groups, found = study.asked.groups[variant.images], {}
    for name, mine in slices(numbers, edges).items():
        part = {model: hits[model][mine] for model in MODELS}
        found[name] = {
            "captions": int(mine.sum()),
            **{model: {"R@1": percent(part[model])} for model in MODELS},
            "difference": {"R@1": difference(part, groups[mine], study.config.bootstrap_samples)},
        }
    return found
