"""What the flows share: commands as tasks, the lock of the working tree, time limits, and what is worth another try.

A command gets a process group of its own, and its output goes line by line into the log of the task. One flow at a time
works in the project's folder; a second one ends at once and says who is at work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fast_goal.environment import WORK, prepare
from fast_goal.errors import FastGoalError
from fast_goal.files import read_json, write_json
from fast_goal.stages import STEPS
from fast_goal.tracking.identity import PIPELINE_VARIABLE

prepare()  # Prefect reads its telemetry switch when it is imported
# the first start in a fresh home takes about 20 s, Prefect's own limit
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

import psutil  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402
from prefect import Task, get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NOTE = ROOT / WORK / "pipeline.json"  # who works in the project's folder; beside it the lock
Logger = logging.Logger | logging.LoggerAdapter[Any]
LAST_LINES = 15  # of a failed command, in its error
STOP_SECONDS = 15  # for a step to write its state and close its run after SIGTERM
STEP_TIMEOUT_SECONDS = 3 * 24 * 3600.0  # a guess: longer than any step that still gets anywhere
RETRY_DELAYS = [10, 60]  # seconds; a network or a server that is away for longer is for the next firing
TEMPORARY = f"exited with {os.EX_TEMPFAIL}"  # how DVC tells that a step failed because something could not be reached


# Runs a command as the head of its process group, beside a guard that reads from the flow. Once the flow is gone, which may be
# by SIGKILL, the guard reads the end, and ends the group as the flow itself would have done.
GUARDED = f"""
exec 3<&0 </dev/null
(read -r _ <&3; trap '' TERM; kill -s TERM -- -$$; sleep {STOP_SECONDS}; kill -s KILL -- -$$) >/dev/null 2>&1 &
exec 3<&- "$@"
"""


class StepFailed(Exception):
    """A command ended with an error; the message has its last lines. `temporary`: the same may work in a while."""

    def __init__(self, message: str, temporary: bool = False):
        super().__init__(message)
        self.temporary = temporary


class Busy(FastGoalError):
    """Another flow works in this folder."""


def run_command(name: str, command: Sequence[str], pipeline: str, seconds: float) -> None:
    """Runs a command in the project's folder, with its output in the log of the task.

    The command and all that it starts end with this task, also when the flow is cancelled or killed: by SIGTERM, and by
    SIGKILL STOP_SECONDS later. Raises StepFailed where it fails, and where it takes longer than `seconds`.
    """
    logger = get_run_logger()
    places = [*filter(None, [os.environ.get("PATH")]), str(Path(sys.executable).parent)]  # the environment may not be active
    process = subprocess.Popen(
        ["sh", "-c", GUARDED, "sh", *command],
        cwd=ROOT,
        env={**os.environ, "PATH": os.pathsep.join(places), PIPELINE_VARIABLE: pipeline, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,  # the guard's
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last: deque[str] = deque(maxlen=LAST_LINES)
    late = threading.Event()
    temporary = False

    def end() -> None:
        late.set()
        _stop(process)

    clock = threading.Timer(min(seconds, threading.TIMEOUT_MAX), end)
    clock.daemon = True
    clock.start()
    try:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            if line.strip():
                last.append(line.rstrip())
                logger.info(line.rstrip())
                temporary = temporary or line.rstrip().endswith(TEMPORARY)
        status = process.wait()
    finally:
        clock.cancel()
        _stop(process)
        process.stdin.close()
    if not status and not late.is_set():
        return
    lines = "\n".join(f"    {line}" for line in last)
    if late.is_set():
        raise StepFailed(
            f"the step `{name}` was ended after {seconds:g} s (step_timeout_seconds). What it had saved is kept, and the next "
            f"run goes on from there. Its last lines:\n{lines}"
        )
    raise StepFailed(
        f"the step `{name}` failed (exit status {status}). Its last lines:\n{lines}", temporary or status == os.EX_TEMPFAIL
    )


def worth_another_try(task: Any, run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: a network or a store that was away, but no failed check and no wrong setting."""
    return isinstance(state.data, StepFailed) and state.data.temporary


