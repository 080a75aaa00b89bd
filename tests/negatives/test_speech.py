import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from fast_goal.data import speech
from fast_goal.data.speech import tagged

TEXT = "A small brown dog runs quickly near two parked cars, and its owner's hat isn't red."


def test_the_kinds_of_a_sentence():
    kinds = {word.text: word.kind for word in tagged([TEXT])[0]}
    expected = {
        "determiner": ("A",),
        "adjective": ("small", "brown", "parked", "red"),
        "noun": ("dog", "cars", "owner", "hat"),
        "verb": ("runs", "is"),
        "adverb": ("quickly",),
        "number": ("two",),
        "preposition": ("near",),
        "conjunction": ("and",),
        "punctuation": (",", "."),
    }
    assert {word: kinds[word] for words in expected.values() for word in words} == {
        word: kind for kind, words in expected.items() for word in words
    }


def test_number_and_lemma():
    words = {word.text: word for word in tagged(["Three Dogs chase a cat past some boxes."])[0]}
    assert (words["Dogs"].tag, words["Dogs"].lemma) == ("NN2", "dog")
    assert (words["cat"].tag, words["cat"].lemma) == ("NN1", "cat")
    assert (words["boxes"].tag, words["boxes"].lemma) == ("NN2", "box")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't the dog's.", ["It", "is", "n't", "the", "dog", "'s", "."]),
        ("don’t", ["do", "n’t"]),
        ("a close-up of 3,000 t-shirts", ["a", "close-up", "of", "3,000", "t-shirts"]),
        ("the 1st, o'clock", ["the", "1st", ",", "o'clock"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_where_words_end(text, words):
    assert [word.text for word in tagged([text])[0]] == words


def test_any_text_is_covered_by_its_words():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("abcAB '’.,!?-—\"()0123 \n日éß\u200b😀\x00%_") for _ in range(draw.randint(0, 40)))
        words = tagged([text])[0]
        assert all(text[word.start : word.end] == word.text for word in words)
        assert "".join(word.text for word in words) == "".join(text.split())


def test_a_text_has_the_same_words_whatever_stands_beside_it():
    assert tagged([TEXT, "Other words.", TEXT]) == [tagged([TEXT])[0], tagged(["Other words."])[0], tagged([TEXT])[0]]
    long = "a red cup and " * 200
    assert len(tagged([long])[0]) == 800


def test_threads_load_the_model_once(monkeypatch):
    model, loads = speech._model(), []
    monkeypatch.setattr(speech, "_loaded", [])
    monkeypatch.setattr(speech, "_load", lambda: loads.append(1) or model)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: tagged([TEXT])[0], range(16)))
    assert len(loads) == 1
    assert all(words == found[0] for words in found)
