"""What there is to do: is anything out of date, and has the candidate been judged? Read from files, within seconds.

DVC judges what is out of date; `fast-goal gate` leaves its decisions in models/decisions, and the flow `retrain` a line for
each time it was fired in models/decisions/log.jsonl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from running import ROOT, StepFailed

from fast_goal.files import read_json

CHANGES_SHOWN = 3  # of a step, in the log
STATUS_SECONDS = 3600  # to hash data that DVC has not seen yet
REGISTRATION = ROOT / "models/register/registration.json"
DECISIONS = ROOT / "models/decisions"
LATEST = DECISIONS / "latest.json"
LOG = DECISIONS / "log.jsonl"
DRIFT = ROOT / "models/drift"


@dataclass(frozen=True)
class Found:
    """out_of_date: each step with what changed. new_data: whether the watched source is among it. candidate: the version
    that was registered last. judged: whether the gate has decided on it. untold: a decision that is not in the log yet."""

    out_of_date: dict[str, list[str]] = field(default_factory=dict)
    new_data: bool = False
    candidate: str | None = None
    judged: bool = True
    untold: dict[str, Any] | None = None

    @property
    def nothing(self) -> bool:
        return not self.out_of_date and self.judged and self.untold is None

    def text(self) -> str:
        """One sentence for the log."""
        if self.out_of_date:
            steps = "; ".join(f"{step} ({_shown(changes)})" for step, changes in self.out_of_date.items())
            return f"{'new data. ' if self.new_data else ''}Out of date: {steps}"
        if not self.judged:
            return f"nothing is out of date; version {self.candidate} was registered and not judged"
        if self.untold:
            return "nothing is out of date; the last decision has not been told"
        return "nothing is out of date, and the candidate has been judged"


def _shown(changes: list[str]) -> str:
    more = len(changes) - CHANGES_SHOWN
    return ", ".join(changes[:CHANGES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def look() -> Found:
    """Reads the state of the working tree. Raises StepFailed where DVC cannot say what is out of date."""
    changes = out_of_date()
    candidate = registered()
    decided = latest_decision()
    return Found(
        out_of_date=changes,
        new_data=watched() in changes.get("download", []),
        candidate=candidate,
        judged=candidate is None or was_judged(candidate),
        untold=None if decided is None or _is_told(decided) else decided,
    )


def out_of_date() -> dict[str, list[str]]:
    """The steps that `dvc status` names, each with the paths and parameters that changed."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STATUS_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise StepFailed(f"`dvc status` has not ended within {STATUS_SECONDS} s") from None
    if done.returncode:
        raise StepFailed(f"`dvc status` failed (exit status {done.returncode}):\n{done.stderr.strip()[-2000:]}")
    return {step: list(_paths(changes)) for step, changes in json.loads(done.stdout or "{}").items()}


def _paths(changes: list[Any]) -> Any:
    """From DVC's nested lists: {"changed deps": {path: "modified"}}, of params.yaml {key: ...}; or a word."""
    for change in changes:
        if not isinstance(change, Mapping):
            yield str(change)  # "changed command", "always changed"
            continue
        for paths in change.values():
            for path, how in paths.items():
                yield from (f"{path}:{key}" for key in how) if isinstance(how, Mapping) else [path]


def watched() -> str | None:
    """`download.watch`: the folder or file in which new data arrive."""
    try:
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        return os.path.normpath(params["download"]["watch"])
    except (FileNotFoundError, KeyError, TypeError):
        return None


def registered() -> str | None:
    """The version that the step `register` made last."""
    return str(read_json(REGISTRATION)["version"]) if REGISTRATION.is_file() else None


def latest_decision() -> dict[str, Any] | None:
    """What the gate decided last; None before its first decision and after a dry run."""
    decision = read_json(LATEST) if LATEST.is_file() else None
    return None if decision is None or decision.get("dry_run") else decision


def was_judged(version: str) -> bool:
    """Whether a decision names it as candidate."""
    paths = [LATEST, *DECISIONS.glob(f"*-v{version}/decision.json")]
    decisions = [read_json(path) for path in paths if path.is_file()]
    return any(candidate_of(decision) == version and not decision.get("dry_run") for decision in decisions)


def candidate_of(decision: Mapping[str, Any]) -> str | None:
    """The version that was judged, as text."""
    return str(decision["candidate"]["version"]) if decision.get("candidate") else None


def latest_drift() -> dict[str, Any] | None:
    """The last comparison that `fast-goal drift` wrote; its folders are named after the time."""
    paths = sorted(DRIFT.glob("*/drift.json"))
    return read_json(paths[-1]) if paths else None


def _is_told(decision: Mapping[str, Any]) -> bool:
    lines = LOG.read_text(encoding="utf-8").splitlines() if LOG.is_file() else []
    return any(json.loads(line).get("decided") == decision["time"] for line in lines if line.endswith("}"))
