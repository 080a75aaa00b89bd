"""Which pipeline a step belongs to, which process runs it, and which code and data it stands for.

Each step of `dvc repro` is a process of its own. What makes them one pipeline is what started them: a Prefect flow,
which says so in FAST_GOAL_PIPELINE_ID, or the dvc process above them.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from fast_goal.files import file_digest

if TYPE_CHECKING:
    import psutil

PIPELINE_VARIABLE = "FAST_GOAL_PIPELINE_ID"
PARENT_VARIABLE = "FAST_GOAL_PARENT_RUN"  # the id of the run that pipelines' runs stand below, for many that belong together
DVC_EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # which DVC sets


def pipeline_id() -> str:
    """FAST_GOAL_PIPELINE_ID, else the nearest dvc process above this one, else (a step run by hand) a fresh one."""
    given = os.environ.get(PIPELINE_VARIABLE, "")
    if given:
        return re.sub(r"[^\w.@-]", "_", given)  # it becomes part of a search expression
    import psutil

    for process in psutil.Process().parents():
        try:
            if is_dvc(process.name(), process.cmdline()):
                return f"dvc-{host()}-{process_mark(process)}"
        except psutil.Error:  # it ended meanwhile, or belongs to somebody else
            continue
    return f"single-{uuid.uuid4().hex}"


def is_whole(pipeline: str) -> bool:
    """Whether a `pipeline_id` is that of a pipeline, not of a step that was run by hand."""
    return not pipeline.startswith("single-")


def parent_run() -> str | None:
    """The MLflow run that this pipeline's run stands below, if any."""
    return os.environ.get(PARENT_VARIABLE) or None


def dvc_experiment() -> str | None:
    """The name of DVC's experiment that this step belongs to, if any."""
    return os.environ.get(DVC_EXPERIMENT_VARIABLE) or None


def is_dvc(name: str, command: list[str]) -> bool:
    """Whether a process is dvc: run as `dvc`, as `python .../bin/dvc` or as `python -m dvc`."""
    if Path(name).stem == "dvc":
        return True
    programs = [Path(part).stem for part in command[:2]]
    return "dvc" in programs or any(pair == ("-m", "dvc") for pair in itertools.pairwise(command))


def host() -> str:
    """The name of this machine, fit for a search expression."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def process_mark(process: psutil.Process) -> str:
    """Process id and start, so that a reused id is not taken for the same process.

    The start counts from the machine's, because the clock may be set while a process runs.
    """
    import psutil

    return f"{process.pid}@{process.create_time() - psutil.boot_time():.2f}"


def is_alive(mark: str) -> bool:
    """Whether the process of a `process_mark` of this machine still runs."""
    import psutil

    try:
        process = psutil.Process(int(mark.partition("@")[0]))
        return process_mark(process) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False
    except psutil.AccessDenied:
        return True


def git_commit() -> str:
    """The commit checked out, or `none` outside a repository with commits."""
    return _git("rev-parse", "--verify", "--quiet", "HEAD") or "none"


def git_dirty() -> bool:
    """Whether the working tree differs from the commit, apart from files git does not know.

    The project's dvc.lock does not count: the pipeline itself rewrites it, step by step, and its hash is recorded anyway.
    """
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(exclude)dvc.lock"))


def dvc_lock() -> str:
    """A short hash of dvc.lock, or `none`."""
    return file_digest("dvc.lock") if Path("dvc.lock").is_file() else "none"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
