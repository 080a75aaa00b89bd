import numpy as np
import pytest
from colours import ColourClip, ColourDetector, flism_config
from PIL import Image

from fast_goal.flism.engine import extract
from fast_goal.flism.pictures import STYLES, sheet


@pytest.fixture
def pairs(scenes, tmp_path):
    return extract(scenes, ColourClip(), ColourDetector(), flism_config(), tmp_path / "cache").pairs


def shown(path, colour) -> int:
    """How many pixels of the picture have about this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(2) < 40).sum())


def test_the_sheet_shows_images_and_boxes(scenes, pairs, tmp_path):
    path = sheet(scenes, pairs, tmp_path / "out" / "pairs.png", count=12)
    assert shown(path, (40, 40, 40)) > 100_000  # the grey of eleven images
    colour = tuple(int(STYLES["detector"][0][i : i + 2], 16) for i in (1, 3, 5))
    assert shown(path, colour) > 1000
    assert Image.open(path).width == 1680


def test_any_text_and_any_count(scenes, pairs, tmp_path):
    pairs.loc[0, "sentence"] = "It costs $5 and $_{x} \\frac " + "very " * 200
    path = sheet(scenes, pairs, tmp_path / "one.png", count=1)
    assert Image.open(path).height == 460
    with pytest.raises(ValueError, match="nothing to draw"):
        sheet(scenes, pairs[:0], tmp_path / "none.png")
