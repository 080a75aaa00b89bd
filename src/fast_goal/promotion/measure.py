"""Measures a candidate and the model in use on the same test images, for the gate.

Features that `fast-goal evaluate` computed are read back, so that mostly the champion's alone are new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fast_goal.config import EvaluateConfig
from fast_goal.data.records import Dataset
from fast_goal.errors import DataError, ModelError
from fast_goal.evaluation.comparison import Study, Variant, difference, percent
from fast_goal.evaluation.embedding import Captions, questions
from fast_goal.evaluation.features import FOLDER, FeatureStore, embed_images
from fast_goal.evaluation.retrieval import DIRECTIONS, Ties
from fast_goal.model.clip import Clip
from fast_goal.promotion.latency import Times, latency

CANDIDATE, CHAMPION = "finetuned", "base"  # their keys in a `Study`: what is judged, and what it is held against
NAN = float("nan")


class Compared(NamedTuple):
    """R@1 in percent, the mean of both directions, and candidate minus champion in points: the 95 % bootstrap interval and
    the p-value of the paired test over the test images. NaN where the candidate's embeddings are not finite."""

    candidate: float
    champion: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Measured:
    """What the gate decides by.

    dataset: the one the candidate has to be better on. long, short: by data set, where it has such captions. against_ties:
    as `long` of `dataset`, with every tied wrong candidate before the positive (`retrieval.ranks`). latency: by kind of input.
    """

    dataset: str
    long: Mapping[str, Compared]
    short: Mapping[str, Compared]
    against_ties: Compared
    latency: Mapping[str, Times]

    def numbers(self) -> dict[str, float]:
        """Every number by a dotted name."""
        found = {}
        for kind, compared in (("long", self.long), ("short", self.short)):
            for name, values in compared.items():
                found |= {f"{name}.{kind}.{key}": value for key, value in values._asdict().items()}
        found[f"{self.dataset}.long_against_ties.difference"] = self.against_ties.difference
        for kind, times in self.latency.items():
            found |= {f"latency.{kind}.{key}": value for key, value in times._asdict().items()}
        return found


def measure(
    candidate: Clip,
    champion: Clip,
    datasets: Sequence[Dataset],
    config: EvaluateConfig,
    device: torch.device,
    latency_ratio: float | None = None,
) -> Measured:
    """Both models on the split `evaluate.split` of each data set. The first one with long captions decides.

    latency_ratio: a candidate that seems slower than so many times the champion is timed for longer.

    Raises DataError where no data set has long captions or an image cannot be read, ModelError where the champion's
    embeddings are not finite.
    """
    clips = {CANDIDATE: candidate, CHAMPION: champion}
    stores = {model: FeatureStore(FOLDER, clip, device, config.batch_size, config.precision) for model, clip in clips.items()}
    studies = {data.name: Study(questions(data, config.split), stores, config) for data in datasets}
    deciding = next((name for name, study in studies.items() if study.asked.long.texts), None)
    if deciding is None:
        raise DataError(
            f"None of evaluate.datasets ({', '.join(studies)}) has a long caption in the split {config.split!r}: the gate "
            "cannot tell which model understands long captions better. Name one that has."
        )
    studies = {name: _embedded(study, name) for name, study in studies.items()}
    long: dict[str, Compared] = {}
    short: dict[str, Compared] = {}
    for name, study in studies.items():
        for found, captions, kind in ((long, study.asked.long, "long"), (short, study.asked.short, "short")):
            if captions.texts:
                found[name] = _compare(study, _variant(study, captions, kind), "best")
    study = studies[deciding]
    against_ties = _compare(study, study.whole, "worst")
    lengths = stores[CHAMPION].lengths(study.asked.long.texts)
    usual = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    image = study.asked.paths[int(study.asked.long.images[usual])]
    times = latency(candidate, champion, study.asked.long.texts[usual], image, device, config.precision, latency_ratio)
    return Measured(deciding, long, short, against_ties, times)


def _variant(study: Study, captions: Captions, kind: str) -> Variant:
    return study.whole if kind == "long" else Variant(kind, [(text,) for text in captions.texts], captions.images)


def _embedded(study: Study, name: str) -> Study:
    """Computes the features that are lacking; without the candidate in the result where its are not finite."""
    asked, whole = study.asked, [(row, None) for row in range(len(study.asked.files))]
    texts = [(text, None) for text in [*asked.long.texts, *asked.short.texts]]
    stores = dict(study.stores)
    for model, word in ((CANDIDATE, "candidate"), (CHAMPION, "champion")):
        try:
            stores[model].add_texts(texts, f"gate {name}, {word}")
            embed_images([stores[model]], asked.files, whole, name=f"gate {name}, {word}")
        except ModelError as error:
            if model == CHAMPION:
                raise ModelError(f"The champion, {stores[model].clip.name}, cannot be measured: {error}") from error
            del stores[model]
    return Study(asked, stores, study.config)


def _compare(study: Study, variant: Variant, ties: Ties) -> Compared:
    groups = study.asked.groups
    hits: dict[str, np.ndarray] = {}
    for model in study.stores:
        ranks = study.ranks(model, variant)[ties]
        resampled = np.concatenate([groups[variant.images], groups[ranks.query_images.numpy()]])
        found = [(getattr(ranks, direction) == 1).double().numpy() for direction in DIRECTIONS]
        # weights by which the mean over all queries is the mean of the two directions, also where one has more queries
        hits[model] = np.concatenate([one * len(resampled) / (len(found) * len(one)) for one in found])
    champion = percent(hits[CHAMPION])
    if CANDIDATE not in hits:
        return Compared(NAN, champion, NAN, NAN, NAN, NAN)
    change = difference(hits, resampled, study.config.bootstrap_samples)
    return Compared(percent(hits[CANDIDATE]), champion, change["value"], change["low"], change["high"], change["p"])
