"""Which runs a table needs, and how params.yaml becomes that of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_goal.ablations.tables import Table
from fast_goal.configure import check, compose
from fast_goal.errors import ConfigError
from fast_goal.files import digest

PATH_KEYS = ("root", "watch", "weights", "shards", "model")  # settings that may name files outside of git
LOCAL = "local-dir:"  # open_clip's word before the path of a model
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclass(frozen=True)
class Run:
    """One arm with one seed. values: the whole of its params.yaml; key: a digest of those and of the code."""

    arm: str
    seed: int
    overrides: list[str]  # as for `fast-goal configure`
    values: dict[str, Any]
    key: str
    experiment: str | None = None  # a finished one with the same key, perhaps of another arm

    @property
    def name(self) -> str:
        """Of the experiment in DVC."""
        return self.experiment or f"{self.arm}-s{self.seed}-{self.key}"


def overrides_of(table: Table, arm: str, experiment: str, extra: Sequence[str] = ()) -> list[str] | None:
    """What `fast-goal configure` is told for an arm, but for the seed; None where the experiment has no such arm."""
    described = table.arms[arm]
    if described.only and experiment not in described.experiments:
        return None
    return [f"experiment={described.experiments.get(experiment, experiment)}", *described.overrides, *extra]


def make_run(arm: str, seed: int, overrides: Sequence[str], code: str, root: Path) -> Run:
    """Composes and checks the parameters of a run. Raises ConfigError, with the arm."""
    told = [*overrides, f"seed={seed}"]
    try:
        values = outside(compose(told), root)
        check(values)
    except ConfigError as error:
        raise ConfigError(f"the arm {arm}: {error}") from None
    return Run(arm, seed, told, values, digest([canonical(values), code], length=10))


def equal_compute_epochs(epochs: int, cost: float, own_cost: float) -> int:
    """The epochs that take as long as `epochs` of an arm whose steps cost `cost` (seconds), at `own_cost` each."""
    return max(1, round(epochs * cost / own_cost))


def outside(values: Any, root: Path, key: str = "") -> Any:
    """The settings with relative paths of files that git does not know made absolute: an experiment of the queue runs in a
    folder of its own, which has what git has."""
    if isinstance(values, Mapping):
        return {name: outside(value, root, str(name)) for name, value in values.items()}
    if not isinstance(values, str) or key not in PATH_KEYS or not values:
        return values
    prefix = LOCAL if values.startswith(LOCAL) else ""
    path = Path(values.removeprefix(LOCAL)).expanduser()
    if path.is_absolute() or path.parts[:1] == ("src",) or not (root / path).exists():
        return values
    return f"{prefix}{root / path}"


def canonical(values: Any) -> Any:
    """The same for a number that one YAML reader takes for a number and another for text (5e-06)."""
    if isinstance(values, Mapping):
        return {str(name): canonical(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [canonical(value) for value in values]
    if isinstance(values, str) and _NUMBER.fullmatch(values):
        return float(values)
    return float(values) if isinstance(values, int) and not isinstance(values, bool) else values


def settings(wanted: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What `dvc exp run -S` has to be told to get from one params.yaml to another: key=value, +key=value, ~key."""
    for name, value in wanted.items():
        key = f"{prefix}{name}"
        if name not in current:
            yield f"+{key}={literal(value)}"
            continue
        before = current[name]
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from settings(value, before, f"{key}.")
        elif isinstance(value, Mapping) or isinstance(before, Mapping):
            yield from _removed(key, before)
            yield f"+{key}={literal(value)}"
        elif canonical(value) != canonical(before):
            yield f"{key}={literal(value)}"
    for name, before in current.items():
        if name not in wanted:
            yield from _removed(f"{prefix}{name}", before)


def _removed(key: str, before: Any) -> Iterator[str]:
    if before is None:
        yield f"{key}=0"  # Hydra takes a null for a key that is not there
    yield f"~{key}"


def literal(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(literal, value)) + "]"
    # backslashes count as such but before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), str(value)) + "'"
