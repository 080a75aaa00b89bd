"""Zero-shot classification: which class is the image, or the crop, most like? `classes` says what a class is.

Letters: `C` crops with a label, `K` classes, `D` embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast_goal.evaluation.classes import class_features, prompts
from fast_goal.evaluation.comparison import MODELS, Study, difference, percent
from fast_goal.evaluation.embedding import Crop, Labels
from fast_goal.evaluation.retrieval import below, count_above, scores_of_pairs
from fast_goal.evaluation.suites import Answered, Rule, compare_suite
from fast_goal.evaluation.tasks import Needs, NotAsked, task

TOP = 5
LEAST_CLASSES = 10  # from which the first TOP are looked at too
LISTED = 50  # classes up to which each has a line of its own; a guess
AT_ONCE = 16_384  # crops whose features are held in memory


@task(
    "zero_shot",
    "Zero-shot classification",
    "The image, or a crop of it, is put into the class whose prompts it is most like; the embeddings of the prompts of a class "
    "are averaged. A tie with another class is wrong.",
)
class ZeroShot:
    """The accuracy of both models by suite and class, their difference, and chance."""

    def needs(self, study: Study) -> Needs:
        """The prompts and the crops. Raises NotAsked where nothing has a label."""
        labels = _asked(study)
        texts = [text for classes in labels.classes.values() for query in prompts(classes) for text in query]
        return Needs([(text, None) for text in dict.fromkeys(texts)], list(dict.fromkeys(labels.crops)))

    def measure(self, study: Study) -> dict[str, Any]:
        """By suite; `accuracy@5` where a suite has ten classes at least."""
        labels = _asked(study)
        return {suite: self._suite(study, labels, suite) for suite in dict.fromkeys(labels.suites.tolist())}

    def _suite(self, study: Study, labels: Labels, suite: str) -> dict[str, Any]:
        mine, names = labels.suites == suite, list(labels.classes[suite]["names"])
        crops = [crop for crop, own in zip(labels.crops, mine.tolist(), strict=True) if own]
        places = {name: place for place, name in enumerate(names)}
        own = torch.tensor([places[label] for label in labels.labels[mine]])  # [C]
        above, reaching = {}, {}  # classes that score above the own one, and those that score at least as much
        for model in MODELS:
            counts = _counts(study, model, crops, own, class_features(study, model, labels.classes[suite]))
            above[model], reaching[model] = counts.T
        answered = {model: Answered(reaching[model] == 1, (above[model] == 0) & (reaching[model] > 1)) for model in MODELS}
        units = study.asked.groups[np.array([row for row, _ in crops], dtype=np.int64)]
        samples = study.config.bootstrap_samples
        chance = np.full(len(crops), 1 / len(names))
        details = len(names) <= LISTED
        found = compare_suite(answered, labels.labels[mine], chance, units, Rule(), samples, details)
        if len(names) >= LEAST_CLASSES:
            first = {model: reaching[model] <= TOP for model in MODELS}
            for model in MODELS:
                found[model][f"accuracy@{TOP}"] = percent(first[model])
            found["difference"][f"accuracy@{TOP}"] = difference(first, units, samples)
            found["chance"][f"accuracy@{TOP}"] = 100 * TOP / len(names)
        return {**found, "classes": len(names), "templates": len(labels.classes[suite]["templates"])}


def _asked(study: Study) -> Labels:
    if study.asked.labels is None:
        raise NotAsked("labels")
    return study.asked.labels


def _counts(study: Study, model: str, crops: Sequence[Crop], own: Tensor, classes: Tensor) -> np.ndarray:
    """How many classes score above the own one, and how many at least as much, itself included: int64 [C, 2]."""
    files, found = study.asked.files, []
    nothing = torch.full((len(classes), 2), torch.inf)  # bars of the classes, which ask nothing
    for start in range(0, len(crops), AT_ONCE):
        part, mine = crops[start : start + AT_ONCE], own[start : start + AT_ONCE]
        images = study.stores[model].images([files[row] for row, _ in part], [box for _, box in part])
        scores = scores_of_pairs(images, classes, torch.arange(len(part)), mine)
        found.append(count_above(images, classes, torch.stack([scores, below(scores)], 1), nothing)[0])
    return torch.cat(found).numpy()
