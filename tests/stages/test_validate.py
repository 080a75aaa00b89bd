"""The step `validate` on a data set on disk: its files, what it tells the tracker, and how it stops the pipeline."""

import dataclasses
import hashlib
import json
import shutil

import pandas as pd
import pytest
import torch
from PIL import Image

from fast_goal.config import Params, ScratchConfig, build
from fast_goal.configure import compose
from fast_goal.data.captions import tokenize
from fast_goal.data.images import open_image
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, load_dataset, read_table, write_dataset, write_table
from fast_goal.errors import DataError, ValidationError
from fast_goal.model.clip import build_scratch
from fast_goal.stages import validate

SENTENCES = ["A red ball lies on the left.", "A blue box stands on the right."]
CAPTION = " ".join(SENTENCES)
SCRATCH = ScratchConfig(
    split="train",
    image_size=32,
    patch_size=16,
    embed_dim=16,
    vision_width=16,
    vision_layers=1,
    text_width=16,
    text_layers=1,
    head_width=8,
    steps=1,
    batch_size=2,
    learning_rate=1e-3,
    weight_decay=0,
    warmup_steps=0,
)


class Recorder:
    """A tracker that keeps what it is told."""

    run_id = None

    def __init__(self):
        self.logged, self.artifacts, self.inputs = {}, [], []

    def metrics(self, values, step=None):
        self.logged.update(values)

    def artifact(self, path, folder=""):
        assert path.exists()
        self.artifacts.append((path.name, folder))

    def input(self, dataset, context=""):
        self.inputs.append(dataset.name)


