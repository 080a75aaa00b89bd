"""models/drift/history.jsonl: one line for each run, in the order of time.

A line is added by one write. What a killed run left of a line is closed by the next one's line end, and passed over by readers.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIME = "%Y-%m-%dT%H:%M:%SZ"  # UTC
log = logging.getLogger(__name__)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line and has it written to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, allow_nan=False) + "\n"
    with path.open("a+b") as stream:
        if stream.tell() and _last_byte(stream) != b"\n":
            text = "\n" + text
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, none where there is no file. Lines that are broken are counted in a warning."""
    if not path.exists():
        return []
    found, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if isinstance(values, dict):
            found.append(values)
        elif line.strip():
            broken += 1
    if broken:
        log.warning("%s: %d broken lines are passed over.", path, broken)
    return found


def unsteady(measured: Mapping[str, Mapping[str, Any]], probe: str, history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models that measure otherwise on the same probe set than the last time, with the same weights.

    Nothing of the model can have changed then: it is the machine, a library or this code.
    """
    found = []
    for model, values in measured.items():
        for line in reversed(history):
            earlier = [other for other in line["probe"].get("models", {}).values() if other["digest"] == values["digest"]]
            if line["probe"].get("digest") == probe and earlier:
                if any(abs(earlier[0]["R@1"][way] - values["R@1"][way]) > 1e-6 for way in values["R@1"]):
                    found.append(model)
                break
    return found


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1)
