"""The real pipeline, shrunk, in a repository of its own: `dvc repro`, twice, then with one parameter changed."""

import sys
import time

import pytest
from whole_project import SHRUNK, Project, finished, shared_folder

from fast_goal.configure import configure
from fast_goal.files import read_json


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return finished(shared_folder(tmp_path_factory), tmp_path_factory.mktemp("project") / "project")


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
expected = ["download", "base", "flism", "validate", "publish", "negatives", "intermediate", "finetune", "evaluate", "register"]
assert steps == sorted(expected), steps
assert len(runs) == len(expected) + 1, "one parent"
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
    """One by `fast-goal configure`, and one for this run by `dvc exp run`."""
    configure([*SHRUNK, "evaluate.ks=[1,5,10]"], project.root / "params.yaml")
    project.run("git add -A")
    project.run("git commit -qm run")
    output = project.run("dvc exp run -S evaluate.bootstrap_samples=40").stdout
    assert [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")] == ["evaluate", "register"]
    assert "bootstrap_samples: 40" in (project.root / "params.yaml").read_text()
    recall = read_json(project.root / "models/reports/metrics.json")["scenes"]["long"]["base"]["text_to_image"]
    assert [name for name in recall if name.startswith("R@")] == ["R@1", "R@5", "R@10"]
