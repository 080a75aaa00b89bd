"""What is taken of a language model's answer, and what a caption shows of itself."""

import json
import random
import re
import time
from collections import Counter

import pytest

from fast_goal.config import NEGATIVE_TYPES
from fast_goal.data.generation import Answer
from fast_goal.negatives import llm_answer
from fast_goal.negatives.llm_answer import Reading, fault, in_style, read
from fast_goal.negatives.llm_prompt import EXAMPLES, KINDS, OVERHEAD, VISIBLE, count_words, parts, question, words_shown

CAPTION = "A red dog sits on a blue mat."
SWAP, REPLACE = "A red mat sits on a blue dog.", "A red cat sits on a blue mat."
OBJECT = json.dumps({"swap_nouns": SWAP, "replace_nouns": REPLACE})
BOTH = [("swap_nouns", SWAP), ("replace_nouns", REPLACE)]
WANTED = ("swap_nouns", "replace_nouns")


def reading(text: str, finish: str = "stop") -> Reading:
    return read(Answer(text, finish, "m"), CAPTION, WANTED, NEGATIVE_TYPES)


@pytest.mark.parametrize(
    "text",
    [
        OBJECT,
        f"Sure! Here are {{two}} of them:\n```json\n{json.dumps(json.loads(OBJECT), indent=2)}\n```\nDo you need more?",
        f'<think>First {{\'swap_nouns\': or {{"swap_nouns": "no"}}</think>{OBJECT}',
        OBJECT + '\n\nCaption: "A cat."\nAnswer:\n{"swap_nouns": "B"}',
        OBJECT[:-1] + ",}",
        OBJECT[:-1],
        json.dumps({"negatives": json.loads(OBJECT)}),
        json.dumps({"Swap nouns": SWAP, "REPLACE-NOUNS": [REPLACE]}),
        OBJECT.replace("red mat sits", "red mat\n sits"),
        OBJECT.replace(".", "").replace('"A ', '"a '),
        '{"n": 1} ' + OBJECT,
    ],
)
def test_what_surrounds_an_object_does_not_matter(text):
    assert [pair for pair in reading(text).accepted] == BOTH


@pytest.mark.parametrize(
    "text, finish, reason",
    [
        ("", "stop", "empty answer"),
        ("I'm sorry, but I can't help with that.", "stop", "refused by the model"),
        ("no", "refused", "refused by the model"),
        ("A red mat sits on a blue dog.", "stop", "no JSON object"),
        ("{'swap_nouns': 'A red mat sits on a blue dog.'}", "stop", "no JSON object"),
        (f'["{SWAP}"]', "stop", "no JSON object"),
        ('{"swap_nouns": "A red mat si', "length", "cut off by max_new_tokens"),
        ("{}", "stop", "missing"),
        ("{" * 100_000, "stop", "no JSON object"),
        ('{"a":' * 100_000, "stop", "no JSON object"),
        ('{"a":' + "[" * 100_000, "stop", "no JSON object"),
        ("x" * 3_000_000, "stop", "no JSON object"),
    ],
)
def test_an_answer_without_an_object_has_a_reason(text, finish, reason):
    begin = time.process_time()
    assert reading(text, finish) == Reading(refused=[("", reason)])
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "value, reason",
    [
        ("", "empty"),
        (" ... ", "empty"),
        ("a red DOG sits, on a blue mat", "the caption itself"),
        ("A dog.", "too short"),
        ("A red mat sits on a blue dog while the sun shines upon a wide and yellow field of corn.", "too long"),
        ("Three green boats float over deep water.", "another text than the caption"),
        ("A red mat sits\x00 on a blue dog.", "unreadable characters"),
        ("A red mat sits on a blue \ud83d dog.", "unreadable characters"),
        (5, "not text"),
        ({"text": SWAP}, "not text"),
        ([[SWAP]], "not text"),
    ],
)
def test_a_text_that_is_refused_has_a_reason(value, reason):
    found = reading(json.dumps({"replace_nouns": REPLACE, "swap_nouns": value}))
    assert found.accepted == BOTH[1:] and found.refused == [("swap_nouns", reason)]


def test_types_that_nobody_asked_for_or_that_do_not_fit():
    found = reading(json.dumps({"add_nouns": SWAP, "swap_nouns": None, "reshuffle": SWAP}))
    assert found == Reading(
        [("reshuffle", SWAP)], [("add_nouns", "unknown type"), ("replace_nouns", "missing")], {"swap_nouns"}
    )
    assert reading('{"swap_nouns": null, "repl', "length").refused == [("replace_nouns", "cut off by max_new_tokens")]


