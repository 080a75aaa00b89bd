import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from photographs import dataset, photographs, views

from fast_goal.errors import DataError
from fast_goal.training import pixels as pixels_module
from fast_goal.training.batches import PairDataset
from fast_goal.training.loader import Loader
from fast_goal.training.pixels import CachedViews, Slots

Usage = namedtuple("Usage", "total used free")


def everything(views):
    """All images, in an order of their own, and all crops of them."""
    order = np.random.default_rng(0).permutation(len(views.sizes))
    pairs = np.concatenate([np.arange(views.first[index], views.first[index + 1]) for index in order])
    return order, pairs


def no_decoding(monkeypatch):
    monkeypatch.setattr(pixels_module.Views, "of", lambda *_: pytest.fail("an image was decoded"))


@pytest.mark.parametrize(("size", "scaled"), [(32, False), (30, True), (31, False)])  # rows of whole words, and not
def test_the_second_reading_decodes_nothing_and_is_the_same(tmp_path, monkeypatch, size, scaled):
    paths = photographs(tmp_path / "images")
    plain = views(paths, size, scaled=scaled)
    order, pairs = everything(plain)
    expected = plain.batch(order, pairs)
    cached = CachedViews(plain, tmp_path / "pixels")
    assert torch.equal(cached.batch(order, pairs), expected)
    no_decoding(monkeypatch)
    assert torch.equal(cached.batch(order, pairs), expected)
    later = CachedViews(views(paths, size, scaled=scaled), tmp_path / "pixels")
    assert torch.equal(later.batch(order[::-1].copy(), np.sort(pairs)[:0])[: len(order)].flip(0), expected[: len(order)])


def test_what_is_missing_alone_is_decoded(tmp_path):
    plain = views(photographs(tmp_path / "images"))
    cached = CachedViews(plain, tmp_path / "pixels")
    order, pairs = everything(plain)
    cached.batch(order[:3], np.concatenate([np.arange(plain.first[i], plain.first[i + 1]) for i in order[:3]]))
    decoded = []
    of = plain.of
    plain.of = lambda index, content: decoded.append(index) or of(index, content)
    assert torch.equal(cached.batch(order, pairs), views(photographs(tmp_path / "images")).batch(order, pairs))
    assert sorted(decoded) == sorted(order[3:])


@pytest.mark.parametrize("change", ["file", "box", "mode", "size", "scaled", "hash"])
def test_what_changes_the_pixels_changes_the_file(tmp_path, change):
    paths = photographs(tmp_path / "images")
    hashes = [str(index) for index in range(len(paths))]
    first = views(paths, hashes=hashes if change == "hash" else None)
    before = pixels_module._keys(first)
    options = {}
    if change == "file":
        os.utime(paths[0], (1, 1))
    if change == "hash":
        options["hashes"] = ["other", *hashes[1:]]
    if change in ("mode", "size", "scaled"):
        options[change] = {"mode": "pad", "size": 16, "scaled": True}[change]
    second = views(paths, **options)
    if change == "box":
        second.crops[3, 0] += 1
    after = pixels_module._keys(second)
    assert before[1] != after[1] and (before[0] != after[0] or change == "box")
    assert before == pixels_module._keys(first) or change == "file"


def test_the_content_of_the_file_counts_where_the_records_know_it(tmp_path, tiny_clip, monkeypatch):
    photos, pairs = dataset(tmp_path)
    clip, folder = tiny_clip(), tmp_path / "pixels"
    expected = PairDataset(photos, "train", pairs, clip)[[0, 3]].images
    samples = PairDataset(photos, "train", pairs, clip, pixel_cache=folder)
    path = photos.path("images/large.jpg")
    content = path.read_bytes()
    path.write_bytes(content + b"\0")  # the same pixels
    with pytest.raises(DataError, match=r"large\.jpg: the records know another content.*fast-goal download"):
        samples[[0, 3]]
    path.write_bytes(content)
    assert torch.equal(samples[[0, 3]].images, expected)
    moved = dataclasses.replace(photos, root=tmp_path / "elsewhere")  # and nothing is there
    assert torch.equal(PairDataset(moved, "train", pairs, clip, pixel_cache=folder)[[0, 3]].images, expected)


