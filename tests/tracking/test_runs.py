import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from fast_goal.data.records import Dataset
from fast_goal.errors import DataError, FastGoalError
from fast_goal.tracking import NullTracker, runs
from fast_goal.tracking.runs import flatten, step_run
from fast_goal.tracking.server import connect


def search(expression=""):
    client, experiment = connect()
    return client.search_runs([experiment], expression)


def the_run(step):
    [run] = search(f"tags.step = '{step}'")
    return run


def the_pipeline():
    [run] = search("tags.`fast_goal.role` = 'pipeline'")
    return run


def test_flatten():
    flat = flatten({"a": {"b": 1, "c": {"d@1": None}}, "e": [1, {"f": 2}], "g": {}, "h": "x" * 7000, "i": True})
    assert flat.pop("h") == "x" * 5999 + "…"
    assert flat == {"a.b": "1", "a.c.d_at_1": "None", "e": '[1, {"f": 2}]', "g": "{}", "i": "True"}


def test_two_steps_of_one_pipeline(project, params):
    (project / "dvc.lock").write_text("lock")
    (project / "report.md").write_text("report")
    (project / "pictures").mkdir()
    (project / "pictures" / "a.png").write_bytes(b"a")
    records = pd.DataFrame({"split": ["train", "train", "test"]})
    with step_run("flism", params) as track:
        track.params({"flism": {"iou": 0.7, "splits": ["train"]}, **{f"p{index}": index for index in range(150)}})
        for step in range(2500):
            track.metrics({"loss": 2500.0 - step}, step=step)
        track.metrics({"recall@1": 1, "nan": float("nan")})
        track.headline({"pairs": 12})
        track.artifact("report.md")
        track.artifact(project / "pictures", "pictures")
        track.tags({"detector": "yolo"})
        track.input(Dataset("scenes", Path("data"), records, digest="0123456789abcdef"), "training")
        assert the_pipeline().info.status == the_run("flism").info.status == "RUNNING"
    with step_run("finetune", params) as track:
        track.headline({"loss": 0.5})

    client, _ = connect()
    child, parent = the_run("flism"), the_pipeline()
    assert child.info.run_name == "flism" and child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["git_commit"] == "none" and child.data.tags["dataset"] == "scenes"
    assert child.data.tags["detector"] == "yolo" and len(child.data.tags["dvc_lock"]) == 16
    assert child.data.params["flism.iou"] == "0.7" and child.data.params["p149"] == "149"
    history = client.get_metric_history(child.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 2500.0 - step) for step in range(2500)]
    assert child.data.metrics["recall_at_1"] == 1 and child.data.metrics["pairs"] == 12
    assert child.data.metrics["peak_memory_gb"] > 0.01
    assert (project / "mlruns").is_dir()
    assert sorted(file.path for file in client.list_artifacts(child.info.run_id)) == ["pictures", "report.md"]
    [entry] = child.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("scenes", "0123456789abcdef")
    assert entry.dataset.profile == '{"images": 3, "train": 2, "test": 1}'

    assert parent.info.status == "FINISHED" and parent.info.run_name == "scratch_fast_goal-scenes-none"
    assert parent.data.params["finetune.epochs"] == str(params.finetune.epochs) and parent.data.params["seed"] == "0"
    assert parent.data.metrics == {"pairs": 12, "loss": 0.5}
    assert the_run("finetune").data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_another_pipeline_is_another_run(project, params, monkeypatch):
    with step_run("base", params):
        pass
    monkeypatch.setenv("FAST_GOAL_PIPELINE_ID", "two")
    with step_run("base", params):
        pass
    assert len(search("tags.`fast_goal.role` = 'pipeline'")) == 2


def test_a_failure_marks_step_and_pipeline_until_it_is_mended(project, params):
    with pytest.raises(DataError), step_run("download", params) as track:
        track.metrics({"images": 3})
        raise DataError("row 3 of captions.csv has no caption")
    failed = the_run("download")
    assert failed.info.status == the_pipeline().info.status == "FAILED"
    assert failed.data.tags["error"] == "DataError: row 3 of captions.csv has no caption"
    assert failed.data.metrics["images"] == 3
    with step_run("base", params):
        pass
    assert the_pipeline().info.status == "FAILED", "another step does not mend it"
    with step_run("download", params):
        pass
    assert the_pipeline().info.status == "FINISHED"


def test_an_interrupt_marks_killed(project, params):
    with pytest.raises(KeyboardInterrupt), step_run("base", params):
        raise KeyboardInterrupt
    assert the_run("base").info.status == the_pipeline().info.status == "KILLED"


