"""Zero-shot segmentation against slow loops over pixels, PyTorch's own interpolation, and drawn resamples."""

import dataclasses
import hashlib
import itertools
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fake_store import questions, settings, study
from PIL import Image
from squares import CPU, SEGMENTS, png, tiny_clip, with_masks, write_squares

from fast_goal.data.captions import tokenize
from fast_goal.data.images import View
from fast_goal.data.masks import IGNORED, NoMask, Numbers, read_mask
from fast_goal.errors import DataError
from fast_goal.evaluation import embedding, segmentation
from fast_goal.evaluation.comparison import MODELS, Study
from fast_goal.evaluation.features import FeatureStore
from fast_goal.evaluation.segmentation import (
    NOTHING,
    Counts,
    chance,
    class_iou,
    class_map,
    differences,
    image_counts,
    measures,
    read_truth,
)
from fast_goal.evaluation.tasks import NotAsked, measure
from fast_goal.evaluation.tasks.segmentation import Segmentation


def slow_map(similarity: np.ndarray, view: View, patch_size: int) -> np.ndarray:
    """By loops over the pixels of the original."""
    side = view.size // patch_size
    grid = similarity.reshape(side, side, -1).astype(np.float64)
    found = np.full((view.height, view.width), -1)
    for y in range(view.height):
        for x in range(view.width):
            u = (x + 0.5) * view.resized[0] / view.width - view.offset[0]
            v = (y + 0.5) * view.resized[1] / view.height - view.offset[1]
            if not (0 <= u < view.size and 0 <= v < view.size):
                continue
            column, row = (min(max(place / patch_size - 0.5, 0), side - 1) for place in (u, v))
            left, top = int(column), int(row)
            right, bottom = min(left + 1, side - 1), min(top + 1, side - 1)
            across, down = column - left, row - top
            above = (1 - across) * grid[top, left] + across * grid[top, right]
            below = (1 - across) * grid[bottom, left] + across * grid[bottom, right]
            found[y, x] = int(np.argmax((1 - down) * above + down * below))
    return found


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(40, 40), (75, 40), (33, 64), (17, 90), (8, 8), (700, 30)])
def test_a_map_is_that_of_a_loop_over_pixels(mode, size, monkeypatch):
    view = View(*size, 32, mode)
    similarity = np.random.default_rng(3).normal(size=(16, 7)).astype(np.float32)
    expected = slow_map(similarity, view, 8)
    found = class_map(torch.from_numpy(similarity), view, 8)
    assert found.shape == (size[1], size[0]) and (found.numpy() == expected).all()
    outside = (expected == NOTHING).mean()
    assert (outside > 0) == (mode == "crop" and size[0] != size[1])
    monkeypatch.setattr(segmentation, "SCORES_AT_ONCE", 300)  # a few rows at a time
    assert torch.equal(class_map(torch.from_numpy(similarity), view, 8), found)


@pytest.mark.parametrize("size", [(50, 50), (31, 77), (224, 100)])
def test_without_a_crop_it_is_pytorchs_interpolation(size):
    similarity = torch.randn(49, 11, generator=torch.Generator().manual_seed(0))
    grid = similarity.T.reshape(1, 11, 7, 7)
    whole = F.interpolate(grid, size=(size[1], size[0]), mode="bilinear", align_corners=False)[0]
    assert torch.equal(class_map(similarity, View(*size, 28, "squash"), 4), whole.argmax(0))


def test_one_patch_and_equal_classes():
    flat = class_map(torch.tensor([[0.1, 0.4, 0.4]]), View(5, 4, 8, "squash"), 8)
    assert flat.tolist() == [[1] * 5] * 4  # of two equal ones the first


@pytest.mark.parametrize("classes", [2, 40, 171])
def test_classes_that_cannot_win_are_left_out_without_a_trace(classes, monkeypatch):
    generator = torch.Generator().manual_seed(classes)
    smooth = F.interpolate(torch.randn(1, classes, 3, 3, generator=generator), size=(14, 14), mode="bicubic")[0]
    similarity, view = smooth.flatten(1).T.contiguous(), View(90, 60, 224, "crop")
    found = class_map(similarity, view, 16)
    left = segmentation._contenders(smooth)[0]
    assert set(found.unique().tolist()) - {NOTHING} <= set(left.tolist()) and (classes < 40 or len(left) < classes)
    monkeypatch.setattr(segmentation, "_contenders", lambda grid: (torch.arange(len(grid)), grid))
    assert torch.equal(class_map(similarity, view, 16), found)


