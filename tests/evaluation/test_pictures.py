"""The pictures can be drawn from odd input; how they look is for people to judge."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fast_goal.evaluation import pictures
from fast_goal.evaluation.embedding import PatchMap


def test_a_retrieval_picture_of_captions_with_dollars_and_images_of_any_shape(tmp_path):
    paths = []
    for index, (mode, size) in enumerate([("RGB", (300, 40)), ("L", (20, 200)), ("CMYK", (64, 64))]):
        paths.append(tmp_path / f"{index}.jpg")
        Image.new(mode, size).save(paths[-1])
    queries = [
        pictures.Retrieval(
            caption,
            paths[0],
            {"base": paths, "finetuned": paths[:2]},
            {"base": [False, True, False], "finetuned": [True, False]},
            {"base": 2, "finetuned": 1},
        )
        for caption in ("It costs $5_a or $6^ {", "word " * 500)
    ]
    pictures.draw_retrievals(queries, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and min(image.size) > 500


def test_a_localisation_picture_with_an_even_map(tmp_path):
    view = PatchMap(Image.new("RGB", (64, 64), "red"), np.zeros((4, 4)), (0.0, 0.0, 20.0, 20.0))
    example = pictures.Localisation("A thing.", {"base": view, "finetuned": view}, {"base": True, "finetuned": False})
    pictures.draw_localisations([example], tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_without_history_there_is_no_picture(tmp_path):
    assert not pictures.draw_losses([], tmp_path / "a.png")
    assert not pictures.draw_losses([{"step": 1, "epoch": 1, "val_R@1": 3.0}], tmp_path / "a.png")
    assert not pictures.draw_validation([{"step": 1, "loss": 2.0}], tmp_path / "a.png")
    assert not pictures.draw_recall({}, [1], "x", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    assert pictures.draw_losses([{"step": 1, "epoch": 1, "loss": 2.0}], tmp_path / "a.png")


def test_matplotlibs_settings_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    pictures.draw_losses([{"step": 1, "loss": 2.0}], tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


def test_shorten_counts_what_it_leaves_out():
    assert pictures.shorten("one two  three", 3) == ("one two three", 0)
    assert pictures.shorten("one two three four five", 3) == ("one two three …", 2)


@pytest.mark.parametrize("other", ["", "A cup on a table. It costs $5_a.", "word " * 400])
def test_a_picture_of_mistakes(tmp_path, other):
    Image.new("RGB", (30, 90), "red").save(tmp_path / "a.png")
    captions = ["A dog on a table. It costs $5_a or $6^ {.", "word " * 400 + "x" * 300]
    examples = [
        pictures.Mistake(caption, tmp_path / "a.png", tmp_path / "a.png", other, {"base": 1, "finetuned": 1234})
        for caption in captions
    ]
    pictures.draw_mistakes(examples, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 1000


def marked(text, other):
    return [word for word, differs in pictures.differing(text, other) if differs]


def test_the_differing_words_are_found_sentence_by_sentence():
    text, other = "A red cube lies left of a ball. The sky is blue.", "The sky is grey. A green cube lies left of a ball!"
    assert [word for word, _ in pictures.differing(text, other)] == text.split()
    assert marked(text, other) == ["red", "blue."] and marked(other, text) == ["grey.", "green"]
    assert marked(text, text.upper()) == [] == marked(text, "The sky is blue. A red cube lies left of a ball.")
    assert marked("A dog on the grass.", "A cat on the grass.") == ["dog"]
    assert marked("A dog on the grass.", "") == ["dog", "grass."], "small words are never marked"
    assert pictures.differing("", "A cat.") == []


@pytest.mark.parametrize("same", [True, False])
def test_a_picture_of_components(tmp_path, same):
    generator = np.random.default_rng(0)

    def found(colour, side):
        maps = generator.normal(size=(2, side, side, 3))
        return pictures.Components([Image.new("RGB", (64, 64), colour)] * 2, maps, 0.5)

    both = {"base": found("red", 4), "finetuned": found("red" if same else "blue", 4 if same else 2)}
    pictures.draw_components(both, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        rows = image.height
    both["base"].maps[:] = 0  # nothing to tell apart
    pictures.draw_components(both, tmp_path / "even.png")
    assert (rows > 700) != same, "a row for the input of each model where they see the images differently"


def test_a_map_and_curves_by_length(tmp_path):
    plane = pictures.Plane(np.zeros((3, 2)), np.ones((3, 2)), 0.5, 0.4, None)
    pictures.draw_planes({"base": plane, "finetuned": plane}, "x", tmp_path / "map.png")
    points = [pictures.Point(60.0, 25, 10.0, 5.0, 15.0), pictures.Point(90.0, 30, 0.0, 0.0, 0.0)]
    assert pictures.draw_lengths({"base": points, "finetuned": points}, "x", tmp_path / "lengths.png")
    assert not pictures.draw_lengths({}, "x", tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png", "map.png"]


def suite_numbers(groups, cases):
    listed = {
        f"group {n} with a name that is far too long to be drawn": {"accuracy": 50.0 + n % 50, "cases": cases + n}
        for n in groups
    }
    found = {part: {"accuracy": 60.0, "groups": listed} for part in ("base", "finetuned", "chance")}
    return {**found, "cases": 10, "difference": {"groups": listed}}


def test_a_suite_of_many_groups_is_drawn_with_those_of_most_cases(tmp_path):
    assert [bar["cases"] for bar in pictures._bars(suite_numbers(range(30), 5))] == list(range(11, 35))
    assert [bar["label"] for bar in pictures._bars(suite_numbers(range(1), 5))] == ["all"]
    many, none = suite_numbers(range(30), 5), suite_numbers([], 0)
    pictures.draw_suites({"a $ suite": many, "another": none}, "x", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and image.height > 1000
