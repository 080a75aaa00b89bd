"""Zero-shot semantic segmentation by the model's own patches; `evaluation.segmentation` says how.

Letters: `M` masks of a suite, `C` classes.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fast_goal.data.masks import Numbers
from fast_goal.errors import DataError
from fast_goal.evaluation.classes import class_features, prompts
from fast_goal.evaluation.comparison import MODELS, Study
from fast_goal.evaluation.embedding import Masks
from fast_goal.evaluation.segmentation import (
    NOTHING,
    Counts,
    chance,
    class_iou,
    class_maps,
    differences,
    image_counts,
    measures,
    read_truth,
    some_at_once,
)
from fast_goal.evaluation.tasks import Needs, NotAsked, task
from fast_goal.progress import Progress


@task(
    "segmentation",
    "Zero-shot semantic segmentation",
    "Each pixel is put into the class whose prompts the patches around it are most like, by the model's own projected patches; "
    "IoU over all pixels that count, mIoU its mean over the classes that are true or were found.",
)
class Segmentation:
    """mIoU and pixel accuracy of both models by suite, the IoU of each class, the models' difference, and chance."""

    def needs(self, study: Study) -> Needs:
        """The prompts, and the patches of the images. Raises NotAsked where there are no masks."""
        masks = _asked(study)
        texts = [text for classes in masks.segments.values() for query in prompts(classes) for text in query]
        return Needs([(text, None) for text in dict.fromkeys(texts)], patches=True)

    def measure(self, study: Study) -> dict[str, Any]:
        """By suite. `pixels` are those of any class, `outside` how many of them a model does not see, `ignored` all others.
        `classes` of a model are its IoUs, without those that are neither true nor found."""
        masks = _asked(study)
        return {suite: self._suite(study, masks, suite) for suite in dict.fromkeys(masks.suites.tolist())}

    def _suite(self, study: Study, masks: Masks, suite: str) -> dict[str, Any]:
        chosen, classes = np.flatnonzero(masks.suites == suite), masks.segments[suite]
        names = list(classes["names"])
        counts, pixels, ignored = _counts(study, masks, chosen, suite)
        sums = {model: np.stack(counts[model]).sum(1) for model in MODELS}  # [3, C]
        units = study.asked.groups[masks.images[chosen]]
        found: dict[str, Any] = {
            "images": len(chosen),
            "independent": len(np.unique(units)),
            "names": len(names),
            "templates": len(classes["templates"]),
            "pixels": pixels,
            "ignored": ignored,
            "outside": {model: pixels - int(sums[model][1].sum()) for model in MODELS},
        }
        for model in MODELS:
            if not sums[model][1].any():
                raise DataError(f"masks of {suite!r}: no pixel of any class lies where the {model} model sees it")
            iou, there = class_iou(sums[model])
            found[model] = {
                **{name: float(value) for name, value in measures(sums[model]).items()},
                "classes": {name: 100 * float(iou[place]) for place, name in enumerate(names) if there[place]},
            }
        samples = study.config.bootstrap_samples
        found["difference"] = differences(counts["finetuned"], counts["base"], units, samples)
        found["chance"] = chance(sums["finetuned"][1])
        return found


def _asked(study: Study) -> Masks:
    if study.asked.masks is None:
        raise NotAsked("masks")
    return study.asked.masks


def _counts(study: Study, masks: Masks, chosen: np.ndarray, suite: str) -> tuple[dict[str, Counts], int, int]:
    """The counts of both models over the masks [M] of the suite, the pixels of any class, and the others."""
    features = {model: class_features(study, model, masks.segments[suite]) for model in MODELS}
    numbers, files = Numbers.of(masks.segments[suite]), study.asked.files
    shown = [files[masks.images[mask]] for mask in chosen.tolist()]
    parts = some_at_once([study.stores[model] for model in MODELS], [math.prod(file.size) for file in shown])
    rows: dict[str, list[np.ndarray]] = {model: [] for model in MODELS}
    pixels = ignored = 0

    def truth_of(mask: int) -> np.ndarray:
        return read_truth(masks.paths[mask], masks.contents[mask], numbers, files[masks.images[mask]].size)

    label = f"segmentation: {suite}"
    with Progress(label, len(chosen), "masks") as progress, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for some in parts:
            truths = list(pool.map(truth_of, chosen[some.start : some.stop].tolist()))
            for truth in truths:
                counted = int((truth != NOTHING).sum())
                pixels, ignored = pixels + counted, ignored + truth.size - counted
            for model in MODELS:
                maps = class_maps(study.stores[model], shown[some.start : some.stop], features[model])
                pairs = zip(maps, truths, strict=True)
                rows[model] += [image_counts(found, truth, len(features[model])) for found, truth in pairs]
            progress.update(len(some))
    stacked = {model: np.stack(rows[model], axis=1) for model in MODELS}  # [3, M, C]
    return {model: Counts(*stacked[model]) for model in MODELS}, pixels, ignored
