"""The step `negatives`: hard negative captions for the training data, where they are asked for (`fast-goal negatives`).

Reads data/records/ and, to tell paraphrases, models/base/clip. Writes to data/negatives/, for each data set that is trained on:
NAME.parquet (data.records.NEGATIVES), NAME_skipped.parquet (captions without any, with the reasons) and NAME_sample.md,
negatives to read; summary.md and data_docs/, what the quality checks found; metrics.json; and digests.json with a digest of
each table, without times, which the training steps depend on. With `negatives.generator` none there are no tables.

Text embeddings are kept in .fast_goal/features/, so that a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params
from fast_goal.errors import DataError, ModelError
from fast_goal.files import read_json, write_json, write_text

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from fast_goal.data.expectations import Outcome, Suite
    from fast_goal.data.records import Dataset
    from fast_goal.negatives.choice import Chosen, Similarity
    from fast_goal.tracking import Tracker

BASE = Path("models/base/clip")
OUTPUT = Path("data/negatives")
DIGESTS = OUTPUT / "digests.json"
SPLIT = "train"
TEXTS_AT_ONCE = 128  # embedded; a guess
PAIRS_AT_ONCE = 8192  # whose cosines are computed at once: some 60 MB


@dataclass
class Result:
    """What came of one data set. table: rows of NEGATIVES; numbers: for metrics.json."""

    name: str
    table: pd.DataFrame
    suites: list[Suite]
    numbers: dict[str, Any]


def main(params: Params, track: Tracker) -> None:
    """Runs the step.

    Raises DataError for a data set without captions, ModelError for a base or a language model that cannot be had,
    ValidationError where a critical expectation on the negatives fails.
    """
    shutil.rmtree(OUTPUT, ignore_errors=True)
    if params.negatives.generator == "none":
        write_json(OUTPUT / "metrics.json", {"used": False})
        write_json(DIGESTS, {})
        return
    from fast_goal.data.expectations import check, stop_on_failure
    from fast_goal.data.records import load_dataset
    from fast_goal.environment import prepare

    begin = time.monotonic()
    prepare()
    similarity = _similarity() if params.negatives.max_similarity is not None else None
    results = []
    for name in params.training_datasets:
        dataset = load_dataset(name)
        track.input(dataset, "negatives")
        results.append(_make(params, dataset, similarity))
    suites = [suite for result in results for suite in result.suites]
    outcomes = check(suites, OUTPUT / "data_docs", run_name=params.download.train_dataset)
    write_text(OUTPUT / "summary.md", _summary(results, outcomes))
    numbers = {result.name: result.numbers for result in results}
    seconds = time.monotonic() - begin
    settings = {"used": True, "generator": params.negatives.generator}
    write_json(OUTPUT / "metrics.json", {**settings, **numbers, "seconds": round(seconds, 1)})

    first = results[0].numbers
    track.metrics({**_flat(first), **_flat({result.name: result.numbers for result in results[1:]}), "seconds": seconds})
    track.headline({"negatives_per_caption": first["per_caption"], "negatives_share": first["share_with_negative"]})
    for file in ("metrics.json", "summary.md", *(f"{result.name}_sample.md" for result in results)):
        track.artifact(OUTPUT / file)
    track.artifact(OUTPUT / "data_docs", "data_docs")
    stop_on_failure(outcomes, OUTPUT / "summary.md", OUTPUT / "data_docs")
    # last: the training steps read it, and only tables that passed
    write_json(DIGESTS, {result.name: _digest(result.table) for result in results})


def _make(params: Params, dataset: Dataset, similarity: Similarity | None) -> Result:
    """Makes the negatives of one data set and writes its tables and its sheet."""
    import numpy as np
    import pandas as pd

    from fast_goal.data.records import NEGATIVES, SKIPPED, write_table
    from fast_goal.negatives import load_generator
    from fast_goal.negatives.choice import choose
    from fast_goal.negatives.quality import suites
    from fast_goal.negatives.sheet import sheet

    config, name = params.negatives, dataset.name
    records = dataset.split(SPLIT)
    owned = {  # image id -> all its captions
        image: {long, *short}
        for image, long, short in zip(records["image_id"], records["long_caption"], records["captions"], strict=True)
    }
    told = _captions(records, config.captions)
    if not told:
        raise DataError(
            f"data set {name}: no image of its split {SPLIT!r} has a {config.captions} caption; set negatives.captions (and "
            f"finetune.captions) to {'short' if config.captions == 'long' else 'long'}, or negatives.generator=none"
        )
    texts = list(dict.fromkeys(caption for _, caption in told))
    row_of = {text: row for row, text in enumerate(texts)}
    true: list[set[str]] = [set() for _ in texts]
    for image, caption in told:
        true[row_of[caption]] |= owned[image]
    generator = load_generator(config)
    begin = time.monotonic()
    made = generator.make(texts)
    rate = len(texts) / max(time.monotonic() - begin, 1e-9)
    for note in made.notes:
        print(f"negatives: {name}: {note}")
    chosen = choose(texts, made.candidates, true, config, _context_length(params), similarity)

    rows, similarities, skipped, reasons = [], [], [], []
    for image, caption in told:
        kept = chosen.kept[row_of[caption]]
        for candidate, cosine in kept:
            similarities.append(cosine)
            rows.append((image, caption, candidate.text, candidate.type, generator.name, config.seed))
        reason = "" if kept else made.reasons.get(row_of[caption], "every candidate left out")
        reasons.append(reason)
        if reason:
            dropped = ", ".join(f"{why} {count}" for why, count in chosen.dropped[row_of[caption]].most_common())
            detail = f"{caption[:100]!r}" + (f": {dropped}" if dropped else "")
            skipped.append({"sample": image, "row": -1, "step": "negatives", "reason": reason, "detail": detail})
    table = pd.DataFrame(rows, columns=NEGATIVES.names).astype({"seed": np.int64})
    write_table(OUTPUT / f"{name}.parquet", table, NEGATIVES)
    write_table(OUTPUT / f"{name}_skipped.parquet", skipped, SKIPPED)
    write_text(OUTPUT / f"{name}_sample.md", sheet(name, table, config.types, config.seed))

    false = _falsehoods(dataset, table)
    captions = pd.DataFrame(told, columns=["image_id", "caption"]).assign(reason=reasons)
    numbers = _numbers(table, captions, chosen, np.array(similarities, np.float64), false, config.types)
    print(
        f"negatives: {name}: {len(table):,} for {numbers['share_with_negative']:.1%} of {len(captions):,} captions, made at "
        f"{rate:,.1f} captions/s"
    )
    numbers["captions_per_second"] = round(rate, 1)
    return Result(name, table, suites(name, table, captions, owned, np.array(similarities, np.float64), false, config), numbers)


def _captions(records: pd.DataFrame, which: str) -> list[tuple[str, str]]:
    """Image id and caption, of each caption that says anything, each once for an image."""
    from fast_goal.data.records import captions_of

    texts = zip(records["image_id"], captions_of(records, which), strict=True)
    return list(dict.fromkeys((image, text) for image, several in texts for text in several))


def _similarity() -> Similarity:
    """Cosines by the base's text embeddings."""
    import numpy as np

    from fast_goal.environment import device
    from fast_goal.evaluation.features import FOLDER, FeatureStore
    from fast_goal.model.clip import Clip

    store = FeatureStore(FOLDER, Clip.load(BASE), device(), TEXTS_AT_ONCE)

    def cosines(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        store.add_texts([(text, None) for pair in pairs for text in pair], "negatives")
        found = []
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            part = pairs[start : start + PAIRS_AT_ONCE]
            first, second = (store.texts([pair[side] for pair in part])[0].double().numpy() for side in (0, 1))  # [T, D]
            found.append((first * second).sum(axis=1))
        return np.concatenate(found)

    return cosines


def _context_length(params: Params) -> int:
    """How many tokens the base reads. Raises ModelError where it is not there."""
    path = BASE / "open_clip_config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist. The step `base` writes it: `dvc repro base`.")
    return read_json(path)["model_cfg"]["text_cfg"].get("context_length", params.base.context_length)


