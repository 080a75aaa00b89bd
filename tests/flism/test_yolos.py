"""The detector of the paper, as transformers stores one, tiny and with random weights."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from colours import flism_config
from PIL import Image
from test_detector import detector_config

from fast_goal.data.records import Dataset
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, ModelError
from fast_goal.flism.detectors import load_detector, obtain_detector
from fast_goal.flism.detectors import yolos as module

pytest.importorskip("transformers")
NAMES = ["N/A", "person", "cat", "dog"]
SIZES = {"shortest_edge": 64, "longest_edge": 96}
EVERYTHING = flism_config(confidence=0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    prepare()
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=12,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
        initializer_range=0.4,  # so that the boxes of different images differ
    )
    model = YolosForObjectDetection(config)
    for parameter in (model.vit.embeddings.detection_tokens, model.vit.embeddings.position_embeddings):
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("yolos") / "tiny"
    model.save_pretrained(folder)
    YolosImageProcessor(size=SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    obtain(source, folder)
    return folder


@pytest.fixture
def images():
    """Of different shapes; two of them come out of the resizing with the same one."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in ((120, 80), (240, 160), (50, 90), (300, 60))
    ]


def obtain(weights, folder, **changes):
    config = detector_config(kind="yolos", weights=str(weights), **changes)
    return obtain_detector(config, folder, Dataset("none", folder, pd.DataFrame()), 0)


def load(folder, config=EVERYTHING):
    return load_detector(folder, config, None, "cpu")


def detect(detector, images):
    return detector.detect(images, [str(index) for index in range(len(images))])


def assert_same(a, b, atol=0.0):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=atol)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=atol)
        assert one.labels == other.labels


def copied(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def test_what_is_stored(source, stored):
    files = {path.name for path in stored.iterdir()}
    assert files == {"detector.json", "config.json", "preprocessor_config.json", "model.safetensors"}
    info = json.loads((stored / "detector.json").read_text())
    assert (info["kind"], info["weights"], info["revision"], info["names"]) == ("yolos", str(source), None, NAMES)


def test_an_image_alone_by_hand(source, stored, images):
    """The model's formulas from its own outputs: softmax without the last class, centre and size to corners, pixels."""
    from transformers import YolosForObjectDetection, YolosImageProcessor

    model = YolosForObjectDetection.from_pretrained(source).eval()
    processor = YolosImageProcessor.from_pretrained(source)
    for image, found in zip(images, detect(load(stored), images), strict=True):
        with torch.no_grad():
            outputs = model(processor(images=image, return_tensors="pt")["pixel_values"])
        rows = []
        for logits, (x, y, w, h) in zip(outputs.logits[0].tolist(), outputs.pred_boxes[0].tolist(), strict=True):
            exponents = np.exp(logits)
            best = int(np.argmax(logits[:-1]))
            box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * [*image.size, *image.size]
            rows.append((exponents[best] / exponents.sum(), NAMES[best], np.clip(box, 0, [*image.size, *image.size])))
        rows.sort(key=lambda row: -row[0])
        assert len(found.labels) == len(rows) == 12
        assert found.labels == [label for _, label, _ in rows]
        np.testing.assert_allclose(found.scores, [score for score, _, _ in rows], atol=1e-5)
        np.testing.assert_allclose(found.boxes, [box for *_, box in rows], atol=1e-2)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_an_image_does_not_depend_on_the_others_of_its_batch(stored, images, batch, monkeypatch):
    alone = [detect(load(stored), [image])[0] for image in images]
    spread = np.concatenate([one.boxes for one in alone])
    assert np.ptp(spread, axis=0).min() > 1
    monkeypatch.setattr(module, "BATCH", (batch, batch))
    detector = load(stored)
    exact = 0.0 if batch == 1 else 1e-3
    assert_same(detect(detector, images), alone, exact)
    assert_same(detect(detector, images[::-1]), alone[::-1], exact)


def test_padding_would_change_the_boxes(source, stored, images):
    """Why none is used: the processor's own batch, padded, gives the smaller images other boxes."""
    from transformers import YolosForObjectDetection, YolosImageProcessor

    model = YolosForObjectDetection.from_pretrained(source).eval()
    processor = YolosImageProcessor.from_pretrained(source)
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        padded = model(inputs["pixel_values"])
        alone = model(processor(images=images[0], return_tensors="pt")["pixel_values"])
    assert (padded.pred_boxes[0] - alone.pred_boxes[0]).abs().max() > 0.01


def test_the_same_shape_shares_a_batch(stored, images, monkeypatch):
    monkeypatch.setattr(module, "BATCH", (8, 8))
    detector = load(stored)
    shapes = []
    detector._model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    detect(detector, images)
    assert sorted(shape[0] for shape in shapes) == [1, 1, 2]


def test_images_can_be_prepared_in_threads(stored, images):
    detector = load(stored)
    with ThreadPoolExecutor(3) as pool:
        prepared = list(pool.map(detector.prepare, images))
    assert_same(detect(detector, prepared), detect(detector, images))


def test_confidence_boxes_and_order(stored, images):
    everything = detect(load(stored), images)
    threshold = float(np.median(np.concatenate([one.scores for one in everything])))
    fewer = detect(load(stored, flism_config(confidence=threshold)), images)
    for one, other, image in zip(everything, fewer, images, strict=True):
        assert (np.diff(one.scores) <= 0).all()
        assert (one.boxes >= 0).all()
        assert (one.boxes <= [*image.size, *image.size]).all()
        assert other.labels == [label for label, score in zip(one.labels, one.scores, strict=True) if score > threshold]
    assert 0 < sum(len(one.labels) for one in fewer) < 48


def test_strips_and_empty_batches(stored):
    detector = load(stored)
    found = detect(detector, [Image.new("RGB", (400, 4)), Image.new("RGB", (90, 60)), Image.new("RGB", (3, 100))])
    assert [len(one.labels) for one in found] == [0, 12, 0]
    assert detect(detector, []) == []
    thin = detect(detector, [Image.new("RGB", (600, height)) for height in range(90, 110)])  # about 16 pixels high
    assert {len(one.labels) for one in thin} == {0, 12}


def test_what_the_digest_covers(stored, tmp_path, source):
    def digest(folder=stored, **changes):
        return load(folder, flism_config(**changes)).digest

    assert digest() == digest(max_detections=3, iou=0.1, batch_size=7)
    changed = copied(source, tmp_path)
    settings = json.loads((changed / "preprocessor_config.json").read_text())
    (changed / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {**SIZES, "shortest_edge": 48}}))
    obtain(changed, tmp_path / "other")
    assert len({digest(), digest(confidence=0.3), digest(tmp_path / "other")}) == 3