def make_dataset(name, splits, brightness=0):
    root = validate.Path("data/datasets") / name
    root.mkdir(parents=True)
    rows = []
    for number, split in enumerate(splits):
        path = root / f"{number}.png"
        Image.new("RGB", (40, 30), (number, brightness, 0)).save(path)
        rows.append(
            {
                "image_id": f"{number}",
                "image_path": path.name,
                "width": 40,
                "height": 30,
                "split": split,
                "long_caption": f"{CAPTION} The floor has {number} marks.",
                "captions": ["A ball."],
                "source": "folder",
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    write_dataset(name, root, rows, [], source="folder")
    return rows


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the data set `photos` and its regions and pairs."""
    monkeypatch.chdir(tmp_path)
    rows = make_dataset("photos", ["train", "train", "val", "test"])
    box = {"region_index": 0, "x1": 0.0, "y1": 0.0, "x2": 20.0, "y2": 15.0, "kind": "quadrant"}
    words = {
        "rank": 1,
        "sentence_index": 0,
        "sentence": SENTENCES[0],
        "char_start": 0,
        "char_end": len(SENTENCES[0]),
        "similarity": 0.3,
        "weight": 1.0,
    }
    write_table(
        "data/flism/photos/regions.parquet",
        [{"image_id": row["image_id"], **box, "label": "", "score": 1.0} for row in rows],
        REGIONS,
    )
    write_table("data/flism/photos/pairs.parquet", [{"image_id": row["image_id"], **box, **words} for row in rows], PAIRS)
    write_table("data/flism/photos/skipped.parquet", [], SKIPPED)
    return tmp_path


@pytest.fixture(scope="module")
def params():
    values = compose(["experiment=own_photos", "download.datasets.photos.root=somewhere", "+validate.expected_counts.train=2"])
    return build(Params, values, "params.yaml")


def test_a_good_data_set(project, params):
    track = Recorder()
    validate.main(params, track)
    output = project / "data/validation"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["expectations"]["failed"] == summary["expectations"]["critical"] == 0
    assert summary["expectations"]["passed"] == len(summary["outcomes"]) > 25
    assert summary["datasets"] == {"photos": {"images": 4, "regions": 4, "pairs": 4, "skipped": 0}}
    assert summary["seconds"] >= 0
    assert (output / "data_docs/index.html").is_file()
    text = (output / "summary.md").read_text()
    for suite in ("photos_records (4 rows)", "photos_regions", "photos_pairs"):
        assert f"## {suite}" in text
    card = (output / "data_card.md").read_text()
    assert "## photos" in card
    assert (output / "photos_captions.png").is_file()
    assert "(photos_captions.png)" in card
    assert track.logged["expectations_failed"] == 0
    assert track.logged["photos_images"] == 4
    assert track.inputs == ["photos"]
    assert track.artifacts == [
        ("summary.md", ""),
        ("data_card.md", ""),
        ("photos_boxes.png", ""),
        ("photos_captions.png", ""),
        ("photos_examples.png", ""),
        ("data_docs", "data_docs"),
    ]


def test_critical_failures_stop_the_pipeline_after_the_reports_are_written(project, params):
    (project / "data/datasets/photos/1.png").unlink()
    pairs = read_table("data/flism/photos/pairs.parquet", PAIRS)
    write_table("data/flism/photos/pairs.parquet", pairs.assign(similarity=[0.1, 0.2, 3.0, 0.4]), PAIRS)
    track = Recorder()
    with pytest.raises(ValidationError) as caught:
        validate.main(params, track)
    message = str(caught.value)
    assert message.startswith("2 critical expectations failed; data/validation/summary.md")
    assert "photos_records, files_exist: every image file exists: 1 of 4 rows fail" in message
    assert "row 1, image_id '1': no file 1.png" in message
    assert "row 2, image_id '2', rank 1: similarity 3" in message
    assert message.count("    fix: ") == 2
    output = project / "data/validation"
    assert json.loads((output / "summary.json").read_text())["expectations"]["critical"] == 2
    assert "## Critical failures" in (output / "summary.md").read_text()
    assert (output / "data_card.md").is_file()
    assert (output / "data_docs/index.html").is_file()
    assert ("data_docs", "data_docs") in track.artifacts
    assert track.logged["expectations_critical"] == 2


def test_a_warning_is_listed_and_does_not_stop_the_pipeline(project, params):
    dataset = load_dataset("photos")
    records = dataset.records
    records.loc[2, "content_hash"] = records.loc[0, "content_hash"]  # val and train
    write_dataset("photos", dataset.root, records, [], source="folder")
    validate.main(params, Recorder())
    summary = json.loads((project / "data/validation/summary.json").read_text())
    assert summary["expectations"]["warnings"] == 1
    text = (project / "data/validation/summary.md").read_text()
    assert "## Warnings" in text
    assert (
        "row 2, image_id '2', image_path '2.png': the same content_hash as image '0' of split train of photos (row 0)" in text
    )


def test_another_data_set_is_checked_against_the_training_images(project, params):
    rows = make_dataset("others", ["test", "test"], brightness=50)
    both = {**params.download.datasets, "others": {}}
    params = dataclasses.replace(params, download=dataclasses.replace(params.download, datasets=both))
    validate.main(params, Recorder())
    assert "## others" in (project / "data/validation/data_card.md").read_text()
    rows[1]["content_hash"] = load_dataset("photos").records["content_hash"][0]
    write_dataset("others", "data/datasets/others", pd.DataFrame(rows), [], source="folder")
    with pytest.raises(ValidationError, match=r"others_records, no_test_image_in_training"):
        validate.main(params, Recorder())


def test_the_data_set_of_a_first_stage_is_a_training_set_too(project, params):
    first = dataclasses.replace(params.intermediate, dataset="others")
    both = {**params.download.datasets, "others": {}}
    download = dataclasses.replace(params.download, datasets=both)
    params = dataclasses.replace(params, download=download, intermediate=first)
    rows = make_dataset("others", ["train", "train"], brightness=50)
    with pytest.raises(DataError, match=r"data/flism/others/regions.parquet.*flism"):
        validate.main(params, Recorder())
    shutil.copytree("data/flism/photos", "data/flism/others")
    for name, schema in (("regions", REGIONS), ("pairs", PAIRS)):
        table = read_table(f"data/flism/others/{name}.parquet", schema)
        write_table(f"data/flism/others/{name}.parquet", table[table["image_id"].isin(["0", "1"])], schema)
    track = Recorder()
    validate.main(params, track)
    summary = json.loads((project / "data/validation/summary.json").read_text())
    assert summary["datasets"]["others"] == {"images": 2, "regions": 2, "pairs": 2, "skipped": 0}
    assert track.inputs == ["photos", "others"]
    checked = {(outcome["suite"], outcome["expectation"]) for outcome in summary["outcomes"]}
    assert {"others_pairs", "photos_pairs"} <= {suite for suite, _ in checked}
    # the counts are those of the last stage's data set
    assert ("photos_records", "count_train") in checked and ("others_records", "count_train") not in checked
    # a training image of both is no leak, one that is held out from the last stage is
    hashes = load_dataset("photos").records["content_hash"]
    for leaked in (0, 3):
        rows[1]["content_hash"] = hashes[leaked]
        write_dataset("others", "data/datasets/others", pd.DataFrame(rows), [], source="folder")
        if leaked == 0:
            validate.main(params, Recorder())
    with pytest.raises(ValidationError, match=r"photos_records, no_test_image_in_training") as caught:
        validate.main(params, Recorder())
    assert "image '1' of split train of others (row 1)" in str(caught.value)


def test_each_stage_has_captions_of_its_own():
    def asked(*overrides):
        both = build(
            Params, compose(["dataset=[scenes,rich_scenes]", "download.train_dataset=scenes", *overrides]), "params.yaml"
        )
        return [validate._captions(both, name) for name in ("scenes", "rich_scenes")]

    assert asked() == [{"long"}, set()]
    assert asked("finetune.captions=short") == [{"short"}, set()]
    first = ("finetune.captions=short", "intermediate=before")
    assert asked(*first, "intermediate.dataset=rich_scenes") == [{"short"}, {"long"}]
    assert asked(*first, "intermediate.dataset=scenes") == [{"short", "long"}, set()]


def test_without_flism_the_error_names_the_table_and_the_step(project, params):
    (project / "data/flism/photos/pairs.parquet").unlink()
    with pytest.raises(DataError, match=r"data/flism/photos/pairs.parquet.*flism"):
        validate.main(params, Recorder())


def test_the_caption_quality_against_a_direct_computation(project, params):
    """With a small untrained base: the cosine of each image with its own caption, and with the captions of the others."""
    clip = build_scratch(SCRATCH, seed=3)
    clip.save(validate.BASE, {})
    validate.main(params, Recorder())
    summary = json.loads((project / "data/validation/summary.json").read_text())
    records = load_dataset("photos").records
    pixels = torch.stack([clip.view(40, 30).apply(open_image(f"data/datasets/photos/{n}.png")) for n in range(4)])
    with torch.no_grad():
        images = clip.eval().encode_image(pixels)
        texts = clip.encode_text(tokenize(records["long_caption"].tolist(), clip.context_length)[0])
    cosines = (images @ texts.T).double()
    own = cosines.diagonal().mean().item()
    others = (cosines.sum().item() - cosines.diagonal().sum().item()) / 12
    found = summary["caption_quality"]["photos"]
    assert found["pairs"] == 4
    assert found["cosine"] == pytest.approx(own, abs=2e-4)
    assert found["shuffled_cosine"] == pytest.approx(others, abs=2e-4)
    assert "Long-CLIP ViT-L/14" in (project / "data/validation/data_card.md").read_text()
    # the pictures are smaller than the model's input
    assert "| info | 4 of 4 rows fail |" in (project / "data/validation/summary.md").read_text()


def test_the_summary_holds_no_time(project, params):
    """`finetune` depends on it: the same data must give the same file."""
    validate.main(params, Recorder())
    first = (project / "data/validation/summary.md").read_text()
    validate.main(params, Recorder())
    assert (project / "data/validation/summary.md").read_text() == first
