import hashlib
import json
import shutil

import numpy as np
import pytest
from noting_tracker import Tracker
from PIL import Image

from fast_goal.config import Params, ScratchConfig, build
from fast_goal.configure import compose
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, load_dataset, read_table, write_dataset
from fast_goal.errors import ModelError
from fast_goal.files import write_json
from fast_goal.stages import flism
from fast_goal.tracking import NullTracker

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with five small scenes and an untrained base without a detector."""
    from fast_goal.model.clip import build_scratch

    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(5):
        path = tmp_path / "data/datasets/scenes" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((24, 32, 3), 40 * number, dtype=np.uint8)
        pixels[2:10, 4:20] = list(COLOURS.values())[number % 3]
        Image.fromarray(pixels).save(path)
        split = ["pretrain", "train", "train", "val", "test"][number]
        rows.append(
            {
                "image_id": str(number),
                "image_path": path.name,
                "width": 32,
                "height": 24,
                "split": split,
                "long_caption": "" if split == "pretrain" else f"A picture. It has a {list(COLOURS)[number % 3]} box.",
                "captions": ["A box."],
                "source": "test",
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    (tmp_path / "data/datasets/scenes/2.png").write_bytes(b"")
    write_dataset("scenes", "data/datasets/scenes", rows, [], source="scenes")
    sizes = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "vision_width": 16, "vision_layers": 1, "text_width": 16}
    rest = {"text_layers": 1, "head_width": 8, "steps": 1, "batch_size": 2, "learning_rate": 1.0, "weight_decay": 0.0}
    config = ScratchConfig(split="train", warmup_steps=0, **sizes, **rest)
    build_scratch(config, 24, seed=0).save(tmp_path / "models/base/clip", {})
    write_json("models/base/detector/detector.json", {"kind": "none"})
    return tmp_path


def params(*overrides) -> Params:
    return build(Params, compose(["flism.splits=[train,val,test]", *overrides]), "params.yaml")


def test_the_step_writes_its_outputs(project):
    track = Tracker()
    flism.main(params(), track)
    folder = project / "data/flism/scenes"
    assert {path.name for path in folder.iterdir()} == {"regions.parquet", "pairs.parquet", "skipped.parquet", "pairs.png"}
    assert list(read_table(folder / "pairs.parquet", PAIRS)["image_id"]) == ["1", "3", "4"]
    assert len(read_table(folder / "regions.parquet", REGIONS)) == 15
    assert list(read_table(folder / "skipped.parquet", SKIPPED)["sample"]) == ["2"]
    metrics = json.loads((project / "data/flism/metrics.json").read_text())
    assert metrics["scenes"]["images"] == 3
    assert metrics["seconds"] > 0
    assert len(metrics["scenes"]["similarity_histogram"]["counts"]) == 40
    assert track.inputs == [("scenes", "")]
    assert track.files == ["data/flism/scenes/pairs.png"]
    assert track.numbers["share_by_kind.detector"] == 0
    assert track.numbers["pairs"] == 3


def test_the_data_set_of_a_first_stage_is_matched_too(project):
    folder = project / "data/datasets/others"
    shutil.copytree(project / "data/datasets/scenes", folder)
    records = load_dataset("scenes").records
    write_dataset("others", folder, records[records["image_id"].isin(["1", "3"])], [], source="scenes")
    values = compose(["flism.splits=[train,val]", "intermediate=before", "intermediate.dataset=others"])
    track = Tracker()
    flism.main(build(Params, values, "params.yaml"), track)
    assert list(read_table(project / "data/flism/scenes/pairs.parquet", PAIRS)["image_id"]) == ["1", "3"]
    assert list(read_table(project / "data/flism/others/pairs.parquet", PAIRS)["image_id"]) == ["1", "3"]
    metrics = json.loads((project / "data/flism/metrics.json").read_text())
    assert list(metrics) == ["scenes", "others", "seconds"] and metrics["others"]["skipped"] == 0
    assert track.inputs == [("scenes", ""), ("others", "")]
    assert track.files == ["data/flism/scenes/pairs.png", "data/flism/others/pairs.png"]
    assert (track.numbers["pairs"], track.numbers["skipped"]) == (2, 1)
    assert (track.numbers["others.pairs"], track.numbers["others.skipped"]) == (2, 0)


def test_a_second_run_reads_the_cache_and_gives_the_same_files(project):
    flism.main(params(), NullTracker())
    first = {path.name: path.read_bytes() for path in (project / "data/flism/scenes").glob("*.parquet")}
    flism.main(params("flism.batch_size=1", "flism.shard_size=1"), NullTracker())
    assert first == {path.name: path.read_bytes() for path in (project / "data/flism/scenes").glob("*.parquet")}
    assert len(list((project / ".fast_goal/flism").iterdir())) == 1


def test_spatial_regions_need_no_detector_at_all(project):
    (project / "models/base/detector/detector.json").unlink()
    flism.main(params("flism.regions=spatial"), NullTracker())
    with pytest.raises(ModelError, match=r"detector\.json"):
        flism.main(params(), NullTracker())


def test_another_clip_than_the_base_may_match(project):
    from fast_goal.model.clip import build_scratch

    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 8, "vision_width": 16, "vision_layers": 1, "text_width": 16}
    rest = {"text_layers": 1, "head_width": 8, "steps": 1, "batch_size": 2, "learning_rate": 1.0, "weight_decay": 0.0}
    config = ScratchConfig(split="train", warmup_steps=0, **sizes, **rest)
    build_scratch(config, 77, seed=1).save(project / "matcher", {})
    base = params()
    clip, detector = flism.load_models(base, None, "cpu")
    assert (clip.image_size, clip.context_length, detector) == (32, 24, None)
    other = params(f"flism.matcher.model=local-dir:{project / 'matcher'}", "base.context_length=100")
    clip, _ = flism.load_models(other, None, "cpu")
    assert (clip.image_size, clip.context_length, clip.training) == (16, 100, False)
    flism.main(base, NullTracker())
    first = read_table("data/flism/scenes/pairs.parquet", PAIRS)
    flism.main(other, NullTracker())
    second = read_table("data/flism/scenes/pairs.parquet", PAIRS)
    assert list(first["image_id"]) == list(second["image_id"])
    assert not np.allclose(first["similarity"], second["similarity"], atol=1e-3)
    assert len(list((project / ".fast_goal/embeddings").glob("model-*.sqlite"))) == 2
