"""Retraining with a gate, as a Prefect flow: what is out of date runs, and what is better goes into use.

    python flows/retrain.py                          once: new data or anything else out of date? then train, judge, promote
    python flows/retrain.py --cron "0 3 * * *"       at set times, until it is stopped
    python flows/retrain.py --experiment own_photos download.datasets.photos.root=my_photos

See docs/retraining.md. The exit status is 1 when a step fails, 130 after an interrupt, 0 for every decision of the gate.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from looking import LOG, Found, candidate_of, latest_decision, latest_drift, look, registered
from notifying import notify
from reproduce import check_overrides, command_line, summary
from running import (
    STEP_TIMEOUT_SECONDS,
    TASKS,
    Busy,
    StepFailed,
    command_task,
    configure,
    exit_status,
    pipeline_name,
    run_command,
    working_tree,
)

from prefect import flow, get_run_logger  # isort: skip  after `running`, which sets Prefect's switches
from prefect.artifacts import create_markdown_artifact  # isort: skip
from prefect.client.schemas.objects import State  # isort: skip
from prefect.states import Cancelled, Completed  # isort: skip

NOTHING = "nothing to do"


def run_look() -> Found:
    """The task `look`."""
    found = look()
    get_run_logger().info(found.text())
    return found


def run_drift(pipeline: str, seconds: float) -> dict[str, Any] | None:
    """The task `drift`: what `fast-goal drift` found."""
    run_command("drift", ["fast-goal", "drift"], pipeline, seconds)
    return latest_drift()


def run_gate(pipeline: str, seconds: float) -> dict[str, Any]:
    """The task `gate`: the decision of `fast-goal gate` about the version that is registered."""
    run_command("gate", ["fast-goal", "gate"], pipeline, seconds)
    decision = latest_decision()
    if decision is None or candidate_of(decision) not in (None, registered()):
        raise StepFailed(
            f"`fast-goal gate` left no decision about version {registered()} in models/decisions/latest.json. Run "
            "`fast-goal gate` by hand, then this flow again."
        )
    return decision


LOOK, DRIFT, GATE = (command_task(name, run) for name, run in (("look", run_look), ("drift", run_drift), ("gate", run_gate)))


@flow(name="retrain", description="Runs what is out of date, judges the new model, and promotes what passes the gate.")
def retrain(
    experiment: str | None = None,
    overrides: list[str] | None = None,
    force: bool = False,
    step_timeout_seconds: float = STEP_TIMEOUT_SECONDS,
) -> State[Any]:
    """Ends as Completed with `nothing to do`, `promoted version 3 ...` or `rejected version 3 ...`; as Failed where a step
    fails, and as Busy (a Cancelled one) where another flow works in this folder.

    experiment, overrides: params.yaml is composed anew, as by `fast-goal configure`. force: run all steps even where nothing
    changed. step_timeout_seconds: of one step, of drift and of the gate.
    """
    pipeline, firing = pipeline_name(), Firing()
    try:
        with working_tree("retrain", pipeline):
            configure(experiment, overrides)
            firing.found = found = LOOK()
            if found.nothing and not force:
                return firing.end({"decision": NOTHING})
            if found.out_of_date or force:
                for step, run in TASKS.items():
                    run(step, pipeline, force, step_timeout_seconds)
            if found.out_of_date or force or not found.judged:
                firing.drift = _drift(pipeline, step_timeout_seconds)
                decision = GATE(pipeline, step_timeout_seconds)
            else:
                decision = found.untold
            return firing.end(decision)
    except Busy as error:  # no failure: what is to be done is being done
        firing.log({"decision": "busy", "reasons": [str(error)]})
        return Cancelled(name="Busy", message=str(error))
    except Exception as error:
        firing.failed(error)
        raise
    except BaseException as error:  # cancelled, or interrupted
        firing.log({"decision": "interrupted", "reasons": [type(error).__name__]})
        raise


def _drift(pipeline: str, seconds: float) -> dict[str, Any] | None:
    """What the task found; None where it failed, which stops nothing."""
    state = DRIFT(pipeline, seconds, return_state=True)
    if state.is_completed():
        return state.result()
    get_run_logger().warning("The drift of the data and of the model is not known this time: %s", state.message)
    return None


class Firing:
    """One run of the flow, from the look to the line in the log."""

    def __init__(self) -> None:
        self.found = Found()
        self.drift: dict[str, Any] | None = None
        self._begin = time.monotonic()
        self._run = pipeline_name().removeprefix("prefect-")

    def end(self, decision: Mapping[str, Any]) -> State[Any]:
        """Publishes, tells and logs the decision; the flow's last state."""
        text = sentence(decision)
        drifted = bool(self.drift and self.drift["drifted"])
        if decision["decision"] != NOTHING:
            markdown = report(text, decision, self.drift)
            create_markdown_artifact(markdown, key="retrain", description="Decision of the gate, drift and metrics of this run")
        # Told before it is logged: after a kill in between it is told twice, which is better than never.
        if drifted:
            self._notify("drift", f"The data or the model drifted:\n{drift_lines(self.drift)}", self.drift)
        if decision["decision"] in ("promoted", "rejected"):
            self._notify(decision["decision"], text[0].upper() + text[1:], decision)
        self.log(decision)
        return Completed(message=text)

    def failed(self, error: Exception) -> None:
        """Logs it, and tells it."""
        self.log({"decision": "failed", "reasons": [str(error)]})
        self._notify("failed", f"The retraining failed: {error}", {"reasons": [str(error)]})

    def log(self, decision: Mapping[str, Any]) -> None:
        """Appends a line to models/decisions/log.jsonl."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "flow_run": self._run,
            "new_data": self.found.new_data,
            "out_of_date": self.found.out_of_date,
            "decision": decision["decision"],
            "decided": decision.get("time"),
            "candidate": candidate_of(decision),
            "champion": (decision.get("champion") or {}).get("version"),
            "reasons": decision.get("reasons", []),
            "drifted": None if self.drift is None else self.drift["drifted"],
            "seconds": round(time.monotonic() - self._begin, 1),
        }
        LOG.parent.mkdir(parents=True, exist_ok=True)
        with LOG.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _notify(self, event: str, text: str, details: Mapping[str, Any] | None) -> None:
        notify(event, text, self._run, details or {}, get_run_logger())


def sentence(decision: Mapping[str, Any]) -> str:
    """The decision in a line: the flow's last message."""
    version, champion = candidate_of(decision), (decision.get("champion") or {}).get("version")
    reasons = "; ".join(decision.get("reasons", []))
    match decision["decision"]:
        case "promoted":
            return f"promoted version {version} {f'in place of version {champion}' if champion else 'as the first champion'}"
        case "rejected":
            return f"rejected version {version}{f', version {champion} stays champion' if champion else ''}: {reasons}"
        case other:
            return f"{other}: {reasons}" if reasons else other


