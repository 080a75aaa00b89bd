"""What a second download finds in the downloads folder: another's file, an old mark, a full disk, an impossible name."""

import errno
import hashlib

import pytest
from file_server import FileServer

from fast_goal.data import fetch as module
from fast_goal.data.fetch import Remote, fetch
from fast_goal.errors import ConfigError, DataError

DATA = b"".join(hashlib.sha256(str(number).encode()).digest() for number in range(1_000))
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    for name in ("FAST_GOAL_MIRROR", "FAST_GOAL_DOWNLOADS"):
        monkeypatch.delenv(name, raising=False)
    with FileServer({"a.zip": DATA}) as running:
        yield running


def remote(url: str, file: str | None = None, sha256: str | None = None) -> Remote:
    return Remote(url, file, sha256, None)


def test_the_file_of_another_address_is_not_overwritten(server, tmp_path):
    """Two data sets that give one name to two files, each with its own checksum."""
    server.files["x/a.zip"] = DATA[::-1]
    fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path)
    other = remote(server.url("x/a.zip"), sha256=hashlib.sha256(DATA[::-1]).hexdigest())
    with pytest.raises(DataError, match=r"now .*x/a\.zip is wanted under this name.*set `file` to another path"):
        fetch(other, tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == DATA and not server.asked("x/a.zip")


def test_a_kill_before_the_new_mark_leaves_no_old_one(server, tmp_path, monkeypatch):
    fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path)
    server.files["a.zip"] = DATA[::-1]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_mark", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(remote(server.url("a.zip"), sha256=hashlib.sha256(DATA[::-1]).hexdigest()), tmp_path)
    with pytest.raises(DataError, match="Delete it to have it downloaded"):
        fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path)  # the old mark would call the new bytes complete


def test_a_disk_that_is_full_at_the_mark(server, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_json", full)
        with pytest.raises(DataError, match=r"a\.zip is complete, but .*a\.zip\.fetched\.json cannot be written .*No space"):
            fetch(remote(server.url("a.zip")), tmp_path)
    fetch(remote(server.url("a.zip")), tmp_path)
    assert len(server.requests) == 1


def test_a_name_that_no_file_can_have(server, tmp_path):
    with pytest.raises(DataError, match=r"cannot be written .*File name too long.*`file` to another name"):
        fetch(remote(server.url("a.zip"), file="n" * 250), tmp_path)
    with pytest.raises(ConfigError, match="expected a path below the downloads folder"):
        remote(server.url("a.zip"), file="a\0b")
