import errno
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from file_server import FileServer

from fast_goal.config import build
from fast_goal.data import fetch as module
from fast_goal.data import transfer
from fast_goal.data.fetch import ManualStep, Remote, downloads_folder, fetch, fetch_all, require_manual
from fast_goal.data.origins import Missing, Policy, Unreachable
from fast_goal.errors import ConfigError, DataError

DATA = b"".join(hashlib.sha256(str(number).encode()).digest() for number in range(100_000))  # 3.2 MB
SHA = hashlib.sha256(DATA).hexdigest()
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, and no settings of the machine."""
    monkeypatch.setattr(module, "POLICY", Policy(attempts=3, first_wait=0.01, longest_wait=0.05, read_timeout=2.0))
    for name in ("FAST_GOAL_MIRROR", "FAST_GOAL_DOWNLOADS", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with FileServer({"a.zip": DATA}) as running:
        yield running


def remote(url: str, file: str | None = None, sha256: str | None = None, size: int | None = None) -> Remote:
    return Remote(url, file, sha256, size)


def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLICY", Policy(attempts=3, first_wait=0.01, read_timeout=2.0, parts_from=800_000))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.part*"))


def test_a_file_is_fetched_once(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = fetch(remote(server.url("a.zip"), sha256=SHA.upper(), size=len(DATA)), tmp_path)
    assert path == tmp_path / "a.zip"
    assert path.read_bytes() == DATA
    mark = json.loads((tmp_path / "a.zip.fetched.json").read_text())
    assert (mark["size"], mark["sha256"], mark["checked"], mark["url"]) == (len(DATA), SHA, True, server.url("a.zip"))
    assert "as published" in capsys.readouterr().out
    fetch(remote(server.url("a.zip")), tmp_path)
    fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path)
    assert len(server.requests) == 1
    assert leftovers(tmp_path) == []


def test_without_a_checksum_the_first_digest_is_recorded_and_shown(server, tmp_path, capsys):
    fetch(remote(server.url("a.zip")), tmp_path)
    assert json.loads((tmp_path / "a.zip.fetched.json").read_text())["checked"] is False
    assert f"3,200,000 bytes, sha256 {SHA} (recorded" in capsys.readouterr().out


def test_progress_is_counted_in_bytes(server, tmp_path, capsys):
    fetch(remote(server.url("a.zip")), tmp_path)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("download a.zip: 3.2/3.2 MB  100%")
    assert "MB/s  left 0:00" in line


def test_an_interrupted_download_is_continued(server, tmp_path):
    """Half-way through, every further attempt fails; the next call asks for the other half only."""
    server.fault("a.zip", close_after=1_500_000)
    server.fault("a.zip", times=2, status=503)
    with pytest.raises(Unreachable, match=r"1\.5 of 3\.2 MB are kept in .*a\.zip\.part: the same command continues there"):
        fetch(remote(server.url("a.zip")), tmp_path)
    assert not (tmp_path / "a.zip").exists()
    server.requests.clear()
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == DATA
    assert [(request.start, request.status, request.sent) for request in server.requests] == [(1_500_000, 206, 1_700_000)]
    assert server.requests[0].headers["if-range"]


def test_a_killed_download_is_continued(server, tmp_path):
    server.fault("a.zip", stall=(2_000_000, 20))
    code = (
        "from pathlib import Path\nfrom fast_goal.data.fetch import Remote, fetch\n"
        f"fetch(Remote({server.url('a.zip')!r}, None, None, None), Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", f"import fast_goal.data.transfer as t; t._SAVE_EVERY = 0\n{code}"])
    part = tmp_path / "a.zip.part"
    until = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= 2_000_000):
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.1)
    process.kill()
    process.wait()
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == DATA
    second = server.requests[-1]
    assert second.start == 2_000_000
    assert second.sent == 1_200_000


def test_a_server_that_closes_again_and_again(server, tmp_path):
    """Each connection brings something, so there is no limit to their number; no byte is asked for twice."""
    server.fault("a.zip", times=8, close_after=300_000)
    assert fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path).read_bytes() == DATA
    assert [request.start for request in server.requests] == [300_000 * number for number in range(9)]
    assert server.sent("a.zip") == len(DATA)


def test_a_server_that_closes_before_the_first_byte(server, tmp_path):
    server.fault("a.zip", times=None, close_after=0)
    with pytest.raises(Unreachable, match=r"3 times in a row without a new byte.*Nothing was fetched"):
        fetch(remote(server.url("a.zip")), tmp_path)
    assert len(server.requests) == 3


def test_a_changed_file_starts_over(server, tmp_path, capsys):
    server.fault("a.zip", close_after=1_000_000)
    server.fault("a.zip", times=2, status=500)
    with pytest.raises(Unreachable):
        fetch(remote(server.url("a.zip")), tmp_path)
    other = DATA[::-1]
    server.files["a.zip"] = other
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == other
    assert "starting over: the file on the server changed" in capsys.readouterr().out
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("checksum", [None, SHA])
def test_a_server_without_ranges_starts_over(server, tmp_path, checksum, capsys):
    server.fault("a.zip", close_after=1_000_000, ranges=False)
    server.fault("a.zip", times=2, ranges=False)
    assert fetch(remote(server.url("a.zip"), sha256=checksum), tmp_path).read_bytes() == DATA
    server.fault("a.zip", close_after=1_000_000, ranges=False, etag="")
    server.fault("a.zip", times=2, ranges=False, etag="")
    assert fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path / "no tag").read_bytes() == DATA
    printed = capsys.readouterr().out
    assert printed.count("starting over: the server cannot continue a download") == 2 and "changed" not in printed


def test_without_etag_and_date_nothing_is_continued_unless_a_checksum_follows(server, tmp_path):
    for name, checksum, first in (("one", None, None), ("two", SHA, 1_000_000)):
        server.clear()
        server.fault("a.zip", close_after=1_000_000, etag="")
        server.fault("a.zip", times=None, etag="")
        assert fetch(remote(server.url("a.zip"), sha256=checksum), tmp_path / name).read_bytes() == DATA
        assert (server.requests[1].start or None) == first


def test_a_weak_etag_is_not_used_to_continue(server, tmp_path):
    date = "Wed, 01 Jan 2025 00:00:00 GMT"
    server.fault("a.zip", close_after=1_000_000, etag='W/"1"', headers={"Last-Modified": date})
    fetch(remote(server.url("a.zip")), tmp_path)
    assert server.requests[1].headers["if-range"] == date


def test_large_files_come_in_parts(server, tmp_path, monkeypatch):
    in_parts(monkeypatch)
    assert fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path).read_bytes() == DATA
    ranges = sorted((request.start, request.end) for request in server.requests)
    assert ranges == [
        (0, 799_999),
        (800_000, 1_399_999),
        (1_400_000, 1_999_999),
        (2_000_000, 2_599_999),
        (2_600_000, 3_199_999),
    ]
    assert server.sent("a.zip") == len(DATA)


def test_parts_are_continued_each_where_it_was(server, tmp_path, monkeypatch):
    in_parts(monkeypatch)
    server.fault("a.zip", times=1)  # the first part comes whole
    server.fault("a.zip", times=4, close_after=250_000)
    server.fault("a.zip", times=None, status=502)
    with pytest.raises(Unreachable, match=r"1\.8 of 3\.2 MB are kept"):
        fetch(remote(server.url("a.zip")), tmp_path)
    server.clear()
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == DATA
    assert sorted(request.start for request in server.requests) == [1_050_000, 1_650_000, 2_250_000, 2_850_000]
    assert server.sent("a.zip") == 4 * 350_000


def test_a_file_that_changes_between_the_parts(server, tmp_path, monkeypatch):
    in_parts(monkeypatch)
    server.fault("a.zip", content=DATA[::-1])
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == DATA


def test_a_file_that_never_stays_the_same(server, tmp_path, monkeypatch):
    in_parts(monkeypatch)
    for number in range(100):
        server.fault("a.zip", etag=f'"{number}"')
    with pytest.raises(Unreachable, match="had to start over 3 times, at last because the file on the server changed"):
        fetch(remote(server.url("a.zip")), tmp_path)


@pytest.mark.parametrize("size", [0, 1, 799_999, 800_000, 800_001, 800_002, 1_000_001])
def test_every_byte_of_every_size(tmp_path, monkeypatch, size):
    in_parts(monkeypatch)
    with FileServer({"f": DATA[:size]}) as server:
        assert fetch(remote(server.url("f"), size=size), tmp_path).read_bytes() == DATA[:size]


def test_a_stall_ends_with_the_read_timeout(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "POLICY", Policy(attempts=2, first_wait=0.01, read_timeout=0.3))
    server.fault("a.zip", stall=(1_000_000, 20))
    begin = time.monotonic()
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == DATA
    assert time.monotonic() - begin < 5
    assert "no answer in time (ReadTimeout)" in capsys.readouterr().out
    assert server.requests[1].start == 1_000_000


def test_retry_after_is_honoured(server, tmp_path):
    for retry_after in (0.4, format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)):
        server.fault("a.zip", status=429, retry_after=retry_after)
        begin = time.monotonic()
        fetch(remote(server.url("a.zip"), file=f"{retry_after}.zip"), tmp_path)
        assert time.monotonic() - begin >= 0.4
    server.fault("a.zip", status=503, retry_after=7200)
    with pytest.raises(Unreachable, match="asks to come back in 7,200 s"):
        fetch(remote(server.url("a.zip"), file="late.zip"), tmp_path)


def test_redirects_are_followed(server, tmp_path):
    server.fault("old/b.zip", times=None, redirect="/newer/b.zip")
    server.fault("newer/b.zip", times=None, redirect="/a.zip")
    server.fault("a.zip", close_after=1_000_000)
    assert fetch(remote(server.url("old/b.zip")), tmp_path).read_bytes() == DATA
    assert (tmp_path / "b.zip").exists()
    assert [request.start for request in server.asked("a.zip")] == [0, 1_000_000]
    server.fault("loop", times=None, redirect="/loop")
    with pytest.raises(DataError, match=r"redirects.*Correct `url`"):
        fetch(remote(server.url("loop")), tmp_path)
    server.fault("out", redirect="file:///etc/passwd")
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch(remote(server.url("out")), tmp_path)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"answers 404: the file is not there \(any more\)\. Set `url` in params\.yaml to its new place\.\n"),
        (410, "answers 410"),
        (403, "answers 403: no access"),
        (401, "answers 401: no access"),
        (418, "answers 418, which is not a file"),
    ],
)
def test_what_another_try_would_not_mend(server, tmp_path, status, message):
    server.fault("a.zip", times=None, status=status)
    with pytest.raises(DataError, match=message) as error:
        fetch(remote(server.url("a.zip")), tmp_path)
    assert server.url("a.zip") in str(error.value)
    assert len(server.requests) == 1
    if status == 404:
        assert str(tmp_path / "a.zip") in str(error.value)
        assert "FAST_GOAL_MIRROR" in str(error.value)


def test_nobody_listens(tmp_path):
    with FileServer({}) as server:
        url = server.url("a.zip")
    with pytest.raises(Unreachable, match=r"the connection broke.*3 times in a row[\s\S]*Or bring the file a.zip yourself"):
        fetch(remote(url), tmp_path)


def test_a_web_page_instead_of_the_file(server, tmp_path):
    server.fault("a.zip", content=b"<html>Log in", headers={"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(DataError, match=r"answers with a web page instead of a.zip"):
        fetch(remote(server.url("a.zip")), tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_a_wrong_checksum(server, tmp_path):
    bad = bytearray(DATA)
    bad[1_234_567] ^= 1
    server.files["a.zip"] = bytes(bad)
    with pytest.raises(DataError, match=rf"sha256 {hashlib.sha256(bad).hexdigest()}, published is {SHA}.*correct `sha256`"):
        fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path)
    assert len(server.requests) == 1
    assert not (tmp_path / "a.zip").exists()
    assert leftovers(tmp_path) == []
    server.files["a.zip"] = DATA
    assert fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path).read_bytes() == DATA


def test_a_wrong_checksum_after_a_resumption_gets_a_second_chance(server, tmp_path, capsys):
    server.fault("a.zip", close_after=1_000_000, content=b"x" * len(DATA), etag='"1"')
    server.fault("a.zip", etag='"1"')
    assert fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path).read_bytes() == DATA
    assert "starting over, since it had been continued" in capsys.readouterr().out


def test_a_wrong_size_is_refused_before_the_bytes(server, tmp_path):
    with pytest.raises(DataError, match=r"has 3,200,000 bytes; 99 are published.*correct `size`"):
        fetch(remote(server.url("a.zip"), size=99), tmp_path)
    assert not (tmp_path / "a.zip.part").exists()


def test_a_wrong_content_length(server, tmp_path):
    """Fewer bytes than announced look like a broken connection, so the rest is asked for and refused."""
    server.fault("a.zip", times=None, length=len(DATA) + 100, ranges=False)
    with pytest.raises(Unreachable):
        fetch(remote(server.url("a.zip")), tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_no_room_on_the_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: Usage(10, 9, 1_000_000))
    with pytest.raises(DataError, match=r"a.zip needs 3\.2 MB in .*, where 1\.0 MB are free.*FAST_GOAL_DOWNLOADS"):
        fetch(remote(server.url("a.zip")), tmp_path)
    server.clear()
    with pytest.raises(DataError, match=r"needs 3\.2 MB in"):
        fetch(remote(server.url("a.zip"), size=len(DATA)), tmp_path)
    assert server.requests == []  # the size was known beforehand
    assert leftovers(tmp_path) == []
    server.files |= {"b.zip": DATA}
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: Usage(10, 9, 5_000_000))
    with pytest.raises(DataError, match=r"needs 6\.4 MB"):  # each would fit, both do not
        fetch_all([remote(server.url(name), size=len(DATA)) for name in ("a.zip", "b.zip")], tmp_path)


@pytest.mark.parametrize("parts", [False, True])
def test_the_disk_fills_up_during_the_download(server, tmp_path, monkeypatch, parts):
    if parts:
        in_parts(monkeypatch)
    room = [2_000_000]
    write = transfer._write

    def small_disk(stream, chunk):
        if room[0] < len(chunk):
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(chunk)
        write(stream, chunk)

    monkeypatch.setattr(transfer, "_write", small_disk)
    with pytest.raises(DataError, match=r"the disk of .* is full: 1\.\d MB are missing.*2?1?\.\d of 3\.2 MB are kept"):
        fetch(remote(server.url("a.zip")), tmp_path)
    first = server.sent("a.zip")
    server.clear()
    room[0] = 10_000_000
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == DATA
    assert server.sent("a.zip") < len(DATA) - 1_900_000 + 1, first
    assert 10_000_000 - room[0] == server.sent("a.zip")


def test_a_file_that_no_longer_fits_its_mark_is_fetched_again(server, tmp_path, capsys):
    path = fetch(remote(server.url("a.zip")), tmp_path)
    path.write_bytes(DATA[:1000])
    assert fetch(remote(server.url("a.zip")), tmp_path).read_bytes() == DATA
    assert "WARNING: " in (printed := capsys.readouterr().out)
    assert "has 1,000 bytes, 3,200,000 when it was fetched" in printed


def test_another_published_checksum_fetches_again(server, tmp_path, capsys):
    fetch(remote(server.url("a.zip")), tmp_path)
    server.files["a.zip"] = DATA[::-1]
    wanted = hashlib.sha256(DATA[::-1]).hexdigest()
    assert fetch(remote(server.url("a.zip"), sha256=wanted), tmp_path).read_bytes() == DATA[::-1]
    assert f"wanted is {wanted}; fetching it again" in capsys.readouterr().out


def test_a_file_brought_by_hand_is_taken(server, tmp_path):
    (tmp_path / "a.zip").write_bytes(DATA)
    fetch(remote(server.url("a.zip"), sha256=SHA), tmp_path)
    assert server.requests == []
    assert json.loads((tmp_path / "a.zip.fetched.json").read_text())["from"] == "found in the folder"
    (tmp_path / "b.zip").write_bytes(b"half")
    with pytest.raises(DataError, match=r"b\.zip has 4 bytes, published are 3,200,000.*Delete it to have it downloaded from"):
        fetch(remote(server.url("b.zip"), size=len(DATA)), tmp_path)
    assert (tmp_path / "b.zip").read_bytes() == b"half"


def test_names_that_collide(server, tmp_path):
    server.files |= {"x/n.json": b"1", "y/n.json": b"2"}
    one, two = remote(server.url("x/n.json")), remote(server.url("y/n.json"))
    with pytest.raises(ConfigError, match=r"would both be .*n.json: set `file`"):
        fetch_all([one, two], tmp_path)
    fetch(one, tmp_path)
    with pytest.raises(DataError, match=r"was downloaded from .*x/n\.json; now .*y/n\.json is wanted under this name"):
        fetch(two, tmp_path)
    paths = fetch_all([one, remote(two.url, file="y/n.json"), one], tmp_path)
    assert [path.read_bytes() for path in paths] == [b"1", b"2", b"1"]
    fetch(remote(server.url("moved/n.json"), sha256=hashlib.sha256(b"1").hexdigest()), tmp_path)  # the same by its checksum


def test_a_query_may_be_all_that_tells_two_files_apart(server, tmp_path):
    fetch(remote(server.url("a.zip") + "?id=1"), tmp_path)
    fetch(remote(server.url("a.zip") + "?id=1"), tmp_path)
    with pytest.raises(DataError, match="is wanted under this name"):
        fetch(remote(server.url("a.zip") + "?id=2"), tmp_path)


def test_several_at_once(tmp_path, capsys):
    files = {f"{number}.bin": DATA[: 100_000 + number] for number in range(6)}
    with FileServer(files) as server:
        for name in files:
            server.fault(name, delay=0.25)
        begin = time.monotonic()
        paths = fetch_all([remote(server.url(name)) for name in files], tmp_path, parallel=3)
        assert time.monotonic() - begin < 6 * 0.25
    assert [path.name for path in paths] == list(files)
    assert all(path.read_bytes() == files[path.name] for path in paths)
    assert "download 6 files: 0.6/0.6 MB  100%" in capsys.readouterr().err


def test_one_failure_ends_the_others_resumably(server, tmp_path):
    server.files["b.zip"] = DATA
    server.fault("a.zip", stall=(1_000_000, 1.0))
    server.fault("b.zip", delay=0.3, status=404)
    with pytest.raises(Missing, match=r"b.zip answers 404"):
        fetch_all([remote(server.url("a.zip")), remote(server.url("b.zip"))], tmp_path)
    server.clear()
    fetch_all([remote(server.url("a.zip")), remote(server.url("b.zip"))], tmp_path)
    assert server.asked("a.zip")[0].start == 1_000_000


def test_two_processes_fetch_one_file(server, tmp_path):
    server.fault("a.zip", delay=1.0)
    code = (
        "from pathlib import Path\nfrom fast_goal.data.fetch import Remote, fetch\n"
        f"print(fetch(Remote({server.url('a.zip')!r}, None, None, None), Path({str(tmp_path)!r})).stat().st_size)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("3200000" in output for output in outputs)
    assert len(server.asked("a.zip")) == 1
    assert sum("being fetched by another process" in output for output in outputs) <= 1


def test_two_threads_fetch_one_file(server, tmp_path):
    server.fault("a.zip", delay=0.2)
    threads = [threading.Thread(target=fetch, args=(remote(server.url("a.zip")), tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_files_of_this_machine(tmp_path):
    (tmp_path / "my files").mkdir()
    source = tmp_path / "my files" / "a.zip"
    source.write_bytes(DATA)
    for number, url in enumerate((source.as_uri(), str(source))):
        assert fetch(remote(url, sha256=SHA), tmp_path / str(number)).read_bytes() == DATA
    with pytest.raises(Missing, match=r"none.zip is no file"):
        fetch(remote((tmp_path / "none.zip").as_uri()), tmp_path)


def test_other_schemes_through_fsspec(tmp_path, monkeypatch):
    import fsspec

    in_parts(monkeypatch)
    fsspec.filesystem("memory").pipe("/bucket/a.zip", DATA)
    assert fetch(remote("memory://bucket/a.zip", sha256=SHA), tmp_path).read_bytes() == DATA
    with pytest.raises(Missing):
        fetch(remote("memory://bucket/b.zip"), tmp_path)
    with pytest.raises(DataError, match="nonsense:// is not known"):
        fetch(remote("nonsense://bucket/c.zip"), tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"no driver for s3://.*s3fs.*pip install"):
        fetch(remote("s3://bucket/d.zip"), tmp_path)


def test_the_mirror_is_asked_first(server, tmp_path, monkeypatch, capsys):
    mirror = tmp_path / "mirror"
    (mirror / "set").mkdir(parents=True)
    (mirror / "a.zip").write_bytes(DATA)
    server.files |= {"b.zip": b"origin"}
    for number, address in enumerate((str(mirror), mirror.as_uri())):
        monkeypatch.setenv("FAST_GOAL_MIRROR", address)
        folder = tmp_path / str(number)
        assert fetch(remote("http://nowhere.invalid/a.zip", file="set/a.zip", sha256=SHA), folder).read_bytes() == DATA
        assert json.loads((folder / "set/a.zip.fetched.json").read_text())["from"].endswith("mirror/a.zip")
        assert fetch(remote(server.url("b.zip")), folder).read_bytes() == b"origin"
        assert "does not have b.zip" in capsys.readouterr().out
    (mirror / "a.zip").write_bytes(DATA[::-1])
    with pytest.raises(DataError, match=r"mirror/a\.zip has sha256"):
        fetch(remote("http://nowhere.invalid/a.zip", sha256=SHA), tmp_path / "2")
    monkeypatch.setenv("FAST_GOAL_MIRROR", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"FAST_GOAL_MIRROR = .* is no folder"):
        fetch(remote(server.url("b.zip")), tmp_path / "3")


def test_a_mirror_on_a_server(server, tmp_path, monkeypatch):
    server.files |= {"mirror/set/x y.zip": b"mirror", "b.zip": b"origin"}
    monkeypatch.setenv("FAST_GOAL_MIRROR", server.url("mirror/"))
    assert fetch(remote("http://nowhere.invalid/z.zip", file="set/x y.zip"), tmp_path).read_bytes() == b"mirror"
    server.fault("mirror/b.zip", times=None, status=500)
    assert fetch(remote(server.url("b.zip")), tmp_path).read_bytes() == b"origin"


def test_the_downloads_folder(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert downloads_folder() == Path(".fast_goal/downloads")
    assert fetch(remote(server.url("a.zip"))) == Path(".fast_goal/downloads/a.zip")
    monkeypatch.setenv("FAST_GOAL_DOWNLOADS", str(tmp_path / "shared"))
    assert fetch(remote(server.url("a.zip"))) == tmp_path / "shared" / "a.zip"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAST_GOAL_DOWNLOADS", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be made"):
        fetch(remote(server.url("a.zip")))


def test_secrets_stay_where_they_belong(server, tmp_path, capsys):
    server.fault("a.zip", times=3, status=500)
    address = server.url("a.zip").replace("http://", "http://user:password@") + "?signature=geheim"
    with pytest.raises(Unreachable) as error:
        fetch(remote(address), tmp_path)
    fetch(remote(address), tmp_path)
    assert server.requests[-1].query == "signature=geheim"
    assert server.requests[-1].headers["authorization"].startswith("Basic ")
    output = capsys.readouterr()
    texts = [str(error.value), output.out, output.err, *(path.read_text() for path in tmp_path.glob("*.json"))]
    assert not [text for text in texts if "password" in text or "geheim" in text]
    with FileServer({"a.zip": DATA}) as other:
        server.fault("b.zip", redirect=other.url("a.zip"))
        fetch(remote(server.url("b.zip").replace("http://", "http://user:password@")), tmp_path)
        assert "authorization" not in other.requests[0].headers


@pytest.mark.parametrize(
    "values",
    [
        {"url": "http://x/a.zip", "sha256": "123"},
        {"url": "http://x/a.zip", "size": -1},
        {"url": "http://x/a.zip", "file": "../a.zip"},
        {"url": "http://x/a.zip", "file": "/etc/passwd"},
        {"url": "http://x/%2e%2e"},
        {"url": "http://x/"},
    ],
)
def test_a_remote_that_makes_no_sense(values):
    with pytest.raises(ConfigError):
        build(Remote, {"file": None, "sha256": None, "size": None, **values}, "download.datasets.x.archive")


def test_manual_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("FAST_GOAL_DOWNLOADS", str(tmp_path / "downloads"))
    steps = ["Open https://example.org/form", "Accept the licence"]
    with pytest.raises(ManualStep) as error:
        require_manual("flickr30k/images.tar.gz", steps)
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["  1. Open https://example.org/form", "  2. Accept the licence"]
    assert lines[3].startswith(f"  3. Put it at {tmp_path / 'downloads/flickr30k/images.tar.gz'} ")
    assert "run the same command again" in lines[4]
    (tmp_path / "downloads/flickr30k/images").mkdir(parents=True)
    with pytest.raises(ManualStep):  # an empty folder
        require_manual("flickr30k/images", steps)
    (tmp_path / "downloads/flickr30k/images/1.jpg").write_bytes(b"1")
    assert require_manual("flickr30k/images", steps) == tmp_path / "downloads/flickr30k/images"
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "images.tar.gz").write_bytes(DATA)
    monkeypatch.setenv("FAST_GOAL_MIRROR", str(tmp_path / "mirror"))
    assert require_manual("flickr30k/images.tar.gz", steps).read_bytes() == DATA
