import bz2
import errno
import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from fast_goal.data import archives
from fast_goal.data.archives import Limits, unpack
from fast_goal.errors import DataError

FILES = {"set/a.txt": b"alpha", "set/images/b.jpg": bytes(range(256)) * 40, "set/images/ü 雪.jpg": b"snow", "set/empty": b""}
EXPECTED = {name.removeprefix("set/"): data for name, data in FILES.items()}


def make_tar(path: Path, files: dict[str, bytes] = FILES, extra: list[tarfile.TarInfo] = (), mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for info in extra:
            file.addfile(info)
    return path


def make_zip(path: Path, files: dict[str, bytes] = FILES, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def make(path: Path) -> Path:
    """The archive of FILES that the path's suffix asks for."""
    if path.suffix == ".zip":
        return make_zip(path)
    if path.suffix == ".zst":
        import pyarrow

        plain = make_tar(path.with_suffix(""))
        with pyarrow.output_stream(path, compression="zstd") as stream:
            stream.write(plain.read_bytes())
        return path
    return make_tar(path, mode={".tar": "w", ".gz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}[path.suffix])


def content(folder: Path) -> dict[str, bytes]:
    """The files below a folder, without the marks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".unpacked-")
    }


def nothing_left(folder: Path) -> bool:
    return not folder.exists() and not any("unpacking" in path.name for path in folder.parent.iterdir())


KINDS = ["a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.tar.zst"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_unpacked_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    archive = make(tmp_path / name)
    assert unpack(archive, tmp_path / "out", strip=1) == tmp_path / "out"
    assert content(tmp_path / "out") == EXPECTED
    monkeypatch.setattr(archives, "_extract", lambda *_: pytest.fail("unpacked twice"))
    unpack(archive, tmp_path / "out", strip=1)
    archive.unlink()
    unpack(archive, tmp_path / "out", strip=1)  # the archive may be deleted to save room


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_archive(tmp_path: Path, name: str, keep: float):
    archive = make(tmp_path / name)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * keep)])
    if name == "a.tar" and keep == 0.9:
        archive.write_bytes(data[: data.rindex(b"set/empty") + 512])  # ends between two members: no end of the archive
    with pytest.raises(DataError, match=r"damaged or incomplete.*Replace it"):
        unpack(archive, tmp_path / "out")
    (tmp_path / f"{name}.fetched.json").write_text("{}")  # it was downloaded
    with pytest.raises(DataError, match=r"damaged or incomplete.*rm '.*' '.*fetched.json'") as error:
        unpack(archive, tmp_path / "out")
    assert str(archive) in str(error.value)
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_damage_inside_is_noticed(tmp_path: Path, name: str):
    noise = bytes((i * i * 31 + i // 7) % 256 for i in range(60_000))
    files = {"noise": noise}
    if name == "a.zip":
        archive = make_zip(tmp_path / name, files)
    else:
        archive = make_tar(tmp_path / name, files, mode="w:" + name.rsplit(".", 1)[1])
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(DataError, match="damaged or incomplete"):
        unpack(archive, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_broken_header_in_the_middle_is_not_the_end(tmp_path: Path):
    archive = make_tar(tmp_path / "a.tar", {"a": b"1", "b": b"2", "c": b"3"})
    data = bytearray(archive.read_bytes())
    data[1024:1060] = b"\xff" * 36
    archive.write_bytes(data)
    with pytest.raises(DataError, match="the end is missing"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>" + b" " * 2000, b"\x89PNG\r\n" + b"x" * 600])
def test_no_archive(tmp_path: Path, content: bytes):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match="neither a zip nor a tar"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_select_and_strip(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = []
    archive = make_tar(tmp_path / "a.tar.gz", {"./top.jpg": b"t", **FILES}, mode="w:gz")
    unpack(archive, tmp_path / "out", strip=2, select=lambda name: asked.append(name) or name.endswith(".jpg"))
    assert asked == ["top.jpg", *FILES]
    assert content(tmp_path / "out") == {"b.jpg": FILES["set/images/b.jpg"], "ü 雪.jpg": b"snow"}
    printed = capsys.readouterr().out
    assert "2 left out (not selected)" in printed
    assert "1 left out (not below 2 folders, such as './top.jpg')" in printed


def test_two_archives_share_a_folder(tmp_path: Path):
    unpack(make_tar(tmp_path / "a.tar", {"x/1": b"one", "same": b"old"}), tmp_path / "out")
    unpack(make_zip(tmp_path / "b.zip", {"x/2": b"two", "same": b"new"}), tmp_path / "out")
    assert content(tmp_path / "out") == {"x/1": b"one", "x/2": b"two", "same": b"new"}
    assert len(list((tmp_path / "out").glob(".unpacked-*.json"))) == 2


def test_another_release_is_not_mixed_with_the_first(tmp_path: Path):
    archive = make_tar(tmp_path / "a.tar", {"1": b"one"})
    unpack(archive, tmp_path / "out")
    make_tar(archive, {"2": b"two" * 10_000})
    with pytest.raises(DataError, match=r"Delete .*out and run the same command again"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a/.."])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_nothing_gets_outside(tmp_path: Path, name: str, kind: str):
    inner = tmp_path / "inner"
    inner.mkdir()
    files = {"good": b"1", name: b"evil"}
    archive = make_tar(inner / "a.tar", files) if kind == "tar" else make_zip(inner / "a.zip", files)
    with pytest.raises(DataError, match="outside the folder") as error:
        unpack(archive, inner / "out")
    assert repr(name) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    assert nothing_left(inner / "out")


def test_zip_with_backslashes(tmp_path: Path):
    archive = make_zip(tmp_path / "a.zip", {"good/1": b"1", "..-evil": b"evil"})
    archive.write_bytes(archive.read_bytes().replace(b"..-evil", b"..\\evil"))
    with pytest.raises(DataError, match="outside the folder"):
        unpack(archive, tmp_path / "out")
    archive.write_bytes(archive.read_bytes().replace(b"..\\evil", b"ab\\good"))
    unpack(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {"good/1": b"1", "ab/good": b"evil"}


def test_links_and_devices_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    extra = []
    for name, kind, to in [
        ("soft", tarfile.SYMTYPE, "../secret"),
        ("hard", tarfile.LNKTYPE, "../secret"),
        ("inside", tarfile.SYMTYPE, "set/a.txt"),
        ("fifo", tarfile.FIFOTYPE, ""),
        ("disk", tarfile.BLKTYPE, ""),
    ]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, to
        extra.append(info)
    unpack(make_tar(tmp_path / "a.tar", FILES, extra), tmp_path / "out", strip=1)
    assert content(tmp_path / "out") == EXPECTED
    printed = capsys.readouterr().out
    assert "3 left out (link, such as 'soft')" in printed
    assert "2 left out (device, such as 'fifo')" in printed


def test_a_file_is_not_written_through_a_link(tmp_path: Path):
    """The classic: a link to a folder outside, then a file below it."""
    (tmp_path / "outside").mkdir()
    link = tarfile.TarInfo("door")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "outside")
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.addfile(link)
        info = tarfile.TarInfo("door/evil")
        info.size = 4
        file.addfile(info, io.BytesIO(b"evil"))
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert not list((tmp_path / "outside").iterdir())
    assert content(tmp_path / "out") == {"door/evil": b"evil"}


def test_zip_links_and_macos_metadata_are_left_out(tmp_path: Path):
    archive = make_zip(tmp_path / "a.zip", {"a.jpg": b"1", "__MACOSX/._a.jpg": b"2", "._b.jpg": b"3", ".DS_Store": b"4"})
    with zipfile.ZipFile(archive, "a") as file:
        link = zipfile.ZipInfo("link")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    unpack(archive, tmp_path / "out")
    assert content(tmp_path / "out") == {"a.jpg": b"1"}


def test_modes_of_the_archive_are_not_taken_over(tmp_path: Path):
    info = tarfile.TarInfo("tool")
    info.mode = 0o6777
    unpack(make_tar(tmp_path / "a.tar", {}, [info]), tmp_path / "out")
    assert (tmp_path / "out" / "tool").stat().st_mode & 0o6111 == 0


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "zip"])
def test_a_bomb_is_stopped_before_it_is_large(tmp_path: Path, kind: str):
    data = {"bomb": bytes(40_000_000)}
    if kind == "zip":
        archive = make_zip(tmp_path / "a.zip", data)
    else:
        archive = make_tar(tmp_path / f"a.{kind}", data, mode=f"w:{kind[4:]}")
    with pytest.raises(DataError, match=r"200 times as much \(limit `ratio`\): a decompression bomb.*higher `limits`"):
        unpack(archive, tmp_path / "out", limits=Limits(ratio_from=10_000_000))
    assert nothing_left(tmp_path / "out")
    with pytest.raises(DataError, match=r"more than 20 MB \(limit `size`\)"):
        unpack(archive, tmp_path / "out", limits=Limits(size=20_000_000))
    unpack(archive, tmp_path / "out")  # below the defaults: 1,000 MB may come of anything
    assert (tmp_path / "out" / "bomb").stat().st_size == 40_000_000


def test_a_bomb_of_members_that_are_not_selected(tmp_path: Path):
    """The bytes are decompressed to get past them, so they count."""
    archive = make_tar(tmp_path / "a.tar.gz", {"bomb": bytes(20_000_000), "small": b"1"}, mode="w:gz")
    with pytest.raises(DataError, match="decompression bomb"):
        unpack(archive, tmp_path / "out", select=lambda name: name == "small", limits=Limits(ratio_from=5_000_000))


def test_too_many_members(tmp_path: Path):
    archive = make_zip(tmp_path / "a.zip", {str(number): b"" for number in range(11)})
    with pytest.raises(DataError, match="more than 10 members"):
        unpack(archive, tmp_path / "out", limits=Limits(files=10))


def test_a_header_that_would_fill_the_memory(tmp_path: Path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 3_000_000_000
    with gzip.open(tmp_path / "a.tar.gz", "wb") as stream:
        stream.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(20):
            stream.write(bytes(1_000_000))
    with pytest.raises(DataError, match=r"header of 3,000,0\d\d,\d{3} bytes"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_size_that_is_not_true(tmp_path: Path):
    archive = make_zip(tmp_path / "a.zip", {"a": b"x" * 1000}, zipfile.ZIP_DEFLATED)
    data = archive.read_bytes()
    assert data.count((1000).to_bytes(4, "little")) == 2
    archive.write_bytes(data.replace((1000).to_bytes(4, "little"), (2000).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"damaged or incomplete|another size"):
        unpack(archive, tmp_path / "out")


def test_encrypted_zip(tmp_path: Path):
    archive = make_zip(tmp_path / "a.zip", {"a": b"1"})
    data = bytearray(archive.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"'a' is encrypted.*password"):
        unpack(archive, tmp_path / "out")


def test_names_that_fall_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(DataError, match=r"'a/x' and 'b/x' would both become 'x' with strip = 1"):
        unpack(make_tar(tmp_path / "a.tar", {"a/x": b"1", "b/x": b"2"}), tmp_path / "one", strip=1)
    with pytest.raises(DataError, match="a file and a folder at once"):
        unpack(make_tar(tmp_path / "b.tar", {"a": b"1", "a/x": b"2"}), tmp_path / "two")
    composed, decomposed = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    files = {"A.jpg": b"1", "a.jpg": b"2", composed: b"3", decomposed: b"4"}
    try:
        unpack(make_zip(tmp_path / "c.zip", files), tmp_path / "three")
    except DataError as error:  # on a file system that takes them for one
        assert "one name on this file system" in str(error)
    else:
        assert content(tmp_path / "three") == files
        assert "2 names differ only in" in capsys.readouterr().out


def test_a_file_system_that_ignores_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: real(path) or (path.name == "a.jpg" and real(path.with_name("A.jpg"))))
    with pytest.raises(DataError, match=r"'A.jpg' and 'a.jpg' are one name on this file system"):
        unpack(make_zip(tmp_path / "a.zip", {"A.jpg": b"1", "a.jpg": b"2"}), tmp_path / "out")


def test_utf8_names_without_the_flag(tmp_path: Path):
    """As macOS and many a script write them."""
    archive = make_zip(tmp_path / "a.zip", {"schnee-??.jpg": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"schnee-??", "schnee-ü".encode()))
    unpack(archive, tmp_path / "out")
    assert set(content(tmp_path / "out")) == {"schnee-ü.jpg"}


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    archive = make_tar(tmp_path / "a.tar", {"a": b"1" * 5_000_000})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage(10, 9, 1_500_000))
    with pytest.raises(DataError, match=r"5.0 MB are to be unpacked to .*, 1.5 MB are free. Free some space"):
        unpack(archive, tmp_path / "out")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage(10, 9, 6_000_000))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(archives, "_write", full)
        with pytest.raises(DataError, match=r"the disk of .*out is full \(6.0 MB free\)"):
            unpack(archive, tmp_path / "out")
    assert nothing_left(tmp_path / "out")
    unpack(archive, tmp_path / "out")
    assert len(content(tmp_path / "out")["a"]) == 5_000_000


def test_a_killed_one_starts_again_cleanly(tmp_path: Path):
    archive = make_tar(tmp_path / "a.tar", {f"{number}": b"x" * 100 for number in range(200)})
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fast_goal.data import archives\n"
        "write = archives._write\n"
        "def slow(*a):\n    write(*a); print('written', flush=True); time.sleep(0.01)\n"
        "archives._write = slow\n"
        f"archives.unpack(Path({str(archive)!r}), Path({str(tmp_path / 'out')!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert any("unpacking" in path.name for path in tmp_path.iterdir())
    unpack(archive, tmp_path / "out")
    assert len(content(tmp_path / "out")) == 200
    assert not any("unpacking" in path.name for path in tmp_path.iterdir())


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    archive = make_tar(tmp_path / "a.tar")
    runs = []
    extract = archives._extract

    def slow(*arguments: object) -> object:
        runs.append(arguments)
        time.sleep(0.2)
        return extract(*arguments)

    monkeypatch.setattr(archives, "_extract", slow)
    threads = [threading.Thread(target=unpack, args=(archive, tmp_path / "out", 1)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1
    assert content(tmp_path / "out") == EXPECTED


def test_compressed_single_files_are_no_archives(tmp_path: Path):
    for name, compress in (("a.gz", gzip.compress), ("a.bz2", bz2.compress), ("a.xz", lzma.compress)):
        (tmp_path / name).write_bytes(compress(b'{"caption": "a dog"}' * 100))
        with pytest.raises(DataError, match="damaged or incomplete"):
            unpack(tmp_path / name, tmp_path / "out")


def test_a_folder_that_is_a_link_or_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is made for a while lies on the disk of the folder, or it could not be renamed."""
    made = []
    extract = archives._extract
    monkeypatch.setattr(
        archives, "_extract", lambda archive, target, *rest: made.append(target) or extract(archive, target, *rest)
    )
    archive = make_tar(tmp_path / "a.tar", {"1": b"one"})
    for name in ("there", "not yet"):
        (tmp_path / "far").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far/there").mkdir()
    for name in ("there", "not yet"):
        assert unpack(archive, tmp_path / name) == tmp_path / name
        assert content(tmp_path / "far" / name) == {"1": b"one"} and (tmp_path / name).is_symlink()
        assert made.pop().parent == tmp_path / "far"
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    (tmp_path / "disk").mkdir()
    unpack(archive, tmp_path / "disk")
    assert made.pop().parent == tmp_path / "disk" and content(tmp_path / "disk") == {"1": b"one"}


def test_another_release_of_the_same_size_is_known_by_the_digest_of_its_download(tmp_path: Path):
    archive, mark = tmp_path / "a.tar", tmp_path / "a.tar.fetched.json"
    make_tar(archive, {"1": b"one"})
    mark.write_text('{"sha256": "aa"}')
    unpack(archive, tmp_path / "out")
    unpack(archive, tmp_path / "out")
    make_tar(archive, {"1": b"two"})
    mark.write_text('{"sha256": "bb"}')
    with pytest.raises(DataError, match=r"sha256 aa .*sha256 bb .*Delete .*out"):
        unpack(archive, tmp_path / "out")
    mark.unlink()
    assert content(unpack(archive, tmp_path / "out")) == {"1": b"one"}, "nothing is known of a file brought by hand"


def test_another_choice_adds_what_is_new(tmp_path: Path):
    archive = make_tar(tmp_path / "a.tar", {"1": b"one", "2": b"two", "3": b"three"})
    for names in ("12", "23"):
        unpack(archive, tmp_path / "out", select=lambda name, names=names: name in names, asked=names)
    assert content(tmp_path / "out") == {"1": b"one", "2": b"two", "3": b"three"}


def test_a_name_that_no_terminal_can_show(tmp_path: Path):
    """In a process of its own, whose output is strict UTF-8."""
    link = tarfile.TarInfo("\udce4.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "x"
    archive = make_tar(tmp_path / "a.tar", {"1": b"one"}, [link])
    code = f"from pathlib import Path; from fast_goal.data.archives import unpack; unpack(Path({str(archive)!r}), Path('out'))"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "1 left out (link, such as '\\udce4.jpg')" in done.stdout.decode()
