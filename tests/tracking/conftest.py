"""A project folder with its own MLflow store. The migrations of a fresh SQLite store take seconds: made once and copied."""

import os
import shutil
import subprocess
import sys

import pytest

from fast_goal.config import Params, build
from fast_goal.configure import compose


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    code = "from mlflow.tracking.client import MlflowClient; MlflowClient('sqlite:///mlflow.db').search_experiments()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
    return folder / "mlflow.db"


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