def _falsehoods(dataset: Dataset, table: pd.DataFrame) -> list[bool | None] | None:
    """Whether each negative is false of its picture, where the source knows what is in it."""
    from fast_goal.data.sources.scenes.samples import STYLES

    if dataset.source not in STYLES or dataset.objects is None:
        return None
    from fast_goal.data.sources.scenes.truth import falsehoods

    return falsehoods(table["negative"].tolist(), table["image_id"].tolist(), dataset)


def _numbers(
    table: pd.DataFrame,
    captions: pd.DataFrame,
    chosen: Chosen,
    similarities: np.ndarray,
    false: Sequence[bool | None] | None,
    types: Sequence[str],
) -> dict[str, Any]:
    import pandas as pd

    dropped = sum(chosen.dropped, Counter())
    numbers: dict[str, Any] = {
        "captions": len(captions),
        "share_with_negative": float((captions["reason"] == "").mean()),
        "negatives": len(table),
        "per_caption": len(table) / len(captions),
        "share": {kind: float((table["type"] == kind).mean()) if len(table) else 0.0 for kind in types},
        "dropped": dict(sorted(dropped.items())),
        "skipped": {str(reason): int(count) for reason, count in captions["reason"].value_counts().items() if reason},
    }
    if len(table) and not pd.isna(similarities).any():
        numbers["similarity"] = float(similarities.mean())
    if false is not None and len(table):
        judged = pd.Series(["unjudged" if one is None else "false" if one else "true" for one in false], dtype=object)
        groups = {"all": judged, **{kind: judged[(table["type"] == kind).to_numpy()] for kind in types}}
        for word in ("false", "true", "unjudged"):
            numbers[f"share_{word}"] = {kind: float((part == word).mean()) for kind, part in groups.items() if len(part)}
    return numbers