def test_an_unknown_class_stops_before_any_work(stored):
    assert load(stored, flism_config(classes=["cat"])).names == NAMES
    with pytest.raises(ConfigError, match=r"flism\.classes = \['bird'\].*N/A, cat, dog, person"):
        load(stored, flism_config(classes=["cat", "bird"]))


def test_changed_weights_are_refused(stored, tmp_path):
    folder = copied(stored, tmp_path)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="fast-goal base"):
        load(folder)


def test_a_pickle_is_converted_only_if_trusted(source, stored, tmp_path, images):
    from safetensors.torch import load_file

    folder = copied(source, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"base\.detector\.trust_pickle=true"):
        obtain(folder, tmp_path / "detector")
    obtain(folder, tmp_path / "detector", trust_pickle=True)
    assert {path.suffix for path in (tmp_path / "detector").iterdir()} == {".json", ".safetensors"}
    assert_same(detect(load(tmp_path / "detector"), images), detect(load(stored), images))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(source, tmp_path, name):
    folder = copied(source, tmp_path)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        obtain(folder, tmp_path / "detector")


def test_other_models_are_refused(source, tmp_path):
    folder = copied(source, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "detr"}))
    with pytest.raises(ConfigError, match="'detr' model"):
        obtain(folder, tmp_path / "detector")
    (folder / "config.json").write_text(json.dumps({**config, "num_detection_tokens": 5}))
    with pytest.raises(ModelError, match=r"do not fit its config\.json.*mismatched_keys.*detection_tokens"):
        obtain(folder, tmp_path / "detector")


def test_incomplete_weights_are_refused(source, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(source, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["bbox_predictor.layers.0.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"missing_keys, such as bbox_predictor\.layers\.0\.weight"):
        obtain(folder, tmp_path / "detector")


def test_the_hub(source, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert obtain("hustvl/yolos-base@main", tmp_path)["revision"] == source.name
    assert asked == [("hustvl/yolos-base", "main")]


def test_the_hub_out_of_reach(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"(?s)no network.*hf download hustvl/yolos-base.*base\.detector\.kind=none"):
        obtain("hustvl/yolos-base", tmp_path)


def test_a_missing_transformers_names_the_extra(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"fast-goal\[transformers\]"):
        obtain(source, tmp_path)
