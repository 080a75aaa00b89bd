import dataclasses
import errno
import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from colours import ColourClip, ColourDetector, flism_config, paint

from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.images import crop, open_image
from fast_goal.data.records import PAIRS, Dataset
from fast_goal.errors import ConfigError, DataError, ModelError
from fast_goal.flism import embedder, shards
from fast_goal.flism.engine import extract
from fast_goal.flism.regions import spatial_regions


def run(dataset, cache, clip=None, detector=None, **changes):
    return extract(dataset, clip or ColourClip(), detector or ColourDetector(), flism_config(**changes), cache)


def forget(cache):
    """Removes what is known of crops, sentences and detections, so that only the shards are left."""
    shutil.rmtree(cache / "embeddings", ignore_errors=True)


def rehash(dataset: Dataset) -> Dataset:
    """The data set with the content hashes of its files as they are now."""
    records = dataset.records.copy()
    records["content_hash"] = [hashlib.sha256(dataset.path(row).read_bytes()).hexdigest() for row in records.itertuples()]
    return dataclasses.replace(dataset, records=records)


def changed(dataset: Dataset, **columns) -> Dataset:
    """The data set with values of its first record replaced."""
    records = dataset.records.copy()
    for name, value in columns.items():
        records.at[0, name] = value
    return Dataset(dataset.name, dataset.root, records, dataset.truth, dataset.objects, digest=str(columns))


def oracle(dataset):
    """Per image: the boxes, and for each sentence its best region and similarity, one crop and one sentence at a time."""
    clip, found = ColourClip(), {}
    for row in dataset.split("train", "val").itertuples():
        image = open_image(dataset.path(row))
        boxes = np.concatenate([spatial_regions(*image.size), ColourDetector().detect([image])[0].boxes])
        pieces = [crop(image, box) for box in boxes]
        regions = [clip.encode_image(clip.view(*piece.size).apply(piece)[None])[0] for piece in pieces]
        pairs = []
        for index, sentence in enumerate(split_sentences(row.long_caption)):
            text = clip.encode_text(tokenize([sentence.text], clip.context_length)[0])[0]
            similarities = [float(text @ region) for region in regions]
            pairs.append((index, int(np.argmax(similarities)), max(similarities)))
        found[row.image_id] = boxes, sorted(pairs, key=lambda pair: -pair[2])
    return found


def assert_same(a, b):
    for name in ("regions", "pairs", "skipped"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), atol=1e-5, rtol=0)


def test_against_a_loop_over_crops_and_sentences(scenes, tmp_path):
    result = run(scenes, tmp_path / "cache", top_k=3)
    expected = oracle(scenes)
    assert list(result.regions["image_id"].unique()) == list(expected)
    for image_id, (boxes, pairs) in expected.items():
        regions = result.regions[result.regions["image_id"] == image_id]
        np.testing.assert_allclose(regions[["x1", "y1", "x2", "y2"]], boxes)
        assert list(regions["region_index"]) == list(range(len(boxes)))
        found = result.pairs[result.pairs["image_id"] == image_id]
        assert list(found["rank"]) == list(range(1, len(found) + 1))
        assert list(zip(found["sentence_index"], found["region_index"], strict=True)) == [pair[:2] for pair in pairs[:3]]
        np.testing.assert_allclose(found["similarity"], [pair[2] for pair in pairs[:3]], atol=1e-5)
        np.testing.assert_allclose(found[["x1", "y1", "x2", "y2"]], boxes[found["region_index"]])
        caption = scenes.records.set_index("image_id").at[image_id, "long_caption"]
        assert all(caption[pair.char_start : pair.char_end] == pair.sentence for pair in found.itertuples())
    assert result.skipped.empty


def test_metrics_know_the_truth(scenes, tmp_path):
    metrics = run(scenes, tmp_path / "cache").metrics
    assert metrics["images"] == 11
    assert metrics["true_region_share"] == 1
    assert metrics["mean_true_iou"] == pytest.approx(1)
    assert metrics["pairs_with_truth"] == 11
    assert metrics["share_by_kind"] == {"detector": 1, "quadrant": 0, "centre": 0}
    assert sum(metrics["similarity_histogram"]["counts"]) == 11
    assert metrics["images_per_second"] > 0


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 1), (2, 5), (7, 3), (100, 100)])
def test_the_sizes_of_batches_and_shards_do_not_matter(scenes, tmp_path, batch_size, shard_size):
    expected = run(scenes, tmp_path / "a")
    assert_same(run(scenes, tmp_path / "b", batch_size=batch_size, shard_size=shard_size), expected)


