import json
import logging

import numpy as np
import pandas as pd
import pytest
from colours import flism_config
from test_detector import detector_config

from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError, DataError, ModelError
from fast_goal.flism.detectors import MAX_BOXES, load_detector, obtain_detector

ROWS = [
    {"image_id": "image01", "x1": 1, "y1": 2, "x2": 30, "y2": 40, "label": "cat", "score": 0.5},
    {"image_id": "0017", "x1": 1, "y1": 2, "x2": 3, "y2": 4, "label": "cat", "score": 0.5},
    {"image_id": "image01", "x1": 5, "y1": 6.5, "x2": 7, "y2": 8, "label": "", "score": 0.9},
    {"image_id": "image00", "x1": 0, "y1": 0, "x2": 10, "y2": 10, "label": "NA", "score": 0.2},
    {"image_id": "image01", "x1": 2, "y1": 2, "x2": 30, "y2": 40, "label": "dog", "score": 0.5},
]


def write(path, rows):
    frame = pd.DataFrame(rows)
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def obtain(path, scenes, folder):
    return obtain_detector(detector_config(kind="table", weights=str(path)), folder / "detector", scenes, 0)


def load(folder, **changes):
    return load_detector(folder / "detector", flism_config(**changes), None, "cpu")


def refused(tmp_path, scenes, rows, name="boxes.csv"):
    obtain(write(tmp_path / name, rows), scenes, tmp_path)


@pytest.mark.parametrize("name", ["boxes.csv", "boxes.parquet"])
def test_the_boxes_of_each_image_the_best_first(scenes, tmp_path, name, caplog):
    with caplog.at_level(logging.WARNING):
        info = obtain(write(tmp_path / name, ROWS), scenes, tmp_path)
    assert "1 of the 5 boxes" in caplog.text
    assert "'0017'" in caplog.text
    assert (info["images"], info["boxes"], info["unknown_boxes"], info["names"]) == (2, 4, 1, ["NA", "cat", "dog"])
    detector = load(tmp_path, confidence=0.2)
    assert not detector.reads_pixels
    one, none, other = detector.detect([None] * 3, ["image01", "image05", "image00"])
    assert one.labels == ["", "cat", "dog"]  # of equal scores the earlier row
    np.testing.assert_array_equal(one.boxes, [[5, 6.5, 7, 8], [1, 2, 30, 40], [2, 2, 30, 40]])
    np.testing.assert_array_equal(one.scores, [0.9, 0.5, 0.5])
    assert (none.boxes.shape, none.labels) == ((0, 4), [])
    assert other.labels == ["NA"]
    assert load(tmp_path, confidence=0.3).detect([None], ["image00"])[0].labels == []


def test_label_and_score_may_be_absent(scenes, tmp_path):
    rows = [{name: row[name] for name in ("image_id", "x1", "y1", "x2", "y2")} for row in ROWS]
    assert obtain(write(tmp_path / "boxes.csv", rows), scenes, tmp_path)["names"] == []
    (found,) = load(tmp_path, confidence=1.0).detect([None], ["image01"])
    assert (found.labels, found.scores.tolist()) == ([""] * 3, [1.0] * 3)
    with pytest.raises(ConfigError, match="none at all"):
        load(tmp_path, classes=["cat"])


def test_the_data_sets_own_objects(scenes, tmp_path):
    info = obtain("objects", scenes, tmp_path)
    assert (info["boxes"], info["names"]) == (len(scenes.objects), ["blue", "green", "red"])
    ids = list(scenes.records["image_id"])
    for image_id, found in zip(ids, load(tmp_path).detect([None] * len(ids), ids), strict=True):
        true = scenes.objects[scenes.objects["image_id"] == image_id]
        np.testing.assert_array_equal(found.boxes, true[["x1", "y1", "x2", "y2"]])
        assert found.labels == list(true["label"])
    without = Dataset(scenes.name, scenes.root, scenes.records)
    with pytest.raises(ConfigError, match="has none"):
        obtain("objects", without, tmp_path)


