"""The source `segmentation`: small copies of five published data sets in their true layouts."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import publications as p
import pytest
from file_server import FileServer
from PIL import Image

from fast_goal.data.fetch import ManualStep
from fast_goal.data.masks import read_mask
from fast_goal.data.records import MASKS, load_dataset, write_dataset, write_table
from fast_goal.data.sources import Loaded, source_config
from fast_goal.errors import ConfigError, DataError

SIZE = (24, 16)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    return p.project(tmp_path, monkeypatch)


def mask(*numbers: int, size: tuple[int, int] = SIZE, palette: bool = False) -> bytes:
    """A PNG with columns of these numbers; size is (width, height)."""
    columns = np.array(numbers, dtype=np.uint8)[np.arange(size[0]) * len(numbers) // size[0]]
    image = Image.fromarray(np.tile(columns, (size[1], 1)))
    if palette:
        image.putpalette([value for number in range(256) for value in (number, 0, 255 - number)])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def load(name: str, section: Mapping[str, Any]) -> Loaded:
    function, config = source_config(section, f"download.datasets.{name}")
    loaded = function(config, name, Path("data/datasets", name))
    write_table("tables/masks.parquet", loaded.masks, MASKS)
    assert [row["image_id"] for row in loaded.masks] == [row["image_id"] for row in loaded.rows]
    for row, found in zip(loaded.rows, loaded.masks, strict=True):
        assert row["content_hash"] == p.sha256((loaded.root / row["image_path"]).read_bytes())
        assert found["content_hash"] == p.sha256((loaded.root / found["mask_path"]).read_bytes())
        assert read_mask(loaded.root / found["mask_path"]).shape == (row["height"], row["width"])
        assert (found["suite"], row["split"], row["long_caption"], row["captions"]) == (name, "test", "", [])
    return loaded


def served(section: dict[str, Any], archives: Mapping[str, bytes], server: FileServer) -> dict[str, Any]:
    """The shipped section with its archives on the local server."""
    origins = []
    for origin in section["archives"]:
        name = origin["remote"]["url"].rpartition("/")[2]
        server.files[name] = archives[name]
        origins.append({"remote": p.remote(server, name, file=origin["remote"]["file"]), "manual": None})
    return section | {"archives": origins}


def numbers_of(loaded: Loaded, name: str) -> dict[str, int]:
    found = loaded.segments[name]
    return dict(zip(found["names"], found["values"], strict=True))


VOC = {
    "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": b"2007_000033\n2007_000042\n",
    "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": b"2007_000032\n",
    **{f"VOCdevkit/VOC2012/JPEGImages/2007_0000{number}.jpg": p.jpeg(number) for number in (32, 33, 42)},
    "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png": mask(0, 1, palette=True),
    "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png": mask(0, 1, 255, palette=True),
    "VOCdevkit/VOC2012/SegmentationClass/2007_000042.png": mask(0, 19, 255, palette=True),
    "VOCdevkit/VOC2012/SegmentationObject/2007_000042.png": mask(1, 2, palette=True),
    "VOCdevkit/VOC2012/Annotations/2007_000042.xml": b"<annotation/>",
}


def test_pascal_voc(place):
    with FileServer({}) as server:
        section = served(p.shipped("voc20"), {"VOCtrainval_11-May-2012.tar": p.tar(VOC)}, server)
        loaded = load("voc20", section)
        asked = len(server.requests)
        again = load("voc20", section)  # nothing is fetched or unpacked twice
        assert vars(again) == vars(loaded) and len(server.requests) == asked
    assert [row["image_id"] for row in loaded.rows] == ["2007_000033", "2007_000042"]
    assert loaded.rows[0]["image_path"] == "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg"
    files = sorted(path.name for path in Path("data/datasets/voc20/VOCdevkit").rglob("*.*"))
    assert files == ["2007_000033.jpg", "2007_000033.png", "2007_000042.jpg", "2007_000042.png", "val.txt"]
    known = numbers_of(loaded, "voc20")
    assert (known["aeroplane"], known["train"], known["tv monitor"], len(known)) == (1, 19, 20, 20)
    assert loaded.segments["voc20"]["ignored"] == [0, 255] and len(loaded.segments["voc20"]["templates"]) == 80
    assert loaded.published == {"test": 2} and loaded.skipped == [] and p.facts("voc20").counts == {"test": 1449}
    write_dataset("voc20", loaded.root, loaded.rows, loaded.skipped, hashes=loaded.hashes, masks=loaded.masks,
                  segments=loaded.segments, source="segmentation")  # fmt: skip
    dataset = load_dataset("voc20")
    assert dataset.masks.to_dict("records") == loaded.masks and dataset.segments == loaded.segments
    assert dataset.labels is None and dataset.classes == {}


def test_ade20k(place):
    root = "ADEChallengeData2016"
    files = {
        f"{root}/sceneCategories.txt": b"",
        f"{root}/images/training/ADE_train_00000001.jpg": p.jpeg(0),
        f"{root}/annotations/training/ADE_train_00000001.png": mask(1),
        **{f"{root}/images/validation/ADE_val_0000000{number}.jpg": p.jpeg(number) for number in (1, 2, 3)},
        f"{root}/annotations/validation/ADE_val_00000001.png": mask(0, 1, 150),
        f"{root}/annotations/validation/ADE_val_00000002.png": mask(0, 151),
        f"{root}/annotations/validation/ADE_val_00000003.png": mask(0),
    }
    with FileServer({}) as server:
        loaded = load("ade20k", served(p.shipped("ade20k"), {"ADEChallengeData2016.zip": p.zipped(files)}, server))
    assert [row["image_id"] for row in loaded.rows] == ["ADE_val_00000001", "ADE_val_00000003"]
    assert p.reasons(loaded) == [("ADE_val_00000002", 2, "mask with unknown numbers")]
    assert "[151] are no class" in loaded.skipped[0]["detail"] and loaded.notes == ["masks without a pixel of any class: 1"]
    known = numbers_of(loaded, "ade20k")
    assert (known["wall"], known["flag"], len(known), loaded.segments["ade20k"]["ignored"]) == (1, 150, 150, [0])
    assert not list(Path("data/datasets/ade20k").rglob("*train*"))


def test_coco_stuff_images_and_masks_in_folders_of_one_name(place):
    archives = {
        "val2017.zip": p.zipped({f"val2017/{number:012d}.jpg": p.jpeg(number) for number in (139, 285)}),
        "stuffthingmaps_trainval2017.zip": p.zipped(
            {f"val2017/{number:012d}.png": mask(number % 180, 181, 255) for number in (139, 285)}
            | {"train2017/000000000009.png": mask(0)}
        ),
    }
    with FileServer({}) as server:
        loaded = load("coco_stuff", served(p.shipped("coco_stuff"), archives, server))
    assert [row["image_id"] for row in loaded.rows] == ["000000000139", "000000000285"]
    known = numbers_of(loaded, "coco_stuff")
    assert len(known) == 171 and (known["person"], known["backpack"], known["wood"]) == (0, 26, 181)
    assert loaded.segments["coco_stuff"]["ignored"] == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90, 255]


def test_cityscapes_by_hand_in_folders_of_cities(place):
    section = p.shipped("cityscapes")
    with pytest.raises(ManualStep, match=r"leftImg8bit_trainvaltest\.zip, gtFine_trainvaltest\.zip needs"):
        load("cityscapes", section)
    stem = "frankfurt/frankfurt_000000_000294"
    picture = io.BytesIO()
    Image.open(io.BytesIO(p.jpeg(3))).save(picture, "PNG")
    archives = {
        "leftImg8bit": {f"leftImg8bit/val/{stem}_leftImg8bit.png": picture.getvalue(), "README": b"", "license.txt": b""},
        "gtFine": {
            f"gtFine/val/{stem}_gtFine_labelIds.png": mask(0, 7, 33, 9),
            f"gtFine/val/{stem}_gtFine_instanceIds.png": mask(0, 7),
            f"gtFine/val/{stem}_gtFine_color.png": p.jpeg(4),
            f"gtFine/val/{stem}_gtFine_polygons.json": b"{}",
            "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png": mask(0),
        },
    }
    folder = place / ".fast_goal/downloads/cityscapes"
    folder.mkdir(parents=True)
    for name, files in archives.items():
        (folder / f"{name}_trainvaltest.zip").write_bytes(p.zipped(files))
    loaded = load("cityscapes", section)
    assert [row["image_id"] for row in loaded.rows] == [stem] and loaded.skipped == []
    known = numbers_of(loaded, "cityscapes")
    assert len(known) == 19 and (known["road"], known["traffic light"], known["bicycle"]) == (7, 19, 33)
    assert {9, 18, 29, 30, 255} < set(loaded.segments["cityscapes"]["ignored"])


def test_pascal_context_in_the_downloads_folder(place):
    section = p.shipped("voc59")
    with pytest.raises(ManualStep, match=r"VOC2010 needs something(.|\n)*detail-api(.|\n)*downloads/VOCdevkit/VOC2010"):
        load("voc59", section)
    root = place / ".fast_goal/downloads/VOCdevkit/VOC2010"
    for name, content in {
        "JPEGImages/2008_000002.jpg": p.jpeg(1),
        "JPEGImages/2008_000003.jpg": p.jpeg(2),
        "SegmentationClassContext/2008_000002.png": mask(0, 1, 59),
        "ImageSets/SegmentationContext/val.txt": b"2008_000002\r\n\r\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    loaded = load("voc59", section)
    assert [row["image_id"] for row in loaded.rows] == ["2008_000002"] and loaded.root.resolve() == root
    known = numbers_of(loaded, "voc59")
    # the numbers follow the alphabet, as those of the 459 classes do that the 59 are taken from
    assert list(known.values()) == list(range(1, 60)) and (known["aeroplane"], known["bag"], known["wood"]) == (1, 2, 59)
    assert sorted(known) == list(known)


def own(root: object = "pictures", **values: object) -> dict[str, Any]:
    """A folder of a user's own."""
    return {
        "source": "segmentation",
        "archives": [],
        "root": str(root),
        "steps": [],
        "image_folder": "images",
        "image_suffix": ".jpg",
        "mask_folder": "masks",
        "mask_suffix": ".png",
        "split_file": None,
        "names": ["sky", None, "old tree"],
        "ignored": [9],
        "templates": ["a {}"],
        "split": "test",
        "images": None,
        "seed": 0,
        **values,
    }


