"""Where bytes come from: a web server, this machine, an object store. Each gives bytes from a position on.

A source says what tells its file from a successor of the same name (the validator: ETag, date, size and time), refuses to
continue another file, and sorts its failures into those worth another try (Retryable) and those that a person must mend.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from fast_goal.errors import DataError, TemporaryError

_CHUNK = 1 << 20  # bytes per read of a file; HTTP brings its own


@dataclass(frozen=True)
class Policy:
    """How patient a download is. Seconds and bytes; the values are guesses that suit large files on a home connection.

    attempts: failures in a row that bring no new byte. parts: of one file, from `parts_from` bytes on.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_retry_after: float = 900.0
    connect_timeout: float = 20.0
    read_timeout: float = 60.0
    parts: int = 4
    parts_from: int = 64 << 20


class Missing(DataError):
    """The address answers, and the file is not there."""


class Unreachable(DataError, TemporaryError):
    """The address did not deliver, however often it was asked."""


class Retryable(Exception):
    """Worth another try, after `wait` seconds if the server said so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Restart(Exception):
    """What is there cannot be continued."""


@dataclass
class Reply:
    """Bytes from `start` on. `total`: of the whole file; `validator`: what tells this file from its successor."""

    start: int
    total: int | None
    validator: str | None
    ranges: bool
    chunks: Iterator[bytes]


class Source(Protocol):
    """Something to read bytes from. `open` raises Missing, DataError, Retryable or Restart."""

    url: str

    def open(self, start: int, end: int | None, validator: str | None) -> AbstractContextManager[Reply]: ...


def shown(url: str) -> str:
    """The address for messages and files: without user name, password and query, where secrets may be."""
    parts = urlsplit(url)
    if not parts.scheme:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="…" if parts.query else "", fragment="").geturl()


def open_source(url: str, headers: Mapping[str, str], policy: Policy, name: str) -> AbstractContextManager[Source]:
    """The source of an address: http(s), file:// or a path, or any scheme that fsspec has a driver for."""
    scheme = urlsplit(url).scheme.lower()
    if scheme in {"http", "https"}:
        return _open_http(url, headers, policy, name)
    if scheme == "file":
        return _always(LocalSource(url, Path(url2pathname(unquote(urlsplit(url).path)))))
    if len(scheme) <= 1:  # a path; one letter is a drive
        return _always(LocalSource(url, Path(url)))
    return _always(DriverSource(url, scheme))


@contextmanager
def _always(source: Source) -> Iterator[Source]:
    yield source


class LocalSource:
    """A file of this machine."""

    def __init__(self, url: str, path: Path):
        self.url, self.path = url, path.expanduser()

    @contextmanager
    def open(self, start: int, end: int | None, validator: str | None) -> Iterator[Reply]:
        if not self.path.is_file():
            raise Missing(f"{self.path} is no file")
        try:
            stream = self.path.open("rb")
        except PermissionError:
            raise DataError(f"{self.path} cannot be read: permission denied") from None
        with stream:
            stat = os.fstat(stream.fileno())
            now = f"{stat.st_size}-{stat.st_mtime_ns}"
            if validator is not None and validator != now:
                raise Restart(f"{self.path} changed")
            yield Reply(start, stat.st_size, now, False, _chunks(stream, start))


class DriverSource:
    """A file of an object store, through fsspec."""

    def __init__(self, url: str, scheme: str):
        import fsspec

        self.url = url
        try:
            self._files, self._path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise DataError(
                f"{shown(url)}: no driver for {scheme}://. {error}: `pip install` it into this environment"
            ) from None
        except ValueError as error:
            raise DataError(
                f"{shown(url)}: {scheme}:// is not known ({error}); known are http, https, file, hf and fsspec's"
            ) from None

    @contextmanager
    def open(self, start: int, end: int | None, validator: str | None) -> Iterator[Reply]:
        try:
            info = self._files.info(self._path)
            now = str(self._files.ukey(self._path))
            stream = self._files.open(self._path, "rb")
        except FileNotFoundError:
            raise Missing(f"{shown(self.url)} is not there") from None
        except PermissionError as error:
            raise DataError(f"{shown(self.url)}: no access ({error}). Check the credentials of the driver.") from None
        except Exception as error:  # every driver has errors of its own
            raise Retryable(f"{type(error).__name__}: {error}") from error
        with closing(stream):
            if validator is not None and validator != now:
                raise Restart(f"{shown(self.url)} changed")
            yield Reply(start, info.get("size"), now, True, _chunks(stream, start))