def test_crops_of_many_images_fill_the_batches_and_each_sentence_is_embedded_once(scenes, tmp_path):
    clip = ColourClip()
    run(scenes, tmp_path / "cache", clip=clip, batch_size=8, shard_size=100)
    assert set(clip.images_seen[:-1]) == {8}
    sentences = {s.text for caption in scenes.records["long_caption"] for s in split_sentences(caption)}
    assert sum(clip.texts_seen) == len(sentences)
    clip = ColourClip()
    run(scenes, tmp_path / "again", clip=clip, batch_size=8, shard_size=2)
    assert sum(clip.texts_seen) == len(sentences)


def test_the_memory_for_sentences_is_bounded(scenes, tmp_path, monkeypatch):
    expected = run(scenes, tmp_path / "a")
    monkeypatch.setattr(embedder, "REMEMBERED_SENTENCES", 1)
    assert_same(run(scenes, tmp_path / "b"), expected)


@pytest.mark.parametrize("limit", [1, 5, 10])
def test_a_stopped_run_goes_on(scenes, tmp_path, limit, capsys):
    expected = run(scenes, tmp_path / "whole", shard_size=2)
    with pytest.raises(KeyboardInterrupt):
        run(scenes, tmp_path / "cache", detector=ColourDetector(limit), shard_size=2, batch_size=1)
    rest = ColourDetector()
    forget(tmp_path / "cache")
    capsys.readouterr()
    # other sizes than before, as after lack of memory
    assert_same(run(scenes, tmp_path / "cache", detector=rest, shard_size=3), expected)
    finished = limit // 2 * 2
    assert rest.seen == 11 - finished
    assert (f"resumed {finished}" in capsys.readouterr().err) == (finished > 0)


def test_a_finished_run_is_only_read(scenes, tmp_path):
    expected = run(scenes, tmp_path / "cache")
    clip, detector = ColourClip(), ColourDetector()
    again = run(scenes, tmp_path / "cache", clip=clip, detector=detector)
    assert_same(again, expected)
    assert again.metrics == expected.metrics
    assert (clip.images_seen, detector.seen) == ([], 0)


@pytest.mark.parametrize("damage", ["no mark", "half a mark", "half a table", "no table"])
def test_nothing_half_written_is_trusted(scenes, tmp_path, damage):
    expected = run(scenes, tmp_path / "cache")
    (folder,) = (tmp_path / "cache/flism").iterdir()
    forget(tmp_path / "cache")
    mark = next(mark for mark in folder.glob("shard-*.json") if "image05" in mark.read_text())
    table = mark.with_name(f"{mark.stem}.pairs.parquet")
    if damage == "no mark":
        mark.unlink()
        table.write_bytes(b"")
    elif damage == "half a mark":
        mark.write_text(mark.read_text()[:20])
    elif damage == "half a table":
        table.write_bytes(table.read_bytes()[:300])
    else:
        table.unlink()
    detector = ColourDetector()
    assert_same(run(scenes, tmp_path / "cache", detector=detector), expected)
    assert detector.seen == 4


@pytest.mark.parametrize(
    ("what", "again"),
    [("model", 11), ("detector", 11), ("top_k", 11), ("caption", 1), ("size of batches", 0), ("splits", 0)],
)
def test_a_change_makes_again_what_it_affects(scenes, tmp_path, what, again):
    run(scenes, tmp_path / "cache")
    clip, detector, settings, dataset = ColourClip(), ColourDetector(), {}, scenes
    if what == "model":
        clip.scale.data.fill_(2.0)
    elif what == "detector":
        detector.digest = "others"
    elif what == "top_k":
        settings = {"top_k": 1}
    elif what == "size of batches":
        settings = {"batch_size": 1, "shard_size": 100, "processes": 1}
    elif what == "splits":
        settings = {"splits": ["val"]}
    else:
        dataset = changed(scenes, long_caption="A red box.")
    forget(tmp_path / "cache")
    found = run(dataset, tmp_path / "cache", clip=clip, detector=detector, **settings)
    assert detector.seen == again
    expected = run(dataset, tmp_path / "new", clip=clip, detector=ColourDetector(), **settings)
    assert_same(found, expected)
    assert found.metrics["truncated_sentences"] == expected.metrics["truncated_sentences"]


def test_added_images_are_the_only_new_work(scenes, tmp_path):
    few = dataclasses.replace(scenes, name="few", records=scenes.records[::2].reset_index(drop=True))
    run(few, tmp_path / "cache")
    detector, clip = ColourDetector(), ColourClip()
    grown = run(scenes, tmp_path / "cache", detector=detector, clip=clip)
    assert detector.seen == 5
    expected = run(scenes, tmp_path / "new")
    assert_same(grown, expected)
    detector = ColourDetector()
    assert_same(run(few, tmp_path / "cache", detector=detector), run(few, tmp_path / "other"))
    assert detector.seen == 0
    names = [name for name in expected.metrics if "second" not in name]
    assert {name: grown.metrics[name] for name in names} == {name: expected.metrics[name] for name in names}


