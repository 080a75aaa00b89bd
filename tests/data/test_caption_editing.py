"""From answers to captions: each rule by itself, what is no caption, and the store that keeps the answers."""

import multiprocessing
import sqlite3

import pytest

from fast_goal.data.captioning import Answer, Failure
from fast_goal.data.captioning.editing import CHARACTERS, CUT, PARAGRAPH, Caption, clean, refuses
from fast_goal.data.generation.store import AnswerStore
from fast_goal.errors import DataError


def answer(text: str, finish: str = "stop") -> Answer:
    return Answer(text, finish, "model")


@pytest.mark.parametrize(
    "text, finish, caption, rules",
    [
        ("A dog. It runs.", "stop", "A dog. It runs.", ()),
        ("  A dog. \n", "stop", "A dog.", ()),
        ("A dog.\n\nIt  runs.\tFast.", "stop", "A dog. It runs. Fast.", (PARAGRAPH,)),
        ("A d\0og.\x07 It runs.", "stop", "A dog. It runs.", (CHARACTERS,)),
        ("A dog\ud83d. É 木.", "stop", "A dog. É 木.", (CHARACTERS,)),
        ("A dog runs. Behind it, a", "length", "A dog runs.", (CUT,)),
        ("A dog runs. Behind it, a", "stop", "A dog runs. Behind it, a", ()),
        ("A dog runs. It is 3.5 m", "length", "A dog runs.", (CUT,)),
        ('A sign says "Open." Next\n to', "length", 'A sign says "Open."', (PARAGRAPH, CUT)),
        ("A dog runs. It is brown.", "length", "A dog runs. It is brown.", ()),
        ("A sign says: I'm sorry, I cannot help.", "stop", "A sign says: I'm sorry, I cannot help.", ()),
    ],
)
def test_rules(text, finish, caption, rules):
    assert clean(answer(text, finish)) == Caption(caption, rules)


@pytest.mark.parametrize(
    "text, finish, reason",
    [
        ("", "stop", "empty answer"),
        (" \n\0", "length", "empty answer"),
        ("A dog that runs along the", "length", "no full sentence"),
        ("I'm sorry, but I can't assist with that.", "stop", "refused"),
        ("Unfortunately, I am unable to view images. Send a text.", "stop", "refused"),
        ("As an AI language model, I see nothing.", "stop", "refused"),
        ("A dog.", "refused", "refused"),
    ],
)
def test_no_caption(text, finish, reason):
    result = clean(answer(text, finish))
    assert isinstance(result, Failure) and result.reason == reason


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Sorry, I cannot describe this.", True),
        ("“I’m sorry, I can’t help with that.”", True),
        ("I cannot provide a description of real people.", True),
        ("Sorry is written on the wall.", False),
        ("Iron gates stand open. I am sorry.", False),
        ("Hello Kitty looks out of a window.", False),
        ("", False),
    ],
)
def test_refusals(text, expected):
    assert refuses(text) is expected


def test_answers_are_kept_word_for_word(tmp_path):
    answers = {"a": answer("line\n\0two \ud83d", "length"), "b": answer("")}
    with AnswerStore("k", {"prompt": "Say."}, tmp_path) as store:
        store.put(answers)
        store.put({"b": answer("newer")})
    with AnswerStore("k", {"prompt": "other"}, tmp_path) as store:
        assert store.get(["a", "b", "c"]) == {"a": answers["a"], "b": answer("newer")}
    assert sqlite3.connect(tmp_path / "k.sqlite").execute("SELECT * FROM facts").fetchall() == [("prompt", "Say.")]
    with AnswerStore("other", {}, tmp_path) as store:
        assert store.get(["a"]) == {}


def test_a_damaged_store_is_named(tmp_path):
    (tmp_path / "k.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match=r"k\.sqlite.*asked again"):
        AnswerStore("k", {}, tmp_path)


def _write_many(folder, first):
    with AnswerStore("k", {}, folder) as store:
        for index in range(first, first + 20):
            store.put({str(index): Answer("x", "stop", "m")})


def test_two_processes_write_to_one_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(tmp_path, first)) for first in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with AnswerStore("k", {}, tmp_path) as store:
        assert len(store.get(str(index) for index in range(40))) == 40