def _chunks(stream: BinaryIO, start: int) -> Iterator[bytes]:
    try:
        stream.seek(start)
        while chunk := stream.read(_CHUNK):
            yield chunk
    except Exception as error:  # as above
        raise Retryable(f"{type(error).__name__}: {error}") from error


@contextmanager
def _open_http(url: str, headers: Mapping[str, str], policy: Policy, name: str) -> Iterator[Source]:
    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # its INFO lines hold whole addresses, with their secrets
    timeout = httpx.Timeout(policy.read_timeout, connect=policy.connect_timeout, pool=None)
    with httpx.Client(follow_redirects=True, timeout=timeout, headers={"Accept-Encoding": "identity", **headers}) as client:
        yield HttpSource(url, client, policy, name)


class HttpSource:
    """A file of a web server. httpx leaves out the Authorization header when a redirect leads to another host."""

    def __init__(self, url: str, client: Any, policy: Policy, name: str):
        self.url, self._client, self._policy, self._name = url, client, policy, name

    @contextmanager
    def open(self, start: int, end: int | None, validator: str | None) -> Iterator[Reply]:
        import httpx

        headers = {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
            if validator is not None:
                headers["If-Range"] = validator
        try:
            with self._client.stream("GET", self.url, headers=headers) as response:
                yield self._reply(response, start, bool(headers), validator)
        except httpx.TimeoutException as error:
            raise Retryable(f"no answer in time ({type(error).__name__})") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise DataError(f"{shown(self.url)} cannot be downloaded: {error}. Correct `url` in params.yaml.") from None
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise DataError(
                    f"{shown(self.url)}: the server's certificate cannot be verified ({error}). "
                    "Behind a company proxy, set SSL_CERT_FILE to its certificate."
                ) from None
            raise Retryable(f"the connection broke ({error or type(error).__name__})") from error

    def _reply(self, response: Any, start: int, ranged: bool, validator: str | None) -> Reply:
        status, headers = response.status_code, response.headers
        if status == 416 and headers.get("content-range") == "bytes */0" and start == 0:
            return Reply(0, 0, None, False, iter(()))  # an empty file has no first byte to give
        if status not in {200, 206}:
            raise self._refusal(status, headers)
        tag, now = headers.get("etag", ""), headers.get("last-modified")
        if tag and not tag.startswith("W/"):  # a weak tag may not be used with If-Range
            now = tag
        kind, suffix = headers.get("content-type", ""), Path(self._name).suffix.lower()
        if kind.startswith("text/html") and suffix not in {"", ".html", ".htm"}:
            raise DataError(
                f"{shown(self.url)} answers with a web page instead of {self._name}: a login, a licence or a virus-scan "
                "warning to click through. Open it in a browser and save the file by hand."
            )
        if status == 200:
            if ranged and (start or validator is not None):
                changed = validator is not None and now != validator
                raise Restart("the file on the server changed" if changed else "the server cannot continue a download")
            length = headers.get("content-length", "")
            return Reply(0, int(length) if length.isdigit() else None, now, False, response.iter_raw())
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", ""))
        if not found or int(found[1]) != start:
            raise Restart(f"the server was asked for bytes from {start:,} on and sent {headers.get('content-range')!r}")
        return Reply(start, None if found[2] == "*" else int(found[2]), now, True, response.iter_raw())

    def _refusal(self, status: int, headers: Any) -> Exception:
        url = shown(self.url)
        if status in {408, 425, 429} or (status >= 500 and status not in {501, 505}):
            asked = _retry_after(headers.get("retry-after", ""))
            if asked is not None and asked > self._policy.longest_retry_after:
                return Unreachable(f"{url} answers {status} and asks to come back in {asked:,.0f} s. Try again then.")
            return Retryable(f"the server answers {status}", asked)
        if status == 416:
            return Restart("the file on the server is shorter now")
        if status in {404, 410}:
            return Missing(
                f"{url} answers {status}: the file is not there (any more). Set `url` in params.yaml to its new place."
            )
        if status in {401, 403}:
            return DataError(
                f"{url} answers {status}: no access. Either it needs a login or an accepted licence, or its link has expired: "
                f"get a new link for `url` in params.yaml, or download it in a browser."
            )
        return DataError(f"{url} answers {status}, which is not a file. Correct `url` in params.yaml.")


def _retry_after(text: str) -> float | None:
    """Seconds from a Retry-After header, which is a number or a date."""
    if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