def test_the_order_of_the_records_does_not_matter(scenes, tmp_path):
    turned = dataclasses.replace(scenes, records=scenes.records[::-1].reset_index(drop=True))
    a, b = run(scenes, tmp_path / "a"), run(turned, tmp_path / "b")
    assert list(b.pairs["image_id"].unique()) == list(a.pairs["image_id"].unique())[::-1]
    for name, keys in (("regions", ["image_id", "region_index"]), ("pairs", ["image_id", "rank"])):
        tables = [getattr(result, name).sort_values(keys).reset_index(drop=True) for result in (a, b)]
        pd.testing.assert_frame_equal(*tables, atol=1e-5, rtol=0)


def test_a_subset_of_the_records_serves_the_whole_run(scenes, tmp_path):
    detector, clip = ColourDetector(), ColourClip()
    chosen = scenes.records.iloc[[2, 5]].reset_index(drop=True)
    result = extract(scenes, clip, detector, flism_config(), tmp_path / "cache", records=chosen)
    assert (set(result.pairs["image_id"]), result.metrics["images"]) == ({"image02", "image05"}, 2)
    assert_same(run(scenes, tmp_path / "cache", detector=detector), run(scenes, tmp_path / "new"))
    assert detector.seen == 11


def test_a_full_disk_is_named_and_the_run_goes_on_later(scenes, tmp_path, monkeypatch):
    real, calls = shards.write_table, []

    def full(path, rows, schema):
        calls.append(path)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, rows, schema)

    monkeypatch.setattr(shards, "write_table", full)
    with pytest.raises(DataError, match="No space left on device"):
        run(scenes, tmp_path / "cache")
    monkeypatch.undo()
    forget(tmp_path / "cache")
    detector = ColourDetector()
    assert_same(run(scenes, tmp_path / "cache", detector=detector), run(scenes, tmp_path / "other"))
    assert detector.seen == 7


def test_unusable_images_are_skipped_with_their_reason(scenes, tmp_path):
    (scenes.root / "image01.png").write_bytes(b"no image")
    (scenes.root / "image02.png").unlink()
    paint(scenes.root / "image03.png", {"red": (1, 1, 9, 9)}, size=(64, 48))
    dataset = changed(scenes, long_caption=" \n ")
    result = run(dataset, tmp_path / "cache")
    assert list(result.skipped["sample"]) == ["image00", "image01", "image02", "image03"]
    assert list(result.skipped["reason"]) == ["no sentence", "unreadable image", "unreadable image", "changed image"]
    assert set(result.skipped["step"]) == {"flism"}
    assert "image02.png" in result.skipped["detail"][2]
    assert (result.metrics["images"], result.metrics["skipped"]) == (7, 4)
    assert result.metrics["skipped_by_reason"]["unreadable_image"] == {"images": 2, "share": 2 / 11}
    assert set(result.pairs["image_id"]) == {f"image{number:02d}" for number in range(4, 11)}


@pytest.mark.parametrize("shard_size", [2, 4, 100])
def test_a_mended_image_is_used_by_the_next_run(scenes, tmp_path, shard_size):
    expected = run(scenes, tmp_path / "other")
    good = (scenes.root / "image05.png").read_bytes()
    (scenes.root / "image05.png").write_bytes(b"no image")
    (scenes.root / "image09.png").rename(tmp_path / "away.png")
    assert list(run(scenes, tmp_path / "cache", shard_size=4).skipped["sample"]) == ["image05", "image09"]
    (scenes.root / "image05.png").write_bytes(good)
    detector = ColourDetector()
    rest = run(scenes, tmp_path / "cache", detector=detector, shard_size=shard_size)
    assert (list(rest.skipped["sample"]), detector.seen) == (["image09"], 1)
    (tmp_path / "away.png").rename(scenes.root / "image09.png")
    assert_same(run(scenes, tmp_path / "cache", shard_size=shard_size), expected)
    assert_same(run(scenes, tmp_path / "cache"), expected)


def test_detector_only_skips_an_image_without_detections(scenes, tmp_path):
    paint(scenes.root / "image04.png", {}, size=(64, 48))
    result = run(rehash(scenes), tmp_path / "cache", regions="detector")
    assert set(result.regions["kind"]) == {"detector"}
    assert result.skipped[["sample", "reason"]].values.tolist() == [["image04", "no region"]]


def test_spatial_only_needs_no_detector(scenes, tmp_path):
    config = flism_config(regions="spatial")
    result = extract(scenes, ColourClip(), None, config, tmp_path / "cache")
    assert result.metrics["regions_per_image"] == 5
    assert result.metrics["share_by_kind"]["detector"] == 0
    detector = ColourDetector()
    extract(scenes, ColourClip(), detector, config, tmp_path / "cache2")
    assert detector.seen == 0
    with pytest.raises(ConfigError, match=r"base\.detector\.kind"):
        extract(scenes, ColourClip(), None, flism_config(regions="detector"), tmp_path / "cache")