def command_task(name: str, function: Callable[..., Any]) -> Task:
    """The function as a task of this name, tried again where what failed may work in a while."""
    return task(
        function,
        name=name,
        task_run_name=name,
        cache_policy=NO_CACHE,
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=worth_another_try,
    )


def run_step(step: str, pipeline: str, force: bool = False, seconds: float = STEP_TIMEOUT_SECONDS) -> None:
    """`dvc repro --single-item <step>`. Raises StepFailed."""
    forced = ["--force"] if force else []
    run_command(step, [sys.executable, "-m", "dvc", "repro", "--single-item", *forced, step], pipeline, seconds)


TASKS = {step: command_task(step, run_step) for step in STEPS}


def configure(experiment: str | None, overrides: Sequence[str] | None) -> None:
    """Composes params.yaml anew, as `fast-goal configure [experiment=...] [key=value ...]`, where one of them is given."""
    if experiment or overrides:
        from fast_goal.configure import configure

        configure([*([f"experiment={experiment}"] if experiment else []), *(overrides or [])], ROOT / "params.yaml")


def exit_status(name: str, work: Callable[[], int | None], kept: str) -> int:
    """Does the work of a flow's command line, and says on stderr why it ended early: 1 after an error, 130 after an interrupt.

    work: its own exit status; None is 0. kept: what an interrupt leaves.
    """
    try:
        return work() or 0
    except (StepFailed, FastGoalError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {kept}", file=sys.stderr)
        return 130


def pipeline_name() -> str:
    """What the steps of this flow run are known by, in MLflow and among the processes."""
    return f"prefect-{flow_run.get_id()}"


@contextlib.contextmanager
def working_tree(name: str, pipeline: str) -> Iterator[None]:
    """Keeps other flows out of the project's folder. Raises Busy, naming who is at work, without waiting.

    The lock dies with its holder, whatever ends that; steps that a killed holder left running are ended first.
    """
    NOTE.parent.mkdir(exist_ok=True)
    lock = FileLock(NOTE.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(_who(holder())) from None
    try:
        if left := holder():
            _end_leftovers(left["pipeline"])
        facts = {"flow": name, "run": flow_run.get_name(), "pipeline": pipeline, "process": os.getpid()}
        write_json(NOTE, {**facts, "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")})
        with contextlib.chdir(ROOT):
            yield
    finally:
        NOTE.unlink(missing_ok=True)
        lock.release()


def holder() -> dict[str, Any]:
    """The flow that works here, or was killed here: flow, run, pipeline, process, host and since. Empty without one."""
    try:
        return read_json(NOTE)
    except (FileNotFoundError, ValueError):
        return {}


def _who(found: Mapping[str, Any]) -> str:
    if not found:  # it has just begun
        return f"another flow has just begun to work in {ROOT}. Run this one when that has ended."
    return (
        f"the flow {found['flow']} (run {found['run']}, process {found['process']} on {found['host']}) works in {ROOT} "
        f"since {found['since']}. Run this one when that has ended, or end it with "
        f"`kill {found['process']}`: what is done is kept."
    )


def _end_leftovers(pipeline: str) -> None:
    """Ends the steps of a flow that was killed. They are known by the name of their pipeline, so no other process is."""
    left = [process for process in psutil.process_iter() if _belongs(process, pipeline)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        left = psutil.wait_procs(left, timeout=STOP_SECONDS)[1]


def _belongs(process: psutil.Process, pipeline: str) -> bool:
    try:
        return process.environ().get(PIPELINE_VARIABLE) == pipeline
    except psutil.Error:  # it ended meanwhile, or belongs to somebody else
        return False


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends what is left of the step's process group: first politely, so that it closes its MLflow run."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            end = time.monotonic() + STOP_SECONDS
            while time.monotonic() < end:
                process.poll()  # a process that ended belongs to its group until somebody asks
                os.killpg(process.pid, 0)  # raises once the group is empty
                time.sleep(0.1)
