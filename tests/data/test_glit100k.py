"""The source `glit100k`: what was published comes back equal, in every layout; released JSON in the authors' style."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from file_server import FileServer
from PIL import Image
from published import CAPTION, SENTENCES, config, make

from fast_goal.configure import CONF
from fast_goal.data.fetch import ManualStep
from fast_goal.data.publication import write_publication
from fast_goal.data.records import DATASETS_FOLDER, PAIRS, RECORDS, read_table
from fast_goal.data.sources import glit100k, source_config
from fast_goal.errors import ConfigError, DataError

LAYOUTS = ["table", "parquet", "webdataset"]
FOLDER = DATASETS_FOLDER / "glit"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FAST_GOAL_DOWNLOADS", "FAST_GOAL_MIRROR"):
        monkeypatch.delenv(name, raising=False)


def section(**changes: object) -> dict:
    values = yaml.safe_load((CONF / "dataset/glit100k.yaml").read_text())["download"]["datasets"]["glit100k"]
    return values | changes


def run(values: dict):
    load, options = source_config(values, "download.datasets.glit")
    return load(options, "glit", FOLDER)


def publish(layout: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    dataset, pairs, skipped = make(Path("root"))
    write_publication(dataset, pairs, skipped, config(layout), Path("copy"))
    return dataset.records, pairs


def ordered(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows)[RECORDS.names].sort_values("image_id").reset_index(drop=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_publication_comes_back_equal(layout):
    records, pairs = publish(layout)
    if layout != "table":
        shutil.rmtree("root")
    for _ in range(2):
        loaded = run(section(root="copy", images="root"))
        pd.testing.assert_frame_equal(ordered(loaded.rows), records.sort_values("image_id").reset_index(drop=True))
        found = read_table(FOLDER / "local_pairs.parquet", PAIRS).sort_values(["image_id", "rank"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(found, pairs.sort_values(["image_id", "rank"]).reset_index(drop=True))
        assert not loaded.skipped and loaded.published == {"train": 6, "val": 1, "test": 1}
        assert all((loaded.root / row["image_path"]).is_file() for row in loaded.rows) and len(loaded.hashes) == 8


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_images_are_extracted_once(layout, monkeypatch):
    publish(layout)
    first = run(section(root="copy")).rows
    calls = []
    original = glit100k.file_digest
    monkeypatch.setattr(glit100k, "file_digest", lambda path, length: calls.append(path.name) or original(path, length))
    assert run(section(root="copy")).rows == first and not calls
    (FOLDER / "images" / first[0]["image_path"]).unlink()
    assert run(section(root="copy")).rows == first
    assert len(calls) == 1 and calls[0].startswith("train-00000-of-00002")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_file_is_named_before_it_is_read(layout):
    publish(layout)
    path = sorted(Path("copy/data").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name} differs from its checksum"):
        run(section(root="copy", images="root"))


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_remote_publication_is_fetched_with_its_checksums(layout):
    records, _ = publish(layout)
    with FileServer(Path("copy").resolve()) as server:
        name = next(path.name for path in sorted(Path("copy/data").iterdir()) if path.name.startswith("train-00001"))
        size = Path("copy/data", name).stat().st_size
        server.fault(f"data/{name}", close_after=size // 2)
        loaded = run(section(remote=server.base))
        assert ordered(loaded.rows)["content_hash"].tolist() == records.sort_values("image_id")["content_hash"].tolist()
        assert server.sent(f"data/{name}") == size and not server.asked("README.md")
        shutil.rmtree(".fast_goal/downloads")
        server.fault(f"data/{name}", content=b"x" * size, times=None)
        with pytest.raises(DataError, match=rf"{name}.*published anew since, delete that file"):
            run(section(remote=server.base))


def test_a_table_whose_images_changed_since():
    records, pairs = publish("table")
    Image.new("RGB", (5, 5)).save(Path("root") / records["image_path"][0])
    (Path("root") / records["image_path"][1]).unlink()
    loaded = run(section(root="copy", images="root"))
    assert [(row["sample"], row["reason"]) for row in loaded.skipped] == [
        ("id/1.x", "image missing"),
        ("id/0.x", "image changed"),
    ]
    found = read_table(FOLDER / "local_pairs.parquet", PAIRS)
    assert set(found["image_id"]) == set(pairs["image_id"]) - {"id/0.x", "id/1.x"}
    assert {row["image_id"] for row in loaded.hashes} == {row["image_id"] for row in loaded.rows}


def test_a_hostile_publication_writes_nothing_outside():
    """Rows with paths that leave the folder, with checksums that fit."""
    import io
    import tarfile

    from fast_goal.files import file_digest

    publish("webdataset")
    path = Path("copy/data/val-00000-of-00001.tar")
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    rows = [
        (name, data.replace(b'"photos/', b'"../../../../evil/') if name.endswith("json") else data) for name, data in members
    ]
    with tarfile.open(path, "w") as archive:
        for name, data in rows:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    sums = Path("copy/checksums.sha256")
    lines = [line for line in sums.read_text().splitlines() if "val-" not in line]
    sums.write_text("\n".join([*lines, f"{file_digest(path, 64)}  data/{path.name}"]) + "\n")
    loaded = run(section(root="copy"))
    assert [row["reason"] for row in loaded.skipped] == ["path outside the data root"]
    project = Path().resolve()
    assert not list(project.rglob("evil")) and not (project.parent / "evil").exists()


def released(number: int, **changes: object) -> dict:
    box = {"x1": 3, "y1": 4, "x2": 20, "y2": 25, "width": 17, "height": 21}
    segments = [
        {"filename": f"x/{number}_1.png", "caption": sentence, "similarity_score": score, "bbox_coordinates": box}
        for sentence, score in ((SENTENCES[1].rstrip("."), 24.5), (SENTENCES[0].rstrip("."), 31.25))
    ]
    made = {"original_filename": f"/home/author/sa_000000/sa_{number}.jpg", "original_caption": CAPTION, "segment": segments}
    return made | changes


def write_released(entries: list) -> None:
    folder = Path(".fast_goal/downloads/glit")
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(6):
        path = Path(f".fast_goal/downloads/sa1b/sa_{number // 3:06d}/sa_{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number * 30, 0, 90)).save(path)
    (folder / "glit100k_train.json").write_text(json.dumps(entries))


def test_released_files_with_their_pairs():
    write_released([released(1), released(4)])
    loaded = run(section())
    assert [row["image_id"] for row in loaded.rows] == ["sa_1", "sa_4"]
    assert all((loaded.root / row["image_path"]).name == f"{row['image_id']}.jpg" for row in loaded.rows)
    assert loaded.rows[0]["long_caption"] == CAPTION and loaded.rows[0]["split"] == "train"
    assert loaded.published == {"train": 2} and not loaded.skipped
    pairs = read_table(FOLDER / "local_pairs.parquet", PAIRS)
    first = pairs.iloc[0].to_dict()
    assert (first["rank"], first["sentence_index"], first["similarity"], first["weight"]) == (1, 0, 0.3125, 0.5)
    assert CAPTION[first["char_start"] : first["char_end"]] == first["sentence"] == SENTENCES[0].rstrip(".")
    assert (first["x1"], first["y1"], first["x2"], first["y2"]) == (3.0, 4.0, 20.0, 25.0)
    assert pairs["sentence_index"].tolist() == [0, 1, 0, 1]


def test_other_names_are_a_matter_of_configuration():
    write_released([])
    entries = [{"file": "sa_2.jpg", "text": CAPTION}]
    Path(".fast_goal/downloads/glit/list.json").write_text(json.dumps(entries))
    keys = {"image": "file", "caption": "text", "pairs": None, "sentence": "", "box": "", "similarity": None}
    loaded = run(section(released={"files": {"list.json": "val"}, "keys": keys, "similarity_scale": 1.0}))
    assert [(row["image_id"], row["split"]) for row in loaded.rows] == [("sa_2", "val")]
    assert len(read_table(FOLDER / "local_pairs.parquet", PAIRS)) == 0


def test_what_is_bad_in_released_files_is_named():
    good = released(1)["segment"][0]
    entries = [
        released(0),
        released(9),
        released(2, original_caption="  "),
        released(3, segment=[{**good, "caption": "Not there"}, {**good, "bbox_coordinates": {"x1": 1}}, 7, good]),
        {"caption": "no name"},
        "text",
        released(0),
    ]
    write_released(entries)
    loaded = run(section(missing_photos="skip"))
    assert [row["image_id"] for row in loaded.rows] == ["sa_0", "sa_3"]
    assert Counter((row["reason"], row["row"]) for row in loaded.skipped) == {
        ("image missing", 2): 1,
        ("empty caption", 3): 1,
        ("local sentence not in its caption", 4): 1,
        ("unreadable local pair", 4): 2,
        ("no image named", 5): 1,
        ("no image named", 6): 1,
        ("duplicate id", 7): 1,
    }
    assert read_table(FOLDER / "local_pairs.parquet", PAIRS).groupby("image_id").size().to_dict() == {"sa_0": 2, "sa_3": 1}


def test_what_a_person_has_to_do_is_said():
    with pytest.raises(ManualStep) as error:
        run(section())
    place = Path(".fast_goal/downloads/glit").absolute()
    assert "dataset.json (this project's layout) or glit100k_train.json" in str(error.value) and str(place) in str(error.value)
    write_released([released(1)])
    shutil.rmtree(".fast_goal/downloads/sa1b")
    with pytest.raises(ManualStep, match=r"Accept the licence at https://ai\.meta\.com/datasets/segment-anything-downloads/"):
        run(section())
    publish("table")
    with pytest.raises(ManualStep, match="Get the images from their source") as error:
        run(section(root="copy", images="pictures"))
    assert str(Path("pictures").absolute()) in str(error.value)
    with pytest.raises(ConfigError, match="set remote or root, not both"):
        run(section(remote="https://host", root="copy"))


def test_a_publication_of_another_version_is_refused():
    publish("table")
    info = json.loads(Path("copy/dataset.json").read_text())
    for changes, message in (
        ({"format": "fast_goal dataset 9"}, "this version reads 'fast_goal dataset 1'"),
        ({"layout": "zip"}, "layout 'zip'"),
        ({"splits": 3}, "is no description of a published data set"),
        ({"splits": {"train": {"images": 1, "files": ["../secret.parquet"]}}}, "and dataset.json names it"),
    ):
        Path("copy/dataset.json").write_text(json.dumps(info | changes))
        with pytest.raises(DataError, match=message):
            run(section(root="copy", images="root"))
