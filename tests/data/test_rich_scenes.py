"""The rich scenes: captions read back by a grammar of the test's own, silhouettes that differ; and the plain ones, pinned."""

import hashlib
import io
import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.sources.scenes import labels, language
from fast_goal.data.sources.scenes import source as scenes_source
from fast_goal.data.sources.scenes.drawing import draw
from fast_goal.data.sources.scenes.language import relation
from fast_goal.data.sources.scenes.layout import MIN_VISIBLE
from fast_goal.data.sources.scenes.samples import Sample, make_samples
from fast_goal.data.sources.scenes.source import ScenesConfig, draw_all
from fast_goal.data.sources.scenes.vocabulary import MORE_PATTERNS, PATTERNS, RICH, Scene, Thing

SIZE = 128
COLOUR, SHAPE, PATTERN = "|".join(RICH.colours), "|".join(RICH.shapes), "|".join(RICH.patterns)
ENDINGS = {"with stripes": "striped", "with dots": "dotted", "with checks": "checkered", "with no pattern": "plain"}
NOUN = (
    rf"(?P<article>\b[Aa]n?) (?:(?P<size>{'|'.join(RICH.sizes)}) )?(?:(?P<pattern>{PATTERN}) )?(?P<colour>{COLOUR}) "
    rf"(?P<shape>{SHAPE})(?: (?P<ending>{'|'.join(ENDINGS)}))?\b"
)
STRAIGHT = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
DIAGONAL = {f"to the {v} {h} of": (x, y) for v, y in (("upper", -1), ("lower", 1)) for h, x in (("left", -1), ("right", 1))}
OTHER = rf"(?P<relation>{'|'.join([*DIAGONAL, *STRAIGHT])}) the (?P<look>(?:{PATTERN}) (?:{COLOUR}) (?:{SHAPE}))\b"
PLACES = {  # words: column, row
    "in the top left corner": (0, 0),
    "at the top of the picture": (1, 0),
    "in the top right corner": (2, 0),
    "on the left side of the picture": (0, 1),
    "in the middle of the picture": (1, 1),
    "on the right side of the picture": (2, 1),
    "in the bottom left corner": (0, 2),
    "at the bottom of the picture": (1, 2),
    "in the bottom right corner": (2, 2),
    "at the upper left": (0, 0),
    "near the upper edge, in the centre": (1, 0),
    "at the upper right": (2, 0),
    "at the left, halfway up": (0, 1),
    "at the right, halfway up": (2, 1),
    "at the lower left": (0, 2),
    "near the lower edge, in the centre": (1, 2),
    "at the lower right": (2, 2),
    "in the centre": (1, 1),  # after those that end with it
}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}


@pytest.fixture(scope="module")
def samples() -> dict[str, list[list[Sample]]]:
    counts = {"pretrain": 40, "train": 60, "test": 15}
    return {split: [make_samples(3, split, i, SIZE, "rich_scenes") for i in range(n)] for split, n in counts.items()}


