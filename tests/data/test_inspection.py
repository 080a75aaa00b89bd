"""Inspection of image files: what is found, what is remembered, and that nothing is remembered that is not so any more."""

import hashlib
import os
import sqlite3
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

from fast_goal.data import inspection
from fast_goal.data.inspection import MEMORY, Inspected, inspect_images


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Makes JPEG photographs in a folder of their own, in a project without a memory."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, seed: int, size: tuple[int, int] = (40, 24)) -> Path:
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 10, 3), dtype=np.uint8)
        path = Path("photos", name)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)
        return path

    return make


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the files that are decoded, instead of remembered."""
    names: list[str] = []
    inspect = inspection._inspect
    monkeypatch.setattr(inspection, "_inspect", lambda path: (names.append(path.name), inspect(path))[1])
    return names


def distance(first: str, second: str) -> int:
    return bin(int(first, 16) ^ int(second, 16)).count("1")


def test_what_is_found(photos):
    path = photos("a.jpg", 1)
    [found] = inspect_images([path], "test")
    assert found == Inspected(40, 24, hashlib.sha256(path.read_bytes()).hexdigest(), str(imagehash.phash(Image.open(path))))
    assert len(found.perceptual_hash) == 16 and int(found.perceptual_hash, 16) < 2**64


def test_the_size_is_that_after_the_rotation(photos):
    path = photos("a.jpg", 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save("photos/turned.jpg", exif=exif)
    [found] = inspect_images([Path("photos/turned.jpg")], "test")
    assert (found.width, found.height) == (24, 40)


def test_the_perceptual_hash_knows_a_picture_again(photos):
    path = photos("a.jpg", 1, (400, 240))
    Image.open(path).resize((200, 120)).save("photos/small.png")
    other = photos("b.jpg", 2, (400, 240))
    first, small, second = inspect_images([path, Path("photos/small.png"), other], "test")
    assert first.content_hash != small.content_hash
    assert (
        distance(first.perceptual_hash, small.perceptual_hash)
        <= 4
        < 16
        < distance(first.perceptual_hash, second.perceptual_hash)
    )


def test_a_large_picture_has_nearly_the_hash_of_the_library(photos):
    paths = [photos(f"{number}.jpg", number, (900, 700 + 100 * number)) for number in range(6)]
    for path, found in zip(paths, inspect_images(paths, "test"), strict=True):
        assert distance(found.perceptual_hash, str(imagehash.phash(Image.open(path)))) <= 6


def test_what_cannot_be_used_in_the_order_of_the_paths(photos):
    good, cut = photos("good.jpg", 1), photos("cut.jpg", 2)
    cut.write_bytes(cut.read_bytes()[:300])
    Path("photos/empty.jpg").touch()
    Path("photos/text.jpg").write_text("no picture")
    Path("photos/folder.jpg").mkdir()
    names = ["gone.jpg", "good.jpg", "cut.jpg", "empty.jpg", "text.jpg", "folder.jpg", "zero\0byte.jpg", "x" * 300]
    found = inspect_images([Path("photos", name) for name in names], "test")
    assert isinstance(found[1], Inspected)
    assert found[0] == ("image missing", "photos/gone.jpg does not exist")
    assert [result[0] for result in found[2:5]] == ["unreadable image"] * 3
    assert all(isinstance(result, tuple) and len(result) == 2 for result in found[5:])
    assert "empty" in found[3][1] and "not an image" in found[4][1]
    assert good.exists()


def test_a_second_look_remembers(photos, looked_at):
    paths = [photos(f"{number}.jpg", number) for number in range(5)]
    first = inspect_images(paths, "test")
    assert sorted(looked_at) == [f"{number}.jpg" for number in range(5)]
    looked_at.clear()
    assert inspect_images([path.absolute() for path in reversed(paths)], "test") == first[::-1]
    assert not looked_at


def test_what_has_changed_is_looked_at_again(photos, looked_at):
    paths = [photos("a.jpg", 1), photos("b.jpg", 2), Path("photos/late.jpg")]
    before = inspect_images(paths, "test")
    state = paths[0].stat()
    photos("a.jpg", 3)
    os.utime(paths[0], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    photos("late.jpg", 4)
    looked_at.clear()
    after = inspect_images(paths, "test")
    assert sorted(looked_at) == ["a.jpg", "late.jpg"]
    assert after[0] != before[0] and after[1] == before[1] and isinstance(after[2], Inspected)


def test_a_killed_step_goes_on_where_it_stopped(photos, looked_at, monkeypatch):
    monkeypatch.setattr(inspection, "_CHUNK", 4)
    paths = [photos(f"{number:02d}.jpg", number) for number in range(10)]
    inspect = inspection._inspect

    def killed(path: Path):
        if path.name == "09.jpg":
            raise KeyboardInterrupt
        return inspect(path)

    monkeypatch.setattr(inspection, "_inspect", killed)
    with pytest.raises(KeyboardInterrupt):
        inspect_images(paths, "test")
    monkeypatch.setattr(inspection, "_inspect", inspect)
    looked_at.clear()
    assert len(inspect_images(paths, "test")) == 10
    assert sorted(looked_at) == ["08.jpg", "09.jpg"]


def test_one_file_named_twice(photos):
    path = photos("a.jpg", 1)
    first, second = inspect_images([path, path], "test")
    assert first == second and inspect_images([], "test") == []


def test_a_name_that_is_no_utf8(photos, looked_at):
    path = photos("a.jpg", 1)
    odd = path.rename(os.fsdecode(b"photos/\xff.jpg"))
    first = inspect_images([odd], "test")
    assert isinstance(first[0], Inspected) and inspect_images([odd], "test") == first and len(looked_at) == 1


def test_a_damaged_memory_costs_time_only(photos, looked_at):
    path = photos("a.jpg", 1)
    first = inspect_images([path], "test")
    MEMORY.write_bytes(b"not a database" * 1000)
    for extra in ("-wal", "-shm"):
        MEMORY.with_name(MEMORY.name + extra).write_bytes(b"left by a kill")
    assert inspect_images([path], "test") == first and inspect_images([path], "test") == first
    assert len(looked_at) == 2


def test_no_memory_can_be_kept(photos, looked_at):
    path = photos("a.jpg", 1)
    Path(".fast_goal").write_text("a file where the folder would be")
    assert inspect_images([path], "test") == inspect_images([path], "test")
    assert len(looked_at) == 2


def test_another_version_of_the_libraries_looks_again(photos, looked_at, monkeypatch):
    path = photos("a.jpg", 1)
    inspect_images([path], "test")
    monkeypatch.setattr(inspection, "version", lambda name: "99.0")
    inspect_images([path], "test")
    assert len(looked_at) == 2
    with sqlite3.connect(MEMORY) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert len(tables) == 2
