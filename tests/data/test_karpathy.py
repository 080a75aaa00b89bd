"""The source `karpathy`: archives in the true format of MSCOCO and Flickr30k, from a local server."""

import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from file_server import FileServer
from PIL import Image

from fast_goal.configure import CONF
from fast_goal.data.fetch import ManualStep
from fast_goal.data.records import DATASETS_FOLDER, load_dataset, load_skipped, write_dataset
from fast_goal.data.sources import source_config
from fast_goal.errors import DataError


def jpeg(number: int, side: int = 24) -> bytes:
    stream = io.BytesIO()
    image = Image.new("RGB", (side, side + 4), (number * 20 % 256, 90, 200))
    image.paste((255, 255 - number * 9 % 256, 0), (number % 20, 3, number % 20 + 4, 20))
    image.save(stream, "JPEG")
    return stream.getvalue()


def entry(number: int, split: str, filepath: str | None, captions: list) -> dict:
    """An image as the split files have it."""
    file = f"COCO_{filepath}_{number:012d}.jpg" if filepath else f"{1000092795 + number}.jpg"
    sentences = [
        {"tokens": str(text).lower().split(), "raw": text, "imgid": number, "sentid": 10 * number + index}
        for index, text in enumerate(captions)
    ]
    made = {"sentids": [10 * number + index for index in range(len(captions))], "imgid": number, "sentences": sentences}
    made |= {"split": split, "filename": file}
    return made | ({"filepath": filepath, "cocoid": number} if filepath else {})


def five(number: int, count: int = 5) -> list[str]:
    return [f"Caption {index} of picture {number} . " for index in range(count)]


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def coco() -> tuple[list[dict], dict[str, bytes]]:
    """Eight images, of which one of the test split has seven captions, one an empty one, and one is not in the archive."""
    entries = [
        entry(9, "train", "train2014", five(9)),
        entry(30, "restval", "val2014", five(30)),
        entry(42, "test", "val2014", five(42)),
        entry(73, "test", "val2014", five(73, 7)),
        entry(74, "val", "val2014", five(74)),
        entry(133, "test", "val2014", [*five(133, 4), "  "]),
        entry(136, "test", "val2014", five(136)),
        entry(139, "test", "val2014", ["", 3]),
    ]
    images = {value["filename"]: jpeg(value["imgid"]) for value in entries if value["imgid"] != 136}
    files = {"caption_datasets.zip": zipped({"dataset_coco.json": json.dumps({"images": entries, "dataset": "coco"}).encode()})}
    for folder in ("train2014", "val2014"):
        files[f"{folder}.zip"] = zipped({f"{folder}/{name}": data for name, data in images.items() if folder in name})
    return entries, files


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAST_GOAL_DOWNLOADS", raising=False)
    monkeypatch.delenv("FAST_GOAL_MIRROR", raising=False)
    with FileServer(coco()[1]) as running:
        yield running


def section(server: FileServer, name: str = "mscoco", **changes: object) -> dict:
    """The shipped section, with this server's addresses and without the sizes of the true archives."""
    values = yaml.safe_load((CONF / f"dataset/{name}.yaml").read_text())["download"]["datasets"][name]
    for remote in (values["captions"], *values["archives"].values()):
        remote |= {"url": server.url(remote["url"].rsplit("/", 1)[1]), "size": None}
    return values | changes


def run(values: dict, name: str = "mscoco"):
    load, config = source_config(values, f"download.datasets.{name}")
    return load(config, name, DATASETS_FOLDER / name)


def test_the_test_split_of_mscoco(server):
    loaded = run(section(server))
    assert [row["image_id"][-3:] for row in loaded.rows] == ["042", "073", "133"]
    assert [row["captions"] for row in loaded.rows] == [five(42), five(73), five(133, 4)], "as published, blanks included"
    assert {(row["long_caption"], row["split"], row["width"], row["height"]) for row in loaded.rows} == {("", "test", 24, 28)}
    for row in loaded.rows:
        number = int(row["image_id"][-3:])
        assert (loaded.root / row["image_path"]).read_bytes() == jpeg(number)
    assert loaded.published == {"train": 1, "restval": 1, "val": 1, "test": 5}
    assert len(loaded.hashes) == 3
    reasons = Counter((row["sample"][-3:], row["reason"]) for row in loaded.skipped)
    assert reasons == {
        ("073", "captions beyond captions_per_image"): 1,
        ("133", "empty caption"): 1,
        ("136", "image missing"): 1,
        ("139", "empty caption"): 1,
        ("139", "caption is not text"): 1,
        ("139", "no caption"): 1,
    }
    beyond = next(row for row in loaded.skipped if row["reason"] == "captions beyond captions_per_image")
    assert json.loads(beyond["detail"]) == five(73, 7)[5:] and beyond["row"] == 4
    where = "as download.datasets.mscoco.splits says"
    left_out = [f"the split {split} (1 images) is left out, {where}" for split in ("train", "restval", "val")]
    assert sorted(loaded.notes) == sorted([*left_out, "images with fewer than 5 captions: 1"])


