"""Composes the Hydra groups under `conf/` into `params.yaml` (`fast-goal configure`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from fast_goal.config import PARAMS_FILE, Params, build, check_together
from fast_goal.errors import ConfigError
from fast_goal.files import write_text

CONF = Path(__file__).parent / "conf"
OWN_FILES = ("folder", "captioned")  # sources that read what their user keeps and changes
NO_GROUP = "ablation"  # the tables of `fast-goal ablate`
HEADER = """# Composed by `{command}` from src/fast_goal/conf; the stages read only this file.
# Change it with that command; `dvc exp run -S KEY=VALUE` changes it for one experiment.
"""


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration as plain values. Raises ConfigError with the key's full name."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", overrides=list(overrides))
        missing = list(_missing(OmegaConf.to_container(composed, resolve=False)))
        if missing:
            command = " ".join(["fast-goal configure", *overrides, *(f"{key}=VALUE" for key in missing)])
            raise ConfigError(f"{', '.join(missing)} has no default and must be given: {command}")
        return OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"fast-goal configure {' '.join(overrides)}: {error}") from None


def configure(overrides: Sequence[str] = (), path: Path | str = PARAMS_FILE) -> Params:
    """Composes, checks and writes `path`; an invalid configuration leaves the file as it was."""
    values = compose(overrides)
    params = check(values)
    command = " ".join(["fast-goal configure", *overrides])
    write_text(path, HEADER.format(command=command) + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return params


def check(values: dict[str, Any]) -> Params:
    """The typed parameters, with the parts that sources and objectives declare themselves checked too."""
    from fast_goal.data.sources import source_config, source_facts
    from fast_goal.objectives import check_objectives

    params = build(Params, values, str(PARAMS_FILE))
    check_together(params)
    for name, values_of_source in params.download.datasets.items():
        source_config(values_of_source, f"download.datasets.{name}")
        source_facts(values_of_source, f"download.datasets.{name}")
    _check_watched(params)
    check_objectives(params)
    return params


def _check_watched(params: Params) -> None:
    """Of several data sets the last one sets `download.watch`, and the photographs of another would change unnoticed."""
    name = params.download.train_dataset
    settings = params.download.datasets[name]
    if settings["source"] not in OWN_FILES:
        return
    root, watched = Path(settings["root"]), Path(params.download.watch)
    if watched.absolute() not in (root.absolute(), *root.absolute().parents):
        raise ConfigError(
            f"download.watch = {params.download.watch!r} does not hold {str(root)!r}, the photographs of data set {name!r}: "
            f"dvc repro would not notice new ones. Add download.watch={root}"
        )


def groups() -> dict[str, list[str]]:
    """The options of every configuration group, by group."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name != NO_GROUP)
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _missing(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The full names of the keys that are still `???`. OmegaConf's own list fails where another key refers to one."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _missing(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"
