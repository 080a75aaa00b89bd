"""The sources `labelled` and `torchvision`: folders of classes, and data sets of torchvision in their true layouts."""

import io
import json
from pathlib import Path

import numpy as np
import publications as p
import pytest
from PIL import Image

from fast_goal.data import prompts
from fast_goal.data.fetch import ManualStep
from fast_goal.data.records import LABELS, load_dataset, write_dataset, write_table
from fast_goal.data.sources import Loaded, source_config
from fast_goal.errors import ConfigError, DataError

ELEVEN = ["food101", "cifar10", "cifar100", "sun397", "stanford_cars", "aircraft", "dtd", "pets", "flowers102", "caltech101",
          "imagenet"]  # fmt: skip
PLAIN = {"templates": ["a photo of a {}.", "a {}"], "split": "test", "images": None, "seed": 0}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    return p.project(tmp_path, monkeypatch)


def load(name: str, section: dict) -> Loaded:
    function, config = source_config(section, f"download.datasets.{name}")
    loaded = function(config, name, Path("data/datasets", name))
    write_table("tables/labels.parquet", loaded.labels, LABELS)
    for row in loaded.rows:
        assert row["content_hash"] == p.sha256((loaded.root / row["image_path"]).read_bytes())
    return loaded


def folders(root: Path, images: dict[str, list[str]]) -> None:
    for number, (name, files) in enumerate(images.items()):
        (root / name).mkdir(parents=True)
        for index, file in enumerate(files):
            (root / name / file).write_bytes(p.jpeg(10 * number + index, (20 + number, 16)))


def labelled(root: object = "pictures", **values: object) -> dict:
    return {"source": "labelled", "root": str(root), "steps": [], "names": None, **PLAIN, **values}


def test_a_folder_for_each_class(place):
    folders(
        place / "pictures", {"tabby_cat": ["b.jpg", "a.PNG"], "dog": ["1.jpeg", "notes.txt"], "empty": [], ".git": ["x.jpg"]}
    )
    loaded = load("animals", labelled())
    assert [(row["image_id"], row["split"]) for row in loaded.rows] == [
        ("dog/1", "test"), ("tabby_cat/a", "test"), ("tabby_cat/b", "test")]  # fmt: skip
    assert loaded.root == Path("pictures") and {(row["long_caption"], *row["captions"]) for row in loaded.rows} == {("",)}
    assert loaded.labels[0] == {
        **{"image_id": "dog/1", "x1": 0.0, "y1": 0.0, "x2": 21.0, "y2": 16.0},
        **{"suite": "animals", "label": "dog"},
    }
    assert [row["label"] for row in loaded.labels] == ["dog", "tabby cat", "tabby cat"]
    assert loaded.classes == {"animals": {"names": ["dog", "empty", "tabby cat"], "templates": ["a photo of a {}.", "a {}"]}}
    assert loaded.published == {"test": 3} and any("empty has no image" in note for note in loaded.notes)
    write_dataset("animals", loaded.root, loaded.rows, loaded.skipped, hashes=loaded.hashes, labels=loaded.labels,
                  classes=loaded.classes, source="labelled")  # fmt: skip
    dataset = load_dataset("animals")
    assert dataset.labels.to_dict("records") == loaded.labels and dataset.classes == loaded.classes


def test_an_image_that_cannot_be_read(place):
    folders(place / "pictures", {"cat": ["a.jpg", "b.jpg"], "dog": ["c.jpg"]})
    (place / "pictures/cat/b.jpg").write_bytes(b"no picture")
    loaded = load("animals", labelled())
    assert p.reasons(loaded) == [("cat/b", 2, "unreadable image")] and len(loaded.labels) == 2


