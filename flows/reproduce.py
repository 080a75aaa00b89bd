"""The pipeline as a Prefect flow: one task per step, named alike, each a `dvc repro --single-item`.

    python flows/reproduce.py                                     the pipeline as params.yaml has it
    python flows/reproduce.py --experiment demo finetune.epochs=3   composes params.yaml first
    python flows/reproduce.py --force                             runs the steps even where nothing changed

DVC decides what is out of date; Prefect adds retries, logs, schedules and a place to watch. With PREFECT_API_URL the
run is recorded on that server, else by one that lives as long as the flow. The exit status is 1 when a step fails and
130 after an interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from fast_goal.environment import prepare
from fast_goal.errors import FastGoalError
from fast_goal.files import read_json
from fast_goal.stages import STEPS
from fast_goal.tracking.identity import PIPELINE_VARIABLE
from fast_goal.tracking.model_card import metrics_table
from fast_goal.tracking.server import tracking_uri

prepare()  # Prefect reads its telemetry switch when it is imported
# the first start in a fresh home takes about 20 s, Prefect's own limit
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 15  # of a failed step, in its error
STOP_SECONDS = 15  # for a step to close its run after SIGTERM
RETRIES = {"download": {"retries": 2, "retry_delay_seconds": [10, 60]}}  # the network; the other steps would fail again


class StepFailed(Exception):
    """A step ended with an error; the message has its last lines."""


@flow(name="reproduce", description="Runs the pipeline: every step that is out of date, in order.")
def reproduce(experiment: str | None = None, overrides: list[str] | None = None, force: bool = False) -> None:
    """Runs all steps and publishes the metrics as an artifact.

    experiment, overrides: where one is given, params.yaml is composed anew, as by `fast-goal configure
    [experiment=...] [key=value ...]`. force: run the steps even where nothing changed.
    """
    if experiment or overrides:
        from fast_goal.configure import configure

        configure([*([f"experiment={experiment}"] if experiment else []), *(overrides or [])], ROOT / "params.yaml")
    pipeline = f"prefect-{flow_run.get_id()}"
    for step, run in TASKS.items():
        run(step, pipeline, force)
    create_markdown_artifact(summary(), key="reproduce", description="Metrics and registered model of this run")


def run_step(step: str, pipeline: str, force: bool) -> None:
    """`dvc repro --single-item <step>` in the project's folder, its output line by line in the log of the task.

    DVC and the step get a process group of their own, which ends with this task whatever ends it. Raises StepFailed.
    """
    logger = get_run_logger()
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), step]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, PIPELINE_VARIABLE: pipeline, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last.append(line.rstrip())
                logger.info(line.rstrip())
        status = process.wait()
    finally:
        _stop(process)
    if status:
        lines = "\n".join(f"    {line}" for line in last)
        raise StepFailed(f"the step `{step}` failed (exit status {status}). Its last lines:\n{lines}")


TASKS = {step: task(run_step, name=step, task_run_name=step, cache_policy=NO_CACHE, **RETRIES.get(step, {})) for step in STEPS}


def summary() -> str:
    """The metrics table and the registered model, from the files the steps wrote."""
    report, registration = ROOT / "models/reports/metrics.json", ROOT / "models/register/registration.json"
    parts = ["# Results"]
    if report.is_file():
        parts.append(metrics_table(read_json(report)))
    if registration.is_file():
        made = read_json(registration)
        parts.append(
            f"Registered as version {made['version']} of `{made['model']}`: `{made['uri']}` (MLflow: `{tracking_uri()}`)"
        )
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="flows/reproduce.py", description="Run the pipeline as a Prefect flow.")
    parser.add_argument("--experiment", help="an experiment of src/fast_goal/conf/experiment; composes params.yaml first")
    parser.add_argument("--force", action="store_true", help="run the steps even where nothing changed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for `fast-goal configure`")
    options = parser.parse_intermixed_args(arguments)
    for override in options.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is not of the form key=value")
    try:
        reproduce(experiment=options.experiment, overrides=options.overrides, force=options.force)
    except (StepFailed, FastGoalError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reproduce: interrupted; the steps that were done are kept, and the next run continues", file=sys.stderr)
        return 130
    return 0


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends what is left of the step's process group: first politely, so that it closes its MLflow run."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            end = time.monotonic() + STOP_SECONDS
            while time.monotonic() < end:
                process.poll()  # a process that ended belongs to its group until somebody asks
                os.killpg(process.pid, 0)  # raises once the group is empty
                time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
