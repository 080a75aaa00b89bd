"""`fast-goal drift` on small projects: which data are the reference, what is written, and what if something lacks."""

import itertools
import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from drift_project import write_training_set
from noting_tracker import Tracker
from small_project import params, tiny_clip
from typer.testing import CliRunner

from fast_goal import cli
from fast_goal.config import to_dict
from fast_goal.errors import DataError, FastGoalError, ModelError
from fast_goal.monitoring.data import WHAT
from fast_goal.monitoring.history import read
from fast_goal.operations import drift
from fast_goal.tracking.champion import Version
from fast_goal.tracking.registry import model_digest

SMALL = ("drift.samples=60", "drift.permutations=1200", "drift.probe=8")
DRIFT = Path("models/drift")
FILES = {"drift.json", "drift.md", "drift_over_time.png", "probe_over_time.png", "map.png", "lengths.png", "detections.png"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of a base and a fine-tuned model."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        tiny_clip(seed).save(folder / name, {"step": name})
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch, models):
    """Also: a minute passes from run to run, as the files tell times apart by seconds."""
    minutes = itertools.count()
    clock = SimpleNamespace(now=lambda zone: datetime(2026, 1, 1, tzinfo=zone) + timedelta(minutes=next(minutes)))
    monkeypatch.setattr(drift, "datetime", clock)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "base", "models/base/clip")


@pytest.fixture
def undrawn(monkeypatch):
    """Without pictures, which take most of the time of such a small run."""
    monkeypatch.setattr(drift, "_draw", lambda *_: [])


def run(*overrides, registry=None) -> dict:
    """One run; what it wrote to drift.json."""
    before = set(DRIFT.glob("*Z*"))
    track = Tracker()
    said = drift.main(params(*SMALL, *overrides), track, registry or {})
    (folder,) = set(DRIFT.glob("*Z*")) - before
    assert said.endswith(str(folder / "drift.md"))
    found = json.loads((folder / "drift.json").read_text())
    return {**found, "folder": folder, "track": track, "report": (folder / "drift.md").read_text()}


def test_from_a_first_run_over_more_of_the_same_to_data_that_drifted(project):
    """Also: what each run writes, and that the history grows."""
    first = write_training_set(numbers=range(40))
    found = run()
    assert not found["drifted"] and {test["p"] for test in found["tests"]} == {1}
    assert "there is no champion yet, and this run is the first" in found["reference"]["text"]
    assert {one["reason"] for one in found["left_out"]} == {"nothing is new"}
    assert {path.name for path in found["folder"].iterdir()} == FILES
    assert [path.name for path in (DRIFT / "references").iterdir()] == [f"{first.digest}.npz"]
    assert list(found["probe"]["models"]) == ["base"] and found["probe"]["models"]["base"]["agreement"]["text_to_image"] == 100

    write_training_set(numbers=range(60))
    found = run()
    assert not found["drifted"] and len(found["tests"]) == 12
    assert (found["data"]["images"], found["data"]["new_images"], found["data"]["gone_images"]) == (60, 20, 0)
    assert found["reference"]["digest"] == first.digest and "the oldest there is" in found["reference"]["text"]

    write_training_set(numbers=range(10, 60), shifted=range(100, 120))
    found = run()
    assert found["drifted"]
    drifted = {(test["what"], test["rows"]) for test in found["tests"] if test["drifted"]}
    assert {(what, "new") for what in WHAT} - {("captions", "new")} <= drifted
    assert (found["data"]["new_images"], found["data"]["gone_images"]) == (40, 10)
    assert "**Data: drifted in " in found["report"] and "**drifted** | 40 / 40 |" in found["report"]
    assert all(f"]({name})" in found["report"] for name in FILES if name.endswith(".png"))
    track = found["track"]
    assert {Path(file).name for file in track.files} == FILES and track.inputs == [("scenes", "drift")]
    images = next(test for test in found["tests"] if (test["what"], test["rows"]) == ("images", "new"))
    assert track.numbers["new.images.statistic"] == images["statistic"]

    history = read(DRIFT / "history.jsonl")
    assert [line["drifted"] for line in history] == [False, False, True]
    assert len({line["probe"]["digest"] for line in history}) == 1, "the probe set is frozen"
    assert len(list((DRIFT / "references").iterdir())) == 3


def test_the_reference_is_what_the_champion_was_trained_on(undrawn, project, models):
    """Of three data sets the second; without its snapshot the oldest; its own data are no drift."""
    digests = []
    for numbers in (range(30), range(100, 130), range(200, 230)):
        digests.append(write_training_set(numbers=numbers).digest)
        run("flism.regions=spatial")
    shutil.copytree(models / "tuned", ".fast_goal/registry/fast-goal-7")
    tags = {"dataset_digest": digests[1], "model_digest": model_digest(models / "tuned")}
    champion = Version("fast-goal", 7, tags)
    found = run("flism.regions=spatial", registry={"champion": champion})
    assert found["reference"]["digest"] == digests[1]
    assert "on which the champion, version 7, was trained" in found["reference"]["text"]
    assert found["probe"]["against"] == "champion" and found["probe"]["models"]["champion"]["version"] == 7
    assert found["probe"]["models"]["base"]["cka"]["images"] < 1
    (DRIFT / f"references/{digests[1]}.npz").unlink()
    found = run("flism.regions=spatial", registry={"champion": champion})
    assert found["reference"]["digest"] == digests[0]
    assert f"there is no snapshot of the data set {digests[1]}" in found["reference"]["text"]
    write_training_set(numbers=range(100, 130))
    found = run("flism.regions=spatial", registry={"champion": champion, "candidate": champion})
    assert found["reference"]["digest"] == digests[1] and not found["drifted"]
    assert "the present data themselves" in found["reference"]["text"]
    assert list(found["probe"]["models"]) == ["champion", "base"], "one version with two names is measured once"


