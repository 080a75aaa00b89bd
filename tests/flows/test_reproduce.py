"""The flow `reproduce`, and what all flows share, in a repository of trivial steps (conftest.py)."""

import os
import signal
import subprocess
import sys

import httpx
import psutil
import pytest

from fast_goal.files import write_json
from fast_goal.stages import STEPS


@pytest.fixture(scope="module")
def flow(flows):
    return flows("reproduce")


@pytest.fixture
def metrics(root):
    interval = {"value": 2.0, "low": 1.0, "high": 3.0}
    measured = {"base": {"R@1": 10.0}, "finetuned": {"R@1": 12.0}, "difference": {"R@1": interval}}
    write_json(root / "models/reports/metrics.json", {"scenes": {"long": measured}})


def test_runs_all_steps_then_none_then_reports_a_failure(
    flow, root, api, ran, change, metrics, new_data, monkeypatch, caplog, capsys
):
    new_data()
    assert flow.main([]) == 0
    assert ran() == list(STEPS)
    [*_, last] = (root / "log").read_text().splitlines()
    assert last.split()[1].startswith("prefect-")
    assert "download says hello" in caplog.messages, "the steps' output is in the flow's log, line by line"

    wanted = {"artifacts": {"key": {"any_": ["reproduce"]}}, "sort": "CREATED_DESC"}
    [artifact, *_] = httpx.post(f"{api}/artifacts/filter", json=wanted).raise_for_status().json()
    assert "| scenes · long · R@1 | 10.0 | 12.0 | +2.0 | +1.0 to +3.0 |" in artifact["data"]
    assert f"version {len((root / 'versions').read_text())} of `m`" in artifact["data"]

    assert flow.main([]) == 0
    assert len(ran()) == len(STEPS), "nothing changed, nothing runs"

    late = STEPS[-2:]  # only these are looked at, which saves seconds; test_retrain.py has a failure early on
    monkeypatch.setattr(flow, "TASKS", {step: flow.TASKS[step] for step in late})
    (root / f"{STEPS[-3]}.txt").write_text("what changed late")
    change(**{f"status_{late[-1]}": "3"})
    assert flow.main([]) == 1
    said = capsys.readouterr().err
    assert f"reproduce: the step `{late[-1]}` failed" in said and "the disk is on fire" in said
    assert ran()[len(STEPS) :] == list(late)
    (root / f"status_{late[-1]}").unlink()
    assert flow.main([]) == 0
    assert ran()[len(STEPS) + len(late) :] == [late[-1]], "what was done before the failure is kept"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_flow_takes_its_step_along(flow, root, api, change, new_data, started, number):
    """As a command, with a server: the step's process ends too, and the status says that not all is well."""
    change(hang_validate="")
    new_data()
    env = {**os.environ, "PREFECT_API_URL": api}
    process = subprocess.Popen([sys.executable, "flows/reproduce.py"], cwd=root, env=env, start_new_session=True)
    try:
        sleeper = started(process)
        os.kill(process.pid, number)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE
    assert not (root / ".fast_goal/pipeline.json").exists()


def test_configures_only_when_asked(flow, flows, root, monkeypatch):
    from fast_goal import configure

    called = []
    monkeypatch.setattr(configure, "configure", lambda overrides, path: called.append((overrides, path)))
    monkeypatch.setattr(flow, "TASKS", {})
    assert flow.main([]) == 0
    assert called == []
    assert flow.main(["--experiment", "own_photos", "finetune.epochs=3"]) == 0
    assert called == [(["experiment=own_photos", "finetune.epochs=3"], root / "params.yaml")]


def test_a_wrong_argument_is_said(flow, capsys):
    with pytest.raises(SystemExit) as stop:
        flow.main(["finetune"])
    assert stop.value.code == 2 and "key=value" in capsys.readouterr().err


def test_a_task_for_every_step(flow):
    assert list(flow.TASKS) == list(STEPS) and [run.name for run in flow.TASKS.values()] == list(STEPS)


@pytest.mark.parametrize(("status", "times"), [(os.EX_TEMPFAIL, 3), (1, 1)])
def test_tries_again_only_what_may_work_in_a_while(flow, monkeypatch, ran, change, new_data, capsys, status, times):
    change(status_download=str(status))
    new_data()
    assert flow.TASKS["download"].retries == 2
    monkeypatch.setattr(flow.TASKS["download"], "retry_delay_seconds", [0.1, 0.1])
    assert flow.main([]) == 1
    assert ran() == ["download"] * times
    assert "the step `download` failed" in capsys.readouterr().err


def test_a_step_that_takes_too_long_is_ended(flow, ran, change, new_data, capsys):
    change(hang_download="")
    new_data()
    assert flow.main(["--step-timeout-seconds", "4"]) == 1
    assert "the step `download` was ended after 4 s (step_timeout_seconds)" in capsys.readouterr().err
    assert ran() == ["download"], "once"


def test_a_second_flow_ends_at_once_and_names_the_first(flow, flows, root, ran, new_data, capsys):
    new_data()
    with flows("running").working_tree("retrain", "prefect-first"):
        assert flow.main([]) == 1
    said = capsys.readouterr().err
    assert f"the flow retrain (run None, process {os.getpid()} on " in said and f"works in {root} since 20" in said
    assert ran() == []
