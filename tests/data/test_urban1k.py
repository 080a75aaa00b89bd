"""The source `urban1k` against a small archive in the layout of the publication."""

import publications as p
import pytest
from file_server import FileServer

from fast_goal.errors import DataError

CAPTION = "The image captures a street.  Two cars, a 2.5 t van and a bus wait. "


@pytest.fixture
def urban(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    with FileServer({}) as server:
        yield Urban(server)


class Urban:
    def __init__(self, server: FileServer):
        self.server = server
        self.files = {f"Urban1k/image/{number}.jpg": p.jpeg(number) for number in (1, 2, 10, 999)}
        self.files |= {f"Urban1k/caption/{number}.txt": f"{CAPTION}{number}\n".encode() for number in (1, 2, 10, 999)}

    def load(self, **values: object):
        archive = self.server.files["Urban1k.zip"] = p.zipped(self.files)
        checked = p.remote(self.server, "Urban1k.zip", sha256=p.sha256(archive), size=len(archive))
        return p.load("urban1k", {**p.shipped("urban1k"), "archive": checked, **values})


def test_pairs_by_their_stems(urban):
    loaded = urban.load()
    assert [row["image_id"] for row in loaded.rows] == ["1", "2", "10", "999"]
    assert p.captions(loaded) == {str(number): f"{CAPTION}{number}\n" for number in (1, 2, 10, 999)}
    assert {row["split"] for row in loaded.rows} == {"test"} and loaded.published == {"test": 4}
    assert not loaded.skipped and p.facts("urban1k").counts == {"test": 1000}


def test_the_first_line_where_it_is_asked_for(urban):
    urban.files["Urban1k/caption/2.txt"] = b"First.\nSecond."
    loaded = urban.load(clean=["first_line"])
    assert p.captions(loaded)["2"] == "First." and p.captions(loaded)["1"] == f"{CAPTION}1"
    assert loaded.notes == ["the rule first_line changed 4 captions"]


def test_what_cannot_be_used(urban):
    del urban.files["Urban1k/image/2.jpg"]
    del urban.files["Urban1k/caption/10.txt"]
    urban.files["Urban1k/image/999.jpg"] = b"no picture"
    urban.files |= {"Urban1k/caption/a.txt": b"\xff\xfe\x00", "Urban1k/image/a.jpg": p.jpeg(5)}
    urban.files |= {"Urban1k/caption/b.txt": b" \n", "Urban1k/image/b.png": p.jpeg(6)}
    urban.files |= {"Urban1k/.DS_Store": b"x", "__MACOSX/Urban1k/image/._1.jpg": b"x", "Urban1k/image/Thumbs.db": b"x"}
    loaded = urban.load()
    assert [row["image_id"] for row in loaded.rows] == ["1"]
    assert p.reasons(loaded) == [
        ("10", 3, "no caption"),
        ("a", 5, "caption is not text"),
        ("b", 6, "empty caption"),
        ("2", 2, "image missing"),
        ("999", 4, "unreadable image"),
    ]


def test_a_wrong_checksum(urban):
    wrong = p.remote(urban.server, "Urban1k.zip", sha256=p.sha256(b"another"))
    with pytest.raises(DataError, match="sha256"):
        urban.load(archive=wrong)


def test_interrupted_and_resumed(urban):
    whole = len(p.zipped(urban.files))
    urban.server.fault("Urban1k.zip", close_after=whole // 2)
    with pytest.raises(DataError):
        urban.load()
    assert len(urban.load().rows) == 4
    assert urban.server.asked("Urban1k.zip")[-1].start > whole // 4


def test_another_layout_is_named_with_its_key(urban):
    urban.files = {name.replace("image/", "images/"): content for name, content in urban.files.items()}
    with pytest.raises(DataError, match=r"Urban1k/image is not in the archive; set download\.datasets\.urban1k\.images"):
        urban.load()
    assert len(urban.load(images="Urban1k/images").rows) == 4


def test_two_images_of_one_stem(urban):
    urban.files["Urban1k/image/2.png"] = p.jpeg(77)
    loaded = urban.load()
    assert len(loaded.rows) == 4 and p.reasons(loaded) == [("2.png", -1, "duplicate id")]
