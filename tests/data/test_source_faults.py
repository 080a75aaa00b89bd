"""What a network and a disk do to the sources `karpathy`, `webdataset` and `glit100k`, each from a local server."""

import errno
import io
import json
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from file_server import FileServer
from PIL import Image
from published import config, make

from fast_goal.configure import CONF
from fast_goal.data import fetch, transfer
from fast_goal.data.origins import Policy
from fast_goal.data.publication import write_publication
from fast_goal.data.records import DATASETS_FOLDER
from fast_goal.data.sources import source_config
from fast_goal.errors import DataError


def shipped(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"dataset/{name}.yaml").read_text())["download"]["datasets"][name]


def picture() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((90, 90), 80).convert("RGB").save(stream, "JPEG")
    return stream.getvalue()


def karpathy(server: FileServer) -> dict[str, Any]:
    entry = {"filename": "a.jpg", "filepath": "val2014", "split": "test", "sentences": [{"raw": "A dog."}]}
    for name, member, data in (
        ("caption_datasets.zip", "dataset_coco.json", json.dumps({"images": [entry]}).encode()),
        ("big", "val2014/a.jpg", picture()),
    ):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr(member, data)
        server.files[name] = stream.getvalue()
    remote = {"sha256": None, "size": None}
    captions = {"url": server.url("caption_datasets.zip"), "file": "captions.zip", **remote}
    return shipped("mscoco") | {
        "captions": captions,
        "archives": {"val2014": {"url": server.url("big"), "file": "b.zip", **remote}},
    }


def webdataset(server: FileServer) -> dict[str, Any]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in (("0.jpg", picture()), ("0.txt", b"A dog.")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    server.files["big"] = stream.getvalue()
    values = yaml.safe_load((CONF / "dataset/webdataset.yaml").read_text())["download"]["datasets"]["web"]
    return values | {"shards": [server.url("big")]}


def glit100k(server: FileServer) -> dict[str, Any]:
    dataset, pairs, skipped = make(Path("root"), 3)
    write_publication(dataset, pairs, skipped, config("parquet"), Path("copy"))
    for path in Path("copy").rglob("*"):
        if path.is_file():
            name = path.relative_to("copy").as_posix()
            server.files[name] = path.read_bytes()
    return shipped("glit100k") | {"remote": server.base}


SOURCES: dict[str, tuple[Callable[[FileServer], dict[str, Any]], str]] = {
    "karpathy": (karpathy, "big"),
    "webdataset": (webdataset, "big"),
    "glit100k": (glit100k, "data/train-00000-of-00001.parquet"),
}


@pytest.fixture(params=SOURCES)
def case(request, tmp_path, monkeypatch) -> Iterator[tuple[FileServer, dict[str, Any], str]]:
    """A server with one small copy, the section that reads it, and the path of its large file."""
    monkeypatch.chdir(tmp_path)
    for name in ("FAST_GOAL_DOWNLOADS", "FAST_GOAL_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "POLICY", Policy(attempts=1, first_wait=0.01, longest_wait=0.01))
    make_section, large = SOURCES[request.param]
    with FileServer({}) as server:
        yield server, make_section(server), large


def run(values: dict[str, Any]) -> int:
    load, options = source_config(values, "download.datasets.set")
    return len(load(options, "set", DATASETS_FOLDER / "set").rows)


def test_interrupted_half_way_and_resumed_by_the_next_run(case):
    server, values, large = case
    size = len(server.files[large])
    server.fault(large, close_after=size // 2, times=3)
    with pytest.raises(DataError):
        run(values)
    server._faults.clear()
    assert run(values) >= 1
    assert server.sent(large) <= size + size // 2, "what had arrived was not sent again"
    before = len(server.requests)
    assert run(values) >= 1 and len(server.requests) == before, "a complete download is not asked for again"


def test_a_file_that_is_not_there(case):
    server, values, large = case
    server.fault(large, status=404, times=None)
    with pytest.raises(DataError, match=rf"{large} answers 404: the file is not there"):
        run(values)


def test_a_redirect_is_followed(case):
    server, values, large = case
    server.files["elsewhere"] = server.files[large]
    server.fault(large, redirect=server.url("elsewhere"), times=None)
    assert run(values) >= 1 and server.asked("elsewhere")


def test_a_server_that_sends_something_else(case):
    """A wrong checksum where one is published; else an archive that is none, or a shard without a sample."""
    server, values, large = case
    server.fault(large, content=b"quota exceeded " * 300, times=None)
    if values["source"] == "karpathy":
        values["archives"]["val2014"]["sha256"] = "0" * 64
    with pytest.raises(DataError):
        run(values)
    assert not list(DATASETS_FOLDER.rglob("*.jpg"))


def test_a_full_disk_is_said_before_the_download(case, monkeypatch):
    _, values, _ = case
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: usage(100, 100, 0))
    with pytest.raises(DataError, match="Free some space"):
        run(values)


@pytest.mark.parametrize("case", ["webdataset", "glit100k"], indirect=True)
def test_a_disk_that_fills_up_while_images_are_extracted(case, monkeypatch):
    _, values, _ = case
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if DATASETS_FOLDER / "set" in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match=r"the disk of .*set is full .*Free some space and run the same command again"):
            run(values)
    assert run(values) >= 1
