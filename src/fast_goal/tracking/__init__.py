"""What a step reports to the outside, and the only part of the package that knows MLflow.

A step receives a `Tracker` and never asks what stands behind it: `runs.MlflowTracker` in the pipeline, `NullTracker` in
tests and wherever nothing is to be recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fast_goal.data.records import Dataset


class Tracker(Protocol):
    """The run of one step."""

    run_id: str | None
    """The MLflow run, None where nothing is recorded."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Records settings; nested mappings are flattened to dotted names."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Records numbers, at a step of a curve if given. Cheap: the numbers are collected and sent in the background."""

    def headline(self, values: Mapping[str, float]) -> None:
        """Records the few numbers that also belong on the run of the whole pipeline."""

    def artifact(self, path: Path | str, folder: str = "") -> None:
        """Uploads a file, or a folder's contents, under `folder` of the run. Raises FileNotFoundError."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags of the run."""

    def input(self, dataset: Dataset, context: str = "") -> None:
        """Names a data set the step read, with its digest and counts; `context` says what for (`training`)."""


class NullTracker:
    """Takes everything and records nothing."""

    run_id: str | None = None

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def headline(self, values: Mapping[str, float]) -> None:
        pass

    def artifact(self, path: Path | str, folder: str = "") -> None:
        pass

    def tags(self, values: Mapping[str, Any]) -> None:
        pass

    def input(self, dataset: Dataset, context: str = "") -> None:
        pass
