"""A run above the runs of several pipelines: those of one study.

    group = Group.open("ablation VI", {"table": "VI"})
    ...                                     # pipelines that are started with group.environment
    group.close("FINISHED", [Path("table.md")])

A group of the same name and tags that an earlier process left is continued.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from fast_goal.errors import FastGoalError
from fast_goal.tracking import identity
from fast_goal.tracking.server import connect, quoted, tracking_uri

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient


class Group:
    """One such run; see `open`."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str):
        self.run_id = run_id
        self._client, self._experiment_id = client, experiment_id

    @classmethod
    def open(cls, name: str, tags: Mapping[str, str]) -> Group:
        """Finds or makes the run. Raises FastGoalError where the store cannot be used."""
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        client, experiment_id = connect()
        known = {**tags, "fast_goal.role": "group"}
        alive = {"fast_goal.host": identity.host(), "fast_goal.process": identity.process_mark(psutil.Process())}
        wanted = " and ".join(f"tags.`{tag}` = {quoted(value)}" for tag, value in known.items())
        try:
            found = client.search_runs([experiment_id], f"{wanted} and attributes.run_name = {quoted(name)}", max_results=1)
            if not found:
                made = client.create_run(experiment_id, run_name=name, tags={**known, **alive})
                return cls(client, experiment_id, made.info.run_id)
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in alive.items()])
        except MlflowException as error:
            raise FastGoalError(f"MLFLOW_TRACKING_URI = {tracking_uri()} refused the run {name!r}: {error}") from None
        return cls(client, experiment_id, run_id)

    @property
    def environment(self) -> dict[str, str]:
        """What makes the run of a pipeline that is started with it a child of this one, in the same store."""
        return {identity.PARENT_VARIABLE: self.run_id, "MLFLOW_TRACKING_URI": tracking_uri()}

    def experiments(self) -> set[str]:
        """The names of DVC's experiments among the children."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        runs = self._client.search_runs(
            [self._experiment_id], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}'", max_results=1000
        )
        return {run.data.tags["dvc_experiment"] for run in runs if "dvc_experiment" in run.data.tags}

    def add(self, experiment: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """A finished child for an experiment that ran for another study, or of which every step came from the cache."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        about = {**tags, MLFLOW_PARENT_RUN_ID: self.run_id, "dvc_experiment": experiment, "fast_goal.role": "reused"}
        made = self._client.create_run(self._experiment_id, run_name=experiment, tags=about)
        for name, value in metrics.items():
            self._client.log_metric(made.info.run_id, name, value)
        self._client.set_terminated(made.info.run_id, "FINISHED")

    def close(self, status: str, files: Iterable[Path] = ()) -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        for path in files:
            self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, status)
