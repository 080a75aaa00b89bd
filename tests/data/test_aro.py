"""The sources `aro` and `aro_order` against small files in the layouts of the publications."""

import json
import random
import shutil
import string
from collections import Counter
from pathlib import Path

import publications as p
import pytest
from file_server import FileServer

from fast_goal.data import speech
from fast_goal.data.fetch import ManualStep
from fast_goal.data.records import CHOICES, write_table
from fast_goal.data.sources.aro import normalised, shuffles
from fast_goal.errors import DataError

KINDS = {"dog": "noun", "cat": "noun", "mat": "noun", "house": "noun", "black": "adjective", "white": "adjective"}
TRUE_TAGGED = speech.tagged


def tagged(texts: list[str]) -> list[list[speech.Word]]:
    """Stands in for the tagger: words at blanks, kinds from a list."""
    found = []
    for text in texts:
        words, end = [], 0
        for word in text.split():
            start = text.index(word, end)
            end = start + len(word)
            words.append(speech.Word(word, start, end, KINDS.get(word.lower(), "other"), "", word.lower()))
        found.append(words)
    return found


def relation(image: str, box: tuple, name: object = "on", true: str = "the cat is on the mat") -> dict:
    """A case of visual_genome_relation.json, with the keys that are not read."""
    corners = dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), box, strict=True))
    made = {"image_id": image[:-4], "image_path": image, "subj_id": 3, "obj_id": 4, **corners, "relation_name": name}
    return made | {"true_caption": true, "false_caption": "the mat is on the cat"}


def attribution(image: str, box: tuple, attributes: object = ("white", "black")) -> dict:
    made = relation(image, box, None, "the white cat and the black dog") | {"attributes": attributes}
    del made["relation_name"]
    return made | {"false_caption": "the black cat and the white dog", "obj1_name": "cat", "obj2_name": "dog"}


class Aro:
    def __init__(self, folder: Path):
        self.folder = folder / ".fast_goal/downloads/aro"
        self.folder.mkdir(parents=True)
        self.images = {f"images/{number}.jpg": p.jpeg(number, (40, 30)) for number in (2353562, 2317538, 1)}
        self.relation = [relation("2353562.jpg", (1, 2, 10, 20)), relation("2317538.jpg", (0, 0, 40, 30), "behind")]
        self.attribution = [attribution("2353562.jpg", (5, 5, 5, 5))]

    def load(self):
        (self.folder / "visual_genome_relation.json").write_text(json.dumps(self.relation))
        (self.folder / "visual_genome_attribution.json").write_text(json.dumps(self.attribution))
        (self.folder / "vgr_vga_images.zip").write_bytes(p.zipped(self.images))
        loaded = p.load("aro", p.shipped("aro"))
        write_table("tables/choices.parquet", loaded.choices, CHOICES)
        return loaded


@pytest.fixture
def aro(tmp_path, monkeypatch):
    return Aro(p.project(tmp_path, monkeypatch))


def test_relations_and_attributes_of_boxes(aro):
    loaded = aro.load()
    found = [
        (row["image_id"], row["suite"], row["group"], row["x1"], row["y1"], row["x2"], row["y2"]) for row in loaded.choices
    ]
    assert found == [
        ("2353562", "vg_relation", "on", 1, 2, 11, 22),
        ("2317538", "vg_relation", "behind", 0, 0, 40, 30),
        ("2353562", "vg_attribution", "white_black", 5, 5, 10, 10),
    ]
    assert loaded.choices[2]["caption"] == "the white cat and the black dog"
    assert loaded.choices[2]["foils"] == ["the black cat and the white dog"]
    assert [row["image_path"] for row in loaded.rows] == ["images/2353562.jpg", "images/2317538.jpg"]
    assert {(row["split"], row["long_caption"], *row["captions"]) for row in loaded.rows} == {("test", "")}
    assert loaded.published == {"vg_relation": 2, "vg_attribution": 1} and not loaded.skipped


