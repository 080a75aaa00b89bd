"""`fast-goal doctor`: what this machine and this project have, what is missing, and how to mend it.

Nothing is changed, and nothing is asked over the network but the servers that MLFLOW_TRACKING_URI and PREFECT_API_URL
name.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fast_goal import environment
from fast_goal.config import PARAMS_FILE, load_params
from fast_goal.errors import FastGoalError

MAIN_PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "ultralytics-opencv-headless",
    "great_expectations",
    "dvc",
    "mlflow",
    "prefect",
    "hydra-core",
)
FOLDERS = ("data", "models", ".fast_goal")
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "YOLO_OFFLINE")
GIB = 2**30
DISK_WARN, DISK_FAIL = 10 * GIB, 2 * GIB
MEMORY_WARN = 4 * GIB
SERVER_TIMEOUT = 5.0  # seconds

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the table. `fix` is empty where all is well."""

    name: str
    status: Status
    found: str
    fix: str = ""


def run() -> list[Check]:
    """All checks. Never raises: a check that breaks is a failed check."""
    parts: dict[str, Callable[[], list[Check]]] = {
        "python": _python,
        "packages": _packages,
        "device": _device,
        "machine": _machine,
        "torchvision": _torchvision,
        "write access": _write_access,
        "disk": _disk,
        "switches": _switches,
        "git": _git,
        "dvc": _dvc,
        "params.yaml": _params,
        "mlflow": _mlflow,
        "prefect": _prefect,
    }
    environment.prepare()
    checks = []
    for name, part in parts.items():
        try:
            checks += part()
        except Exception as error:  # a broken installation may raise anything, and the other checks still tell something
            checks.append(Check(name, "fail", f"the check broke: {type(error).__name__}: {error}", "reinstall: `make setup`"))
    return checks


def report() -> int:
    """Prints the checks as a table; returns the exit status, 1 if one failed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    checks = run()
    table = Table(title="fast-goal doctor", title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\nfix: {check.fix}", "bold")
        table.add_row(check.name, Text(check.status, colours[check.status]), found)
    Console().print(table)
    failed = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    print(f"{len(checks)} checks: {failed} failed, {warned} with a warning.")
    return 1 if failed else 0


def _python() -> list[Check]:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("fast-goal")["Requires-Python"] or ""
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return [Check("python", "ok", version)]
    fix = f"install Python {wanted} and run `make setup PYTHON=python3.11`"
    return [Check("python", "fail", f"{version}, expected {wanted}", fix)]


def _packages() -> list[Check]:
    """One line for each main package and for each other one that is missing or out of range."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in importlib.metadata.requires("fast-goal") or []]
    checks = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = "`make setup` installs requirements.lock"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(requirement.name, "fail", f"not installed, expected {requirement.specifier or 'any'}", fix))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            checks.append(Check(requirement.name, "fail", f"{version}, expected {requirement.specifier}", fix))
        elif requirement.name in MAIN_PACKAGES:
            checks.append(Check(requirement.name, "ok", version))
    return checks


