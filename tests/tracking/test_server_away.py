"""A real MLflow server that is killed while a step runs, and answers that are lost on their way."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import requests

from fast_goal.tracking import runs
from fast_goal.tracking.runs import step_run
from fast_goal.tracking.server import connect

START_SECONDS = 200  # a server takes 14 s on two free cores


class Server:
    """`mlflow server` over the project's mlflow.db."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri, self._folder = f"http://127.0.0.1:{self.port}", folder

    def start(self) -> None:
        store = [
            "--backend-store-uri",
            f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination",
            str(self._folder / "files"),
        ]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *where, *store],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=(self._folder / "server.log").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            assert time.monotonic() < end and self._process.poll() is None, (self._folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its workers too
            self._process.wait()
        while self._answers():
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.RequestException:
            return False


@pytest.fixture
def server(project, monkeypatch):
    made = Server(project)
    made.start()
    yield made
    made.kill()


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == runs.__name__]


@pytest.mark.timeout(500)
def test_a_server_that_is_killed(server, project, params, monkeypatch, caplog):
    """It comes back: nothing is lost and nothing doubled. It does not: the step ends well, and says what is missing."""
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(runs, "RETRY_SECONDS", 0.5)
    (project / "report.html").write_text("<p>report")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        with step_run("finetune", params) as track:
            for step in range(300):
                track.metrics({"loss": 1 / (1 + step)}, step=step)
                time.sleep(0.005)  # so that many calls are under way
                if step == 150:
                    server.kill()
            track.artifact("report.html")
            track.tags({"note": "while away"})
            server.start()
            track.metrics({"loss": 0.0}, step=300)
        [warning] = warnings(caplog)
        assert f"MLFLOW_TRACKING_URI = {server.uri}" in warning and "The work goes on" in warning

        with step_run("evaluate", params) as track:
            track.metrics({"accuracy": 0.5})
            server.kill()
            track.metrics({"accuracy": 0.7})
            track.artifact("report.html")
        assert "Not recorded in MLflow" in warnings(caplog)[-1] and "report.html" in warnings(caplog)[-1]

    client, experiment = connect()  # without the server, on its database
    found = {run.info.run_name: run for run in client.search_runs([experiment])}
    finetune = found["finetune"]
    assert finetune.info.status == "FINISHED" and finetune.data.tags["note"] == "while away"
    seen = Counter(metric.step for metric in client.get_metric_history(finetune.info.run_id, "loss"))
    assert seen == dict.fromkeys(range(301), 1), "each step once"
    assert list((project / "files").rglob("report.html")) == [
        project / "files" / experiment / finetune.info.run_id / "artifacts" / "report.html"
    ]
    assert found["evaluate"].info.status == "RUNNING", "its end could not be told; the next step of this machine closes it"


def test_a_lost_answer_doubles_nothing(project, params, monkeypatch):
    """What the store took, but said nothing of, is sent again."""
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 60)  # all is sent in the end, in two calls, or by the tags between
    lost = []
    with step_run("finetune", params) as track:
        send = track._client.log_batch

        def send_and_lose_the_answer(*args, **kwargs):
            send(*args, **kwargs)
            if len(lost) < 3:
                lost.append(kwargs)
                raise ConnectionError("reset by peer")

        monkeypatch.setattr(track._client, "log_batch", send_and_lose_the_answer)
        for step in range(1500):
            track.metrics({"loss": float("nan") if step == 9 else step, "recall@1": 1 / (1 + step)}, step=step)
        track._send()
        track._send()
        track.metrics({"loss": 5.0}, step=1500)  # more in the same call the next time
        track.tags({"note": "once"})
        track.params({"added": 1})
    assert len(lost) == 3
    client, experiment = connect()
    [run] = client.search_runs([experiment], "tags.step = 'finetune'")
    assert run.info.status == "FINISHED" and run.data.tags["note"] == "once" and run.data.params["added"] == "1"
    for name, count in (("loss", 1501), ("recall_at_1", 1500)):
        assert Counter(metric.step for metric in client.get_metric_history(run.info.run_id, name)) == dict.fromkeys(
            range(count), 1
        )
