import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from killing import killed_after
from small_training import RecordingTracker, params, write_project

from fast_goal import stages
from fast_goal.config import to_dict
from fast_goal.errors import DataError, FastGoalError, ModelError
from fast_goal.files import read_json
from fast_goal.model.clip import Clip, build_scratch
from fast_goal.stages import finetune, intermediate
from fast_goal.training import loop

FIRST = ("experiment=demo_two_stages", "intermediate.training.learning_rate=0.002")  # a first stage on `earlier_scenes`


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project()
    write_project({"train": 8, "val": 0}, "earlier_scenes", brightness=80)
    build_scratch(params().base.scratch, context_length=248).save(Path("models/base/clip"), {"step": "base"})


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return Clip.load(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_without_a_first_stage_nothing_is_trained(monkeypatch):
    def fail(*arguments, **named):
        raise AssertionError("no training was asked for")

    track = RecordingTracker()
    Path("models/intermediate/clip").mkdir(parents=True)  # of other settings
    monkeypatch.setattr(loop, "finetune", fail)
    intermediate.main(params(), track)
    assert sorted(path.name for path in Path("models/intermediate").iterdir()) == ["metrics.json", "start.json"]
    assert read_json("models/intermediate/metrics.json") == {"used": False}
    assert read_json("models/intermediate/start.json") == {"weights": "models/base/clip"}
    assert (track.inputs, track.curve, track.numbers, track.artifacts) == ([], [], {}, [])


def test_a_first_stage_on_another_data_set():
    track = RecordingTracker()
    intermediate.main(params(*FIRST), track)
    metrics = read_json("models/intermediate/metrics.json")
    assert metrics["steps"] == 6 and metrics["counts"]["pairs"] == 8 and metrics["seconds"] > 0
    info = read_json("models/intermediate/clip/fast_goal.json")
    assert info["step"] == "intermediate" and info["dataset"]["name"] == "earlier_scenes"
    assert info["params"]["intermediate.training"]["learning_rate"] == 0.002
    assert not same(weights("models/base/clip"), weights("models/intermediate/clip"))
    assert track.inputs == ["earlier_scenes"] and track.numbers["final_loss"] == metrics["final"]["loss"]
    assert track.artifacts == ["history.jsonl", "history.csv", "metrics.json"]
    records = [json.loads(line) for line in Path("models/intermediate/history.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(Path("models/intermediate/history.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == [record["loss"] for record in records] and len(rows) == 6
    assert not list(Path(".fast_goal/state/intermediate").iterdir())


def test_finetune_starts_from_the_first_stage():
    finetune.main(params(), RecordingTracker())
    alone = weights("models/finetune")
    intermediate.main(params(*FIRST), RecordingTracker())
    finetune.main(params(*FIRST), RecordingTracker())
    both = weights("models/finetune")
    info = read_json("models/finetune/fast_goal.json")
    first = read_json("models/intermediate/clip/fast_goal.json")
    assert not same(alone, both)
    assert info["dataset"]["name"] == "scenes" and info["base"] == first["base"] and info["base"]["name"] == "scratch"
    assert info["intermediate"]["dataset"] == first["dataset"] and info["intermediate"]["method"] == first["method"]
    assert info["intermediate"]["digest"] == read_json("models/intermediate/start.json")["digest"] != info["base"]["digest"]
    # the second stage is the same training, from other weights
    Clip.load("models/intermediate/clip").save("models/base/clip", {"step": "base"})
    finetune.main(params(), RecordingTracker())
    assert same(weights("models/finetune"), both)


def test_what_an_earlier_configuration_left_is_not_started_from():
    intermediate.main(params(*FIRST), RecordingTracker())
    finetune.main(params(), RecordingTracker())
    assert "intermediate" not in read_json("models/finetune/fast_goal.json")


def test_a_first_stage_that_was_not_run_is_asked_for():
    intermediate.main(params(), RecordingTracker())
    with pytest.raises(ModelError, match=r"models/intermediate/clip does not exist.*'earlier_scenes'.*dvc repro intermediate"):
        finetune.main(params(*FIRST), RecordingTracker())


def test_a_killed_first_stage_continues():
    intermediate.main(params(*FIRST), RecordingTracker())
    whole, start = weights("models/intermediate/clip"), Path("models/intermediate/start.json").read_bytes()
    history = Path("models/intermediate/history.csv").read_text().splitlines()
    with killed_after(loop, 3):
        intermediate.main(params(*FIRST), RecordingTracker())
    # what does not change the result may differ
    intermediate.main(params(*FIRST, "intermediate.training.keep_states=1"), RecordingTracker())
    assert read_json("models/intermediate/metrics.json")["resumed_at_step"] == 3
    assert same(weights("models/intermediate/clip"), whole)
    assert Path("models/intermediate/start.json").read_bytes() == start, "the same weights, however they came about"
    assert len(Path("models/intermediate/history.csv").read_text().splitlines()) == len(history)


def test_a_step_that_still_runs_is_not_run_beside():
    """As after the kill of a `dvc repro`, whose step goes on."""
    code = "import sys; from pathlib import Path; from fast_goal.stages.training import alone; lock = alone(Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{code}; lock.__enter__(); input()"]
    path = ".fast_goal/state/intermediate.lock"
    with subprocess.Popen([*command, path], stdin=subprocess.PIPE) as other:
        while not Path(path).is_file() or not Path(path).read_text():
            assert other.poll() is None
        with pytest.raises(FastGoalError, match=rf"intermediate is running .* process {other.pid} on .*run the step again"):
            intermediate.main(params(*FIRST), RecordingTracker())
        finetune.main(params(), RecordingTracker())  # another step may
        other.kill()
    intermediate.main(params(*FIRST, "intermediate.training.epochs=1"), RecordingTracker())
    assert read_json("models/intermediate/metrics.json")["steps"] == 2


@pytest.mark.parametrize(
    "change",
    [
        "intermediate.training.learning_rate=0.01",
        "intermediate.objective.weights.local=0.25",
        "intermediate.dataset=scenes",
        "intermediate.training.decode=gpu",
    ],
)
def test_the_resume_state_is_that_of_what_is_learned(monkeypatch, change):
    begun = []

    def note(*arguments, state_path, **named):
        begun.append(state_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "finetune", note)
    same = ("workers=1", "log_every=9", "save_every=9", "keep_states=1", "pixel_cache=true", "diverged=null", "accumulate=2")
    for overrides in ((), [f"intermediate.training.{setting}" for setting in same], (change,)):
        with pytest.raises(KeyboardInterrupt):
            intermediate.main(params(*FIRST, *overrides), RecordingTracker())
    assert begun[0] == begun[1] != begun[2]


def test_finetune_does_not_continue_from_another_start():
    intermediate.main(params(*FIRST), RecordingTracker())
    with killed_after(loop, 3):
        finetune.main(params(*FIRST), RecordingTracker())
    intermediate.main(params(*FIRST, "intermediate.training.epochs=1"), RecordingTracker())
    finetune.main(params(*FIRST), RecordingTracker())
    assert read_json("models/finetune/metrics.json")["resumed_at_step"] == 0


def test_the_pairs_of_its_own_data_set_are_read():
    Path("data/flism/earlier_scenes/pairs.parquet").unlink()
    with pytest.raises(DataError, match=r"data/flism/earlier_scenes/pairs\.parquet.*flism"):
        intermediate.main(params(*FIRST), RecordingTracker())
    intermediate.main(params(*FIRST, "objective@intermediate.objective=global"), RecordingTracker())
    assert read_json("models/intermediate/clip/fast_goal.json")["method"]["weights"]["local"] == 0


def test_as_many_processes_share_the_step_as_its_own_section_asks_for(monkeypatch):
    """How they share it is tested with `finetune`."""
    values = params(*FIRST, "intermediate.training.processes=2", "finetune.processes=3")
    Path("params.yaml").write_text(yaml.safe_dump(to_dict(values), sort_keys=False))
    started = []
    monkeypatch.setattr("fast_goal.training.distributed.launch", lambda *arguments: started.append(arguments))
    stages.run("intermediate")
    assert started == [(2, ["-m", "fast_goal", "intermediate"])]


def test_without_a_first_stage_one_process_is_enough(monkeypatch, empty_store):
    values = params("intermediate.training.processes=2")
    Path("params.yaml").write_text(yaml.safe_dump(to_dict(values), sort_keys=False))
    shutil.copy(empty_store, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    monkeypatch.setattr("fast_goal.training.distributed.launch", lambda *arguments: pytest.fail("processes are started"))
    stages.run("intermediate")
    assert read_json("models/intermediate/metrics.json") == {"used": False}
