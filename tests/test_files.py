"""Atomic writes, digests, and the progress line."""

import io
from pathlib import Path

import pytest

from fast_goal.files import atomic_folder, atomic_path, digest, file_digest, read_json, tree_digest, write_json
from fast_goal.progress import Progress


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path: Path):
    target = tmp_path / "table.json"
    write_json(target, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_json_refuses_nan(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_digest_ignores_key_order_but_not_values():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_tree_digest_sees_names_and_bytes(tmp_path: Path):
    (tmp_path / "a").write_text("x")
    first = tree_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = tree_digest(tmp_path)
    (tmp_path / "b").write_text("y")
    assert len({first, second, tree_digest(tmp_path)}) == 3
    assert file_digest(tmp_path / "b") != file_digest(Path(__file__))


def test_progress_line_counts_only_new_work_in_its_rate():
    stream = io.StringIO()
    with Progress("flism", 100, "images", done=40, stream=stream) as progress:
        progress.update(10, loss=1.25)
        progress._begin -= 5  # as if five seconds had gone by
        assert progress.rate == pytest.approx(2, rel=0.01)
        assert "50/100 images" in progress.line()
        assert "loss 1.25" in progress.line()
        assert "left 0:25" in progress.line()
    assert stream.getvalue().count("\n") == 1


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    folder = tmp_path / "model[1]"  # brackets mean something to glob
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")
        assert not folder.exists()
    (tmp_path / ".model[1].99.tmp").mkdir()  # of a killed writer
    (tmp_path / ".model[1].99.old").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "b").write_text("half")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["a"]
    with atomic_folder(folder) as temporary:
        (temporary / "b").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["model[1]"]
