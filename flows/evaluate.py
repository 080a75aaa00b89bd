"""Measures the fine-tuned model, and asks the gate what it thinks of it, as a Prefect flow.

python flows/evaluate.py              the step `evaluate`, where anything it depends on changed
python flows/evaluate.py --force      also where nothing changed
python flows/evaluate.py --gate       then `fast-goal gate --dry-run`, which moves no alias
"""

from __future__ import annotations

import argparse
import sys

from reproduce import summary
from running import STEP_TIMEOUT_SECONDS, TASKS, command_task, exit_status, pipeline_name, run_command, working_tree

from prefect import flow  # isort: skip  after `running`, which sets Prefect's switches
from prefect.artifacts import create_markdown_artifact  # isort: skip


def run_gate(pipeline: str, seconds: float) -> None:
    """The task `gate`: what it would decide about the registered candidate; its answer is in the log."""
    run_command("gate", ["fast-goal", "gate", "--dry-run"], pipeline, seconds)


GATE = command_task("gate", run_gate)


@flow(name="evaluate", description="Measures the fine-tuned model; asks the gate about the candidate, without effect.")
def evaluate(force: bool = False, gate: bool = False, step_timeout_seconds: float = STEP_TIMEOUT_SECONDS) -> None:
    """Runs the step `evaluate` on models/finetune as it is, and publishes the metrics as an artifact.

    force: also where nothing changed. gate: a dry run of the gate on the registered candidate follows.
    """
    pipeline = pipeline_name()
    with working_tree("evaluate", pipeline):
        TASKS["evaluate"]("evaluate", pipeline, force, step_timeout_seconds)
        if gate:
            GATE(pipeline, step_timeout_seconds)
        create_markdown_artifact(summary(), key="evaluate", description="Metrics of this run")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="flows/evaluate.py", description="Measure the fine-tuned model as a Prefect flow.")
    parser.add_argument("--force", action="store_true", help="also where nothing changed")
    parser.add_argument("--gate", action="store_true", help="then ask the gate about the registered candidate, without effect")
    parser.add_argument("--step-timeout-seconds", type=float, default=STEP_TIMEOUT_SECONDS, metavar="S")
    options = vars(parser.parse_args(arguments))
    return exit_status("evaluate", lambda: evaluate(**options), "the embeddings that were made are kept")


if __name__ == "__main__":
    sys.exit(main())
