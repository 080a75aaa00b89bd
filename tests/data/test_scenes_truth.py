"""What is false of a scene: the generator's own captions are not, its foils are, and sentences made by hand."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fast_goal.data.records import Dataset
from fast_goal.data.sources.scenes.samples import STYLES, Sample, make_samples
from fast_goal.data.sources.scenes.truth import falsehoods
from fast_goal.errors import DataError


def as_dataset(samples: list[Sample], source: str) -> Dataset:
    objects = pd.DataFrame([row for sample in samples for row in sample.objects])
    return Dataset(source, Path(), pd.DataFrame([sample.record for sample in samples]), objects=objects, source=source)


@pytest.fixture(scope="module", params=["scenes", "rich_scenes"])
def drawn(request) -> tuple[list[Sample], Dataset]:
    counts = {"pretrain": 20, "train": 40, "test": 25}
    samples = [
        sample
        for split, count in counts.items()
        for index in range(count)
        for sample in make_samples(4, split, index, 64, request.param)
    ]
    return samples, as_dataset(samples, request.param)


def test_what_the_generator_says_is_not_false(drawn):
    samples, dataset = drawn
    close_ups = 0
    for sample in samples:
        captions = [text for text in [sample.record["long_caption"], *sample.record["captions"]] if text]
        found = falsehoods(captions, [sample.record["image_id"]] * len(captions), dataset)
        close_up = len(sample.objects) == 1
        close_ups += close_up
        assert found == [None if close_up else False] * len(captions), captions
    assert close_ups


def test_every_choice_has_a_caption_that_is_not_false_and_foils_that_are(drawn):
    samples, dataset = drawn
    rows = [row for sample in samples for row in sample.choices]
    ids = [row["image_id"] for row in rows]
    assert falsehoods([row["caption"] for row in rows], ids, dataset) == [False] * len(rows)
    found = falsehoods([row["foils"][0] for row in rows], ids, dataset)
    assert not [row for row, false in zip(rows, found, strict=True) if false is not True]
    assert len(rows) > 450


def test_the_captions_of_a_twin_are_false_where_they_tell_what_differs(drawn):
    samples, dataset = drawn
    ids = [sample.record["image_id"] for sample in samples if sample.record["split"] == "test"]
    long = {sample.record["image_id"]: sample.record["long_caption"] for sample in samples}
    twins = [name.removesuffix("-twin") if name.endswith("-twin") else f"{name}-twin" for name in ids]
    assert falsehoods([long[twin] for twin in twins], ids, dataset) == [True] * len(ids)


def dataset_by_hand(source: str = "scenes") -> Dataset:
    """One image of 100 x 100 pixels with four objects; the last lies near a line of the 3x3 grid."""
    things = [
        ("star", "red", "striped", "large", (15, 15)),
        ("cup", "blue", "plain", "small", (50, 15)),
        ("cup", "blue", "dotted", "large", (85, 50)),
        ("star", "green", "plain", "small", (34, 85)),
    ]
    objects = [
        {"image_id": "one", "object_index": number, "label": label, "colour": colour, "pattern": pattern, "size": size}
        | {"x1": x - 10.0, "y1": y - 10.0, "x2": x + 10.0, "y2": y + 10.0}
        for number, (label, colour, pattern, size, (x, y)) in enumerate(things)
    ]
    record = {
        "image_id": "one",
        "image_path": "one.png",
        "width": 100,
        "height": 100,
        "split": "train",
        "long_caption": "Four objects lie on a wavy mint background. There is a plain blue cup in the picture.",
        "captions": ["There is a plain blue cup in the picture."],
        "source": source,
        "content_hash": "",
    }
    return Dataset("by hand", Path(), pd.DataFrame([record]), objects=pd.DataFrame(objects), source=source)


TRUE = [
    "There is a large striped red star in the picture.",
    "There is a striped large red star in the picture.",
    "There is a red star in the picture.",
    "The striped red star is in the top left corner.",
    "A red star with stripes can be seen in the top left corner.",
    "In this picture, you can see a small blue cup with no pattern.",
    "There is a blue cup at the top of the picture.",  # one of the two
    "A large blue cup is on the right side of the picture.",
    "You can see a striped red star to the left of the plain blue cup.",
    "There is a striped red star and a dotted blue cup in the picture.",
    "There is a star to the left of the cup.",
    "There are four objects on a wavy mint background.",
    "A wavy mint background holds four objects.",
    "Four objects lie on a wavy background.",
    "There is a blue cup in the picture. The picture shows a green star.",
]
FALSE = [
    "There is a large striped blue star in the picture.",
    "There is a large red star with dots in the picture.",
    "There is a small striped red star in the picture.",
    "There is a striped red moon in the picture.",
    "There is a striped beige star in the picture.",  # a word of the backgrounds
    "The striped red star is in the top right corner.",
    "There is a plain blue cup on the right side of the picture.",  # only the other cup is there
    "You can see a striped red star to the right of the plain blue cup.",
    "You can see a striped red star above the plain blue cup.",
    "Above the plain red star is a plain blue cup.",  # there is no such star
    "There is a striped red star and a small green heart in the picture.",
    "There is a small green heart and a striped red star in the picture.",
    "There are five objects on a wavy mint background.",
    "There are four objects on a wavy teal background.",
    "There are four objects on a plain mint background.",
    "There are four objects on a wavy green background.",
    "There is a blue cup in the picture. The picture shows a red cup. What is this?",  # one sentence is false
    "A plain green star is at the top of the picture.",
    "A striped red star is to the right of the dotted blue cup.",  # askew, but to no side of it
]
UNJUDGED = [
    "",
    "What is this?",
    "There is a red picture in the star.",
    "There is a striped dotted red star in the picture.",
    "There is a dotted red star with stripes in the picture.",
    "There is a striped red star and in the picture.",
    "There is a striped red star in the picture. It is beautiful.",
    "A plain green star is at the bottom of the picture.",  # near the line to the corner
    "A plain green star is in the bottom left corner.",
    "A striped red star is to the left of the dotted blue cup.",  # far
    "A striped red star in the top left corner is in the top left corner.",
]


def test_sentences_made_by_hand():
    dataset = dataset_by_hand()
    for expected, captions in ((False, TRUE), (True, FALSE), (None, UNJUDGED)):
        found = falsehoods(captions, ["one"] * len(captions), dataset)
        assert [text for text, false in zip(captions, found, strict=True) if false is not expected] == []


def test_rich_sentences_made_by_hand():
    expected = {
        "Two of the objects are blue.": False,
        "There are two plain objects in it.": False,
        "Two large objects can be counted.": False,
        "Three of the objects are blue.": True,
        "Two of the objects are navy.": True,
        "The light casts no shadows.": False,
        "The light casts long shadows.": None,
        "At the upper left lies a striped red star.": False,
        "At the lower left lies a striped red star.": True,
        "The artist drew a checkered red star.": True,
        "Look above the green star: there is a striped red star.": None,  # far
        "Look below the green star: there is a striped red star.": True,
        "Look to the lower right of the green star: there is a striped red star.": True,
    }
    found = falsehoods(list(expected), ["one"] * len(expected), dataset_by_hand("rich_scenes"))
    assert dict(zip(expected, found, strict=True)) == expected
    # the plain scenes do not say so
    assert falsehoods(["Two of the objects are blue."], ["one"], dataset_by_hand()) == [None]


def test_an_unknown_background_is_not_judged():
    dataset = dataset_by_hand()
    unknown = replace(dataset, records=dataset.records.assign(long_caption=""))
    texts = [f"There are {number} objects on a wavy teal background." for number in ("four", "five")]
    assert falsehoods(texts, ["one", "one"], unknown) == [None, True]


def test_bad_input_is_named():
    dataset = dataset_by_hand()
    with pytest.raises(DataError, match="no image 'two'"):
        falsehoods(["There is a red star in the picture."], ["two"], dataset)
    with pytest.raises(DataError, match=r"'folder'.*" + ", ".join(STYLES)):
        falsehoods([], [], replace(dataset, source="folder"))
    assert falsehoods([], [], dataset) == []
