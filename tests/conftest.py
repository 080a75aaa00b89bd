"""Shared fixtures. The suite is offline and runs on the CPU; a test marked `gpu` is skipped without a CUDA device."""

import copy
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from whole_project import shared_folder

from fast_goal import configure

# Before any import of torch. The models are tiny: threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FAST_GOAL_DEVICE", "cpu")

_compose = functools.cache(configure.compose)


def _composed(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """`compose`, once for the same words: Hydra takes 0.15 s, and hundreds of tests ask for the same few configurations."""
    return copy.deepcopy(_compose(tuple(overrides)))


configure.compose = _composed  # before the tests import it by its name

# Units of work for the test processes, by the beginning of their path; the longest are begun first. Else xdist begins the
# files with the fewest tests last: one process would make the finished project while the others wait for it, at the very end.
LONGEST = ["tests/test_pipeline.py", "tests/flows/", "tests/tracking/test_server_away.py", "tests/test_scenes_large.py",
           "tests/test_services.py", "tests/training/test_distributed.py"]  # fmt: skip
TOGETHER = "tests/flows/"  # one process, which starts one server of Prefect for all of them


@pytest.fixture(scope="session")
def vectors() -> dict:
    """Numbers computed once from the published reference code: inputs and outputs of its formulas."""
    return json.loads((Path(__file__).parent / "vectors" / "vectors.json").read_text())


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh `mlflow.db`, to be copied. Its migrations take seconds: made once for all test processes of this call."""
    shared = shared_folder(tmp_path_factory)
    with FileLock(shared / "store.lock"):
        if not (shared / "store.done").exists():
            code = "from mlflow.tracking.client import MlflowClient; MlflowClient('sqlite:///mlflow.db').search_experiments()"
            environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
            subprocess.run([sys.executable, "-c", code], cwd=shared, check=True, env=environment)
            (shared / "store.done").touch()
    return shared / "mlflow.db"


def _place(nodeid: str) -> int:
    """How early a test's unit of work begins."""
    return next((place for place, path in enumerate(LONGEST) if nodeid.startswith(path)), len(LONGEST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (_place(item.nodeid), -tests[item.path], str(item.path)))  # the tests of a file keep theirs
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with the files of a folder TOGETHER, and in the order of pytest_collection_modifyitems."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER if nodeid.startswith(TOGETHER) else super()._split_scope(nodeid)

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduling(config, log)
