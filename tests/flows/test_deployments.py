"""The small flows, the deployments of prefect.yaml, and the exit status that tells the flows to try again."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fast_goal.stages import STEPS

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = {
    deployment["name"]: deployment for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_fits_its_flow(flows, name):
    deployment = DEPLOYMENTS[name]
    assert deployment["entrypoint"] == f"flows/{name}.py:{name}"
    flow = getattr(flows(name), name)
    assert flow.name == name
    assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
    flow.validate_parameters(deployment["parameters"])
    assert deployment["concurrency_limit"]["limit"] == 1 and deployment["work_pool"] == {"name": "fast-goal"}


def test_every_flow_with_a_command_line_is_deployed_and_only_the_retraining_has_a_schedule_that_is_off():
    assert set(DEPLOYMENTS) == {path.stem for path in (ROOT / "flows").glob("*.py") if "@flow(" in path.read_text()}
    schedules = {name: deployment["schedules"] for name, deployment in DEPLOYMENTS.items() if "schedules" in deployment}
    assert {name: [schedule["active"] for schedule in found] for name, found in schedules.items()} == {"retrain": [False]}
    assert DEPLOYMENTS["retrain"]["concurrency_limit"]["collision_strategy"] == "CANCEL_NEW"


def test_the_flow_ablate_passes_its_words_on_and_fails_with_its_command(flows, root, change, capsys):
    change(status_ablate="1")
    assert flows("ablate").main(["VI", "seeds=[0]", "--jobs", "2"]) == 1
    assert "the step `ablate` failed (exit status 1)" in capsys.readouterr().err
    (root / "status_ablate").unlink()
    change(write_before=(root / "write.py").read_text())
    (root / "write.py").write_text("import pathlib, sys; pathlib.Path('words').write_text(' '.join(sys.argv[1:]))")
    try:
        assert flows("ablate").main(["VI", "seeds=[0]", "--jobs", "2"]) == 0
    finally:
        (root / "write.py").write_text((root / "write_before").read_text())
    assert (root / "words").read_text() == "ablate table=VI seeds=[0] --jobs 2"


def test_the_flow_evaluate_runs_one_step_and_asks_the_gate_when_told(flows, root, ran, change, capsys):
    (root / f"{STEPS[STEPS.index('evaluate') - 1]}.txt").write_text("what the step before has left")
    assert flows("evaluate").main(["--force"]) == 0
    assert ran() == ["evaluate"]
    change(status_gate="1")
    assert flows("evaluate").main(["--gate"]) == 1
    assert ran() == ["evaluate", "gate"] and "the step `gate` failed" in capsys.readouterr().err


def test_a_store_that_is_away_ends_a_command_with_a_status_of_its_own(tmp_path):
    """The one that DVC hands on, and the flows try again for; a wrong setting ends with 1."""
    code = "import sys; from fast_goal import cli; sys.argv = ['fast-goal', *sys.argv[1:]]; cli.main()"
    away = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = subprocess.run([sys.executable, "-c", code, "register"], cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.returncode == os.EX_TEMPFAIL and "MLFLOW_TRACKING_URI" in done.stderr, done.stderr
    (tmp_path / "params.yaml").write_text("register: 3\n")
    done = subprocess.run([sys.executable, "-c", code, "register"], cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.returncode == 1 and "ConfigError" in done.stderr
