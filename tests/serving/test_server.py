"""`fast-goal serve` as a process of its own, asked over HTTP."""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from serving_project import registered
from small_project import tiny_clip

from fast_goal.errors import ModelError
from fast_goal.tracking.contents import Access
from fast_goal.tracking.pyfunc import Embedder

CARD = "# Model card\n\n## Licence\n\nFree for all.\n\n## More\n\nText.\n"


def picture(color="red", size=(90, 60)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def encoded(color="red"):
    return base64.b64encode(picture(color)).decode()


@pytest.fixture(scope="module")
def project(tmp_path_factory, empty_store):
    """A folder with a registered model, the current one of this module."""
    folder = tmp_path_factory.mktemp("project")
    with registered(folder, empty_store, tiny_clip(1), CARD, {"git_commit": "abc"}):
        (folder / "photos").mkdir()
        (folder / "photos/red.png").write_bytes(picture())
        (folder / "secret.png").write_bytes(picture())
        yield folder


class Server:
    """A running `fast-goal serve`."""

    def __init__(self, *options, log):
        self.log = log
        command = [sys.executable, "-m", "fast_goal", "serve", "--port", "0", *options]
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ})
        deadline = time.monotonic() + 240
        while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)/invocations", log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])

    def ask(self, path, body=None, **headers):
        """(status, parsed JSON) of GET, or of POST where there is a body."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def rows(self, *rows, **params):
        return self.ask("/invocations", {"dataframe_records": rows, **({"params": params} if params else {})})

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(project):
    options = ["--model", "models:/fast-goal@candidate", "--image-root", "photos", "--max-rows", "20", "--max-megabytes", "1"]
    running = Server(*options, log=project / "server.log")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="module")
def embedder(project):
    return Embedder(tiny_clip(1).eval(), Access())


def test_health_version_and_metadata(server, project):
    assert server.ask("/health") == server.ask("/ping") == (200, {"status": "ready"})
    status, about = server.ask("/metadata")
    assert status == 200
    assert (about["model"], about["version"], about["aliases"]) == ("fast-goal", 1, ["candidate"])
    assert about["digest"] == about["tags"]["model_digest"] and about["git_commit"] == "abc"
    assert about["licence"] == "Free for all."
    assert (about["context_length"], about["embedding_width"], about["image_size"], about["view"]) == (248, 16, 64, "crop")
    assert about["limits"] == {"rows": 20, "bytes": 1 << 20, "image_path": True, "image_url": False}
    assert str(project) not in json.dumps(about)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/version")
    assert re.fullmatch(r"\d+\.\d+.*", connection.getresponse().read().decode())


def test_texts_images_and_paths_in_every_form(server, embedder):
    texts = ["A red kite flies over a green field.", "word " * 400]
    wanted = embedder.predict(pd.DataFrame({"text": texts}))["embedding"].tolist()
    status, made = server.rows(*({"text": text} for text in texts))
    assert status == 200 and [row["embedding"] for row in made["predictions"]] == wanted
    assert made["warnings"] == ["1 of 2 texts (50.0 %) are longer than the model's 248 tokens and were cut off."]
    for form in (
        {"dataframe_split": {"columns": ["text"], "data": [[text] for text in texts]}},
        {"instances": [{"text": text} for text in texts]},
        {"inputs": {"text": texts}},
    ):
        assert server.ask("/invocations", form) == (200, made)
    wanted = embedder.predict(pd.DataFrame({"image": [picture()] * 2}))["embedding"].tolist()
    status, made = server.rows({"image": encoded()}, {"image_path": "red.png"})
    assert status == 200 and [row["embedding"] for row in made["predictions"]] == wanted and "warnings" not in made


def test_scores(server, embedder):
    status, made = server.rows({"text": "a kite"}, {"image": encoded()}, {"text": "a field"}, output="scores")
    assert status == 200
    [one] = made["predictions"]
    vectors = embedder.predict(pd.DataFrame({"text": ["a kite", "a field", None], "image": [None, None, picture()]}))
    vectors = np.array(vectors["embedding"].tolist())
    assert one["row"] == 1 and one["text_rows"] == [0, 2]
    np.testing.assert_allclose(one["scores"], vectors[:2] @ vectors[2], atol=1e-6)


def test_wrong_rows_get_the_reason(server, project):
    rows = {
        "not base64": {"image": "photos/red.png"},
        "has text and image": {"text": "a", "image": encoded()},
        "not below the folder": {"image_path": "../secret.png"},
        "there is no such file": {"image_path": "none.png"},
        "URLs are not fetched here": {"image_url": "http://127.0.0.1/red.png"},
        "neither text nor image": {"text": ""},
        "not a text": {"text": ["a"]},
        "truncated": {"image": base64.b64encode(picture()[:60]).decode()},
    }
    status, answer = server.rows(*rows.values())
    lines = answer["message"].splitlines()
    assert status == 400 and answer["error_code"] == "BAD_REQUEST" and len(lines) == len(rows)
    for row, (reason, line) in enumerate(zip(rows, lines, strict=True)):
        assert line.startswith(f"row {row}: ") and reason in line
    for telling in (str(project), "Traceback", "/tmp", ".py"):
        assert telling not in json.dumps(answer)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"not json", r"not JSON: Expecting value \(line 1, column 1\)"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "expected a JSON object with one of .* found list"),
        ({}, r"found the fields \[\]"),
        ({"text": ["a"]}, r"found the fields \['text'\]"),
        ({"inputs": {"text": ["a"]}, "instances": []}, "with one of"),
        ({"dataframe_records": {"text": "a"}}, "expected a list of objects"),
        ({"dataframe_records": ["a"]}, "expected a list of objects"),
        ({"dataframe_records": []}, "no rows"),
        ({"dataframe_records": [{}]}, "unknown columns"),
        ({"dataframe_records": [{"caption": "a"}]}, r"unknown columns \['caption'\]"),
        ({"dataframe_records": [{"text": "a"}] * 21}, "row 20: too many rows: 21"),
        ({"dataframe_split": {"columns": ["text"], "data": [["a", "b"]]}}, "same length"),
        ({"dataframe_split": {"columns": ["text", "text"], "data": [["a", "b"]]}}, "same length"),
        ({"dataframe_split": [1]}, "same length"),
        ({"inputs": {"text": "a"}}, "object of lists"),
        ({"inputs": {"text": ["a"], "image": []}}, "different lengths"),
        ({"inputs": {"text": ["a"]}, "params": {"output": "cosines"}}, "expected embedding or scores"),
        ({"inputs": {"text": ["a"]}, "params": {"outputs": "scores"}}, "some of output, mode, top_k and nothing else"),
        ({"inputs": {"text": ["a"]}, "params": [1]}, "some of output, mode, top_k and nothing else"),
        ({"inputs": {"text": ["a"]}, "params": {"output": "scores", "mode": "conditioned"}}, "has no text-conditioned pooling"),
        ({"inputs": {"text": ["a"]}, "params": {"output": "scores"}}, "at least one of each"),
    ],
)
def test_wrong_requests_get_the_reason(server, body, reason):
    status, answer = server.ask("/invocations", body)
    assert status == 400 and answer["error_code"] == "BAD_REQUEST" and re.search(reason, answer["message"]), answer


def test_other_refusals(server):
    status, answer = server.ask("/nothing")
    assert status == 404 and answer["error_code"] == "NOT_FOUND"
    assert server.ask("/invocations")[0] == 405
    assert server.ask("/invocations", b"text\na kite\n", **{"Content-Type": "text/csv"})[0] == 415
    status, answer = server.ask("/invocations", b" " * ((1 << 20) + 1))
    assert status == 413 and "larger than 1,048,576 bytes" in answer["message"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**12))  # refused without waiting for it
    connection.endheaders()
    assert connection.getresponse().status == 413
    head = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", server.port)) as leaving:  # the last test looks for its trace in the log
        leaving.sendall(head)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/metadata", headers={"Host": "evil.example"})  # a name that leads a browser here
    assert connection.getresponse().status == 400


def test_parallel_requests_get_what_single_ones_get(server):
    rows = [({"text": f"a kite number {number}"},) for number in range(20)]
    rows += [({"image": encoded(color)}, {"text": color}) for color in ("red", "green", "blue", "white")]
    alone = [server.rows(*one) for one in rows]
    assert all(status == 200 for status, _ in alone)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: server.rows(*one), rows))
    assert together == alone


def test_no_champion_and_no_model_say_what_there_is(project):
    from fast_goal.tracking.located import locate

    with pytest.raises(ModelError) as error:
        locate("models:/fast-goal@champion")
    for part in ("Aliases: candidate (version 1). Versions: 1.", "fast-goal gate", "--model models:/fast-goal@candidate"):
        assert part in str(error.value)
    with pytest.raises(ModelError, match=r"Versions: 1\. Or name another one"):
        locate("models:/fast-goal/7")
    with pytest.raises(ModelError, match=r"no model named other is registered at .* \(there is: fast-goal\)"):
        locate("models:/other@champion")


def test_a_taken_port_is_named(project):
    from fast_goal.operations.serve import Options, run

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = Options("models/finetune", "127.0.0.1", port, None, "", 10, 1, 1)
        with pytest.raises(Exception, match=f"--port {port} cannot be listened on: .*in use.* Choose another port"):
            run(options)


def test_mlflow_serves_the_same_model_alike(project, server):
    """The registered version behind MLflow's own server, in this process: the same request, the same predictions."""
    import mlflow
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    from fast_goal.tracking.server import tracking_uri

    mlflow.set_tracking_uri(tracking_uri())
    client = TestClient(init(mlflow.pyfunc.load_model("models:/fast-goal@candidate")))
    records = [{"text": "a kite"}, {"image": encoded()}]
    for params in ({}, {"params": {"output": "scores"}}):
        request = {"dataframe_records": records, **params}
        answer = client.post("/invocations", json=request)
        assert answer.status_code == 200, answer.text
        assert (200, answer.json()) == server.ask("/invocations", request)


# the last one: it ends the server
def test_sigterm_ends_it_within_seconds(server):
    with socket.create_connection(("127.0.0.1", server.port)):  # a client that keeps its connection and says nothing
        begin = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begin < 10
    log = server.log.read_text()
    assert "fast-goal serve: ended" in log and "Traceback" not in log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_wide_address_is_warned_of():
    from fast_goal.operations.serve import is_loopback

    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "server.example")))
