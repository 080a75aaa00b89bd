import shutil
from dataclasses import replace

import numpy as np
import pytest
from colours import COLOURS
from PIL import Image
from typer.testing import CliRunner

from fast_goal import cli, stages
from fast_goal.config import DetectorConfig, Params, ScratchConfig, build
from fast_goal.configure import compose
from fast_goal.errors import ModelError
from fast_goal.flism import preview as flism_preview
from fast_goal.flism.detectors import obtain_detector
from fast_goal.model.clip import build_scratch
from fast_goal.stages import preview


@pytest.fixture
def params(scenes, tmp_path, monkeypatch) -> Params:
    """A project after `base`: the coloured boxes, an untrained CLIP, and the true boxes as detections."""
    monkeypatch.chdir(tmp_path)
    shutil.move(tmp_path / "records", tmp_path / "data/records")
    sizes = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "vision_width": 16, "vision_layers": 1, "text_width": 16}
    rest = {"text_layers": 1, "head_width": 8, "steps": 1, "batch_size": 2, "learning_rate": 1.0, "weight_decay": 0.0}
    scratch = ScratchConfig(split="train", warmup_steps=0, **sizes, **rest)
    build_scratch(scratch, 24, seed=0).save(tmp_path / "models/base/clip", {"step": "base"})
    values = {"kind": "table", "weights": "objects", "trust_pickle": False, "split": "train", "image_size": 64}
    config = DetectorConfig(**values, images=1, epochs=1, batch_size=1)
    obtain_detector(config, tmp_path / "models/base/detector", scenes, 0)
    made = build(Params, compose(["flism.splits=[train,val]"]), "params.yaml")
    download = replace(made.download, train_dataset="boxes", datasets={"boxes": {"source": "folder"}})
    return replace(made, download=download, base=replace(made.base, detector=config))


def test_the_preview_shows_images_spread_over_the_records(params, scenes, tmp_path, monkeypatch):
    drawn = {}
    draw = flism_preview.region_sheet
    monkeypatch.setattr(
        flism_preview,
        "region_sheet",
        lambda dataset, records, regions, pairs, skipped, path, caption: (
            drawn.update(records=records, regions=regions, pairs=pairs, caption=caption)
            or draw(dataset, records, regions, pairs, skipped, path, caption)
        ),
    )
    path = preview.draw(params, 4, tmp_path / "out" / "sheet.png")
    wanted = scenes.split("train", "val")["image_id"].iloc[[0, 3, 7, 10]].tolist()
    assert drawn["records"]["image_id"].tolist() == wanted
    assert drawn["pairs"].query("rank == 1")["image_id"].tolist() == wanted
    objects = scenes.objects["image_id"].value_counts()
    found = drawn["regions"]["image_id"].value_counts()
    assert all(found[image_id] == 5 + objects[image_id] for image_id in wanted)
    assert drawn["caption"].startswith("boxes: 4 of 11 images")
    assert "detector table objects, confidence at least 0.25" in drawn["caption"]
    assert "quadrant 4.0, centre 1.0" in drawn["caption"]
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    for colour in COLOURS.values():
        assert (np.abs(pixels - colour).max(2) < 40).sum() > 500


def test_it_writes_nothing_that_the_pipeline_reads_and_works_again(params, tmp_path):
    before = {
        path: path.read_bytes() for folder in ("data", "models") for path in (tmp_path / folder).rglob("*") if path.is_file()
    }
    first = preview.draw(params, 2, tmp_path / "first.png").read_bytes()
    assert preview.draw(params, 2, tmp_path / "second.png").read_bytes() == first
    after = {
        path: path.read_bytes() for folder in ("data", "models") for path in (tmp_path / folder).rglob("*") if path.is_file()
    }
    assert after == before


def test_without_a_base_it_says_which_step_to_run(params, tmp_path):
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(ModelError, match="fast-goal base"):
        preview.draw(params, 2, tmp_path / "sheet.png")


def test_the_command_without_preview_runs_the_step(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(stages, "run", lambda step: called.append(step))
    monkeypatch.setattr(preview, "run", lambda count, output: called.append((count, output)) or tmp_path / "sheet.png")
    runner = CliRunner()
    for arguments in (["flism"], ["flism", "preview"], ["flism", "preview", "--n", "3", "--output", "a.png"]):
        result = runner.invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
    assert called[:2] == ["flism", (24, None)]
    assert called[2][0] == 3
    assert str(called[2][1]) == "a.png"
    assert str(tmp_path / "sheet.png") in result.output
    assert runner.invoke(cli.app, ["flism", "preview", "--n", "0"]).exit_code != 0
    shown = runner.invoke(cli.app, ["flism", "--help"]).output
    assert "preview" in shown and "whole step" in shown


def test_the_steps_are_listed_in_their_order():
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    places = [shown.index(f"│ {step} ") for step in cli.STEPS]
    assert places == sorted(places)
