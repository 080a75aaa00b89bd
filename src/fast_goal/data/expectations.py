"""The expectations on a data set's tables, run by Great Expectations (`fast-goal validate`).

One suite per table: records, regions, pairs. `records_rules`, `regions_rules` and `pairs_rules` say what is expected of
the columns that `data/quality.py` makes; `check` runs the suites, builds the Data Docs and says which rows fail.
A rule is critical (the pipeline stops) or a warning (it is listed).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fast_goal.config import ValidateConfig
from fast_goal.data.data_docs import Result, make_local
from fast_goal.data.quality import KINDS
from fast_goal.data.records import SPLITS

MAX_WORDS = 2000  # a guess: beyond it, a "caption" is more likely a whole document in the wrong column
COSINE_TOLERANCE = 1e-5  # float32 rounding of the cosine of two unit vectors
EXAMPLES = 10  # failing rows kept for the reports


@dataclass(frozen=True)
class Rule:
    """One expectation: a class of Great Expectations with its arguments, in words, and what to do when it fails.

    `shows`: columns of a failing row to print when its value alone says too little.
    """

    name: str
    title: str
    fix: str
    expectation: str
    arguments: dict[str, Any]
    critical: bool = True
    shows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A table and the rules on it; `name` is `<data set>_<table>`."""

    name: str
    table: pd.DataFrame
    rules: list[Rule]


@dataclass(frozen=True)
class Outcome:
    """What came of one rule. `failing` counts rows (0 for a rule on the whole table); `observed` is in words."""

    suite: str
    rule: Rule
    passed: bool
    rows: int
    failing: int
    observed: str
    examples: list[str] = field(default_factory=list)

    @property
    def critical_failure(self) -> bool:
        """Whether the pipeline must stop."""
        return not self.passed and self.rule.critical

    def lines(self, examples: int) -> list[str]:
        """The outcome as text: what failed, the first rows, the fix."""
        shown = self.examples[:examples]
        more = [f"... and {self.failing - len(shown)} more"] if shown and self.failing > len(shown) else []
        return [f"{self.suite}, {self.rule.name}: {self.rule.title}: {self.observed}", *shown, *more, f"fix: {self.rule.fix}"]


def records_rules(config: ValidateConfig, training: bool, flism: bool, detector_only: bool, long_captions: bool) -> list[Rule]:
    """The rules on records.

    training: the counts, which are given for the training data set, apply. flism: regions and pairs are expected.
    detector_only: an image without a detection then rightly has no region. long_captions: the set has some.
    """
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
        _clean("images_decode", "every image decodes", f"replace the files, then {again}", "undecodable", ("image_path",)),
        _clean("sizes_agree", "the files have the sizes of the table", again, "wrong_size", ("image_path",)),
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
        ),
        _clean(
            "no_validation_image_in_training",
            "no validation image is a training image, by the bytes of its file",
            "remove one of the two copies, or put both into one split",
            "validation_in_training",
            ("image_path",),
            critical=False,
        ),
        Rule(
            "few_skipped",
            f"at most {config.max_skipped:.1%} of the samples are skipped",
            "read the reasons in the data card, mend the samples, or raise validate.max_skipped",
            "ExpectColumnMaxToBeBetween",
            {"column": "skipped_share", "max_value": config.max_skipped},
        ),
    ]
    if long_captions or training:
        rules += _caption_rules(config)
    if training:
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
                critical=not detector_only,
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


def _caption_rules(config: ValidateConfig) -> list[Rule]:
    low, high = config.min_mean_words, config.max_mean_words
    return [
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
            critical=False,
        ),
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


