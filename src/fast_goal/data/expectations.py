"""The expectations on a data set's tables, run by Great Expectations (`fast-goal validate`).

One suite per table; `data/rules.py` says what is expected. `check` runs the suites, builds the Data Docs and says which
rows fail. A rule is `critical` (the pipeline stops), a `warning` (somebody should look) or `info` (worth knowing).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fast_goal.data.data_docs import Result, make_local
from fast_goal.errors import ValidationError

Severity = Literal["critical", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")  # the worst first; the words of Great Expectations
EXAMPLES = 10  # failing rows kept for the reports
EXAMPLES_SHOWN = 3  # of them in an error message
COMPLETE_ROWS = 50_000  # a table of more has 20 failing rows in the Data Docs: listing 150,000 takes Great Expectations 20 s


@dataclass(frozen=True)
class Rule:
    """One expectation: a class of Great Expectations with its arguments, in words, and what to do when it fails.

    `shows`: columns of a failing row to print when its value alone says too little. `looked_at`: the rows the rule could
    see, where those are a sample.
    """

    name: str
    title: str
    fix: str
    expectation: str
    arguments: dict[str, Any]
    severity: Severity = "critical"
    shows: tuple[str, ...] = ()
    looked_at: int | None = None


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
        return not self.passed and self.rule.severity == "critical"

    def lines(self, examples: int) -> list[str]:
        """The outcome as text: what failed, the first rows, the fix."""
        shown = self.examples[:examples]
        more = [f"... and {self.failing - len(shown)} more"] if shown and self.failing > len(shown) else []
        return [f"{self.suite}, {self.rule.name}: {self.rule.title}: {self.observed}", *shown, *more, f"fix: {self.rule.fix}"]


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
            result_format=_result_format(suite.table),
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


def stop_on_failure(outcomes: Sequence[Outcome], summary: Path, docs: Path) -> None:
    """Raises ValidationError where critical rules failed, with the first rows of each. summary, docs: the reports, to name."""
    failures = [outcome for outcome in outcomes if outcome.critical_failure]
    if not failures:
        return
    count = f"{len(failures)} critical expectation{'s' if len(failures) > 1 else ''} failed"
    lines = [f"{count}; {summary} lists more rows, {docs / 'index.html'} shows all."]
    for outcome in failures:
        head, *rest = outcome.lines(EXAMPLES_SHOWN)
        lines += [head, *(f"    {line}" for line in rest)]
    raise ValidationError("\n".join(lines))


def _result(suite: Suite, outcomes: Sequence[Outcome]) -> Result:
    failed = [outcome.rule.severity for outcome in outcomes if outcome.suite == suite.name and not outcome.passed]
    return Result(suite.name, len(suite.table), len(suite.rules), len(failed), noted=failed.count("info"))


def _result_format(table: pd.DataFrame) -> dict[str, Any]:
    if len(table) > COMPLETE_ROWS:
        return {"result_format": "SUMMARY"}
    columns = [name for name in ("row", "image_id") if name in table]
    return {"result_format": "COMPLETE", "unexpected_index_column_names": columns, "include_unexpected_rows": False}


def _expectation(gx: Any, rule: Rule) -> Any:
    kind = getattr(gx.expectations, rule.expectation)
    return kind(
        **rule.arguments,
        severity=rule.severity,
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
        places = details.get("unexpected_index_list") or details.get("partial_unexpected_index_list") or []
        numbers = [int(place["row"] if isinstance(place, Mapping) else place) for place in places[:EXAMPLES]]
        examples = [_example(suite.table, rule, number) for number in numbers]
        asked = asked if rule.looked_at is None else rule.looked_at
        return Outcome(suite.name, rule, False, rows, failing, f"{failing} of {asked} rows fail", examples)
    if "observed_value" in details:
        value = details["observed_value"]
        observed = "nothing to measure" if value is None else f"found {value:.4g}"
        return Outcome(suite.name, rule, False, rows, 0, observed)
    return Outcome(suite.name, rule, False, rows, 0, f"could not be computed: {_reason(result.exception_info)}")


def _example(table: pd.DataFrame, rule: Rule, number: int) -> str:
    row = table.iloc[number]
    columns = [column for column in dict.fromkeys(["image_id", *rule.shows]) if column in table]
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
