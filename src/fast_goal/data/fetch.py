"""Downloads that can be trusted: resumed, checked, fetched once, by every step and data set from one folder.

    path = fetch(Remote("https://example.org/images.tar.gz", file=None, sha256=None, size=None))

Files lie in `.fast_goal/downloads`, or in the folder of FAST_GOAL_DOWNLOADS. FAST_GOAL_MIRROR is a folder or an address that
is asked first for the file's name. A complete file has `<file>.fetched.json` beside it: its size, its SHA-256, and where it
came from. Addresses may be http(s)://, file://, a path, hf:// (token: HF_TOKEN), or any that fsspec has a driver for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from fast_goal.data import hub
from fast_goal.data.origins import Missing, Policy, Unreachable, open_source, shown
from fast_goal.data.transfer import MB, Session, Stopped, Transfer, check_room
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import digest, read_json, write_json

POLICY = Policy()
_DIGEST_NOTE = 1_000 * MB  # from this size on, reading a file for its checksum takes long enough to say so


@dataclass(frozen=True)
class Remote:
    """A file to download. `file`: its path below the downloads folder, null for the last part of `url`; two data sets with
    files of one name put a folder before it. `sha256` and `size` (bytes): as published, null where nothing is."""

    url: str
    file: str | None
    sha256: str | None
    size: int | None

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ConfigError(f"sha256 = {self.sha256!r} of {shown(self.url)}: expected 64 hexadecimal digits")
        if self.size is not None and self.size < 0:
            raise ConfigError(f"size = {self.size} of {shown(self.url)}: expected a number of bytes")
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or "\\" in self.name or "\0" in self.name or not path.name:
            raise ConfigError(f"file = {self.file!r} of {shown(self.url)}: expected a path below the downloads folder")

    @property
    def name(self) -> str:
        """The path below the downloads folder."""
        return self.file if self.file is not None else unquote(PurePosixPath(urlsplit(self.url).path).name)


class ManualStep(DataError):
    """A person has to do something first: `steps` in their order, then `place` must exist."""

    def __init__(self, what: str, steps: Sequence[str], place: Path | None = None):
        lines = [f"{what} needs something to be done by hand:"]
        lines += [f"  {number}. {step}" for number, step in enumerate(steps, 1)]
        if place is not None:
            lines.append(
                f"  {len(steps) + 1}. Put it at {place.absolute()} (FAST_GOAL_DOWNLOADS sets another downloads folder)."
            )
        lines.append("Then run the same command again: it goes on from here, and nothing that is done is done twice.")
        super().__init__("\n".join(lines))


class WrongDigest(DataError):
    """The file is not the one whose checksum is published."""


def downloads_folder() -> Path:
    """Where downloads lie: FAST_GOAL_DOWNLOADS, or `.fast_goal/downloads`."""
    return Path(os.environ.get("FAST_GOAL_DOWNLOADS") or ".fast_goal/downloads").expanduser()


def fetch(remote: Remote, folder: Path | None = None) -> Path:
    """The path of the complete, checked file; it is downloaded if it is not there. `folder`: instead of downloads_folder().

    Raises DataError with what to do: Missing (not there), Unreachable, ManualStep (a licence to accept), a wrong size or
    checksum, a full disk. What an interrupted download has brought is kept and continued.
    """
    return fetch_all([remote], folder, parallel=1)[0]


def fetch_all(remotes: Sequence[Remote], folder: Path | None = None, parallel: int = 4) -> list[Path]:
    """As `fetch`, several files at once, in the order of `remotes`. The first that fails ends the others, resumably."""
    folder = downloads_folder() if folder is None else folder
    wanted = {remote.name: remote for remote in remotes}
    for remote in remotes:
        if remote != wanted[remote.name]:
            raise ConfigError(
                f"{shown(remote.url)} and {shown(wanted[remote.name].url)} would both be {folder / remote.name}: "
                "set `file` of one of them to another path, such as <data set>/<name>"
            )
    missing = [remote for remote in wanted.values() if not _complete(folder / remote.name, remote)]
    if missing:
        _make(folder)
        check_room(folder, sum(_still(folder / remote.name, remote) for remote in missing), "what is to be downloaded")
        name = f"download {missing[0].name}" if len(missing) == 1 else f"download {len(missing)} files"
        with Session(name, POLICY) as session, ThreadPoolExecutor(max(1, parallel)) as pool:
            futures = [pool.submit(_fetch, remote, folder / remote.name, session) for remote in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also when the user interrupts
                if not all(future.done() and not future.cancelled() and not future.exception() for future in futures):
                    session.halt()
                    pool.shutdown(wait=False, cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if errors:
            raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
    return [folder / remote.name for remote in remotes]


def require_manual(place: str | Path, steps: Sequence[str], folder: Path | None = None) -> Path:
    """The path of a file or a filled folder that a person has to bring: `place` below the downloads folder.

    A file may also come from FAST_GOAL_MIRROR. Raises ManualStep with the numbered `steps` and the exact place.
    """
    path = (downloads_folder() if folder is None else folder) / place
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        return path
    if path.suffix and os.environ.get("FAST_GOAL_MIRROR"):
        with Session(f"download {path.name}", POLICY) as session, _locked(path):
            remote = Remote(path.name, str(place), None, None)
            if path.is_file() or _from_mirror(remote, path, session):
                return path
    raise ManualStep(Path(place).name, steps, path)


def _fetch(remote: Remote, target: Path, session: Session) -> None:
    """Brings one file. Another process that fetches it is waited for."""
    with _locked(target):
        if _complete(target, remote, tell=False):
            return
        if target.is_dir():
            raise DataError(f"{target} is a folder; {shown(remote.url)} is to be put there. Move it away, or set `file`.")
        if target.is_file() and not _mark(target).is_file():
            _adopt(target, remote)
        elif not _from_mirror(remote, target, session):
            _from_origin(remote, target, session)


def _from_origin(remote: Remote, target: Path, session: Session) -> None:
    by_hand = (
        f"\nOr bring the file {target.name} yourself: put it at {target.absolute()}, or into a folder or on a server "
        "that FAST_GOAL_MIRROR names."
    )
    try:
        if not remote.url.startswith("hf://"):
            _download(remote.url, {}, remote, remote.size, remote.sha256, target, session)
            return
        file = hub.resolve(remote.url)
        if remote.size is not None and file.size is not None and remote.size != file.size:
            raise DataError(
                f"{remote.url} has {file.size:,} bytes; {remote.size:,} are published. Correct `size` in params.yaml."
            )
        address = str(file.cached.absolute()) if file.cached else file.url
        _download(address, file.headers, remote, remote.size or file.size, remote.sha256 or file.sha256, target, session)
    except hub.NoAccess as error:
        steps = [
            f"Log in and accept the terms on {error.page}",
            f"Make a token that may read it, on {error.page.split('/', 3)[0]}//{urlsplit(error.page).netloc}/settings/tokens",
            "Set the environment variable HF_TOKEN to it",
        ]
        raise ManualStep(f"{target.name} ({error})", steps) from None
    except (Missing, Unreachable) as error:
        raise type(error)(f"{error}{by_hand}") from None


def _from_mirror(remote: Remote, target: Path, session: Session) -> bool:
    """Asks FAST_GOAL_MIRROR for the file's whole path and for its last part. False if there is no mirror or no file."""
    mirror = os.environ.get("FAST_GOAL_MIRROR", "").rstrip("/")
    if not mirror:
        return False
    is_folder = len(urlsplit(mirror).scheme) <= 1
    if is_folder and not Path(mirror).expanduser().is_dir():
        raise ConfigError(f"FAST_GOAL_MIRROR = {mirror!r} is no folder and no address")
    for name in dict.fromkeys([remote.name, PurePosixPath(remote.name).name]):
        address = f"{mirror}/{name if is_folder else quote(name)}"
        try:
            _download(address, {}, remote, remote.size, remote.sha256, target, session)
        except Missing:
            continue
        except Unreachable as error:
            print(f"fetch: the mirror fails: {error}")
            return False
        return True
    print(f"fetch: {shown(mirror)} (FAST_GOAL_MIRROR) does not have {remote.name}")
    return False


