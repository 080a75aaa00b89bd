"""The procedural scenes: captions are read back by a small grammar of the test's own and compared with boxes and pixels."""

import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.records import load_dataset, write_dataset
from fast_goal.data.sources import source_config
from fast_goal.data.sources.scenes import choices, labels, language, vocabulary
from fast_goal.data.sources.scenes import source as scenes_source
from fast_goal.data.sources.scenes.drawing import Drawing, draw
from fast_goal.data.sources.scenes.language import Plan, cell, holds, relation
from fast_goal.data.sources.scenes.layout import MIN_VISIBLE
from fast_goal.data.sources.scenes.samples import make_samples
from fast_goal.data.sources.scenes.sheet import write_sheet
from fast_goal.data.sources.scenes.source import ScenesConfig, draw_all, drop_repeated, load
from fast_goal.data.sources.scenes.vocabulary import COLOURS, PATTERNS, SHAPES, SIZES, Scene, Thing
from fast_goal.errors import ConfigError

SIZE = 192
COLOUR, SHAPE, PATTERN = "|".join(COLOURS), "|".join(SHAPES), "|".join(PATTERNS)
ENDINGS = {"with stripes": "striped", "with dots": "dotted", "with no pattern": "plain"}
NOUN = (
    rf"(?P<article>An?) (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<pattern>{PATTERN}) )?(?P<colour>{COLOUR}) "
    rf"(?P<shape>{SHAPE})(?: (?P<ending>{'|'.join(ENDINGS)}))?"
)
OTHER = rf"(?P<relation>to the left of|to the right of|above|below) the (?P<look>(?:{PATTERN}) (?:{COLOUR}) (?:{SHAPE}))"
GROUPS = ("swap_colours", "swap_positions", "replace_shape", "add_object", "count")
COLUMNS = {"left": 0, "middle": 1, "right": 2}
ROWS = {"top": 0, "middle": 1, "bottom": 2}


@pytest.fixture(scope="module")
def samples() -> dict:
    counts = {"pretrain": 60, "train": 60, "test": 30, "val": 5}
    return {split: [make_samples(3, split, index, SIZE) for index in range(count)] for split, count in counts.items()}


def flat(groups: list[list]) -> list:
    return [sample for group in groups for sample in group]


def captioned(samples: dict) -> list:
    return flat(samples["train"]) + flat(samples["val"]) + flat(samples["test"])


def look(row: dict) -> str:
    return f"{row['pattern']} {row['colour']} {row['label']}"


def box(row: dict) -> np.ndarray:
    return np.array([row[name] for name in ("x1", "y1", "x2", "y2")])


def centre(row: dict) -> np.ndarray:
    x1, y1, x2, y2 = box(row)
    return np.array([x1 + x2, y1 + y2]) / 2 / SIZE


