"""What is expected of a table of negatives: the rules that `data/expectations.py` runs, and the columns they look at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from fast_goal.config import NEGATIVE_TYPES, NegativesConfig
from fast_goal.data.caption_checks import language_of, quote, sample_rows
from fast_goal.data.expectations import Rule, Suite
from fast_goal.negatives import Candidate
from fast_goal.negatives.choice import LENGTHS, problem

LANGUAGE_SAMPLE = 2000  # negatives whose language is guessed, which takes a millisecond each
TYPE_SHARE = 0.25  # of its even share of the negatives that each type should have at least; a guess
TRUE_SHARE = 0.05  # of the negatives that may be true, where the source knows; a guess
AGAIN = "remove the row's cause in the generator, or choose stricter settings, and run `dvc repro --force negatives`"
EDITS = ("too few words changed", "too many words changed", "other words")
LENGTH = "much longer or shorter"


def suites(
    name: str,
    table: pd.DataFrame,
    captions: pd.DataFrame,
    true: Mapping[str, Collection[str]],
    similarities: np.ndarray,
    false: Sequence[bool | None] | None,
    config: NegativesConfig,
) -> list[Suite]:
    """The suites of one data set.

    table: rows of NEGATIVES. captions: `image_id`, `caption` and `reason`, empty where there are negatives, of all captions
    that should have some. true: image id -> its captions. similarities: of each row of the table, NaN where they were not
    measured. false: what the source knows of each row, None where it knows nothing.
    """
    columns = table.reset_index(drop=True)[["image_id", "caption", "negative", "type"]].copy()
    columns.insert(0, "row", np.arange(len(columns)))
    pairs = list(zip(columns["image_id"], columns["caption"], columns["negative"], columns["type"], strict=True))
    found = [problem(caption, Candidate(negative, kind), NEGATIVE_TYPES) for _, caption, negative, kind in pairs]
    columns["unchanged"] = _texts([one if one == "the caption itself" else None for one in found])
    columns["length"] = _texts([one if one == LENGTH else None for one in found])
    columns["edit"] = _texts([one if one in EDITS else None for one in found])
    columns["true_caption"] = _texts(
        [f"a caption of the image: {quote(negative)}" if negative in true[image] else None for image, _, negative, _ in pairs]
    )
    sample = sample_rows(len(columns), LANGUAGE_SAMPLE, config.seed)
    columns["language"] = _texts(_other_languages(pairs, sample))
    columns["similarity"] = similarities
    if false is not None:
        columns["true_of_scene"] = _texts(["true of the scene" if one is False else None for one in false])
    shares = columns["type"].value_counts(normalize=True)
    types = pd.DataFrame({"type": config.types, "share": [float(shares.get(kind, 0.0)) for kind in config.types]})
    types.insert(0, "row", np.arange(len(types)))
    texts = captions.reset_index(drop=True)[["image_id", "caption", "reason"]].copy()
    texts.insert(0, "row", np.arange(len(texts)))
    texts["has_negative"] = np.where(texts["reason"] == "", "yes", "no")
    return [
        Suite(f"{name}_negatives", columns, _negatives_rules(config, len(sample), false)),
        Suite(f"{name}_negatives_types", types, [_types_rule(config)]),
        Suite(f"{name}_negatives_captions", texts, [_captions_rule(config)]),
    ]


def _negatives_rules(config: NegativesConfig, looked_at: int, false: Sequence[bool | None] | None) -> list[Rule]:
    shows = ("type", "negative")
    rules = [
        Rule(
            "not_empty",
            "the table has rows",
            "read the reasons in data/negatives/NAME_skipped.parquet and metrics.json",
            "ExpectTableRowCountToBeBetween",
            {"min_value": 1},
        ),
        Rule(
            "types_known",
            f"every type is one of {', '.join(config.types)}",
            AGAIN,
            "ExpectColumnValuesToBeInSet",
            {"column": "type", "value_set": list(config.types)},
            shows=("negative",),
        ),
        Rule(
            "negatives_unique",
            "no caption of an image has a negative twice",
            AGAIN,
            "ExpectCompoundColumnsToBeUnique",
            {"column_list": ["image_id", "caption", "negative"]},
            shows=shows,
        ),
        _none("differs", "every negative differs from its caption", "unchanged", shows),
        _none("not_true", "no negative is another caption of the image", "true_caption", shows),
        _none("length", f"every negative has {LENGTHS[0]:g} to {LENGTHS[1]:g} times the caption's characters", "length", shows),
        _none("edit_size", "as many words differ as the type asks for, and swaps add none", "edit", shows),
        Rule(
            "language",
            f"every negative is in the language of its caption (of a random sample of {looked_at:,})",
            "tell the language model which language to write in, or choose another one",
            "ExpectColumnValuesToBeNull",
            {"column": "language", "mostly": 0.99},
            shows=shows,
            looked_at=looked_at,
        ),
    ]
    if config.max_similarity is not None:
        rules.append(
            Rule(
                "no_paraphrase",
                f"the text embeddings of caption and negative have a cosine of at most {config.max_similarity:g}",
                AGAIN,
                "ExpectColumnValuesToBeBetween",
                {"column": "similarity", "max_value": config.max_similarity},
                shows=shows,
            )
        )
    if false is not None:
        judged = sum(one is not None for one in false)
        rules.append(
            Rule(
                "false_of_scene",
                f"at most {TRUE_SHARE:.0%} of the negatives are true of their scene ({judged:,} of {len(false):,} were judged)",
                "read NAME_sample.md: what do the true ones have in common?",
                "ExpectColumnValuesToBeNull",
                {"column": "true_of_scene", "mostly": 1 - TRUE_SHARE},
                "warning",
                shows=shows,
            )
        )
    return rules


def _types_rule(config: NegativesConfig) -> Rule:
    least = TYPE_SHARE / len(config.types)
    return Rule(
        "share_per_type",
        f"every type has at least {least:.1%} of the negatives",
        "leave the type out of negatives.types, or raise negatives.per_caption",
        "ExpectColumnValuesToBeBetween",
        {"column": "share", "min_value": least},
        "warning",
        shows=("type",),
    )


def _captions_rule(config: NegativesConfig) -> Rule:
    return Rule(
        "captions_with_negatives",
        f"at least {config.min_share:.1%} of the captions have a negative",
        "see data/negatives/NAME_skipped.parquet for the reasons, or lower negatives.min_share",
        "ExpectColumnValuesToBeInSet",
        {"column": "has_negative", "value_set": ["yes"], "mostly": config.min_share},
        shows=("reason", "caption"),
    )


def _none(name: str, title: str, column: str, shows: tuple[str, ...]) -> Rule:
    return Rule(name, title, AGAIN, "ExpectColumnValuesToBeNull", {"column": column}, shows=shows)


def _other_languages(pairs: Sequence[tuple[str, str, str, str]], rows: np.ndarray) -> list[str | None]:
    problems: list[str | None] = [None] * len(pairs)
    for row in rows.tolist():
        _, caption, negative, _ = pairs[row]
        own = language_of(negative)
        if own is not None and own != (language_of(caption) or own):
            problems[row] = f"in {own!r}, the caption in {language_of(caption)!r}"
    return problems


def _texts(values: Sequence[str | None]) -> pd.Series:
    return pd.Series(values, dtype=object)
