"""A table of the paper's ablations as a Prefect flow: `fast-goal ablate` with its log and its table as an artifact.

    python flows/ablate.py VI                            all arms and seeds of table VI
    python flows/ablate.py VI seeds=[0] finetune.epochs=2  as `fast-goal ablate table=VI seeds=[0] finetune.epochs=2`

Interrupted or failed, it goes on with what is missing when it is run again. See docs/ablations.md.
"""

from __future__ import annotations

import argparse
import sys

from running import STEP_TIMEOUT_SECONDS, command_task, exit_status, pipeline_name, run_command, working_tree

from prefect import flow  # isort: skip  after `running`, which sets Prefect's switches


def run_ablate(words: list[str], jobs: int, pipeline: str, seconds: float) -> None:
    """The task `ablate`."""
    run_command("ablate", ["fast-goal", "ablate", *words, "--jobs", str(jobs)], pipeline, seconds)


ABLATE = command_task("ablate", run_ablate)


@flow(name="ablate", description="Runs an ablation of the paper through DVC's experiment queue and writes its table.")
def ablate(
    table: str = "VI", words: list[str] | None = None, jobs: int = 1, step_timeout_seconds: float = 10 * STEP_TIMEOUT_SECONDS
) -> None:
    """table: its Roman number. words: as for `fast-goal ablate`: seeds=[...], arms=[...], KEY=VALUE for all arms. jobs:
    experiments at a time. step_timeout_seconds: of the whole table."""
    pipeline = pipeline_name()
    with working_tree("ablate", pipeline):
        ABLATE([f"table={table}", *(words or [])], jobs, pipeline, step_timeout_seconds)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="flows/ablate.py", description="Run an ablation of the paper as a Prefect flow.")
    parser.add_argument("table", help="V, VI, VII, VIII, XIV, XV, XVI, XVII or degla")
    parser.add_argument("words", nargs="*", metavar="key=value", help="as for `fast-goal ablate`")
    parser.add_argument("--jobs", "-j", type=int, default=1, help="experiments at a time")
    options = vars(parser.parse_intermixed_args(arguments))
    return exit_status("ablate", lambda: ablate(**options), "the runs that ended are kept, and the next call goes on")


if __name__ == "__main__":
    sys.exit(main())
