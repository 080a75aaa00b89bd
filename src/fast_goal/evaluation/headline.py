"""The few numbers that stand for a whole run, and the names under which numbers are kept. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MODELS = ("base", "finetuned")
MODES = ("global", "conditioned", "rerank")  # of asking a model with text-conditioned pooling
SUITES = ("composition", "zero_shot")  # tasks that measure each of several suites by itself, case by case


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers that stand for the whole run, in percent. metrics: by data set, as in metrics.json."""
    chosen: dict[str, Any] = {}
    for name, values in metrics.items():
        for kind in ("long", "short"):
            if kind in values:
                for model in MODELS:
                    recall = values[kind][model]
                    chosen[f"{name}.{kind}.{model}"] = {
                        way: {key: recall[way][key] for key in list(recall[way])[:1]} for way in recall
                    }
        if "localisation" in values:
            for part in (*MODELS, "attention", "chance"):
                found = values["localisation"].get(part, {})
                chosen[f"{name}.localisation.{part}"] = {key: found[key] for key in list(found)[:1]}
        for kind, found in values.get("conditioned", {}).items():
            for mode in MODES:
                recall = found[mode]
                chosen[f"{name}.conditioned.{kind}.{mode}"] = {
                    way: {key: recall[way][key] for key in list(recall[way])[:1]} for way in recall
                }
        for task, suite, found in suites_of(values):
            for model in MODELS:
                chosen[f"{name}.{task}.{suite}.{model}"] = {key: found[model][key] for key in list(found["difference"])[:1]}
        for suite, found in values.get("segmentation", {}).items():
            for model in MODELS:
                chosen[f"{name}.segmentation.{suite}.{model}"] = {"mIoU": found[model]["mIoU"]}
    return flatten(chosen)


def suites_of(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The task, the name and the numbers of every suite of one data set. metrics: by task."""
    for task in SUITES:
        for suite, found in metrics.get(task, {}).items():
            yield task, suite, found


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a nested mapping under its dotted name, without `@`, which not every tracking store allows."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}".replace("@", "").replace(" ", "_")
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, int | float):
            flat[name] = float(value)
    return flat
