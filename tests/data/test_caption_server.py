"""The captioner `server` against a server on this machine that plays every fault."""

import dataclasses
import json
import socket
import time
from email.utils import formatdate

import chat_server
import pytest
import yaml
from chat_server import chat
from PIL import Image

from fast_goal.config import build
from fast_goal.configure import CONF
from fast_goal.data.captioning import Answer, CaptionerConfig, Failure, load_captioner
from fast_goal.data.captioning.server import KEY_VARIABLE
from fast_goal.data.generation.server import LONGEST_WAIT, _retry_after
from fast_goal.errors import ConfigError, ModelError

WHERE = "download.datasets.glit"
SECTION = yaml.safe_load((CONF / "dataset/captioned.yaml").read_text())["download"]["datasets"]["glit"]["captioner"]
RED, PICTURE = (200, 30, 40), Image.new("RGB", (80, 40), (200, 30, 40))
USUAL = Answer("The picture is 80 wide. Its colour is 200, 30, 40.", "stop", "fake-vlm-1")
DOWN = (500, {}, b'{"error": "worker died"}')


@pytest.fixture
def server():
    with chat_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def ask(url: str, picture: Image.Image = PICTURE, prompt: str = "Describe.", **values: object):
    """(result, notes) of one image."""
    section = {"url": url, "retry_wait": 0.001, "attempts": 4, "timeout": 5}
    captioner_values = {key: values.pop(key) for key in list(values) if key in SECTION}
    section = SECTION | {"kind": "server", "model": "vlm", **captioner_values, "server": SECTION["server"] | section | values}
    captioner = load_captioner(build(CaptionerConfig, section, f"{WHERE}.captioner"), prompt, WHERE)
    try:
        return captioner.caption([picture])[0], captioner.notes()
    finally:
        captioner.close()


def test_what_is_sent(server):
    prompt = "wörd " * 10_000
    result, notes = ask(server.url, Image.new("RGB", (3000, 1500), RED), prompt, max_side=1024, max_new_tokens=77)
    assert result == dataclasses.replace(USUAL, text=USUAL.text.replace("80", "1024", 1)) and not notes
    [request] = server.requests
    assert (request["path"], request["size"], request["format"]) == ("/v1/chat/completions", (1024, 512), "JPEG")
    assert request["kind"] == "data:image/jpeg;base64"
    body = request["body"]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("vlm", 77, 0.0)
    assert body["messages"][0]["content"][1] == {"type": "text", "text": prompt}
    assert "Authorization" not in request["headers"]


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_odd_sizes(server, size):
    result, _ = ask(server.url, Image.new("RGB", size, RED))
    assert isinstance(result, Answer) and max(server.requests[0]["size"]) <= 1024


@pytest.mark.parametrize(
    "faults, reasons",
    [
        ([DOWN, DOWN], ["status 500, 2"]),
        ([(429, {}, b"slow down"), (503, {}, b"")], ["status 429, 1", "status 503, 1"]),
        ([(200, {}, b"<html>"), (200, {}, b'{"choices": []}'), (200, {}, b"[1]")], ["unreadable answer, 3"]),
        ([(200, {}, json.dumps({"choices": [{"message": {"content": 5}}]}).encode())], ["unreadable answer, 1"]),
        ([(200, {"Content-Length": "9999", "Connection": "close"}, b'{"choices": [')], ["connection lost, 1"]),
        ([chat(""), chat(None), chat(" \n")], ["empty answer, 3"]),
        ([chat("I'm sorry, but I can't assist with that.")], ["refused, 1"]),
        ([chat(None, refusal="No.")], ["refused, 1"]),
        ([chat("A", "content_filter")], ["refused, 1"]),
    ],
)
def test_what_passes_is_asked_again_and_counted(server, faults, reasons):
    server.faults = list(faults)
    result, notes = ask(server.url, timeout=1)
    assert result == USUAL
    assert sorted(notes) == [f"asked again: {reason} times" for reason in reasons]
    assert len(server.requests) == len(faults) + 1


def test_a_slow_answer_is_asked_again(server):
    server.faults = [1.0]
    result, notes = ask(server.url, timeout=0.3)
    assert result == USUAL and notes == ["asked again: timeout, 1 times"]


def test_an_answer_that_trickles_is_not_waited_for(server):
    server.faults = [(200, {}, [b" "] * 80)]
    begin = time.monotonic()
    assert ask(server.url, timeout=0.6) == (USUAL, ["asked again: timeout, 1 times"])
    assert time.monotonic() - begin < 3, "4 s, if every byte began the time anew"


def test_an_answer_without_end_is_not_read(server, monkeypatch):
    monkeypatch.setattr("fast_goal.data.generation.server.LARGEST", 1 << 16)
    server.faults = [(200, {}, b" " * (1 << 18))]
    assert ask(server.url) == (USUAL, ["asked again: unreadable answer, 1 times"])


