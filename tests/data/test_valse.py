"""The source `valse` against small files in the layout of the publication."""

import json
from dataclasses import replace

import publications as p
import pytest
from file_server import FileServer
from tiny_dataset import CONFIG

from fast_goal.data.quality import Subject, inspect_images
from fast_goal.data.records import CHOICES, load_dataset, load_skipped, write_dataset, write_table
from fast_goal.data.validation import Settings, examine
from fast_goal.errors import DataError

IMAGES = {  # by what is published of each instrument: a name, and the folder and the archive it is in
    "existence": ("v7w_2371044.jpg", "visual7w", "images"),
    "plurals": ("000000534827.jpg", "val2017", "val2017"),
    "action-replacement": ("exercising_255.jpg", "swig", "images_512"),
    "coreference-standard": ("COCO_train2014_000000254009.jpg", "train2014", "train2014"),
    "coreference-hard": ("VisualDialog_val2018_000000366853.jpg", "visdial_val2018", "VisualDialog_val2018"),
    "foil-it": ("COCO_val2014_000000567863.jpg", "val2014", "val2014"),
}


def case(file: str, votes: object = 3, caption: str = "There are no dogs.", foil: object = "There are dogs.") -> dict:
    mturk = {"foil": 0, "caption": votes, "other": 0}
    return {"dataset": "visual7w", "image_file": file, "caption": caption, "classes": 0, "mturk": mturk, "foil": foil}


@pytest.fixture
def valse(tmp_path, monkeypatch):
    p.project(tmp_path, monkeypatch)
    with FileServer({}) as server:
        yield Valse(server)


class Valse:
    def __init__(self, server: FileServer):
        self.server = server
        self.cases = {piece: {f"{piece}_0": case(file)} for piece, (file, _, _) in IMAGES.items()}

    def load(self, **values: object):
        section = p.shipped("valse") | values
        for seed, (file, folder, top) in enumerate(IMAGES.values()):
            archive = section["images"][folder]["origin"]["remote"]["file"].replace("/", "-")
            self.server.files.setdefault(archive, p.zipped({f"{top}/{file}": p.jpeg(seed), f"{top}/x.jpg": p.jpeg(99)}))
            section["images"][folder]["origin"]["remote"] = p.remote(self.server, archive)
        for piece, cases in self.cases.items():
            self.server.files[f"{piece}.json"] = json.dumps(cases).encode()
        section["files"] = {piece: p.remote(self.server, f"{piece}.json") for piece in self.cases}
        loaded = p.load("valse", section)
        write_table("tables/choices.parquet", loaded.choices, CHOICES)
        return loaded


def test_each_image_from_the_archive_that_its_name_says(valse):
    loaded = valse.load()
    assert [row["image_path"] for row in loaded.rows] == [f"{folder}/{file}" for file, folder, _ in IMAGES.values()]
    assert not list(loaded.root.rglob("x.jpg")), "only what is named is unpacked"
    assert [(row["suite"], row["group"]) for row in loaded.choices] == [("valse", piece) for piece in IMAGES]
    assert loaded.choices[0]["caption"] == "There are no dogs." and loaded.choices[0]["foils"] == ["There are dogs."]
    assert loaded.published == dict.fromkeys(IMAGES, 1) and not loaded.skipped
    assert all((row["split"], row["long_caption"], row["captions"]) == ("test", "", []) for row in loaded.rows)


def test_all_eleven_instruments_are_asked_for():
    assert len(p.shipped("valse")["files"]) == 11 and set(IMAGES) < set(p.shipped("valse")["files"])


def test_only_cases_with_two_votes_count_and_the_others_are_no_loss(valse):
    file = IMAGES["existence"][0]
    votes = {f"v{votes}": case(file, votes) for votes in (0, 1, 2)} | {
        "none": case(file) | {"mturk": None},
        "v?": case(file, "3"),
    }
    valse.cases["existence"] |= votes
    loaded = valse.load()
    assert sum(row["group"] == "existence" for row in loaded.choices) == 2 == loaded.published["existence"]
    assert p.reasons(loaded) == [
        ("", 2, "fewer than 2 votes for the caption"),
        ("", 3, "fewer than 2 votes for the caption"),
        ("", 5, "no votes"),
        ("", 6, "no votes"),
    ]
    assert loaded.skipped[1]["detail"] == "existence: v1, 1 votes"
    assert len(valse.load(min_votes=0).choices) == len(IMAGES) + 3


def test_what_cannot_be_used(valse):
    valse.cases["foil-it"] |= {
        "1": case(IMAGES["foil-it"][0], foil=["A list."]),
        "2": case(IMAGES["foil-it"][0], caption="A dog.", foil="A DOG."),
        "3": case("unknown.jpg"),
        "4": case("v7w_1.jpg"),
        "5": 3,
    }
    loaded = valse.load()
    assert sorted(p.reasons(loaded)) == sorted(
        [
            (IMAGES["foil-it"][0][:-4], 2, "foil is not text"),
            (IMAGES["foil-it"][0][:-4], 3, "foil is the caption"),
            ("unknown", 4, "image of no known archive"),
            ("v7w_1", 5, "image missing"),
            ("v7w_1", 5, "case without its image"),
            ("", 6, "no votes"),
        ]
    )


def test_archives_that_no_case_needs_are_not_fetched(valse):
    valse.cases = {"existence": valse.cases["existence"]}
    valse.load()
    asked = {request.path for request in valse.server.requests if request.path.endswith(".zip")}
    assert asked == {"valse-visual7w_images.zip"}


def test_a_file_that_is_not_understood(valse):
    valse.cases["plurals"] = []
    with pytest.raises(DataError, match=r"plurals\.json: expected an object of cases by id"):
        valse.load()


def test_a_set_without_captions_of_its_own_passes_the_validation(valse):
    """An image that is also a training image is a warning here: VALSE has images of COCO's training split."""
    loaded = valse.load()
    write_dataset("valse", loaded.root, loaded.rows, loaded.skipped, hashes=loaded.hashes, choices=loaded.choices,
                  source="valse", published=loaded.published)  # fmt: skip
    dataset = load_dataset("valse")
    copy = dataset.records.assign(image_id="x" + dataset.records["image_id"], split="train").iloc[:1]
    trained_on = replace(dataset, name="train", records=copy, choices=None, hashes=None)
    for choices, severity in ((dataset.choices, "warning"), (None, "critical")):
        subject = Subject(replace(dataset, choices=choices), None, None, load_skipped("valse"))
        settings = Settings(CONFIG, [trained_on], False, 1, None)
        found = examine(subject, inspect_images(subject.dataset), settings, None)
        (suite,) = found.suites
        bad = {rule.arguments["column"] for rule in suite.rules if rule.arguments.get("column") in suite.table
               and rule.expectation == "ExpectColumnValuesToBeNull" and suite.table[rule.arguments["column"]].notna().any()
               and rule.severity != "info"}  # fmt: skip
        assert bad == {"bytes_in_training"} and suite.table["bytes_in_training"].notna().sum() == 1
        assert [rule.severity for rule in suite.rules if rule.name == "no_test_image_in_training"] == [severity]
