import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fast_goal.data.records import Dataset
from fast_goal.flism.pictures import STYLES, region_sheet, sheet, spread

SPATIAL = {
    "quadrant": [(0, 0, 32, 24), (32, 0, 64, 24), (0, 24, 32, 48), (32, 24, 64, 48)],
    "centre": [(16, 12, 48, 36)],
}


@pytest.fixture
def regions(scenes) -> pd.DataFrame:
    """The spatial regions and the true boxes of every image, as a detector would have found them."""
    rows = []
    for image_id in scenes.split("train", "val")["image_id"]:
        found = scenes.objects[scenes.objects["image_id"] == image_id]
        boxes = [(kind, "", 1.0, box) for kind, places in SPATIAL.items() for box in places]
        boxes += [("detector", row.label, 0.5, (row.x1, row.y1, row.x2, row.y2)) for row in found.itertuples()]
        for index, (kind, label, score, box) in enumerate(boxes):
            place = dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))
            rows.append({"image_id": image_id, "region_index": index, **place, "kind": kind, "label": label, "score": score})
    return pd.DataFrame(rows)


@pytest.fixture
def pairs(regions) -> pd.DataFrame:
    """The first detection of every image wins."""
    best = regions[regions["kind"] == "detector"].groupby("image_id", as_index=False).first()
    return best.assign(rank=1, sentence="There is a box.", similarity=0.5)


NOTHING = pd.DataFrame(columns=["sample", "row", "step", "reason", "detail"])


def shown(path, colour) -> int:
    """How many pixels of the picture have about this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(2) < 40).sum())


def rgb(kind: str) -> tuple[int, ...]:
    return tuple(int(STYLES[kind][0][i : i + 2], 16) for i in (1, 3, 5))


def test_the_sheet_shows_images_and_boxes(scenes, pairs, tmp_path):
    path = sheet(scenes, pairs, tmp_path / "out" / "pairs.png", count=12)
    assert shown(path, (40, 40, 40)) > 100_000  # the grey of eleven images
    assert shown(path, rgb("detector")) > 1000
    assert shown(path, rgb("quadrant")) < 50
    assert Image.open(path).width == 1680


def test_any_text_and_any_count(scenes, pairs, tmp_path):
    pairs.loc[0, "sentence"] = "It costs $5 and $_{x} \\frac " + "very " * 200
    path = sheet(scenes, pairs, tmp_path / "one.png", count=1)
    assert Image.open(path).height == 460
    with pytest.raises(ValueError, match="nothing to draw"):
        sheet(scenes, pairs[:0], tmp_path / "none.png")


def test_all_regions_are_drawn_and_the_winner_is_thick(scenes, regions, pairs, tmp_path):
    records = scenes.split("train", "val")[:4]
    path = region_sheet(scenes, records, regions, pairs, NOTHING, tmp_path / "all.png", "a $caption")
    amount = {kind: shown(path, rgb(kind)) for kind in STYLES}
    assert min(amount.values()) > 500
    # the same regions with another winner: the thick line goes to the centre
    centre = regions[regions["kind"] == "centre"].assign(rank=1, sentence="There is a box.", similarity=0.5)
    path = region_sheet(scenes, records, regions, centre, NOTHING, tmp_path / "centre.png", "a $caption")
    assert shown(path, rgb("centre")) > 1.5 * amount["centre"]
    assert shown(path, rgb("detector")) < amount["detector"]


def test_a_skipped_image_stands_with_its_reason(scenes, regions, pairs, tmp_path, monkeypatch):
    from fast_goal.flism import pictures

    titles = []
    monkeypatch.setattr(pictures, "_title", lambda axis, headline, text: titles.append((headline, text)))
    records = scenes.split("train", "val")[:2].copy()
    records.loc[1, "image_path"] = "gone.png"
    gone = records["image_id"][1]
    row = {"sample": gone, "row": -1, "step": "flism", "reason": "unreadable image", "detail": "gone.png is missing"}
    skipped = pd.DataFrame([row])
    kept = pairs[pairs["image_id"] != gone]
    dataset = Dataset("boxes", scenes.root, records)
    region_sheet(dataset, records, regions[regions["image_id"] != gone], kept, skipped, tmp_path / "skipped.png")
    assert titles == [
        ("detector  0.500", "There is a box."),
        ("skipped: unreadable image", f"{gone}: gone.png is missing"),
    ]
    with pytest.raises(ValueError, match="nothing to draw"):
        region_sheet(dataset, records[:0], regions, pairs, skipped, tmp_path / "none.png")


@pytest.mark.parametrize(("length", "count", "expected"), [(10, 3, [0, 4, 9]), (3, 8, [0, 1, 2]), (5, 1, [0]), (1, 4, [0])])
def test_spread(length, count, expected):
    assert spread(length, count).tolist() == expected
