"""The tables as conf/ablation/*.yaml describes them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from fast_goal.config import build
from fast_goal.configure import CONF
from fast_goal.errors import ConfigError

FOLDER = CONF / "ablation"
NAME = re.compile(r"[a-z][a-z0-9_]*")  # of an arm: it becomes part of a git reference
ROMAN = re.compile(r"[IVX]+")  # the name of a table of the paper


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to get a model.

    overrides: as for `fast-goal configure`. experiments: the experiment that stands for this arm, by that of the study; with
    `only` the arm exists in those alone. like: the arm that this one is but for what is said here. equal_compute: with
    `like`, the arm whose training time this one gets, in epochs, by the measured cost of the steps of both.
    """

    label: str
    overrides: list[str]
    experiments: dict[str, str]
    only: bool
    like: str | None
    equal_compute: str | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: one model of one arm, and the task that {task} stands for in the columns. mode: how a model with
    text-conditioned pooling is asked, for {mode} in the columns; "": as every model is."""

    label: str
    arm: str
    model: Literal["base", "finetuned", "chance"]
    task: str
    mode: Literal["", "global", "conditioned", "rerank"] = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """path: of a number in models/reports/metrics.json below the data set, its parts joined by `/`, with {model} and {task};
    or, after `finetune:`, in models/finetune/metrics.json. by_mode: the path for rows with a mode, with {mode}. "": rows of
    that kind have none. scale: a factor of the number."""

    label: str
    path: str = ""
    by_mode: str = ""
    scale: float = 1.0

    def path_of(self, row: Row) -> str:
        """Where the number of a row is, "" where it has none."""
        return (self.by_mode if row.mode else self.path).format(model=row.model, task=row.task, mode=row.mode)


@dataclasses.dataclass(frozen=True)
class Table:
    """One of the paper's tables, or one of our own."""

    name: str  # its Roman number in the paper, a word for one of our own
    title: str
    about: str  # what the paper found, and what to bear in mind
    experiment: str
    seeds: list[int]
    reference: str | None  # the row that the others are compared with, seed by seed
    arms: dict[str, Arm]
    rows: list[Row]
    columns: list[Column]

    def __post_init__(self) -> None:
        for name, arm in self.arms.items():
            if not NAME.fullmatch(name):
                raise ConfigError(f"arms.{name}: expected a name of small letters, digits and _")
            for key, other in (("like", arm.like), ("equal_compute", arm.equal_compute)):
                if other is not None and (other not in self.arms or self.arms[other].equal_compute):
                    raise ConfigError(f"arms.{name}.{key} = {other!r}: expected an arm that does not take another's time")
            if arm.equal_compute is not None and arm.like is None:
                raise ConfigError(f"arms.{name}.like is missing: the arm that is to take as long as {arm.equal_compute!r}")
        for row in self.rows:
            if row.arm not in self.arms:
                raise ConfigError(f"rows: {row.label!r} is of the arm {row.arm!r}, which is not one of {sorted(self.arms)}")
        if self.reference is not None and self.reference not in {row.label for row in self.rows}:
            raise ConfigError(f"reference = {self.reference!r}: there is no such row")


def names() -> list[str]:
    """The tables there are: the paper's, then our own."""
    return sorted(
        (path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (not ROMAN.fullmatch(name), _number(name), name)
    )


def load(name: str, folder: Path = FOLDER) -> Table:
    """One table. Raises ConfigError for an unknown name or a file that does not say what it should."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"table = {name!r}: expected one of {', '.join(names())}")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    nothing = {"overrides": [], "experiments": {}, "only": False, "like": None, "equal_compute": None}
    arms: dict[str, Any] = {}
    for arm, described in values["arms"].items():
        arms[arm] = {**nothing, **arms.get(described.get("like"), {}), **described}
    rows = values.get("rows")
    if rows is None:  # the base, then every arm
        rows = [{"label": "base", "arm": next(iter(arms)), "model": "base"}]
        rows += [{"label": arm["label"], "arm": name} for name, arm in arms.items()]
    rows = [{"model": "finetuned", "task": "long", "mode": "", **row} for row in rows]
    columns = [
        {"label": label, "path": "", "by_mode": "", "scale": 1.0, **(path if isinstance(path, dict) else {"path": path})}
        for label, path in values["columns"].items()
    ]
    filled = {"experiment": "demo", "seeds": [0, 1, 2], "reference": None, **values}
    return build(Table, {**filled, "name": name, "arms": arms, "rows": rows, "columns": columns}, path.name)


def _number(roman: str) -> int:
    values = [{"I": 1, "V": 5, "X": 10}.get(letter, 0) for letter in roman]
    return sum(-value if value < max(values[place:]) else value for place, value in enumerate(values))
