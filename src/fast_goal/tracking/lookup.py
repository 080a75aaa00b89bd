"""Finding runs by what people call them, and reading what was recorded.

    read_runs(["latest~1", "models:/fast-goal@champion"])

A run is named by its id, the beginning of its id, its name, `latest` (the pipeline started last; `latest~1` the one before), or
a version of a registered model, which stands for the pipeline that made it. The run of a pipeline is read with the runs of
its steps: it has the parameters itself, they the metrics.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fast_goal.errors import FastGoalError
from fast_goal.tracking import identity
from fast_goal.tracking.champion import URI
from fast_goal.tracking.server import connect, quoted, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking.client import MlflowClient

SHOWN = 10  # candidates in an error
LATEST = re.compile(r"latest(?:~(?P<back>\d+))?")
ID = re.compile(r"[0-9a-f]{4,32}")
EVALUATE = "evaluate"  # its metrics keep their names, which the pipeline's headline shares


@dataclass(frozen=True)
class Recorded:
    """A run as it was recorded. `seconds` is None while it runs; `datasets` has the digest by name and use."""

    id: str
    name: str
    status: str
    started: datetime
    seconds: float | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    datasets: dict[str, str]


def read_runs(words: Sequence[str]) -> list[Recorded]:
    """The runs that the words name. Raises FastGoalError for a word that names none or several, with candidates."""
    from mlflow.exceptions import MlflowException

    client, experiment_id = connect()
    try:
        return [_read(client, experiment_id, _find(client, experiment_id, word)) for word in words]
    except MlflowException as error:
        raise FastGoalError(f"The runs cannot be read from {tracking_uri()}: {error}") from None


def _find(client: MlflowClient, experiment_id: str, word: str) -> Run:
    if word.startswith("models:"):
        return _maker(client, word)
    if parts := LATEST.fullmatch(word):
        return _latest(client, experiment_id, word, int(parts["back"] or 0))
    wanted = [f"attributes.run_name = {quoted(word)}"]
    if ID.fullmatch(word):
        wanted.append(f"attributes.run_id LIKE '{word}%'")
    for expression in wanted:
        found = client.search_runs([experiment_id], expression, max_results=1000)
        if len(found) == 1:
            return found[0]
        if found:
            raise FastGoalError(f"{word!r} names {len(found)} runs. Say which by the beginning of its id:\n{_list(found)}")
    known = _pipelines(client, experiment_id)
    near = difflib.get_close_matches(word, [run.info.run_name for run in known], n=SHOWN, cutoff=0.5)
    raise FastGoalError(
        f"No run at {tracking_uri()} has the name, or an id that begins with, {word!r}. Pipelines there:\n"
        + _list([run for run in known if run.info.run_name in near] or known)
    )


def _maker(client: MlflowClient, uri: str) -> Run:
    """The run of the pipeline that registered a version; that of its step where it has no pipeline."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    parts = URI.fullmatch(uri)
    if parts is None:
        raise FastGoalError(f"{uri!r} names no model: expected models:/NAME@ALIAS or models:/NAME/VERSION.")
    try:
        if parts["version"]:
            version = client.get_model_version(parts["name"], parts["version"])
        else:
            version = client.get_model_version_by_alias(parts["name"], parts["alias"])
    except MlflowException as error:
        raise FastGoalError(f"{uri} is not in the registry at {tracking_uri()}: {error}") from None
    if not version.run_id:
        raise FastGoalError(f"{uri}, version {version.version} at {tracking_uri()}, was registered without a run.")
    run = client.get_run(version.run_id)
    above = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
    return client.get_run(above) if above else run


def _latest(client: MlflowClient, experiment_id: str, word: str, back: int) -> Run:
    found = _pipelines(client, experiment_id)
    if back >= len(found):
        raise FastGoalError(f"{word}: there are only {len(found)} pipelines at {tracking_uri()}:\n{_list(found)}")
    return found[back]


def _pipelines(client: MlflowClient, experiment_id: str) -> list[Run]:
    """The runs of pipelines, newest first; those of steps that were run by hand come in only where there are no others."""
    found = client.search_runs(
        [experiment_id], "tags.`fast_goal.role` = 'pipeline'", order_by=["attributes.start_time DESC"], max_results=1000
    )
    return [run for run in found if identity.is_whole(run.data.tags["fast_goal.pipeline_id"])] or list(found)


def _list(runs: Sequence[Run]) -> str:
    lines = [
        f"  {run.info.run_id[:8]}  {run.info.run_name}  {run.info.status}  {_time(run.info.start_time):%Y-%m-%d %H:%M} UTC"
        for run in runs[:SHOWN]
    ]
    more = [f"  ... and {len(runs) - SHOWN} more"] if len(runs) > SHOWN else []
    return "\n".join([*lines, *more]) or "  none"


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _read(client: MlflowClient, experiment_id: str, run: Run) -> Recorded:
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    expression = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.info.run_id}'"
    # a step that ran again has two runs: the newest comes last and stays
    steps = client.search_runs([experiment_id], expression, order_by=["attributes.start_time ASC"], max_results=1000)
    metrics: dict[str, float] = {}
    for step in steps:
        name = step.data.tags.get("step", "")
        for key, value in step.data.metrics.items():
            shared = key in run.data.metrics or (name == EVALUATE and "." in key)
            metrics[key if shared else f"{name}.{key}"] = value
    datasets = {}
    for entry in [entry for one in (run, *steps) for entry in (one.inputs.dataset_inputs if one.inputs else [])]:
        use = next((tag.value for tag in entry.tags if tag.key == "mlflow.data.context"), "")
        datasets[f"{entry.dataset.name} ({use})" if use else entry.dataset.name] = entry.dataset.digest
    info = run.info
    return Recorded(
        info.run_id,
        info.run_name,
        info.status,
        _time(info.start_time),
        (info.end_time - info.start_time) / 1000 if info.end_time else None,
        dict(run.data.params),
        {**metrics, **run.data.metrics},
        dict(run.data.tags),
        datasets,
    )
