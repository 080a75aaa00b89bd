"""The store: what goes in comes out to the last bit, whoever else writes, and whatever happens to the file."""

import errno
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from fast_goal.cache import DetectionCache, EmbeddingCache, SplitCache, Store

RNG = np.random.default_rng(0)


def crops(count: int, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 1000, (count, 4)).astype(np.int32), RNG.standard_normal((count, width)).astype(np.float32)


def test_crops_come_back_bit_for_bit_and_collect(tmp_path):
    first, second, other = crops(3), crops(2), crops(1)
    first[1][0] = [np.float32(1e-45), -0.0, np.float32(3.4e38), 1 / 3, np.nan]
    cache = EmbeddingCache(tmp_path, "m")
    cache.add_crops([("a/1", *first), ("b/1", *other)])
    cache.add_crops([("a/1", *second)])
    cache.store.close()
    cache = EmbeddingCache(tmp_path, "m")
    found = cache.crops(["a/1", "b/1", "c/1"])
    assert set(found) == {"a/1", "b/1"}
    assert found["a/1"][0].tolist() == [*first[0].tolist(), *second[0].tolist()]
    assert found["a/1"][1].tobytes() == first[1].tobytes() + second[1].tobytes()
    assert EmbeddingCache(tmp_path, "another").crops(["a/1"]) == {}


def test_sentences_detections_and_spans(tmp_path):
    vector, boxes, scores = crops(1)[1][0], RNG.random((2, 4)), RNG.random(2)
    texts = EmbeddingCache(tmp_path, "m")
    texts.add_sentences([("A dög.", vector, True), ("half a pair \ud83d", vector * 2, False), ("A dög.", vector, True)])
    found = texts.sentences(["A dög.", "half a pair \ud83d", "none"])
    assert set(found) == {"A dög.", "half a pair \ud83d"}
    assert found["A dög."][0].tobytes() == vector.tobytes()
    assert (found["A dög."][1], found["half a pair \ud83d"][1]) == (True, False)
    detections = DetectionCache(tmp_path, "d")
    detections.add_detections([("x", boxes, ["cat", "dög"], scores), ("empty", np.zeros((0, 4)), [], np.zeros(0))])
    found = detections.detections(["x", "empty"])
    assert (found["x"][0].tobytes(), found["x"][1], found["x"][2].tobytes()) == (
        boxes.tobytes(),
        ["cat", "dög"],
        scores.tobytes(),
    )
    assert found["empty"][0].shape == (0, 4)
    splits = SplitCache(tmp_path, "s")
    splits.add_spans([("One. Two.", np.array([[0, 4], [5, 9]])), ("", np.zeros((0, 2)))])
    assert {text: spans.tolist() for text, spans in splits.spans(["One. Two.", ""]).items()} == {
        "One. Two.": [[0, 4], [5, 9]],
        "": [],
    }


def test_more_keys_than_one_query_takes(tmp_path):
    store = Store(tmp_path / "s.sqlite", {"t": True})
    keys = [str(number).encode() for number in range(1201)]
    store.add("t", [(key, b"", key * 2) for key in keys])
    assert {key: rows[0][1] for key, rows in store.get("t", keys).items()} == {key: key * 2 for key in keys}


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"", "version"])
def test_a_damaged_file_is_moved_aside_and_begun_anew(tmp_path, damage, caplog):
    path = tmp_path / "s.sqlite"
    if damage == "version":
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        path.write_bytes(damage)
    store = Store(path, {"t": True})
    store.add("t", [(b"k", b"", b"v")])
    assert store.get("t", [b"k"]) == {b"k": [(b"", b"v")]}
    assert store.lost == 0
    kept = list(tmp_path.glob("s.sqlite.damaged-*"))
    assert len(kept) == ("is damaged" in caplog.text) == bool(damage)  # an empty file is a new database


def test_damage_in_the_middle_is_noticed_while_reading(tmp_path, caplog):
    path = tmp_path / "s.sqlite"
    store = Store(path, {"t": True})
    rows = [(str(number).encode(), b"", bytes(RNG.integers(0, 256, 4000, dtype=np.uint8))) for number in range(200)]
    store.add("t", rows)
    store.close()
    content = bytearray(path.read_bytes())
    content[8192 : len(content) // 2] = bytes(len(content) // 2 - 8192)
    path.write_bytes(content)
    store = Store(path, {"t": True})
    found = store.get("t", [key for key, _, _ in rows])
    assert all(found[key] == [(b"", body)] for key, _, body in rows if key in found)
    assert len(found) < 200
    assert "is damaged" in caplog.text
    store.add("t", rows)
    assert len(store.get("t", [key for key, _, _ in rows])) == 200


def test_a_row_with_a_flipped_bit_counts_as_missing(tmp_path):
    store = Store(tmp_path / "s.sqlite", {"t": True})
    store.add("t", [(b"a", b"", b"good"), (b"b", b"", b"good")])
    with sqlite3.connect(tmp_path / "s.sqlite") as connection:
        connection.execute("UPDATE t SET body = ? WHERE key = ?", (b"gooe", b"a"))
    assert store.get("t", [b"a", b"b"]) == {b"b": [(b"", b"good")]}


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path, caplog):
    store = Store(tmp_path / "s.sqlite", {"t": True})
    store._connection.execute("PRAGMA max_page_count = 8")
    store.add("t", [(b"a", b"", bytes(100_000)), (b"b", b"", b"")])
    store.add("t", [(b"c", b"", b"")])
    assert store.get("t", [b"a"]) == {}
    store.close()
    assert store.lost == 3
    assert "goes on without it" in caplog.text
    assert "3 results could not be kept" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path, caplog, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", full)
    store = Store(tmp_path / "folder" / "s.sqlite", {"t": True})
    store.add("t", [(b"a", b"", b"")])
    assert (store.get("t", [b"a"]), store.lost) == ({}, 1)
    assert "No space left" in caplog.text


WRITER = """
import sys
from fast_goal.cache import Store
store = Store(sys.argv[1], {"t": True, "many": False})
for number in range(40):
    store.add("t", [(f"{number}".encode(), b"", sys.argv[2].encode() * 500)])
    store.add("many", [(b"k", sys.argv[2].encode(), str(number).encode())])
    assert store.get("t", [f"{number}".encode()])
assert not store.lost
print("imported", "torch" in sys.modules)
"""


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "s.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True) for name in "abc"
    ]
    assert [writer.communicate(timeout=60)[0].strip() for writer in writers] == ["imported False"] * 3
    store = Store(path, {"t": True, "many": False})
    assert len(store.get("t", [str(number).encode() for number in range(40)])) == 40
    rows = store.get("many", [b"k"])[b"k"]
    assert sorted(rows) == sorted((name.encode(), str(number).encode()) for name in "abc" for number in range(40))
    assert not list(tmp_path.glob("*.damaged-*"))
