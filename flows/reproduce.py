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
import sys
from collections.abc import Sequence

from running import ROOT, STEP_TIMEOUT_SECONDS, TASKS, configure, exit_status, pipeline_name, working_tree

from fast_goal.files import read_json
from fast_goal.tracking.model_card import metrics_table
from fast_goal.tracking.server import tracking_uri

from prefect import flow  # isort: skip  after `running`, which sets Prefect's switches
from prefect.artifacts import create_markdown_artifact  # isort: skip


@flow(name="reproduce", description="Runs the pipeline: every step that is out of date, in order.")
def reproduce(
    experiment: str | None = None,
    overrides: list[str] | None = None,
    force: bool = False,
    step_timeout_seconds: float = STEP_TIMEOUT_SECONDS,
) -> None:
    """Runs all steps and publishes the metrics as an artifact.

    experiment, overrides: where one is given, params.yaml is composed anew, as by `fast-goal configure
    [experiment=...] [key=value ...]`. force: run the steps even where nothing changed. step_timeout_seconds: of one step.
    """
    pipeline = pipeline_name()
    with working_tree("reproduce", pipeline):
        configure(experiment, overrides)
        for step, run in TASKS.items():
            run(step, pipeline, force, step_timeout_seconds)
        create_markdown_artifact(summary(), key="reproduce", description="Metrics and registered model of this run")


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


def command_line(name: str, description: str) -> argparse.ArgumentParser:
    """The arguments of the flows that run the pipeline."""
    parser = argparse.ArgumentParser(prog=f"flows/{name}.py", description=description)
    parser.add_argument("--experiment", help="an experiment of src/fast_goal/conf/experiment; composes params.yaml first")
    parser.add_argument("--force", action="store_true", help="run the steps even where nothing changed")
    parser.add_argument(
        "--step-timeout-seconds", type=float, default=STEP_TIMEOUT_SECONDS, metavar="S", help="the longest that a step may take"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for `fast-goal configure`")
    return parser


def check_overrides(parser: argparse.ArgumentParser, overrides: Sequence[str]) -> None:
    """Ends the program, saying what is wrong, where one is not of the form key=value."""
    for override in overrides:
        if "=" not in override:
            parser.error(f"{override!r} is not of the form key=value")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_line("reproduce", "Run the pipeline as a Prefect flow.")
    options = parser.parse_intermixed_args(arguments)
    check_overrides(parser, options.overrides)
    return exit_status(
        "reproduce", lambda: reproduce(**vars(options)), "the steps that were done are kept, and the next run continues"
    )


if __name__ == "__main__":
    sys.exit(main())