def test_runs_of_dead_processes_are_closed(project, params):
    code = (
        "import os, signal\nfrom fast_goal.config import Params, build\nfrom fast_goal.configure import compose\n"
        "from fast_goal.tracking.runs import step_run\n"
        "with step_run('flism', build(Params, compose(), 'params.yaml')): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "FAST_GOAL_PIPELINE_ID": "killed"}, check=False)
    assert killed.returncode == -9
    assert {run.info.status for run in search()} == {"RUNNING"}
    with step_run("finetune", params):
        assert the_run("flism").info.status == "KILLED"
        [pipeline] = search("tags.`fast_goal.pipeline_id` = 'killed' and tags.`fast_goal.role` = 'pipeline'")
        assert pipeline.info.status == "KILLED"
        assert the_run("finetune").info.status == "RUNNING"


def test_artifact_that_does_not_exist(project, params):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.md"), step_run("base", params) as track:
        track.artifact("nowhere.md")


def test_store_away_in_the_middle(project, params, monkeypatch, caplog):
    """The work goes on, one warning is printed, and everything arrives once the store is back."""
    (project / "a.txt").write_text("a")
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.05)
    away = True
    with caplog.at_level(logging.WARNING), step_run("finetune", params) as track:
        send = track._client.log_batch

        def log_batch(*args, **kwargs):
            if away:
                raise ConnectionError("no route to host")
            return send(*args, **kwargs)

        monkeypatch.setattr(track._client, "log_batch", log_batch)
        track.metrics({"loss": 2.0}, step=1)
        time.sleep(0.3)
        track.tags({"note": "later"})
        track.artifact("a.txt")
        track.metrics({"loss": 1.0}, step=2)
        away = False
    client, _ = connect()
    run = the_run("finetune")
    assert run.info.status == "FINISHED" and run.data.tags["note"] == "later"
    assert [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")] == [2.0, 1.0]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["a.txt"]
    [warning] = [record.getMessage() for record in caplog.records if record.name == runs.__name__]
    assert "MLFLOW_TRACKING_URI" in warning and "no route to host" in warning


def test_store_away_until_the_end(project, params, monkeypatch, caplog):
    (project / "a.txt").write_text("a")
    with caplog.at_level(logging.WARNING), step_run("finetune", params) as track:

        def fail(*args, **kwargs):
            raise ConnectionError("no route to host")

        for name in ("log_batch", "log_artifact", "set_terminated"):
            monkeypatch.setattr(track._client, name, fail)
        track.artifact("a.txt")
        track.metrics({"loss": 1.0}, step=1)
    messages = [record.getMessage() for record in caplog.records if record.name == runs.__name__]
    assert len(messages) == 2
    assert f"the file {project / 'a.txt'}" in messages[1] and "3 metrics" in messages[1]


def test_files_that_cannot_be_uploaded_hold_up_nothing_else(project, params, monkeypatch, caplog):
    """Artifacts may lie in a store of their own (S3) that lacks a password, while the runs' own answers."""
    (project / "a.txt").write_text("a")
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 60)  # what arrives does so at once, or in the end
    tries = []
    with caplog.at_level(logging.WARNING), step_run("finetune", params) as track:

        def fail(run_id, path, *args):
            tries.append(path)
            raise PermissionError("no credentials")

        monkeypatch.setattr(track._client, "log_artifact", fail)
        for _ in range(5):
            track.artifact("a.txt")
        track.tags({"note": "here"})
        assert the_run("finetune").data.tags["note"] == "here"
        track.metrics({"loss": 1.0}, step=1)
    run = the_run("finetune")
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 1.0
    assert the_pipeline().info.status == "FINISHED"
    messages = [record.getMessage() for record in caplog.records if record.name == runs.__name__]
    assert len(messages) == 2 and all("a.txt" in message and "no credentials" in messages[0] for message in messages)
    assert len(tries) <= 3, "a store of files that is away is not asked for each of them"


def test_what_mlflow_refuses_is_dropped_and_said(project, params, caplog):
    with caplog.at_level(logging.WARNING), step_run("base", params) as track:
        track.params({"a": 1})
        track.params({"a": 2})  # MLflow's parameters cannot change
        track.metrics({"fine": 1})
    run = the_run("base")
    assert run.info.status == "FINISHED" and run.data.metrics["fine"] == 1
    assert any("refused parameters" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db", "gopher://x"])
def test_unusable_store_is_said_at_once(project, params, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    begin = time.monotonic()
    with pytest.raises(FastGoalError, match=f"MLFLOW_TRACKING_URI = {uri}"), step_run("base", params):
        pass
    assert time.monotonic() - begin < 15


def test_damaged_database_is_said_at_once(project, params):
    (project / "mlflow.db").write_text("this is no database, but long enough to look like a header of one" * 9)
    begin = time.monotonic()
    with pytest.raises(FastGoalError, match="file is not a database"), step_run("base", params):
        pass
    assert time.monotonic() - begin < 15


def test_server_that_does_not_answer(project, params, monkeypatch):
    import socket

    from fast_goal.tracking import server

    monkeypatch.setattr(server, "REACH_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(FastGoalError, match="MLFLOW_TRACKING_URI"), step_run("base", params):
            pass
    assert time.monotonic() - begin < 5


def test_experiment_name_and_deleted_experiment(project, params, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with step_run("base", params):
        pass
    client, experiment = connect()
    assert client.get_experiment(experiment).name == "mine"
    client.delete_experiment(experiment)
    with pytest.raises(FastGoalError, match="was deleted"), step_run("base", params):
        pass


def test_null_tracker_takes_everything():
    track = NullTracker()
    public = {name for name in dir(runs.MlflowTracker) if not name.startswith("_")} - {"finish"}
    assert public <= set(dir(track))
    assert track.run_id is None
    assert track.metrics({"a": 1.0}, step=1) is None