NAMED = {"n01440764": "tench", "n01443537": "gold fish"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.json", json.dumps(NAMED)),
        ("LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\n\nn01443537 gold fish, Carassius auratus\nn2 other\n"),
    ],
)
def test_names_from_a_file(place, file: str, text: str):
    folders(place / "val", {"n01440764": ["ILSVRC2012_val_00000293.JPEG"], "n01443537": ["ILSVRC2012_val_00000236.JPEG"]})
    (place / file).write_text(text)
    loaded = load("fish", labelled("val", names=file))
    assert [row["label"] for row in loaded.labels] == ["tench", "gold fish"] == loaded.classes["fish"]["names"]
    assert loaded.rows[0]["image_id"] == "n01440764/ILSVRC2012_val_00000293"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("names.json", '{"n01440764": "tench"}', r"no name for 1 folders of val: \['n01443537'\]"),
        ("names.json", '{"n01440764": "fish", "n01443537": "fish"}', "n01440764 and n01443537 are both called 'fish'"),
        ("names.json", '{"n01440764": " ", "n01443537": "fish"}', "the class n01440764 has an empty name"),
        ("names.json", '{"0": ["n01440764", "tench"]}', "expected an object of folder: name"),
        ("names.json", "{", "cannot be understood"),
        ("names.txt", "n01440764\n", "cannot be understood"),
        ("other.txt", "", "there is no such file"),
    ],
)
def test_names_that_do_not_fit(place, file: str, text: str, message: str):
    folders(place / "val", {"n01440764": ["a.jpg"], "n01443537": ["a.jpg"]})
    (place / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load("fish", labelled("val", names="names.txt" if file == "other.txt" else file))


def test_imagenets_names_need_all_its_folders(place):
    folders(place / "val", {"n01440764": ["a.jpg"]})
    with pytest.raises(DataError, match="val has 1 folders, ImageNet 1,000 classes"):
        load("imagenet", labelled("val", names="imagenet"))
    names = prompts.imagenet_names()
    assert len(set(names)) == 1000 and (names[0], names[-1]) == ("tench", "toilet paper")
    assert (names[657], names[744], names[836], names[837]) == ("missile", "projectile", "sunglass", "sunglasses")


def test_a_folder_that_is_not_there(place):
    with pytest.raises(DataError, match=r"the folder pictures does not exist.*set download\.datasets\.animals\.root"):
        load("animals", labelled())
    with pytest.raises(ManualStep, match=r"image-net\.org"):
        load("imagenet", p.shipped("imagenet"))
    (place / "pictures").mkdir()
    with pytest.raises(DataError, match="holds no folders"):
        load("animals", labelled())
    folders(place / ".fast_goal/downloads/imagenet/val", {"cat": ["a.jpg"]})
    assert load("imagenet", {**p.shipped("imagenet"), "names": None, "templates": "plain"}).labels[0]["label"] == "cat"


def test_a_part_of_the_images_is_drawn_and_does_not_change_with_the_others(place):
    folders(place / "pictures", {"cat": [f"{number}.jpg" for number in range(9)]})
    drawn = {row["image_id"] for row in load("animals", labelled(images=4)).rows}
    assert len(drawn) == 4
    other = load("animals", labelled(images=4, seed=1))
    assert {row["image_id"] for row in other.rows} != drawn and other.published == {"test": 9}
    assert other.notes == ["4 of 9 images were drawn, as download.datasets.animals.images says"]
    (place / "pictures/cat/10.jpg").write_bytes(p.jpeg(77))
    assert len({row["image_id"] for row in load("animals", labelled(images=4)).rows} & drawn) >= 3


@pytest.mark.parametrize("templates", ["no such name", [], ["a photo"], ["{} or {}"], [3], None])
def test_templates_that_are_none(templates: object):
    with pytest.raises(ConfigError, match=r"download\.datasets\.a\.templates"):
        source_config(labelled(templates=templates), "download.datasets.a")


def test_the_published_templates():
    counts = {"openai_imagenet": 80, "simple_imagenet": 7, "cifar": 18, "caltech101": 34, "cars": 8, "dtd": 8, "aircraft": 2}
    for name, count in counts.items():
        found = prompts.templates(name)
        assert len(set(found)) == len(found) == count and all(template.count("{}") == 1 for template in found)
    assert prompts.templates("openai_imagenet")[0] == "a bad photo of a {}."
    assert "a photo of the small {}." in prompts.templates("cifar") and "art of the {}." in prompts.templates("caltech101")
    assert prompts.templates(["a {}"]) == ["a {}"]


def torchvision(dataset: str, **values: object) -> dict:
    section = {"source": "torchvision", "dataset": dataset, "root": "sets", "arguments": {"split": "test"}, "download": False}
    return {**section, "names": None, **PLAIN, **values}


def food101(root: Path) -> None:
    """As food-101.tar.gz holds it."""
    base, split = root / "food-101", {"apple_pie": ["apple_pie/1011328"], "waffles": ["waffles/971843", "waffles/97"]}
    folders(base / "images", {name: [f"{path.split('/')[1]}.jpg" for path in paths] for name, paths in split.items()})
    (base / "meta").mkdir()
    (base / "meta/test.json").write_text(json.dumps(split))


def test_a_data_set_of_torchvision_is_read_where_it_is(place):
    food101(place / "sets")
    (place / "sets/food-101/images/waffles/97.jpg").unlink()
    loaded = load("food101", torchvision("Food101"))
    assert loaded.root.resolve() == place / "sets" and not list(place.glob("data/**/*.png"))
    assert [(row["image_path"], row["split"]) for row in loaded.rows] == [
        ("food-101/images/apple_pie/1011328.jpg", "test"), ("food-101/images/waffles/971843.jpg", "test")]  # fmt: skip
    assert [row["label"] for row in loaded.labels] == ["apple pie", "waffles"]
    assert loaded.classes["food101"]["names"] == ["apple pie", "waffles"] and loaded.published == {"test": 3}
    assert p.reasons(loaded) == [("food-101/images/waffles/97", 3, "image missing")]


def pets(root: Path) -> None:
    """As images.tar.gz and annotations.tar.gz hold them; torchvision hands over pixels, not files."""
    base = root / "oxford-iiit-pet"
    folders(
        base, {"images": ["Abyssinian_201.jpg", "american_bulldog_203.jpg", "Abyssinian_202.jpg"], "annotations/trimaps": []}
    )
    lines = ["Abyssinian_201 1 1 1", "american_bulldog_203 2 2 1", "Abyssinian_202 1 1 1"]
    (base / "annotations/test.txt").write_text("\n".join(lines) + "\n")


def test_pixels_of_torchvision_become_files(place):
    pets(place / "sets")
    arguments = {"split": "test", "target_types": "category"}
    (place / "sets/oxford-iiit-pet/images/Abyssinian_202.jpg").write_bytes(b"no picture")
    loaded = load("pets", torchvision("OxfordIIITPet", arguments=arguments))
    assert loaded.root == Path("data/datasets/pets") and len(loaded.rows) == 2
    assert [row["label"] for row in loaded.labels] == ["Abyssinian", "American Bulldog"]
    before = Image.open(place / "sets/oxford-iiit-pet/images/american_bulldog_203.jpg").convert("RGB")
    assert np.array_equal(np.asarray(Image.open(loaded.root / loaded.rows[1]["image_path"])), np.asarray(before))
    assert loaded.rows[1]["image_id"].endswith("/000001")
    assert p.reasons(loaded) == [("", 3, "unreadable sample")]
    times = {path: path.stat().st_mtime_ns for path in loaded.root.rglob("*.png")}
    load("pets", torchvision("OxfordIIITPet", arguments=arguments))
    assert times == {path: path.stat().st_mtime_ns for path in loaded.root.rglob("*.png")}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("apple_pie", "apple pie"),
        ("apartment_building/outdoor", "apartment building outdoor"),
        ("F/A-18", "F/A-18"),
        ("Ram C/V Cargo Van Minivan 2012", "Ram C/V Cargo Van Minivan 2012"),
    ],
)
def test_names_are_written_as_published(name: str, written: str):
    assert prompts.readable(name) == written