def check_sentence(sentence: str, objects: list[dict]) -> dict:
    """Asserts that an object sentence is well formed and true; returns the row of the object it is about."""
    assert re.fullmatch(r"[A-Z][A-Za-z, -]+\.", sentence), sentence
    by_look = {look(row): row for row in objects}
    assert len(by_look) == len(objects)
    related = re.search(OTHER, sentence, re.IGNORECASE)
    rest = re.sub(OTHER, "", sentence, flags=re.IGNORECASE)
    (noun,) = re.finditer(NOUN, rest, re.IGNORECASE)
    first = noun.group().split()[1]
    assert (noun["article"].lower() == "an") == (first[0] in "aeiou"), sentence
    assert (noun["pattern"] is None) != (noun["ending"] is None), sentence
    pattern = noun["pattern"] or ENDINGS[noun["ending"]]
    subject = by_look[f"{pattern} {noun['colour']} {noun['shape']}"]
    assert noun["size"] in (None, subject["size"])
    if related:
        other = by_look[related["look"].lower()]
        dx, dy = centre(subject) - centre(other)
        word = related["relation"].lower()
        amount, askew = {"to the left of": (-dx, dy), "to the right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[word]
        assert amount > 0.1 and amount > abs(askew), sentence
        assert np.hypot(dx, dy) < 0.55, sentence
    told = re.search(
        r"(?:in|at|on) the (?:(top|bottom) (left|right) corner|(top|bottom|middle)|(left|right) side)", rest, re.IGNORECASE
    )
    if told:
        row, column, alone, side = told.groups()
        x, y = centre(subject)
        assert int(3 * y) == ROWS[row or alone or "middle"], sentence
        assert int(3 * x) == COLUMNS[column or side or "middle"], sentence
    assert not (told and related)
    return subject | {"told": bool(told), "related": bool(related)}


def test_every_object_sentence_is_true_and_marks_its_object(samples):
    told = related = total = 0
    for sample in captioned(samples):
        caption = sample.record["long_caption"]
        assert len(sample.truth) == len(sample.objects) == len(sample.scene.things)
        seen = set()
        for row in sample.truth:
            subject = check_sentence(caption[row["char_start"] : row["char_end"]], sample.objects)
            assert np.array_equal(box(subject), box(row)) and subject["label"] == row["label"]
            seen.add(subject["object_index"])
            told, related, total = told + subject["told"], related + subject["related"], total + 1
        assert len(seen) == len(sample.objects)
    assert 0.40 < told / total < 0.50
    assert 0.15 < related / total < 0.26


def test_overall_sentence_is_true(samples):
    numbers = {4: "four", 5: "five", 6: "six"}
    places = set()
    for sample in captioned(samples):
        sentences = split_sentences(sample.record["long_caption"])
        (index,) = set(range(len(sentences))) - {row["sentence_index"] for row in sample.truth}
        places.add(index)
        text = sentences[index].text.lower()
        assert f"{numbers[len(sample.objects)]} objects" in text
        assert f"a {sample.scene.texture} {sample.scene.background} background" in text
    assert len(places) > 3


def test_sentence_spans_are_those_of_the_splitter(samples):
    for sample in captioned(samples):
        caption = sample.record["long_caption"]
        sentences = split_sentences(caption)
        assert len(sentences) == len(sample.objects) + 1 == caption.count(".")
        for row in sample.truth:
            sentence = sentences[row["sentence_index"]]
            assert (sentence.start, sentence.end) == (row["char_start"], row["char_end"])


def test_wording_varies(samples):
    blank = re.compile(rf"{NOUN}|{OTHER}|in the \w+ \w+ corner|[ioa][nt] the \w+( side)? of the picture", re.IGNORECASE)
    texts = [
        sample.record["long_caption"][row["char_start"] : row["char_end"]]
        for sample in captioned(samples)
        for row in sample.truth
    ]
    assert len({blank.sub("_", text) for text in texts}) >= 12


def test_long_captions_are_long_enough(samples):
    captions = [make_samples(5, "train", index, 32)[0].record["long_caption"] for index in range(250)]
    _, lengths = tokenize(captions, 248)
    assert 78 <= float(lengths.float().mean()) <= 86
    assert 0.5 <= float((lengths > 77).float().mean()) <= 0.7
    assert int(lengths.max()) <= 248


def test_short_captions_are_sentences_about_large_objects(samples):
    counts = set()
    scenes = [sample for sample in flat(samples["pretrain"]) if len(sample.objects) > 1]
    for sample in captioned(samples) + scenes:
        areas = sorted((np.prod(box(row)[2:] - box(row)[:2]) for row in sample.objects), reverse=True)
        counts.add(len(sample.record["captions"]))
        for caption in sample.record["captions"]:
            subject = check_sentence(caption, sample.objects)
            assert np.prod(box(subject)[2:] - box(subject)[:2]) >= areas[:3][-1] or "-twin" in sample.record["image_id"]
    assert counts == {1, 2}


def test_pretrain_is_half_close_ups_with_short_captions_only(samples):
    pretrain = flat(samples["pretrain"])
    close_ups = [sample for sample in pretrain if len(sample.objects) == 1]
    assert 0.3 < len(close_ups) / len(pretrain) < 0.7
    assert all(sample.record["long_caption"] == "" and sample.truth == [] for sample in pretrain)
    for sample in close_ups:
        subject = sample.objects[0]
        assert max(box(subject)[2:] - box(subject)[:2]) > 0.25 * SIZE
        for caption in sample.record["captions"]:
            assert all(subject[word] in caption for word in ("label", "colour"))


def test_words_for_size_and_place_do_not_tell_a_scene_from_a_close_up():
    samples = [make_samples(0, "pretrain", index, 32)[0] for index in range(300)]
    words = "small|medium|large", "corner|top of|bottom of|side of|middle of", "left of|right of|above|below"
    for pattern in words:
        shares = []
        for close_up in (True, False):
            chosen = [sample for sample in samples if (len(sample.objects) == 1) == close_up]
            captions = [text for sample in chosen for text in sample.record["captions"]]
            shares.append(sum(bool(re.search(pattern, text)) for text in captions) / len(captions))
        assert abs(shares[0] - shares[1]) < 0.12, (pattern, shares)


def test_scenes_keep_their_promises(samples):
    for sample in captioned(samples):
        scene = sample.scene
        drawing = draw(scene, SIZE)
        assert drawing.visible.min() >= MIN_VISIBLE
        assert 4 <= len(scene.things) <= 6
        assert all(thing.colour != scene.background for thing in scene.things)
        boxes = drawing.boxes
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.min() >= 0 and boxes.max() <= SIZE
        assert np.array_equal(boxes, np.stack([box(row) for row in sample.objects]))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.png))), np.asarray(drawing.image))
    assert any((draw(sample.scene, SIZE).visible < 0.97).any() for sample in captioned(samples)), "nothing overlaps"


