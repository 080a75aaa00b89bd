"""The masks of the scenes: each object is drawn alone on two backgrounds, and what does not change is covered by it."""

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fast_goal.data.records import MASKS, write_table
from fast_goal.data.sources.scenes.drawing import draw
from fast_goal.data.sources.scenes.masks import make_masks, segments
from fast_goal.data.sources.scenes.samples import STYLES, make_samples
from fast_goal.data.sources.scenes.source import ScenesConfig, draw_all

SIZE = 96
SUITES = {"scenes_shapes": "shape", "scenes_colours": "colour"}


def opened(content) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    assert image.mode == "P" and image.format == "PNG"
    return np.asarray(image)


def coverage(scene, thing) -> np.ndarray:
    """How many quarters of each pixel the object covers where nothing is before it."""
    alone = dataclasses.replace(scene, things=(thing,), texture="plain", tint=(0, 0, 0))
    empty = dataclasses.replace(alone, things=())
    pixels = [
        [
            np.asarray(draw(dataclasses.replace(one, background=colour), SIZE).image).astype(float)
            for colour in ("white", "teal")
        ]
        for one in (alone, empty)
    ]
    (on_white, on_teal), (white, teal) = pixels
    shows_through = (on_white - on_teal)[..., 0] / (white - teal)[..., 0]
    return np.rint(4 * (1 - shows_through)).astype(int)


@pytest.mark.parametrize("source", list(STYLES))
def test_each_pixel_has_the_class_of_the_object_in_front(source):
    style, _ = STYLES[source]
    names = {suite: found["names"] for suite, found in segments(style).items()}
    hidden = partly = 0
    for index in range(4):
        for sample in make_samples(5, "test", index, SIZE, source):
            scene = sample.scene
            covered = np.array([coverage(scene, thing) for thing in scene.things])  # [N, S, S], later ones in front
            full = covered == 4
            front = np.where(full.any(0), len(full) - 1 - full[::-1].argmax(0), -1)  # the first that hides all behind it
            before = (covered > 0) & (np.arange(len(full))[:, None, None] > front)
            certain = ~before.any(0)
            single = (before.sum(0) == 1) & (front < 0)  # the edge of one object over the background
            hidden += int((full.sum(0) > 1).sum())
            partly += int(single.sum())
            for suite, attribute in SUITES.items():
                (row,) = [row for row in sample.masks if row["suite"] == suite]
                mask = opened(sample.mask_files[row["mask_path"]])
                classes = np.array([names[suite].index(getattr(thing, attribute)) + 1 for thing in scene.things])
                assert mask.shape == (SIZE, SIZE) and set(np.unique(mask)) <= {0, *classes.tolist()}
                expected = np.where(front < 0, 0, classes[front])
                assert (mask == expected)[certain].all()
                edge = np.where(covered.sum(0) >= 2, classes[before.argmax(0)], 0)
                assert (mask == edge)[single].all()
    assert hidden and partly > 500


def test_a_mask_fits_the_boxes_of_its_objects():
    for sample in make_samples(1, "val", 0, SIZE):
        drawing = draw(sample.scene, SIZE)
        owners = drawing.owners()
        for number, (x1, y1, x2, y2) in enumerate(drawing.boxes, 1):
            rows, columns = np.nonzero(owners == number)
            assert x1 <= columns.min() <= x1 + 1 and x2 - 1 <= columns.max() + 1 <= x2
            assert y1 <= rows.min() <= y1 + 1 and y2 - 1 <= rows.max() + 1 <= y2


def test_the_suites_and_their_classes():
    style, _ = STYLES["scenes"]
    found = segments(style)
    assert found["scenes_shapes"]["names"] == list(style.shapes) and found["scenes_colours"]["names"] == list(style.colours)
    for suite in found.values():
        assert suite["values"] == list(range(1, len(suite["names"]) + 1)) and suite["ignored"] == [0]
        assert all("{}" in template for template in suite["templates"])
    (sample, twin) = make_samples(0, "test", 0, SIZE)
    assert make_masks(sample.scene, draw(sample.scene, SIZE), style) == {
        row["suite"]: sample.mask_files[row["mask_path"]] for row in sample.masks
    }
    assert not {row["mask_path"] for row in sample.masks} & {row["mask_path"] for row in twin.masks}
    assert not any(made.masks or made.mask_files for split in ("pretrain", "train") for made in make_samples(0, split, 0, SIZE))


def test_a_data_set_has_its_masks_and_nobody_elses(tmp_path: Path):
    larger, config = (ScenesConfig(seed=1, image_size=48, pretrain=1, train=1, val=1, test=count) for count in (3, 2))
    draw_all(larger, "scenes", tmp_path, 1)
    loaded = draw_all(config, "scenes", tmp_path, 1)
    write_table(tmp_path / "masks.parquet", loaded.masks, MASKS)
    kept = {row["image_id"]: (row["width"], row["height"]) for row in loaded.rows if row["split"] in ("val", "test")}
    assert len(loaded.masks) == 2 * len(kept) == 12 and set(loaded.segments) == set(SUITES)
    for row in loaded.masks:
        content = (tmp_path / row["mask_path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["content_hash"]
        assert opened(content).shape[::-1] == kept[row["image_id"]]
    files = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "masks").rglob("*.png")}
    assert files == {row["mask_path"] for row in loaded.masks}


def test_what_is_drawn_without_masks_has_none(tmp_path: Path):
    loaded = draw_all(ScenesConfig(seed=1, image_size=48, pretrain=2, train=1, val=0, test=0), "scenes", tmp_path, 1)
    assert loaded.masks is None and loaded.segments == {}
