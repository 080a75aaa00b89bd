"""A server with OpenAI's chat interface for tests: it looks at the image or text it gets, and plays given faults."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def chat(text: object, finish: str = "stop", **message: object) -> tuple[int, dict, bytes]:
    """(status, headers, body) of a regular answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {}, json.dumps({"model": "fake-vlm-1", "choices": [choice]}).encode()


class ChatServer(ThreadingHTTPServer):
    """`faults`: answers given before the regular ones, in order; a number is a pause in seconds. A body that is a list is sent
    piece by piece, 0.05 s apart."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.faults: list[tuple[int, dict, bytes | list[bytes]] | float] = []
        self.requests: list[dict] = []  # body, headers, path, size and colour of the image or the text, time
        self.delay = 0.0
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    def answer(self, request: dict) -> tuple[int, dict, bytes]:
        red, green, blue = request["colour"]
        return chat(f"The picture is {request['size'][0]} wide. Its colour is {red}, {green}, {blue}.")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            status, headers, answer = self._answer(body)
        finally:
            with self.server.lock:
                self.server.busy -= 1
        try:
            self.send_response(status)
            pieces = answer if isinstance(answer, list) else [answer]
            for name, value in {"Content-Length": str(sum(map(len, pieces))), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for place, piece in enumerate(pieces):
                time.sleep(0.05 if place else 0)
                self.wfile.write(piece)
        except OSError:  # the client did not wait
            self.close_connection = True

    def _answer(self, body: dict) -> tuple[int, dict, bytes]:
        content = body["messages"][0]["content"]
        request = {"text": content} if isinstance(content, str) else _seen(content[0]["image_url"]["url"])
        request |= {"body": body, "headers": dict(self.headers), "path": self.path, "time": time.monotonic()}
        with self.server.lock:
            self.server.requests.append(request)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, float):
            time.sleep(fault)
            fault = None
        time.sleep(self.server.delay)
        return fault or self.server.answer(request)

    def log_message(self, *arguments: object) -> None:
        pass


def _seen(url: str) -> dict:
    kind, _, data = url.partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        colour = tuple(round(value / 5) * 5 for value in image.convert("RGB").resize((1, 1)).getpixel((0, 0)))
        return {"size": image.size, "colour": colour, "format": image.format, "kind": kind}


@contextmanager
def running() -> Iterator[ChatServer]:
    """A server on a free port of this machine."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
