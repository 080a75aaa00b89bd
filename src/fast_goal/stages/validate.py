"""`fast-goal validate`: judges records, regions and pairs, and writes the reports to `data/validation/`.

summary.json (counts and every outcome), summary.md (for reading), data_card.md with a histogram per data set, and
data_docs/ (the static site of Great Expectations; open index.html). All are written before a critical failure stops
the pipeline, so that they can be looked at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params
from fast_goal.errors import ValidationError
from fast_goal.files import write_json, write_text

if TYPE_CHECKING:
    from fast_goal.data.expectations import Outcome, Suite
    from fast_goal.data.quality import Subject
    from fast_goal.data.records import Dataset
    from fast_goal.tracking import Tracker

FLISM, OUTPUT = Path("data/flism"), Path("data/validation")
EXAMPLES_SHOWN = 3  # failing rows in the error message; summary.md lists more


def main(params: Params, track: Tracker) -> None:
    """Runs the step. Raises ValidationError when a critical expectation fails, DataError for a missing table."""
    from fast_goal.data.expectations import check
    from fast_goal.data.records import load_dataset

    begin = time.monotonic()
    training = load_dataset(params.download.train_dataset)
    track.input(training, "validation")
    names = [training.name, *(name for name in params.download.datasets if name != training.name)]
    subjects = [_subject(params, name) for name in names]
    suites = [suite for subject in subjects for suite in _suites(params, subject, training)]
    outcomes = check(suites, OUTPUT / "data_docs", run_name=params.download.train_dataset)
    _write_card(subjects)

    numbers = _numbers(outcomes, subjects)
    summary = {**numbers, "seconds": round(time.monotonic() - begin, 1), "outcomes": [_plain(outcome) for outcome in outcomes]}
    write_json(OUTPUT / "summary.json", summary)
    write_text(OUTPUT / "summary.md", _summary(outcomes, suites))

    track.metrics({**{f"expectations_{key}": float(value) for key, value in numbers["expectations"].items()}, **_flat(numbers)})
    for name in ("summary.md", "data_card.md"):
        track.artifact(OUTPUT / name)
    for picture in sorted(OUTPUT.glob("*.png")):
        track.artifact(picture)
    track.artifact(OUTPUT / "data_docs", "data_docs")
    _stop_on_failure(outcomes)


def _subject(params: Params, name: str) -> Subject:
    """The tables of one data set. FLISM always runs on the training data set; elsewhere its tables are optional."""
    import pandas as pd

    from fast_goal.data import records
    from fast_goal.data.quality import Subject

    dataset = records.load_dataset(name)
    skipped = [records.load_skipped(name)]
    regions = pairs = None
    folder = FLISM / name
    if name == params.download.train_dataset or folder.is_dir():
        regions = records.read_table(folder / "regions.parquet", records.REGIONS)
        pairs = records.read_table(folder / "pairs.parquet", records.PAIRS)
        skipped.append(records.read_table(folder / "skipped.parquet", records.SKIPPED))
    splits = tuple(params.flism.splits) if regions is not None else ()
    return Subject(dataset, regions, pairs, pd.concat(skipped, ignore_index=True), splits)


def _suites(params: Params, subject: Subject, training: Dataset) -> list[Suite]:
    from fast_goal.data import expectations, quality

    rules = expectations.records_rules(
        params.validate,
        training=subject.name == training.name,
        flism=subject.regions is not None,
        detector_only=params.flism.regions == "detector",
        long_captions=subject.has_long_captions,
    )
    images = quality.inspect_images(subject.dataset)
    suites = [expectations.Suite(f"{subject.name}_records", quality.records_table(subject, images, training), rules)]
    if subject.regions is not None:
        regions, pairs = quality.regions_table(subject), quality.pairs_table(subject)
        suites.append(expectations.Suite(f"{subject.name}_regions", regions, expectations.regions_rules()))
        suites.append(expectations.Suite(f"{subject.name}_pairs", pairs, expectations.pairs_rules()))
    return suites


def _write_card(subjects: Sequence[Subject]) -> None:
    from fast_goal.data import card

    parts = ["# Data card"]
    for subject in subjects:
        lengths = card.caption_lengths(subject.dataset.records)
        picture = f"{subject.name}_caption_tokens.png" if len(lengths.tokens) else None
        if picture:
            card.draw_tokens(lengths, subject.name, OUTPUT / picture)
        parts.append(card.describe(subject, lengths, picture))
    write_text(OUTPUT / "data_card.md", "\n\n".join(parts) + "\n")


def _numbers(outcomes: Sequence[Outcome], subjects: Sequence[Subject]) -> dict[str, Any]:
    """The counts that DVC and MLflow show."""
    return {
        "expectations": {
            "passed": sum(outcome.passed for outcome in outcomes),
            "failed": sum(not outcome.passed for outcome in outcomes),
            "critical": sum(outcome.critical_failure for outcome in outcomes),
            "warnings": sum(not outcome.passed and not outcome.rule.critical for outcome in outcomes),
        },
        "datasets": {
            subject.name: {
                "images": len(subject.dataset.records),
                "regions": 0 if subject.regions is None else len(subject.regions),
                "pairs": 0 if subject.pairs is None else len(subject.pairs),
                "skipped": len(subject.skipped),
            }
            for subject in subjects
        },
    }


def _flat(numbers: dict[str, Any]) -> dict[str, float]:
    return {f"{name}_{key}": float(value) for name, counts in numbers["datasets"].items() for key, value in counts.items()}


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "suite": outcome.suite,
        "expectation": outcome.rule.name,
        "severity": "critical" if outcome.rule.critical else "warning",
        "passed": outcome.passed,
        "rows": outcome.rows,
        "failing_rows": outcome.failing,
        "observed": outcome.observed,
        "examples": outcome.examples,
    }


def _summary(outcomes: Sequence[Outcome], suites: Sequence[Suite]) -> str:
    failed = [outcome for outcome in outcomes if not outcome.passed]
    lines = ["# Validation", "", f"{len(outcomes) - len(failed)} of {len(outcomes)} expectations hold.", ""]
    for title, critical in (("Critical failures", True), ("Warnings", False)):
        chosen = [outcome for outcome in failed if outcome.rule.critical == critical]
        if chosen:
            lines += [f"## {title}", ""]
        for outcome in chosen:
            head, *rest = outcome.lines(len(outcome.examples))
            lines += [f"* {head}", *(f"    * {line}" for line in rest)]
        lines += [""] if chosen else []
    for suite in suites:
        lines += [f"## {suite.name} ({len(suite.table):,} rows)", ""]
        lines += ["| expectation | severity | result |", "| --- | --- | --- |"]
        for outcome in outcomes:
            if outcome.suite == suite.name:
                severity = "critical" if outcome.rule.critical else "warning"
                lines.append(f"| {outcome.rule.title} | {severity} | {'holds' if outcome.passed else outcome.observed} |")
        lines.append("")
    return "\n".join(lines)


def _stop_on_failure(outcomes: Sequence[Outcome]) -> None:
    failures = [outcome for outcome in outcomes if outcome.critical_failure]
    if not failures:
        return
    count = f"{len(failures)} critical expectation{'s' if len(failures) > 1 else ''} failed"
    lines = [f"{count}; {OUTPUT / 'summary.md'} lists more rows, {OUTPUT / 'data_docs/index.html'} shows all."]
    for outcome in failures:
        head, *rest = outcome.lines(EXAMPLES_SHOWN)
        lines += [head, *(f"    {line}" for line in rest)]
    raise ValidationError("\n".join(lines))
