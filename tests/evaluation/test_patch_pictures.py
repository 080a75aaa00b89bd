"""The pictures over patches can be drawn from odd input; how they look is for people to judge."""

import numpy as np
import pytest
from PIL import Image

from fast_goal.data.masks import IGNORED
from fast_goal.evaluation import patch_pictures
from fast_goal.evaluation.patch_pictures import Attention, Look, Segmented


def look(box=(0.0, 0.0, 20.0, 20.0), values=None):
    grid = np.zeros((4, 4)) if values is None else np.asarray(values)
    return Look(Image.new("RGB", (64, 64), "red"), grid, box)


def test_the_best_patch_and_whether_it_hits():
    grid = np.zeros((4, 4))
    grid[2, 1] = 0.5
    assert look(values=grid).best == (24.0, 40.0)
    assert look((24.0, 32.0, 30.0, 41.0), grid).hit is True
    assert look((0.0, 0.0, 24.0, 64.0), grid).hit is False, "x2 is exclusive"
    assert look(None, grid).hit is None


def test_a_picture_of_the_modes(tmp_path):
    recall = {way: {"R@1": 5.0, "R@5": 50.0} for way in ("text_to_image", "image_to_text")}
    found = {"global": recall, "conditioned": recall, "rerank": recall}
    patch_pictures.draw_modes({"long": found, "sentences": found}, [1, 5], "x", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.format == "PNG" and min(image.size) > 500


@pytest.mark.parametrize("box", [None, (0.0, 0.0, 20.0, 20.0)])
def test_pictures_of_attention(tmp_path, box):
    even = look(box)
    words = {"a $5_a ^{ phrase of words that is far too long for a title": even, "thing": look(box, np.eye(4) / 8)}
    examples = [
        Attention("It costs $5_a or $6^ {" * 20, even, {"base": even, "finetuned": even}, words),
        Attention("A thing.", even, {"base": even, "finetuned": even}, {}),
    ]
    patch_pictures.draw_attention(examples, tmp_path / "attention.png")
    patch_pictures.draw_words(examples, tmp_path / "words.png")
    patch_pictures.draw_words(examples[1:], tmp_path / "none.png")
    for name in ("attention", "words"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG" and min(image.size) > 500


def test_a_picture_of_segmentation(tmp_path):
    names = [f"class {number} $ with a name that is far too long" for number in range(40)]
    generator = np.random.default_rng(0)
    truth = generator.integers(IGNORED, 40, (30, 50))
    nothing, image = np.full((30, 50), IGNORED), Image.new("RGB", (50, 30))
    examples = [
        Segmented(image, truth, {"base": truth, "finetuned": nothing}),
        Segmented(image, nothing, {"base": truth, "finetuned": np.zeros((30, 50), int)}),
    ]
    patch_pictures.draw_segmentation(examples, names, "a $ title", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.format == "PNG" and min(drawn.size) > 500


def test_colours_of_classes():
    truth = np.array([[3, 3, 1, IGNORED]])
    example = Segmented(Image.new("RGB", (4, 1)), truth, {"base": np.array([[0, 0, 0, 5]]), "finetuned": truth})
    colours = patch_pictures._colours(example, [f"class {number}" for number in range(12)])
    shown = [tuple(colours[number]) for number in (3, 1, 0)]
    assert len(colours) == 12 and len(set(shown)) == 3 and len({tuple(colour) for colour in colours}) == 9
    named = patch_pictures._colours(example, ["red", "white", "black", "brown", "pink", "orange"])
    assert named[:2].tolist() == [[1, 0, 0], [1, 1, 1]], "what is called red is red"


def test_a_name_stands_inside_its_area():
    area = np.zeros((40, 600), bool)
    area[5:35, 100:140] = area[3, :] = True
    column, row = patch_pictures._inmost(area)
    assert area[row, column] and 110 <= column < 130 and 12 <= row < 28
    thin = np.zeros((300, 300), bool)
    thin[7, 3] = True  # falls between the pixels that are looked at
    assert patch_pictures._inmost(thin) == (3, 7)
