"""decision.md: what the gate decided, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {
    "promoted": "version {version} of {model} is promoted",
    "rejected": "version {version} of {model} is rejected",
    "nothing to judge": "nothing to judge about version {version} of {model}",
    "rolled back": "version {version} of {model} is rolled back",
}
MARKS = {True: "✓", False: "✗"}


def title(record: Mapping[str, Any]) -> str:
    """The decision in a sentence without its end."""
    words = TITLES[record["decision"]].format(version=record["candidate"]["version"], model=record["model"])
    return f"{words.replace(' is ', ' would be ')} (dry run: nothing was changed)" if record["dry_run"] else words


def markdown(record: Mapping[str, Any]) -> str:
    """`record` is what decision.json holds."""
    candidate, champion = record["candidate"], record["champion"]
    against = "none; held against the base model, models/base/clip" if champion is None else _version(champion)
    back = record["decision"] == "rolled back"
    facts = {
        "taken back" if back else "candidate": _version(candidate),
        "champion now" if back else "champion": against,
        "test set": f"{record['dataset']}, split {record['split']}, digest `{record['dataset_digest']}`"
        if record["dataset"]
        else None,
        "commit": f"`{record['git_commit']}`",
        "time": record["time"],
    }
    lines = [f"# Gate: {title(record)}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value]
    lines += ["", "## Why", "", *(f"* {reason}" for reason in record["reasons"])]
    if record["checks"]:
        lines += ["", "## Checks", "", "| | check | measured | bound | in words |", "|---|---|---:|---:|---|"]
        for check in record["checks"]:
            words = check["text"].replace("|", "\\|")
            cells = [MARKS[check["passed"]], check["name"], _number(check["measured"]), _number(check["bound"]), words]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _version(one: Mapping[str, Any]) -> str:
    return f"version {one['version']}, digest `{one['digest']}`"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
