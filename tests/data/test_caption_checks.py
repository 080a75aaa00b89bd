"""The problems of captions: each is found, and nothing is said of captions like those that people write."""

import numpy as np
import pandas as pd
import pytest

from fast_goal.data.caption_checks import caption_columns, caption_lengths, count_words, sample_rows, texts_of

GOOD = [
    "A man in a red coat, about 1.8 m tall, stands on the left. Behind him there is a shop; its sign reads “OPEN”.",
    "Two dogs run across a field. One of them (the brown one) carries a stick. The sky is grey, and it's about to rain!",
    "A sign says 'Sorry, we're closed'. The door is blue & white, 3 < 4 m wide, and a cat I can see sits before it.",
    "A close-up of a robot with the letters AI on its chest. As an air balloon rises, a child looks at the image on a screen.",
    "The system: a pump and two pipes. A user's manual lies on the table, and there is a description of the pump on the wall.",
    "Écoles and cafés line the street in Montréal, where a crêpe stand called Chez Amélie has a long queue of people.",
    "",
]


def problems(texts, column, language="en"):
    records = pd.DataFrame({"long_caption": texts})
    found = caption_columns(records, caption_lengths(records, 1000, 0), language)
    return {row: text for row, text in found[column].items() if isinstance(text, str)}


def test_nothing_is_said_of_good_captions():
    records = pd.DataFrame({"long_caption": GOOD})
    found = caption_columns(records, caption_lengths(records, 1000, 0), "en").drop(columns="long_tokens")
    assert {(row, name) for name in found for row, text in found[name].items() if text is not None} == set()


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("refusal", "I'm sorry, but I can't assist with that request."),
        ("refusal", "Well, I’m very sorry. Nothing is to be seen."),
        ("refusal", "As an AI language model, I have no eyes."),
        ("refusal", "As a language model I have none."),
        ("refusal", "i cannot see the image you mention"),
        ("refusal", "No image was provided."),
        ("leaked_prompt", "USER: what is it? ASSISTANT: A dog."),
        ("leaked_prompt", "[INST] <image> What is this? [/INST] A dog."),
        ("leaked_prompt", "Describe this image. A dog."),
        ("leaked_prompt", "Sure, here is a description of the image: a dog."),
        ("leaked_prompt", "Here's a detailed long caption: a dog."),
        ("leaked_prompt", "<|im_start|>A dog."),
        ("markup", "A dog.<br>A cat."),
        ("markup", "A <b>dog</b>."),
        ("markup", "A dog &amp; a cat."),
        ("markup", "A **large** dog."),
        ("markup", "A dog\x00."),
        ("markup", "A caf\ufffd."),
        ("markup", "A cafÃ©."),
        ("markup", "It reads â€œhelloâ€."),
        ("unfinished", "A dog lies on the"),
        ("repeated_sentence", "A dog lies on the sofa. It sleeps. a dog lies on the Sofa!"),
        ("other_language", "Ein Hund liegt auf dem Sofa und schläft. Vor ihm steht eine Schale mit Wasser."),
        (
            "other_language",
            "一只棕色的狗躺在沙发上睡觉，沙发前面放着一个装满水的碗，窗外正在下雨，房间里很安静，墙上挂着一幅画，旁边有一盏灯",
        ),
    ],
)
def test_a_problem_is_found_in_its_row(column, text):
    found = problems([*GOOD, text, GOOD[0] + " One more."], column)
    assert list(found) == [len(GOOD)]


def test_the_text_says_where():
    found = problems(["A dog. I am sorry to say."], "refusal")
    assert found == {0: "it says 'I am sorry to say.' (from character 7)"}


def test_a_caption_of_three_images_is_named_with_the_first():
    texts = ["A cat sits here.", "A dog.", "A cat sits here.", "A bird.", "A bird.", "A cat sits here.", "", "", ""]
    found = problems(texts, "shared_caption")
    assert list(found) == [0, 2, 5]
    assert found[5] == "3 images have this caption, the first in row 0: 'A cat sits here.'"


def test_short_sentences_may_be_repeated():
    assert problems(["A dog sleeps. It is red. It is red."], "repeated_sentence") == {}
    found = problems(["The dog sleeps on a sofa. " * 3 + "Fin."], "repeated_sentence")
    assert found == {0: "the sentence 'the dog sleeps on a sofa' stands there 3 times"}


def test_no_language_is_guessed_where_none_is_asked_for():
    records = pd.DataFrame({"long_caption": GOOD})
    assert "other_language" not in caption_columns(records, caption_lengths(records, 1000, 0), None)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_words(at_once, monkeypatch):
    monkeypatch.setattr("fast_goal.data.caption_checks.COUNTED_AT_ONCE", at_once)
    texts = ["", "  ", "one", " two\nwords ", "three  small\twords", "\u00a0", "", "é à", "ends", "", *GOOD]
    counted = count_words(texts_of(pd.DataFrame({"long_caption": texts})))
    assert counted.tolist() == [len(text.split()) for text in texts]
    assert count_words(texts_of(pd.DataFrame({"long_caption": pd.Series([], dtype=object)}))).tolist() == []


def test_a_sample_is_sorted_seeded_and_without_repetition():
    rows = sample_rows(1000, 100, 0)
    assert len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    assert (rows == sample_rows(1000, 100, 0)).all()
    assert (rows != sample_rows(1000, 100, 1)).any()
    assert sample_rows(5, 100, 0).tolist() == [0, 1, 2, 3, 4]