def test_numbers_as_ids(scenes, tmp_path):
    """In a CSV they are texts, leading zeros included; in a parquet they are what they are."""
    records = scenes.records.assign(image_id=[f"{number:04d}" for number in range(len(scenes.records))])
    dataset = Dataset(scenes.name, scenes.root, records)
    rows = [{**ROWS[0], "image_id": "0007"}]
    assert obtain(write(tmp_path / "boxes.csv", rows), dataset, tmp_path)["boxes"] == 1
    with pytest.raises(DataError, match=r"none of its 1 boxes.*\['7'\].*\['0000'\]"):
        obtain(write(tmp_path / "boxes.parquet", [{**ROWS[0], "image_id": 7}]), dataset, tmp_path)


def test_the_digest_follows_the_boxes_and_the_confidence(scenes, tmp_path):
    digests = set()
    for rows in (ROWS, ROWS[:3], [*ROWS[:4], {**ROWS[4], "x1": 3}]):
        obtain(write(tmp_path / "boxes.csv", rows), scenes, tmp_path)
        digests |= {load(tmp_path).digest, load(tmp_path, confidence=0.6).digest, load(tmp_path, iou=0.1).digest}
    assert len(digests) == 6


def test_crowded_images_keep_the_most_confident(scenes, tmp_path):
    rows = [{**ROWS[0], "x1": index / 100, "score": index / 1000} for index in range(MAX_BOXES + 50)]
    obtain(write(tmp_path / "boxes.csv", rows), scenes, tmp_path)
    (found,) = load(tmp_path, confidence=0.0).detect([None], ["image01"])
    assert found.scores.tolist() == [index / 1000 for index in range(MAX_BOXES + 49, 49, -1)]


def test_a_changed_copy_is_refused(scenes, tmp_path):
    obtain(write(tmp_path / "boxes.csv", ROWS), scenes, tmp_path)
    info = json.loads((tmp_path / "detector" / "detector.json").read_text())
    assert {path.name for path in (tmp_path / "detector").iterdir()} == {"detector.json", "boxes.parquet"}
    assert info["kind"] == "table"
    pd.DataFrame(ROWS).to_parquet(tmp_path / "detector" / "boxes.parquet")
    with pytest.raises(ModelError, match="not the file"):
        load(tmp_path)


def test_a_changed_source_is_told(scenes, tmp_path, caplog):
    obtain(write(tmp_path / "boxes.csv", ROWS[:1]), scenes, tmp_path)
    load(tmp_path)
    assert not caplog.text
    write(tmp_path / "boxes.csv", ROWS)
    assert len(load(tmp_path).detect([None], ["image01"])[0].labels) == 1
    assert "fast-goal base" in caplog.text


@pytest.mark.parametrize("column", ["image_id", "x1", "y2"])
def test_a_missing_column_is_named(scenes, tmp_path, column):
    rows = [{name: value for name, value in row.items() if name != column} for row in ROWS]
    with pytest.raises(DataError, match=rf"boxes\.csv: the column '{column}' is missing"):
        refused(tmp_path, scenes, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x2": "wide"}, r"boxes\.csv, row 2: x2 = 'wide'"),
        ({"y1": None}, r"boxes\.csv, row 2: y1 ="),
        ({"y1": float("inf")}, r"boxes\.csv, row 2: y1 ="),
        ({"image_id": ""}, r"boxes\.csv, row 2: image_id is empty"),
        ({"score": 1.2}, r"boxes\.csv, row 2: score = 1\.2"),
    ],
)
def test_a_bad_value_is_named(scenes, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        refused(tmp_path, scenes, [ROWS[0], {**ROWS[1], **change}, *ROWS[2:]])


def test_fractions_and_other_files_are_refused(scenes, tmp_path):
    with pytest.raises(DataError, match="pixels of the image"):
        refused(tmp_path, scenes, [{**ROWS[0], "x1": 0, "y1": 0, "x2": 1, "y2": 0.5}])
    with pytest.raises(ConfigError, match="does not exist"):
        obtain(tmp_path / "nowhere.csv", scenes, tmp_path)
    (tmp_path / "boxes.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"\.csv or \.parquet"):
        obtain(tmp_path / "boxes.json", scenes, tmp_path)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="cannot be read"):
        obtain(tmp_path / "empty.csv", scenes, tmp_path)
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        obtain(tmp_path / "broken.parquet", scenes, tmp_path)