def write(place: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = place / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_what_cannot_be_used_is_skipped_with_its_reason(place):
    colours = io.BytesIO()
    Image.new("RGB", SIZE).save(colours, "PNG")
    files = {f"images/{name}.jpg": p.jpeg(place) for place, name in enumerate(["colours", "cut", "fine", "large", "strange"])}
    files |= {
        "images/broken.jpg": b"no picture",
        "masks/broken.png": mask(0),
        "masks/colours.png": colours.getvalue(),
        "masks/cut.png": mask(*range(24))[:50],
        "masks/fine.png": mask(0, 1, 2, 9),
        "masks/large.png": mask(0, size=(16, 24)),
        "masks/lonely.png": mask(0),
        "masks/strange.png": mask(0, 3, 200),
        "masks/.hidden.png": mask(0),
    }
    write(place, files)
    loaded = load("mine", own())
    assert [row["image_id"] for row in loaded.rows] == ["fine"] == [row["image_id"] for row in loaded.hashes]
    assert loaded.segments["mine"] == {
        **{"names": ["sky", "old tree"], "values": [0, 2]},
        **{"ignored": [1, 9], "templates": ["a {}"]},
    }
    assert sorted(p.reasons(loaded)) == [
        ("broken", 1, "unreadable image"),
        ("colours", 2, "mask without class numbers"),
        ("cut", 3, "unreadable mask"),
        ("large", 5, "mask of another size"),
        ("lonely", 6, "image missing"),
        ("strange", 7, "mask with unknown numbers"),
    ]
    details = {row["sample"]: row["detail"] for row in loaded.skipped}
    assert "16 x 24, the image 24 x 16" in details["large"] and "[3, 200]" in details["strange"]
    assert loaded.published == {"test": 7}


def test_lines_of_a_list(place):
    write(place, {f"images/{name}.jpg": p.jpeg(ord(name)) for name in "abc"} | {f"masks/{name}.png": mask(0) for name in "ac"})
    write(place, {"list.txt": "\ufeffc\nb\n../a\nc\n\na\n".encode()})
    loaded = load("mine", own(split_file="list.txt"))
    assert [row["image_id"] for row in loaded.rows] == ["c", "a"]
    assert sorted(p.reasons(loaded)) == [
        ("../a", 3, "path outside the data root"),
        ("b", 2, "mask missing"),
        ("images/c.jpg", 4, "duplicate id"),
    ]


def test_some_images_are_drawn(place):
    write(place, {f"images/{number}.jpg": p.jpeg(number) for number in range(8)})
    write(place, {f"masks/{number}.png": mask(0) for number in range(8)})
    few = load("mine", own(images=3, seed=1))
    assert len(few.rows) == 3 and few.published == {"test": 8} and "3 of 8 images were drawn" in few.notes[0]
    assert [row["image_id"] for row in load("mine", own(images=3, seed=1)).rows] == [row["image_id"] for row in few.rows]
    assert {row["image_id"] for row in few.rows} < {row["image_id"] for row in load("mine", own(images=5, seed=1)).rows}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": []}, "names = []: expected the name of each class"),
        ({"names": [None, " "]}, "expected the name of each class"),
        ({"names": ["a", None, "a"]}, "names: ['a'] stand twice"),
        ({"ignored": [2]}, "ignored = [2]: [2] are the numbers of ['old tree']"),
        ({"ignored": [70000]}, "ignored[0] = 70000: expected at most 65535"),
        ({"templates": "plane"}, "templates = 'plane'"),
        ({"archives": [{"remote": None, "manual": None}]}, "expected one of them"),
    ],
)
def test_a_configuration_that_makes_no_sense(values, message):
    with pytest.raises(ConfigError) as error:
        source_config(own(**values), "download.datasets.mine")
    assert message in str(error.value)


def test_folders_that_are_not_there(place):
    with pytest.raises(DataError, match=r"no folder pictures/masks, nor below .*; set download\.datasets\.mine\.root"):
        load("mine", own())
    write(place, {"masks/a.gif": b"", "images/a.jpg": p.jpeg(0)})
    with pytest.raises(DataError, match=r"masks/\*\.png: no images are named there"):
        load("mine", own())
    with pytest.raises(DataError, match=r"val\.txt does not exist; set download\.datasets\.mine\.split_file"):
        load("mine", own(split_file="val.txt"))
    write(place, {"masks/a.png": mask(77)})
    with pytest.raises(DataError, match=r"none of the 1 images below .*images can be used: \{'mask with unknown numbers': 1\}"):
        load("mine", own())