def _device() -> list[Check]:
    import torch

    try:
        device = environment.device()
    except FastGoalError as error:
        return [Check("device", "fail", str(error), "set FAST_GOAL_DEVICE to cpu, or unset it")]
    if device.type != "cuda":
        return [Check("device", "ok", f"{device.type}, {torch.get_num_threads()} threads, precision fp32")]
    facts = torch.cuda.get_device_properties(device)
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return [Check("device", "ok", f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {bf16}")]


def _machine() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{os.cpu_count()} cores, {memory.total / GIB:.1f} GiB memory, {memory.available / GIB:.1f} GiB free"
    if memory.available < MEMORY_WARN:
        fix = "close other programs, or lower finetune.batch_size and flism.batch_size"
        return [Check("machine", "warn", found, fix)]
    return [Check("machine", "ok", found)]


def _torchvision() -> list[Check]:
    """Whether torchvision imports and non-maximum suppression, which the detector needs, gives the right answer."""
    import torch

    name = "torchvision operators"
    fix = "install the torch and torchvision of one build: `make setup`"
    try:
        import torchvision
        from torchvision import extension

        # the second box overlaps the first by 0.9 and is weaker, the third stands apart
        boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    except (ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        return [Check(name, "fail", f"broken: {str(error).splitlines()[0]}", fix)]
    if kept != [0, 2]:
        return [Check(name, "fail", f"broken: nms kept {kept} instead of [0, 2]", fix)]
    if extension._has_ops():
        return [Check(name, "ok", "native")]
    return [Check(name, "ok", "the project's own nms (torchvision's compiled part does not fit this torch)")]


def _write_access() -> list[Check]:
    checks = []
    for name in FOLDERS:
        folder = _existing(Path(name))
        try:
            with tempfile.TemporaryFile(dir=folder):
                checks.append(Check(f"write access {name}/", "ok", "yes" if folder == Path(name) else "yes, not made yet"))
        except OSError as error:
            fix = f"give yourself write access: `chmod -R u+w {folder}`, or move the project to a folder of yours"
            checks.append(Check(f"write access {name}/", "fail", f"{folder.resolve()}: {error.strerror}", fix))
    return checks


def _disk() -> list[Check]:
    free = shutil.disk_usage(".").free
    status: Status = "fail" if free < DISK_FAIL else "warn" if free < DISK_WARN else "ok"
    fix = "" if status == "ok" else "free some space; `dvc gc --workspace` removes cached outputs that no longer matter"
    return [Check("disk", status, f"{free / GIB:.1f} GiB free", fix)]


def _switches() -> list[Check]:
    """The switches as they are in effect: `prepare` has filled in those the user did not set."""
    wanted = environment.TELEMETRY_SWITCHES
    changed = [f"{name}={os.environ.get(name)}" for name, value in wanted.items() if os.environ.get(name) != value]
    if changed:
        fix = f"unset {' '.join(entry.partition('=')[0] for entry in changed)}, unless you want these reports to be sent"
        telemetry = Check("telemetry", "warn", f"may be on: {', '.join(changed)}", fix)
    else:
        telemetry = Check("telemetry", "ok", "off: " + ", ".join(f"{name}={value}" for name, value in wanted.items()))
    offline = [f"{name}={os.environ.get(name, 'unset')}" for name in OFFLINE_SWITCHES]
    return [telemetry, Check("downloads", "ok", f"{', '.join(offline)} (set to 1 to forbid downloads of weights)")]


def _git() -> list[Check]:
    if shutil.which("git") is None:
        return [Check("git", "fail", "not installed", "install git")]
    inside = _command("git", "rev-parse", "--is-inside-work-tree")
    if inside.returncode:
        return [Check("git", "fail", f"{Path.cwd()} is no git repository", "`git init`, or change to the project's folder")]
    commit = _command("git", "rev-parse", "--short", "HEAD")
    if commit.returncode:
        return [Check("git", "warn", "a repository without a commit", "commit once: runs are tagged with the commit")]
    return [Check("git", "ok", f"commit {commit.stdout.strip()}")]


def _dvc() -> list[Check]:
    name = "dvc repository"
    if not Path(".dvc").is_dir():
        return [Check(name, "fail", f"no .dvc folder in {Path.cwd()}", "`dvc init`, or change to the project's folder")]
    if not Path("dvc.yaml").is_file():
        return [Check(name, "fail", f"no dvc.yaml in {Path.cwd()}", "restore it: `git checkout dvc.yaml`")]
    return [Check(name, "ok", str(Path(".dvc").resolve()))]


def _params() -> list[Check]:
    from fast_goal.data.sources import source_config
    from fast_goal.objectives import check_objectives

    try:
        params = load_params()
        for name, values in params.download.datasets.items():
            source_config(values, f"download.datasets.{name}")
        check_objectives(params)
    except FastGoalError as error:
        fix = "correct the key, or write the file anew with `fast-goal configure`"
        return [Check(str(PARAMS_FILE), "fail", str(error), fix)]
    return [Check(str(PARAMS_FILE), "ok", f"experiment {params.experiment}, data set {params.download.train_dataset}")]


def _mlflow() -> list[Check]:
    from fast_goal.tracking.server import tracking_uri

    uri = tracking_uri()
    name, shown = "mlflow store", _without_password(uri)
    if uri.startswith(("http://", "https://")):
        problem = _unreachable(f"{uri.rstrip('/')}/health")
        fix = f"start the server, correct MLFLOW_TRACKING_URI, or unset it to record in the project's mlflow.db ({problem})"
        return [Check(name, "fail", f"{shown} does not answer", fix) if problem else Check(name, "ok", f"{shown} answers")]
    if uri.startswith("sqlite:///"):
        problem = _unwritable(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
        fix = "close the program that holds the file, give yourself write access, or move it away: a new one is made"
        return [Check(name, "fail", f"{shown}: {problem}", fix) if problem else Check(name, "ok", f"{shown}, writable")]
    return [Check(name, "ok", f"{shown} (not tried)")]


def _prefect() -> list[Check]:
    uri = os.environ.get("PREFECT_API_URL", "")
    if not uri:
        return [Check("prefect", "ok", "no server: each flow starts its own for the time of the run")]
    problem = _unreachable(f"{uri.rstrip('/')}/health")
    shown = _without_password(uri)
    if problem:
        fix = f"start it (`prefect server start`), correct PREFECT_API_URL, or unset it ({problem})"
        return [Check("prefect", "fail", f"{shown} does not answer", fix)]
    return [Check("prefect", "ok", f"server {shown} answers")]


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)


def _unreachable(url: str) -> str:
    """Why a server does not answer, or an empty text. An HTTP error is an answer: it may want a login."""
    try:
        with urllib.request.urlopen(url, timeout=SERVER_TIMEOUT):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _unwritable(path: Path) -> str:
    """Why the SQLite file cannot be written, or an empty text. A file that does not exist is not made."""
    if not path.exists():
        folder = _existing(path.parent)
        return "" if os.access(folder, os.W_OK) else f"no write access to {folder}"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=SERVER_TIMEOUT)) as connection:
            connection.execute("BEGIN IMMEDIATE")  # takes the write lock, which a read-only or locked file refuses
            connection.execute("PRAGMA schema_version")
            connection.rollback()
    except sqlite3.Error as error:
        return str(error)
    return ""


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    login, at, host = rest.rpartition("@")
    return f"{scheme}{separator}***@{host}" if at and login else uri