def test_retry_after_is_waited_for(server):
    server.faults = [(429, {"Retry-After": "0.4"}, b""), (503, {"Retry-After": "soon"}, b"")]
    assert ask(server.url)[0] == USUAL
    first, second, third = (request["time"] for request in server.requests)
    assert 0.4 <= second - first < 3 and third - second < 0.4


@pytest.mark.parametrize(
    "value, low, high",
    [("7", 7, 7), ("-3", 0, 0), ("1e9", LONGEST_WAIT, LONGEST_WAIT), ("nan", 0, 0), ("", 0, 0), ("tomorrow", 0, 0)],
)
def test_retry_after_as_a_number(value, low, high):
    assert low <= _retry_after({"retry-after": value}) <= high


def test_retry_after_as_a_date():
    assert 25 <= _retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30
    assert _retry_after({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0


def test_an_image_that_always_fails_is_the_only_one_lost(server):
    server.faults = [DOWN] * 4
    assert ask(server.url)[0] == Failure("status 500", 'status 500: {"error": "worker died"} (4 attempts)')
    server.faults = [(400, {}, b"image too small")]
    assert ask(server.url)[0] == Failure("refused by the server", "status 400: image too small")
    assert len(server.requests) == 5, "a 400 is not asked again"
    server.faults = [0.5] * 2
    assert ask(server.url, timeout=0.1, attempts=2)[0] == Failure("timeout", "no answer within 0.1 s (2 attempts)")


def test_what_the_model_really_says_is_kept(server):
    server.faults = [chat("As an AI, I see nothing.")] * 4
    assert ask(server.url)[0].text == "As an AI, I see nothing."
    server.faults = [chat("")] * 4
    assert ask(server.url)[0] == Answer("", "stop", "fake-vlm-1")
    server.faults = [chat("Half a sent", "length")]
    assert ask(server.url)[0] == Answer("Half a sent", "length", "fake-vlm-1")
    server.faults = [chat(None, refusal="No.")] * 4
    assert ask(server.url)[0] == Answer("No.", "refused", "fake-vlm-1")
    server.faults = [chat([{"type": "text", "text": "In "}, {"type": "text", "text": "parts."}])]
    assert ask(server.url)[0].text == "In parts."


def test_what_all_images_would_meet_stops_the_run(server, monkeypatch):
    for status, message in [(401, f"401.*{KEY_VARIABLE} is missing"), (404, r"404.*'vlm'.*\.model"), (307, "307")]:
        server.faults, before = [(status, {"Location": "http://127.0.0.1:1/"}, b"no")], len(server.requests)
        with pytest.raises(ModelError, match=message):
            ask(server.url)
        assert len(server.requests) == before + 1
    server.faults = [(429, {}, b"quota")] * 4
    with pytest.raises(ModelError, match=r"status 429: quota, 4 attempts\. The answers so far are kept"):
        ask(server.url)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(ModelError, match=rf"{url}.*no connection.*start or correct the server"):
        ask(url)


def test_the_key_is_sent_and_stands_nowhere(server, monkeypatch, capfd, caplog):
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")
    caplog.set_level("DEBUG")
    assert ask(server.url)[0] == USUAL
    assert server.requests[0]["headers"]["Authorization"] == "Bearer sk-very-secret"
    server.faults = [(401, {}, b"wrong key sk-very-secret")]
    with pytest.raises(ModelError, match="is refused") as error:
        ask(server.url)
    server.faults = [(400, {}, b"wrong key sk-very-secret")]
    failure, _ = ask(server.url)
    assert failure.detail.endswith("wrong key ***")
    printed = "".join([*capfd.readouterr(), caplog.text, str(error.value)])
    assert "secret" not in printed


@pytest.mark.parametrize(
    "url, message",
    [
        ("127.0.0.1:8000/v1", "expected http"),
        ("ftp://host/v1", "expected http"),
        ("http://localhost:port/v1", "expected http"),
        ("http://[::1/v1", "expected http"),
        ("https://a..b/v1", "expected http"),
        ("http://user:word@localhost/v1", KEY_VARIABLE),
        ("http://example.org/v1", "in clear"),
    ],
)
def test_an_address_that_cannot_be_used(url, message, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "key")
    with pytest.raises(ConfigError, match=rf"glit\.captioner\.server\.url.*{message}"):
        ask(url)


@pytest.mark.parametrize("key", ["sk-geheím", "sk-a\nsk-b"])
def test_a_key_that_no_header_can_hold(server, monkeypatch, key):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} holds a line break or a letter beyond ASCII") as error:
        ask(server.url)
    assert "sk-" not in str(error.value) and not server.requests


def test_an_answer_that_cannot_be_decoded_is_asked_again(server):
    server.faults = [(200, {"content-encoding": "gzip"}, b"not gzip at all")]
    assert ask(server.url) == (USUAL, ["asked again: connection lost, 1 times"])


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(server.url)[0] == USUAL


def test_pauses_grow(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: pauses.append(seconds) if seconds else None)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    server.faults = [DOWN] * 5
    ask(server.url, attempts=5, retry_wait=0.5)
    assert pauses == [0.5, 1.0, 2.0, 4.0]