def report(text: str, decision: Mapping[str, Any], drift: Mapping[str, Any] | None) -> str:
    """Markdown: the decision with its checks, the drift, the metrics."""
    checks = [
        f"| {check['name']} | {'yes' if check['passed'] else 'no'} | {check.get('text', '').replace('|', '/')} |"
        for check in decision.get("checks", [])
    ]
    parts = [f"# {text[0].upper()}{text[1:]}"]
    if checks:
        parts.append("\n".join(["| check | passed | |", "|---|---|---|", *checks]))
    parts.append("## Drift\n\n" + (drift_lines(drift) if drift else "Not known for this run."))
    return "\n\n".join([*parts, summary().replace("# ", "## ", 1)])


def drift_lines(drift: Mapping[str, Any] | None) -> str:
    """The tests that found drift, a line each."""
    tests = (drift or {}).get("tests", [])
    drifted = [f"- {test['what']}: {test.get('text', '')}" for test in tests if test["drifted"]]
    return "\n".join(drifted) if drifted else f"None of {len(tests)} tests found any."


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_line("retrain", "Retrain where something is out of date, and promote what passes the gate.")
    parser.add_argument("--cron", help="when to do it, as crontab says it, such as '0 3 * * *'; runs until it is stopped")
    parser.add_argument("--timezone", help="of --cron, such as Europe/Berlin; else UTC")
    options = vars(parser.parse_intermixed_args(arguments))
    cron, timezone = options.pop("cron"), options.pop("timezone")
    check_overrides(parser, options["overrides"])
    if timezone and not cron:
        parser.error("--timezone is that of --cron")

    def work() -> int:
        if cron:
            from serving import serve

            return serve("retrain", cron, timezone, options)
        state = retrain(**options, return_state=True)
        if state.is_completed():
            print(f"retrain: {state.message}")
            return 0
        if state.name == "Busy":
            print(f"retrain: {state.message}", file=sys.stderr)
            return 1
        state.result()  # raises what ended it
        return 1

    return exit_status("retrain", work, "the steps that were done are kept, and the next run continues")


if __name__ == "__main__":
    sys.exit(main())
