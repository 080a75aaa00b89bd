"""The pictures of drift: drawn where there is something to show, from one run or many."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fast_goal.monitoring import pictures
from fast_goal.monitoring.data import WHAT
from fast_goal.monitoring.snapshot import Sample


def sample(count, labels=3, seed=0) -> Sample:
    generator = np.random.default_rng([seed, count])
    keys = generator.integers(0, 256, (count, 16), np.uint8)
    features = generator.normal(size=(count, 5)).astype(np.float32)
    tokens = generator.integers(30, 150, count)
    names = np.array([f"label {number}" for number in range(labels)])
    return Sample(
        keys, features, keys, features[::-1], tokens, tokens // 15, keys, names, generator.integers(0, 3, (count, labels))
    )


def line(day, drifted=False, reference="a", version=1, probe="p"):
    tests = [
        {"what": what, "rows": rows, "statistic": 0.2 if drifted else -0.01, "bound": 0.05, "drifted": drifted}
        for what in WHAT
        for rows in ("all", "new")
    ]
    recall = {"R@1": {"text_to_image": 20.0 + day, "image_to_text": 0.0}, "version": version}
    models = {"champion": recall, "base": {**recall, "version": None}}
    time = f"2026-03-{day:02d}T03:00:00Z"
    return {"time": time, "reference": reference, "tests": tests, "probe": {"digest": probe, "models": models}}


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def rgb(colour) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


SAMPLES = {"reference": sample(30), "all": sample(40), "new": sample(12)}


@pytest.mark.parametrize("draw", [pictures.draw_map, pictures.draw_lengths, pictures.draw_detections])
def test_samples_are_drawn_each_in_its_colour_and_settings_stay(draw, tmp_path):
    before = dict(matplotlib.rcParams)
    path = tmp_path / "picture.png"
    assert draw(SAMPLES, path)
    assert dict(matplotlib.rcParams) == before
    found = colours(path)
    assert rgb(pictures.BLUE) in found and rgb(pictures.VERMILLION) in found
    assert draw({**SAMPLES, "new": sample(0)}, path), "nothing new"
    assert rgb(pictures.VERMILLION) not in colours(path)


def test_no_picture_of_nothing(tmp_path):
    path = tmp_path / "picture.png"
    empty = {"reference": sample(0), "all": sample(0), "new": sample(0)}
    assert not any(draw(empty, path) for draw in (pictures.draw_map, pictures.draw_lengths, pictures.draw_detections))
    assert not pictures.draw_map({}, path)
    blind = {name: replace(one, detections=one.detections * 0) for name, one in SAMPLES.items()}
    assert not pictures.draw_detections(blind, path)
    assert not pictures.draw_drift_over_time([{**line(1), "tests": []}], path)
    assert not pictures.draw_probe_over_time([{**line(1), "probe": {"models": {}}}], path)
    assert not path.exists()


def test_of_many_labels_the_rarer_ones_are_left_out(tmp_path):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    assert pictures.draw_detections({"reference": sample(30, labels=pictures.LABELS_SHOWN)}, few)
    assert pictures.draw_detections({"reference": sample(30, labels=80)}, many)
    with Image.open(few) as one, Image.open(many) as other:
        assert one.size == other.size


@pytest.mark.parametrize("draw", [pictures.draw_drift_over_time, pictures.draw_probe_over_time])
def test_one_run_and_many_are_drawn(draw, tmp_path):
    path = tmp_path / "picture.png"
    assert draw([line(1)], path)
    changes = [line(1), line(2, drifted=True), line(3, reference="b", version=2), {**line(5, probe="q"), "tests": []}]
    assert draw(changes, path)
    assert rgb(pictures.BLUE) in colours(path)
