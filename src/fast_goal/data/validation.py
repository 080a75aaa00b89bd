"""Everything that is examined in one data set, put together: tables of problems, the rules on them, and notes on what
was looked at. No model here: the step `validate` measures the cosines and passes them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fast_goal.config import ValidateConfig
from fast_goal.data import quality, rules
from fast_goal.data.caption_checks import CaptionLengths, caption_columns, caption_lengths, count_words, texts_of
from fast_goal.data.expectations import Suite
from fast_goal.data.near_duplicates import near_duplicates
from fast_goal.data.quality import Subject
from fast_goal.data.records import Dataset

# Mean image-caption cosine of 1,000 random pairs, FAST-GOAL, Table I; the model is Long-CLIP ViT-L/14.
PUBLISHED_COSINES = {"GLIT100k": 0.2434, "DOCCI": 0.2448}
PUBLISHED_WITH = "Long-CLIP ViT-L/14"


@dataclass(frozen=True)
class Base:
    """What is known of the model to be trained: its name, its input's side in pixels, its context in tokens."""

    name: str
    image_size: int
    context_length: int


@dataclass(frozen=True)
class Cosines:
    """Image-caption cosines of a random sample of pairs. rows [N]: in the records; own [N]: with the image's own caption;
    others [N]: mean with the other captions of the sample, which is what a random permutation gives on average."""

    model: str
    rows: np.ndarray
    own: np.ndarray
    others: np.ndarray


@dataclass(frozen=True)
class Settings:
    """What the checks of every data set share. trained_on: the training data set, and another one that is trained on before
    it; top_k: pairs that FLISM keeps of an image; base: None where it is not known."""

    config: ValidateConfig
    trained_on: Sequence[Dataset]
    detector_only: bool
    top_k: int
    base: Base | None


@dataclass(frozen=True)
class Findings:
    """What was found in one data set. notes: what was looked at, in sentences. `near` as `near_duplicates` returns it, with the
    column `origin`, or None: a row of `where` = training speaks of the data set of that name in `near_origins`."""

    subject: Subject
    suites: list[Suite]
    lengths: CaptionLengths
    notes: list[str]
    near: pd.DataFrame | None
    near_origins: dict[str, Dataset]
    cosines: Cosines | None
    facts: pd.DataFrame


def examine(subject: Subject, images: pd.DataFrame, settings: Settings, cosines: Cosines | None) -> Findings:
    """Builds the tables and the rules; `images` comes from `quality.inspect_images`."""
    config, records = settings.config, subject.dataset.records
    origins = {data.name: data for data in settings.trained_on}
    words = count_words(texts_of(records))
    context_length = settings.base.context_length if settings.base else None
    lengths = caption_lengths(records, config.caption_sample, config.seed, words, context_length)
    near = _near(subject.dataset, settings.trained_on, config.near_duplicate_bits)
    image_size = settings.base.image_size if settings.base else None
    table = quality.records_table(subject, images, settings.trained_on, words)
    parts = [
        quality.outlier_columns(records, config.max_aspect, image_size),
        quality.fact_columns(subject, settings.top_k),
    ]
    if subject.needs_long_captions:
        parts.append(caption_columns(records, lengths, config.language))
    table = pd.concat([table, *parts], axis=1)
    if near is not None:
        table = table.join(near_columns(table, near, origins))

    decoded, tokens = int(images["decoded"].sum()), len(lengths.tokens)
    seen = rules.Seen(
        decoded=decoded if decoded < len(records) else None,
        captions=tokens if tokens < len(lengths.words) else None,
        context_length=context_length,
    )
    made = [
        *rules.records_rules(
            config,
            counted=subject.name == settings.trained_on[0].name,
            flism=subject.regions is not None,
            detector_only=settings.detector_only,
            long_captions=subject.needs_long_captions,
            seen=seen,
            benchmark=subject.dataset.choices is not None and subject.name not in origins,
        ),
        *rules.optional_rules(table, config, image_size),
    ]
    suites = [Suite(f"{subject.name}_records", table, made)]
    facts = quality.facts_table(subject.dataset, words)
    if len(facts):
        suites.append(Suite(f"{subject.name}_facts", facts, rules.facts_rules()))
    if cosines is not None:
        suites.append(Suite(f"{subject.name}_cosines", _cosines_table(records, cosines), rules.cosines_rules()))
    if subject.regions is not None:
        suites.append(Suite(f"{subject.name}_regions", quality.regions_table(subject), rules.regions_rules()))
        suites.append(Suite(f"{subject.name}_pairs", quality.pairs_table(subject), rules.pairs_rules()))
    notes = _notes(subject, settings, lengths, decoded, near, cosines)
    return Findings(subject, suites, lengths, notes, near, origins, cosines, facts)