def _download(
    address: str, headers: dict[str, str], remote: Remote, size: int | None, sha256: str | None, target: Path, session: Session
) -> None:
    """From one address to the file with its mark, checked. A wrong checksum after a resumption gets a second chance."""
    part = target.with_name(f"{target.name}.part")
    _make(part.parent)
    with open_source(address, headers, session.policy, target.name) as source:
        transfer = Transfer(source, part, size, sha256 is not None, session)
        for second in (False, True):
            done, mixed = transfer.run(), transfer.resumed
            try:
                _check_size(part, done, size, shown(address))
                found = _digest(part)
                _check_digest(found, sha256, shown(address))
            except DataError as error:
                transfer.discard()
                if second or not mixed:
                    raise type(error)(f"{error} Nothing of it is kept: the same command fetches it anew.") from None
                print(f"fetch: {error}\nfetch: {target.name}: starting over, since it had been continued")
            else:
                break
        _mark(target).unlink(missing_ok=True)  # of an earlier release: a kill before the next lines may not leave it
        part.replace(target)
        transfer.finished()
    _write_mark(target, remote, shown(address), found, sha256 is not None, transfer.validator)


def _adopt(target: Path, remote: Remote) -> None:
    """A file without a mark: put there by hand, or by a process that was killed just before it wrote the mark."""
    fix = f"Delete it to have it downloaded from {shown(remote.url)}."
    try:
        _check_size(target, target.stat().st_size, remote.size, str(target))
        found = _digest(target)
        _check_digest(found, remote.sha256, str(target))
    except DataError as error:
        raise type(error)(f"{error} {fix}") from None
    print(f"fetch: {target} was there already")
    _write_mark(target, remote, "found in the folder", found, remote.sha256 is not None, None)


