"""Runs, groups and the registry on the databases that MLflow keeps them in: SQLite, and PostgreSQL where it is installed."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import postgres
import pytest
import tiny

from fast_goal.data.records import Dataset
from fast_goal.model.clip import build_scratch
from fast_goal.tracking import identity
from fast_goal.tracking.groups import Group
from fast_goal.tracking.lookup import read_runs
from fast_goal.tracking.registry import Measured, register
from fast_goal.tracking.runs import step_run
from fast_goal.tracking.server import connect, tracking_uri


@pytest.fixture(scope="module")
def database():
    if reason := postgres.why_not():
        pytest.skip(reason)
    pytest.importorskip("psycopg2", reason="the extra [postgres] is not installed")
    with postgres.running() as uri:
        yield uri


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, project, monkeypatch):
    """An empty project folder whose runs are kept in such a database."""
    if request.param == "postgresql":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("database"))
    assert tracking_uri().startswith(request.param)
    yield project
    import mlflow

    mlflow.set_tracking_uri(None)  # which the registry sets


@pytest.mark.timeout(240)
def test_a_pipeline_a_group_and_the_registry(store, params, monkeypatch):
    group = Group.open("study's", {"table": "it's VI"})
    for name, value in group.environment.items():
        monkeypatch.setenv(name, value)
    (store / "report.html").write_text("<p>report")
    data = Dataset("scenes", Path("data"), pd.DataFrame({"split": ["train", "test"]}), digest="0123456789abcdef")
    with step_run("finetune", params) as track:
        track.params({"note": "é" * 6000})
        track.input(data, "training")
        for step in range(1200):
            track.metrics({"loss": math.nan if step == 7 else 1 / (1 + step), "recall@1": step}, step=step)
    sizes = {**tiny.CLIP, "patch_size": 16}
    scratch = replace(params.base.scratch, **sizes)
    build_scratch(scratch, 77, seed=0).save(store / "model", {})
    with step_run("register", params) as track:
        track.artifact("report.html")
        measured = [Measured("scenes", "0123456789abcdef", {"scenes.long.finetuned.text_to_image.R1": 30.0})]
        made, is_new = register(
            store / "model", "fast-goal", "candidate", "A card.", {"objective": "x"}, track.run_id, measured
        )
        again, is_new_again = register(store / "model", "fast-goal", "second", "A card.", {}, track.run_id)
    group.close("FINISHED", [store / "report.html"])

    client, experiment = connect()
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    pipeline = runs.pop("scratch_fast_goal-scenes-none")
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ["finetune", "register", "study's"], "FINISHED"
    )
    assert pipeline.info.status == "FINISHED" and pipeline.data.tags["mlflow.parentRunId"] == group.run_id
    history = client.get_metric_history(runs["finetune"].info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(1200)) and math.isnan(history[7].value)
    assert runs["finetune"].data.params["note"] == "é" * 6000
    assert [file.path for file in client.list_artifacts(runs["register"].info.run_id)] == ["report.html"]

    assert (made.version, is_new, again.version, is_new_again) == (1, True, 1, False)
    version = client.get_model_version_by_alias("fast-goal", "second")
    assert version.tags["objective"] == "x" and version.description == "A card."
    model = client.get_registered_model("fast-goal")
    assert "models:/fast-goal@champion" in model.description and model.tags["framework"] == "open_clip"
    [shown] = client.get_logged_model(version.source.removeprefix("models:/")).metrics
    assert (shown.key, shown.value) == ("scenes.long.finetuned.text_to_image.R1", 30.0)
    assert (shown.dataset_name, shown.dataset_digest) == ("scenes", "0123456789abcdef")

    [found, by_id] = read_runs(["models:/fast-goal@candidate", pipeline.info.run_id[:10]])
    assert found == by_id and found.name == "scratch_fast_goal-scenes-none"
    assert found.datasets == {"scenes (training)": "0123456789abcdef"}
    assert found.metrics["finetune.recall_at_1"] == 1199

    monkeypatch.delenv(identity.PARENT_VARIABLE)
    assert Group.open("study's", {"table": "it's VI"}).run_id == group.run_id