def slow_measures(maps, truths, classes) -> tuple[float, float, dict[int, float]]:
    """mIoU, pixel accuracy and the IoU of each class by a loop over all pixels of all images."""
    pairs = [
        (found, true)
        for one, other in zip(maps, truths, strict=True)
        for found, true in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)
        if found != -1 and true != -1
    ]
    ious = {}
    for place in range(classes):
        both = sum(found == place and true == place for found, true in pairs)
        any_of_them = sum(found == place or true == place for found, true in pairs)
        if any_of_them:
            ious[place] = 100 * both / any_of_them
    right = sum(found == true for found, true in pairs)
    return sum(ious.values()) / len(ious), 100 * right / len(pairs), ious


def made_up(images=6, classes=5, seed=0, lean=0.6):
    """Maps and truths; the class 3 is never true, 4 neither true nor found; some pixels do not count."""
    draw = np.random.default_rng(seed)
    truths = [draw.integers(-1, 3, size=(7 + image, 9)) for image in range(images)]
    maps = []
    for truth in truths:
        found = np.where(draw.random(truth.shape) < lean, truth, draw.integers(0, 4, size=truth.shape))
        maps.append(np.where(draw.random(truth.shape) < 0.1, -1, np.maximum(found, 0)))
    return maps, truths


def counts_of(maps, truths, classes=5) -> Counts:
    rows = [image_counts(found, truth, classes) for found, truth in zip(maps, truths, strict=True)]
    return Counts(*np.stack(rows, axis=1))


def test_the_measures_are_those_of_a_loop():
    maps, truths = made_up()
    sums = np.stack(counts_of(maps, truths)).sum(1)
    mean, right, ious = slow_measures(maps, truths, 5)
    assert measures(sums)["mIoU"] == pytest.approx(mean) and measures(sums)["pixel_accuracy"] == pytest.approx(right)
    iou, there = class_iou(sums)
    assert np.flatnonzero(there).tolist() == list(ious) == [0, 1, 2, 3] and ious[3] == 0  # found, and never true
    assert (100 * iou[there]).tolist() == pytest.approx(list(ious.values()))
    assert math.isnan(measures(np.zeros((3, 5)))["mIoU"])