def touched(scene: Scene, things: tuple[Thing, ...]) -> np.ndarray:
    """Pixels that drawing `things` changes on the empty background."""
    empty = np.asarray(draw(replace(scene, things=()), SIZE).image).astype(int)
    return (np.asarray(draw(replace(scene, things=things), SIZE).image) != empty).any(axis=2)


def bounds(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_boxes_enclose_exactly_what_is_visible(samples):
    pretrain = [sample for sample in flat(samples["pretrain"]) if len(sample.objects) > 1]
    for sample in [*flat(samples["train"])[:15], *pretrain[:10]]:
        alone = [touched(sample.scene, (thing,)) for thing in sample.scene.things]
        for index, row in enumerate(sample.objects):
            # pixels on the edge of a covering thing show both: the box lies between with and without them
            most = bounds(alone[index])
            least = bounds(alone[index] & ~np.any([np.zeros_like(alone[0]), *alone[index + 1 :]], axis=0))
            found = box(row)
            assert (found[:2] >= most[:2]).all() and (found[2:] <= most[2:]).all()
            assert (found[:2] <= least[:2]).all() and (found[2:] >= least[2:]).all()
        top = sample.objects[-1]
        assert np.array_equal(box(top), bounds(alone[-1]))


def test_a_hidden_object_has_no_box():
    small, large = (
        Thing("circle", colour, "plain", "small", 0.5, 0.5, extent, 0, 0, (0, 0, 0))
        for colour, extent in (("red", 0.2), ("blue", 0.8))
    )
    drawing = draw(Scene("gray", "plain", (0, 0, 0), (0, 0), 1.0, (small, large)), 64)
    assert drawing.visible.tolist() == [0, 1] and drawing.boxes[0].tolist() == [0, 0, 0, 0]


def test_twins_differ_in_one_attribute_and_in_nothing_else(samples):
    changed = set()
    masks = [(rf"\b(?:{COLOUR})\b(?! background)", "COLOUR"), (rf"\b(?:{SHAPE})\b", "SHAPE"), (r"\b[Aa]n\b", "a")]
    masks += [(rf"\b(?:{PATTERN})\b(?= COLOUR)", "PATTERN"), ("|".join(ENDINGS), "ENDING"), (r"\bA\b", "a")]
    for scene, twin in samples["test"] + samples["val"]:
        assert twin.record["image_id"] == f"{scene.record['image_id']}-twin"
        columns = ("label", "colour", "pattern", "size")
        pairs = zip(scene.objects, twin.objects, strict=True)
        differences = [(index, name) for index, (a, b) in enumerate(pairs) for name in columns if a[name] != b[name]]
        ((index, name),) = differences
        assert name != "size"
        changed.add(name)
        first, second = scene.record["long_caption"], twin.record["long_caption"]
        assert first != second
        assert scene.objects[index][name] != twin.objects[index][name]
        assert scene.record["content_hash"] != twin.record["content_hash"]
        for pattern, word in masks:
            first, second = re.sub(pattern, word, first), re.sub(pattern, word, second)
        assert first == second
        a, b = scene.scene, twin.scene
        assert (a.background, a.texture, a.tint, a.phase, a.zoom) == (b.background, b.texture, b.tint, b.phase, b.zoom)
        pixels = [np.asarray(Image.open(io.BytesIO(sample.png))).astype(int) for sample in (scene, twin)]
        share = (pixels[0] != pixels[1]).any(axis=2).mean()
        assert 0 < share < 0.3
    assert changed == {"label", "colour", "pattern"}


ANY_NOUN = re.sub(r"\(\?P<\w+>", "(?:", NOUN)
TWO = re.compile(f"({ANY_NOUN}) and ({ANY_NOUN})", re.IGNORECASE)


def is_true(text: str, sample) -> bool:
    """Whether every sentence of a caption is true; one that names two objects is read as one about each of them."""
    for sentence in (sentence.text for sentence in split_sentences(text)):
        about = {TWO.sub(rf"\{number}", sentence) for number in (1, 2)} if " and " in sentence else {sentence}
        try:
            if "objects" in sentence:
                (number,) = re.findall("four|five|six", sentence.lower())
                assert {"four": 4, "five": 5, "six": 6}[number] == len(sample.objects)
                assert f"{sample.scene.texture} {sample.scene.background} background" in sentence
            else:
                assert all(check_sentence(one[0].upper() + one[1:], sample.objects) for one in about)
        except (AssertionError, KeyError):
            return False
    return True


def asked(samples: dict) -> list:
    return flat(samples["val"]) + flat(samples["test"])


def test_choices_have_one_true_and_one_false_caption(samples):
    for sample in asked(samples):
        for row in sample.choices:
            (foil,) = row["foils"]
            if row["suite"] == "scenes_captions":  # other tests say that it is true
                assert row["caption"] == sample.record["long_caption"]
            else:
                assert is_true(row["caption"], sample), row
            assert not is_true(foil, sample), row
            assert len(split_sentences(foil)) == len(split_sentences(row["caption"]))
            assert all((a == "an") == (noun[0] in "aeiou") for a, noun in re.findall(r"\b([Aa]n?) (\w+)", foil.lower()))
            assert (row["x1"], row["y1"], row["x2"], row["y2"]) == (0, 0, SIZE, SIZE)
            assert row["image_id"] == sample.record["image_id"]


def test_foils_change_what_their_group_says(samples):
    """By the words: which colours, shapes, numbers and words for places each of the two captions has."""
    kinds = {
        "colours": COLOUR,
        "shapes": SHAPE,
        "numbers": "four|five|six",
        "places": "top|bottom|left|right|middle|above|below",
    }
    order = {name: re.compile(rf"\b(?:{pattern})\b") for name, pattern in kinds.items()}
    for sample in asked(samples):
        for row in sample.choices:
            true, false = (
                {name: words.findall(text.lower()) for name, words in order.items()}
                for text in (row["caption"], row["foils"][0])
            )
            changed = {name for name in order if true[name] != false[name]}
            expected = {
                "swap_colours": [{"colours"}],
                "swap_positions": [{"places"}, {"shapes"}, {"colours"}, {"colours", "shapes"}, set()],
                "replace_shape": [{"shapes"}],
                "add_object": [{"colours", "shapes"}],
                "count": [{"numbers"}],
            }[row["group"]]
            assert changed in expected, row
            if row["group"] == "swap_positions" and "places" not in changed:
                assert sorted(true["colours"]) == sorted(false["colours"]) and row["suite"] == "scenes_sentences"
            if row["group"] == "swap_colours" and row["suite"] == "scenes_sentences":
                assert true["colours"] == false["colours"][::-1] and len(true["colours"]) == 2
            if row["group"] == "add_object":
                assert len(false["shapes"]) == len(true["shapes"]) + 1


@pytest.mark.parametrize("seed", range(8))
def test_colours_are_not_exchanged_where_what_is_said_would_still_be_true(seed):
    """The plain red star with the blue cup's colour would be the plain blue star, which is there too."""
    looks = [("star", "red"), ("cup", "blue"), ("star", "blue"), ("cup", "red")]
    places = [(0.2, 0.2), (0.5, 0.2), (0.2, 0.5), (0.5, 0.5)]
    things = [
        Thing(shape, colour, "plain", "small", x, y, 0.2, 0, 0, (0, 0, 0))
        for (shape, colour), (x, y) in zip(looks, places, strict=True)
    ]
    boxes = np.array([[x - 0.1, y - 0.1, x + 0.1, y + 0.1] for x, y in places])
    plans = [Plan(number, "The picture shows {thing}.", False, False) for number in range(4)]

    def made(things: list[Thing]) -> list:
        scene = Scene("gray", "plain", (0, 0, 0), (0, 0), 1.0, tuple(things))
        found = choices.make_choices(np.random.default_rng(seed), scene, boxes, plans, vocabulary.PLAIN, language.PLAIN)
        return [choice for choice in found if choice.group == "swap_colours"]

    assert made(things) == []
    one, two = made([*things[:3], replace(things[3], pattern="dotted")])  # it can exchange with the two blue ones
    assert all(re.search("dotted blue cup|blue cup with dots", choice.foil) for choice in (one, two))


def test_every_image_of_val_and_test_has_choices_of_every_group_and_no_other_has(samples):
    images = asked(samples)
    assert all(any("-twin" in sample.record["image_id"] for sample in pair) for pair in samples["test"])
    counts = Counter((row["suite"], row["group"]) for sample in images for row in sample.choices)
    assert set(counts) == {(suite, group) for suite in ("scenes_sentences", "scenes_captions") for group in GROUPS}
    assert all(counts["scenes_sentences", group] == len(images) for group in GROUPS)
    assert all(counts["scenes_captions", group] > 0.8 * len(images) for group in GROUPS)
    assert max(Counter((row["suite"], row["group"]) for row in sample.choices).most_common(1)[0][1] for sample in images) == 1
    assert not any(sample.choices or sample.labels for sample in flat(samples["train"]) + flat(samples["pretrain"]))
    first, twin = samples["test"][0]
    again = make_samples(3, "test", 0, SIZE)
    assert [sample.choices for sample in again] == [first.choices, twin.choices]
    assert [row["foils"] for row in first.choices] != [row["foils"] for row in twin.choices]


def test_labels_are_those_of_objects_that_lie_free(samples):
    images, classes = asked(samples), labels.classes(vocabulary.PLAIN)
    assert sum(len(sample.labels) for sample in images) > 3 * len(images)  # two suites, nearly two objects
    for sample in images:
        drawing = draw(sample.scene, SIZE)
        boxes = [tuple(box(row)) for row in sample.objects]
        by_suite = {suite: [row for row in sample.labels if row["suite"] == suite] for suite in classes}
        assert sum(map(len, by_suite.values())) == len(sample.labels)
        assert [tuple(box(row)) for row in by_suite["scenes_shapes"]] == [tuple(box(row)) for row in by_suite["scenes_colours"]]
        for suite, column in (("scenes_shapes", "label"), ("scenes_colours", "colour")):
            assert len(by_suite[suite]) <= labels.PER_IMAGE
            for row in by_suite[suite]:
                thing = boxes.index(tuple(box(row)))
                assert row["label"] == sample.objects[thing][column] and row["label"] in classes[suite]["names"]
                assert drawing.visible[thing] > 0.98
                mine = np.zeros((SIZE, SIZE), dtype=bool)
                x1, y1, x2, y2 = map(int, box(row))
                mine[y1:y2, x1:x2] = True
                for other in boxes[:thing] + boxes[thing + 1 :]:
                    x1, y1, x2, y2 = map(int, other)
                    assert mine[y1:y2, x1:x2].sum() <= 0.1 * mine.sum()


def test_overlapped_and_tiny_objects_are_not_labelled():
    def thing(colour: str) -> Thing:
        return Thing("circle", colour, "plain", "small", 0.5, 0.5, 0.2, 0, 0, (0, 0, 0))

    scene = Scene("gray", "plain", (0, 0, 0), (0, 0), 1.0, tuple(map(thing, ("red", "blue", "green", "pink"))))
    boxes = np.array([[0, 0, 20, 20], [10, 10, 30, 30], [40, 40, 60, 60], [70, 70, 90, 77]])
    picture = Image.new("RGB", (100, 100))

    def labelled(visible: list[float]) -> list[tuple[int, str]]:
        found = labels.make_labels(np.random.default_rng(0), scene, Drawing(picture, boxes, np.array(visible)))
        return [(label.thing, label.label) for label in found if label.suite == labels.COLOURS]

    assert labelled([0.8, 1, 1, 1]) == [(2, "green")]
    assert labelled([0.8, 1, 0.9, 1]) == []


def test_class_captions_are_good_english_in_the_words_of_the_captions():
    words = set(re.findall(r"\w+", " ".join([*language.UNPLACED, *SIZES, "a object"]).lower()))
    for suite, names in (("scenes_shapes", SHAPES), ("scenes_colours", tuple(COLOURS))):
        classes = labels.classes(vocabulary.PLAIN)[suite]
        assert tuple(classes["names"]) == names and len(set(classes["templates"])) == 6
        for template in classes["templates"]:
            assert template.count("{}") == 1 and not re.search(r"\ban? \{", template)
            assert set(re.findall(r"\w+", template.lower())) <= words


def test_position_and_relation_are_not_told_where_they_are_doubtful():
    def at(x: float, y: float) -> np.ndarray:
        return np.array([x - 0.1, y - 0.1, x + 0.1, y + 0.1])

    assert cell(at(0.2, 0.8)) == (2, 0)
    assert cell(at(0.5, 0.5)) == (1, 1)
    assert cell(at(1 / 3 + 0.01, 0.5)) is None and cell(at(0.5, 2 / 3 - 0.01)) is None
    assert relation(at(0.2, 0.5), at(0.5, 0.55)) == "to the left of"
    assert relation(at(0.5, 0.5), at(0.2, 0.5)) == "to the right of"
    assert relation(at(0.5, 0.2), at(0.5, 0.5)) == "above"
    assert relation(at(0.5, 0.5), at(0.5, 0.2)) == "below"
    assert relation(at(0.2, 0.2), at(0.5, 0.5)) is None  # askew
    assert relation(at(0.1, 0.5), at(0.8, 0.5)) is None  # far
    assert relation(at(0.5, 0.5), at(0.55, 0.5)) is None  # close


def test_a_plan_holds_only_where_its_place_is_true():
    boxes = np.array([[0.1, 0.1, 0.3, 0.3], [0.5, 0.1, 0.7, 0.3]])
    plans = {place: Plan(0, "{Thing} is {place}.", True, False, place) for place in [(0, 0), ("to the left of", 1), None]}
    assert all(holds(plan, boxes) for plan in plans.values())
    moved = boxes + np.array([[0.35, 0.3, 0.35, 0.3], [0, 0, 0, 0]])
    assert [holds(plan, moved) for plan in plans.values()] == [False, False, True]


def test_same_seed_same_bytes_on_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_source, "WORTH_PROCESSES", 1)
    config = ScenesConfig(seed=1, image_size=48, pretrain=60, train=20, val=10, test=20)
    one, two = (draw_all(config, "scenes", tmp_path / str(processes), processes) for processes in (1, 2))
    assert vars(one) | {"root": None} == vars(two) | {"root": None} and one.choices and one.labels
    for row in one.rows:
        assert (one.root / row["image_path"]).read_bytes() == (two.root / row["image_path"]).read_bytes()
    assert [row["split"] for row in one.rows].count("test") == 40 and [row["split"] for row in one.rows].count("val") == 20


