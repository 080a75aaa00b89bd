import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from noting_tracker import Tracker

from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.data.records import PAIRS, SKIPPED, write_dataset, write_table
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import write_json
from fast_goal.stages import publish
from fast_goal.tracking import NullTracker


def params(*overrides: str) -> Params:
    return build(Params, compose([*overrides]), "params.yaml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project after `validate`: three images, two of them with a pair."""
    import hashlib

    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rows, pairs = [], []
    for number in range(3):
        path = Path(f"data/datasets/scenes/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 60 * number, np.uint8)).save(path)
        row = {"image_id": str(number), "image_path": path.name, "width": 30, "height": 20, "split": "train"}
        row |= {"long_caption": "A grey box. It is grey.", "captions": [], "source": "scenes"}
        rows.append(row | {"content_hash": hashlib.sha256(path.read_bytes()).hexdigest()})
        pair = {
            "image_id": str(number),
            "rank": 1,
            "sentence_index": 0,
            "sentence": "A grey box.",
            "char_start": 0,
            "char_end": 11,
        }
        pair |= {
            "region_index": 0,
            "x1": 1.0,
            "y1": 1.0,
            "x2": 9.0,
            "y2": 9.0,
            "kind": "quadrant",
            "similarity": 0.25,
            "weight": 1.0,
        }
        pairs += [pair] if number else []
    write_dataset("scenes", "data/datasets/scenes", rows, [], source="scenes")
    write_table("data/flism/scenes/pairs.parquet", pairs, PAIRS)
    lost = {"sample": "0", "row": -1, "step": "flism", "reason": "no sentence", "detail": ""}
    write_table("data/flism/scenes/skipped.parquet", pd.DataFrame([lost]), SKIPPED)
    write_json("data/validation/summary.json", {"expectations": {"critical": 0}})
    write_json("models/base/detector/detector.json", {"kind": "trained", "weights": "yolo11n.yaml", "metrics": {}})
    return tmp_path


@pytest.mark.parametrize("layout", ["table", "parquet", "webdataset"])
def test_the_step_writes_its_outputs(project, layout, capsys):
    track = Tracker()
    publish.main(params(f"publish.layout={layout}", "publish.licence=mit"), track)
    folder = project / "data/publish/scenes"
    ending = "tar" if layout == "webdataset" else "parquet"
    assert [path.name for path in (folder / "data").iterdir()] == [f"train-00000-of-00001.{ending}"]
    info = json.loads((folder / "dataset.json").read_text())
    assert (info["layout"], info["licence"], info["images"], info["images_with_pair"]) == (layout, "mit", 3, 2)
    assert info["made"]["detector"] == {"kind": "trained", "weights": "yolo11n.yaml"} and info["made"]["flism"]["top_k"] == 1
    metrics = json.loads((project / "data/publish/metrics.json").read_text())
    assert metrics["scenes"]["images"] == 3 and metrics["scenes"]["skipped_here"] == 0
    assert metrics["scenes"]["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert track.inputs == [("scenes", "publication")] and track.files == ["data/publish/scenes/README.md"]
    assert track.numbers["images_with_pair"] == 2 and all(isinstance(value, float) for value in track.numbers.values())
    assert "3 images, 2 with a local pair" in capsys.readouterr().out
    assert "| flism | no sentence | 1 | 0 |" in (folder / "README.md").read_text()


def test_lost_images_are_said(project, capsys):
    Path("data/datasets/scenes/1.png").unlink()
    publish.main(params("publish.layout=parquet"), NullTracker())
    assert "skipped: 1 images can no longer be read" in capsys.readouterr().out


def test_no_path_of_this_machine_in_the_card(project):
    write_json("models/base/detector/detector.json", {"kind": "ultralytics", "weights": "/home/me/secret/best.pt"})
    publish.main(params("base.kind=pretrained", "base.model=local-dir:/home/me/secret/clip"), NullTracker())
    text = (project / "data/publish/scenes/README.md").read_text() + (project / "data/publish/scenes/dataset.json").read_text()
    assert "best.pt" in text and "`clip`" in text and "secret" not in text


def test_the_card_names_what_made_the_pairs(project):
    """Not a model or a detector that the settings name but do not use."""
    scratch = publish.how_it_was_made(params("base=pretrained", "base.kind=scratch", "flism.regions=spatial"))
    assert scratch["matcher"]["model"] == "trained from scratch" and "ViT-B-16" not in str(scratch)
    assert scratch["detector"] == {"kind": "none"}
    assert publish.how_it_was_made(params("base=pretrained"))["matcher"] == {"model": "ViT-B-16", "pretrained": "openai"}
    other = params("base=demo", "flism.matcher.model=ViT-L-14", "flism.matcher.pretrained=openai")
    assert publish.how_it_was_made(other)["matcher"] == {"model": "ViT-L-14", "pretrained": "openai"}


def test_the_card_says_which_model_wrote_the_captions(project):
    glit = "download.datasets.glit"
    written = publish.how_it_was_made(
        params("experiment=glit", f"{glit}.root=/home/me/secret", f"{glit}.captioner.model=/home/me/secret/llava")
    )
    assert written["captions"]["model"] == "llava" and written["captions"]["prompt"].startswith("Describe this image")
    assert "secret" not in str(written)
    publish.main(params(), NullTracker())
    card = Path("data/publish/scenes/README.md").read_text()
    assert "captions" not in publish.how_it_was_made(params()) and "kept as their source published them" in card


def test_a_publication_needs_a_licence(project):
    with pytest.raises(ConfigError, match=r"publish\.licence is empty"):
        publish.main(params("publish.licence="), NullTracker())


def test_data_that_were_not_validated_are_not_published(project):
    Path("data/validation/summary.json").unlink()
    with pytest.raises(DataError, match=r"data/validation/summary\.json does not exist: only data that passed"):
        publish.main(params(), NullTracker())
    write_json("data/validation/summary.json", {"expectations": {"critical": 2}})
    with pytest.raises(DataError, match=r"summary\.json: 2 critical expectations failed"):
        publish.main(params(), NullTracker())
    write_json("data/validation/summary.json", {"expectations": {"critical": 0}})
    Path("data/flism/scenes/pairs.parquet").unlink()
    with pytest.raises(DataError, match=r"pairs\.parquet does not exist. The step `flism` writes it"):
        publish.main(params(), NullTracker())
    assert not Path("data/publish").exists()
