"""The step `download` on a small folder of photographs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fast_goal.config import DownloadConfig
from fast_goal.data.records import load_dataset, load_skipped
from fast_goal.errors import ConfigError, DataError
from fast_goal.stages.download import main
from fast_goal.tracking import NullTracker


@dataclasses.dataclass
class PartOfParams:
    """The sections that the step reads."""

    download: DownloadConfig
    seed: int = 0


class Track(NullTracker):
    def __init__(self):
        self.inputs, self.numbers, self.files = [], {}, []

    def metrics(self, values, step=None):
        assert all(isinstance(value, float) for value in values.values())
        self.numbers.update(values)

    def input(self, dataset, context=""):
        self.inputs.append((dataset.name, dataset.digest))

    def artifact(self, path, folder=""):
        assert Path(path).exists()
        self.files.append(Path(path).name)


def section(root: str, **values: object) -> dict:
    return {
        "source": "folder",
        "root": root,
        "images": "images",
        "captions": "captions.csv",
        "columns": {"image": "image", "caption": "caption", "long_caption": None, "id": None, "split": None},
        "seed": 0,
        "fractions": {"train": 0.6, "val": 0.2, "test": 0.2},
        **values,
    }


def params(**sections: dict) -> PartOfParams:
    return PartOfParams(DownloadConfig(train_dataset=next(iter(sections)), watch="", datasets=sections))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "photos/images"
    images.mkdir(parents=True)
    lines = ["image,caption"]
    for i in range(30):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
        lines += [f"{i}.jpg,a picture of {i} dogs", f"{i}.jpg,noise"]
    lines += ["gone.jpg,a ghost", "3.jpg,"]
    (tmp_path / "photos/captions.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_tables_metrics_and_summary(project, capsys):
    track = Track()
    main(params(photos=section("photos")), track)
    dataset = load_dataset("photos")
    assert len(dataset.records) == 30 and dataset.root == Path("photos")
    assert all(dataset.path(row).is_file() for row in dataset.records.itertuples())
    assert dataset.records["long_caption"][3] == "a picture of 3 dogs. noise."
    assert load_skipped("photos")["reason"].tolist() == ["empty caption", "image missing"]
    assert json.loads(Path("data/datasets/photos/SOURCE.json").read_text())["root"] == "photos"

    metrics = json.loads(Path("data/records/metrics.json").read_text())
    numbers = metrics["datasets"]["photos"]
    assert numbers["images"] == 30 == numbers["train"] + numbers["val"] + numbers["test"]
    assert (numbers["short_captions"], numbers["mean_words_long"], numbers["mean_words_short"]) == (60, 6.0, 3.0)
    assert (numbers["skipped"], numbers["skipped_images"]) == (2, 1)
    assert numbers["skipped_by_reason"] == {"empty caption": 1, "image missing": 1}
    assert metrics["seconds"] >= 0
    assert track.inputs == [("photos", dataset.digest)] and track.numbers["photos.images"] == 30.0
    assert track.files == ["metrics.json"]

    printed = capsys.readouterr().out
    assert "photos: 30 images" in printed and "image missing: 1" in printed and "gone  row 62" in printed


def test_lost_images_are_counted_once_each(project):
    with Path("photos/captions.csv").open("a") as table:
        table.write("4.png,a twin by its id\nempty.jpg,\n,no image\n5.jpg,noise\n")
    main(params(photos=section("photos")), NullTracker())
    numbers = json.loads(Path("data/records/metrics.json").read_text())["datasets"]["photos"]
    assert numbers["skipped_images"] == 3  # gone.jpg, 4.png and empty.jpg, which has two rows
    assert numbers["skipped"] == 7


def test_same_input_same_bytes_whatever_was_there(project):
    main(params(photos=section("photos")), NullTracker())
    names = ["photos.parquet", "photos.json", "photos_skipped.parquet"]
    first = [Path("data/records", name).read_bytes() for name in names]
    Path("data/records/photos_truth.parquet").write_text("from another day")
    Path("data/records/photos.parquet").write_text("half")
    main(params(photos=section("photos")), NullTracker())
    assert [Path("data/records", name).read_bytes() for name in names] == first
    assert load_dataset("photos").truth is None


def test_data_sets_that_vanish_are_removed(project):
    main(params(photos=section("photos"), again=section("photos")), NullTracker())
    assert Path("data/records/again.parquet").exists()
    main(params(photos=section("photos")), NullTracker())
    assert not list(Path("data/records").glob("again*")) and not Path("data/datasets/again").exists()
    assert load_dataset("photos").name == "photos"
    assert list(json.loads(Path("data/records/metrics.json").read_text())["datasets"]) == ["photos"]
    assert len(list(Path("photos/images").iterdir())) == 30


def test_a_wrong_section_stops_before_any_work(project):
    with pytest.raises(ConfigError, match=r"download\.datasets\.other\.source"):
        main(params(photos=section("photos"), other={"source": "nowhere"}), NullTracker())
    with pytest.raises(ConfigError, match=r"download\.datasets\.metrics"):
        main(params(photos=section("photos"), metrics=section("photos")), NullTracker())
    assert not Path("data").exists()


def test_an_unusable_data_set_leaves_no_complete_one(project):
    Path("photos/captions.csv").write_text("file,text\na,b\n")
    with pytest.raises(DataError, match="'image'"):
        main(params(photos=section("photos")), NullTracker())
    with pytest.raises(DataError, match=r"photos\.json"):
        load_dataset("photos")
