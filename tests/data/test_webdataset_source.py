"""The source `webdataset`: shards in img2dataset's layout, with every kind of damage planted."""

import io
import json
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from file_server import FileServer
from PIL import Image

from fast_goal.data.records import DATASETS_FOLDER
from fast_goal.data.sources import source_config
from fast_goal.data.sources import webdataset as module
from fast_goal.errors import ConfigError, DataError


def jpeg(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def sample(number: int, key: str | None = None) -> list[tuple[str, bytes]]:
    """The files of a sample as img2dataset writes them."""
    key = key or f"{number:09d}"
    about = {"url": f"https://host/{number}.jpg", "caption": f"caption {number}", "status": "success", "error_message": None}
    about |= {"width": 30, "height": 20, "key": key, "long": f"A long text about {number}.", "several": ["one", "two", "one"]}
    return [
        (f"{key}.jpg", jpeg(number)),
        (f"{key}.json", json.dumps(about).encode()),
        (f"{key}.txt", f"Text {number} ".encode()),
    ]


def tar(files: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def section(*shards: str, **changes: object) -> dict:
    return {
        "source": "webdataset",
        "shards": list(shards),
        "images": ["jpg", "png"],
        "captions": ["txt"],
        "long_caption": None,
        "splits": {},
        "fractions": {"train": 1.0, "val": 0.0, "test": 0.0},
        "seed": 0,
        **changes,
    }


def run(values: dict):
    load, config = source_config(values, "download.datasets.web")
    return load(config, "web", DATASETS_FOLDER / "web")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FAST_GOAL_DOWNLOADS", "FAST_GOAL_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        files = [file for number in range(4) for file in sample(10 * shard + number)]
        (tmp_path / f"shards/{shard:05d}.tar").write_bytes(tar(files))
    return tmp_path


def test_shards_by_braces(project):
    loaded = run(section("shards/{00000..00002}.tar"))
    assert [row["image_id"] for row in loaded.rows] == [f"{s:05d}/{10 * s + n:09d}" for s in range(3) for n in range(4)]
    assert [row["captions"] for row in loaded.rows][:2] == [["Text 0 "], ["Text 1 "]]
    assert all((loaded.root / row["image_path"]).read_bytes() == jpeg(int(row["image_id"][6:])) for row in loaded.rows)
    assert {(row["split"], row["long_caption"], row["width"]) for row in loaded.rows} == {("train", "", 30)}
    assert not loaded.skipped and len(loaded.hashes) == 12


def test_captions_from_json_long_or_short_and_by_glob():
    loaded = run(section("shards/*.tar", captions=["json:several", "json:caption"], long_caption="json:long"))
    assert loaded.rows[0]["captions"] == ["one", "two", "caption 0"]
    assert loaded.rows[5]["long_caption"] == "A long text about 11."
    assert Counter(row["reason"] for row in loaded.skipped) == {"duplicate caption": 12}


def test_splits_by_pattern_and_by_fraction():
    loaded = run(section("shards/*.tar", splits={"00000": "test", "00001": None}))
    assert Counter(row["split"] for row in loaded.rows) == {"test": 4, "train": 4}
    drawn = run(section("shards/*.tar", fractions={"train": 0.5, "val": 0.25, "test": 0.25}))
    again = run(section("shards/{00001,00002,00000}.tar", fractions={"train": 0.5, "val": 0.25, "test": 0.25}))
    splits = {row["image_id"]: row["split"] for row in drawn.rows}
    assert splits == {row["image_id"]: row["split"] for row in again.rows} and len(set(splits.values())) > 1


def bad_shard() -> bytes:
    """One good sample between nine kinds of bad ones."""
    files = [
        *sample(1),
        ("000000002.txt", b"no image"),
        ("000000003.jpg", jpeg(3)),
        ("000000004.jpg", b"not a picture"),
        ("000000004.txt", b"text 4"),
        ("000000005.jpg", jpeg(5)),
        ("000000005.txt", b"\xff\xfe not utf-8"),
        ("000000006.jpg", jpeg(6)),
        ("000000006.txt", b"   "),
        ("no_ending", b"x"),
        ("000000007.jpg", jpeg(7)),
        ("000000007.jpg", jpeg(8)),
        ("000000007.txt", b"twice"),
        *sample(1),
        ("../../outside.jpg", jpeg(9)),
        ("../../outside.txt", b"outside"),
    ]
    stream = io.BytesIO(tar(files))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        link = tarfile.TarInfo("000000010.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        other = tarfile.TarInfo("000000010.txt")
        other.size = 4
        archive.addfile(other, io.BytesIO(b"link"))
    return stream.getvalue()


def test_every_bad_sample_is_named(project):
    (project / "bad.tar").write_bytes(bad_shard())
    loaded = run(section("bad.tar"))
    reasons = sorted((row["reason"], row["sample"]) for row in loaded.skipped)
    assert reasons == [
        ("empty caption", "bad/000000006"),
        ("file twice in its sample", "bad"),
        ("file without an ending", "bad/no_ending"),
        ("key twice in its shard", "bad/000000001"),
        ("no caption", "bad/000000003"),
        ("no caption", "bad/000000005"),
        ("no caption", "bad/000000006"),
        ("no image", "bad/000000002"),
        ("no image", "bad/000000010"),
        ("no regular file", "bad/000000010.jpg"),
        ("unreadable caption file", "bad/000000005"),
        ("unreadable image", "bad/000000004"),
    ]
    assert [row["image_id"] for row in loaded.rows] == ["bad/000000001", "bad/000000007", "bad/../../outside"]
    assert (loaded.root / loaded.rows[1]["image_path"]).read_bytes() == jpeg(7), "of two files the first"
    below = loaded.root.resolve()
    assert all((loaded.root / row["image_path"]).resolve().is_relative_to(below) for row in loaded.rows)
    assert not list(project.rglob("outside*"))


@pytest.mark.parametrize("damage", ["cut in a file", "cut at a header", "header overwritten", "no tar", "bad gzip"])
def test_a_damaged_shard_is_reported_and_the_rest_is_kept(project, damage):
    data = (project / "shards/00001.tar").read_bytes()
    with tarfile.open(project / "shards/00001.tar") as archive:
        third = archive.getmembers()[6]  # the first file of the third sample
    name = "shards/00001.tar"
    if damage == "cut in a file":
        data = data[: third.offset_data + 100]
    elif damage == "cut at a header":
        data = data[: third.offset]
    elif damage == "header overwritten":
        data = data[: third.offset] + b"\x01" * 512 + data[third.offset + 512 :]
    elif damage == "no tar":
        data = b"<html>quota exceeded</html>" * 100
    else:
        compressed = tar([file for number in range(50) for file in sample(10 + number)], "w:gz")
        (project / name).unlink()
        name, data = "shards/00001.tar.gz", compressed[: len(compressed) // 2]
    (project / name).write_bytes(data)
    loaded = run(section("shards/*"))
    assert [row["reason"] for row in loaded.skipped if row["sample"] == "00001"] == ["damaged shard"]
    assert loaded.notes == ["1 of 3 shards are damaged; what comes after the damage is lost"]
    kept = [row["image_id"] for row in loaded.rows]
    assert [image for image in kept if not image.startswith("00001")] == [
        f"{s:05d}/{10 * s + n:09d}" for s in (0, 2) for n in range(4)
    ]
    own = [int(image[-9:]) - 10 for image in kept if image.startswith("00001")]
    assert own == list(range(len(own))), "the samples before the damage"
    assert len(own) == 0 if damage == "no tar" else len(own) >= 2


def test_a_second_run_reads_no_shard_and_a_changed_one_is_read_again(project, monkeypatch):
    first = run(section("shards/*.tar"))
    opened = []
    original = module.tar_files
    monkeypatch.setattr(module, "tar_files", lambda shard, *rest: opened.append(shard.stem) or original(shard, *rest))
    assert run(section("shards/*.tar")).rows == first.rows and opened == []

    (project / "shards/00001.tar").write_bytes(tar(sample(77)))
    Path(first.root / first.rows[0]["image_path"]).unlink()
    loaded = run(section("shards/*.tar"))
    assert opened == ["00000", "00001"]
    assert [row["image_id"][-2:] for row in loaded.rows] == ["00", "01", "02", "03", "77", "20", "21", "22", "23"]
    assert len(list((loaded.root / "images/00001").iterdir())) == 1

    opened.clear()
    run(section("shards/*.tar", captions=["json:caption"]))
    assert opened == ["00000", "00001", "00002"]
    run(section("shards/00002.tar", captions=["json:caption"]))
    assert [path.name for path in (loaded.root / "images").iterdir()] == ["00002"]


def test_a_killed_extraction_goes_on_at_its_shard(project, monkeypatch):
    original, written = module.write_json, []

    def killed(path, value):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        original(path, value)

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        run(section("shards/*.tar"))
    monkeypatch.setattr(module, "write_json", original)
    opened = []
    files = module.tar_files
    monkeypatch.setattr(module, "tar_files", lambda shard, *rest: opened.append(shard.stem) or files(shard, *rest))
    assert len(run(section("shards/*.tar")).rows) == 12
    assert opened == ["00001", "00002"]


def test_remote_shards_interrupted_and_resumed(project):
    files = {path.name: path.read_bytes() for path in (project / "shards").iterdir()}
    with FileServer(files) as server:
        server.fault("00001.tar", close_after=len(files["00001.tar"]) // 2)
        loaded = run(section(f"{server.base}/{{00000..00002}}.tar"))
        assert len(loaded.rows) == 12 and server.sent("00001.tar") == len(files["00001.tar"])


def test_what_is_wrong_is_named(project):
    with pytest.raises(DataError, match=r"download\.datasets\.web\.shards: nowhere/\*\.tar matches no file"):
        run(section("nowhere/*.tar"))
    (project / "other").mkdir()
    (project / "other/00000.tar").write_bytes(tar(sample(1)))
    with pytest.raises(DataError, match="have one name"):
        run(section("shards/*.tar", "other/*.tar"))
    with pytest.raises(ConfigError, match="there would be no captions"):
        run(section("shards/*.tar", captions=[]))
    with pytest.raises(DataError, match=r"none of the samples can be used: \{'no image': 4\}"):
        run(section("shards/00000.tar", images=["webp"]))


def test_captions_with_a_byte_order_mark(project):
    bom = b"\xef\xbb\xbf"
    files = [("0.jpg", jpeg(1)), ("0.txt", bom + b"A dog."), ("0.json", bom + b'{"caption": "A cat."}')]
    Path("bom.tar").write_bytes(tar(files))
    loaded = run(section("bom.tar", captions=["txt", "json:caption"], long_caption=None))
    assert [row["captions"] for row in loaded.rows] == [["A dog.", "A cat."]] and not loaded.skipped


def test_a_key_that_is_no_utf8_is_listed(project):
    Path("odd.tar").write_bytes(tar([*sample(1), ("\udce4.jpg", jpeg(2)), ("\udce4.txt", b"A dog.")]))
    loaded = run(section("odd.tar"))
    assert len(loaded.rows) == 1 and [row["reason"] for row in loaded.skipped] == ["name is not UTF-8"]


def test_two_at_once_extract_a_shard_once(project, monkeypatch):
    Path("one.tar").write_bytes(tar(sample(1)))
    calls, grouped = [], module.grouped

    def slow(*arguments: object):
        calls.append(arguments)
        time.sleep(0.2)
        return grouped(*arguments)

    monkeypatch.setattr(module, "grouped", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = [run_.result() for run_ in [pool.submit(run, section("one.tar")) for _ in range(2)]]
    assert len(calls) == 1 and first.rows == second.rows and len(first.rows) == 1
