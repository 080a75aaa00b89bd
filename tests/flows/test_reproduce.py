"""The flow with a real DVC and a real Prefect server, in a repository of trivial steps."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from fast_goal.files import write_json
from fast_goal.stages import STEPS

FLOW = Path(__file__).parents[2] / "flows" / "reproduce.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A git and DVC repository: each step appends to a log which pipeline it belongs to, and copies its predecessor's file."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "flows").mkdir()
    shutil.copy(FLOW, folder / "flows")
    pipeline, before = {}, "start.txt"
    (folder / before).write_text("start")
    for step in STEPS:
        command = f"echo {step} says hello && echo {step} $FAST_GOAL_PIPELINE_ID >> log && cat {before} > {step}.txt"
        if step == "evaluate":
            command = f"test ! -e broken || (echo the disk is on fire && exit 3) && {command}"
        if step == "validate":
            command = f"test ! -e slow || (echo $$ > started.part && mv started.part started && exec sleep 600) && {command}"
        pipeline[step] = {"cmd": command, "deps": [before], "outs": [f"{step}.txt"]}
        before = f"{step}.txt"
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline}, sort_keys=False))
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, env=env, check=True)
    return folder


@pytest.fixture(scope="module")
def flow(root, tmp_path_factory):
    """The flow's module, as it stands in that repository, beside a Prefect server of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.delenv("PREFECT_API_URL", raising=False)
        specification = importlib.util.spec_from_file_location("reproduce", root / "flows" / "reproduce.py")
        module = importlib.util.module_from_spec(specification)
        patch.setitem(sys.modules, "reproduce", module)
        specification.loader.exec_module(module)
        from prefect.testing.utilities import prefect_test_harness

        with prefect_test_harness(server_startup_timeout=120):
            yield module


def api():
    import prefect.settings

    return prefect.settings.PREFECT_API_URL.value()


def log(root):
    return [line.split() for line in (root / "log").read_text().splitlines()]


def test_runs_all_steps_then_none_then_reports_a_failure(flow, root, caplog, capsys):
    interval = {"value": 2.0, "low": 1.0, "high": 3.0}
    metrics = {"base": {"R@1": 10.0}, "finetuned": {"R@1": 12.0}, "difference": {"R@1": interval}}
    write_json(root / "models/reports/metrics.json", {"scenes": {"long": metrics}})
    write_json(root / "models/register/registration.json", {"model": "m", "version": 3, "alias": "a", "uri": "models:/m@a"})

    assert flow.main([]) == 0
    assert [step for step, _ in log(root)] == list(STEPS)
    [pipeline] = {pipeline for _, pipeline in log(root)}
    assert pipeline.startswith("prefect-")
    assert "download says hello" in caplog.messages, "the steps' output is in the flow's log, line by line"

    wanted = {"artifacts": {"key": {"any_": ["reproduce"]}}}
    [artifact] = httpx.post(f"{api()}/artifacts/filter", json=wanted).raise_for_status().json()
    assert "| scenes · long · R@1 | 10.0 | 12.0 | +2.0 | +1.0 to +3.0 |" in artifact["data"]
    assert "version 3 of `m`" in artifact["data"]

    assert flow.main([]) == 0
    assert len(log(root)) == len(STEPS), "nothing changed, nothing runs"

    (root / "broken").touch()
    (root / "finetune.txt").unlink()
    (root / "start.txt").write_text("changed")
    assert flow.main([]) == 1
    (root / "broken").unlink()
    said = capsys.readouterr().err
    assert "reproduce: the step `evaluate` failed" in said and "the disk is on fire" in said
    assert [step for step, _ in log(root)[len(STEPS) :]] == list(STEPS[: STEPS.index("evaluate")])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_flow_takes_its_step_along(flow, root, number):
    """As a command, with a server: the step's process ends too, and the status says that not all is well."""
    (root / "slow").touch()
    (root / "start.txt").write_text(f"changed for {number}")
    env = {**os.environ, "PREFECT_API_URL": api()}
    process = subprocess.Popen([sys.executable, "flows/reproduce.py"], cwd=root, env=env, start_new_session=True)
    try:
        end = time.monotonic() + 100
        while not (root / "started").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        sleeper = int((root / "started").read_text())
        os.kill(process.pid, number)
        assert process.wait(60) != 0
    finally:
        process.kill()
        (root / "slow").unlink()
        (root / "started").unlink(missing_ok=True)
    assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE


def test_configures_only_when_asked(flow, root, monkeypatch):
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


def test_retries_only_for_the_download(flow):
    assert {step: run.retries for step, run in flow.TASKS.items() if run.retries} == {"download": 2}
    assert list(flow.TASKS) == list(STEPS) and [run.name for run in flow.TASKS.values()] == list(STEPS)