def test_later_epochs_and_workers_decode_nothing(make_scenes, tiny_clip, tmp_path):
    scenes, pairs = make_scenes()
    plain = Loader(PairDataset(scenes, "train", pairs, tiny_clip()), 4, seed=3)
    expected = [[batch.images for batch in plain.epoch(epoch)] for epoch in (0, 1)]
    cached = PairDataset(scenes, "train", pairs, tiny_clip(), pixel_cache=tmp_path / "pixels")
    loader = Loader(cached, 4, seed=3, workers=2)
    for epoch in (0, 1):
        found = [batch.images for batch in loader.epoch(epoch)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected[epoch], strict=True))
        for path in (tmp_path / "images").glob("*.png"):
            path.unlink()


def test_two_at_once_write_the_same(tmp_path):
    paths = photographs(tmp_path / "images")
    plain = views(paths)
    order, pairs = everything(plain)
    expected = plain.batch(order, pairs)
    found, begin = [], threading.Barrier(2)

    def run():
        begin.wait()
        cached = CachedViews(views(paths), tmp_path / "pixels", main=False)
        found.extend(cached.batch(order, pairs) for _ in range(3))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(torch.equal(images, expected) for images in found)


SCRIPT = """
    import os, pickle, signal, sys
    import numpy as np
    from fast_goal.training import pixels

    views, folder, wanted = pickle.loads(open(sys.argv[1], "rb").read())
    cached, write, calls = pixels.CachedViews(views, folder), pixels._write, []


    def dying(descriptor, values, offset):
        calls.append(offset)
        if len(calls) == wanted:
            write(descriptor, np.ascontiguousarray(values.reshape(-1)[: values.size // 2]), offset)
            os.kill(os.getpid(), signal.SIGKILL)
        write(descriptor, values, offset)


    pixels._write = dying
    cached.batch(np.arange(3), np.arange(3))
"""