def _flat(numbers: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names such as `share_swap_nouns`."""
    flat: dict[str, float] = {}
    for key, value in numbers.items():
        name = prefix + "".join(letter if letter.isalnum() or letter in "_-." else "_" for letter in key)
        flat |= _flat(value, f"{name}_") if isinstance(value, dict) else {name: float(value)}
    return flat


def _digest(table: pd.DataFrame) -> str:
    """A hash of the values, independent of the parquet writer's version."""
    hasher = hashlib.sha256()
    for row in zip(*(table[name].tolist() for name in table.columns), strict=True):
        hasher.update(json.dumps(row).encode() + b"\n")
    return hasher.hexdigest()[:16]


def _summary(results: Sequence[Result], outcomes: Sequence[Outcome]) -> str:
    failed = [outcome for outcome in outcomes if not outcome.passed]
    lines = ["# Negatives", "", f"{len(outcomes) - len(failed)} of {len(outcomes)} expectations hold.", ""]
    for outcome in failed:
        head, *rest = outcome.lines(len(outcome.examples))
        lines += [f"* {outcome.rule.severity}: {head}", *(f"    * {line}" for line in rest)]
    for result in results:
        numbers = result.numbers
        lines += [
            "",
            f"## {result.name}",
            "",
            f"{numbers['negatives']:,} negatives for {numbers['share_with_negative']:.1%} of {numbers['captions']:,} captions; "
            f"[some of them]({result.name}_sample.md).",
            "",
        ]
        words = [word for word in ("share_false", "share_true", "share_unjudged") if word in numbers]
        lines += ["| type | share |" + "".join(f" {word.removeprefix('share_')} |" for word in words)]
        lines += ["| --- | --- |" + " --- |" * len(words)]
        for kind, share in numbers["share"].items():
            truth = "".join(f" {numbers[word][kind]:.1%} |" if kind in numbers[word] else " |" for word in words)
            lines.append(f"| {kind} | {share:.1%} |{truth}")
        lines += ["", *(f"* left out: {reason}: {count:,}" for reason, count in numbers["dropped"].items())]
        lines += [f"* captions without any: {reason}: {count:,}" for reason, count in numbers["skipped"].items()]
        for suite in result.suites:
            lines += ["", f"### {suite.name} ({len(suite.table):,} rows)", ""]
            lines += ["| expectation | severity | result |", "| --- | --- | --- |"]
            lines += [
                f"| {outcome.rule.title} | {outcome.rule.severity} | {'holds' if outcome.passed else outcome.observed} |"
                for outcome in outcomes
                if outcome.suite == suite.name
            ]
    return "\n".join(lines) + "\n"