def test_names_of_ones_own(place):
    food101(place / "sets")
    loaded = load("food", torchvision("Food101", names=["a pie", "a waffle"]))
    assert {row["label"] for row in loaded.labels} == {"a pie", "a waffle"}
    with pytest.raises(ConfigError, match="1 names for the 2 classes of Food101"):
        load("food", torchvision("Food101", names=["a pie"]))
    with pytest.raises(ConfigError, match=r"\['pie'\] stand twice"):
        load("food", torchvision("Food101", names=["pie", "pie"]))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"dataset": "Food10"},
            ConfigError,
            r"dataset = 'Food10': torchvision\.datasets has no such class\. Did you mean Food101",
        ),
        ({"arguments": {"split": "tast"}}, ConfigError, r"arguments = \{'split': 'tast'\}: Food101 refuses them"),
        ({"arguments": {"spilt": "test"}}, ConfigError, "Food101 refuses them"),
        ({"arguments": {"root": "x"}}, ConfigError, r"\['root'\] are set by the other keys"),
        ({}, DataError, r"finds no Food101 in sets .*set download\.datasets\.food\.download=true"),
        ({"dataset": "ImageNet", "arguments": {"split": "val"}, "download": True}, ConfigError, "does not fetch ImageNet"),
        ({"dataset": "FakeData", "arguments": {"size": 2}}, ConfigError, "does not name its classes"),
    ],
)
def test_what_torchvision_refuses(place, values: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        load("food", {**torchvision("Food101"), **values})


def test_labels_beyond_the_names_and_generated_images(place):
    arguments = {"size": 6, "image_size": [3, 8, 12], "num_classes": 3}
    names = ["one", "two"]
    loaded = load("fake", torchvision("FakeData", arguments=arguments, names=names))
    wrong = [row for row in loaded.skipped if row["reason"] == "no class of that number"]
    assert len(wrong) + len(loaded.rows) == 6 and len(wrong) > 0
    assert {row["label"] for row in loaded.labels} <= set(names) and loaded.rows[0]["width"] == 12


def test_the_eleven_are_shipped(place):
    for name in ELEVEN:
        section = p.shipped(name)
        function, config = source_config(section, f"download.datasets.{name}")
        assert config.split == "test" and p.facts(name).counts.keys() == {"test"}
        prompts.check_templates(config.templates)
        with pytest.raises(DataError):
            function(config, name, Path("data/datasets", name))


def test_pixels_of_any_mode_are_written(place):
    from fast_goal.data.sources.labelled import _write

    for mode in ("RGBA", "P", "L", "CMYK"):
        stream = io.BytesIO()
        _write(Image.new(mode, (4, 4)), place / f"{mode}.png")
        Image.open(place / f"{mode}.png").save(stream, "PNG")