def test_without_a_detector_both_means_spatial(scenes, tmp_path):
    result = extract(scenes, ColourClip(), None, flism_config(), tmp_path / "cache")
    assert len(result.regions) == 55


def test_equal_crops_are_one_tie(scenes, tmp_path):
    class Twice(ColourDetector):
        def detect(self, images, image_ids):
            for found in super().detect(images):
                found.boxes[:] += 0.25  # rounded outwards, all of these are the same pixels
                found.boxes[:, 2:] -= 0.5
                boxes = np.concatenate([found.boxes, found.boxes - 0.125])
                yield type(found)(boxes, found.labels * 2, np.tile(found.scores, 2))

    twice = Twice()
    twice.detect = lambda images, image_ids: list(Twice.detect(twice, images, image_ids))
    result = run(scenes, tmp_path / "cache", detector=twice, batch_size=1)
    best = result.pairs[(result.pairs["rank"] == 1)].merge(
        result.regions.groupby("image_id").size().rename("count"), on="image_id"
    )
    assert (best["region_index"] < 5 + (best["count"] - 5) // 2).all()


def test_long_sentences_are_cut_off_and_counted(scenes, tmp_path):
    dataset = changed(scenes, long_caption="A red box " + "and so on " * 40 + "ends. A green box.")
    metrics = run(dataset, tmp_path / "cache").metrics
    assert metrics["truncated_sentences"] == 1
    assert metrics["truncated_share"] == pytest.approx(1 / metrics["sentences"])


@pytest.mark.parametrize(("kind", "similar"), [("uniform", False), ("similarity", True)])
def test_weights_of_the_pairs_of_an_image(scenes, tmp_path, kind, similar):
    pairs = run(scenes, tmp_path / "cache", top_k=3, pair_weights=kind).pairs
    for _, image in pairs.groupby("image_id"):
        assert image["weight"].sum() == pytest.approx(1)
        expected = image["similarity"] / image["similarity"].sum() if similar else np.full(len(image), 1 / len(image))
        np.testing.assert_allclose(image["weight"], expected)


def test_filters_are_counted(scenes, tmp_path):
    metrics = run(scenes, tmp_path / "cache", classes=["red"], merge_iou=0.99).metrics
    others = (scenes.objects["label"] != "red") & (scenes.objects["image_id"] != "image11")
    assert metrics["dropped_by_reason"]["class"] == metrics["dropped_detections"] == others.sum() > 0


def test_splits_without_captions_are_left_alone(scenes, tmp_path):
    result = run(scenes, tmp_path / "cache", splits=["pretrain", "val", "test"])
    assert set(result.pairs["image_id"]) == {"image08", "image09", "image10"}
    assert result.skipped.empty
    with pytest.raises(ConfigError, match=r"flism\.splits = \['pretrain'\]"):
        run(scenes, tmp_path / "cache", splits=["pretrain"])


def test_no_pair_at_all_stops(scenes, tmp_path):
    for path in scenes.root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="unreadable image"):
        run(scenes, tmp_path / "cache")


def test_a_damaged_model_stops(scenes, tmp_path):
    clip = ColourClip()
    clip.scale.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        run(scenes, tmp_path / "cache", clip=clip)


def test_marks_are_plain_json_and_tables_follow_the_schema(scenes, tmp_path):
    result = run(scenes, tmp_path / "cache")
    (folder,) = (tmp_path / "cache/flism").iterdir()
    images = [image for mark in folder.glob("shard-*.json") for image in json.loads(mark.read_text())["images"]]
    assert sorted(image["image_id"] for image in images) == sorted(result.pairs["image_id"].unique())
    assert list(result.pairs.columns) == PAIRS.names
    assert not list(folder.glob("*.tmp"))


def test_a_real_clip_fits_the_engine(scenes, tmp_path):
    from fast_goal.config import ScratchConfig
    from fast_goal.model.clip import build_scratch

    sizes = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "vision_width": 16, "vision_layers": 1, "text_width": 16}
    rest = {"text_layers": 1, "head_width": 8, "steps": 1, "batch_size": 2, "learning_rate": 1.0, "weight_decay": 0.0}
    clip = build_scratch(ScratchConfig(split="train", warmup_steps=0, **sizes, **rest), 24, seed=0).eval()
    torch.manual_seed(0)
    expected = run(scenes, tmp_path / "a", clip=clip, batch_size=100)
    assert_same(run(scenes, tmp_path / "b", clip=clip, batch_size=2, shard_size=3), expected)
