"""A small HTTP server with faults, for tests that download: `with FileServer({"a.zip": data}) as server: server.url("a.zip")`.

It answers GET and HEAD, Range, If-Range and ETag as a file server does. `server.fault("a.zip", status=503, times=2)` makes
it misbehave; `server.requests` is what it was asked and how many bytes of each body it sent.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong with a path, in the next `times` requests that it applies to (None: in all).

    status: answer with it, with Retry-After if given. redirect: answer 302 to this URL or path. close_after: the
    connection breaks after so many bytes of a body that is longer. stall: (bytes, seconds) of silence in the body. length:
    the Content-Length that is sent. ranges=False: ranges are ignored. etag: instead of the true one ("" for none).
    content: other bytes than those of the file. headers: further ones. delay: seconds before the answer.
    """

    times: int | None = 1
    status: int | None = None
    retry_after: float | str | None = None
    redirect: str | None = None
    close_after: int | None = None
    stall: tuple[int, float] | None = None
    length: int | None = None
    ranges: bool = True
    etag: str | None = None
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class Request:
    """One request: path without the leading slash, `start` and `end` (inclusive) of its range, status, body bytes sent."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    start: int | None = None
    end: int | None = None
    status: int = 0
    sent: int = 0


class FileServer:
    """Serves a folder, or a mapping of paths to bytes, on 127.0.0.1; `files` may be changed while it runs."""

    def __init__(self, files: Path | Mapping[str, bytes]):
        self.files: Path | dict[str, bytes] = files if isinstance(files, Path) else dict(files)
        self.requests: list[Request] = []
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> FileServer:
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.base = f"http://{self.address}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str) -> str:
        """The address of a path."""
        return f"{self.base}/{quote(path)}"

    def fault(self, path: str, **how: object) -> None:
        """Adds a Fault for a path; several for one path follow one another."""
        with self._lock:
            self._faults.setdefault(path, []).append(Fault(**how))  # type: ignore[arg-type]

    def clear(self) -> None:
        """Forgets all faults and requests."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        """The requests for a path, in their order."""
        return [request for request in self.requests if request.path == path and request.method == method]

    def sent(self, path: str) -> int:
        """Body bytes sent for a path, over all requests that were answered with the file or a part of it."""
        return sum(request.sent for request in self.asked(path) if request.status in {200, 206})

    def read(self, path: str) -> bytes | None:
        """The bytes of a path, None if there is none."""
        if not isinstance(self.files, Path):
            return self.files.get(path)
        file = (self.files / path).resolve()
        return file.read_bytes() if file.is_file() and file.is_relative_to(self.files.resolve()) else None

    def next_fault(self, path: str) -> Fault:
        with self._lock:
            faults = self._faults.get(path, [])
            if not faults:
                return Fault()
            fault = faults[0]
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    faults.pop(0)
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    owner: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/")
        request = Request(self.command, path, parts.query, {key.lower(): value for key, value in self.headers.items()})
        self.owner.requests.append(request)
        fault = self.owner.next_fault(path)
        if fault.delay:
            self.owner._closing.wait(fault.delay)
        content = fault.content if fault.content is not None else self.owner.read(path)
        if fault.redirect is not None:
            self._plain(request, 302, {"Location": fault.redirect, **fault.headers})
        elif fault.status is not None:
            retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self._plain(request, fault.status, {**retry, **fault.headers}, body)
        elif content is None:
            self._plain(request, 404, {}, body)
        else:
            self._file(request, fault, content, body)

    def _plain(self, request: Request, status: int, headers: dict[str, str], body: bool = False) -> None:
        text = f"status {status}\n".encode()
        request.status = status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(text) if body else 0), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(text)

    def _file(self, request: Request, fault: Fault, content: bytes, body: bool) -> None:
        etag = fault.etag if fault.etag is not None else f'"{hashlib.md5(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")) if fault.ranges else None
        first, last, status = 0, len(content) - 1, 200
        if asked:
            request.start = int(asked[1])
            request.end = int(asked[2]) if asked[2] else None
            if request.headers.get("if-range", etag) == etag:
                if request.start >= len(content):
                    self._plain(request, 416, {"Content-Range": f"bytes */{len(content)}"}, body)
                    return
                first, status = request.start, 206
                last = min(last, last if request.end is None else request.end)
        chunk = content[first : last + 1]
        request.status = status
        self.send_response(status)
        headers = {"Content-Length": str(len(chunk) if fault.length is None else fault.length), **fault.headers}
        if etag:
            headers["ETag"] = etag
        if fault.ranges:
            headers["Accept-Ranges"] = "bytes"
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self._send(request, fault, chunk)
        if fault.length is not None:
            self.close_connection = True

    def _send(self, request: Request, fault: Fault, chunk: bytes) -> None:
        stop = len(chunk) if fault.close_after is None else min(len(chunk), fault.close_after)
        pause = fault.stall[0] if fault.stall else None
        while request.sent < stop:
            if pause is not None and request.sent >= pause:
                pause = None
                self.owner._closing.wait(fault.stall[1])  # type: ignore[index]
            step = min(1 << 16, stop - request.sent, pause - request.sent if pause is not None else 1 << 16)
            self.wfile.write(chunk[request.sent : request.sent + step])
            request.sent += step
        if stop < len(chunk):
            self.wfile.flush()
            time.sleep(0.05)  # a reset discards what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
