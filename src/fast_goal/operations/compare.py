"""`fast-goal compare`: in what recorded runs differ.

    fast-goal compare latest~1 latest
    fast-goal compare models:/fast-goal@champion 1a2b3c4d --format md

Only what differs is printed: parameters, metrics with the difference from the first run, commit and digests. `--all` prints
what is equal too, and the load of the machine. What some of the runs lack (an objective's own terms, a task of some models
alone) stands in tables of its own; so does what a model with text-conditioned pooling was asked in each of its modes, beside
what the others were asked in theirs, which is `global`.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fast_goal.errors import FastGoalError
from fast_goal.evaluation.headline import MODES
from fast_goal.tracking.lookup import Recorded, read_runs

if TYPE_CHECKING:
    from rich.table import Table

FACTS = {"git_commit": "commit", "git_dirty": "uncommitted changes", "dvc_lock": "dvc.lock", "experiment": "experiment"}
HIDDEN = "system/"  # metrics: the load of the machine
# Words at the end of a metric's name, or of one of its parts, by which of two values is better.
HIGHER = re.compile(
    r"(^|[._])(R(_at_)?\d+|hit(_at_)?\d+|mAP(_at_)?\d+|mrr|accuracy(_at_)?\d*|macro|mIoU|IoU|samples_per_second)([._]|$)"
)
LOSS = re.compile(r"^finetune\.(.+[._])?loss$")  # of another objective it is another measure
LOWER = re.compile(
    r"(^|[._])(loss|global|local|tsl_image|tsl_text|igc|tgc|distillation|tcs|mps|rank|seconds|seconds_total|memory_gb|skipped|drop)"
    r"([._]|$)"
)
PIPED_WIDTH = 10_000  # nothing is wrapped that a program may read


@dataclass(frozen=True)
class Row:
    """One name, and its value in each run; None where a run lacks it."""

    name: str
    values: tuple[Any, ...]
    judged: bool = True  # False: of a metric that measures something else in each run

    @property
    def differs(self) -> bool:
        return any(value != self.values[0] for value in self.values)

    @property
    def complete(self) -> bool:
        return None not in self.values


@dataclass(frozen=True)
class Comparison:
    """What runs have, in the order in which they were named."""

    runs: Sequence[Recorded]
    about: list[Row]
    datasets: list[Row]
    params: list[Row]
    metrics: list[Row]


def run(words: Sequence[str], everything: bool = False, format: str = "text") -> str:
    """The comparison as text, Markdown (`md`) or JSON. Raises FastGoalError for fewer than two runs, or an unknown one."""
    if len(words) < 2:
        raise FastGoalError(
            "Name two or more runs: an id, the beginning of one, a name, latest, latest~1 or models:/NAME@ALIAS."
        )
    found = compare(read_runs(words), everything)
    return {"text": as_text, "md": as_markdown, "json": as_json}[format](found)


def view() -> str:
    """The addresses of the saved views of MLflow's page, which are made where they are missing."""
    from fast_goal.config import load_params
    from fast_goal.tracking.server import connect
    from fast_goal.tracking.views import save_views

    addresses = save_views(*connect(), load_params())
    return "\n".join(f"{name}: {address}" for name, address in addresses.items())


def compare(runs: Sequence[Recorded], everything: bool = False) -> Comparison:
    """What differs between the runs, or all that they have."""

    def rows(get: Callable[[Recorded], dict[str, Any]]) -> list[Row]:
        names = sorted({name for one in runs for name in get(one)})
        made = [Row(name, tuple(get(one).get(name) for one in runs)) for name in names]
        return [row for row in made if everything or row.differs]

    def metrics(one: Recorded) -> dict[str, float]:
        return {name: value for name, value in one.metrics.items() if everything or HIDDEN not in name}

    def facts(one: Recorded) -> dict[str, Any]:
        told = {title: one.tags.get(tag) for tag, title in FACTS.items()}
        objective = one.tags.get("objective") or one.params.get("objective.name")  # runs of before have no such tag
        return {"objective": objective, **told, "status": one.status}

    about = sorted(rows(facts), key=lambda row: row.name != "objective")
    found = rows(metrics)
    if len({frozenset(_objective(one)) for one in runs}) > 1:
        found = [replace(row, judged=LOSS.search(row.name) is None) for row in found]
    return Comparison(runs, about, rows(lambda one: one.datasets), rows(lambda one: one.params), found)


def _objective(run: Recorded) -> list[tuple[str, Any]]:
    """What fine-tuning made small."""
    return [(name, value) for name, value in run.params.items() if name.startswith("objective.")]


def by_mode(found: Comparison) -> dict[str, dict[int, dict[str, float]]]:
    """What runs were asked in their modes: by what was measured, run (its place) and mode.

    The metrics are those of the task `conditioned`; a run without them has those of the plain tasks, as `global`.
    """
    asked: dict[str, dict[int, dict[str, float]]] = {}
    for place, one in enumerate(found.runs):
        for name, value in one.metrics.items():
            if (told := _mode_of(name)) is not None:
                asked.setdefault(told[0], {}).setdefault(place, {})[told[1]] = value
    for what, runs in asked.items():
        data, _, rest = what.partition(".")
        task, _, rest = rest.partition(".")
        for place, one in enumerate(found.runs):
            plain = one.metrics.get(f"{data}.{task}.finetuned.{rest}")
            if place not in runs and plain is not None:
                runs[place] = {"global": plain}
    return asked


