"""The source `sugarcrepe` against small files in the layout of the publication; also what `data.benchmarks` does for others."""

import json

import publications as p
import pytest
from file_server import FileServer

from fast_goal.data.benchmarks import Cases, Origin, bring
from fast_goal.data.fetch import ManualStep
from fast_goal.data.records import CHOICES, load_dataset, load_skipped, write_dataset, write_table
from fast_goal.data.sources.karpathy import ManualArchive
from fast_goal.errors import ConfigError, DataError

KINDS = ["replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att"]


def case(file: str, caption: object, foil: object) -> dict:
    return {"filename": file, "caption": caption, "negative_caption": foil}


@pytest.fixture
def crepe(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    with FileServer({}) as server:
        yield Crepe(server)


class Crepe:
    def __init__(self, server: FileServer):
        self.server = server
        self.images = {f"val2017/{number:012d}.jpg": p.jpeg(number, (24 + number, 16)) for number in (139, 285, 632)}
        self.cases = {kind: {"0": case("000000000139.jpg", "A dog on a mat.", f"A {kind} on a mat.")} for kind in KINDS}
        self.cases["swap_att"]["1"] = case("000000000285.jpg", "A red bear, a blue cub", "A blue bear, a red cub")

    def load(self):
        for kind, cases in self.cases.items():
            self.server.files[f"{kind}.json"] = json.dumps(cases).encode()
        self.server.files["val2017.zip"] = p.zipped(self.images)
        files = {kind: p.remote(self.server, f"{kind}.json", file=f"sugarcrepe/{kind}.json") for kind in self.cases}
        images = p.remote(self.server, "val2017.zip")
        loaded = p.load("sugarcrepe", {**p.shipped("sugarcrepe"), "files": files, "images": images})
        write_table("tables/choices.parquet", loaded.choices, CHOICES)
        return loaded


def test_a_case_is_a_choice_over_the_whole_image(crepe):
    loaded = crepe.load()
    assert list(p.shipped("sugarcrepe")["files"]) == KINDS
    assert [row["image_id"] for row in loaded.rows] == ["000000000139", "000000000285"], "only what is named is unpacked"
    assert all((row["split"], row["long_caption"], row["captions"]) == ("test", "", []) for row in loaded.rows)
    assert [row["group"] for row in loaded.choices] == ["replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att",
                                                        "swap_att", "add_obj", "add_att"]  # fmt: skip
    assert loaded.choices[5] == {
        **{"image_id": "000000000285", "suite": "sugarcrepe", "group": "swap_att", "caption": "A red bear, a blue cub"},
        **{"x1": 0.0, "y1": 0.0, "x2": 309.0, "y2": 16.0, "foils": ["A blue bear, a red cub"]},
    }
    assert loaded.published == {kind: 1 + (kind == "swap_att") for kind in KINDS} and not loaded.skipped
    assert loaded.notes == ["sugarcrepe: 8 cases"]


def test_what_cannot_be_used_is_skipped_with_its_reason(crepe):
    crepe.images["val2017/000000000632.jpg"] = b"no picture"
    crepe.cases["add_obj"] |= {
        "1": case("000000000285.jpg", "  ", "A cat."),
        "2": case("000000000285.jpg", "A cat.", " "),
        "3": case("000000000285.jpg", "A cat.", None),
        "4": case("000000000285.jpg", 7, "A cat."),
        "5": case("000000000285.jpg", "A cat.", "a  cat. "),
        "6": case("000000000632.jpg", "A cat.", "A cow."),
        "7": case("000000000999.jpg", "A cat.", "A cow."),
        "8": case("", "A cat.", "A cow."),
        "9": "no object",
    }
    loaded = crepe.load()
    assert sorted(p.reasons(loaded)) == sorted(
        [
            ("000000000285", 2, "empty caption"),
            ("000000000285", 3, "empty foil"),
            ("000000000285", 4, "foil is not text"),
            ("000000000285", 5, "caption is not text"),
            ("000000000285", 6, "foil is the caption"),
            ("", 9, "no image named"),
            ("", 10, "no image named"),
            ("000000000632", 7, "unreadable image"),
            ("000000000632", 7, "case without its image"),
            ("000000000999", 8, "image missing"),
            ("000000000999", 8, "case without its image"),
        ]
    )
    assert len(loaded.choices) == 8 and loaded.published["add_obj"] == 10
    assert "add_obj" in next(row["detail"] for row in loaded.skipped if row["reason"] == "empty caption")


def test_a_file_that_is_not_understood(crepe):
    crepe.cases["add_att"] = ["a list"]
    with pytest.raises(DataError, match=r"add_att\.json: expected an object of cases by number.*found list"):
        crepe.load()


def test_nothing_that_can_be_used(crepe):
    crepe.cases = {"swap_obj": {"0": case("000000000139.jpg", "A cat.", "A cat.")}}
    with pytest.raises(DataError, match=r"none of its cases can be used: \{'foil is the caption': 1\}"):
        crepe.load()


def test_the_tables_come_back(crepe):
    loaded = crepe.load()
    write_dataset("crepe", loaded.root, loaded.rows, loaded.skipped, hashes=loaded.hashes, choices=loaded.choices,
                  source="sugarcrepe", published=loaded.published)  # fmt: skip
    dataset = load_dataset("crepe")
    assert dataset.choices.to_dict("records") == loaded.choices and dataset.labels is None
    assert len(load_skipped("crepe")) == 0 and len(dataset.split("test")) == 2


def test_boxes_are_clipped_to_their_image(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(p.jpeg(1, (24, 16)))
    boxes = [
        (2.0, 3.0, 9.5, 8.0),
        (-4.0, 3.0, 30.0, 99.0),
        (24.0, 0.0, 30.0, 9.0),
        (5.0, 5.0, 5.0, 9.0),
        (float("nan"), 0, 9, 9),
    ]
    cases = Cases()
    for row, box in enumerate(boxes, 1):
        assert cases.add("a.jpg", "images", "suite", "group", "A dog.", ["A cat."], row, box)
    loaded = cases.finish(tmp_path, "sugarcrepe", "set", {})
    found = [tuple(row[corner] for corner in ("x1", "y1", "x2", "y2")) for row in loaded.choices]
    assert found == [(2.0, 3.0, 9.5, 8.0), (0.0, 3.0, 24.0, 16.0)]
    assert p.reasons(loaded) == [("a", row, "box outside the image") for row in (3, 4, 5)]
    assert loaded.notes[-1] == "boxes that reach beyond their image, and were clipped to it: 1"


def test_two_images_of_one_name():
    cases = Cases()
    assert cases.add("a.jpg", "one", "suite", "group", "A dog.", ["A cat."], 1)
    assert not cases.add("a.jpg", "two", "suite", "group", "A dog.", ["A cat."], 2)
    assert [row["reason"] for row in cases.skipped] == ["duplicate id"] and cases.files("one") == {"a.jpg"}


def test_all_that_has_to_be_brought_is_said_at_once(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    monkeypatch.setenv("FAST_GOAL_DOWNLOADS", str(tmp_path / "here"))
    origins = [Origin(None, ManualArchive(f"set/{name}", [f"Get {name}."])) for name in ("a.json", "b.zip")]
    with pytest.raises(ManualStep) as error:
        bring(origins)
    for name in ("a.json", "b.zip"):
        assert f"Get {name}. Put it at {tmp_path / 'here/set' / name}." in str(error.value)
    (tmp_path / "here/set").mkdir(parents=True)
    (tmp_path / "here/set/a.json").write_text("{}")
    with pytest.raises(ManualStep, match=r"^b\.zip needs something to be done by hand"):
        bring(origins)
    (tmp_path / "here/set/b.zip").write_text("{}")
    assert [path.name for path in bring(origins)] == ["a.json", "b.zip"]


def test_an_origin_is_one_of_two():
    with pytest.raises(ConfigError, match="expected one of them"):
        Origin(None, None)
