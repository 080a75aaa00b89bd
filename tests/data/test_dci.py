"""The source `dci`: annotations from a server, photographs of SA-1B brought by hand, and three ways of splitting."""

import json
from pathlib import Path

import publications as p
import pytest
from file_server import FileServer

from fast_goal.data.fetch import ManualStep
from fast_goal.errors import ConfigError, DataError

ROOT = "densely_captioned_images"
FIRST = 1543972  # the first photograph of sa_000138.tar


def mask(label: str | None = "a  tree", box=((1, 2), (11, 12)), quality: int = 0, **values: object) -> dict:
    (x1, y1), (x2, y2) = box
    bounds = {"topLeft": {"x": x1, "y": y1}, "bottomRight": {"x": x2, "y": y2}}
    return {
        "idx": 0,
        "bounds": bounds,
        "mask_quality": quality,
        "label": label,
        "caption": "It is tall.",
        "parent": -1,
        **values,
    }


def annotation(number: int, **values: object) -> dict:
    return {
        "image": f"sa_{FIRST + number}.jpg",
        "short_caption": f"A park, number {number}.",
        "extra_caption": f"The park {number} is wide.\n Paths cross it.",
        "mask_data": {"0": mask()},
        "mask_keys": ["0"],
        **values,
    }


@pytest.fixture
def dci(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    with FileServer({}) as server:
        yield Dci(server)


class Dci:
    def __init__(self, server: FileServer, size: int = 12):
        self.server = server
        self.annotations: dict[str, object] = {f"{number:02d}-data.json": annotation(number) for number in range(size)}
        self.photos = {f"sa_{FIRST + number}.jpg": p.jpeg(number, (32, 24)) for number in range(size)}
        self.splits: dict | None = None

    def bring(self, name: str = "sa_000138.tar") -> Path:
        """The archive of SA-1B with its own annotations, photographs that nobody asked for, and names that begin with ./"""
        files = {f"./{photo}": content for photo, content in self.photos.items()}
        files |= {"./sa_1554261.jpg": b"not asked for", f"./sa_{FIRST}.json": b"{}"}
        place = Path(".fast_goal/downloads/sa1b", name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(p.tar(files))
        return place

    def load(self, **values: object):
        files = {
            f"{ROOT}/annotations/{name}": value if isinstance(value, bytes) else json.dumps(value).encode()
            for name, value in self.annotations.items()
        }
        files |= {f"{ROOT}/complete/00-data.json": b"{}", f"{ROOT}/photos/README": b"put them here"}
        if self.splits is not None:
            files[f"{ROOT}/splits.json"] = json.dumps(self.splits).encode()
        archive = self.server.files["dci.tar.gz"] = p.tar(files, "w:gz")
        remote = p.remote(self.server, "dci.tar.gz", sha256=p.sha256(archive))
        return p.load("dci", {**p.shipped("dci"), "test_images": 4, "annotations": remote, **values})


def name(number: int) -> str:
    return f"sa_{FIRST + number}"


def test_the_extra_caption_of_every_image(dci):
    dci.bring()
    loaded = dci.load()
    assert p.captions(loaded) == {name(n): f"The park {n} is wide.\n Paths cross it." for n in range(12)}
    assert loaded.rows[3]["captions"] == ["A park, number 3."] and loaded.rows[3]["split"] == "test"
    assert loaded.published == {"images": 12, "long_captions": 12}
    assert p.facts("dci").counts == {"images": 7805, "long_captions": 7602}
    unpacked = {path.name for path in Path("data/datasets/dci").rglob("*") if path.is_file()}
    assert not unpacked & {"sa_1554261.jpg", f"{name(0)}.json", "README"}

    both = dci.load(long_caption="short_and_extra")
    assert p.captions(both)[name(3)] == "A park, number 3.\nThe park 3 is wide.\n Paths cross it."


def test_photographs_have_to_be_asked_for_and_then_it_goes_on(dci):
    with pytest.raises(ManualStep) as error:
        dci.load()
    message = str(error.value)
    assert "12 of 12 photographs of SA-1B" in message and "1. Accept the licence at https://ai.meta.com" in message
    assert "2. Download sa_000138.tar" in message and str(Path(".fast_goal/downloads/sa1b/sa_000138.tar").absolute()) in message
    archive = dci.bring()
    rows = dci.load().rows
    assert len(rows) == 12 and len(dci.server.asked("dci.tar.gz")) == 1
    archive.unlink()  # 11 GB that are not needed any more
    assert dci.load().rows == rows


def test_single_photographs_and_a_folder_elsewhere(dci, tmp_path):
    folder = tmp_path / "my photos/deep"
    folder.mkdir(parents=True)
    for photo, content in dci.photos.items():
        (folder / photo).write_bytes(content)
    loaded = dci.load(photos=str(tmp_path / "my photos"))
    assert len(loaded.rows) == 12 and len(list(folder.iterdir())) == 12


def test_missing_photographs_stop_or_are_listed(dci):
    del dci.photos[f"{name(5)}.jpg"]
    dci.bring()
    with pytest.raises(ManualStep, match=rf"1 of 12 photographs of SA-1B \(such as {name(5)}\.jpg\)"):
        dci.load()
    loaded = dci.load(missing_photos="skip")
    assert p.reasons(loaded) == [(name(5), 6, "image missing")] and len(loaded.rows) == 11


def test_the_test_images_are_drawn_by_the_seed_alone(dci):
    dci.bring()
    splits = {row["image_id"]: row["split"] for row in dci.load(split="drawn").rows}
    assert sorted(splits.values()) == ["test"] * 4 + ["train"] * 8
    assert splits == {row["image_id"]: row["split"] for row in dci.load(split="drawn").rows}
    assert splits != {row["image_id"]: row["split"] for row in dci.load(split="drawn", seed=1).rows}
    with pytest.raises(ConfigError, match=r"dci\.test_images = 12: there are 12 images"):
        dci.load(split="drawn", test_images=12)


def test_a_lost_photograph_moves_no_other_image_to_another_split(dci):
    dci.bring()
    whole = {row["image_id"]: row["split"] for row in dci.load(split="drawn").rows}
    Path("data/datasets/dci/photos").rename("away")
    del dci.photos[f"{name(5)}.jpg"]
    dci.bring()
    part = {row["image_id"]: row["split"] for row in dci.load(split="drawn", missing_photos="skip").rows}
    assert part == {image: split for image, split in whole.items() if image != name(5)}


def test_the_published_splits(dci):
    dci.bring()
    names = list(dci.annotations)
    dci.splits = {"train": names[:8], "valid": names[8:10], "test": names[10:11]}
    loaded = dci.load(split="published")
    assert [row["split"] for row in loaded.rows] == ["train"] * 8 + ["val"] * 2 + ["test"]
    assert p.reasons(loaded) == [(name(11), 12, "unknown split")]
    assert loaded.published == {"images": 12, "long_captions": 11, "train": 8, "val": 2, "test": 1}


def test_published_splits_that_are_not_there(dci):
    with pytest.raises(DataError, match=r"splits\.json.*set download\.datasets\.dci\.split to test or drawn"):
        dci.load(split="published")


def test_what_cannot_be_used_is_listed(dci):
    dci.annotations |= {
        "01-data.json": b'{"image": ',
        "02-data.json": annotation(2, extra_caption=""),
        "03-data.json": annotation(3, extra_caption=None),
        "04-data.json": annotation(4, image=None),
        "05-data.json": annotation(4, image="sa_1543972.jpg"),
        "06-data.json": [],
        "07-data.json": annotation(7, short_caption="", extra_caption=["a", "list"]),
        "08-data.json": annotation(8, short_caption=" "),
    }
    dci.photos[f"{name(9)}.jpg"] = b"broken"
    dci.bring()
    loaded = dci.load()
    assert p.reasons(loaded) == [
        ("01-data", 2, "unreadable annotation"),
        (name(2), 3, "no long caption"),
        (name(3), 4, "no long caption"),
        ("04-data", 5, "no image named"),
        ("06-data", 7, "unreadable annotation"),
        (name(7), 8, "empty caption"),
        (name(7), 8, "caption is not text"),
        (name(8), 9, "empty caption"),
        ("photos/sa_1543972.jpg", 6, "duplicate id"),
        (name(9), 10, "unreadable image"),
    ]
    assert list(p.captions(loaded)) == [name(0), name(8), name(10), name(11)]
    assert loaded.published == {"images": 12, "long_captions": 5}


def test_labelled_masks_are_objects(dci):
    pairs = mask("a pond", ((0, 0), (5, 5)))
    pairs["bounds"] = [[3, 4], [500, 20]]  # as the README has it; the picture is 32 pixels wide
    masks = {
        "0": mask(),
        "1": mask("bad", quality=2),
        "2": mask(None, quality=1),
        "3": pairs,
        "4": mask("line", ((5, 5), (5, 9))),
        "5": mask("no box", bounds=None),
        "6": mask("low", quality=1),
    }
    dci.annotations = {"a-data.json": annotation(0, mask_data=masks), "b-data.json": annotation(1, mask_data=None)}
    dci.bring()
    loaded = dci.load()
    found = [
        (row["image_id"], row["object_index"], row["label"], row["x1"], row["y1"], row["x2"], row["y2"])
        for row in loaded.objects
    ]
    assert found == [
        (name(0), 0, "a  tree", 1.0, 2.0, 11.0, 12.0),
        (name(0), 1, "a pond", 3.0, 4.0, 32.0, 20.0),
        (name(0), 2, "low", 1.0, 2.0, 11.0, 12.0),
    ]
    assert "3 labelled masks are objects; 1 masks have a box without an area" in loaded.notes[-2]
    assert loaded.notes[-1] == "3 masks have no label or no box, or are marked as bad; they are no objects"
    assert dci.load(objects=False).objects is None


def test_a_wrong_checksum(dci):
    with pytest.raises(DataError, match="sha256"):
        dci.load(annotations=p.remote(dci.server, "dci.tar.gz", sha256=p.sha256(b"another")))


def test_an_annotation_in_two_published_splits_is_told(dci):
    dci.bring()
    names = list(dci.annotations)
    dci.splits = {"train": names[:11], "valid": names[11:], "test": names[10:11]}
    loaded = dci.load(split="published")
    assert [row["split"] for row in loaded.rows] == ["train"] * 10 + ["test", "val"]
    assert "1 names stand in two splits of splits.json; the later of train, valid, test holds" in loaded.notes
