"""The source `docci` against a small copy of the publication: its four splits, its two files, and what may be wrong in them."""

import json
import shutil
from pathlib import Path

import publications as p
import pytest
from file_server import FileServer

from fast_goal.config import DownloadConfig
from fast_goal.data.quality import Subject
from fast_goal.data.records import load_dataset, load_skipped
from fast_goal.errors import ConfigError, DataError
from fast_goal.stages.download import main
from fast_goal.tracking import NullTracker

SIZES = {"train": 5, "test": 3, "qual_dev": 1, "qual_test": 2}
TEXT = "A  dog at 9:41 a.m. runs.\nIt's brown, with “white” paws. "  # kept to the byte


def entry(split: str, number: int, **values: object) -> dict:
    name = f"{split}_{number:05d}"
    description = f"{TEXT}Number {number} of {split}."
    return {"example_id": name, "split": split, "image_file": f"{name}.jpg", "description": description, **values}


def publication() -> tuple[list[dict], dict[str, bytes]]:
    entries = [entry(split, number) for split, size in SIZES.items() for number in range(size)]
    images = {f"images/{row['image_file']}": p.jpeg(seed, (40, 32)) for seed, row in enumerate(entries)}
    return entries, images


@pytest.fixture
def docci(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    with FileServer({}) as server:
        yield Docci(server)


class Docci:
    def __init__(self, server: FileServer):
        self.server = server
        self.entries, self.images = publication()

    def serve(self, *extra: object) -> None:
        self.server.files["docci_descriptions.jsonlines"] = p.lines(*self.entries, *extra)
        self.server.files["docci_images.tar.gz"] = p.tar(self.images, "w:gz")

    def section(self, **values: object) -> dict:
        files = {key: p.remote(self.server, name) for key, name in FILES.items()}
        return {**p.shipped("docci"), **files, **values}

    def load(self, **values: object):
        return p.load("docci", self.section(**values))


FILES = {"descriptions": "docci_descriptions.jsonlines", "images": "docci_images.tar.gz"}


def test_splits_counts_and_captions_as_published(docci):
    docci.serve()
    loaded = docci.load()
    assert [row["split"] for row in loaded.rows] == ["train"] * 5 + ["test"] * 3 + ["val"]
    assert loaded.published == SIZES and not loaded.skipped
    assert p.captions(loaded) == {row["example_id"]: row["description"] for row in docci.entries if row["split"] != "qual_test"}
    assert loaded.rows[0]["image_path"] == "images/train_00000.jpg" and loaded.rows[0]["captions"] == []
    assert any("qual_test (2 images) is left out" in note for note in loaded.notes)
    assert len({row["perceptual_hash"] for row in loaded.hashes}) == 9


def test_the_published_numbers():
    assert p.facts("docci").counts == {"train": 9647, "test": 5000, "qual_dev": 100, "qual_test": 100}


def test_interrupted_half_way_and_resumed(docci):
    docci.serve()
    archive = docci.server.files["docci_images.tar.gz"]
    docci.server.fault("docci_images.tar.gz", close_after=len(archive) // 2)
    with pytest.raises(DataError, match=r"docci_images\.tar\.gz"):
        docci.load()
    assert not Path("data/datasets/docci/images").exists()
    loaded = docci.load()
    assert len(loaded.rows) == 9
    second = docci.server.asked("docci_images.tar.gz")[-1]
    assert second.status == 206 and second.start > len(archive) // 4
    assert docci.server.sent("docci_images.tar.gz") < len(archive) * 1.5
    before = len(docci.server.requests)
    assert docci.load().rows == loaded.rows and len(docci.server.requests) == before

    docci.server.clear()
    assert docci.load().rows == loaded.rows
    assert not docci.server.requests  # nothing is fetched twice, nor unpacked


def test_a_wrong_checksum_and_a_wrong_size(docci):
    docci.serve()
    archive = docci.server.files["docci_images.tar.gz"]
    right = p.remote(docci.server, "docci_images.tar.gz", sha256=p.sha256(archive), size=len(archive))
    assert len(docci.load(images=right).rows) == 9
    wrong = p.remote(docci.server, "docci_images.tar.gz", sha256=p.sha256(b"other"), file="again.tar.gz")
    with pytest.raises(DataError, match="sha256"):
        docci.load(images=wrong)
    wrong = p.remote(docci.server, "docci_descriptions.jsonlines", size=7, file="again.jsonlines")
    with pytest.raises(DataError, match="bytes"):
        docci.load(descriptions=wrong)
    gone = p.remote(docci.server, "nowhere.tar.gz")
    with pytest.raises(DataError, match=r"nowhere\.tar\.gz"):
        docci.load(images=gone)


def test_what_cannot_be_used_is_listed_with_its_line(docci):
    del docci.images["images/train_00001.jpg"]
    docci.images["images/train_00002.jpg"] = docci.images["images/train_00002.jpg"][:300]
    docci.serve(
        b'{"example_id": "cut", "split": "tra',
        b"",
        b"[1, 2]",
        entry("train", 0, description="another caption"),
        entry("train", 6, description=" \n"),
        entry("qual_new", 0),
        {"example_id": "train_00007", "split": "train"},
        entry("train", 8, image_file="../../train_00003.jpg"),
        entry("train", 9, image_file="train_00003.jpg", description="half a surrogate: \ud83d"),
        b"\xff\xfe",
    )
    loaded = docci.load()
    assert p.reasons(loaded) == [
        ("", 12, "unreadable row"),
        ("", 14, "unreadable row"),
        ("train_00006", 16, "empty caption"),
        ("qual_new_00000", 17, "unknown split"),
        ("train_00007", 18, "unreadable row"),
        ("train_00008", 19, "no image named"),
        ("", 21, "unreadable row"),
        ("images/train_00000.jpg", 15, "duplicate id"),
        ("train_00001", 2, "image missing"),
        ("train_00002", 3, "unreadable image"),
    ]
    assert "image_file, description" in loaded.skipped[4]["detail"]
    kept = p.captions(loaded)
    assert [name for name in kept if name.startswith("train")] == ["train_00000", "train_00003", "train_00004", "train_00009"]
    assert kept["train_00000"] == docci.entries[0]["description"] and kept["train_00009"] == "half a surrogate: \ufffd"


def test_cleaning_is_asked_for_counted_and_reversible(docci):
    docci.serve(entry("train", 0, example_id="clean", description="One line."))
    loaded = docci.load(clean=["collapse_whitespace", "strip"])
    assert p.captions(loaded)["clean"] == "One line."
    assert p.captions(loaded)["test_00000"] == "A dog at 9:41 a.m. runs. It's brown, with “white” paws. Number 0 of test."
    assert [note for note in loaded.notes if "rule" in note] == [
        "the rule collapse_whitespace changed 9 captions",
        "the rule strip changed 0 captions",
    ]
    assert p.captions(docci.load(clean=[]))["test_00000"] == f"{TEXT}Number 0 of test."
    assert p.captions(docci.load(clean=["first_line"]))["test_00000"] == "A  dog at 9:41 a.m. runs."
    with pytest.raises(ConfigError, match=r"download\.datasets\.docci\.clean\[0\] = 'lower'"):
        docci.load(clean=["lower"])


def test_another_file_than_the_publication(docci):
    docci.serve()
    with pytest.raises(DataError, match=r"no line of the split dev; it has .*'train': 5"):
        docci.load(splits={**p.shipped("docci")["splits"], "dev": "val"})
    docci.server.files["other"] = b"no json"
    with pytest.raises(DataError, match=r"other has no line that can be read.*example_id.* line 1: other is no JSON here"):
        docci.load(descriptions=p.remote(docci.server, "other"))


def test_the_step_download_writes_the_tables(docci):
    docci.serve()
    section = docci.section()
    download = DownloadConfig(train_dataset="docci", watch="", datasets={"docci": section})
    main(type("Params", (), {"download": download})(), NullTracker())
    dataset = load_dataset("docci")
    assert len(dataset.records) == 9 and len(dataset.hashes) == 9 and dataset.source == "docci"
    assert dataset.published == SIZES and dataset.facts["counts"]["train"] == 9647
    assert Subject(dataset, None, None, load_skipped("docci")).skipped_share == 0  # what is left out by choice is no loss
    digest = dataset.digest
    main(type("Params", (), {"download": download})(), NullTracker())
    assert load_dataset("docci").digest == digest
    assert json.loads(Path("data/records/metrics.json").read_text())["datasets"]["docci"]["train"] == 5

    shutil.rmtree("data/records")  # as DVC does
    main(type("Params", (), {"download": download})(), NullTracker())
    assert len(docci.server.asked("docci_images.tar.gz")) == 1 and load_dataset("docci").digest == digest
    shutil.rmtree("data/records")
    other = DownloadConfig(train_dataset="other", watch="", datasets={"other": section})
    main(type("Params", (), {"download": other})(), NullTracker())
    assert [path.name for path in Path("data/datasets").iterdir() if path.is_dir()] == ["other"]
    assert len(docci.server.asked("docci_images.tar.gz")) == 1  # the download itself stays


def test_a_file_with_a_byte_order_mark_and_an_id_that_cannot_be_stored(docci):
    docci.serve(entry("train", 3, example_id="odd \ud800"), b'{"example_id": "' + b"x" * 3_000_000)
    docci.server.files["docci_descriptions.jsonlines"] = b"\xef\xbb\xbf" + docci.server.files["docci_descriptions.jsonlines"]
    loaded = docci.load()
    assert p.captions(loaded)["train_00000"] == docci.entries[0]["description"]
    assert [(sample, reason) for sample, _, reason in p.reasons(loaded)] == [
        ("", "unreadable row"),
        ("odd \ufffd", "name is not UTF-8"),
    ]
    assert all(len(row["detail"]) < 1000 for row in loaded.skipped)