def _mode_of(name: str) -> tuple[str, str] | None:
    """What a metric of the task `conditioned` measures, without task and model, and its mode; None for any other."""
    data, task, *rest = [*name.split("."), ""]
    modes = [part for part in rest if part in MODES]
    if task != "conditioned" or not modes:
        return None
    return ".".join(part for part in (data, *rest) if part and part not in (modes[0], "finetuned")), modes[0]


def direction(name: str) -> str | None:
    """Which values of a metric are better, `higher` or `lower`; None where the name does not say."""
    if (told := _mode_of(name)) is not None:
        return direction(told[0])  # `global` is a mode there, not a loss
    if LOWER.search(name):
        return "lower"
    return "higher" if HIGHER.search(name) else None


def difference(row: Row, index: int) -> tuple[float | None, str]:
    """Of a metric's value in a run from that in the first, and `better`, `worse` or nothing."""
    first, other = row.values[0], row.values[index]
    if first is None or other is None:
        return None, ""
    gap, good = other - first, direction(row.name) if row.judged else None
    if not math.isfinite(gap) or gap == 0 or good is None:
        return gap, ""
    return gap, "better" if (gap > 0) == (good == "higher") else "worse"


def as_json(found: Comparison) -> str:
    """The comparison as JSON: lists have one entry for each run, null where it lacks the name."""
    made = {
        "runs": [
            {"id": one.id, "name": one.name, "status": one.status, "started": one.started.isoformat(), "seconds": one.seconds}
            for one in found.runs
        ],
        **{part: {row.name: row.values for row in getattr(found, part)} for part in ("about", "datasets", "params")},
        "metrics": {
            row.name: {
                "values": [_finite(value) for value in row.values],
                "differences": [_finite(difference(row, index)[0]) for index in range(len(row.values))],
                "better": direction(row.name) if row.judged else None,
            }
            for row in found.metrics
        },
    }
    return json.dumps(made, indent=2, allow_nan=False)


def as_markdown(found: Comparison) -> str:
    """The comparison as Markdown tables."""
    parts = []
    for title, header, body in _tables(found):
        lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in [header, ["---"] * len(header), *body]]
        parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join([*parts, *_silent(found)])


def as_text(found: Comparison) -> str:
    """The comparison as aligned text; with colours and wrapped where it goes to a terminal."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, no_color=not terminal, width=None if terminal else PIPED_WIDTH)
    for number, (title, header, body) in enumerate(_tables(found)):
        if number:
            console.print()
        console.print(title, style="bold", markup=False, highlight=False)
        console.print(_rich(header, body))
    for sentence in _silent(found):
        console.print(f"\n{sentence}", markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _rich(header: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    colours = {"better": "green", "worse": "red"}
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in header:
        table.add_column(Text(title), overflow="fold")
    for row in body:
        table.add_row(*(Text(cell, style=colours.get(cell.split(" ")[-1], "")) for cell in row))
    return table


def _tables(found: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each table that has any."""
    names = [f"{one.name} ({one.id[:8]})" for one in found.runs]
    started = ["started", *(f"{one.started:%Y-%m-%d %H:%M} UTC" for one in found.runs)]
    took = ["took", *("" if one.seconds is None else f"{one.seconds:,.0f} s" for one in found.runs)]
    made = [("Runs", ["", *names], [started, took, *([row.name, *map(_text, row.values)] for row in found.about)])]
    parts = [
        ("Data sets", found.datasets),
        ("Parameters", [row for row in found.params if row.complete]),
        ("Parameters that not every run has", [row for row in found.params if not row.complete]),
    ]
    for title, rows in parts:
        if rows:
            made.append((title, ["", *names], [[row.name, *map(_text, row.values)] for row in rows]))
    if asked := by_mode(found):
        made.append(("Ways of asking", *_mode_table(asked, names)))
    complete = [row for row in found.metrics if row.complete]
    if complete:
        later = [cell for name in names[1:] for cell in (name, "difference")]
        made.append(("Metrics", ["", names[0], *later], [_metric(row) for row in complete]))
    others = [row for row in found.metrics if not row.complete and _mode_of(row.name) is None]
    if others:
        body = [[row.name, *map(_text, row.values)] for row in others]
        made.append(("Metrics that not every run has", ["", *names], body))
    return made


def _mode_table(asked: dict[str, dict[int, dict[str, float]]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A column for each run and mode that anything was measured in."""
    columns = [
        (place, mode)
        for place in range(len(names))
        for mode in MODES
        if any(mode in runs.get(place, {}) for runs in asked.values())
    ]
    header = ["", *(f"{names[place]} {mode}" for place, mode in columns)]
    body = [[what, *(_text(runs.get(place, {}).get(mode)) for place, mode in columns)] for what, runs in sorted(asked.items())]
    return header, body


def _metric(row: Row) -> list[str]:
    cells = [row.name, _text(row.values[0])]
    for index in range(1, len(row.values)):
        gap, verdict = difference(row, index)
        cells += [_text(row.values[index]), "" if gap is None else f"{gap:+.4g} {verdict}".strip()]
    return cells


def _silent(found: Comparison) -> list[str]:
    """Says which parts do not differ, so that silence is not taken for a lack."""
    parts = {"data sets": found.datasets, "parameters": found.params, "metrics": found.metrics}
    equal = [name for name, rows in parts.items() if not rows]
    return [f"No difference in: {', '.join(equal)}."] if equal else []


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
