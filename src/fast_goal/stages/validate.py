"""`fast-goal validate`: judges records, regions and pairs, and writes the reports to `data/validation/`.

summary.json (counts and every outcome), summary.md (for reading), data_card.md with pictures per data set, and
data_docs/ (the static site of Great Expectations; open index.html). All are written before a critical failure stops
the pipeline, so that they can be looked at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params
from fast_goal.errors import DataError
from fast_goal.files import read_json, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd

    from fast_goal.data.expectations import Outcome
    from fast_goal.data.quality import Subject
    from fast_goal.data.records import Dataset
    from fast_goal.data.validation import Base, Cosines, Findings
    from fast_goal.tracking import Tracker

FLISM, OUTPUT, BASE = Path("data/flism"), Path("data/validation"), Path("models/base/clip")
BATCH_SIZE = 32
TITLES = {"critical": "Critical failures", "warning": "Warnings", "info": "For information"}
KEYS = {"critical": "critical", "warning": "warnings", "info": "info"}  # of the counts in summary.json


def main(params: Params, track: Tracker) -> None:
    """Runs the step. Raises ValidationError when a critical expectation fails, DataError for a missing table."""
    from fast_goal.data.expectations import check, stop_on_failure
    from fast_goal.data.quality import inspect_images
    from fast_goal.data.records import load_dataset
    from fast_goal.data.validation import Settings, examine, suites_of

    begin = time.monotonic()
    trained_on = {name: load_dataset(name) for name in params.training_datasets}
    for dataset in trained_on.values():
        track.input(dataset, "validation")
    detector_only = params.flism.regions == "detector"
    settings = Settings(params.validate, list(trained_on.values()), detector_only, params.flism.top_k, _base())
    findings = []
    for name in dict.fromkeys([*params.training_datasets, *params.download.datasets]):
        subject = _subject(params, name, trained_on.get(name))
        images = inspect_images(subject.dataset, params.validate.max_decoded, params.validate.seed)
        cosines, problem = _cosines(params, subject, images, settings.base)
        findings.append(examine(subject, images, settings, cosines))
        findings[-1].notes.extend([problem] if problem else [])
    outcomes = check(suites_of(findings), OUTPUT / "data_docs", run_name=params.download.train_dataset)
    _write_card(findings, params.validate.seed)

    numbers = _numbers(outcomes, findings)
    summary = {**numbers, "seconds": round(time.monotonic() - begin, 1), "outcomes": [_plain(outcome) for outcome in outcomes]}
    write_json(OUTPUT / "summary.json", summary)
    write_text(OUTPUT / "summary.md", _summary(outcomes, findings))

    track.metrics({**{f"expectations_{key}": float(value) for key, value in numbers["expectations"].items()}, **_flat(numbers)})
    for name in ("summary.md", "data_card.md"):
        track.artifact(OUTPUT / name)
    for picture in sorted(OUTPUT.glob("*.png")):
        track.artifact(picture)
    track.artifact(OUTPUT / "data_docs", "data_docs")
    stop_on_failure(outcomes, OUTPUT / "summary.md", OUTPUT / "data_docs")


def _subject(params: Params, name: str, training: Dataset | None) -> Subject:
    """The tables of one data set. FLISM runs on one that is trained on; elsewhere its tables are optional. Where it was asked
    for no split, its tables are empty and nothing is expected of them."""
    import pandas as pd

    from fast_goal.data import records
    from fast_goal.data.quality import Subject

    dataset = training or records.load_dataset(name)
    skipped = [records.load_skipped(name)]
    regions = pairs = None
    folder = FLISM / name
    if params.flism.splits and (training or folder.is_dir()):
        regions = records.read_table(folder / "regions.parquet", records.REGIONS)
        pairs = records.read_table(folder / "pairs.parquet", records.PAIRS)
        skipped.append(records.read_table(folder / "skipped.parquet", records.SKIPPED))
    splits = tuple(params.flism.splits) if regions is not None else ()
    skips = pd.concat(skipped, ignore_index=True)
    return Subject(dataset, regions, pairs, skips, splits, _captions(params, name))


def _captions(params: Params, name: str) -> frozenset[str]:
    """The captions of the data set that are trained on, long or short; those of two stages may differ."""
    stages = [(params.download.train_dataset, params.finetune), (params.intermediate.dataset, params.intermediate.training)]
    return frozenset(training.captions for dataset, training in stages if dataset == name)


def _base() -> Base | None:
    """What the base's files say of it; None where the step `base` has not run."""
    from fast_goal.data.validation import Base

    if not (BASE / "open_clip_config.json").is_file():
        return None
    config = read_json(BASE / "open_clip_config.json")["model_cfg"]
    info = read_json(BASE / "fast_goal.json") if (BASE / "fast_goal.json").is_file() else {}
    size = config["vision_cfg"]["image_size"]
    side = min(size) if isinstance(size, list) else size
    return Base(info.get("name", BASE.name), side, config["text_cfg"].get("context_length", 77))


