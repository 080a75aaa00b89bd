import getpass
import subprocess
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.tracking import pipelines
from fast_goal.tracking.runs import step_run
from fast_goal.tracking.server import connect


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["experiment=demo"], "scratch_fast_goal-scenes-1a2b3c4"),
        (["experiment=demo", "objective=global"], "scratch_global-scenes-1a2b3c4"),
        (["experiment=demo", "objective.weights.local=0.3"], "scratch_fast_goal-scenes-1a2b3c4"),
        (["experiment=demo_degla"], "scratch_degla-scenes-1a2b3c4"),
        (["experiment=demo_degla", "objective=negclip"], "scratch_negclip-scenes-1a2b3c4"),
        (["experiment=demo_degla", "objective=fast_goal_degla"], "scratch_fast_goal_degla-scenes-1a2b3c4"),
        (["experiment=paper_docci"], "ViT-B-16_fast_goal-docci-1a2b3c4"),
        (["experiment=demo", "base.model=hf-hub:laion/CLIP-B"], "CLIP-B_fast_goal-scenes-1a2b3c4"),
    ],
)
def test_name(words, name, monkeypatch):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    params = build(Params, compose(words), "params.yaml")
    assert pipelines.run_name(params, "1a2b3c4d5e6f") == name
    monkeypatch.setenv("DVC_EXP_NAME", "stout-mole")
    assert pipelines.run_name(params, "1a2b3c4d5e6f") == "stout-mole"


def test_what_stands_on_the_run_of_a_pipeline(project, params, monkeypatch):
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m first"):
        subprocess.run(["git", *command.split()], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (project / "params.yaml").write_text("seed: 0\n")
    (project / "dvc.lock").write_text("first")
    with step_run("base", params):
        pass
    (project / "params.yaml").write_text("seed: 1\n")  # changed while the pipeline runs: what it began with stays
    (project / "dvc.lock").write_text("second")
    client, experiment = connect()
    [pipeline] = client.search_runs([experiment], "tags.`fast_goal.role` = 'pipeline'")
    client.set_tag(pipeline.info.run_id, "mlflow.note.content", "My own words.")
    with step_run("finetune", params):
        pass

    [pipeline] = client.search_runs([experiment], "tags.`fast_goal.role` = 'pipeline'")
    [finetune] = client.search_runs([experiment], "tags.step = 'finetune'")
    tags = pipeline.data.tags
    assert tags["mlflow.note.content"] == "My own words."
    assert (tags["mlflow.source.name"], finetune.data.tags["mlflow.source.name"]) == ("dvc.yaml", "fast-goal finetune")
    assert tags["mlflow.source.git.commit"] == finetune.data.tags["mlflow.source.git.commit"] == commit
    assert tags["mlflow.user"] == getpass.getuser()
    assert finetune.data.tags["pipeline"] == pipeline.info.run_name == f"scratch_fast_goal-scenes-{commit[:7]}"
    files = {
        path: client.download_artifacts(pipeline.info.run_id, path) for path in ("params.yaml", "dvc.lock", "requirements.txt")
    }
    texts = {path: Path(file).read_text() for path, file in files.items()}
    assert (texts["params.yaml"], texts["dvc.lock"]) == ("seed: 0\n", "second")
    assert f"\nmlflow=={mlflow.__version__}\n" in texts["requirements.txt"]
    assert texts["requirements.txt"].startswith("# Python 3.")


def test_note(params):
    note = pipelines.note(params)
    assert "a small CLIP trained from scratch with the objective `fast_goal` on `scenes`: 5 epochs, batch 64" in note
    earlier = replace(params.intermediate, dataset="earlier")
    assert "after a first stage on `earlier`" in pipelines.note(replace(params, intermediate=earlier))


def test_a_step_by_hand_is_no_pipeline(project, params, monkeypatch):
    monkeypatch.setattr("fast_goal.tracking.identity.pipeline_id", lambda: "single-1")
    with step_run("base", params):
        pass
    client, experiment = connect()
    sources = {run.data.tags["mlflow.source.name"] for run in client.search_runs([experiment])}
    assert sources == {"fast-goal base"}
    names = {run.info.run_name for run in client.search_runs([experiment])}
    assert names == {"base", "scratch_fast_goal-scenes-none-base"}
