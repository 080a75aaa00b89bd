"""Runs: one MLflow run for the whole pipeline, and below it one for each step.

    with step_run("finetune", params) as track:
        track.metrics({"loss": 1.2}, step=10)

The run of a step is named after the step and tagged with commit, hash of dvc.lock and data set. The run of the pipeline,
found again by the steps that follow through its tag `fast_goal.pipeline_id`, carries all parameters and the headline
metrics; it fails with its steps. The load of the machine is recorded beside a step's own metrics, as `system/...`.

Recording never stops the work. When the store goes away in the middle, one warning is printed, everything is kept in
memory and tried again, and what could not be handed over in the end is named.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fast_goal.config import Params, to_dict
from fast_goal.errors import FastGoalError
from fast_goal.tracking import identity, pipelines, views
from fast_goal.tracking.server import connect, tracking_uri
from fast_goal.tracking.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking.client import MlflowClient

    from fast_goal.data.records import Dataset

FLUSH_SECONDS = 5.0
RETRY_SECONDS = 60.0  # the longest pause between two tries while the store is away
PARAMS_PER_CALL = 100  # MLflow's limits
METRICS_PER_CALL = 1000
PARAM_LENGTH = 6000
TAG_LENGTH = 5000

log = logging.getLogger(__name__)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text; lists become JSON, values beyond MLflow's limit end in an ellipsis."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            text = json.dumps(value, default=str) if isinstance(value, list | tuple | Mapping) else str(value)
            flat[_name(f"{prefix}{name}")] = text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
    return flat


def _name(name: str) -> str:
    """A name MLflow accepts: it knows no `@`, which `recall@1` has."""
    return re.sub(r"[^\w\-./ :]", "_", name.replace("@", "_at_"))[:250]


@dataclass(frozen=True)
class _Call:
    """Something still to be handed to the store."""

    what: str
    do: Callable[[], object]


class MlflowTracker:
    """The run of one step; see `Tracker` for its methods. Use it through `step_run`."""

    def __init__(self, client: MlflowClient, run_id: str, pipeline_run_id: str, flush_seconds: float | None = None):
        self.run_id: str | None = run_id
        self.pipeline_run_id = pipeline_run_id
        self._run = run_id
        self._client = client
        self._metrics: list[tuple[str, Metric]] = []  # (run id, metric), in order
        self._calls: list[_Call] = []
        self._files: list[_Call] = []  # apart: artifacts may lie in a store of their own, which may be away by itself
        self._files_again = 0.0  # when to try them again
        self._refused: list[str] = []
        self._away = self._warned = False
        self._lock = threading.Lock()  # of the lists
        self._sending = threading.Lock()  # one sender at a time keeps the order
        self._stop = threading.Event()
        self._flush_seconds = flush_seconds or FLUSH_SECONDS
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._send_regularly, name="tracking", daemon=True)
        self._thread.start()
        self._system = SystemMetrics(lambda values, number: self._collect(run_id, values, number))

    def params(self, values: Mapping[str, Any]) -> None:
        self._log_params(self._run, values)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._collect(self._run, values, step)

    def headline(self, values: Mapping[str, float]) -> None:
        self._collect(self._run, values)
        self._collect(self.pipeline_run_id, values)

    def artifact(self, path: Path | str, folder: str = "") -> None:
        path = Path(path).absolute()
        if not path.exists():
            raise FileNotFoundError(f"{path} is to be tracked as an artifact but does not exist")
        send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._call(f"the file {path}", lambda: send(self._run, str(path), folder or None), self._files)

    def tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(_name(name), str(value)[:TAG_LENGTH]) for name, value in values.items()]
        self._call(f"the tags {', '.join(values)}", lambda: self._client.log_batch(self._run, tags=tags))

    def input(self, dataset: Dataset, context: str = "") -> None:
        from mlflow.entities import Dataset as TrackedDataset
        from mlflow.entities import DatasetInput, InputTag

        counts = {str(split): int(count) for split, count in dataset.records["split"].value_counts().items()}
        tracked = TrackedDataset(
            name=dataset.name,
            digest=dataset.digest[:36],  # MLflow's limit
            source_type="local",
            source=json.dumps({"uri": str(dataset.root)}),
            profile=json.dumps({"images": len(dataset.records), **counts}),
        )
        tags = [InputTag("mlflow.data.context", context)] if context else []
        for run in (self._run, self.pipeline_run_id):  # there for MLflow's column Dataset
            self._call(
                f"the data set {dataset.name}",
                lambda run=run: self._client.log_inputs(run, datasets=[DatasetInput(tracked, tags)]),
            )

    def finish(self, status: str, message: str = "") -> None:
        """Hands over what is left and closes the run: FINISHED, FAILED or KILLED, with the reason as the tag `error`."""
        self._system.stop()
        self.metrics({"seconds_total": time.monotonic() - self._begin, "peak_memory_gb": _peak_memory()})
        if message:
            self.tags({"error": message})
        self._stop.set()
        self._thread.join()
        self._send()
        self._call("the end of the run", lambda: self._client.set_terminated(self._run, status))
        self._call("the end of the pipeline's run", lambda: self._close_pipeline(status))
        self._send(last=True)
        self._name_what_is_left()

    def _close_pipeline(self, status: str) -> None:
        """The pipeline's run ends with each step, and stays FAILED or KILLED until the step that did it succeeds."""
        step = self._client.get_run(self._run).data.tags["step"]
        broken = self._client.get_run(self.pipeline_run_id).data.tags.get("failed_step", "")
        if status != "FINISHED":
            self._client.set_tag(self.pipeline_run_id, "failed_step", step)
        elif broken == step:
            self._client.delete_tag(self.pipeline_run_id, "failed_step")
        elif broken:
            status = "FAILED"
        self._client.set_terminated(self.pipeline_run_id, status)

    def _describe_pipeline(self, experiment_id: str, params: Params, is_new: bool) -> None:
        """The settings and files that belong to the whole pipeline; of these dvc.lock changes from step to step."""
        run, client = self.pipeline_run_id, self._client
        names = ["params.yaml", "dvc.lock"] if is_new else ["dvc.lock"]
        for path in (Path(name).absolute() for name in names):
            if path.is_file():
                self._call(f"the file {path}", lambda path=path: client.log_artifact(run, str(path)), self._files)
        if is_new:
            self._call("the saved views", lambda: views.save_views(client, experiment_id, params))
            self._log_params(run, to_dict(params))
            text = pipelines.installed()
            self._call("the list of installed packages", lambda: client.log_text(run, text, "requirements.txt"), self._files)

    def _log_params(self, run: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in flatten(values).items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            chunk = params[start : start + PARAMS_PER_CALL]
            self._call("parameters", lambda chunk=chunk: self._client.log_batch(run, params=chunk))

    def _collect(self, run: str, values: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        made = [(run, Metric(_name(name), float(value), now, step or 0)) for name, value in values.items()]
        with self._lock:
            self._metrics += made

    def _call(self, what: str, do: Callable[[], object], queue: list[_Call] | None = None) -> None:
        """Does it now, or, while the store is away, keeps it for later."""
        with self._lock:
            (self._calls if queue is None else queue).append(_Call(what, do))
        if not self._away:
            self._send()

    def _send_regularly(self) -> None:
        pause = self._flush_seconds
        while not self._stop.wait(pause):
            self._send()
            pause = min(2 * pause, RETRY_SECONDS) if self._away else self._flush_seconds

    def _send(self, last: bool = False) -> None:
        """Hands over everything there is, in order; stops at the first sign that the store is away."""
        with self._sending:
            self._away = not (self._send_calls(self._calls) and self._send_metrics())
            if self._away or (time.monotonic() < self._files_again and not last):
                return
            if not self._send_calls(self._files):
                self._files_again = time.monotonic() + RETRY_SECONDS

    def _send_calls(self, queue: list[_Call]) -> bool:
        while True:
            with self._lock:
                if not queue:
                    return True
                call = queue[0]
            if not self._try(call.what, call.do):
                return False
            with self._lock:
                del queue[0]

    def _send_metrics(self) -> bool:
        while True:
            with self._lock:
                if not self._metrics:
                    return True
                run = self._metrics[0][0]
                count = 0
                while count < min(len(self._metrics), METRICS_PER_CALL) and self._metrics[count][0] == run:
                    count += 1
                chunk = [metric for _, metric in self._metrics[:count]]
            if not self._try("metrics", lambda run=run, chunk=chunk: self._client.log_batch(run, metrics=chunk)):
                return False
            with self._lock:
                del self._metrics[:count]

    def _try(self, what: str, do: Callable[[], object]) -> bool:
        """Whether it is settled: done, or refused for good. False means: the store is away, try again."""
        try:
            do()
        # Any error: the client raises those of its storage's libraries (SQLAlchemy, requests, boto3) too, and none of
        # them may end hours of training.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if _is_refusal(error):
                log.warning("MLflow refused %s: %s", what, reason)
                self._refused.append(what)
                return True
            if not self._warned:
                log.warning(
                    "MLFLOW_TRACKING_URI = %s, or its artifact store, cannot be reached (%s: %s). The work goes on; what is to "
                    "be recorded is kept and tried again.",
                    tracking_uri(),
                    what,
                    reason,
                )
                self._warned = True
            return False
        return True

    def _name_what_is_left(self) -> None:
        if not self._calls and not self._files and not self._metrics:
            return
        left = [call.what for call in [*self._calls, *self._files] if call.what != "parameters"]
        if self._metrics:
            left.append(f"{len(self._metrics)} metrics")
        log.warning(
            "Not recorded in MLflow, because %s, or its artifact store, could not be reached: %s. The step's own outputs are "
            "complete.",
            tracking_uri(),
            "; ".join(left) or "parameters",
        )


def _is_refusal(error: Exception) -> bool:
    """Whether the store understood and said no, so that trying again is of no use."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in (
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_ALREADY_EXISTS",
        "INVALID_STATE",
        "PERMISSION_DENIED",
    )


@contextmanager
def step_run(step: str, params: Params) -> Iterator[MlflowTracker]:
    """Opens the run of a step below its pipeline's, and closes it as the block ends.

    FINISHED; FAILED, with the error as a tag; KILLED after an interrupt or SystemExit. Raises FastGoalError when the
    store cannot be reached at the start.
    """
    tracker = _open(step, params)
    try:
        yield tracker
    except (KeyboardInterrupt, SystemExit) as error:
        tracker.finish("KILLED", type(error).__name__)
        raise
    except BaseException as error:
        tracker.finish("FAILED", f"{type(error).__name__}: {error}")
        raise
    tracker.finish("FINISHED")


def _open(step: str, params: Params) -> MlflowTracker:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    client, experiment_id = connect()
    commit, dirty, pipeline = identity.git_commit(), identity.git_dirty(), identity.pipeline_id()
    tags = {
        "fast_goal.pipeline_id": pipeline,
        "fast_goal.host": identity.host(),
        "fast_goal.process": identity.process_mark(psutil.Process()),
        "git_commit": commit,
        "git_dirty": str(dirty).lower(),
        "dvc_lock": identity.dvc_lock(),
        "dataset": params.download.train_dataset,
        "experiment": params.experiment,
        "objective": pipelines.objective_word(params.objective),
    }
    if experiment := identity.dvc_experiment():
        tags["dvc_experiment"] = experiment
    command = f"fast-goal {step}"
    by_hand = "" if identity.is_whole(pipeline) else f"-{step}"
    name = pipelines.run_name(params, commit) + by_hand
    own = {**tags, **pipelines.source_tags(command, commit, dirty), "fast_goal.role": "step", "step": step, "pipeline": name}
    shared = {**tags, **pipelines.source_tags(command if by_hand else "dvc.yaml", commit, dirty)}
    try:
        pipelines.close_dead_runs(client, experiment_id)
        above, is_new = pipelines.open_run(client, experiment_id, shared, name, pipelines.note(params))
        child = client.create_run(experiment_id, run_name=step, tags={**own, MLFLOW_PARENT_RUN_ID: above})
    except MlflowException as error:
        raise FastGoalError(f"MLFLOW_TRACKING_URI = {tracking_uri()} refused a new run: {error}") from None
    tracker = MlflowTracker(client, child.info.run_id, above)
    tracker._describe_pipeline(experiment_id, params, is_new)
    return tracker


def _peak_memory() -> float:
    """The most memory this process has held, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere
