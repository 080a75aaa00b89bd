import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from killing import killed_after
from PIL import Image
from small_training import RecordingTracker, params, write_project

from fast_goal import stages
from fast_goal.config import to_dict
from fast_goal.data.images import View
from fast_goal.data.records import NEGATIVES, load_dataset, write_table
from fast_goal.errors import ConfigError, DataError
from fast_goal.evaluation import embedding
from fast_goal.evaluation.embedding import answer
from fast_goal.files import read_json
from fast_goal.model.clip import Clip, build_scratch
from fast_goal.stages import finetune
from fast_goal.training import loop


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project()
    build_scratch(params().base.scratch, context_length=248).save(Path("models/base/clip"), {"step": "base"})


def history() -> list[dict]:
    records = [json.loads(line) for line in Path("models/finetune/history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "samples_per_second"} for record in records]


def test_writes_a_model_that_open_clip_loads():
    track = RecordingTracker()
    finetune.main(params(), track)
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms("local-dir:models/finetune")
    assert model.context_length == 248
    base, tuned = Clip.load("models/base/clip"), Clip.load("models/finetune")
    assert not torch.equal(base.model.visual.proj, tuned.model.visual.proj)
    metrics = json.loads(Path("models/finetune/metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["counts"]["pairs"] == 9 and metrics["seconds"] > 0
    info = json.loads(Path("models/finetune/fast_goal.json").read_text())
    assert info["method"]["name"] == "fast_goal" and info["dataset"]["name"] == "scenes" and len(info["base"]["digest"]) == 16
    assert info["metrics"]["final"]["loss"] == metrics["final"]["loss"]
    assert not list(Path(".fast_goal/state/finetune").iterdir())
    steps = [record for record in history() if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert set(steps[0]) == {
        "step", "epoch", "loss", "global", "local", "tsl_image", "tsl_text", "learning_rate", "logit_scale"
    }  # fmt: skip
    measured = [record for record in history() if "loss" not in record]
    assert [record["epoch"] for record in measured] == [1, 2, 3]
    assert all(0 <= record[f"val_{way}_R@1"] <= 100 for record in measured for way in ("text_to_image", "image_to_text"))
    assert [step for step, _ in track.curve] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert track.numbers["final_loss"] == metrics["final"]["loss"] and track.inputs == ["scenes"]
    assert track.artifacts == ["history.jsonl", "history.csv", "metrics.json"]
    rows = list(csv.DictReader(Path("models/finetune/history.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [record["step"] for record in history()]
    assert [row["loss"] == "" for row in rows] == ["loss" not in record for record in history()]


@pytest.mark.parametrize("view", ["squash", "pad"])
def test_the_saved_model_sees_images_as_it_was_trained(view):
    finetune.main(params(f"finetune.view={view}", "finetune.epochs=1"), RecordingTracker())
    import open_clip

    clip = Clip.load("models/finetune")
    assert clip.view_mode == view and Clip.load("models/base/clip").view_mode == "crop"
    _, _, preprocess = open_clip.create_model_and_transforms("local-dir:models/finetune")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 45, 3), dtype=np.uint8))
    expected = View(45, 20, clip.image_size, view).apply(image)
    torch.testing.assert_close(clip.view(45, 20).apply(image), expected, atol=0, rtol=0)
    torch.testing.assert_close(preprocess(image), expected, atol=1e-5, rtol=0)


def test_a_killed_run_continues_and_its_history_is_whole():
    finetune.main(params(), RecordingTracker())
    whole, whole_history = Clip.load("models/finetune").state_dict(), history()
    with killed_after(loop, 3):
        finetune.main(params(), RecordingTracker())
    track = RecordingTracker()
    # what does not change the result may differ
    finetune.main(params("finetune.save_every=100"), track)
    assert json.loads(Path("models/finetune/metrics.json").read_text())["resumed_at_step"] == 3
    assert history() == whole_history
    assert [step for step, _ in track.curve] == [record["step"] for record in whole_history]
    assert all(torch.equal(value, whole[name]) for name, value in Clip.load("models/finetune").state_dict().items())


@pytest.mark.parametrize("change", ["seed=1", "finetune.learning_rate=0.01", "objective.weights.local=0.25"])
def test_other_parameters_start_from_the_beginning(change):
    with killed_after(loop, 3):
        finetune.main(params(), RecordingTracker())
    finetune.main(params(change), RecordingTracker())
    assert json.loads(Path("models/finetune/metrics.json").read_text())["resumed_at_step"] == 0


def write_negatives(word: str) -> None:
    """Two of each caption of the training split, long and short, with another word in it."""
    rows = []
    for record in load_dataset("scenes").split("train").itertuples():
        for caption in (record.long_caption, *record.captions):
            for negative in (caption.replace("box", word), caption.replace("is", "was")):
                row = {"image_id": record.image_id, "caption": caption, "negative": negative}
                rows.append(row | {"type": "replace_nouns", "generator": "test", "seed": 0})
    write_table(Path("data/negatives/scenes.parquet"), rows, NEGATIVES)


def test_hard_negatives_are_part_of_what_is_learned():
    settings = ["objective=degla", "negatives=rules"]
    with pytest.raises(ConfigError, match=r"needs hard negative captions, but negatives\.generator = 'none'"):
        finetune.main(params("objective=degla"), RecordingTracker())
    with pytest.raises(ConfigError, match=r"'scenes' has none: .*negatives=rules.*dvc repro negatives"):
        finetune.main(params(*settings), RecordingTracker())
    for word in ("ball", "dog"):  # another table is another training, which gets to its second step anew
        write_negatives(word)
        with killed_after(loop, 2):
            finetune.main(params(*settings), RecordingTracker())
    finetune.main(params(*settings), RecordingTracker())
    metrics = read_json("models/finetune/metrics.json")
    assert metrics["resumed_at_step"] == 2 and metrics["counts"]["negatives"] == 18
    assert {"global", "igc", "tgc", "distillation"} <= metrics["final"].keys()


def test_short_captions_can_be_trained_on():
    chosen = ["finetune.captions=short", "negatives.captions=short", "finetune.epochs=1"]
    with pytest.raises(ConfigError, match=r"finetune\.captions = 'short': the TSL terms"):
        finetune.main(params(*chosen), RecordingTracker())
    with pytest.raises(ConfigError, match=r"negatives\.captions = 'long', but finetune\.captions = 'short'"):
        finetune.main(params("objective=degla", "negatives=rules", "finetune.captions=short"), RecordingTracker())
    write_negatives("ball")
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            embedding, "answer", lambda clip, asked, *rest, **more: seen.append(asked) or answer(clip, asked, *rest)
        )
        finetune.main(params("objective=degla", "negatives=rules", *chosen), RecordingTracker())
    metrics = read_json("models/finetune/metrics.json")
    assert metrics["counts"]["samples"] == 18 and metrics["steps"] == 4
    ((asked, *_),) = [seen]
    assert len(asked.short.texts) == 6 and not asked.long.texts  # what is trained on is what is measured
    assert [record["epoch"] for record in history() if "val_text_to_image_R@1" in record] == [1]


def test_another_base_starts_from_the_beginning():
    with killed_after(loop, 3):
        finetune.main(params(), RecordingTracker())
    build_scratch(params().base.scratch, context_length=248, seed=1).save(Path("models/base/clip"), {})
    finetune.main(params(), RecordingTracker())
    assert json.loads(Path("models/finetune/metrics.json").read_text())["resumed_at_step"] == 0


def test_the_global_objective_needs_no_pairs():
    Path("data/flism/scenes/pairs.parquet").unlink()
    finetune.main(params("objective=global"), RecordingTracker())
    assert "local" not in history()[0]
    with pytest.raises(DataError, match=r"pairs\.parquet.*flism"):
        finetune.main(params(), RecordingTracker())


@pytest.mark.parametrize("images", [0, 1])
def test_without_a_validation_split_nothing_is_measured(tmp_path, monkeypatch, images):
    (tmp_path / "other").mkdir()
    Path("models").rename("other/models")
    monkeypatch.chdir("other")
    write_project({"train": 5, "val": images})
    finetune.main(params(), RecordingTracker())
    assert all("loss" in record for record in history())


def test_two_processes_share_the_step(monkeypatch, empty_store):
    values = params("finetune.processes=2", "finetune.batch_size=4")
    Path("params.yaml").write_text(yaml.safe_dump(to_dict(values), sort_keys=False))
    shutil.copy(empty_store, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    stages.run("finetune")
    shared = history()
    assert read_json("models/finetune/metrics.json")["steps"] == 6
    finetune.main(params("finetune.batch_size=4"), RecordingTracker())
    alone = history()
    assert [record["step"] for record in shared] == [record["step"] for record in alone]
    losses = [[record["loss"] for record in curve if "loss" in record] for curve in (shared, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
