"""One pass over a split: the same as encoding one by one, whatever the batch, and nothing twice."""

import pandas as pd
import pytest
import torch
from squares import CPU, Recording, tiny_clip, write_squares

from fast_goal.data.captions import tokenize
from fast_goal.data.images import View, open_image
from fast_goal.data.records import Dataset
from fast_goal.errors import DataError
from fast_goal.evaluation.embedding import answer, patch_hits, patch_maps, questions
from fast_goal.evaluation.features import FeatureStore


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("images"))


def test_questions_leave_out_what_is_not_there(dataset):
    asked = questions(dataset, "test")
    assert asked.image_ids == [f"i{index}" for index in range(6)]
    assert asked.long.images.tolist() == [0, 1, 3, 4, 5]
    assert asked.short.images.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 5, 5]
    assert asked.regions.source == "truth"
    assert asked.regions.images.tolist() == [0, 0, 1, 1, 3, 3, 5, 5]
    assert set(asked.regions.sentences) == {"First there is a thing."}
    assert asked.regions.boxes[0].tolist() == [0, 0, 30, 30], "the first sentence of the first image"


def test_boxes_of_flism_are_those_of_the_best_pairs(dataset):
    without = Dataset("photos", dataset.root, dataset.records)
    row = {"sentence_index": 0, "sentence": "a", "x1": 1.0, "y1": 2.0, "x2": 3.0, "y2": 4.0}
    pairs = pd.DataFrame([{**row, "image_id": image, "rank": rank} for image in ("i3", "i0", "i6") for rank in (2, 1)])
    regions = questions(without, "test", pairs).regions
    assert (regions.source, regions.images.tolist(), regions.sentences) == ("flism", [0, 3], ["a", "a"])
    assert questions(without, "test").regions.source == "none"
    assert questions(without, "test", pairs[pairs.image_id == "i6"]).regions.source == "none"
    assert questions(dataset, "test", pairs).regions.source == "truth", "the truth comes first"


def test_a_split_without_images_is_an_error(dataset):
    with pytest.raises(DataError, match="'squares' has no image in the split 'train'"):
        questions(dataset, "train")


@torch.inference_mode()
def test_features_are_those_of_one_by_one_encoding(clip, dataset):
    asked = questions(dataset, "test")
    found = answer(clip, asked, 4, CPU)
    for row, path in enumerate(asked.paths):
        image = open_image(path)
        expected = clip.encode_image(clip.view(*image.size).apply(image)[None])[0]
        torch.testing.assert_close(found.image_features[row], expected, atol=1e-5, rtol=0)
    for text, row in found.text_rows.items():
        tokens, length = tokenize([text], 32)
        torch.testing.assert_close(found.text_features[row], clip.encode_text(tokens)[0], atol=1e-5, rtol=0)
        assert found.text_lengths[row] == length
    assert found.image_features.dtype == found.text_features.dtype == torch.float32
    assert (found.text_lengths > found.context_length).sum() == 1


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_patch_hits_are_those_of_a_loop(clip, dataset, mode, monkeypatch):
    monkeypatch.setattr(clip, "view_mode", mode)
    asked = questions(dataset, "test")
    store = FeatureStore(None, clip, CPU, 4)
    hits, counts = patch_hits(store, asked)
    for index, view in enumerate(patch_maps(store, asked, range(8))):
        x1, y1, x2, y2 = view.box
        centres = [(16 * column + 8, 16 * row + 8) for row in range(4) for column in range(4)]
        inside = [x1 <= x < x2 and y1 <= y < y2 for x, y in centres]
        order = sorted(range(16), key=lambda patch: -view.similarity.flatten()[patch])
        expected = next((rank for rank, patch in enumerate(order, start=1) if inside[patch]), 17)
        assert (hits[index], counts[index]) == (expected, sum(inside))
        path, size = asked.paths[asked.regions.images[index]], asked.sizes[asked.regions.images[index]].tolist()
        assert view.image == View(*size, 64, mode).pixels(open_image(path))
    found = answer(clip, asked, 4, CPU)
    assert (found.first_hits.tolist(), found.patches_inside.tolist()) == (hits.tolist(), counts.tolist())
    assert found.patches == 16


def test_a_box_that_the_crop_cuts_off_is_a_miss(clip, dataset):
    asked = questions(dataset, "test")
    found = answer(clip, asked, 4, CPU)
    wide = asked.regions.images.tolist().index(3)  # 150 x 60: the crop shows the middle 60 pixels, the box ends at 30
    assert (found.patches_inside[wide], found.first_hits[wide]) == (0, 17)


def test_the_batch_size_does_not_matter(clip, dataset):
    asked = questions(dataset, "test")
    one = answer(clip, asked, 1, CPU)
    for size in (2, 5, 100):
        other = answer(clip, asked, size, CPU)
        torch.testing.assert_close(other.image_features, one.image_features, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.text_features, one.text_features, atol=1e-5, rtol=0)
        assert other.first_hits.tolist() == one.first_hits.tolist()


def test_every_image_and_distinct_text_is_encoded_once(clip, dataset):
    recording = Recording(clip)
    asked = questions(dataset, "test")
    found = answer(recording, asked, 4, CPU)
    assert len(recording.images) == len(set(recording.images)) == 6
    distinct = {*asked.long.texts, *asked.short.texts, *asked.regions.sentences}
    assert len(recording.texts) == len(set(recording.texts)) == len(distinct) == len(found.text_rows)
    assert found.rows(["a thing", "number 1", "a thing"]).tolist() == [
        found.text_rows[t] for t in ("a thing", "number 1", "a thing")
    ]


def test_twins_share_a_scene_and_objects_are_counted(dataset):
    assert questions(dataset, "test").groups.tolist() == list(range(6))
    ids = [*(f"test-{index // 2}{'-twin' * (index % 2)}" for index in range(6)), "i6"]
    objects = pd.DataFrame({"image_id": ["test-0", "test-0", "test-0-twin", "elsewhere"]})
    records = dataset.records.assign(image_id=ids)
    asked = questions(Dataset("scenes", dataset.root, records, objects=objects, source="scenes"), "test")
    assert asked.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert asked.objects.tolist() == [2, 1, 0, 0, 0, 0]
    assert questions(Dataset("mine", dataset.root, records, source="folder"), "test").groups.tolist() == list(range(6))


def test_a_missing_image_is_named(clip, dataset):
    records = dataset.records.assign(image_path=["absent.jpg", *dataset.records.image_path[1:]])
    with pytest.raises(DataError, match=r"absent\.jpg"):
        answer(clip, questions(Dataset("x", dataset.root, records), "test"), 4, CPU)
