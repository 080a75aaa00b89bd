"""The two servers without containers: once for real, and what ends them with small servers in their place."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.operations import services
from fast_goal.operations.services import Service

COMMAND = [sys.executable, "-m", "fast_goal", "services"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}


def until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


class Started:
    """The command, and all that it has printed."""

    def __init__(self, folder: Path):
        self.data, self.output = folder / "data", folder / "output"
        self.mlflow, self.prefect = free_port(), free_port()
        ports = ["--mlflow-port", str(self.mlflow), "--prefect-port", str(self.prefect)]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, "--data", str(self.data), *ports], stdout=output, stderr=subprocess.STDOUT, env=environment()
            )

    def text(self) -> str:
        return self.output.read_text()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(tmp_path_factory.mktemp("services"))
    try:
        ready = until(lambda: "Ctrl-C" in started.text() or started.process.poll() is not None, 240)
        assert ready and started.process.poll() is None, started.text()
        yield started
    finally:
        started.process.terminate()
        started.process.wait(60)


@pytest.mark.timeout(300)
def test_both_work_where_the_printed_lines_say(started: Started):
    lines = [line.strip() for line in started.text().splitlines()]
    assert f"export MLFLOW_TRACKING_URI=http://127.0.0.1:{started.mlflow}" in lines
    assert f"export PREFECT_API_URL=http://127.0.0.1:{started.prefect}/api" in lines
    api = f"http://127.0.0.1:{started.mlflow}/api/2.0/mlflow/experiments"
    made = ask(f"{api}/create", {"name": "here"})["experiment_id"]
    location = ask(f"{api}/get?experiment_id={made}")["experiment"]["artifact_location"]
    assert location.startswith("mlflow-artifacts:"), "artifacts go through the server"
    assert ask(f"http://127.0.0.1:{started.prefect}/api/flows/filter", {}) == []
    assert (started.data / "mlflow.db").is_file() and (started.data / "prefect/prefect.db").is_file()


@pytest.mark.timeout(300)
def test_they_listen_on_loopback_alone(started: Started):
    family = [child for child in psutil.Process(started.process.pid).children(recursive=True)]
    listening = {one.laddr for child in family for one in child.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert {address.port for address in listening} >= {started.mlflow, started.prefect}
    assert {address.ip for address in listening} == {"127.0.0.1"}


@pytest.mark.timeout(300)
def test_a_second_call_on_the_same_folder_is_refused(started: Started):
    with pytest.raises(ConfigError, match="in use by another `fast-goal services`"):
        services.run(started.data, free_port(), free_port())
    with pytest.raises(ConfigError, match=f"port {started.prefect} .* meant for Prefect.* --prefect-port"):
        services.run(started.data.parent / "other", free_port(), started.prefect)


@pytest.mark.timeout(300)
def test_when_one_dies_the_other_is_ended_and_the_message_says_which(started: Started):
    """The last one: afterwards both are gone."""
    family = psutil.Process(started.process.pid).children(recursive=True)
    for one in family:
        if "prefect" in one.cmdline() and "/bin/sh" not in one.cmdline():
            one.kill()
    assert started.process.wait(60) == 1
    end = started.text()[started.text().index("Ctrl-C") :]
    assert "FastGoalError: Prefect has ended, with status 137; both end." in end
    assert f"The end of {started.data / 'prefect.log'}:\n" in end
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_one_port_for_both_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="both 5000"):
        services.run(tmp_path, 5000, 5000)


KEEPER = """
import sys
from pathlib import Path
from fast_goal.operations.services import Service, keep

port = int(sys.argv[1])
page = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
# as the real ones do, it works in a process below its own
started = [sys.executable, "-c", f"import subprocess; subprocess.run({page!r})"]
one = Service("Page", started, port, "/", "PAGE_URL")
sys.exit(keep([one], Path(sys.argv[2]), lambda text: print(text, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_the_command_is_ended(tmp_path: Path, number: signal.Signals):
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("the kernel tells children of the end of their parent on Linux alone")
    port, output = free_port(), tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", KEEPER, str(port), str(tmp_path)], stdout=file, stderr=subprocess.STDOUT, env=environment()
        )
    assert until(lambda: "export PAGE_URL" in output.read_text()), output.read_text()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3  # the shell, the one it starts, and the server
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 0)
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_a_server_that_does_not_start_is_named_with_the_end_of_its_log(tmp_path: Path):
    words = "print('no such database'); raise SystemExit(3)"
    one = Service("Broken", [sys.executable, "-c", words], free_port(), "/", "BROKEN_URL")
    with pytest.raises(FastGoalError, match=r"Broken has ended, with status 3(?s:.*)no such database"):
        services.keep([one], tmp_path, print)