def check(suites: Sequence[Suite], docs: Path, run_name: str = "validate") -> list[Outcome]:
    """Runs the suites and writes the Data Docs, a static site without any remote part, to the folder `docs` (replaced).

    Returns the outcomes in the order of the suites and their rules.
    """
    from fast_goal import environment

    environment.prepare()
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    for site in list(context.variables.data_docs_sites or {}):
        context.delete_data_docs_site(site)
    shutil.rmtree(docs, ignore_errors=True)
    context.add_data_docs_site(
        "data_docs",
        {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.resolve())},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        },
    )
    source = context.data_sources.add_pandas("tables")
    outcomes = []
    for suite in suites:
        expectations = gx.ExpectationSuite(name=suite.name)
        for rule in suite.rules:
            expectations.add_expectation(_expectation(gx, rule))
        batch = source.add_dataframe_asset(suite.name).add_batch_definition_whole_dataframe("all")
        definition = gx.ValidationDefinition(name=suite.name, data=batch, suite=context.suites.add(expectations))
        checkpoint = gx.Checkpoint(
            name=suite.name,
            validation_definitions=[context.validation_definitions.add(definition)],
            result_format={
                "result_format": "COMPLETE",
                "unexpected_index_column_names": ["row", "image_id"],
                "include_unexpected_rows": False,
            },
        )
        run = context.checkpoints.add(checkpoint).run(
            batch_parameters={"dataframe": suite.table}, run_id=gx.RunIdentifier(run_name=run_name)
        )
        (validation,) = run.run_results.values()
        results = {result.expectation_config.meta["name"]: result for result in validation.results}
        outcomes += [_outcome(suite, rule, results[rule.name]) for rule in suite.rules]
    context.build_data_docs()
    make_local(docs, [_result(suite, outcomes) for suite in suites])
    return outcomes


def _result(suite: Suite, outcomes: Sequence[Outcome]) -> Result:
    failed = sum(outcome.suite == suite.name and not outcome.passed for outcome in outcomes)
    return Result(suite.name, len(suite.table), len(suite.rules), failed)


def _clean(name: str, title: str, fix: str, column: str, shows: tuple[str, ...] = (), critical: bool = True) -> Rule:
    """A rule that the problem column `column` is empty."""
    return Rule(name, title, fix, "ExpectColumnValuesToBeNull", {"column": column}, critical, shows)


def _expectation(gx: Any, rule: Rule) -> Any:
    kind = getattr(gx.expectations, rule.expectation)
    return kind(
        **rule.arguments,
        severity="critical" if rule.critical else "warning",
        description=rule.title[0].upper() + rule.title[1:],
        notes=rule.fix,
        meta={"name": rule.name},
    )


def _outcome(suite: Suite, rule: Rule, result: Any) -> Outcome:
    rows, details = len(suite.table), result.result
    if result.success:
        return Outcome(suite.name, rule, True, rows, details.get("unexpected_count") or 0, "")
    if "unexpected_count" in details:
        failing = details["unexpected_count"]
        asked = details["element_count"] - (0 if rule.expectation.endswith("Null") else details.get("missing_count") or 0)
        numbers = [int(place["row"]) for place in (details.get("unexpected_index_list") or [])[:EXAMPLES]]
        examples = [_example(suite.table, rule, number) for number in numbers]
        return Outcome(suite.name, rule, False, rows, failing, f"{failing} of {asked} rows fail", examples)
    if "observed_value" in details:
        value = details["observed_value"]
        observed = "nothing to measure" if value is None else f"found {value:.4g}"
        return Outcome(suite.name, rule, False, rows, 0, observed)
    return Outcome(suite.name, rule, False, rows, 0, f"could not be computed: {_reason(result.exception_info)}")


def _example(table: pd.DataFrame, rule: Rule, number: int) -> str:
    row = table.iloc[number]
    columns = dict.fromkeys(["image_id", *rule.shows])
    place = ", ".join([f"row {number}", *(f"{column} {_plain(row[column])}" for column in columns)])
    column = rule.arguments.get("column")
    if column is None or column in columns:
        return place
    value = row[column]
    return f"{place}: {value}" if rule.expectation.endswith("Null") else f"{place}: {column} {_plain(value)}"


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value.item() if hasattr(value, "item") else value)


def _reason(info: Any) -> str:
    if isinstance(info, Mapping):
        if info.get("exception_message"):
            return str(info["exception_message"])
        for value in info.values():
            if isinstance(value, Mapping) and value.get("exception_message"):
                return str(value["exception_message"])
    return str(info)
