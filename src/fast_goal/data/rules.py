"""What is expected of a data set's tables: the rules that `data/expectations.py` runs on the columns of `data/quality.py`.

A rule on a column that a table does not have (no perceptual hashes, no published facts) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from fast_goal.config import ValidateConfig
from fast_goal.data.caption_checks import REPEATED, SAME_CAPTION
from fast_goal.data.expectations import Rule, Severity
from fast_goal.data.quality import KINDS, MEAN_TOLERANCE, SHORT_SPLIT
from fast_goal.data.records import SPLITS

MAX_WORDS = 2000  # a guess: beyond it, a "caption" is more likely a whole document in the wrong column
COSINE_TOLERANCE = 1e-5  # float32 rounding of the cosine of two unit vectors


@dataclass(frozen=True)
class Seen:
    """What could be looked at. decoded and captions: the size of the sample, None where all were; context_length: of the
    text encoder, None where the base is not known."""

    decoded: int | None = None
    captions: int | None = None
    context_length: int | None = None


def records_rules(
    config: ValidateConfig,
    counted: bool,
    flism: bool,
    detector_only: bool,
    long_captions: bool,
    seen: Seen,
    benchmark: bool = False,
) -> list[Rule]:
    """The rules on records.

    counted: the counts, which are given for one data set, apply. flism: regions and pairs are expected. detector_only: an
    image without a detection then rightly has no region. long_captions: the set has some, or should. benchmark: its images
    are shown with texts of its own to choose from; VALSE has images of COCO's training split, so that a copy is a warning.
    """
    decoded = "" if seen.decoded is None else f" of a random sample of {seen.decoded:,}"
    again = "run `dvc repro --force download` to make the records again from the files as they are now"
    rules = [
        Rule(
            "not_empty",
            "the table has rows",
            "check the paths and columns of the data set in params.yaml and the reasons in data/records/<name>_skipped.parquet",
            "ExpectTableRowCountToBeBetween",
            {"min_value": 1},
        ),
        Rule(
            "ids_unique",
            "image ids are unique",
            "give every image its own id in the caption table, or leave the id column out",
            "ExpectColumnValuesToBeUnique",
            {"column": "image_id"},
            shows=("image_path", "split"),
        ),
        _clean("files_exist", "every image file exists", f"restore the files, or {again}", "missing_file"),
        _clean(
            "images_decode",
            f"every image{decoded} decodes" if seen.decoded != 0 else "no image file is empty (none is decoded)",
            f"replace the files, then {again}",
            "undecodable",
            ("image_path",),
            looked_at=seen.decoded,
        ),
        _clean(
            "sizes_agree",
            f"every image{decoded} has the size of the table",
            again,
            "wrong_size",
            ("image_path",),
            looked_at=seen.decoded,
        ),
        Rule(
            "splits_known",
            f"every split is one of {', '.join(SPLITS)}",
            "correct the split column of the caption table",
            "ExpectColumnValuesToBeInSet",
            {"column": "split", "value_set": list(SPLITS)},
        ),
        _clean(
            "no_test_id_in_training",
            "no test image is a training image, by id",
            "keep the image in one split only",
            "id_in_training",
        ),
        _clean(
            "no_test_image_in_training",
            "no test image is a training image, by the bytes of its file",
            "remove one of the two copies, or put both into one split",
            "bytes_in_training",
            ("image_path",),
            severity="warning" if benchmark else "critical",
        ),
        _clean(
            "no_validation_image_in_training",
            "no validation image is a training image, by the bytes of its file",
            "remove one of the two copies, or put both into one split",
            "validation_in_training",
            ("image_path",),
            severity="warning",
        ),
        Rule(
            "few_skipped",
            f"at most {config.max_skipped:.1%} of the samples are skipped",
            "read the reasons in the data card, mend the samples, or raise validate.max_skipped",
            "ExpectColumnMaxToBeBetween",
            {"column": "skipped_share", "max_value": config.max_skipped},
        ),
    ]
    if long_captions:
        rules += _caption_rules(config, seen)
    if counted:
        rules += [
            Rule(
                f"count_{split}",
                f"split {split} has {count} images",
                f"complete the data set, or correct validate.expected_counts.{split}",
                "ExpectTableRowCountToEqual",
                {"value": count, "row_condition": f"split=={split!r}", "condition_parser": "pandas"},
            )
            for split, count in config.expected_counts.items()
        ]
    if flism:
        rules += [
            _clean(
                "regions_present",
                "every image FLISM was asked for has regions",
                "run `dvc repro --force flism`" + (", or set flism.regions=both" if detector_only else ""),
                "no_regions",
                ("split",),
                severity="warning" if detector_only else "critical",
            ),
            Rule(
                "pairs_present",
                f"at least {config.min_pairs:.1%} of the images FLISM was asked for have a pair",
                "see data/flism/<name>/skipped.parquet for the reasons, or lower validate.min_pairs",
                "ExpectColumnValuesToBeInSet",
                {"column": "has_pair", "value_set": ["yes"], "mostly": config.min_pairs},
                shows=("split",),
            ),
        ]
    return rules


def _caption_rules(config: ValidateConfig, seen: Seen) -> list[Rule]:
    low, high = config.min_mean_words, config.max_mean_words
    sampled = "" if seen.captions is None else f", in a random sample of {seen.captions:,}"
    rewrite = "write or generate the caption anew, or remove the image from the caption table"
    rules = [
        _clean(
            "long_captions_present",
            "every image of train, val and test has a long caption",
            "give the image a caption, or remove its rows from the caption table",
            "no_long_caption",
            ("split",),
        ),
        Rule(
            "mean_words",
            f"long captions have {low:g} to {high:g} words on average",
            "check that the column long_caption holds the captions, or change validate.min_mean_words and max_mean_words",
            "ExpectColumnMeanToBeBetween",
            {"column": "long_words", "min_value": low, "max_value": high},
        ),
        Rule(
            "max_words",
            f"no long caption has more than {MAX_WORDS} words",
            "shorten it: what lies beyond the context of the text encoder is cut off and teaches nothing",
            "ExpectColumnValuesToBeBetween",
            {"column": "long_words", "max_value": MAX_WORDS},
            "warning",
        ),
        _clean("no_refusals", "no long caption is a captioner's refusal or apology", rewrite, "refusal", severity="warning"),
        _clean("no_leaked_prompts", "no long caption repeats its instruction", rewrite, "leaked_prompt", severity="warning"),
        _clean(
            "no_repeated_sentences",
            f"no long caption says a sentence of {REPEATED} characters or more twice",
            f"{rewrite}; a captioner repeats itself when its repetition penalty is too low",
            "repeated_sentence",
            severity="warning",
        ),
        _clean(
            "captions_not_shared",
            f"no long caption belongs to {SAME_CAPTION} images or more",
            f"{rewrite}; check that the caption table was joined to the right images",
            "shared_caption",
            severity="warning",
        ),
        _clean(
            "no_markup",
            "no long caption has markup, control characters or a broken encoding",
            "clean the captions: CLIP reads every character",
            "markup",
            severity="warning",
        ),
        _clean(
            "captions_finished",
            "every long caption ends like a sentence",
            "raise the captioner's limit of new tokens, or add the full stop",
            "unfinished",
            severity="info",
        ),
    ]
    if config.language is not None:
        rules.append(
            _clean(
                "language",
                f"every long caption is in the language {config.language!r}{sampled}",
                "translate the caption or remove it; validate.language=null switches this off",
                "other_language",
                severity="warning",
                looked_at=seen.captions,
            )
        )
    if seen.context_length is not None:
        rules.append(
            Rule(
                "captions_fit",
                f"at most {config.max_cut_off:.1%} of the long captions have more than the {seen.context_length} tokens of the "
                f"text encoder{sampled}",
                "raise base.context_length, shorten the captions, or raise validate.max_cut_off",
                "ExpectColumnValuesToBeBetween",
                {"column": "long_tokens", "max_value": seen.context_length, "mostly": 1 - config.max_cut_off},
                "warning",
                looked_at=seen.captions,
            )
        )
    return rules


def optional_rules(table: pd.DataFrame, config: ValidateConfig, image_size: int | None) -> list[Rule]:
    """The rules on columns of records that only some data sets have: short captions that are trained on, published facts,
    outliers, near-duplicates."""
    look = "look at the pictures in the data card"
    rules = [
        _clean(
            "short_captions_present",
            f"every image of {SHORT_SPLIT} has a short caption",
            "give the image a caption, or remove it from the split; finetune.captions=long trains on long ones",
            "no_short_caption",
            ("split",),
        ),
        _clean(
            "published_captions",
            "every image has the published number of short captions",
            "complete the download (`dvc repro --force download`), or correct the section facts of the data set",
            "wrong_captions",
            ("split",),
        ),
        _clean(
            "published_pairs",
            "every image FLISM was asked for has the published number of local pairs",
            "run `dvc repro --force flism`, or correct the section facts of the data set",
            "wrong_pairs",
            ("split",),
        ),
        _clean(
            "not_small",
            f"no side of an image is below the {image_size} pixels of the model's input",
            "use larger originals: detail that is not there cannot be learnt",
            "small_image",
            ("image_path",),
            "info",
        ),
        _clean(
            "not_long",
            f"no side of an image is more than {config.max_aspect:g} times the other",
            "crop the image or remove it: the model's square view shows a small part of it; or raise validate.max_aspect",
            "long_shape",
            ("image_path",),
            "warning",
        ),
        _clean(
            "usual_area",
            "no image is far larger or smaller than the others",
            "check that it is a photograph of the set and no thumbnail, icon or panorama",
            "odd_area",
            ("image_path",),
            "info",
        ),
        _clean(
            "no_near_duplicate_in_training",
            f"no held-out image looks like a training image (perceptual hashes differ in more than "
            f"{config.near_duplicate_bits} of 64 bits)",
            f"{look}; put both into one split, or remove one of them",
            "near_training",
            ("image_path",),
            "warning",
        ),
        _clean(
            "no_near_duplicate_in_split",
            f"no image looks like another one of its split (perceptual hashes differ in more than "
            f"{config.near_duplicate_bits} of 64 bits)",
            f"{look}; copies are learnt twice, and in retrieval they compete",
            "near_in_split",
            ("image_path",),
            "info",
        ),
    ]
    return [rule for rule in rules if rule.arguments["column"] in table]


def facts_rules() -> list[Rule]:
    """The rules on what is published about the data set as a whole."""
    return [
        _clean(
            "published_counts",
            "the splits have the published numbers of samples",
            "complete the download (`dvc repro --force download`), or correct the section facts of the data set",
            "wrong_count",
            ("fact",),
        ),
        _clean(
            "published_mean_words",
            f"the long captions have the published mean number of words, within {MEAN_TOLERANCE:.0%}",
            "check that the long captions are those of the publication",
            "wrong_mean",
            ("fact",),
            "warning",
        ),
    ]


def cosines_rules() -> list[Rule]:
    """The rule on the sampled image-caption cosines."""
    return [
        Rule(
            "captions_fit_images",
            "an image's own caption is closer to it than the others of the sample, on average",
            "check that images and captions were not mixed up, and that the base is no untrained model",
            "ExpectColumnMeanToBeBetween",
            {"column": "margin", "min_value": 0.0, "strict_min": True},
            "warning",
        )
    ]


def regions_rules() -> list[Rule]:
    """The rules on regions."""
    again = "run `dvc repro --force flism`"
    return [
        Rule("not_empty", "the table has rows", again, "ExpectTableRowCountToBeBetween", {"min_value": 1}),
        _clean("values_complete", "no value is missing", again, "incomplete", ("region_index",)),
        _clean("images_known", "every region belongs to an image of the records", again, "unknown_image", ("region_index",)),
        Rule(
            "indices_unique",
            "region_index is unique within an image",
            again,
            "ExpectCompoundColumnsToBeUnique",
            {"column_list": ["image_id", "region_index"]},
            shows=("region_index",),
        ),
        _clean("boxes_inside", "every box lies inside its image", again, "outside", ("region_index",)),
        _clean("areas_positive", "every box has a positive area", again, "no_area", ("region_index",)),
        Rule(
            "kinds_known",
            f"every kind is one of {', '.join(KINDS)}",
            again,
            "ExpectColumnValuesToBeInSet",
            {"column": "kind", "value_set": list(KINDS)},
            shows=("region_index",),
        ),
        Rule(
            "scores_in_range",
            "every score lies in [0, 1]",
            again,
            "ExpectColumnValuesToBeBetween",
            {"column": "score", "min_value": 0.0, "max_value": 1.0},
            shows=("region_index",),
        ),
    ]


def pairs_rules() -> list[Rule]:
    """The rules on pairs."""
    again = "run `dvc repro --force flism`"
    return [
        Rule("not_empty", "the table has rows", again, "ExpectTableRowCountToBeBetween", {"min_value": 1}),
        _clean("values_complete", "no value is missing", again, "incomplete", ("rank",)),
        _clean("images_known", "every pair belongs to an image of the records", again, "unknown_image", ("rank",)),
        _clean("sentences_are_spans", "every sentence is its span of the long caption", again, "not_the_span", ("rank",)),
        Rule(
            "similarities_in_range",
            "every similarity lies in [-1, 1]",
            again,
            "ExpectColumnValuesToBeBetween",
            {"column": "similarity", "min_value": -1 - COSINE_TOLERANCE, "max_value": 1 + COSINE_TOLERANCE},
            shows=("rank",),
        ),
        _clean("one_best", "every image with pairs has exactly one of rank 1", again, "not_one_best", ("rank",)),
        _clean("ranks_contiguous", "the ranks of an image count up from 1", again, "rank_gap"),
        _clean("boxes_of_regions", "every pair has the box and the kind of its region", again, "not_the_region", ("rank",)),
    ]


def _clean(
    name: str,
    title: str,
    fix: str,
    column: str,
    shows: tuple[str, ...] = (),
    severity: Severity = "critical",
    looked_at: int | None = None,
) -> Rule:
    """A rule that the problem column `column` is empty."""
    return Rule(name, title, fix, "ExpectColumnValuesToBeNull", {"column": column}, severity, shows, looked_at)