def test_what_cannot_be_used(aro):
    aro.relation += [
        relation("2353562.jpg", (39, 29, 99, 99)),
        relation("2353562.jpg", (40, 0, 5, 5)),
        relation("2353562.jpg", (0, 0, "wide", 5)),
        relation("2353562.jpg", (0, 0, 5, 5), " "),
        relation("7.jpg", (0, 0, 5, 5)),
        relation("2353562.jpg", (0, 0, 5, 5), true="the mat is on the cat"),
        None,
    ]
    aro.attribution += [attribution("2353562.jpg", (0, 0, 5, 5), attributes) for attributes in (None, ["white"], ["white", 3])]
    loaded = aro.load()
    assert sorted(p.reasons(loaded)) == sorted(
        [
            ("2353562", 4, "box outside the image"),
            ("", 5, "no box"),
            ("", 6, "no relation"),
            ("7", 7, "image missing"),
            ("7", 7, "case without its image"),
            ("2353562", 8, "foil is the caption"),
            ("", 9, "no relation"),
            ("", 2, "no two attributes"),
            ("", 3, "no two attributes"),
            ("", 4, "no two attributes"),
        ]
    )
    assert loaded.notes[-1].endswith("clipped to it: 1") and loaded.choices[2]["x2"] == 40


def test_the_files_are_asked_for_all_at_once(aro):
    with pytest.raises(ManualStep) as error:
        p.load("aro", p.shipped("aro"))
    for name in ("visual_genome_relation.json", "visual_genome_attribution.json", "vgr_vga_images.zip"):
        assert str(aro.folder / name) in str(error.value)


def test_a_file_that_is_not_understood(aro):
    aro.relation = {"0": {}}
    with pytest.raises(DataError, match=r"relation\.json: expected a list of cases"):
        aro.load()


def entry(file: str, captions: list, **place: str) -> dict:
    return {"filename": file, "split": "test", "sentences": [{"raw": text} for text in captions], **place}


COCO = ["A black dog on a white mat.", "The dog  barks; (loudly)", "Dog", "dog dog dog"]