def test_another_base_and_no_detector_leave_out_what_does_not_compare(project, models):
    write_training_set(numbers=range(30))
    first = run()["probe"]["models"]["base"]
    write_training_set(numbers=range(20, 50))
    shutil.rmtree("models/base/clip")
    shutil.copytree(models / "tuned", "models/base/clip")
    found = run("base.detector.kind=none")
    assert {test["what"] for test in found["tests"]} == {"images", "captions", "tokens", "sentences"}, "by the kept base"
    assert found["probe"]["models"]["base"]["digest"] != first["digest"], "measured is the present one"
    shutil.rmtree(DRIFT / "embedder")
    found = run("base.detector.kind=none")
    left_out = {one["what"]: one["reason"] for one in found["left_out"]}
    assert set(left_out) == {"images", "captions", "detections", "classes"}
    assert left_out["images"].startswith("the base model is another one")
    assert left_out["classes"].startswith("there is no detector")
    assert {test["what"] for test in found["tests"]} == {"tokens", "sentences"}
    assert {path.name for path in found["folder"].iterdir()} == FILES - {"map.png", "detections.png"}
    assert "](map.png)" not in found["report"] and "](lengths.png)" in found["report"]


def test_few_images_and_no_run_of_flism(undrawn, project):
    write_training_set(numbers=range(6), regions=False)
    found = run()
    assert found["tests"] == [] and not found["drifted"]
    assert "**Data: nothing could be compared.**" in found["report"]
    assert "the reference: 6 images; 10 are needed" in found["report"]
    write_training_set(numbers=range(30), regions=False)
    (DRIFT / "references").rename("references")  # as if it were the first run again
    found = run()
    assert {one["what"] for one in found["left_out"] if one["rows"] == "all"} == {"detections", "classes"}
    assert "FLISM had seen 0 images of the reference when it was made" in found["report"]


def test_a_vanished_probe_image_is_told_and_a_model_that_measures_otherwise(undrawn, project):
    write_training_set(numbers=range(12))
    run()
    path = DRIFT / "history.jsonl"
    line = json.loads(path.read_text())
    line["probe"]["models"]["base"]["R@1"]["text_to_image"] += 5
    path.write_text(json.dumps(line) + "\n" + '{"time": "2026-')
    assert "The base measures otherwise on the probe set than before" in run()["report"]
    for image in sorted(Path("data/datasets/scenes").glob("-*.png"))[:9]:
        image.unlink()
    found = run()
    assert found["probe"]["missing"] >= 5 and "have vanished" in found["report"]
    assert len(read(path)) == 3


def test_what_lacks_is_named(undrawn, project, monkeypatch):
    with pytest.raises(DataError, match=r"scenes\.json does not exist. The step `download` writes it"):
        run()
    write_training_set(numbers=[])
    with pytest.raises(DataError, match="'scenes' has no image in the split 'train'"):
        run()
    write_training_set(numbers=range(12))
    shutil.rmtree("models/base")
    with pytest.raises(ModelError, match="models/base/clip"):
        run()
    assert not DRIFT.exists()
    Path("params.yaml").write_text(yaml.safe_dump(to_dict(params(*SMALL))))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(FastGoalError, match=r"MLFLOW_TRACKING_URI = http://127\.0\.0\.1:9 cannot be used"):
        drift.run()


def test_the_command_with_models_from_the_registry(project, models, monkeypatch, empty_store):
    """A champion, a previous version and a candidate whose files are damaged, in a real store."""
    from mlflow.tracking.client import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FAST_GOAL_PIPELINE_ID", "one")
    monkeypatch.setenv("FAST_GOAL_SYSTEM_METRICS", "0")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    dataset = write_training_set(numbers=range(20))
    Path("params.yaml").write_text(yaml.safe_dump(to_dict(params(*SMALL))))
    shutil.copy(empty_store, "mlflow.db")
    client = MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    client.create_registered_model("fast-goal")
    for number, (alias, model) in enumerate({"previous": "base", "champion": "tuned", "candidate": "base"}.items(), start=1):
        source = Path.cwd() / f"stored/{number}"
        shutil.copytree(models / model, source / "data")
        tags = {"model_digest": model_digest(models / model), "dataset_digest": dataset.digest}
        client.create_model_version("fast-goal", str(source), tags=tags)
        client.set_registered_model_alias("fast-goal", alias, str(number))
    Path("stored/3/data/open_clip_config.json").write_text("{}")
    done = CliRunner().invoke(cli.app, ["drift"])
    assert done.exit_code == 0, done.output
    assert "Data: no drift shown" in done.output and "the champion, version 2" in done.output
    (path,) = DRIFT.glob("*Z*/drift.json")
    found = json.loads(path.read_text())
    assert {model: values.get("version") for model, values in found["probe"]["models"].items()} == {
        "champion": 2,
        "previous": 1,
        "base": None,
    }
    assert found["probe"]["models"]["previous"]["R@1"] == found["probe"]["models"]["base"]["R@1"]
    assert any(note.startswith("The candidate is not measured: ") and "fast-goal/3" in note for note in found["notes"])
    experiment = client.get_experiment_by_name("fast-goal")
    (step,) = client.search_runs([experiment.experiment_id], "tags.step = 'drift'")
    assert step.info.status == "FINISHED" and step.data.tags["drifted"] == "false"
    assert step.data.metrics["drifted"] == 0 and "probe.champion.R1.text_to_image" in step.data.metrics
    assert {file.path for file in client.list_artifacts(step.info.run_id)} == FILES
