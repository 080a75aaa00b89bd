"""Unpacks archives that come from outside: tar (plain, gz, bz2, xz, zst) and zip.

    unpack(path, folder, strip=1, select=lambda name: name.endswith(".jpg"))

Nothing is written outside the folder and nothing but files and folders is made. An archive that tries is refused; links
and devices are left out and counted. The folder is complete or not there: members go to a temporary folder first, and a
mark `.unpacked-<archive>.json` comes last.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import re
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from fast_goal.errors import DataError
from fast_goal.files import read_json, write_json
from fast_goal.progress import Progress

MB = 1_000_000
_CHUNK = 1 << 20
_LONGEST_READ = 16 << 20  # bytes of one tar header with its extensions; more has no honest use
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
_JUNK = re.compile(r"(^|/)(__MACOSX/|\._[^/]*$|\.DS_Store$)")


@dataclass(frozen=True)
class Limits:
    """What an archive may become. size: bytes in all; files: members; ratio: bytes unpacked per byte of the archive, from
    `ratio_from` bytes on. The defaults are guesses far above the data sets this project knows."""

    size: int = 4_000_000 * MB
    files: int = 20_000_000
    ratio: float = 200.0
    ratio_from: int = 1_000 * MB


LIMITS = Limits()


@dataclass(frozen=True)
class _Member:
    """`kind`: "file", "folder", or the reason for which it is left out."""

    name: str
    size: int
    kind: str
    open: Callable[[], IO[bytes]]


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpack(
    archive: Path,
    folder: Path,
    strip: int = 0,
    select: Callable[[str], bool] | None = None,
    limits: Limits = LIMITS,
    asked: str | None = None,
) -> Path:
    """Unpacks `archive` into `folder` and returns it; a second call with the same archive does nothing.

    strip: leading parts of the path that are taken off; a member with fewer is left out. select: of the members' names as
    they are in the archive, those to unpack; called only when unpacking, so another choice needs another folder or another
    `asked`, a digest of the choice: what is new is then added to what is there. Several archives may share a folder, which
    may be a link or a disk of its own. Raises DataError for an archive that is damaged, encrypted, hostile or above `limits`.
    """
    archive, folder = Path(archive), Path(folder)
    home = folder.resolve()  # what is made beside a link would lie on another disk
    mark = home / f".unpacked-{archive.name}.json"
    if _unpacked(mark, archive, strip, asked):
        return folder
    if not archive.is_file():
        raise DataError(f"{archive} is no file")
    with locked(home):
        if _unpacked(mark, archive, strip, asked):
            return folder
        temporary = (home if home.is_mount() else home.parent) / f".{home.name}.unpacking"
        _remove(temporary)
        try:
            facts = _extract(archive, temporary, strip, select, limits)
            known = {"archive": archive.name, "size": archive.stat().st_size, "sha256": _known_digest(archive)}
            write_json(temporary / mark.name, {**known, "strip": strip, "asked": asked, **facts})
            _move(temporary, home, mark.name)
        except OSError as error:
            raise disk_error(error, archive, home) from error
        finally:
            _remove(temporary)
    return folder


def _unpacked(mark: Path, archive: Path, strip: int, asked: str | None) -> bool:
    """Whether the mark says that all is there. Raises DataError for the mark of another archive of this name."""
    try:
        facts = read_json(mark)
        seen, seen_strip, seen_asked, digest = facts["size"], facts["strip"], facts.get("asked"), facts.get("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    size, found = seen, None
    if archive.is_file():
        size, found = archive.stat().st_size, _known_digest(archive)
    other = None not in (digest, found) and digest != found
    if other or (seen, seen_strip) != (size, strip):
        was, now = (f" and sha256 {digest}", f" and sha256 {found}") if other else ("", "")
        raise DataError(
            f"{mark.parent} was unpacked from a {archive.name} of {seen:,} bytes{was} with strip = {seen_strip}; now it is to "
            f"be one of {size:,} bytes{now} with strip = {strip}. Delete {mark.parent} and run the same command again."
        )
    return seen_asked == asked


def _known_digest(archive: Path) -> str | None:
    """The SHA-256 that `data.fetch` has found; None for an archive that it did not bring."""
    try:
        return read_json(archive.with_name(f"{archive.name}.fetched.json"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _extract(archive: Path, target: Path, strip: int, select: Callable[[str], bool] | None, limits: Limits) -> dict[str, Any]:
    """Writes the members below `target`. Returns the counts for the mark."""
    left_out: Counter[str] = Counter()
    examples: dict[str, str] = {}
    written: dict[str, str] = {}  # path -> name in the archive
    folded: dict[str, str] = {}
    size = count = alike = 0

    def leave(name: str, reason: str) -> None:
        left_out[reason] += 1
        examples.setdefault(reason, name)

    target.mkdir(parents=True)
    with _opened(archive, limits) as (members, progress):
        for member in members:
            count += 1
            size += member.size
            _check_limits(archive, size, count, limits)
            name = _safe(member.name, archive)
            parts = [part for part in name.split("/") if part not in {"", "."}]
            if member.kind not in {"file", "folder"}:
                leave(name, member.kind)
            elif _JUNK.search(name):
                leave(name, "macOS metadata")
            elif member.kind == "folder":
                continue  # made when a file needs it
            elif select is not None and not select("/".join(parts)):
                left_out["not selected"] += 1
            elif len(parts) <= strip:
                leave(name, f"not below {strip} folders")
            else:
                path = "/".join(parts[strip:])
                if written.setdefault(path, name) != name:
                    raise DataError(
                        f"{archive}: {written[path]!r} and {name!r} would both become {path!r} with strip = {strip}"
                    )
                other = folded.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
                alike += other != path
                _check_free(archive, target, member.size)
                _write(member, target / path, archive, other if other != path else None, progress)
    if alike:
        print(f"unpack: {archive.name}: {alike:,} names differ only in upper and lower case or in how accents are written")
    for reason, number in sorted(left_out.items()):
        shown = f", such as {examples[reason]!r}" if reason in examples else ""
        print(f"unpack: {archive.name}: {number:,} left out ({reason}{shown})")
    print(f"unpack: {archive.name}: {len(written):,} files, {size / MB:,.1f} MB")
    return {"files": len(written), "bytes": size, "left_out": dict(sorted(left_out.items()))}


def _safe(name: str, archive: Path) -> str:
    """The name, if it stays inside the folder. Raises DataError for one that does not."""
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/") or "\0" in name:
        raise DataError(f"{archive}: the member {name!r} would be written outside the folder; the archive is not to be trusted")
    return name


def _write(member: _Member, path: Path, archive: Path, other: str | None, progress: Callable[[], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if other is not None and path.exists():  # this file system takes both names for one
            raise DataError(f"{archive}: {other!r} and {member.name!r} are one name on this file system; unpack it on another")
        with member.open() as source, path.open("wb") as stream:
            left = member.size
            while chunk := source.read(_CHUNK):
                stream.write(chunk)
                left -= len(chunk)
                if left < 0:
                    break
                progress()
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise DataError(f"{archive}: {member.name!r} is a file and a folder at once") from None
    if left:
        raise DataError(
            f"{archive}: {member.name!r} has another size than the {member.size:,} bytes announced. {_again(archive)}"
        )


def _check_limits(archive: Path, size: int, count: int, limits: Limits) -> None:
    packed = max(1, archive.stat().st_size)
    advice = "If you trust it, pass higher `limits` to fast_goal.data.archives.unpack."
    if size > limits.size:
        raise DataError(f"{archive} becomes more than {limits.size / MB:,.0f} MB (limit `size`). {advice}")
    if count > limits.files:
        raise DataError(f"{archive} has more than {limits.files:,} members (limit `files`). {advice}")
    if size > limits.ratio_from and size / packed > limits.ratio:
        raise DataError(
            f"{archive} of {packed / MB:,.3f} MB becomes more than {size / MB:,.0f} MB, {limits.ratio:g} times as much "
            f"(limit `ratio`): a decompression bomb. {advice}"
        )


def _check_free(archive: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{archive}: {needed / MB:,.1f} MB are to be unpacked to {folder.parent}, {free / MB:,.1f} MB are free. "
            "Free some space and run the same command again."
        )


def _again(archive: Path) -> str:
    mark = archive.with_name(f"{archive.name}.fetched.json")
    if not mark.exists():
        return "Replace it by a whole one and run the same command again."
    return f"Delete it and run the same command again, which downloads it anew: rm '{archive}' '{mark}'"


@contextmanager
def _opened(archive: Path, limits: Limits) -> Iterator[tuple[Iterator[_Member], Callable[[], None]]]:
    """The members, and what to call while they are read. Damage met in the block becomes a DataError."""
    with archive.open("rb") as raw:
        start = raw.read(512)
        raw.seek(0)
        total = archive.stat().st_size
        try:
            with Progress(f"unpack {archive.name}", total, "MB", scale=MB) as line:

                def progress() -> None:
                    line.update(max(0, min(raw.tell(), total) - line.done))

                if start[:4] in {b"PK\x03\x04", b"PK\x05\x06"}:
                    with zipfile.ZipFile(raw) as file:
                        yield _zip_members(file, archive, limits), progress
                else:
                    yield _tar_members(_Stream(_decompressed(raw, start, archive), raw, archive, limits), archive), progress
                line.update(total - line.done)
        except _DAMAGE as error:
            raise DataError(
                f"{archive} is damaged or incomplete ({error or type(error).__name__}). {_again(archive)}"
            ) from error
        except OSError as error:
            if error.errno is None:  # bz2 has no error of its own
                raise DataError(f"{archive} is damaged or incomplete ({error}). {_again(archive)}") from error
            raise


def _decompressed(raw: IO[bytes], start: bytes, archive: Path) -> _Source:
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if start.startswith(b"BZh"):
        return bz2.BZ2File(raw)
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(raw)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    if start[257:262] == b"ustar" or re.match(rb" *[0-7]+[ \0]", start[148:156]) or start == bytes(512):
        return raw
    found = "it is empty" if not start else f"it starts with {start[:16]!r}"
    raise DataError(f"{archive} is neither a zip nor a tar (plain, gz, bz2, xz, zst): {found}. {_again(archive)}")


class _Stream:
    """What tarfile reads from: forward only, within the limits, and no header may be read whole into memory if it is huge."""

    def __init__(self, source: _Source, raw: IO[bytes], archive: Path, limits: Limits):
        self._source, self._plain, self._archive, self._limits = source, source is raw, archive, limits
        self._position = 0
        self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_READ:
            raise DataError(f"{self._archive} has a header of {size:,} bytes; the archive is not to be trusted")
        chunks = []
        while size and (chunk := self._source.read(size)):  # a decompressor may give less than asked
            chunks.append(chunk)
            size -= len(chunk)
        data = b"".join(chunks)
        self._position += len(data)
        if not self._plain:
            _check_limits(self._archive, self._position, 0, self._limits)
        self.last = data
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < self._position:
            raise tarfile.ReadError(f"its members overlap at byte {position:,}")
        if self._plain:
            self._source.seek(position)  # type: ignore[attr-defined]
            self._position = position
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass
        return self._position


def _tar_members(stream: _Stream, archive: Path) -> Iterator[_Member]:
    with tarfile.TarFile(fileobj=stream, mode="r") as file:  # type: ignore[arg-type]
        while (info := file.next()) is not None:
            kind = (
                "file" if info.isreg() else "folder" if info.isdir() else "link" if info.islnk() or info.issym() else "device"
            )
            if kind in {"file", "folder"}:
                _safe(info.name, archive)
                tarfile.data_filter(info, str(archive.parent))
            yield _Member(info.name, info.size if kind == "file" else 0, kind, lambda info=info: file.extractfile(info))
            file.members.clear()  # tarfile would keep them all, 1 kB each
        # tarfile takes a broken header, and a missing end, for the end
        if len(stream.last) != tarfile.BLOCKSIZE or stream.last.strip(b"\0"):
            raise tarfile.ReadError("the end is missing")
        while stream.read(_CHUNK):  # the checksum of the compression comes after the end of the tar
            pass


def _zip_members(file: zipfile.ZipFile, archive: Path, limits: Limits) -> Iterator[_Member]:
    infos = file.infolist()
    _check_limits(archive, sum(info.file_size for info in infos), len(infos), limits)
    for info in infos:
        mode = info.external_attr >> 16
        kind = "link" if stat.S_ISLNK(mode) else "folder" if info.is_dir() else "file"
        if info.flag_bits & 1:
            raise DataError(
                f"{archive}: {info.filename!r} is encrypted. Ask the publisher for the password, unpack the archive by hand, "
                "and pack it again without one under the same name."
            )
        yield _Member(
            _zip_name(info), info.file_size if kind == "file" else 0, kind, lambda info=info: _zip_open(file, info, archive)
        )


def _zip_open(file: zipfile.ZipFile, info: zipfile.ZipInfo, archive: Path) -> IO[bytes]:
    try:
        return file.open(info)
    except NotImplementedError as error:
        raise DataError(f"{archive}: {info.filename!r}: {error}. Unpack the archive by hand and pack it again.") from None


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name. Many programs write UTF-8 without saying so, and zipfile then reads it as cp437."""
    name = info.orig_filename
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _move(source: Path, folder: Path, last: str) -> None:
    """Moves what is in `source` into `folder`, the file `last` at the end."""
    if not folder.exists():
        source.rename(folder)
        return
    replaced = _merge(source, folder, last)
    (source / last).replace(folder / last)
    if replaced:
        print(f"unpack: {folder}: {replaced:,} files were there already and were replaced")


def _merge(source: Path, folder: Path, last: str) -> int:
    replaced = 0
    for path in sorted(source.iterdir()):
        target = folder / path.name
        if path.is_dir() and target.exists():
            replaced += _merge(path, target, last)
        elif path.name != last:
            replaced += target.exists()
            path.replace(target)
    return replaced


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def disk_error(error: OSError, archive: Path, folder: Path) -> DataError:
    """What to say of an error met while writing the archive's files to `folder`."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        return DataError(
            f"the disk of {folder} is full ({free / MB:,.1f} MB free) while unpacking {archive}, which has "
            f"{archive.stat().st_size / MB:,.1f} MB packed. Free some space and run the same command again."
        )
    return DataError(f"{archive} cannot be unpacked to {folder}: {error}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The only one, of all processes, who writes this folder or file."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield
