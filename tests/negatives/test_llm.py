"""The generator `llm` against a chat server on this machine: what is asked, taken, asked again and kept."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import chat_server
from chat_server import chat

from fast_goal.config import NEGATIVE_TYPES, NegativesConfig, build
from fast_goal.configure import CONF
from fast_goal.data import generation
from fast_goal.errors import ConfigError, ModelError
from fast_goal.negatives import Candidate, Made
from fast_goal.negatives.llm import KEY_VARIABLE, LanguageModel

SECTION = yaml.safe_load((CONF / "negatives/none.yaml").read_text()) | {"generator": "llm"}
CAPTION = "A red dog sits on a blue mat."
SWAP, REPLACE = "A red mat sits on a blue dog.", "A red cat sits on a blue mat."
TWO = ["swap_nouns", "replace_nouns"]


@pytest.fixture
def server():
    with chat_server.running() as running:
        running.answer = answer
        yield running


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return tmp_path


def asked(request: dict) -> tuple[str, list[str]]:
    """The caption and the types of a question."""
    caption = json.loads(re.findall(r"^Caption: (.*)$", request["text"], re.MULTILINE)[-1])
    return caption, re.findall(r"^- (\w+):", request["text"], re.MULTILINE)


def answer(request: dict, **values: object) -> tuple[int, dict, bytes]:
    """A good model: for each type a word in front of the caption."""
    caption, types = asked(request)
    return chat(json.dumps({kind: f"{kind}: {caption}" for kind in types} | values))


def objects(**values: object) -> tuple[int, dict, bytes]:
    return chat(json.dumps(values))


def config(url: str, server: dict | None = None, llm: dict | None = None, **values: object) -> NegativesConfig:
    fast = {"url": url, "retry_wait": 0.001, "timeout": 5, "concurrency": 2} | (server or {})
    model = {"kind": "server", "model": "chat-7b", "server": fast} | (llm or {})
    return build(
        NegativesConfig, SECTION | {"types": TWO, "per_caption": 2} | values | {"llm": SECTION["llm"] | model}, "negatives"
    )


def make(url: str, captions: list[str] | None = None, **values: object) -> Made:
    return LanguageModel(config(url, **values)).make(captions or [CAPTION])


def test_what_is_asked_and_what_comes_of_it(server):
    server.faults = [objects(swap_nouns=SWAP, replace_nouns=REPLACE)]
    generator = LanguageModel(config(server.url, llm={"max_new_tokens": 321, "temperature": 0.25}))
    made = generator.make([CAPTION])
    assert set(made.candidates[0]) == {Candidate(SWAP, "swap_nouns"), Candidate(REPLACE, "replace_nouns")}
    assert not made.reasons and generator.name == "llm: chat-7b"
    [request] = server.requests
    body = request["body"]
    assert request["path"] == "/v1/chat/completions" and asked(request) == (CAPTION, TWO)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("chat-7b", 321, 0.25) and body["seed"] < 1 << 31
    assert "Authorization" not in request["headers"]


def test_the_generator_is_found_by_its_name(server):
    from fast_goal.negatives import load_generator

    assert isinstance(load_generator(config(server.url)), LanguageModel)


def test_only_what_is_missing_is_asked_again_and_told_why(server):
    server.faults = [objects(swap_nouns=CAPTION, replace_nouns=REPLACE), objects(swap_nouns=SWAP)]
    made = make(server.url)
    assert {candidate.text for candidate in made.candidates[0]} == {SWAP, REPLACE}
    first, second = server.requests
    assert asked(second) == (CAPTION, ["swap_nouns"]) and "swap_nouns: the caption itself" in second["text"]
    assert json.dumps([REPLACE]) in second["text"], "what is there already is not wanted again"
    assert first["body"]["seed"] != second["body"]["seed"]
    assert "of its answers refused: the caption itself, 1 times" in made.notes


def test_a_second_attempt_is_never_the_likeliest_again(server):
    server.faults = [chat("")]
    make(server.url, llm={"temperature": 0.0})
    assert [request["body"]["temperature"] for request in server.requests] == [0.0, 0.7]


@pytest.mark.parametrize(
    "fault, reason",
    [
        (chat(""), "empty answer"),
        (chat(None, refusal="No."), "refused by the model"),
        (chat("I'm sorry, I can't assist with that."), "refused by the model"),
        (chat("What a lovely caption!"), "no JSON object"),
        (chat('{"swap_nouns": "A red', "length"), "cut off by max_new_tokens"),
        (objects(swap_nouns=CAPTION, replace_nouns=CAPTION), "the caption itself"),
        ((400, {}, b"too long"), "refused by the server"),
        ((500, {}, b""), "status 500"),
    ],
)
def test_a_caption_without_any_has_a_counted_reason(server, fault, reason):
    server.answer = lambda request: fault if asked(request)[0] == CAPTION else answer(request)
    made = make(server.url, [CAPTION, "A cat sleeps.", ""])
    assert made.reasons == {0: reason, 2: "empty caption"}
    assert [len(candidates) for candidates in made.candidates] == [0, 2, 0]
    count = {"refused by the server": 1}.get(reason, 3)
    assert sum(asked(request)[0] == CAPTION for request in server.requests) == count
    assert any(note.startswith(f"of its answers refused: {reason}, ") for note in made.notes)


def test_what_the_caption_does_not_allow_is_not_asked_again(server):
    server.answer = lambda request: objects(swap_nouns=None, replace_nouns=None)
    made = make(server.url)
    assert made.candidates == [[]] and made.reasons == {0: "no type fits the caption"} and len(server.requests) == 1


def test_as_many_as_are_wanted_one_of_each_type_first(server):
    def numbered(request):
        caption, types = asked(request)
        return chat(json.dumps({kind: [f"{kind} {len(server.requests)}: {caption}"] for kind in types}))

    server.answer = numbered
    captions = [f"A dog and {number} red cats sit on a mat." for number in range(30)]
    [found] = make(server.url, captions[:1], per_caption=5).candidates
    assert len(found) == 6 and len({candidate.text for candidate in found}) == 6 and len(server.requests) == 3
    assert [found[place].type != found[place + 1].type for place in (0, 2, 4)] == [True] * 3
    every = make(server.url, captions, types=list(NEGATIVE_TYPES), per_caption=4).candidates
    assert all(len(candidates) == 5 for candidates in every)
    assert {candidates[-1].type for candidates in every} == set(NEGATIVE_TYPES), (
        "else one type would always be the one too many"
    )


def test_said_twice_counts_once(server):
    server.answer = lambda request: objects(swap_nouns=SWAP, replace_nouns=SWAP.upper())
    [found] = (made := make(server.url)).candidates
    assert [candidate.text for candidate in found] == [SWAP]
    assert "of its answers refused: said twice, 5 times" in made.notes


def test_a_long_caption_is_changed_in_a_few_sentences(server):
    sentences = [f"The red dog number {number} sits on a blue mat." for number in range(1_000)]
    caption = " ".join(sentences)
    made = make(server.url, [caption], types=list(NEGATIVE_TYPES), per_caption=5)
    [request], [found] = server.requests, made.candidates
    part, _ = asked(request)
    assert part in caption and 20 < len(part.split()) < 80 and len(found) == 5
    for candidate in found:
        changed = f"{candidate.type}: {part}"
        assert candidate.text == caption.replace(part, changed[0].upper() + changed[1:], 1)
    # another attempt is about other sentences
    server.requests.clear()
    server.answer = lambda request: chat("")
    assert not make(server.url, ["Then. " + caption]).candidates[0]
    assert len({asked(request)[0] for request in server.requests}) == 2


def test_each_caption_gets_the_same_whatever_the_others_are(server):
    captions = [f"The dog number {number} sits on a blue mat." for number in range(6)]

    def model(request):  # what it says depends on the question and the seed
        return answer(request, swap_nouns=f"{asked(request)[0]} {request['body']['seed']}")

    server.answer = model
    together = make(server.url, captions).candidates
    for store in Path(".fast_goal/negatives").iterdir():
        store.unlink()
    assert make(server.url, captions[::-1]).candidates == together[::-1]
    for store in Path(".fast_goal/negatives").iterdir():
        store.unlink()
    assert make(server.url, captions[2:3]).candidates == together[2:3]
    assert make(server.url, captions[2:3], seed=1).candidates != together[2:3]


def test_nothing_is_asked_twice(server, monkeypatch):
    captions = ["A dog.", "A cat.", CAPTION]
    first = make(server.url, captions)
    assert len(server.requests) == 3
    monkeypatch.setattr("fast_goal.negatives.llm.load_writer", lambda _: pytest.fail("the model was loaded"))
    again = make("http://127.0.0.1:9/v1", captions)
    assert again.candidates == first.candidates and "0 questions asked now, 3 answers known before" in again.notes[0]


def _make_in_folder(folder: str, url: str, captions: list[str]) -> None:
    os.chdir(folder)
    make(url, captions)


def test_a_killed_run_goes_on_where_it_stopped(server, project):
    captions = [f"Dog {number} sits on a mat." for number in range(30)]
    server.delay = 0.05
    process = multiprocessing.get_context("fork").Process(target=_make_in_folder, args=(str(project), server.url, captions))
    process.start()
    deadline = time.monotonic() + 60
    while len(server.requests) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time.sleep(0.1)  # what was under way when it died
    before = len(server.requests)
    [store] = Path(".fast_goal/negatives").glob("*.sqlite")
    with sqlite3.connect(store) as connection:
        kept = connection.execute("SELECT count(*) FROM answers").fetchone()[0]
    assert 10 <= before < 30 and before - 5 <= kept <= before
    server.delay = 0.0
    assert all(len(candidates) == 2 for candidates in make(server.url, captions).candidates)
    assert len(server.requests) == before + 30 - kept


def test_a_server_that_goes_away_stops_the_run_and_keeps_what_it_said(server):
    captions = [f"Dog {number} sits on a mat." for number in range(12)]
    server.answer = lambda request: answer(request) if len(server.requests) <= 6 else (401, {}, b"go away")
    with pytest.raises(ModelError, match=f"401: the key in the environment variable {KEY_VARIABLE} is missing"):
        make(server.url, captions, server={"concurrency": 1})
    server.answer = answer
    made = make(server.url, captions)
    assert "6 questions asked now, 6 answers known before" in made.notes[0]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(ModelError, match=rf"negatives\.llm\.server\.url = '{url}'.*no connection.*answers so far are kept"):
        make(url, ["Another."])


def test_what_is_under_way_when_the_run_stops_is_kept(server):
    def model(request):
        if "slow" not in request["text"]:
            return 401, {}, b"go away"
        time.sleep(0.3)
        return answer(request)

    server.answer = model
    captions = ["A slow dog.", "A quick dog."]
    with pytest.raises(ModelError, match="401"):
        make(server.url, captions)
    server.answer = answer
    assert "1 questions asked now, 1 answers known before" in make(server.url, captions).notes[0]


def test_a_model_that_always_fails_stops_the_run(server, monkeypatch):
    monkeypatch.setattr(generation.asking, "FAILURES_IN_A_ROW", 5)
    server.answer = lambda request: (400, {}, b"unknown field seed")
    with pytest.raises(ModelError, match=r"chat-7b failed for \d captions in a row .*status 400: unknown field seed"):
        make(server.url, [f"Dog {number}." for number in range(40)])
    assert len(server.requests) < 20


def test_what_may_pass_is_asked_again(server):
    server.faults = [(429, {"Retry-After": "0.2"}, b""), (200, {}, b"<html>"), 1.5]
    made = make(server.url, server={"timeout": 1.0}, llm={"attempts": 4})
    assert len(made.candidates[0]) == 2
    times = [request["time"] for request in server.requests]
    assert len(times) == 4 and times[1] - times[0] >= 0.2
    notes = [note for note in made.notes if note.startswith("asked again")]
    assert len(notes) == 3 and all(note.endswith("1 times") for note in notes)


def test_requests_run_side_by_side(server):
    server.delay = 0.05
    make(server.url, [f"Dog {number}." for number in range(12)], server={"concurrency": 4})
    assert server.most_busy == 4


def test_the_key_is_sent_to_this_server_only_and_stands_nowhere(server, monkeypatch, capfd, caplog):
    monkeypatch.setenv(KEY_VARIABLE, "sk-very-secret")
    monkeypatch.setenv("FAST_GOAL_CAPTION_API_KEY", "sk-another-secret")
    caplog.set_level("DEBUG")
    make(server.url)
    assert server.requests[0]["headers"]["Authorization"] == "Bearer sk-very-secret"
    with chat_server.running() as other:
        server.faults = [(307, {"Location": f"{other.url}/chat/completions"}, b"")]
        with pytest.raises(ModelError, match="307") as error:
            make(server.url, ["A dog."])
        assert not other.requests
    with pytest.raises(ConfigError, match=rf"negatives\.llm\.server\.url.*the key of {KEY_VARIABLE}.*in clear"):
        make("http://example.org/v1", ["A dog."])
    kept = b"".join(path.read_bytes() for path in Path(".fast_goal").rglob("*") if path.is_file())
    assert "secret" not in "".join([*capfd.readouterr(), caplog.text, str(error.value)]) and b"secret" not in kept


def test_the_answers_of_other_settings_are_not_taken(server):
    base = config(server.url)
    LanguageModel(base).make([CAPTION])
    llm = base.llm
    same = [
        dataclasses.replace(base, llm=dataclasses.replace(llm, server=dataclasses.replace(llm.server, concurrency=1))),
        dataclasses.replace(base, llm=dataclasses.replace(llm, attempts=9)),
        dataclasses.replace(base, captions="short"),
    ]
    for other in same:
        LanguageModel(other).make([CAPTION])
    assert len(server.requests) == 1
    others = [
        dataclasses.replace(base, llm=dataclasses.replace(llm, model="chat-8b")),
        dataclasses.replace(base, llm=dataclasses.replace(llm, temperature=0.1)),
        dataclasses.replace(base, llm=dataclasses.replace(llm, max_new_tokens=99)),
        dataclasses.replace(base, types=TWO[:1], per_caption=1),
        dataclasses.replace(base, seed=5),
    ]
    for place, other in enumerate(others):
        LanguageModel(other).make([CAPTION])
        assert len(server.requests) == 2 + place
