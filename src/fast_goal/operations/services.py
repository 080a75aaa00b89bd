"""`fast-goal services`: an MLflow and a Prefect server of the project's own, on loopback, without containers.

Their data and logs are below one folder (.fast_goal/services): mlflow.db, artifacts/, prefect/, mlflow.log, prefect.log. Both
end with this command: by Ctrl-C, SIGTERM, or when one of them ends by itself; on Linux also when this command is killed.
compose.yaml is the same in containers, with PostgreSQL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from fast_goal.environment import TELEMETRY_SWITCHES, termination_raises
from fast_goal.errors import ConfigError, FastGoalError

HOST = "127.0.0.1"
START_SECONDS = 180  # to answer; 14 to 20 s each on an idle machine, more on the first start, which makes the tables
STOP_SECONDS = 15  # to end by SIGTERM
POLL_SECONDS = 0.5
LAST_LINES = 15  # of a log, in an error
PR_SET_PDEATHSIG = 1  # prctl: the signal to get when the parent ends
# Each server is started by a shell of its own session, which passes SIGTERM on to all of it: both servers start others.
GUARD = 'trap "trap - TERM; kill -TERM 0" TERM; "$@" & wait $!'


@dataclass(frozen=True)
class Service:
    """A server: its command, what its environment has beside ours, and the path that answers once it works."""

    name: str
    command: Sequence[str]
    port: int
    health: str
    variable: str  # by which clients find it
    path: str = ""  # of its API, in that variable
    environment: Mapping[str, str] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


def services(data: Path, mlflow_port: int, prefect_port: int) -> list[Service]:
    """The two servers, with their data below the folder `data`."""
    mlflow = Service(
        "MLflow",
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{data / 'mlflow.db'}"),
            *("--artifacts-destination", str(data / "artifacts"), "--serve-artifacts"),
        ],
        mlflow_port,
        "/health",
        "MLFLOW_TRACKING_URI",
        environment={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    prefect = Service(
        "Prefect",
        [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)],
        prefect_port,
        "/api/health",
        "PREFECT_API_URL",
        path="/api",
        # the page asks the server where the API is, by the address that the server was told
        environment={
            "PREFECT_HOME": str(data / "prefect"),
            "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{prefect_port}/api",
            "PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api",
        },
    )
    return [mlflow, prefect]


def run(data: Path, mlflow_port: int = 5000, prefect_port: int = 4200) -> int:
    """Starts both, tells where they are, and waits. Returns the exit status: 0 when asked to end.

    Raises ConfigError for a port or a folder in use, FastGoalError where a server ends by itself.
    """
    data = data.absolute()
    wanted = services(data, mlflow_port, prefect_port)
    data.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(data / "lock", timeout=0):
            check_ports(wanted)
            return keep(wanted, data, lambda text: print(text, flush=True))
    except Timeout:
        raise ConfigError(f"{data} is in use by another `fast-goal services`: end that one, or give --data FOLDER") from None


def check_ports(wanted: Sequence[Service]) -> None:
    """Raises ConfigError for a port that is taken or asked for twice."""
    if len({service.port for service in wanted}) < len(wanted):
        raise ConfigError(f"--mlflow-port and --prefect-port are both {wanted[0].port}: two servers need two ports")
    for service in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left counts as free
            try:
                probe.bind((HOST, service.port))
            except OSError as error:
                option = f"--{service.name.lower()}-port"
                raise ConfigError(
                    f"port {service.port} of {HOST}, meant for {service.name}, cannot be used ({error.strerror}). End what "
                    f"listens there, or choose another with {option} PORT"
                ) from None


def keep(wanted: Sequence[Service], data: Path, say: Callable[[str], None]) -> int:
    """Starts the services, and ends all of them when this process is told to end or one of them has ended."""
    started: dict[str, subprocess.Popen] = {}
    try:
        with termination_raises():
            for service in wanted:
                started[service.name] = start(service, log_of(service, data))
            wait_until_they_answer(wanted, started, data, say)
            for service in wanted:
                say(f"{service.name}: {service.url}   log: {log_of(service, data)}")
            say("For the other commands, in their shell:")
            for service in wanted:
                say(f"  export {service.variable}={service.url}{service.path}")
            say("Ctrl-C ends both.")
            while True:
                check_alive(wanted, started, data)
                time.sleep(POLL_SECONDS)
    except (KeyboardInterrupt, SystemExit):
        say("Ending both.")
        return 0
    finally:
        stop(list(started.values()))


def start(service: Service, log: Path) -> subprocess.Popen:
    """Starts a server with its output in `log`."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent() -> None:  # in the child: the kernel sends it SIGTERM when this command dies, however that comes
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    with log.open("wb") as output:
        return subprocess.Popen(
            ["/bin/sh", "-c", GUARD, service.name, *service.command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**TELEMETRY_SWITCHES, **os.environ, **(service.environment or {})},
            start_new_session=True,  # Ctrl-C is this command's to pass on
            preexec_fn=end_with_parent,
        )


def wait_until_they_answer(
    wanted: Sequence[Service], started: Mapping[str, subprocess.Popen], data: Path, say: Callable[[str], None]
) -> None:
    """Raises FastGoalError for a server that ends, or does not answer in time."""
    begin = told = time.monotonic()
    waiting = list(wanted)
    say(f"Starting {' and '.join(service.name for service in wanted)}; this takes about half a minute.")
    while waiting:
        check_alive(wanted, started, data)
        for service in list(waiting):
            if answers(service):
                waiting.remove(service)
                say(f"{service.name} answers after {time.monotonic() - begin:.0f} s")
        now = time.monotonic()
        if waiting and now - begin > START_SECONDS:
            names = " and ".join(service.name for service in waiting)
            raise FastGoalError(f"no answer from {names} within {START_SECONDS} s.{last_lines(waiting[0], data)}")
        if waiting and now - told > 10:
            told = now
            say(f"  {now - begin:.0f} s, waiting for {' and '.join(service.name for service in waiting)}")
        time.sleep(POLL_SECONDS)


def answers(service: Service) -> bool:
    """Whether the server says that it is well."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never behind a proxy
        with opener.open(service.url + service.health, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def check_alive(wanted: Sequence[Service], started: Mapping[str, subprocess.Popen], data: Path) -> None:
    """Raises FastGoalError for a server that has ended."""
    for service in wanted:
        status = started[service.name].poll()
        if status is not None:
            raise FastGoalError(f"{service.name} has ended, with status {status}; both end.{last_lines(service, data)}")


def log_of(service: Service, data: Path) -> Path:
    return data / f"{service.name.lower()}.log"


def last_lines(service: Service, data: Path) -> str:
    """The end of a server's log, for an error."""
    path = log_of(service, data)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if path.is_file() else []
    return "".join(f"\n  {line}" for line in [f"The end of {path}:", *lines])


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ends the servers and what they have started: by SIGTERM, and by SIGKILL what is left after STOP_SECONDS."""
    family = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            family += [own, *own.children(recursive=True)]
    for process in processes:
        with suppress(ProcessLookupError):  # its whole session, also where the server itself is dead
            os.killpg(process.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    for process in processes:
        process.wait()
