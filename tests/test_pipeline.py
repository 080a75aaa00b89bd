"""The real pipeline, shrunk, in a repository of its own: `dvc repro`, twice, then with one parameter changed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_goal.configure import configure
from fast_goal.files import read_json

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
    """A copy of the project's code in a fresh git and DVC repository, without the environment's own tracking."""

    def __init__(self, root: Path):
        self.root = root
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / "src", root / "src", ignore=ignore)
        shutil.copytree(ROOT / "flows", root / "flows", ignore=ignore)
        for name in ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
            shutil.copy(ROOT / name, root / name)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_", "FAST_GOAL_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(root / ".home"),
            "DVC_NO_ANALYTICS": "1",
            **{f"GIT_{role}_{part}": "test@localhost" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")},
            "FAST_GOAL_DEVICE": "cpu",
        }
        for command in ("git init -q", "dvc init -q", "git add -A", "git commit -qm start"):
            self.run(command)

    def run(self, command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command.split(), cwd=self.root, env={**self.environment, **environment}, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    configure(SHRUNK, project.root / "params.yaml")
    project.run("dvc repro")
    return project


@pytest.mark.timeout(600)
def test_ends_with_a_report_and_a_registered_model(project: Project):
    report = project.root / "models/reports"
    assert (report / "report.md").stat().st_size > 1000
    assert (report / "report.html").stat().st_size > 1000
    metrics = read_json(report / "metrics.json")["scenes"]
    for captions in ("long", "short"):
        for model in ("base", "finetuned"):
            recall = metrics[captions][model]["text_to_image"]
            assert 0 <= recall["R@1"] <= recall["R@5"] <= 100
    assert read_json(project.root / "models/register/registration.json")["alias"] == "candidate"
    assert (project.root / "data/validation/data_docs/index.html").is_file()
    assert (project.root / "data/flism/scenes/pairs.png").is_file()


LOAD = """
import mlflow, numpy, pandas
model = mlflow.pyfunc.load_model("models:/fast-goal@candidate")
found = model.predict(pandas.DataFrame({"text": ["A large red star.", "A small blue ring on a green background."]}))
vectors = numpy.array(found["embedding"].tolist())
assert vectors.shape == (2, 128), vectors.shape
assert numpy.allclose(numpy.linalg.norm(vectors, axis=1), 1, atol=1e-5)
client = mlflow.MlflowClient()
experiment = client.get_experiment_by_name("fast-goal")
runs = client.search_runs([experiment.experiment_id])
steps = sorted(run.data.tags["step"] for run in runs if "mlflow.parentRunId" in run.data.tags)
expected = ["download", "base", "flism", "validate", "publish", "intermediate", "finetune", "evaluate", "register"]
assert steps == sorted(expected), steps
assert len(runs) == 10, "one parent"
assert all(run.info.status == "FINISHED" for run in runs), [(run.info.run_name, run.info.status) for run in runs]
finetune = next(run for run in runs if run.data.tags.get("step") == "finetune")
assert len(client.get_metric_history(finetune.info.run_id, "loss")) >= 2
"""


@pytest.mark.timeout(600)
def test_the_registered_model_loads_and_every_step_is_tracked(project: Project):
    (project.root / "load.py").write_text(LOAD)
    project.run(
        f"{sys.executable} load.py", MLFLOW_TRACKING_URI=f"sqlite:///{project.root}/mlflow.db", MLFLOW_DISABLE_TELEMETRY="true"
    )


@pytest.mark.timeout(600)
def test_a_second_repro_does_nothing(project: Project):
    begin = time.monotonic()
    output = project.run("dvc repro").stdout
    assert "Running stage" not in output
    assert time.monotonic() - begin < 15  # 3 s on an idle machine; the bound only catches work that should not be done


@pytest.mark.timeout(600)
def test_a_change_of_evaluation_runs_only_what_follows(project: Project):
    configure([*SHRUNK, "evaluate.ks=[1,5,10]"], project.root / "params.yaml")
    output = project.run("dvc repro").stdout
    assert [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")] == ["evaluate", "register"]


@pytest.mark.timeout(600)
def test_an_experiment_by_dvc_changes_one_parameter(project: Project):
    project.run("git add -A")
    project.run("git commit -qm run")
    output = project.run("dvc exp run -S evaluate.bootstrap_samples=40").stdout
    assert "Running stage 'evaluate'" in output
    assert "Running stage 'flism'" not in output
    assert "bootstrap_samples: 40" in (project.root / "params.yaml").read_text()
