"""Snapshots of a training set: what they hold, how samples are drawn, and files that cannot be read."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from drift_project import write_training_set
from small_project import tiny_clip

from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.records import REGIONS, read_table
from fast_goal.errors import DataError
from fast_goal.evaluation.features import FeatureStore
from fast_goal.monitoring.snapshot import Facts, Present, Snapshot, load_snapshot, unknown

FACTS = Facts("scenes", "abc", "2026-01-01T00:00:00Z", "base", "detector", 10)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def store():
    return FeatureStore(None, tiny_clip(0), torch.device("cpu"), 8)


def present(dataset, store, regions=True) -> Present:
    table = read_table(f"data/flism/{dataset.name}/regions.parquet", REGIONS) if regions else None
    return Present(dataset, store, table)


def key(text) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def listed(keys) -> list[bytes]:
    return [one.tobytes() for one in keys]


def test_a_sample_holds_what_its_images_and_captions_are(store):
    dataset = write_training_set(numbers=range(20))
    sample = present(dataset, store).sample(12)
    rows = dataset.split("train")
    smallest = sorted(key(content) for content in rows.content_hash)[:12]
    assert listed(sample.image_keys) == smallest
    captions = {key(text): text for text in rows.long_caption}
    texts = [captions[one] for one in listed(sample.caption_keys)]
    assert listed(sample.caption_keys) == sorted(captions)[:12]
    assert sample.tokens.tolist() == tokenize(texts, 10)[1].tolist()
    assert sample.sentences.tolist() == [len(split_sentences(text)) for text in texts]
    assert np.allclose(sample.caption_features, store.texts(texts)[0].numpy())
    regions = read_table("data/flism/scenes/regions.parquet", REGIONS)
    ids = {key(row.content_hash): row.image_id for row in rows.itertuples()}
    for one, counts in zip(listed(sample.region_keys), sample.detections, strict=True):
        own = regions[(regions.image_id == ids[one]) & (regions.kind == "detector")].label.tolist()
        assert counts.tolist() == [own.count(label) for label in sample.labels]
    assert listed(sample.region_keys) == smallest


def test_the_same_data_draw_the_same_sample_in_any_order(store):
    first = present(write_training_set(), store).sample(15)
    second = present(write_training_set(order=-1), store).sample(15)
    for name, values in vars(first).items():
        assert np.array_equal(values, getattr(second, name)), name
    more = present(write_training_set(), store).sample(30)
    assert np.array_equal(more.image_keys[:15], first.image_keys), "a smaller sample is the beginning of a larger one"
    grown = present(write_training_set(numbers=range(50)), store).sample(15)
    shared = set(listed(grown.image_keys)) & set(listed(first.image_keys))
    assert len(shared) >= 8, "what both sets have is drawn from both"


def test_new_rows_are_those_whose_image_or_caption_was_not_there(store):
    here = present(write_training_set(numbers=range(20)), store)
    known = Snapshot(FACTS, here.images, here.captions, here.sample(5))
    dataset = write_training_set(numbers=range(20), shifted=(30, 31))
    dataset.records.loc[dataset.records.image_id == "3", "long_caption"] = "An old image with another caption."
    later = present(dataset, store)
    new = later.sample(50, known)
    hashes = dataset.records.set_index("image_id").content_hash
    assert set(listed(new.image_keys)) == {key(hashes["30s"]), key(hashes["31s"])}
    assert len(new.caption_keys) == 3 and key("An old image with another caption.") in listed(new.caption_keys)
    assert (unknown(later.images, known.images), unknown(later.captions, known.captions)) == (2, 3)
    assert unknown(known.captions, later.captions) == 1
    nothing = here.sample(50, known)
    assert len(nothing.image_keys) == len(nothing.tokens) == len(nothing.detections) == 0


def test_equal_images_and_captions_count_once_and_images_flism_has_not_seen_are_told(store):
    dataset = write_training_set(numbers=range(10))
    train = dataset.records.split == "train"
    dataset.records.loc[train & dataset.records.image_id.isin(["1", "2"]), "content_hash"] = "twice"
    dataset.records.loc[train & dataset.records.image_id.isin(["4", "5", "6"]), "long_caption"] = ""
    regions = read_table("data/flism/scenes/regions.parquet", REGIONS)
    here = Present(dataset, store, regions[regions.image_id != "7"])
    assert (len(here.images), len(here.captions)) == (9, 7)
    known = Present(write_training_set(numbers=range(10)), store, regions[regions.image_id != "7"]).sample(10)
    assert (len(known.image_keys), len(known.region_keys), len(known.detections)) == (10, 9, 9)
    assert len(Present(dataset, store, None)._detections(["1"])[1]) == 0


def test_a_snapshot_is_read_as_it_was_written_and_holds_no_pickle(store):
    here = present(write_training_set(), store)
    made = Snapshot(FACTS, here.images, here.captions, here.sample(10))
    path = Path("references/abc.npz")
    made.save(path)
    found = load_snapshot(path)
    assert found.facts == FACTS
    for name, values in {**vars(made.sample), "images": made.images, "captions": made.captions}.items():
        read = getattr(found if name in ("images", "captions") else found.sample, name)
        assert read.dtype != object and np.array_equal(read, values), name


@pytest.mark.parametrize("damage", ["cut", "text", "version", "pickle"])
def test_a_snapshot_that_cannot_be_read_is_named(store, damage):
    here = present(write_training_set(numbers=range(5)), store)
    path = Path("abc.npz")
    Snapshot(FACTS, here.images, here.captions, here.sample(10)).save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "version":
        np.savez(path, facts=np.array('{"version": 99}'))
    else:
        np.savez(path, facts=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"abc\.npz cannot be read as a snapshot .* Delete it"):
        load_snapshot(path)