@pytest.mark.parametrize("wanted", [5, 6])  # of the third view the pixels; its sum
def test_a_kill_in_the_middle_of_a_write(tmp_path, monkeypatch, wanted):
    plain = views(photographs(tmp_path / "images"))
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "job").write_bytes(pickle.dumps((plain, tmp_path / "pixels", wanted)))
    done = subprocess.run([sys.executable, str(tmp_path / "script.py"), str(tmp_path / "job")], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    cached = CachedViews(plain, tmp_path / "pixels")
    there = cached._images.read(np.arange(3), np.empty((3, 3 * 32 * 32), np.uint8))
    assert there.tolist() == [True, False, False]
    order, pairs = everything(plain)
    expected = plain.batch(order, pairs)
    assert torch.equal(cached.batch(order, pairs), expected)
    no_decoding(monkeypatch)
    assert torch.equal(cached.batch(order, pairs), expected)


def test_a_lost_page_is_noticed(tmp_path):
    slots = Slots(tmp_path / "slots", 3, 3 * 100 * 100)
    slots.allocate()
    values = np.random.default_rng(0).integers(0, 256, (3, 30_000), dtype=np.uint8)
    for slot in (0, 2):
        slots.write(slot, values[slot])
    out = np.empty((3, 30_000), np.uint8)
    assert slots.read(np.array([2, 1, 0]), out).tolist() == [True, False, True]
    assert np.array_equal(out[[2, 0]], values[[0, 2]])
    with slots.path.open("r+b") as file:
        file.seek(4096 + 2 * 30_000 + 8192)
        file.write(bytes(4096))
    assert slots.read(np.array([2, 1, 0]), out).tolist() == [False, False, True]
    slots.write(2, values[2])
    with slots.path.open("r+b") as file:  # a sum of a page that lay in another place
        sums = file.read(24)
        file.seek(0)
        file.write(sums[16:] + sums[8:16] + sums[:8])
    assert slots.read(np.arange(3), out).tolist() == [False, False, False]


def test_black_is_a_view_too(tmp_path):
    slots = Slots(tmp_path / "slots", 1, 27)
    slots.allocate()
    out = np.ones((1, 27), np.uint8)
    assert not slots.read(np.array([0]), out)[0]
    slots.write(0, np.zeros(27, np.uint8))
    assert slots.read(np.array([0]), out)[0] and not out.any()


def test_the_size_is_said_before_it_begins(tmp_path, capsys):
    plain = views(photographs(tmp_path / "images"))
    cached = CachedViews(plain, tmp_path / "pixels")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("pixel cache: 8 images x 3,072 bytes = 0.00 GB in ") and "0 of them" in said[0]
    assert said[1].startswith("pixel cache: 7 crops x 3,072 bytes")
    assert cached._images.path.stat().st_blocks * 512 >= 8 * 3072  # space that nobody else can take
    cached.batch(np.array([0]), np.array([0]))
    CachedViews(plain, tmp_path / "pixels", main=False)
    assert capsys.readouterr().out == ""
    CachedViews(plain, tmp_path / "pixels")
    assert "1 of them from earlier" in capsys.readouterr().out.splitlines()[1]


def test_a_full_disk_shows_before_anything_is_decoded(tmp_path, monkeypatch):
    plain = views(photographs(tmp_path / "images"))
    with monkeypatch.context() as patched:
        patched.setattr(pixels_module.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
        with pytest.raises(DataError, match=r"cannot take 15 views of 3,072 bytes .*0\.00 GB are free.*pixel_cache=false"):
            CachedViews(plain, tmp_path / "pixels")

    def full(descriptor, offset, length):
        os.pwrite(descriptor, b"0" * 100, 0)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pixels_module.os, "posix_fallocate", full)
        with pytest.raises(DataError, match="No space left on device"):
            CachedViews(plain, tmp_path / "pixels")
    assert list((tmp_path / "pixels").glob("*.views")) == []
    cached = CachedViews(plain, tmp_path / "pixels")
    monkeypatch.setattr(pixels_module.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(DataError, match=r"images-.*cannot be written \(Input/output error\)"):
        cached.batch(np.array([0]), np.array([0]))


def test_a_file_that_was_deleted_is_named(tmp_path):
    cached = CachedViews(views(photographs(tmp_path / "images")), tmp_path / "pixels")
    cached._images.path.unlink()
    with pytest.raises(DataError, match=r"images-.*views: the pixel cache cannot be opened \(No such file"):
        pickle.loads(pickle.dumps(cached)).batch(np.array([0]), np.array([0]))


def test_a_file_that_was_allocated_in_part_is_completed(tmp_path):
    plain = views(photographs(tmp_path / "images"))
    cached = CachedViews(plain, tmp_path / "pixels")
    size = cached._images.bytes
    os.truncate(cached._images.path, 5000)
    again = CachedViews(plain, tmp_path / "pixels")
    assert again._images.path.stat().st_size == size
    assert torch.equal(again.batch(np.array([7]), np.array([], int)), plain.batch(np.array([7]), np.array([], int)))


def test_no_crops_where_there_are_no_pairs(make_scenes, tiny_clip, tmp_path):
    scenes, _ = make_scenes()
    samples = PairDataset(scenes, "train", None, tiny_clip(), local=False, pixel_cache=tmp_path / "pixels")
    expected = PairDataset(scenes, "train", None, tiny_clip(), local=False)[[1, 2]].images
    assert torch.equal(samples[[1, 2]].images, expected) and torch.equal(samples[[1, 2]].images, expected)
    assert [path.name.split("-")[0] for path in (tmp_path / "pixels").glob("*.views")] == ["images"]
