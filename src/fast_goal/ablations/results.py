"""From the reports of the runs to the table: Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_goal.ablations.tables import ROMAN, Column, Row, Table
from fast_goal.config import Params
from fast_goal.evaluation import published
from fast_goal.evaluation.headline import SUITES
from fast_goal.files import atomic_path, write_text

FINETUNE = "finetune:"  # before the path of a number in models/finetune/metrics.json
PANELS = 4  # beside each other in the picture


@dataclass(frozen=True)
class Measured:
    """A finished run: its parameters, and the metrics.json of its reports and its fine-tuning."""

    arm: str
    seed: int
    params: Params
    report: dict[str, Any]
    finetune: dict[str, Any]

    @property
    def step_seconds(self) -> float:
        """Of one optimiser step; where the training did not measure it, with its input and the start of the training."""
        return self.finetune.get("step_seconds") or self.finetune["training_seconds"] / self.finetune["steps"]


@dataclass(frozen=True)
class Cell:
    """The numbers of one row and column, by seed. paper: its number where it compares; words: why not, or what to mind."""

    values: dict[int, float]
    paper: float | None = None
    words: str = ""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds, None for one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Result:
    """All that is said of a table. datasets: cells by data set, row and column (both by label)."""

    table: Table
    datasets: dict[str, dict[str, dict[str, Cell]]]
    about: list[str]  # how it was made
    problems: list[str] = field(default_factory=list)  # what is missing, and why


def gather(table: Table, runs: Sequence[Measured], arms: Sequence[str], about: list[str], problems: list[str]) -> Result:
    """The cells of the rows of `arms`."""
    names = list(dict.fromkeys(name for run in runs for name, values in run.report.items() if isinstance(values, Mapping)))
    rows = [row for row in table.rows if row.arm in arms or row.model != "finetuned"]
    datasets = {
        name: {row.label: {column.label: _cell(table, row, column, name, runs) for column in table.columns} for row in rows}
        for name in names
    }
    return Result(table, datasets, about, problems)


def lookup(report: Mapping[str, Any], finetune: Mapping[str, Any], dataset: str, row: Row, column: Column) -> float | None:
    """The number of a cell in one run, None where it has none."""
    path = column.path_of(row)
    if path.startswith(FINETUNE):
        found: Any = finetune if row.model == "finetuned" else {}
        path = path.removeprefix(FINETUNE)
    else:
        found = report.get(dataset, {})
    for part in path.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return column.scale * found if isinstance(found, int | float) else None


def write(result: Result, folder: Path) -> list[Path]:
    """Writes table.md, table.csv and table.png; returns them."""
    paths = [folder / f"table.{kind}" for kind in ("md", "csv", "png")]
    write_text(paths[0], markdown(result))
    write_text(paths[1], as_csv(result))
    return paths if draw(result, paths[2]) else paths[:2]


def markdown(result: Result) -> str:
    """The table of each data set in the paper's layout, the differences to the reference row, and what is missing."""
    table = result.table
    lines = [f"# Table {table.name}: {table.title}", "", table.about, "", *result.about, ""]
    for name, rows in result.datasets.items():
        columns = [column.label for column in table.columns if any(row[column.label].values for row in rows.values())]
        lines += [f"## {name}", "", *_grid(columns, {label: [_shown(row[c]) for c in columns] for label, row in rows.items()})]
        differences = dict(_differences(rows, table.reference, columns))
        if differences:
            lines += ["", f"Minus the row *{table.reference}*, seed by seed:", "", *_grid(columns, differences)]
        compared = {row[c].words for row in rows.values() for c in columns if row[c].paper is not None} - {""}
        apart: dict[str, list[str]] = {}
        for label, row in rows.items():
            for words in dict.fromkeys(cell.words for cell in row.values() if cell.paper is None and cell.words):
                apart.setdefault(words, []).append(label)
        lines += ["", *(f"Beside the paper's numbers: {words}." for words in sorted(compared))]
        lines += [f"{', '.join(labels)}: {words}." for words, labels in apart.items()]
        lines.append("")
    if result.problems:
        lines += ["## Missing", "", *(f"- {problem}" for problem in result.problems), ""]
    return "\n".join(lines)


