"""`flism.choice`: wrong and true regions in the place of those that FLISM chose."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from colours import ColourClip, ColourDetector, flism_config

from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.images import crop, open_image
from fast_goal.errors import ConfigError, DataError
from fast_goal.flism.engine import extract

BOX = ["x1", "y1", "x2", "y2"]


def run(dataset, cache, detector=None, **changes):
    return extract(dataset, ColourClip(), detector or ColourDetector(), flism_config(**changes), cache)


def cosine(dataset, pair):
    """One crop and one sentence at a time."""
    clip, image = ColourClip(), open_image(dataset.root / f"{pair.image_id}.png")
    piece = crop(image, np.array([getattr(pair, name) for name in BOX]))
    region = clip.encode_image(clip.view(*piece.size).apply(piece)[None])[0]
    return float(clip.encode_text(tokenize([pair.sentence], clip.context_length)[0])[0] @ region)


def test_random_regions_take_the_place_of_the_chosen_ones(scenes, tmp_path):
    best = run(scenes, tmp_path / "cache")
    random = run(scenes, tmp_path / "cache", choice="random")
    pd.testing.assert_frame_equal(random.regions, best.regions, atol=1e-5)
    same = ["image_id", "rank", "sentence_index", "sentence", "char_start", "char_end", "weight"]
    pd.testing.assert_frame_equal(random.pairs[same], best.pairs[same])
    assert (random.pairs["region_index"] != best.pairs["region_index"]).all()
    assert random.pairs["region_index"].nunique() > 3, "they are drawn, not the next one each"
    boxes = random.regions.set_index(["image_id", "region_index"])[BOX]
    for pair in random.pairs.itertuples():
        assert list(boxes.loc[(pair.image_id, pair.region_index)]) == [getattr(pair, name) for name in BOX]
        assert pair.similarity == pytest.approx(cosine(scenes, pair), abs=1e-5)
    again = run(scenes, tmp_path / "other", choice="random", shard_size=1, batch_size=1)
    pd.testing.assert_frame_equal(again.pairs, random.pairs, atol=1e-5)


def test_an_image_with_one_region_has_no_wrong_one(scenes, tmp_path):
    boxes = run(scenes, tmp_path / "cache", regions="detector").regions.groupby("image_id").size()
    result = run(scenes, tmp_path / "cache", regions="detector", choice="random")
    assert set(result.skipped["sample"]) == set(boxes.index[boxes == 1]) != set()
    assert set(result.skipped["reason"]) == {"no region"} and "random" in result.skipped["detail"][0]
    assert set(result.pairs["image_id"]) == set(result.regions["image_id"]) == set(boxes.index[boxes > 1])


def test_true_regions_are_those_of_the_data_set(scenes, tmp_path):
    detector = ColourDetector()
    result = run(scenes, tmp_path / "cache", detector, choice="truth", top_k=5)
    assert detector.seen == 0
    truth = scenes.truth[scenes.truth["image_id"].isin(result.pairs["image_id"])]
    keys = ["image_id", "char_start", "char_end"]
    found = result.pairs.sort_values(keys)[[*keys, *BOX]].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, truth.sort_values(keys)[[*keys, *BOX]].reset_index(drop=True))
    for _, pairs in result.pairs.groupby("image_id"):
        assert list(pairs["rank"]) == list(range(1, len(pairs) + 1))
        assert pairs["similarity"].is_monotonic_decreasing
        assert pairs["weight"].sum() == pytest.approx(1)
    for pair in result.pairs.itertuples():
        assert pair.similarity == pytest.approx(cosine(scenes, pair), abs=1e-5)
    assert result.metrics["true_region_share"] == 1
    one = run(scenes, tmp_path / "cache", choice="truth", top_k=1)
    pd.testing.assert_frame_equal(
        one.pairs.drop(columns="weight"), result.pairs[result.pairs["rank"] == 1].drop(columns="weight").reset_index(drop=True)
    )


def test_an_image_without_a_true_box_is_skipped(scenes, tmp_path):
    some = dataclasses.replace(scenes, truth=scenes.truth[scenes.truth["image_id"] != "image03"])
    result = run(some, tmp_path / "cache", choice="truth")
    assert list(result.skipped["sample"]) == ["image03"] and "true box" in result.skipped["detail"][0]
    assert "image03" not in set(result.regions["image_id"])
    # other true boxes, other results
    assert run(scenes, tmp_path / "cache", choice="truth").skipped.empty


def test_truth_that_begins_nowhere_in_the_caption_gives_no_pair(scenes, tmp_path):
    truth = scenes.truth.assign(char_start=scenes.truth["char_start"] + 1)
    with pytest.raises(DataError, match="no local pair"):
        run(dataclasses.replace(scenes, truth=truth), tmp_path / "cache", choice="truth")


def test_a_data_set_without_true_boxes(scenes, tmp_path):
    with pytest.raises(ConfigError, match=r"flism\.choice = 'truth'.*'boxes'"):
        run(dataclasses.replace(scenes, truth=None), tmp_path / "cache", choice="truth")


def test_every_choice_has_shards_of_its_own(scenes, tmp_path):
    for choice in ("best", "random", "truth"):
        run(scenes, tmp_path / "cache", choice=choice)
    assert len(list((tmp_path / "cache/flism").iterdir())) == 3
    sentences = {s.text for caption in scenes.records["long_caption"] for s in split_sentences(caption)}
    assert set(run(scenes, tmp_path / "cache", choice="truth").pairs["sentence"]) <= sentences
