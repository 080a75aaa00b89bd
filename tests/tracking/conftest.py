"""A project folder with its own MLflow store."""

import shutil

import pytest

from fast_goal.config import Params, build
from fast_goal.configure import compose


@pytest.fixture
def project(tmp_path, monkeypatch, empty_store):
    """An empty project folder as the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FAST_GOAL_PIPELINE_ID", "one")
    monkeypatch.setenv("FAST_GOAL_SYSTEM_METRICS", "0")  # they would come between, or not, as the machine is slow
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="session")
def params() -> Params:
    return build(Params, compose(["experiment=demo"]), "params.yaml")