def _complete(target: Path, remote: Remote, tell: bool = True) -> bool:
    """Whether the file is there with a mark that fits. Tells of one that no longer fits: it will be fetched again.

    Raises DataError for a complete file of this name from another address, unless a checksum shows that it is the same: it
    may be that of another data set, and is not overwritten.
    """
    mark = _read_mark(target)
    if mark is None or not target.is_file():
        return False
    size, misfit = target.stat().st_size, ""
    same_address = _identity(remote) == (mark["url"], mark.get("query"))
    if size != mark["size"]:
        misfit = f"has {size:,} bytes, {mark['size']:,} when it was fetched"
    elif remote.sha256 is not None and remote.sha256.lower() != mark["sha256"]:
        misfit = f"has sha256 {mark['sha256']}, wanted is {remote.sha256.lower()}"
    elif remote.size is not None and remote.size != size:
        misfit = f"has {size:,} bytes, wanted are {remote.size:,}"
    elif same_address or remote.sha256 is not None:
        return True
    if not same_address:
        raise DataError(
            f"{target} was downloaded from {mark['url']}; now {shown(remote.url)} is wanted under this name. If it is another "
            f"file, set `file` to another path, such as <data set>/{target.name}. If the same file has moved, or is to be "
            f"fetched again, delete {_mark(target)} (the file is kept then) or both."
        )
    if tell:
        print(f"fetch: WARNING: {target} {misfit}; fetching it again")
    return False


def _identity(remote: Remote) -> tuple[str, str | None]:
    """The address without its secrets, and a digest of the query, which may be all that tells two files apart."""
    query = urlsplit(remote.url).query
    return shown(remote.url), digest(query) if query else None


def _still(target: Path, remote: Remote) -> int:
    """Bytes that will be needed, as far as known before anything is asked."""
    if remote.size is None or (target.is_file() and not _mark(target).is_file()):
        return 0
    part = target.with_name(f"{target.name}.part")
    there = part.stat().st_blocks * 512 if part.is_file() else 0  # parts leave holes
    return max(0, remote.size - there)


def _mark(target: Path) -> Path:
    return target.with_name(f"{target.name}.fetched.json")


def _read_mark(target: Path) -> dict[str, Any] | None:
    try:
        mark = read_json(_mark(target))
        return mark if {"url", "size", "sha256"} <= set(mark) else None
    except (OSError, ValueError, TypeError):
        return None


def _write_mark(target: Path, remote: Remote, origin: str, sha256: str, checked: bool, validator: str | None) -> None:
    size = target.stat().st_size
    values = {
        "url": _identity(remote)[0],
        "query": _identity(remote)[1],
        "from": origin,
        "size": size,
        "sha256": sha256,
        "checked": checked,  # false: nothing is published, the digest of the first download is recorded
        "validator": validator,
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        write_json(_mark(target), values)
    except OSError as error:
        raise DataError(
            f"{target} is complete, but {_mark(target)} cannot be written beside it ({error}). Free some space, or make the "
            "folder writable; the same command goes on from here."
        ) from None
    note = "as published" if checked else "recorded; nothing published to check it against"
    print(f"fetch: {target.name}: {size:,} bytes, sha256 {sha256} ({note})")


def _digest(path: Path) -> str:
    if path.stat().st_size >= _DIGEST_NOTE:
        print(f"fetch: {path.name}: computing the checksum of {path.stat().st_size / MB:,.0f} MB")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_size(path: Path, size: int, published: int | None, where: str) -> None:
    if published is not None and size != published:
        raise DataError(f"{where} has {size:,} bytes, published are {published:,}: it is incomplete or another release.")


def _check_digest(found: str, published: str | None, where: str) -> None:
    if published is not None and found != published.lower():
        raise WrongDigest(
            f"{where} has sha256 {found}, published is {published.lower()}: it is damaged or another release. "
            "For another release correct `sha256` in params.yaml."
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made ({error}). Set FAST_GOAL_DOWNLOADS to a folder that can be written."
        ) from None


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """The only one, of all processes that share the folder, who works on this file."""
    from filelock import FileLock, Timeout

    _make(target.parent)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"fetch: {target.name} is being fetched by another process; waiting for it")
        lock.acquire()
    except OSError as error:  # Timeout is one, too
        raise DataError(
            f"{target} cannot be written ({error}). Set FAST_GOAL_DOWNLOADS to a folder that can be, or `file` to another name."
        ) from None
    try:
        yield
    finally:
        lock.release()