def flat(groups: list[list[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


def centre(row: dict) -> np.ndarray:
    return np.array([row["x1"] + row["x2"], row["y1"] + row["y2"]]) / 2 / SIZE


def check_thing(sentence: str, objects: list[dict]) -> tuple[dict, str]:
    """Asserts that a sentence about an object is true; returns that object's row, and what was told of its place."""
    by_look = {f"{row['pattern']} {row['colour']} {row['label']}": row for row in objects}
    assert len(by_look) == len(objects)
    related = re.search(OTHER, sentence, re.IGNORECASE)
    rest = re.sub(OTHER, "", sentence, flags=re.IGNORECASE)
    (noun,) = re.finditer(NOUN, rest)
    assert (noun["article"].lower() == "an") == (noun.group().split()[1][0] in "aeiou"), sentence
    assert (noun["pattern"] is None) != (noun["ending"] is None), sentence
    subject = by_look[f"{noun['pattern'] or ENDINGS[noun['ending']]} {noun['colour']} {noun['shape']}"]
    assert noun["size"] in (None, subject["size"])
    if related:
        dx, dy = centre(subject) - centre(by_look[related["look"].lower()])
        word = related["relation"].lower()
        if word in DIAGONAL:
            x, y = DIAGONAL[word]
            assert dx * x > 0.08 and dy * y > 0.08 and 0.65 < abs(dx / dy) < 1.55, sentence
        else:
            along, askew = (dx, dy) if STRAIGHT[word][0] else (dy, dx)
            assert along * sum(STRAIGHT[word]) > 0.1 and abs(askew) < 0.45 * abs(along), sentence
        assert np.hypot(dx, dy) < 0.55
        return subject, word
    for words, place in PLACES.items():
        if words in rest.lower():
            assert tuple((3 * centre(subject)).astype(int)) == place, sentence
            return subject, words
    return subject, ""


def check_whole(sentence: str, sample: Sample) -> str:
    """Asserts that a sentence about no single object is true; returns which kind it is."""
    text = sentence.lower()
    if "background" in text:
        assert NUMBERS[re.search(r"(\w+) objects", text)[1]] == len(sample.objects)
        assert f"a {sample.scene.texture} {sample.scene.background} background" in text
        return "overall"
    if "objects" in text and (counted := re.search(r"\b(two|three|four|five|six|seven)\b", text)):
        (value,) = re.findall(rf"\b({COLOUR}|{PATTERN})\b", text)
        have = [row for row in sample.objects if value in (row["colour"], row["pattern"])]
        assert len(have) == NUMBERS[counted[1]], sentence
        return "count"
    assert sentence in language.RICH.remarks
    return "remark"


def test_every_sentence_is_true(samples):
    told, kinds = set(), set()
    for sample in flat(samples["train"]) + flat(samples["test"]):
        caption, about = sample.record["long_caption"], {row["sentence_index"]: row for row in sample.truth}
        sentences = split_sentences(caption)
        assert len(about) == len(sample.objects)
        for index, sentence in enumerate(sentences):
            if index not in about:
                kinds.add(check_whole(sentence.text, sample))
                continue
            row = about[index]
            assert (row["char_start"], row["char_end"]) == (sentence.start, sentence.end)
            subject, words = check_thing(sentence.text, sample.objects)
            assert all(subject[name] == row[name] for name in ("x1", "y1", "x2", "y2", "label"))
            told.add(words)
    assert kinds == {"overall", "count", "remark"}
    assert len(told & PLACES.keys()) > 14 and len(told & DIAGONAL.keys()) == 4 and len(told & STRAIGHT.keys()) == 4


def test_short_captions_are_true_too(samples):
    whole = 0
    for sample in [one for one in flat(samples["pretrain"]) if len(one.objects) > 1] + flat(samples["test"]):
        for caption in sample.record["captions"]:
            if "background" in caption:
                whole += 1
                assert check_whole(caption, sample) == "overall" and sample.record["split"] == "pretrain"
            else:
                check_thing(caption, sample.objects)
    assert whole


ANY_NOUN = re.sub(r"\(\?P<\w+>", "(?:", NOUN)
TWO = re.compile(f"({ANY_NOUN}) and ({ANY_NOUN})")


def is_true(text: str, sample: Sample) -> bool:
    """Whether every sentence of a caption is true; one that names two objects is read as one about each of them."""
    for sentence in (sentence.text for sentence in split_sentences(text)):
        about = {TWO.sub(rf"\{number}", sentence) for number in (1, 2)} if " and " in sentence else {sentence}
        try:
            if re.search(NOUN, sentence):
                assert all(check_thing(one, sample.objects) for one in about)
            else:
                check_whole(sentence, sample)
        except (AssertionError, KeyError):
            return False
    return True


def test_choices_have_one_true_and_one_false_caption(samples):
    counts = Counter()
    for sample in flat(samples["test"]):
        for row in sample.choices:
            (foil,) = row["foils"]
            assert row["caption"] == sample.record["long_caption"] or is_true(row["caption"], sample), row
            assert not is_true(foil, sample), row
            assert len(split_sentences(foil)) == len(split_sentences(row["caption"]))
            assert all((a == "an") == (noun[0] in "aeiou") for a, noun in re.findall(r"\b([Aa]n?) (\w+)", foil.lower()))
            counts[row["suite"], row["group"]] += 1
    assert len(counts) == 10 and min(counts.values()) > 0.7 * len(flat(samples["test"]))


def test_two_things_are_named_only_where_the_verb_allows_it():
    two = [template for template in language.RICH.placed + language.RICH.unplaced if language.fits_two(template)]
    assert [template.format(thing="T", Thing="T", place="P", Place="P") for template in two] == [
        "There is T P.",
        "T can be seen P.",
        "P, there is T.",
        "You can see T P.",
        "P, you can see T.",
        "The artist drew T P.",
        "Somebody drew T P.",
        "Look P: there is T.",
        "It also has T P.",
        "There is T in the picture.",
        "T can be seen in the picture.",
        "In this picture, you can see T.",
        "The picture shows T.",
        "The artist drew T.",
        "Somewhere there is T.",
        "It also has T.",
        "One can make out T.",
    ]
    samples = [sample for index in range(8) for sample in make_samples(9, "val", index, 32, "rich_scenes")]
    rows = [row for sample in samples for row in sample.choices if row["group"] == "add_object"]
    for row in rows:
        (sentence,) = [one.text for one in split_sentences(row["foils"][0]) if one.text not in row["caption"]]
        assert re.sub(f"{ANY_NOUN} and {ANY_NOUN}", "{thing}", sentence).count("{thing}") == 1
        assert not re.search(r"\b(was|lies)\b|(?<!here) is |\b(One|Among) (object|the)", sentence), sentence
        assert not re.search("with (dots|stripes|checks|no pattern) and", sentence), sentence
    assert len(rows) > 20


def test_labels_are_classes(samples):
    classes = labels.classes(RICH)
    assert [len(values["names"]) for values in classes.values()] == [32, 14]
    rows = [row for sample in flat(samples["test"]) for row in sample.labels]
    assert len(rows) > 60 and all(row["label"] in classes[row["suite"]]["names"] for row in rows)


def test_remarks_speak_of_nothing_that_differs_between_scenes():
    words = re.compile(rf"\b({COLOUR}|{SHAPE}|{PATTERN}|{'|'.join(NUMBERS)}|background|small|large|left|right|top)s?\b")
    assert not [remark for remark in language.RICH.remarks if words.search(remark.lower())]


def test_twins_differ_in_one_attribute_of_one_object(samples):
    for scene, twin in samples["test"]:
        changed = [
            name
            for a, b in zip(scene.objects, twin.objects, strict=True)
            for name in ("label", "colour", "pattern", "size")
            if a[name] != b[name]
        ]
        assert len(changed) == 1 and changed[0] != "size"
        assert scene.record["long_caption"] != twin.record["long_caption"]


def test_scenes_keep_their_promises_and_captions_fit(samples):
    seen = set()
    for sample in flat(samples["train"]) + flat(samples["test"]):
        drawing = draw(sample.scene, SIZE)
        assert drawing.visible.min() >= MIN_VISIBLE and 4 <= len(sample.objects) <= 8
        assert sample.record["source"] == "rich_scenes"
        seen |= {thing.shape for thing in sample.scene.things} | {thing.colour for thing in sample.scene.things}
    assert len(seen) > 40  # of 46
    _, lengths = tokenize([sample.record["long_caption"] for sample in flat(samples["train"])], 248)
    assert 90 < float(lengths.float().mean()) < 120 and int(lengths.max()) <= 248


def alone(shape: str, pattern: str = "plain") -> np.ndarray:
    thing = Thing(shape, "blue", pattern, "large", 0.5, 0.5, 0.8, 0.0, 30.0, (0, 0, 0))
    return np.asarray(draw(Scene("white", "plain", (0, 0, 0), (0, 0), 1.0, (thing,)), 96).image).astype(int)


def test_silhouettes_can_be_told_apart_and_fill_their_square():
    empty = np.asarray(draw(Scene("white", "plain", (0, 0, 0), (0, 0), 1.0, ()), 96).image).astype(int)
    masks = {shape: (np.abs(alone(shape) - empty) > 20).any(axis=2) for shape in RICH.shapes}
    for shape, mask in masks.items():
        rows, columns = np.nonzero(mask)
        assert max(np.ptp(rows), np.ptp(columns)) > 0.7 * 96 * 0.8, shape
        assert min(rows.min(), columns.min()) > 4 and max(rows.max(), columns.max()) < 92, shape
    for first, second in combinations(RICH.shapes, 2):
        overlap = (masks[first] & masks[second]).sum() / (masks[first] | masks[second]).sum()
        assert overlap < 0.92, (first, second, overlap)


def test_patterns_can_be_told_apart():
    pictures = [alone("square", pattern) for pattern in PATTERNS + MORE_PATTERNS]
    for first, second in combinations(pictures, 2):
        assert (np.abs(first - second).max(axis=2) > 60).mean() > 0.1


def test_diagonals_are_told_only_where_they_are_plain():
    def at(x: float, y: float) -> np.ndarray:
        return np.array([x - 0.1, y - 0.1, x + 0.1, y + 0.1])

    assert relation(at(0.2, 0.2), at(0.5, 0.5), diagonal=True) == "to the upper left of"
    assert relation(at(0.8, 0.2), at(0.5, 0.5), diagonal=True) == "to the upper right of"
    assert relation(at(0.2, 0.8), at(0.5, 0.5), diagonal=True) == "to the lower left of"
    assert relation(at(0.8, 0.8), at(0.5, 0.5), diagonal=True) == "to the lower right of"
    assert relation(at(0.5, 0.2), at(0.5, 0.5), diagonal=True) == "above"
    assert relation(at(0.35, 0.2), at(0.5, 0.5), diagonal=True) is None  # between the two
    assert relation(at(0.35, 0.2), at(0.5, 0.5)) == "above"
    assert relation(at(0.1, 0.1), at(0.9, 0.9), diagonal=True) is None  # far


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("scenes", "812298d32b7721afbfb9579dbfc53e7009eff46e61908fe3a582284d9fcfa26d"),
        ("rich_scenes", "39817b85c5175edd7e43d1a8cbfc0468629938bc8fbe12374580bcee3ea40700"),
    ],
)
def test_the_scenes_are_what_they_were(source, expected):
    """Published figures stand for these pixels and words."""
    hasher = hashlib.sha256()
    for split, count in (("pretrain", 8), ("train", 5), ("val", 2), ("test", 3)):
        for sample in (sample for index in range(count) for sample in make_samples(0, split, index, 96, source)):
            hasher.update(np.asarray(Image.open(io.BytesIO(sample.png))).tobytes())
            record = {key: value for key, value in sample.record.items() if key != "content_hash"}  # that of the compression
            hasher.update(json.dumps([record, sample.truth, sample.objects], sort_keys=True).encode())
    assert hasher.hexdigest() == expected


@pytest.mark.parametrize("source", ["scenes", "rich_scenes"])
def test_a_killed_drawing_goes_on(tmp_path, monkeypatch, source):
    config = ScenesConfig(seed=1, image_size=32, pretrain=12, train=6, val=1, test=2)
    monkeypatch.setattr(scenes_source, "CHUNK", 4)
    whole = draw_all(config, "scenes", tmp_path / "whole", 1, source)
    made, drawn = scenes_source.make_samples, []

    def killed(seed, split, index, *rest):
        drawn.append((split, index))
        if len(drawn) == limit:
            raise KeyboardInterrupt
        return made(seed, split, index, *rest)

    monkeypatch.setattr(scenes_source, "make_samples", killed)
    limit = 14
    with pytest.raises(KeyboardInterrupt):
        draw_all(config, "scenes", tmp_path / "folder", 1, source)
    first, limit = drawn.copy(), 0
    drawn.clear()
    (tmp_path / "folder/test/test-000001.png").unlink()  # its chunk is drawn again
    again = draw_all(config, "scenes", tmp_path / "folder", 1, source)
    rest = [("pretrain", index) for index in range(4, 12)]
    assert first[-1] == rest[0] and drawn == [("test", 0), ("test", 1), *rest]
    assert vars(again) | {"root": None} == vars(whole) | {"root": None} and again.choices and again.labels
    for row in whole.rows:
        assert (again.root / row["image_path"]).read_bytes() == (whole.root / row["image_path"]).read_bytes()
    assert not list((tmp_path / "folder").glob(".drawn-*"))
    drawn.clear()
    draw_all(ScenesConfig(**{**vars(config), "seed": 2}), "scenes", tmp_path / "folder", 1, source)
    assert len(drawn) == 21  # nothing of another configuration is taken


def test_what_an_older_code_drew_is_not_taken(tmp_path):
    config = ScenesConfig(seed=1, image_size=32, pretrain=2, train=0, val=0, test=0)
    stale = tmp_path / ".drawn-0123456789abcdef"
    stale.mkdir()
    (stale / "pretrain-00000000.json").write_text("{}")
    assert len(draw_all(config, "scenes", tmp_path, 1).rows) == 2 and not stale.exists()
