"""The small files of the report by which DVC compares runs: the headline numbers and the tables of its plots.

headline.json is what `dvc metrics diff` and `dvc exp show` print; the plots of dvc.yaml read recall.csv, localisation.csv,
history.csv and validation.csv. None of them holds times, so that equal results are equal files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_goal.evaluation.comparison import recall_rows
from fast_goal.evaluation.headline import MODELS, headline
from fast_goal.evaluation.retrieval import DIRECTIONS
from fast_goal.files import write_json, write_text

DIGITS = 4  # of headline.json, in percent: finer than one query of a hundred thousand
MACHINE = {"samples_per_second", "gpu_peak_memory_gb"}  # of a training's record: the machine's doing, not the model's
COLUMNS = {
    "recall": ["dataset", "captions", "direction", "k", "model", "recall"],
    "localisation": ["dataset", "k", "model", "hit"],
    "history": ["step", "loss"],
    "validation": ["epoch", "direction", "recall"],
}


def write(
    folder: Path, metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]], ks: Sequence[int], patch_ks: Sequence[int]
) -> None:
    """Writes headline.json and the tables, each with at least its columns, so that a plot of it never lacks one.

    metrics: by data set. history: the records of the training, as in history.jsonl.
    """
    write_json(folder / "headline.json", {name: round(value, DIGITS) for name, value in headline(metrics).items()})
    tables = {
        "recall": [row for name, values in metrics.items() for row in recall_rows(name, values, ks)],
        "localisation": [row for name, values in metrics.items() for row in _hit_rows(name, values, patch_ks)],
        "history": [{name: row[name] for name in row if name not in MACHINE} for row in history if "loss" in row],
        "validation": _validation_rows(history),
    }
    for name, rows in tables.items():
        _write_csv(folder / f"{name}.csv", rows, COLUMNS[name])


def _hit_rows(dataset: str, metrics: Mapping[str, Any], ks: Sequence[int]) -> list[dict[str, Any]]:
    """How often one of the k most similar patches lies in the box, in percent; no rows without boxes."""
    if "localisation" not in metrics:
        return []
    found = metrics["localisation"]
    return [
        {"dataset": dataset, "k": k, "model": model, "hit": found[model][f"hit@{k}"]}
        for model in (*MODELS, "attention", "chance")
        if model in found
        for k in ks
    ]


def _validation_rows(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """R@1 in percent on the validation split, after each epoch that measured it."""
    return [
        {"epoch": row["epoch"], "direction": direction, "recall": row[f"val_{direction}_R@1"]}
        for row in history
        for direction in DIRECTIONS
        if f"val_{direction}_R@1" in row
    ]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=None if rows else list(columns))
    write_text(path, frame.to_csv(index=False))