@pytest.fixture
def order(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    monkeypatch.setattr(speech, "tagged", tagged)
    with FileServer({}) as server:
        yield server


def load_order(server: FileServer, captions: list = COCO, **values: object):
    file = "COCO_val2014_000000391895.jpg"
    content = {"images": [entry(file, captions, filepath="val2014")]}
    server.files["c.zip"] = p.zipped({"dataset_coco.json": json.dumps(content).encode()})
    server.files["val2014.zip"] = p.zipped({f"val2014/{file}": p.jpeg(3, (32, 24))})
    section = p.shipped("coco_order") | values
    section["captions"] |= {
        "captions": p.remote(server, "c.zip"),
        "archives": {"val2014": p.remote(server, "val2014.zip")},
    }
    loaded = p.load("coco_order", section)
    write_table("tables/choices.parquet", loaded.choices, CHOICES)
    return loaded


def test_captions_against_their_shuffles(order):
    loaded = load_order(order)
    assert [row["caption"] for row in loaded.choices] == ["a black dog on a white mat", "the dog barks loudly"]
    first = loaded.choices[0]
    assert (first["suite"], first["group"], first["x2"], first["y2"]) == ("coco_order", "coco_order", 32.0, 24.0)
    for row in loaded.choices:
        assert 1 <= len(row["foils"]) <= 4 and row["caption"] not in row["foils"]
        assert all(Counter(foil.split()) == Counter(row["caption"].split()) for foil in row["foils"])
    assert [(row["sample"][-6:], row["reason"], row["detail"]) for row in loaded.skipped] == [
        ("391895", "no shuffle differs", "Dog"),
        ("391895", "no shuffle differs", "dog dog dog"),
    ]
    unchanged = 16 - sum(len(row["foils"]) for row in loaded.choices)
    assert loaded.notes[-1] == f"shuffles that left the caption as it was: {unchanged}"
    assert [(row["captions"], row["source"], row["split"]) for row in loaded.rows] == [([], "aro_order", "test")]
    assert loaded.published == {"test": 1}


def test_the_draws_depend_on_image_caption_and_seed_alone(order):
    def foils(loaded) -> dict:
        return {row["caption"]: row["foils"] for row in loaded.choices}

    long = [" ".join(random.Random(seed).sample(string.ascii_lowercase, 20)) for seed in range(2)]
    both = foils(load_order(order, long))
    for path in ("data/datasets", ".fast_goal"):
        shutil.rmtree(path)
    alone = foils(load_order(order, long[1:]))
    assert alone[long[1]] == both[long[1]] and both[long[0]] != both[long[1]]
    assert foils(load_order(order, long[1:], seed=1)) != alone


def test_a_mark_with_a_blank_before_it_is_no_other_text(order, monkeypatch):
    """CLIP reads `dog ,` as `dog,`: such a foil could only tie."""
    monkeypatch.setattr(speech, "tagged", TRUE_TAGGED)  # for which marks are words of their own
    loaded = load_order(order, ["A dog, asleep.", "Tom's dog, asleep on a mat in the sun."])
    assert len(loaded.choices) == 2
    for row in loaded.choices:
        read = [foil.replace(" ,", ",").replace(" 's", "'s") for foil in row["foils"]]
        assert row["caption"] not in read


def test_no_caption_at_all(order):
    with pytest.raises(DataError, match="no caption has a shuffle that differs from it"):
        load_order(order, ["Dog", "Cat."])


def test_flickr_is_as_shipped_but_for_its_images():
    coco, flickr = p.shipped("coco_order"), p.shipped("flickr_order")
    assert (flickr["suite"], flickr["captions"]["split_file"]) == ("flickr_order", "dataset_flickr30k.json")
    assert flickr["captions"]["captions"] == coco["captions"]["captions"] == p.shipped("mscoco")["captions"]
    assert flickr["captions"]["manual"] == p.shipped("flickr30k")["manual"]


def slow_normalised(caption: str, max_words: int) -> str:
    """ARO's rule, a character at a time."""
    kept = "".join(" " if letter in '.!"()*#:;~' else letter for letter in caption.lower())
    words = [word for word in kept.replace("\n", " ").replace("\t", " ").split(" ") if word]
    return " ".join(words[:max_words])


@pytest.mark.parametrize(
    "caption",
    [
        'A "Dog", (black);  runs... fast!\n',
        "one two three four five six",
        " . ",
        "#1: it's 5~6 * 2 - a/b?",
        "tab\tand\nline",
    ],
)
@pytest.mark.parametrize("most", [3, 30])
def test_normalised_as_aro_does(caption: str, most: int):
    assert normalised(caption, most) == slow_normalised(caption, most)


def test_captions_are_cut_after_thirty_words():
    words = [f"w{number}" for number in range(40)]
    assert normalised(" ".join(words), 30).split() == words[:30]


TEXT = "a black dog and a white cat near the house on a mat ."


def places(words: list[str], wanted: str) -> list[int]:
    return [place for place, word in enumerate(words) if KINDS.get(word, "other") == wanted]


@pytest.mark.parametrize("seed", range(5))
def test_each_shuffle_moves_what_it_may_and_nothing_else(seed: int):
    (words,) = tagged([TEXT])
    before = TEXT.split()
    named, rest, within, threes = (text.split() for text in shuffles(words, random.Random(seed)))
    for kind in ("noun", "adjective"):
        spots = places(before, kind)
        assert Counter(named[spot] for spot in spots) == Counter(before[spot] for spot in spots)
        assert [rest[spot] for spot in spots] == [before[spot] for spot in spots]
    others = places(before, "other")
    assert [named[spot] for spot in others] == [before[spot] for spot in others]
    assert Counter(rest[spot] for spot in others) == Counter(before[spot] for spot in others)
    for begin in range(0, len(before), 3):
        assert Counter(within[begin : begin + 3]) == Counter(before[begin : begin + 3])
    wholes = [tuple(before[begin : begin + 3]) for begin in range(0, len(before), 3)]
    rebuilt, remaining = [], list(threes)
    while remaining:  # the short last one may stand anywhere
        size = next(size for size in (3, 2, 1) if tuple(remaining[:size]) in wholes)
        rebuilt.append(tuple(remaining[:size]))
        del remaining[:size]
    assert Counter(rebuilt) == Counter(wholes)


def test_every_order_is_drawn():
    (words,) = tagged(["dog cat mat"])
    drawn = {shuffles(words, random.Random(seed))[0] for seed in range(100)}
    assert len(drawn) == 6


def test_with_the_true_tagger():
    (words,) = speech.tagged(["A black dog, a white cat and Tom's red house."])
    named, rest, *_ = shuffles(words, random.Random(0))
    before = [word.text for word in words]
    assert "black" in before and "," in before
    assert rest.split()[before.index("dog")] == "dog" and rest.split()[before.index("black")] == "black"
    assert named.split()[before.index("and")] == "and" and named != " ".join(before)
