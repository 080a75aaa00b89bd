"""`fast-goal schedule --cron "0 3 * * *"`: retrains at set times until it is stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fast_goal.errors import ConfigError

FLOW = Path("flows/retrain.py")  # of the project in the current folder


def run(cron: str, words: Sequence[str] = ()) -> int:
    """Becomes `python flows/retrain.py --cron ... words`, so that signals and the exit status are that program's.

    Returns only by an error: ConfigError where the current folder is not the project's.
    """
    if not FLOW.is_file():
        raise ConfigError(f"{FLOW} is not in {Path.cwd()}. Run `fast-goal schedule` in the project's folder.")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(FLOW), "--cron", cron, *words])