def _cosines(params: Params, subject: Subject, images: pd.DataFrame, base: Base | None) -> tuple[Cosines | None, str]:
    """The cosines of a random sample of the images that can be read, and why there are none."""
    import numpy as np

    from fast_goal.data.caption_checks import sample_rows
    from fast_goal.data.validation import Cosines

    wanted, records = params.validate.quality_pairs, subject.dataset.records
    if not wanted or not subject.has_long_captions:
        return None, ""
    if base is None:
        return None, f"Caption quality was not measured: {BASE} does not exist."
    readable = images[["missing_file", "undecodable", "wrong_size"]].isna().all(axis=1)
    if images["decoded"].any():
        readable &= images["decoded"]
    usable = np.flatnonzero(readable & records["long_caption"].fillna("").str.strip().ne(""))
    rows = usable[sample_rows(len(usable), wanted, params.validate.seed)]
    if len(rows) < 2:
        return None, "Caption quality was not measured: fewer than two images with a long caption can be read."
    try:
        own, others = caption_cosines(subject.dataset, rows)
    except DataError as error:
        return None, f"Caption quality was not measured: {error}"
    return Cosines(base.name, rows, own, others), ""


def caption_cosines(dataset: Dataset, rows: Sequence[int]) -> tuple[Any, Any]:
    """Cosines of the images `rows` of the records with their own long captions [N], and mean cosines with those of the
    others [N], by the base; float64. Raises DataError for an image that cannot be read."""
    import numpy as np

    from fast_goal.environment import device, prepare
    from fast_goal.evaluation.embedding import Captions, Questions, Regions, answer
    from fast_goal.model.clip import Clip

    prepare()
    records = dataset.records.iloc[rows]
    texts = records["long_caption"].tolist()
    none = Captions([], np.zeros(0, np.int64))
    asked = Questions(
        image_ids=records["image_id"].tolist(),
        paths=[dataset.path(path) for path in records["image_path"]],
        sizes=records[["width", "height"]].to_numpy(np.int64),
        long=Captions(texts, np.arange(len(texts))),
        short=none,
        regions=Regions([], np.zeros(0, np.int64), np.zeros((0, 4)), "none"),
    )
    answers = answer(Clip.load(BASE), asked, BATCH_SIZE, device(), f"validate {dataset.name}")
    image = answers.image_features.double().numpy()  # [N, D]
    text = answers.text_features.double().numpy()[answers.rows(texts)]  # [N, D]
    own = (image * text).sum(axis=1)
    return own, (image @ text.sum(axis=0) - own) / (len(texts) - 1)


def _write_card(findings: Sequence[Findings], seed: int) -> None:
    from fast_goal.data import card

    for picture in OUTPUT.glob("*.png"):
        picture.unlink()
    parts = ["# Data card", *(card.describe(found, card.draw(found, OUTPUT, seed)) for found in findings)]
    write_text(OUTPUT / "data_card.md", "\n\n".join(parts) + "\n")


def _numbers(outcomes: Sequence[Outcome], findings: Sequence[Findings]) -> dict[str, Any]:
    """The counts that DVC and MLflow show."""
    failed = [outcome.rule.severity for outcome in outcomes if not outcome.passed]
    return {
        "expectations": {
            "passed": sum(outcome.passed for outcome in outcomes),
            "failed": len(failed),
            **{KEYS[severity]: failed.count(severity) for severity in KEYS},
        },
        "datasets": {
            found.subject.name: {
                "images": len(found.subject.dataset.records),
                "regions": 0 if found.subject.regions is None else len(found.subject.regions),
                "pairs": 0 if found.subject.pairs is None else len(found.subject.pairs),
                "skipped": len(found.subject.skipped),
            }
            for found in findings
        },
        "caption_quality": {
            found.subject.name: {
                "pairs": len(found.cosines.rows),
                "cosine": round(float(found.cosines.own.mean()), 4),
                "shuffled_cosine": round(float(found.cosines.others.mean()), 4),
            }
            for found in findings
            if found.cosines is not None
        },
        "looked_at": {found.subject.name: found.notes for found in findings},
    }


def _flat(numbers: dict[str, Any]) -> dict[str, float]:
    counts = {f"{name}_{key}": float(value) for name, counts in numbers["datasets"].items() for key, value in counts.items()}
    return {**counts, **{f"{name}_caption_cosine": quality["cosine"] for name, quality in numbers["caption_quality"].items()}}


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "suite": outcome.suite,
        "expectation": outcome.rule.name,
        "severity": outcome.rule.severity,
        "passed": outcome.passed,
        "rows": outcome.rows,
        "looked_at": outcome.rows if outcome.rule.looked_at is None else outcome.rule.looked_at,
        "failing_rows": outcome.failing,
        "observed": outcome.observed,
        "examples": outcome.examples,
    }


def _summary(outcomes: Sequence[Outcome], findings: Sequence[Findings]) -> str:
    failed = [outcome for outcome in outcomes if not outcome.passed]
    lines = ["# Validation", "", f"{len(outcomes) - len(failed)} of {len(outcomes)} expectations hold.", ""]
    for severity, title in TITLES.items():
        chosen = [outcome for outcome in failed if outcome.rule.severity == severity]
        if chosen:
            lines += [f"## {title}", ""]
        for outcome in chosen:
            head, *rest = outcome.lines(len(outcome.examples))
            lines += [f"* {head}", *(f"    * {line}" for line in rest)]
        lines += [""] if chosen else []
    for found in findings:
        lines += [f"## {found.subject.name}: what was looked at", "", *(f"* {note}" for note in found.notes), ""]
        for suite in found.suites:
            lines += [f"### {suite.name} ({len(suite.table):,} rows)", ""]
            lines += ["| expectation | severity | result |", "| --- | --- | --- |"]
            lines += [
                f"| {outcome.rule.title} | {outcome.rule.severity} | {'holds' if outcome.passed else outcome.observed} |"
                for outcome in outcomes
                if outcome.suite == suite.name
            ]
            lines.append("")
    return "\n".join(lines)
