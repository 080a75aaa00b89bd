"""The pictures can be drawn from odd input; how they look is for people to judge."""

import matplotlib
import numpy as np
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
