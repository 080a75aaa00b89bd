import dataclasses
import io
import json
import os
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from photographs import dataset as photographs

from fast_goal.config import PublishConfig
from fast_goal.data import shards as shards_module
from fast_goal.data.publication import write_publication
from fast_goal.data.records import SKIPPED
from fast_goal.data.shards import ShardImages
from fast_goal.errors import DataError
from fast_goal.training import batches as batches_module
from fast_goal.training.batches import PairDataset
from fast_goal.training.loader import Loader


def same(a, b):
    tensors = {name: value for name, value in vars(a).items() if isinstance(value, torch.Tensor)}
    return all(torch.equal(value, vars(b)[name]) for name, value in tensors.items())


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A data set, its pairs, and the folder where it was published in shards of three images."""
    monkeypatch.chdir(tmp_path)
    dataset, pairs = photographs(tmp_path / "photos")
    config = PublishConfig(layout="webdataset", licence="cc-by-4.0", shard_size=3)
    write_publication(dataset, pairs, pd.DataFrame(columns=SKIPPED.names), config, tmp_path / "published")
    return dataset, pairs, tmp_path / "published"


def images(dataset, folder, index=Path("index")):
    records = dataset.records
    ids, paths = records["image_id"].tolist(), records["image_path"].tolist()
    return ShardImages(folder, ids, paths, records["content_hash"].tolist(), index)


def members(shard):
    with tarfile.open(shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def write(shard, files):
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_the_same_batches_as_from_files(published, tiny_clip):
    dataset, pairs, folder = published
    plain = Loader(PairDataset(dataset, "train", pairs, tiny_clip()), 3, seed=1)
    gone = dataclasses.replace(dataset, root=Path("nowhere"))
    samples = PairDataset(gone, "train", pairs, tiny_clip(), shards=folder)
    for loader in (Loader(samples, 3, seed=1), Loader(samples, 3, seed=1, workers=1)):
        for epoch, start in [(0, 0), (1, 1)]:
            found, expected = list(loader.epoch(epoch, start)), list(plain.epoch(epoch, start))
            assert len(found) == len(expected) == 2 - start
            assert all(same(one, other) for one, other in zip(found, expected, strict=True))


def test_every_byte_is_that_of_the_file(published):
    dataset, _, folder = published
    found = images(dataset, folder)
    for row, path in enumerate(dataset.records["image_path"]):
        assert found.read(row) == dataset.path(path).read_bytes()
    assert found.path(0) == folder / "data/train-00000-of-00003.tar" / "id/large.jpg"
    assert len({found.state(row) for row in range(len(dataset.records))}) == len(dataset.records)


def test_shards_are_walked_once_and_again_where_they_changed(published, monkeypatch):
    dataset, _, folder = published
    walked = []
    walk = shards_module._walked
    monkeypatch.setattr(shards_module, "_walked", lambda shard, size: walked.append(shard.name) or walk(shard, size))
    first = images(dataset, folder)
    assert len(walked) == 3
    images(dataset, folder)
    assert len(walked) == 3
    changed = folder / "data" / walked[1]
    write(changed, [("0.txt", b"in front of the others"), *members(changed)])
    with pytest.raises(DataError, match=rf"{changed.name}, of which image 'id/.*' is to be read, was changed"):
        first.read(3)
    again = images(dataset, folder)
    assert walked[3:] == [changed.name]
    assert [again.read(row) for row in range(8)] == [dataset.path(path).read_bytes() for path in dataset.records["image_path"]]
    (path,) = Path("index").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    images(dataset, folder)
    assert len(walked) == 7


def test_an_image_that_is_missing(published):
    dataset, _, folder = published
    (folder / "data/train-00001-of-00003.tar").unlink()
    with pytest.raises(DataError, match=r"image 'id/grey\.jpg', one of 3 that are missing, is in none of the 2 tar files"):
        images(dataset, folder)
    with pytest.raises(DataError, match=r"there is no \.tar file below"):
        images(dataset, folder / "examples")


@pytest.mark.parametrize("where", ["image", "header", "end"])
def test_a_truncated_shard(published, where):
    dataset, _, folder = published
    shard = folder / "data/train-00001-of-00003.tar"
    with tarfile.open(shard) as tar:
        files = tar.getmembers()
    image, described = files[2], files[3]
    assert image.name.endswith("jpg") and described.name.endswith("json")
    size = {"image": image.offset_data + 100, "header": image.offset + 200, "end": files[-1].offset_data + 100}[where]
    os.truncate(shard, size)
    with pytest.raises(DataError, match=rf"image 'id/.*', one of . that are missing, .*{shard.name} is damaged \(.+\)"):
        images(dataset, folder)


def test_an_image_that_stands_twice(published):
    dataset, _, folder = published
    first = folder / "data/train-00000-of-00003.tar"
    write(folder / "more/copy.tar", members(first)[:2])
    with pytest.raises(DataError, match=r"image 'id/large\.jpg' stands more than once in the shards: in .*train-00000.*copy"):
        images(dataset, folder)
    fewer = dataclasses.replace(dataset, records=dataset.records.iloc[1:])  # nobody asks for it
    assert len(images(fewer, folder).read(0)) > 0


def test_an_image_published_with_another_content(published):
    dataset, _, folder = published
    records = dataset.records.assign(content_hash=["0" * 64, *dataset.records["content_hash"][1:]])
    with pytest.raises(DataError, match=r"image 'id/large\.jpg' has another content in .*train-00000"):
        images(dataclasses.replace(dataset, records=records), folder)


def test_a_plain_webdataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coco = json.dumps({"image_id": 17, "caption": "a"}).encode()
    write(
        tmp_path / "shards/00000.tar",
        [
            ("a/x.JPG", b"jpeg of x"),
            ("a/x.txt", b"text"),
            ("a/x.json", coco),
            ("a/y.seg.png", b"mask of y"),
            ("a/y.jpg", b"jpeg of y"),
            ("a/y.cls", b"3"),
        ],
    )
    write(tmp_path / "shards/00001.tar", [("x.webp", b"webp of x"), ("x.json", b"no JSON {")])
    ids = ["00001/x", "00000/a/y", "00000/a/x"]
    found = ShardImages(Path("shards"), ids, ["i/1.webp", "i/2.jpg", "i/1.jpg"], None, Path("index"))
    assert [found.read(row) for row in range(3)] == [b"webp of x", b"jpeg of y", b"jpeg of x"]
    with pytest.raises(DataError, match="'00000/a/z'"):
        ShardImages(Path("shards"), ["00000/a/z"], ["z.jpg"], None, Path("index"))
    write(tmp_path / "shards/00002.tar", [("x.jpg", b"first"), ("y.jpg", b"between"), ("x.jpg", b"second")])
    with pytest.raises(DataError, match=r"'00002/x' stands more than once.*00002\.tar \(byte 512\) and .*00002\.tar \(byte 2,"):
        ShardImages(Path("shards"), ["00002/x"], ["x.jpg"], None, Path("index"))


def test_the_index_lies_beside_the_cache(published, tiny_clip):
    dataset, pairs, folder = published
    PairDataset(dataset, "train", pairs, tiny_clip(), shards=folder, pixel_cache=batches_module.PIXELS)
    assert len(list(Path(".fast_goal/shards").glob("*.parquet"))) == 1
    assert len(list(Path(".fast_goal/pixels").glob("*.views"))) == 2