def test_only_what_the_splits_need_is_fetched_and_unpacked(server):
    loaded = run(section(server))
    assert not server.asked("train2014.zip") and server.asked("val2014.zip")
    unpacked = {path.name[-7:-4] for path in loaded.root.rglob("*.jpg")}
    assert unpacked == {"042", "073", "133", "139"} - {"139"}


def test_other_splits_later_fetch_only_what_is_new(server):
    run(section(server))
    server.requests.clear()
    loaded = run(section(server, splits={"train": "train", "restval": "train", "val": "val", "test": "test"}))
    assert Counter(row["split"] for row in loaded.rows) == {"train": 2, "val": 1, "test": 3}
    assert server.asked("train2014.zip") and not server.asked("val2014.zip") and not server.asked("caption_datasets.zip")
    assert {row["image_id"][:14] for row in loaded.rows if row["split"] == "train"} == {"COCO_train2014", "COCO_val2014_0"}


def test_all_captions_if_none_are_to_be_left_out(server):
    loaded = run(section(server, captions_per_image=None))
    assert max(len(row["captions"]) for row in loaded.rows) == 7
    assert "captions beyond captions_per_image" not in {row["reason"] for row in loaded.skipped}


def test_an_interrupted_download_goes_on(server):
    size = len(server.files["val2014.zip"])
    server.fault("val2014.zip", close_after=size // 2)
    loaded = run(section(server))
    assert len(loaded.rows) == 3
    assert server.sent("val2014.zip") == size, "no byte was sent twice"


def test_the_records_can_be_written_and_asked(server):
    from fast_goal.evaluation.embedding import questions

    loaded = run(section(server))
    write_dataset("mscoco", loaded.root, loaded.rows, loaded.skipped, hashes=loaded.hashes, source="karpathy")
    asked = questions(load_dataset("mscoco"), "test")
    assert len(asked.short.texts) == 14 and asked.long.texts == []
    assert len(load_skipped("mscoco")) == 6


@pytest.mark.parametrize("prefix", ["flickr30k-images/", "./flickr30k-images/"])
def test_flickr30k_needs_a_persons_hand(server, prefix):
    entries = [entry(number, split, None, five(number)) for number, split in enumerate(["train", "val", "test", "test"])]
    server.files["caption_datasets.zip"] = zipped({"dataset_flickr30k.json": json.dumps({"images": entries}).encode()})
    values = section(server, "flickr30k")
    with pytest.raises(ManualStep) as error:
        run(values, "flickr30k")
    message = str(error.value)
    assert "1. Ask for the images with the form at https://forms.illinois.edu" in message
    place = Path(".fast_goal/downloads/flickr30k/flickr30k-images.tar.gz")
    assert str(place.absolute()) in message

    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, "w:gz") as archive:
        for value in entries:
            info = tarfile.TarInfo(f"{prefix}{value['filename']}")
            data = jpeg(value["imgid"])
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    loaded = run(values, "flickr30k")
    assert [row["image_id"] for row in loaded.rows] == ["1000092797", "1000092798"]
    assert loaded.published == {"train": 1, "val": 1, "test": 2} and not loaded.skipped


def test_what_is_wrong_is_named(server):
    with pytest.raises(DataError, match=r"download\.datasets\.mscoco\.splits: dataset_coco\.json has no image in \['tset'\]"):
        run(section(server, splits={"tset": "test"}))
    with pytest.raises(DataError, match=r"there is no dataset_flickr8k\.json in it"):
        run(section(server, split_file="dataset_flickr8k.json"))
    with pytest.raises(DataError, match="'val2014' are asked for, but no archive is given"):
        run(section(server, archives={}))
    server.files["broken.json"] = b'{"images": [3]}'
    captions = {"url": server.url("broken.json"), "file": None, "sha256": None, "size": None}
    with pytest.raises(DataError, match=r"broken\.json: expected an object with a list `images`"):
        run(section(server, captions=captions))


def test_a_hostile_file_name_is_not_followed(server):
    entries = [entry(42, "test", "val2014", five(42)), {**entry(43, "test", "val2014", five(43)), "filename": "../../x.jpg"}]
    server.files["caption_datasets.zip"] = zipped({"dataset_coco.json": json.dumps({"images": entries}).encode()})
    loaded = run(section(server))
    assert len(loaded.rows) == 1 and [row["reason"] for row in loaded.skipped] == ["no image named"]


def test_another_split_file_takes_its_own_images_from_the_same_archive(server):
    """Neither what was asked for of the captions' archive nor of the images' is taken for all there is."""
    first = [entry(42, "test", "val2014", five(42))]
    second = [entry(73, "test", "val2014", five(73))]
    content = [json.dumps({"images": images}).encode() for images in (first, second)]
    server.files["caption_datasets.zip"] = zipped({"one.json": content[0], "two.json": b"\xef\xbb\xbf" + content[1]})
    splits = {"test": "test"}
    assert [row["image_id"][-3:] for row in run(section(server, split_file="one.json", splits=splits)).rows] == ["042"]
    loaded = run(section(server, split_file="two.json", splits=splits))
    assert [row["image_id"][-3:] for row in loaded.rows] == ["073"] and not [
        r for r in loaded.skipped if "image" in r["reason"]
    ]
