"""Data drift: the present training set, and what is new in it, against the one the champion was trained on.

Both are told, since a tenth of new images that look like nothing before hardly moves the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fast_goal.config import DriftConfig
from fast_goal.evaluation.bootstrap import holm
from fast_goal.monitoring.snapshot import Sample, Snapshot
from fast_goal.monitoring.statistics import energy, kolmogorov_smirnov, permutation_test, pool, total_variation

LEAST = 10  # members of a sample: with fewer, a test says nothing
Rows = Literal["all", "new"]
ROWS: dict[Rows, str] = {"all": "all present rows", "new": "new rows only"}
WHAT = {
    "images": "images",
    "captions": "long captions",
    "tokens": "tokens of a caption",
    "sentences": "sentences of a caption",
    "detections": "detections in an image",
    "classes": "classes of the detections",
}
STATISTICS = {
    "images": "energy coefficient of the base's embeddings",
    "captions": "energy coefficient of the base's embeddings",
    "tokens": "Kolmogorov-Smirnov distance",
    "sentences": "Kolmogorov-Smirnov distance",
    "detections": "Kolmogorov-Smirnov distance",
    "classes": "total variation distance",
}
MEASURES = {
    "images": energy,
    "captions": energy,
    "tokens": kolmogorov_smirnov,
    "sentences": kolmogorov_smirnov,
    "detections": kolmogorov_smirnov,
    "classes": total_variation,
}


@dataclass(frozen=True)
class Finding:
    """One test. `statistic` is the effect size: 0 alike, 1 nothing in common; chance alone exceeds `bound` with the
    probability drift.significance."""

    what: str
    rows: Rows
    statistic: float
    bound: float
    p: float
    p_adjusted: float
    exact: bool
    drifted: bool
    reference: int  # members of either side
    present: int

    @property
    def text(self) -> str:
        """The finding in words."""
        verdict = "drifted" if self.drifted else "no drift shown"
        return (
            f"{WHAT[self.what]}, {ROWS[self.rows]}: {STATISTICS[self.what]} {self.statistic:.4f} (chance: up to "
            f"{max(self.bound, 0):.4f}), p = {self.p:.4f}, for all tests together {self.p_adjusted:.4f}: {verdict}; "
            f"{self.present:,} against {self.reference:,}"
        )


@dataclass(frozen=True)
class LeftOut:
    """A comparison that could not be made."""

    what: str
    rows: Rows
    reason: str


def compare(
    reference: Snapshot, samples: dict[Rows, Sample], present: Snapshot, config: DriftConfig
) -> tuple[list[Finding], list[LeftOut]]:
    """Tests everything in WHAT, for each of the samples.

    reference: what the samples are held against. present: the snapshot of the training set that the samples are from.
    """
    findings: list[Finding] = []
    left_out: list[LeftOut] = []
    for rows, sample in samples.items():
        for what in WHAT:
            reason = hindrance(what, reference, present)
            first, second = _keys(what, reference.sample), _keys(what, sample)
            first, second = first[: config.samples], second[: config.samples]
            if not reason and min(len(first), len(second)) < LEAST:
                reason = _too_few(what, len(first), len(second), reference, sample, rows)
            if not reason and what == "classes" and len(aligned(reference.sample, sample)[0]) < 2:
                reason = "the detector knows one class only"
            if reason:
                left_out.append(LeftOut(what, rows, reason))
                continue
            before, now = _values(what, reference.sample, sample)
            values = np.concatenate([before[: len(first)], now[: len(second)]])
            members = pool(first, second)
            statistic = MEASURES[what](values[members.rows])
            test = permutation_test(statistic, members, config.permutations, config.significance)
            facts = (test.statistic, test.bound, test.p, test.p, test.exact, False, len(first), len(second))
            findings.append(Finding(what, rows, *facts))
    adjusted = holm([finding.p for finding in findings])
    return [
        replace(finding, p_adjusted=p, drifted=p < config.significance) for finding, p in zip(findings, adjusted, strict=True)
    ], left_out


def aligned(first: Sample, second: Sample) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The labels of both samples, and the counts of each [Q, L] in their order."""
    labels = sorted({*first.labels.tolist(), *second.labels.tolist()})
    counts = []
    for sample in (first, second):
        placed = np.zeros((len(sample.detections), len(labels)), np.int64)
        placed[:, [labels.index(label) for label in sample.labels.tolist()]] = sample.detections
        counts.append(placed)
    return labels, *counts


def _values(what: str, first: Sample, second: Sample) -> list[np.ndarray]:
    """What is compared, of either sample: [M] or [M, D or L]."""
    if what == "classes":
        return list(aligned(first, second)[1:])
    if what == "detections":
        return [sample.detections.sum(1) for sample in (first, second)]
    name = {"images": "image_features", "captions": "caption_features"}.get(what, what)
    return [getattr(sample, name) for sample in (first, second)]


def _keys(what: str, sample: Sample) -> np.ndarray:
    if what == "images":
        return sample.image_keys
    return sample.region_keys if what in ("detections", "classes") else sample.caption_keys


def hindrance(what: str, reference: Snapshot, present: Snapshot) -> str:
    """Why values of the two data sets do not compare; "" where they do."""
    if what in ("images", "captions") and reference.facts.base != present.facts.base:
        return "the base model is another one than that of the reference, and its embeddings do not compare"
    if what not in ("detections", "classes"):
        return ""
    if not present.facts.detector:
        return "there is no detector: at most the five spatial regions"
    if not reference.facts.detector:
        return "the reference was made without a detector"
    if reference.facts.detector != present.facts.detector:
        return "the detector or its settings are others than those of the reference"
    return ""


def _too_few(what: str, first: int, second: int, reference: Snapshot, sample: Sample, rows: Rows) -> str:
    if what in ("detections", "classes"):
        if first < LEAST <= len(reference.sample.image_keys):
            return f"FLISM had seen {first} images of the reference when it was made; {LEAST} are needed"
        if second < LEAST <= len(sample.image_keys):
            return f"FLISM has seen {second} of these images; {LEAST} are needed: run `dvc repro flism`"
    if rows == "new" and not second:
        return "nothing is new"
    side, count = ("the reference", first) if first < LEAST else (ROWS[rows], second)
    return f"{side}: {count} {'images' if what in ('images', 'detections', 'classes') else 'captions'}; {LEAST} are needed"