def _near(dataset: Dataset, trained_on: Sequence[Dataset], bits: int) -> pd.DataFrame | None:
    """The nearest near-duplicates among all training images, with the column `origin`; None without perceptual hashes."""
    hashed = [data for data in trained_on if data.hashes is not None]
    if dataset.hashes is None or not hashed:
        return None
    learned = dataset.name in [data.name for data in trained_on]
    parts = [near_duplicates(dataset, data, bits, learned).assign(origin=data.name) for data in hashed]
    order = ["where", "row", "distance"]
    return pd.concat(parts).sort_values(order, kind="stable").drop_duplicates(["where", "row"], ignore_index=True)


def near_columns(table: pd.DataFrame, near: pd.DataFrame, origins: Mapping[str, Dataset]) -> pd.DataFrame:
    """`near_training` and `near_in_split`: the near-duplicates in words, for the rows of the records table. A held-out
    image that is a training image by its id or its bytes has its own finding."""
    known = table[["id_in_training", "bytes_in_training", "validation_in_training"]].notna().any(axis=1).to_numpy()
    own_ids = table["image_id"].to_numpy()
    columns = {name: np.full(len(table), None, dtype=object) for name in ("near_training", "near_in_split")}
    seen = {name: (data.records["image_id"].to_numpy(), data.records["split"].to_numpy()) for name, data in origins.items()}
    links = near[["row", "where", "other", "distance", "origin"]]
    for row, where, other, distance, origin in links.itertuples(index=False, name=None):
        bits = f"{distance} bits from" if distance else "the same perceptual hash as"
        if where == "split":
            columns["near_in_split"][row] = f"{bits} image {own_ids[other]!r} (row {other})"
        elif not known[row]:
            ids, splits = seen[origin]
            name = f"image {ids[other]!r} of split {splits[other]} of {origin} (row {other})"
            columns["near_training"][row] = f"{bits} {name}"
    return pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in columns.items()})


def _cosines_table(records: pd.DataFrame, cosines: Cosines) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "row": cosines.rows,
            "image_id": records["image_id"].to_numpy()[cosines.rows],
            "own_caption": cosines.own,
            "other_captions": cosines.others,
            "margin": cosines.own - cosines.others,
        }
    )


def cosine_sentence(cosines: Cosines) -> str:
    """The caption quality in words, with the published figures beside it."""
    published = " and ".join(f"{value} for {name}" for name, value in PUBLISHED_COSINES.items())
    return (
        f"Mean image-caption cosine of {len(cosines.rows):,} random pairs with the base {cosines.model}: "
        f"{cosines.own.mean():.4f}, and {cosines.others.mean():.4f} where the captions are shuffled. Published are "
        f"{published}, with {PUBLISHED_WITH}: comparable only with cosines of that same model."
    )


def _notes(
    subject: Subject,
    settings: Settings,
    lengths: CaptionLengths,
    decoded: int,
    near: pd.DataFrame | None,
    cosines: Cosines | None,
) -> list[str]:
    images, captions, tokens = len(subject.dataset.records), len(lengths.words), len(lengths.tokens)
    notes = [
        f"Every file was looked up; {_of(decoded, images, 'images')} decoded in full.",
        *([] if not captions else [f"Tokens and language of {_of(tokens, captions, 'long captions')} looked at."]),
    ]
    if tokens:
        notes.append(f"Of these captions {lengths.beyond()}, start and end included.")
    without = dict.fromkeys(data.name for data in (subject.dataset, *settings.trained_on) if data.hashes is None)
    if without:
        where = "" if near is None else f" in {' and '.join(without)}"
        notes.append(f"Near-duplicates were not looked for{where}: {' and '.join(without)} has no perceptual hashes.")
    if near is not None:
        hashed = len(set(subject.dataset.hashes["image_id"]) & set(subject.dataset.records["image_id"]))
        found = near["where"].value_counts()
        notes.append(
            f"Perceptual hashes of {hashed:,} of {images:,} images were compared, at most "
            f"{settings.config.near_duplicate_bits} of 64 bits apart: {found.get('training', 0):,} held-out images like a "
            f"training image, {found.get('split', 0):,} "
            "like another one of their split."
        )
    if cosines is not None:
        notes.append(cosine_sentence(cosines))
    return notes


def _of(part: int, whole: int, things: str) -> str:
    return f"all {whole:,} {things} were" if part == whole else f"a random {part:,} of the {whole:,} {things} were"


def suites_of(findings: Sequence[Findings]) -> list[Suite]:
    """All suites, in order."""
    return [suite for found in findings for suite in found.suites]
