"""The frozen probe set: how it is drawn, that it stays, and what models are measured by on it."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from drift_project import write_training_set
from small_project import tiny_clip

from fast_goal.errors import DataError
from fast_goal.evaluation.features import FeatureStore
from fast_goal.monitoring.probe import Probe, linear_cka, measure, open_probe

PATH = Path("models/drift/probe.parquet")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def stores():
    return {name: FeatureStore(None, tiny_clip(seed), torch.device("cpu"), 8) for seed, name in enumerate(["champion", "base"])}


def test_the_probe_set_is_drawn_once_and_by_content():
    dataset = write_training_set(test=20)
    probe, drawn = open_probe(PATH, dataset, "test", 8)
    rows = dataset.split("test").set_index("content_hash")
    assert drawn and [file.content for file in probe.files] == sorted(rows.index)[:8]
    assert probe.captions == rows.long_caption[[file.content for file in probe.files]].tolist()
    other = write_training_set(name="other", numbers=range(3), test=4)
    again, drawn = open_probe(PATH, other, "test", 3)
    assert not drawn and again == probe, "frozen, whatever the data and the settings have become"


def test_images_that_vanished_or_changed_are_left_out_and_counted():
    dataset = write_training_set(test=12)
    whole, _ = open_probe(PATH, dataset, "test", 10)
    whole.files[0].path.unlink()
    whole.files[3].path.write_bytes(whole.files[4].path.read_bytes())
    rest, _ = open_probe(PATH, dataset, "test", 10)
    assert (rest.drawn, len(rest.files), rest.missing, rest.changed) == (10, 8, 1, 1)
    assert whole.files[0] not in rest.files and len(rest.captions) == 8
    assert rest.digest != whole.digest


def test_no_image_and_no_caption_stands_in_it_twice():
    dataset = write_training_set(test=8)
    records, tested = dataset.records, dataset.records.split == "test"
    ids = records[tested].sort_values("content_hash").image_id.tolist()
    records.loc[records.image_id == ids[1], "content_hash"] = records[records.image_id == ids[0]].content_hash.iloc[0]
    records.loc[records.image_id == ids[3], "long_caption"] = records[records.image_id == ids[2]].long_caption.iloc[0]
    records.loc[records.image_id == ids[4], "long_caption"] = ""
    probe, _ = open_probe(PATH, dataset, "test", 8)
    assert probe.drawn == 5


def test_a_probe_set_that_cannot_be_drawn_or_read():
    dataset = write_training_set(test=1)
    with pytest.raises(DataError, match=r"has 1 images with a long caption in the split 'test'.* needs 2"):
        open_probe(PATH, dataset, "test", 8)
    assert not PATH.exists()
    PATH.parent.mkdir(parents=True)
    PATH.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"probe\.parquet cannot be read .* Delete it"):
        open_probe(PATH, dataset, "test", 8)
    pd.DataFrame({"image_id": ["a"]}).to_parquet(PATH)
    with pytest.raises(DataError, match=r"probe\.parquet cannot be read"):
        open_probe(PATH, dataset, "test", 8)


def test_models_are_measured_as_a_slow_loop_does(stores):
    dataset = write_training_set(test=14)
    probe, _ = open_probe(PATH, dataset, "test", 14)
    found = measure(stores, probe, "champion")
    count = len(probe.files)
    best = {}
    for model, store in stores.items():
        images, texts = store.images(probe.files).double(), store.texts(probe.captions)[0].double()
        score = [[float(images[i] @ texts[j]) for j in range(count)] for i in range(count)]
        hits = {
            "text_to_image": sum(score[j][j] == max(score[i][j] for i in range(count)) for j in range(count)),
            "image_to_text": sum(score[i][i] == max(score[i]) for i in range(count)),
        }
        values = found[model]
        assert values["R@1"] == pytest.approx({way: 100 * hit / count for way, hit in hits.items()})
        assert values["cosine"] == pytest.approx(sum(score[i][i] for i in range(count)) / count)
        others = [score[i][j] for i in range(count) for j in range(count) if i != j]
        assert values["other_cosine"] == pytest.approx(sum(others) / len(others))
        assert values["scale"] == pytest.approx(math.exp(float(store.clip.model.logit_scale)))
        best[model] = {
            "text_to_image": [max(range(count), key=lambda i, j=j, s=score: s[i][j]) for j in range(count)],
            "image_to_text": [max(range(count), key=lambda j, i=i, s=score: s[i][j]) for i in range(count)],
        }
    for model in stores:
        for way, percent in found[model]["agreement"].items():
            same = sum(a == b for a, b in zip(best[model][way], best["champion"][way], strict=True))
            assert percent == pytest.approx(100 * same / count)
    assert found["champion"]["cka"] == pytest.approx({"images": 1, "captions": 1})
    assert 0 < found["base"]["cka"]["images"] < 1
    assert found["champion"]["digest"] != found["base"]["digest"]


def test_too_few_pairs_left_measure_nothing(stores):
    assert measure(stores, Probe("scenes", [], [], 8, 7, 1), "champion") == {}


def test_cka_is_that_of_the_centred_similarities_whatever_the_coordinates():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=generator).double(), torch.randn(9, 6, generator=generator).double()
    count = len(x)
    centre = torch.eye(count).double() - 1 / count
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = float((k * m).sum() / (k.norm() * m.norm()))
    assert linear_cka(x, y) == pytest.approx(expected)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator).double())[0]
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    assert linear_cka(x, torch.ones(9, 2)) == 0
