"""The whole project, shrunk to a minute, in a repository of its own: made once for all tests that need it finished."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from fast_goal.configure import configure

ROOT = Path(__file__).parents[1]
SHRUNK = [
    "experiment=demo",
    "download.datasets.scenes.pretrain=48",
    "download.datasets.scenes.train=24",
    "download.datasets.scenes.val=4",
    "download.datasets.scenes.test=8",
    "base.scratch.steps=6",
    "base.scratch.batch_size=16",
    "base.scratch.vision_width=32",
    "base.scratch.vision_layers=1",
    "base.scratch.text_width=32",
    "base.scratch.text_layers=1",
    "base.detector.images=16",
    "base.detector.epochs=1",
    "base.detector.image_size=64",
    "finetune.epochs=2",
    "finetune.batch_size=8",
    "finetune.workers=0",
    "evaluate.bootstrap_samples=50",
    "evaluate.pictures=2",
]


class Project:
    """A folder with the project in it, in a git and DVC repository, and an environment without the tester's own tracking."""

    def __init__(self, root: Path):
        self.root = root
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_", "FAST_GOAL_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(root / ".home"),
            "DVC_NO_ANALYTICS": "1",
            **{f"GIT_{role}_{part}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")},
            "FAST_GOAL_DEVICE": "cpu",
        }

    @classmethod
    def new(cls, root: Path) -> "Project":
        """A copy of the project's code in a fresh repository."""
        project = cls(root)
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / "src", root / "src", ignore=ignore)
        shutil.copytree(ROOT / "flows", root / "flows", ignore=ignore)
        for name in ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
            shutil.copy(ROOT / name, root / name)
        for command in ("git init -q", "dvc init -q"):
            project.run(command)
        shutil.copytree(ROOT / ".dvc/plots", root / ".dvc/plots")
        for command in ("git add -A", "git commit -qm start"):
            project.run(command)
        return project

    def run(self, command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command.split(), cwd=self.root, env={**self.environment, **environment}, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this call share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def finished(shared: Path, copy: Path) -> Project:
    """A copy of the project after `dvc repro`, at `copy`. It is made in `shared`, by whichever test process comes first."""
    root = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not (shared / "finished.done").exists():
            shutil.rmtree(root, ignore_errors=True)
            project = Project.new(root)
            configure(SHRUNK, root / "params.yaml")
            project.run("dvc repro")
            (shared / "finished.done").touch()
    shutil.copytree(root, copy, symlinks=True)
    return Project(copy)
