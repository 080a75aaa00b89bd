import os
import signal
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import yaml

from fast_goal import stages
from fast_goal.configure import compose
from fast_goal.errors import ConfigError, DataError
from fast_goal.tracking import NullTracker, runs


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A project folder with params.yaml, and what was recorded: MLflow itself is tested in tests/tracking."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(compose(["experiment=demo"])))
    events = []

    class Recorder(NullTracker):
        def params(self, values):
            events.append(values)

    @contextmanager
    def step_run(step, params):
        events.append(step)
        try:
            yield Recorder()
        except BaseException as error:
            events.append(type(error))
            raise

    monkeypatch.setattr(runs, "step_run", step_run)
    return events


def install(monkeypatch, step, main):
    module = ModuleType(f"fast_goal.stages.{step}")
    module.main = main
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_runs_the_step_with_parameters_and_tracker(recorded, monkeypatch):
    seen = []
    install(monkeypatch, "finetune", lambda params, track: seen.append((params.experiment, isinstance(track, NullTracker))))
    stages.run("finetune")
    step, settings = recorded
    assert seen == [("demo", True)] and step == "finetune"
    assert set(settings) == {"seed", "objective", "finetune"} and settings["finetune"]["epochs"] >= 1


def test_an_error_reaches_the_run_and_the_caller(recorded, monkeypatch):
    def main(params, track):
        raise DataError("row 3 is bad")

    install(monkeypatch, "download", main)
    with pytest.raises(DataError, match="row 3"):
        stages.run("download")
    assert recorded[-1] is DataError


def test_termination_closes_the_run(recorded, monkeypatch):
    install(monkeypatch, "flism", lambda params, track: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        stages.run("flism")
    assert stop.value.code == 128 + signal.SIGTERM and recorded[-1] is SystemExit
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bad_params_file_stops_before_anything_is_recorded(recorded, tmp_path):
    (tmp_path / "params.yaml").write_text("seed: 0")
    with pytest.raises(ConfigError, match="missing key"):
        stages.run("download")
    assert recorded == []


def test_unknown_step():
    with pytest.raises(ConfigError, match="unknown step 'train'"):
        stages.run("train")