@pytest.mark.parametrize(
    "text, caption, expected",
    [
        ("two cats", "Two dogs.", "Two cats."),
        ("Two cats.", "two dogs", "two cats"),
        ("TV on a mat.", "mat on a TV", "TV on a mat"),
        ('"A cat!"', "A dog.", "A cat."),
        ("A cat.\n Sits.", "A dog. Sits.", "A cat. Sits."),
        ("猫在垫子上", "狗在垫子上。", "猫在垫子上。"),
        ("", "A dog.", "."),
    ],
)
def test_a_negative_begins_and_ends_as_its_caption(text, caption, expected):
    assert in_style(text, caption) == expected


def test_the_examples_of_the_prompt_are_what_it_asks_for():
    assert tuple(KINDS) == NEGATIVE_TYPES
    for caption, negatives in EXAMPLES:
        assert tuple(negatives) == NEGATIVE_TYPES
        words = Counter(re.findall(r"\w+", caption.lower()))
        for kind, text in negatives.items():
            if text is None:
                continue
            assert not fault(text, caption) and in_style(text, caption) == text
            changed = Counter(re.findall(r"\w+", text.lower()))
            assert (words - changed).total() == (changed - words).total() == (1 if kind.startswith("replace") else 0)
        answer = Answer(json.dumps(negatives), "stop", "m")
        assert not read(answer, caption, NEGATIVE_TYPES, NEGATIVE_TYPES).refused


def test_the_question_holds_what_is_wanted_and_the_caption_as_json():
    caption = 'A sign reads "Caption: none".\nAnswer: {}'
    text = question(caption, ["swap_nouns"], {"swap_nouns": "empty", "": "no JSON object"}, ["B", "Ü"])
    assert text.endswith('Caption: "A sign reads \\"Caption: none\\".\\nAnswer: {}"\nAnswer:')
    assert "reshuffle" not in text and text.count("swap_nouns") == 1 + len(EXAMPLES) + 1
    assert "(swap_nouns: empty; no JSON object)" in text and '["B", "Ü"]' in text
    assert "earlier" not in question(caption, NEGATIVE_TYPES) and "others" not in question(caption, NEGATIVE_TYPES)


def test_a_short_caption_is_shown_whole():
    [part] = parts("  A dog. A cat. \n", 6, 0)
    assert part.text == "A dog. A cat." and (part.start, part.end) == (2, 15)
    assert parts(" \n", 5, 0) == []


@pytest.mark.parametrize(
    "caption",
    [
        " ".join(f"The {'very ' * (number % 9)}small dog number {number} sits on a mat." for number in range(400)),
        "word " * 10_000,
        "word" * 10_000,
        "狗坐在红色的垫子上" * 2_000,
        "狗坐在红色的垫子上。" * 2_000,
        "\n".join(["A dog. "] * 3_000),
        "." * 5_000,
    ],
    ids=["sentences", "words", "one word", "no blanks", "Chinese", "lines", "dots"],
)
def test_a_long_caption_shows_a_few_sentences_near_its_beginning(caption):
    for most in (8, 40, VISIBLE + 50):
        found = parts(caption, most, 0)
        assert found == parts(caption, most, 0)
        for part in found:
            assert caption[part.start : part.end] == part.text and 0 < count_words(part.text) <= most
            assert part.end <= 24 * max(VISIBLE, most)
        assert len({part.end for part in found}) == len(found)


def test_what_is_shown_is_whole_sentences_and_another_part_for_another_caption():
    sentences = [f"Dog number {number} sits on a mat." for number in range(40)]
    caption, shown = " ".join(sentences), Counter()
    for seed in range(40):
        found = parts(caption, 22, seed)
        shown[found[0].text] += 1
        ordered = sorted(found, key=lambda part: part.start)
        assert " ".join(part.text for part in ordered) == " ".join(sentences[:17])
        assert {part.text.count(".") for part in ordered[:-1]} == {3}
    assert len(shown) == 6, "every part is the first one for some seed"


def test_the_words_shown_fit_into_the_answer():
    assert words_shown(600, 5) == 67 and words_shown(600, 1) == 80 and words_shown(10, 5) == 8
    assert 5 * (words_shown(600, 5) * 1.6 + OVERHEAD) <= 600


def test_noise_never_raises():
    draw = random.Random(0)
    letters = [
        '"',
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\\",
        "\\u12",
        "\n",
        "swap_nouns",
        '"swap_nouns": ',
        " a",
        "null",
        "1e999",
        "é",
    ]
    for _ in range(3_000):
        text = "".join(draw.choices(letters, k=draw.randrange(30)))
        found = reading(text, draw.choice(["stop", "length"]))
        assert found.accepted or found.refused or found.declined


def test_only_so_much_of_an_answer_is_read():
    assert reading(" " * llm_answer._READ + OBJECT).refused == [("", "no JSON object")]
    assert reading(" " * 100 + "<think>" + "x" * llm_answer._READ + "</think>" + OBJECT).accepted == BOTH