def as_csv(result: Result) -> str:
    """A line per data set, row and column."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["table", "dataset", "row", "column", "mean", "sd", "seeds", "values", "paper", "words"])
    for name, rows in result.datasets.items():
        for label, cells in rows.items():
            for column, cell in cells.items():
                if not cell.values:
                    continue
                seeds = " ".join(map(str, cell.values))
                values = " ".join(f"{value:.6g}" for value in cell.values.values())
                spread = "" if cell.spread is None else f"{cell.spread:.6g}"
                paper = "" if cell.paper is None else cell.paper
                writer.writerow(
                    [result.table.name, name, label, column, f"{cell.mean:.6g}", spread, seeds, values, paper, cell.words]
                )
    return stream.getvalue()


def draw(result: Result, path: Path) -> bool:
    """A panel per data set and column: a small mark per seed, a large one for the mean. False, and no picture, if there is
    nothing to show."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = [
        (name, column.label, {label: row[column.label] for label, row in rows.items() if row[column.label].values})
        for name, rows in result.datasets.items()
        for column in result.table.columns
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return False
    labels = list(dict.fromkeys(label for _, _, cells in panels for label in cells))
    down = -(-len(panels) // PANELS)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure((3.2 * min(len(panels), PANELS) + 2.5, (0.32 * len(labels) + 1.1) * down), layout="constrained")
        grid = figure.subplots(down, min(len(panels), PANELS), squeeze=False, sharey=True)
        for axes, (name, column, cells) in zip(grid.flat, panels, strict=False):
            for label, cell in cells.items():
                place = labels.index(label)
                axes.plot(list(cell.values.values()), [place] * len(cell.values), "o", color="#6B6B6B", markersize=4, alpha=0.7)
                axes.plot([cell.mean], [place], "D", color="#0072B2", markersize=7)
                if cell.paper is not None:
                    axes.plot([cell.paper], [place], "x", color="#D55E00", markersize=8)
            title = column if len(result.datasets) == 1 else f"{name}: {column}"
            axes.set_title(title, fontsize=10)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.grid(axis="x", alpha=0.3)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        compared = any(cell.paper is not None for *_, cells in panels for cell in cells.values())
        note = "dots: seeds; diamonds: their mean" + ("; crosses: the paper" if compared else "")
        figure.suptitle(f"Table {result.table.name}: {result.table.title} ({note})", fontsize=11)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    return True


def _cell(table: Table, row: Row, column: Column, dataset: str, runs: Sequence[Measured]) -> Cell:
    # the base and chance are the same in every arm
    mine = [run for run in runs if run.arm == row.arm] or [run for run in runs if row.model != "finetuned"]
    found = {run.seed: lookup(run.report, run.finetune, dataset, row, column) for run in mine}
    values = {seed: value for seed, value in sorted(found.items()) if value is not None}
    if not values or row.model == "chance":
        return Cell(values)
    run = next(run for run in mine if run.seed in values)
    return Cell(values, *_paper(table, row, column, dataset, run))


def _paper(table: Table, row: Row, column: Column, dataset: str, run: Measured) -> tuple[float | None, str]:
    """The paper's number of a cell, with what to mind; or None and why there is none. Times and the like have neither; of a
    suite that has none it is not said why, since most columns are of suites that are not the table's."""
    path = column.path_of(row)
    if path.startswith(FINETUNE):
        return None, ""
    parts = path.split("/")
    task, metric, direction = parts[0], parts[-1], parts[-2]
    about = run.report[dataset].get(task, {})
    if task == "conditioned":  # the published numbers are of short captions and of this mode
        about = about.get("short", {}) if parts[1] == "short" and row.mode == task else {}
    if task in SUITES:
        suite, *group = (part for part in parts[1:-1] if part not in (row.model, "groups"))
        about = about.get(suite, {})
        counted = about.get(row.model, {}).get("groups", {}).get(group[0], {}) if group else about
        dataset, direction = suite, group[0] if group else published.WHOLE
        about = {"images": counted.get("cases")}
    if task not in published.TASKS or "drop" in parts or not isinstance(about.get("images"), int):
        return None, ""
    if task == "localisation":
        direction = "sentence_to_patch"
    found = published.beside(
        dataset,
        run.params.base.model,
        published.recipe_of(run.params, row.model),
        direction,
        metric,
        images=about["images"],
        task=task,
        captions=about.get("captions"),
        table=table.name if ROMAN.fullmatch(table.name) else None,
    )
    return found.value, found.words if found.value is not None or task not in SUITES else ""


def _differences(
    rows: Mapping[str, Mapping[str, Cell]], reference: str | None, columns: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Of the other rows to the reference, over the seeds that both have."""
    if reference not in rows:
        return
    for label, row in rows.items():
        if label == reference:
            continue
        shown = []
        for column in columns:
            mine, other = row[column].values, rows[reference][column].values
            pairs = {seed: mine[seed] - other[seed] for seed in mine if seed in other}
            shown.append(_shown(Cell(pairs), "+.1f"))
        if any(text != "–" for text in shown):
            yield label, shown


def _shown(cell: Cell, form: str = ".1f") -> str:
    if not cell.values:
        return "–"
    spread = "" if cell.spread is None else f" ± {cell.spread:.1f}"
    paper = "" if cell.paper is None else f" (paper {cell.paper:g})"
    return f"{cell.mean:{form}}{spread}{paper}"


def _grid(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()),
    ]