def test_chance_is_what_random_classes_reach():
    truth = np.array([60_000, 20_000, 0, 400])
    draw = np.random.default_rng(0)
    true = np.repeat(np.arange(4), truth)
    sums = image_counts(draw.integers(0, 4, size=len(true)), true, 4)
    found, expected = measures(sums), chance(truth)
    assert found["mIoU"] == pytest.approx(expected["mIoU"], abs=0.2)
    assert found["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], abs=0.5) and expected["pixel_accuracy"] == 25


def test_the_difference_and_its_interval_are_those_of_resampled_images():
    (better, truths), (worse, _) = made_up(lean=0.8, images=20), made_up(lean=0.4, images=20)
    groups = np.repeat(np.arange(10), 2)[::-1]
    mine, other = counts_of(better, truths), counts_of(worse, truths)
    found = differences(mine, other, groups, samples=60)
    for name, place in (("mIoU", 0), ("pixel_accuracy", 1)):
        exact = slow_measures(better, truths, 5)[place] - slow_measures(worse, truths, 5)[place]
        assert found[name]["value"] == pytest.approx(exact)
    draws, generator = [], np.random.default_rng(0)
    members = [np.flatnonzero(groups == group) for group in range(10)]
    for drawn in generator.integers(10, size=(60, 10)):
        rows = np.concatenate([members[group] for group in drawn])
        part = [[maps[row] for row in rows] for maps in (better, worse, truths)]
        draws.append(slow_measures(part[0], part[2], 5)[0] - slow_measures(part[1], part[2], 5)[0])
    assert (found["mIoU"]["low"], found["mIoU"]["high"]) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert found == differences(mine, other, groups, samples=60)


@pytest.mark.parametrize("images", [6, 18])
def test_p_is_the_share_of_exchanged_models_that_differ_as_much(images, monkeypatch):
    (one, truths), (two, _) = made_up(images, lean=0.62, seed=1), made_up(images, lean=0.5, seed=1)
    mine, other = counts_of(one, truths), counts_of(two, truths)
    groups = np.arange(images) % 6 if images == 6 else np.arange(images)
    found = differences(mine, other, groups, samples=5)["mIoU"]["p"]
    observed = abs(slow_measures(one, truths, 5)[0] - slow_measures(two, truths, 5)[0])
    draw, reached = np.random.default_rng(9), []
    signs = itertools.product([False, True], repeat=6) if images == 6 else draw.random((1500, images)) < 0.5
    stacked = [np.stack(counts, axis=1) for counts in (mine, other)]
    for exchanged in signs:
        swap = np.array(exchanged)[groups, None, None]
        first, second = (np.where(swap, stacked[1 - place], stacked[place]).sum(0) for place in (0, 1))
        reached.append(abs(measures(first)["mIoU"] - measures(second)["mIoU"]) >= observed - 1e-9)
    assert found == pytest.approx(np.mean(reached), abs=1e-12 if images == 6 else 0.04) and 0 < found < 1
    monkeypatch.setattr(segmentation, "COINS_AT_ONCE", 7)
    assert differences(mine, other, groups, samples=5)["mIoU"]["p"] == found


def test_equal_models_do_not_differ():
    maps, truths = made_up()
    same = counts_of(maps, truths)
    for found in differences(same, same, np.arange(6), 20).values():
        assert found == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_masks_of_all_kinds(tmp_path):
    numbers = np.array([[0, 4], [7, 255]], dtype=np.uint8)
    palette = Image.fromarray(numbers)
    palette.putpalette([value for value in range(256) for _ in range(3)])
    for name, image in {
        "grey.png": Image.fromarray(numbers),
        "palette.png": palette,
        "deep.png": Image.fromarray(numbers.astype(np.uint16)),
    }.items():
        image.save(tmp_path / name)
        assert read_mask(tmp_path / name).tolist() == numbers.tolist()
    Image.fromarray(np.array([[0, 300], [65535, 7]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_mask(tmp_path / "deep.png").tolist() == [[0, 300], [65535, 7]]
    few = np.array([[0, 3], [2, 1]], dtype=np.uint8)
    for bits in (2, 4):
        small = Image.fromarray(few)
        small.putpalette([0, 0, 0] * 4)
        small.save(tmp_path / "small.png", bits=bits)
        assert read_mask(tmp_path / "small.png").tolist() == few.tolist()
    Image.fromarray(few > 1).save(tmp_path / "bits.png")
    assert read_mask(tmp_path / "bits.png").tolist() == [[0, 1], [1, 0]]
    Image.new("RGB", (2, 2)).save(tmp_path / "colours.png")
    with pytest.raises(NoMask, match=r"colours\.png: a mask has one number for each pixel, this is a picture of mode RGB"):
        read_mask(tmp_path / "colours.png")
    Image.new("L", (2, 2)).save(tmp_path / "picture.jpg")
    with pytest.raises(NoMask, match="has to be a PNG"):
        read_mask(tmp_path / "picture.jpg")
    noise = png(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes(noise[: len(noise) // 2])
    with pytest.raises(DataError, match=r"cut\.png: the mask is damaged"):
        read_mask(tmp_path / "cut.png")
    with pytest.raises(DataError, match="the mask does not exist"):
        read_mask(tmp_path / "none.png")


def grey(bits: int, rows: list[list[int]]) -> bytes:
    """A PNG of grey pixels of `bits` each, byte by byte."""
    lines = b""
    for row in rows:
        number = 0
        for value in row:
            number = number << bits | value
        count = -(-len(row) * bits // 8)
        lines += b"\0" + (number << (8 * count - len(row) * bits)).to_bytes(count, "big")
    chunks = {b"IHDR": struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0), b"IDAT": zlib.compress(lines)}
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks.items(), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("bits", "rows"), [(1, [[0, 1, 1]]), (2, [[0, 1, 2, 3, 1]]), (4, [[0, 15, 7], [1, 2, 9]]), (8, [[0, 9]])]
)
def test_grey_masks_of_few_bits_keep_their_numbers(tmp_path, bits, rows):
    assert read_mask(tmp_path / "x.png", grey(bits, rows)).tolist() == rows


def test_what_the_numbers_mean():
    numbers = Numbers.of(SEGMENTS)
    mask = np.array([[0, 4, 7], [300, 255, 4]], dtype=np.uint16)
    assert numbers.classes(mask, "x.png").tolist() == [[IGNORED, 0, 1], [2, IGNORED, 0]] and numbers.unknown(mask) == []
    with pytest.raises(DataError, match=r"x\.png: the numbers \[5, 9\] are no class"):
        numbers.classes(np.array([[9, 5, 0]], dtype=np.uint8), "x.png")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return with_masks(write_squares(tmp_path_factory.mktemp("squares")))


@pytest.fixture(scope="module")
def real(squares):
    """The squares, a model that crops and one that squashes."""
    clips = {"base": tiny_clip(3), "finetuned": tiny_clip(4)}
    clips["finetuned"].view_mode = "squash"
    stores = {model: FeatureStore(None, clip, CPU, 4) for model, clip in clips.items()}
    return Study(embedding.questions(squares, "test"), stores, settings(bootstrap_samples=20))


def test_the_questions(squares):
    asked = embedding.questions(squares, "test").masks
    assert asked.images.tolist() == [0, 0, 1, 2, 4, 5] and asked.suites.tolist() == ["few", "one", *["few"] * 4]
    assert asked.paths[0] == squares.root / "masks/0-few.png" and set(asked.segments) == {"few", "one"}
    other = embedding.questions(squares, "val").masks
    assert other.images.tolist() == [0] and set(other.segments) == {"few"}
    assert embedding.questions(dataclasses.replace(squares, masks=None), "test").masks is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"masks": d.masks.assign(image_id="gone")}, r"'squares', masks: image_id 'gone' is none of its records"),
        (lambda d: {"masks": pd.concat([d.masks, d.masks])}, r"image_id 'i0' has two masks of the suite 'few'"),
        (lambda d: {"segments": {}}, r"segments of 'few': templates \[\]"),
        (lambda d: {"segments": d.segments | {"few": SEGMENTS | {"values": [4, 7]}}}, r"3 names, values \[4, 7\]"),
        (lambda d: {"segments": d.segments | {"few": SEGMENTS | {"ignored": [4]}}}, "no number twice"),
        (lambda d: {"segments": d.segments | {"few": SEGMENTS | {"ignored": [70000]}}}, "a number from 0 on"),
        (lambda d: {"segments": d.segments | {"few": SEGMENTS | {"names": ["a", "b", "a"]}}}, "'a' stands twice"),
    ],
)
def test_masks_that_cannot_be_asked(squares, change, message):
    with pytest.raises(DataError, match=message):
        embedding.questions(dataclasses.replace(squares, **change(squares)), "test")


def slow_class_features(clip, classes) -> np.ndarray:
    rows = []
    for name in classes["names"]:
        texts = [template.replace("{}", name) for template in classes["templates"]]
        with torch.no_grad():
            vectors = clip(tokens=tokenize(texts, clip.context_length)[0]).text_features.numpy()
        mean = vectors.mean(0)
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)


def test_the_task_is_a_loop_over_images_and_pixels(real, squares):
    found = measure(real, ["segmentation"])["segmentation"]
    assert list(found) == ["few", "one"]
    for suite, classes in squares.segments.items():
        mine = squares.masks[(squares.masks.suite == suite) & (squares.masks.image_id != "i6")]
        block = found[suite]
        for model in MODELS:
            clip = real.stores[model].clip
            vectors, maps, truths = slow_class_features(clip, classes), [], []
            for row in mine.itertuples():
                image = Image.open(squares.root / f"{row.image_id[1:]}.png").convert("RGB")
                view = clip.view(*image.size)
                with torch.no_grad():
                    tokens = clip.project_patches(clip(images=view.apply(image)[None]).image_tokens)[0].numpy()
                tokens = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
                maps.append(slow_map((tokens @ vectors.T).astype(np.float32), view, clip.patch_size))
                numbers = np.asarray(Image.open(squares.root / row.mask_path)).astype(int)
                places = {value: place for place, value in enumerate(classes["values"])}
                truths.append(np.array([[places.get(value, -1) for value in line] for line in numbers.tolist()]))
            mean, right, ious = slow_measures(maps, truths, len(vectors))
            assert block[model]["mIoU"] == pytest.approx(mean) and block[model]["pixel_accuracy"] == pytest.approx(right)
            assert block[model]["classes"] == pytest.approx({classes["names"][place]: iou for place, iou in ious.items()})
            scored = sum(int((truth >= 0).sum()) for truth in truths)
            unseen = sum(int(((truth >= 0) & (one < 0)).sum()) for one, truth in zip(maps, truths, strict=True))
            assert (block["pixels"], block["outside"][model]) == (scored, unseen)
            assert block["ignored"] == sum(truth.size for truth in truths) - scored
        change = block["finetuned"]["mIoU"] - block["base"]["mIoU"]
        assert block["difference"]["mIoU"]["value"] == pytest.approx(change) and 0 < block["difference"]["mIoU"]["p"] <= 1
    few = found["few"]
    assert (few["images"], few["independent"], few["names"], few["templates"]) == (5, 5, 3, 3)
    assert few["outside"]["base"] > 0 == few["outside"]["finetuned"]


def test_few_images_at_a_time_give_the_same(real, monkeypatch):
    whole = measure(real, ["segmentation"])["segmentation"]
    for name in ("TOKENS_AT_ONCE", "PIXELS_AT_ONCE"):
        with monkeypatch.context() as patch:
            patch.setattr(segmentation, name, 1)
            assert measure(real, ["segmentation"])["segmentation"] == whole


def test_tokens_and_masks_in_memory_are_bounded(real, monkeypatch):
    stores = list(real.stores.values())
    numbers = max(store.patch_count * store.clip.embed_dim for store in stores)
    monkeypatch.setattr(segmentation, "TOKENS_AT_ONCE", 3 * numbers)
    monkeypatch.setattr(segmentation, "PIXELS_AT_ONCE", 10)
    parts = segmentation.some_at_once(stores, [1, 1, 1, 1, 6, 4, 5, 11, 1])
    assert [list(part) for part in parts] == [[0, 1, 2], [3, 4], [5, 6], [7], [8]]
    assert list(segmentation.some_at_once(stores, [])) == []


def test_maps_are_made_one_by_one(real):
    """Those of large photographs would not fit into memory together."""
    store = real.stores["base"]
    maps = segmentation.class_maps(store, real.asked.files[:3], torch.eye(store.clip.embed_dim)[:2])
    assert isinstance(maps, Iterator) and next(maps).shape == real.asked.files[0].size[::-1]


def test_a_data_set_without_masks_is_not_asked():
    made = study(questions([""]))
    assert measure(made, ["segmentation"])["skipped"] == {"segmentation": "masks"}
    with pytest.raises(NotAsked):
        Segmentation().needs(made)


def test_a_mask_that_was_changed_is_refused(tmp_path):
    content = png(np.array([[4, 0]], np.uint8))
    path, numbers = tmp_path / "m.png", Numbers.of(SEGMENTS)
    path.write_bytes(content)
    known = hashlib.sha256(content).hexdigest()
    assert read_truth(path, known, numbers, (2, 1)).tolist() == [[0, NOTHING]]
    for other, size in ((known, (1, 2)), ("0" * 64, (2, 1))):
        with pytest.raises(DataError, match=r"m\.png: the mask was changed since the step `download`"):
            read_truth(path, other, numbers, size)
    path.unlink()
    with pytest.raises(DataError, match="the mask does not exist"):
        read_truth(path, known, numbers, (2, 1))


def test_masks_of_which_nothing_counts_are_told(squares, real):
    asked = real.asked
    segments = {
        "few": SEGMENTS | {"values": [30, 31, 32], "ignored": [0, 4, 7, 255, 300]},
        "one": asked.masks.segments["one"],
    }
    empty = dataclasses.replace(asked, masks=asked.masks._replace(segments=segments))
    with pytest.raises(DataError, match=r"masks of 'few': no pixel of any class lies where the base model sees it"):
        measure(dataclasses.replace(real, asked=empty), ["segmentation"])
