"""A flow at set times: `python flows/retrain.py --cron "0 3 * * *"`.

Prefect's scheduler is part of its server. Where PREFECT_API_URL (or the profile) names none, one is started on loopback, with
its database in .fast_goal/prefect. It and the process that starts the runs are children of this one, which ends them in an
order that lets a running step save its state: Prefect's own runner would kill the flow at once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from filelock import FileLock, Timeout
from running import ROOT, STOP_SECONDS, holder

from fast_goal.environment import WORK, termination_raises
from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.files import read_json, write_json
from fast_goal.tracking.identity import is_alive, process_mark

from prefect.schedules import Cron  # isort: skip  after `running`
from prefect.server.schemas.schedules import CronSchedule  # isort: skip
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS  # isort: skip

HOME = ROOT / WORK / "prefect"
PROCESSES = HOME / "processes.json"  # for who comes after a kill
END_SECONDS = 15  # for the server to close its database, and the runner to pause its schedule


def serve(name: str, cron: str, timezone: str | None, parameters: Mapping[str, Any]) -> int:
    """Runs the flow of this name at these times until SIGINT or SIGTERM; returns the exit status.

    A firing while the last one still runs ends at once, by the lock, so they do not pile up. Raises ConfigError before
    anything is started for what is no time table; FastGoalError where the server does not start, and where another process
    of this folder runs flows at set times.
    """
    first = first_time(cron, timezone)
    HOME.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(HOME / "schedule.lock").acquire(timeout=0)
    except Timeout:
        raise FastGoalError(f"another process already runs flows of {ROOT} at set times. End that one first.") from None
    # what Prefect is told about its settings in the environment, its server and runner read as they start
    with lock, contextlib.suppress(KeyboardInterrupt, SystemExit), termination_raises(), contextlib.chdir(ROOT):
        _end([process for mark in _left() if (process := _alive(mark))])
        with _children() as start:
            url = PREFECT_API_URL.value() or _start_server(start)
            print(f"{name}: at {cron} ({timezone or 'UTC'}), next at {first:%Y-%m-%d %H:%M %Z}; {url}", flush=True)
            facts = json.dumps({"name": name, "cron": cron, "timezone": timezone or "UTC", "parameters": dict(parameters)})
            runner = start([sys.executable, str(Path(__file__)), facts], {"PREFECT_API_URL": url})
            raise FastGoalError(f"Prefect's runner ended by itself, with exit status {runner.wait()}; what it said is above")
    return 0


def first_time(cron: str, timezone: str | None) -> datetime:
    """The next time. Raises ConfigError for what is no time table, also for times that never come."""
    try:
        [first, *_] = CronSchedule(cron=cron, timezone=timezone or "UTC")._get_dates_generator(n=1)
    except ValueError as error:  # pydantic's are, too
        what = f"the timezone {timezone!r}" if "timezone" in str(error).lower() else f"{cron!r}"
        raise ConfigError(
            f"--cron {cron!r}: {what} cannot be understood. Expected five fields: minute, hour, day of the month, month, day "
            "of the week, such as '0 3 * * *' (every day at 3:00) or '30 2 * * mon' (on Mondays at 2:30); a timezone such as "
            "Europe/Berlin."
        ) from None
    return first


def run_when_due(facts: str) -> None:
    """The runner: starts a run of the flow whenever the server has one that is due. Takes what `serve` hands over."""
    given = json.loads(facts)
    flow = getattr(importlib.import_module(given["name"]), given["name"])
    flow.serve(
        name="scheduled",
        schedule=Cron(given["cron"], timezone=given["timezone"]),
        parameters=given["parameters"],
        tags=["fast-goal"],
        # Every firing starts at once, and meets the lock of the working tree. A limit of the runner would pile them up; one of
        # the server stays used up when the run that holds it is killed together with the server.
        limit=None,
        paused=False,
        print_starting_message=False,
    )


@contextlib.contextmanager
def _children() -> Iterator[Any]:
    """Gives `start(command, variables)`. What it started ends with the block, the last one first, and after the flow."""
    started: list[psutil.Popen] = []

    def start(command: Sequence[str], variables: Mapping[str, str], log: Path | None = None) -> psutil.Popen:
        with log.open("w") if log else contextlib.nullcontext() as stream:
            output = {"stdout": stream, "stderr": subprocess.STDOUT} if log else {}
            # a session of its own: Ctrl-C is for this process, which then ends the others
            environment = {**os.environ, **variables}
            process = psutil.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **output)
        started.append(process)
        write_json(PROCESSES, [process_mark(process) for process in started])
        return process

    try:
        yield start
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # the end has begun, and does not take long
            signal.signal(number, signal.SIG_IGN)
        _end_flow(started)
        for process in reversed(started):
            _end([process])
        PROCESSES.unlink(missing_ok=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _start_server(start: Any) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log, url = HOME / "server.log", f"http://127.0.0.1:{port}/api"
    # the pages ask port 4200 else
    server = start(command, {"PREFECT_HOME": str(HOME), "PREFECT_SERVER_UI_API_URL": url}, log)
    seconds = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return url
        time.sleep(0.3)
    raise FastGoalError(f"the Prefect server did not start within {seconds} s; what it said is in {log}")


def _end_flow(started: Sequence[psutil.Process]) -> None:
    """Asks the flow that works in this folder to end, if one of these processes runs it, and waits until its step has."""
    with contextlib.suppress(psutil.Error):  # it has ended, or does not: then the runner kills it, and the guard ends the step
        flow = psutil.Process(holder().get("process", os.getpid()))
        if set(flow.parents()) & set(started):
            flow.terminate()
            flow.wait(2 * STOP_SECONDS + END_SECONDS)


def _end(processes: Sequence[psutil.Process]) -> None:
    """Ends them with what they started, politely at first."""
    left = set(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            left |= set(process.children(recursive=True))
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        left = set(psutil.wait_procs(left, timeout=END_SECONDS)[1])


def _left() -> list[str]:
    """The marks of what a killed process left running: two servers would write to one database."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return read_json(PROCESSES)
    return []


def _alive(mark: str) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(int(mark.partition("@")[0])) if is_alive(mark) else None
    return None


if __name__ == "__main__":
    run_when_due(sys.argv[1])