def test_seed_split_and_index_all_matter():
    keys = [(0, "train", 0), (1, "train", 0), (0, "pretrain", 1), (0, "train", 1), (0, "val", 0), (0, "test", 0)]
    drawn = [make_samples(seed, split, index, 32)[0].png for seed, split, index in keys]
    assert len(set(drawn)) == len(keys)
    assert make_samples(0, "train", 0, 32)[0].png == drawn[0]


def test_load_makes_a_data_set_and_removes_files_of_an_earlier_one(tmp_path):
    values = {"source": "scenes", "seed": 2, "image_size": 40, "pretrain": 3, "train": 4, "val": 2, "test": 3}
    loader, config = source_config(values, "download.datasets.scenes")
    assert loader is load
    loader(config, "scenes", tmp_path / "scenes")
    (tmp_path / "scenes" / "train" / ".train-000000.png.123.tmp").write_bytes(b"half")
    smaller = ScenesConfig(seed=2, image_size=40, pretrain=3, train=2, val=2, test=3)
    loaded = load(smaller, "scenes", tmp_path / "scenes")
    files = {path.relative_to(loaded.root).as_posix() for path in loaded.root.rglob("*.*")}
    masks = {row["mask_path"] for row in loaded.masks}
    assert files == {row["image_path"] for row in loaded.rows} | masks and len(files) - len(masks) == 3 + 2 + 4 + 6
    write_dataset(
        "scenes",
        loaded.root,
        loaded.rows,
        loaded.skipped,
        loaded.truth,
        loaded.objects,
        choices=loaded.choices,
        labels=loaded.labels,
        classes=loaded.classes,
        source="scenes",
        folder=tmp_path / "records",
    )
    dataset = load_dataset("scenes", tmp_path / "records")
    assert len(dataset.split("test")) == 6 and set(dataset.truth.image_id) <= set(dataset.records.image_id)
    assert set(dataset.objects.image_id) == set(dataset.records.image_id)
    assert set(dataset.choices.image_id) == set(dataset.split("val", "test").image_id) >= set(dataset.labels.image_id)
    assert set(dataset.labels.suite) == set(dataset.classes)
    assert Image.open(dataset.path(dataset.records.iloc[0])).size == (40, 40)


