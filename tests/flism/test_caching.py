"""What an earlier run computed is not computed again, and makes no difference; large JPEGs decoded smaller."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from colours import ColourClip, ColourDetector, flism_config
from PIL import Image

from fast_goal.config import ScratchConfig, build
from fast_goal.data import splitter
from fast_goal.data.images import View, crop, open_image
from fast_goal.data.records import load_dataset, write_dataset
from fast_goal.flism import pipeline
from fast_goal.flism.embedder import Embedder, cut, decoding_scale, pixel_boxes
from fast_goal.flism.engine import extract
from fast_goal.flism.regions import Detections, candidate_regions
from fast_goal.flism.shards import prune
from fast_goal.model.clip import build_scratch


def run(dataset, cache, clip=None, detector=None, **changes):
    return extract(dataset, clip or ColourClip(), detector or ColourDetector(), flism_config(**changes), cache)


def counted(dataset, cache, **changes):
    clip, detector = ColourClip(), ColourDetector()
    result = run(dataset, cache, clip, detector, **changes)
    return result, sum(clip.images_seen), sum(clip.texts_seen), detector.seen


def assert_identical(a, b):
    for name in ("regions", "pairs", "skipped"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True)


def test_the_same_crop_is_never_embedded_twice(scenes, tmp_path):
    cache = tmp_path / "cache"
    _, spatial, texts, detected = counted(scenes, cache, regions="spatial")
    assert spatial > 0
    assert texts > 0
    assert detected == 0
    both, more, texts, detected = counted(scenes, cache, regions="both")
    assert (0 < more <= len(scenes.objects), texts, detected) == (True, 0, 11)
    for changes in ({"regions": "detector"}, {"top_k": 1}, {"max_detections": 1}, {"pair_weights": "similarity"}):
        result, *computed = counted(scenes, cache, **changes)
        assert computed == [0, 0, 0]
        assert_identical(result, run(scenes, tmp_path / "new", **changes))
    assert_identical(both, run(scenes, tmp_path / "new", regions="both"))


def test_an_image_of_which_all_is_known_is_not_opened(scenes, tmp_path):
    expected = run(scenes, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache/flism")
    for path in scenes.root.iterdir():
        path.unlink()
    assert_identical(run(scenes, tmp_path / "cache"), expected)


def test_a_changed_file_is_noticed_even_at_the_same_size(scenes, tmp_path):
    path = scenes.root / "image04.png"
    pixels = np.asarray(open_image(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    skipped = run(scenes, tmp_path / "cache").skipped
    assert skipped[["sample", "reason"]].values.tolist() == [["image04", "changed image"]]


def test_boxes_that_need_no_pixels_are_asked_for_beforehand(scenes, tmp_path):
    class Table(ColourDetector):
        digest, reads_pixels = "table", False

        def detect(self, images, image_ids=()):
            assert all(image is None for image in images)
            found = scenes.objects.groupby("image_id")
            tables = [found.get_group(name) for name in image_ids]
            return [
                Detections(one[["x1", "y1", "x2", "y2"]].to_numpy(float), list(one["label"]), np.full(len(one), 0.9))
                for one in tables
            ]

    table = run(scenes, tmp_path / "cache", detector=Table()).pairs
    seen = run(scenes, tmp_path / "other").pairs
    columns = ["image_id", "sentence_index", "x1", "y1", "x2", "y2", "similarity"]
    pd.testing.assert_frame_equal(table[columns], seen[columns])


def test_a_detector_may_prepare_images_in_the_threads(scenes, tmp_path):
    class Prepared(ColourDetector):
        def prepare(self, image):
            return np.asarray(image)

        def detect(self, images, image_ids=()):
            assert all(isinstance(image, np.ndarray) for image in images)
            return super().detect(images)

    assert_identical(run(scenes, tmp_path / "a", detector=Prepared()), run(scenes, tmp_path / "b"))


def test_sentences_from_a_process_of_their_own(scenes, tmp_path, monkeypatch):
    expected = run(scenes, tmp_path / "a", shard_size=3)
    monkeypatch.setattr(pipeline, "CHILD_FROM", 1)
    monkeypatch.setattr(pipeline, "CHILD_CORES", 1)
    monkeypatch.setattr(splitter, "AT_ONCE", 2)
    assert_identical(run(scenes, tmp_path / "b", shard_size=3), expected)


def test_crops_are_the_view_of_the_pixels():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    boxes = np.array([[0.5, 1.2, 60.1, 40.0], [10.0, 10.0, 11.0, 90.0], [-5.0, -5.0, 300.0, 2.0], [129.5, 89.5, 130.0, 90.0]])
    clip = ColourClip()
    crops, crop_of = cut(picture, picture.size, pixel_boxes(boxes, *picture.size), clip)
    made = []
    clip.encode_image = lambda images: made.append(images.clone()) or torch.zeros(len(images), 3)
    clip.view = lambda width, height: View(width, height, 8)
    embed = Embedder(clip, torch.device("cpu"), 100)
    embed.add(crops[crop_of])
    embed.flush()
    for box, found in zip(boxes, made[0], strict=True):
        piece = crop(picture, tuple(box))
        assert torch.equal(found, View(*piece.size, 8).apply(piece))


@pytest.fixture
def photographs(tmp_path):
    """Two JPEGs and a PNG of 400 x 360 pixels; one JPEG is stored on its side."""
    rows, rng = [], np.random.default_rng(3)
    (tmp_path / "photographs").mkdir()
    for number, ending in enumerate(("jpg", "jpg", "png")):
        path = tmp_path / "photographs" / f"{number}.{ending}"
        picture = Image.fromarray(rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)).resize((400, 360), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if number == 1:
            exif[0x0112] = 6
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(path, **({"quality": 95, "exif": exif} if ending == "jpg" else {}))
        rows.append(
            {
                "image_id": str(number),
                "image_path": path.name,
                "width": 400,
                "height": 360,
                "split": "train",
                "long_caption": "A red thing. A green thing. A blue thing.",
                "captions": [],
                "source": "test",
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
    write_dataset("photographs", tmp_path / "photographs", rows, [], source="test", folder=tmp_path / "records")
    return load_dataset("photographs", tmp_path / "records")


def test_large_jpegs_are_decoded_smaller_where_the_regions_allow_it(photographs, tmp_path, monkeypatch):
    sizes = []
    real = pipeline.cut
    monkeypatch.setattr(pipeline, "cut", lambda image, *rest: sizes.append(image.size) or real(image, *rest))
    full = run(photographs, tmp_path / "cache", regions="spatial", top_k=3)
    assert set(sizes) == {(400, 360)}
    sizes.clear()
    # in the same cache: the smaller ones are other crops
    small = run(photographs, tmp_path / "cache", regions="spatial", top_k=3, scaled_decoding=True)
    assert sorted(sizes) == [(50, 45), (50, 45), (400, 360)]  # quadrants of 180 pixels, an input of 8, and a PNG
    pd.testing.assert_frame_equal(small.regions, full.regions)
    a, b = (one.pairs.set_index(["image_id", "sentence_index"])["similarity"].sort_index() for one in (small, full))
    np.testing.assert_allclose(a, b, atol=0.02)
    sizes.clear()
    run(photographs, tmp_path / "cache", regions="both", scaled_decoding=True)  # the detector wants all pixels
    assert set(sizes) <= {(400, 360)}


def test_decoding_scale():
    assert [decoding_scale(np.array([[0, 0, side, 9999]]), 10) for side in (19, 39, 40, 79, 80, 159, 160)] == [
        1,
        1,
        2,
        2,
        4,
        4,
        8,
    ]


def test_memory_is_bounded_by_what_is_on_its_way(scenes, tmp_path, monkeypatch):
    """Never more decoded images at once than BATCH_PIXELS holds, plus those that are being cut."""
    alive, most = set(), []
    real = pipeline.open_image

    class Watched(ColourDetector):
        def detect(self, images, image_ids=()):
            most.append(len(alive))
            return super().detect(images)

    def opened(*args):
        image = real(*args)
        alive.add(id(image))
        return image

    real_cut = pipeline.cut

    def cutting(image, *rest):
        alive.discard(id(image))
        return real_cut(image, *rest)

    monkeypatch.setattr(pipeline, "open_image", opened)
    monkeypatch.setattr(pipeline, "cut", cutting)
    monkeypatch.setattr(pipeline, "BATCH_PIXELS", 2 * 64 * 48)
    run(scenes, tmp_path / "cache", detector=Watched(), batch_size=100, shard_size=100)
    assert max(most) <= 2 + 2 + 2 * pipeline.cores() + 1


def test_old_folders_are_pruned(tmp_path, scenes):
    run(scenes, tmp_path / "cache", top_k=1)
    run(scenes, tmp_path / "cache", top_k=2)
    first, second = sorted((tmp_path / "cache/flism").iterdir(), key=lambda path: path.stat().st_mtime)
    assert prune(tmp_path / "cache/flism") == []
    assert prune(tmp_path / "cache/flism", keep=[second], days=-1) == [first]
    assert [path.exists() for path in (first, second)] == [False, True]


def test_the_regions_are_those_of_candidate_regions(scenes, tmp_path):
    settings = {"min_area": 0.04, "max_detections": 2, "merge_iou": 0.9, "classes": ["red", "blue"]}
    found = run(scenes, tmp_path / "cache", **settings).regions
    for row in scenes.split("train", "val").itertuples():
        (detections,) = ColourDetector().detect([open_image(scenes.path(row))])
        expected = candidate_regions(64, 48, detections, "both", 0.04, ["red", "blue"], 2, 0.9)
        mine = found[found["image_id"] == row.image_id]
        np.testing.assert_array_equal(mine[["x1", "y1", "x2", "y2"]], expected.boxes)


def test_two_data_sets_share_what_they_have_in_common(scenes, tmp_path):
    run(scenes, tmp_path / "cache")
    other = dataclasses.replace(scenes, name="other", records=scenes.records[3:7].reset_index(drop=True))
    _, crops, texts, detected = counted(other, tmp_path / "cache")
    assert (crops, texts, detected) == (0, 0, 0)


def test_rounded_arithmetic_is_near_and_keeps_to_its_own_caches(scenes, tmp_path):
    """A real CLIP, as only its products of matrices are rounded."""
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "vision_width": 32, "vision_layers": 2, "text_width": 32}
    rest = {"text_layers": 2, "head_width": 16, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.0}
    clip = build_scratch(build(ScratchConfig, {"split": "train", **sizes, **rest, "warmup_steps": 0}, "scratch"), 77, 0).eval()
    found = {}
    for precision in ("fp32", "bf16", "fp32"):
        config = flism_config(precision=precision, regions="spatial")
        result = extract(scenes, clip, None, config, tmp_path / "cache")
        if precision in found:
            pd.testing.assert_frame_equal(result.pairs, found[precision].pairs)
        found[precision] = result
    exact, rounded = found["fp32"].pairs, found["bf16"].pairs
    assert not exact["similarity"].equals(rounded["similarity"])
    assert exact["similarity"].to_numpy() == pytest.approx(rounded["similarity"].to_numpy(), abs=0.05)
