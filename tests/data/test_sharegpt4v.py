"""The source `sharegpt4v`: the first records of a long JSON list, photographs of SA-1B from several archives."""

import json
import re
from pathlib import Path

import publications as p
import pytest
from file_server import FileServer

from fast_goal.data.fetch import ManualStep
from fast_goal.data.sources import sharegpt4v
from fast_goal.data.sources.sharegpt4v import first_records
from fast_goal.errors import DataError

FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
NUMBERS = [545504, 12, 545505, 223750]


def record(number: int, **values: object) -> dict:
    human = {"from": "human", "value": "What do you see?\n<image>"}
    answer = {"from": "gpt", "value": f"In the heart of a city, {number} is seen.\n\nIt's [calm], {{quiet}}. "}
    return {"id": str(number), "image": f"sam/images/sa_{number}.jpg", "conversations": [human, answer], **values}


@pytest.fixture
def share(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    with FileServer({}) as server:
        yield Share(server)


class Share:
    def __init__(self, server: FileServer):
        self.server = server
        self.records: list[object] = [*(record(number) for number in NUMBERS), {"image": "coco/train2017/000000000009.jpg"}]

    def bring(self, archive: str, *numbers: int) -> None:
        place = Path(".fast_goal/downloads/sa1b", archive)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(p.tar({f"./sa_{number}.jpg": p.jpeg(number) for number in numbers}))

    def load(self, **values: object):
        content = self.server.files[FILE] = json.dumps(self.records).encode()
        captions = p.remote(self.server, FILE, sha256=p.sha256(content))
        return p.load("sharegpt4v", {**p.shipped("sharegpt4v"), "records": 4, "captions": captions, **values})


def test_the_first_records_with_their_photographs(share):
    share.bring("sa_000000.tar", 12, 13)
    share.bring("sa_000020.tar", 223750)
    share.bring("sa_000048.tar", 545504, 545505)
    loaded = share.load()
    assert [row["image_id"] for row in loaded.rows] == [f"sa_{number}" for number in NUMBERS]
    assert p.captions(loaded)["sa_12"] == "In the heart of a city, 12 is seen.\n\nIt's [calm], {quiet}. "
    assert {row["split"] for row in loaded.rows} == {"test"} and loaded.published == {"test": 4}
    assert not list(Path("data/datasets/sharegpt4v").rglob("sa_13.jpg"))
    assert p.facts("sharegpt4v").counts == {"test": 1000}


def test_one_archive_after_the_other(share):
    share.bring("sa_000048.tar", 545504, 545505)
    with pytest.raises(ManualStep) as error:
        share.load()
    assert "2 of 4 photographs" in str(error.value) and "Download sa_000000.tar, sa_000020.tar, about" in str(error.value)
    Path(".fast_goal/downloads/sa1b/sa_000048.tar").unlink()
    share.bring("sa_000000.tar", 12)
    share.bring("sa_000020.tar", 223750)
    assert len(share.load().rows) == 4
    assert len(share.server.asked(FILE)) == 1


def test_more_records_later_take_more_from_the_same_archive(share):
    share.bring("sa_000000.tar", 12)
    share.bring("sa_000048.tar", 545504, 545505)
    assert len(share.load(records=2).rows) == 2
    assert len(share.load(records=3).rows) == 3


def test_what_cannot_be_used_is_listed(share):
    share.records[1:1] = ["text", {"image": None}, record(7, conversations=[]), record(545504), record(9, image="sam/images/")]
    share.bring("sa_000048.tar", 545504)
    loaded = share.load(records=7, missing_photos="skip")
    assert p.reasons(loaded) == [
        ("", 2, "no image named"),
        ("", 3, "no image named"),
        ("sa_7", 4, "caption is not text"),
        ("", 6, "no image named"),
        ("photos/sa_545504.jpg", 5, "duplicate id"),
        ("sa_12", 7, "image missing"),
    ]
    assert loaded.published == {"test": 7}


def test_too_few_records(share):
    with pytest.raises(DataError, match=r"has 5 records; download\.datasets\.sharegpt4v\.records = 9"):
        share.load(records=9)


def test_a_wrong_checksum(share):
    with pytest.raises(DataError, match="sha256"):
        share.load(captions=p.remote(share.server, FILE, sha256=p.sha256(b"another")))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_first_records_whatever_is_read_at_once(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(sharegpt4v, "_CHUNK", chunk)
    values = [record(1), {"ü": ["]", '\\"', 1.5]}, {}, [[]], record(2)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(values, ensure_ascii=False, indent=indent), encoding="utf-8")
    for count in range(8):
        assert list(first_records(path, count)) == values[:count]
    path.write_text(" [ ] ")
    assert list(first_records(path, 3)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "expected a JSON list; at character 0 is '{'"),
        ('[{"a": 1} {"b": 2}]', "at character 10 is '{'"),
        ('[{"a": 1}, {"b": ', "record 2, at character 9, is no JSON or cut off"),
        ("[{'a': 1}]", "record 1"),
        ("", "record 1"),
        ("[" + "9" * 5000 + "]", "record 1, at character 0: Exceeds the limit"),
        ("[" * 200_000, "record 1, at character 0: maximum recursion depth"),
    ],
)
def test_no_list(tmp_path, text, message):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        list(first_records(path, 3))


def test_what_is_behind_the_records_asked_for_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sharegpt4v, "_CHUNK", 16)
    path = tmp_path / "list.json"
    path.write_bytes(b'[{"a": 1}, {"b": 2},' + b" " * 20_000 + b"\xff broken")  # a text stream reads 8,192 bytes ahead
    assert list(first_records(path, 1)) == [{"a": 1}]


def test_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "list.json"
    path.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert list(first_records(path, 3)) == [{"a": 1}]


def test_half_a_photograph_of_a_killed_unpacking_is_not_taken(share):
    share.bring("sa_000000.tar", *NUMBERS)
    left = Path("data/datasets/sharegpt4v/photos/.sa_000000-0.unpacking")
    left.mkdir(parents=True)
    for number in NUMBERS:
        (left / f"sa_{number}.jpg").write_bytes(p.jpeg(number)[:50])
    loaded = share.load()
    assert len(loaded.rows) == 4 and not loaded.skipped
    assert not any("unpacking" in row["image_path"] for row in loaded.rows)
