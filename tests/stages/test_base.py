import json
from pathlib import Path

import pytest
import torch
from killing import killed_after
from small_training import RecordingTracker, params, write_project

from fast_goal.errors import FastGoalError
from fast_goal.flism import detectors as detector_module
from fast_goal.model.clip import Clip, build_scratch
from fast_goal.stages import base
from fast_goal.training import pretraining


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project()


def weights(folder: str = "models/base/clip") -> dict[str, torch.Tensor]:
    return Clip.load(folder).state_dict()


def test_scratch():
    track = RecordingTracker()
    base.main(params(), track)
    clip = Clip.load("models/base/clip")
    assert clip.context_length == 248 and clip.image_size == 32
    assert json.loads(Path("models/base/detector/detector.json").read_text())["kind"] == "none"
    metrics = json.loads(Path("models/base/metrics.json").read_text())
    assert metrics["kind"] == "scratch" and metrics["weak"] is True and metrics["steps"] == 6 and metrics["images"] == 8
    assert metrics["parameters"] == sum(parameter.numel() for parameter in clip.parameters())
    assert metrics["loss"] > 0 and 0 <= metrics["accuracy"] <= 1 and metrics["seconds"] > 0
    info = json.loads(Path("models/base/clip/fast_goal.json").read_text())
    assert info["dataset"]["name"] == "scenes" and info["params"]["scratch"]["steps"] == 6
    assert not Path(".fast_goal/state/base").exists()
    assert [step for step, _ in track.curve] == [6] and track.curve[0][1]["loss"] == metrics["loss"]
    assert track.inputs == ["scenes"] and track.numbers["weak"] == 1.0


def test_weights_as_they_are_drawn():
    """What FLAIR begins with from scratch: no step, and no short captions needed."""
    config, track = params("base.scratch.steps=0"), RecordingTracker()
    base.main(config, track)
    drawn = build_scratch(config.base.scratch, seed=config.seed).stretched(config.base.context_length)
    assert all(torch.equal(value, weights()[name]) for name, value in drawn.state_dict().items())
    assert json.loads(Path("models/base/metrics.json").read_text())["weak"] is True and track.curve == []


def test_the_first_77_positions_are_those_trained(monkeypatch):
    trained = []
    monkeypatch.setattr(Clip, "stretched", lambda clip, *sizes: trained.append((clip, sizes)) or clip)
    base.main(params(), RecordingTracker())
    ((clip, sizes),) = trained
    assert clip.context_length == 77 and sizes == (248, 20)


def test_the_same_seed_gives_the_same_weights():
    base.main(params(), RecordingTracker())
    first = weights()
    base.main(params(), RecordingTracker())
    assert all(torch.equal(value, first[name]) for name, value in weights().items())
    base.main(params("seed=1"), RecordingTracker())
    assert any(not torch.equal(value, first[name]) for name, value in weights().items())


def test_a_kill_during_one_part_keeps_the_other(monkeypatch, caplog):
    made = []
    obtain = detector_module.obtain_detector
    monkeypatch.setattr(detector_module, "obtain_detector", lambda *arguments: made.append("detector") or obtain(*arguments))
    train, fail = pretraining.train_scratch, True

    def killed(*arguments, **named):
        made.append("clip")
        if fail:
            raise KeyboardInterrupt
        return train(*arguments, **named)

    monkeypatch.setattr(pretraining, "train_scratch", killed)
    with pytest.raises(KeyboardInterrupt):
        base.main(params(), RecordingTracker())
    assert not Path("models/base").exists()
    fail = False
    base.main(params(), RecordingTracker())
    assert made == ["detector", "clip", "clip"] and "finished the detector" in caplog.text
    base.main(params(), RecordingTracker())  # a whole run leaves nothing to take from
    assert made == ["detector", "clip", "clip", "detector", "clip"]


def test_a_kill_while_the_state_is_removed_leaves_no_finished_part(monkeypatch):
    remove = base.shutil.rmtree

    def killed(path, *arguments, **named):
        if path == base.STATE:
            remove(next(base.STATE.glob("detector-*")) / "detector")
            raise KeyboardInterrupt
        remove(path, *arguments, **named)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(base.shutil, "rmtree", killed)
        base.main(params(), RecordingTracker())
    base.main(params(), RecordingTracker())
    assert Path("models/base/detector/detector.json").is_file()


def test_a_part_of_other_parameters_is_not_taken(monkeypatch):
    monkeypatch.setattr(pretraining, "train_scratch", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        base.main(params(), RecordingTracker())
    made = []
    obtain = detector_module.obtain_detector
    monkeypatch.setattr(detector_module, "obtain_detector", lambda *arguments: made.append(1) or obtain(*arguments))
    with pytest.raises(KeyboardInterrupt):
        base.main(params("base.detector.image_size=64"), RecordingTracker())
    assert made == [1]


def test_a_part_of_another_file_is_not_taken(monkeypatch):
    table = "image_id,x1,y1,x2,y2\ntrain-0,1,1,9,9\n"
    Path("boxes.csv").write_text(table)
    settings = params("base.detector.kind=table", "base.detector.weights=boxes.csv")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pretraining, "train_scratch", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        base.main(settings, RecordingTracker())
    Path("boxes.csv").write_text(table + "train-1,1,1,9,9\n")
    base.main(settings, RecordingTracker())
    info = json.loads(Path("models/base/detector/detector.json").read_text())
    assert (info["kind"], info["boxes"]) == ("table", 2)
    assert json.loads(Path("models/base/metrics.json").read_text())["detector"]["weights"] == "boxes.csv"


def test_a_killed_scratch_training_continues(monkeypatch):
    base.main(params(), RecordingTracker())
    whole = weights()
    monkeypatch.setattr(pretraining, "SAVE_EVERY", 2)
    with killed_after(pretraining, 4):
        base.main(params(), RecordingTracker())
    base.main(params(), RecordingTracker())
    assert json.loads(Path("models/base/metrics.json").read_text())["resumed_at_step"] == 4
    assert all(torch.equal(value, whole[name]) for name, value in weights().items())


def test_pretrained_from_a_folder():
    build_scratch(params().base.scratch, seed=7).save(Path("elsewhere"), {})
    base.main(params("base.kind=pretrained", "base.model=local-dir:elsewhere"), RecordingTracker())
    clip, source = Clip.load("models/base/clip"), Clip.load("elsewhere")
    assert clip.context_length == 248 and source.context_length == 77
    assert torch.equal(clip.model.visual.proj, source.model.visual.proj)
    metrics = json.loads(Path("models/base/metrics.json").read_text())
    assert metrics["weak"] is False and metrics["kind"] == "pretrained"


def test_pretrained_that_cannot_be_had_names_the_way_out():
    with pytest.raises(FastGoalError, match=r"base\.kind=scratch"):
        base.main(params("base.kind=pretrained", "base.model=local-dir:nowhere"), RecordingTracker())
