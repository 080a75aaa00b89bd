import logging
import threading
import time

import pytest

from fast_goal.environment import prepare
from fast_goal.errors import DataError
from fast_goal.tracking import system_metrics
from fast_goal.tracking.runs import step_run
from fast_goal.tracking.server import connect
from fast_goal.tracking.system_metrics import SystemMetrics


@pytest.fixture(autouse=True)
def on(monkeypatch):
    for name in (*system_metrics.SWITCHES, "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.setattr(system_metrics, "SHORTEST", 0.05)


def running() -> bool:
    return any(thread.name == "system metrics" for thread in threading.enumerate())


class Counting:
    """In place of MLflow's monitor, a GPU whose use is 1, 2, 3, ... percent."""

    def __init__(self):
        self.looks, self.seen = 0, []

    def collect_metrics(self):
        self.looks += 1
        self.seen.append(self.looks)

    def aggregate_metrics(self):
        return {"gpu_0_utilization_percentage": sum(self.seen) / len(self.seen)}

    def clear_metrics(self):
        self.seen.clear()


@pytest.fixture
def gpu(monkeypatch):
    prepare()  # MLflow reads its telemetry switch when it is imported
    from mlflow.system_metrics.metrics import gpu_monitor

    monkeypatch.setattr(gpu_monitor, "GPUMonitor", Counting)


def wait_for(reached):
    end = time.monotonic() + 20
    while not reached() and time.monotonic() < end:
        time.sleep(0.02)
    assert reached()


def test_a_run_has_them_in_its_store(project, params, monkeypatch, gpu):
    monkeypatch.delenv("FAST_GOAL_SYSTEM_METRICS", raising=False)  # the project has it off
    with step_run("finetune", params) as track:
        assert running()
        collected = []
        collect = track._collect
        monkeypatch.setattr(
            track, "_collect", lambda run, values, step=None: (collected.append(step), collect(run, values, step))
        )
        wait_for(lambda: any(step is not None and step >= 2 for step in collected))  # the first ones may be over
        track.metrics({"loss": 1.0}, step=7)
    assert not running()
    client, experiment = connect()
    runs = {run.data.tags.get("step", "pipeline"): run for run in client.search_runs([experiment])}
    metrics = runs["finetune"].data.metrics
    assert {name for name in metrics if not name.startswith("system/")} == {"loss", "seconds_total", "peak_memory_gb"}
    assert 0 < metrics["system/system_memory_usage_percentage"] <= 100
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage", "system/network_receive_megabytes"} <= set(
        metrics
    )
    curve = client.get_metric_history(runs["finetune"].info.run_id, "system/gpu_0_utilization_percentage")
    assert len(curve) >= 3 and [(point.step, point.value) for point in curve] == [(n, n + 2.0) for n in range(len(curve))]
    assert runs["pipeline"].data.metrics == {}


@pytest.mark.parametrize("error", [DataError("a bad row"), KeyboardInterrupt(), SystemExit(143)])
def test_they_end_with_the_step_whatever_happens(project, params, monkeypatch, error):
    monkeypatch.delenv("FAST_GOAL_SYSTEM_METRICS", raising=False)
    with pytest.raises(type(error)), step_run("base", params):
        assert running()
        raise error
    assert not running()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in system_metrics.SWITCHES for value in ("0", "False")])
def test_they_can_be_switched_off(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(system_metrics, "_monitors", lambda: pytest.fail("looked at the machine"))
    metrics = SystemMetrics(lambda values, number: pytest.fail("recorded"))
    assert not running()
    metrics.stop()


def test_several_samples_are_recorded_as_their_mean(monkeypatch, gpu):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "2")
    recorded = []
    metrics = SystemMetrics(lambda values, number: recorded.append((number, values["system/gpu_0_utilization_percentage"])))
    wait_for(lambda: len(recorded) >= 2)
    metrics.stop()
    assert recorded[:2] == [(0, 2.5), (1, 4.5)]  # the first look begins


def test_a_short_step_has_a_last_sample(monkeypatch, gpu):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1000")
    recorded = []
    metrics = SystemMetrics(lambda values, number: recorded.append(number))
    time.sleep(0.2)
    metrics.stop()
    assert recorded == [0]


def test_what_fails_is_said_and_stops_nothing(monkeypatch, caplog, gpu):
    def broken(self):
        raise OSError("no such sensor")

    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(Counting, "collect_metrics", broken)
        SystemMetrics(lambda values, number: None).stop()
        monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "often")
        SystemMetrics(lambda values, number: None).stop()
    messages = [record.getMessage() for record in caplog.records if record.name == system_metrics.__name__]
    assert len(messages) == 2 and "OSError: no such sensor" in messages[0] and "often" in messages[1]