def test_repeated_images_are_left_out_and_counted():
    rows = {
        "records": [
            {"image_id": name, "content_hash": key} for name, key in (("test-0", "a"), ("test-1", "b"), ("train-0", "a"))
        ],
        "truth": [{"image_id": "train-0"}, {"image_id": "test-0"}],
        "objects": [{"image_id": "train-0"}],
        "choices": [{"image_id": "train-0"}, {"image_id": "test-1"}],
    }
    kept, skipped = drop_repeated(rows)
    assert [row["image_id"] for row in kept["records"]] == ["test-0", "test-1"]
    assert kept["truth"] == [{"image_id": "test-0"}] and kept["objects"] == []
    assert kept["choices"] == [{"image_id": "test-1"}]
    assert [(row["sample"], row["reason"]) for row in skipped] == [("train-0", "duplicate image")]
    assert "test-0" in skipped[0]["detail"]


def test_config_file_fits_and_bad_values_are_named():
    conf = Path(scenes_source.__file__).parents[3] / "conf" / "dataset" / "scenes.yaml"
    values = yaml.safe_load(conf.read_text())["download"]["datasets"]["scenes"]
    _, config = source_config(values, "download.datasets.scenes")
    assert isinstance(config, ScenesConfig)
    with pytest.raises(ConfigError, match=r"download\.datasets\.scenes\.image_size"):
        source_config(values | {"image_size": 8}, "download.datasets.scenes")


def test_sheet_is_a_picture(tmp_path):
    write_sheet(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000
