import dataclasses
import json
import os
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from colours import flism_config
from PIL import Image
from safetensors.torch import load_file

from fast_goal.config import DetectorConfig
from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError, ModelError
from fast_goal.flism.detectors import MAX_BOXES, load_detector, obtain_detector
from fast_goal.flism.detectors import ultralytics as module
from fast_goal.flism.detectors.ultralytics import prepare_ultralytics
from fast_goal.flism.regions import box_iou

CPU = torch.device("cpu")
EVERYTHING = flism_config(confidence=0.001, iou=0.9, max_detections=20)


def detector_config(**changes) -> DetectorConfig:
    values = {
        "kind": "trained",
        "weights": "yolo11n.yaml",
        "trust_pickle": False,
        "split": "train",
        "image_size": 64,
        "images": 6,
        "epochs": 1,
        "batch_size": 4,
    }
    return DetectorConfig(**(values | changes))


@pytest.fixture(scope="module")
def _folder(tmp_path_factory):
    return tmp_path_factory.mktemp("detector")


@pytest.fixture
def trained(scenes, _folder, monkeypatch):
    """A detector trained for one epoch, once for the module: its folder, metrics, and the model as it was trained."""
    if not (_folder / "detector.json").exists():
        kept = {}
        real = module._save_state
        monkeypatch.setattr(module, "_save_state", lambda model, *rest: (kept.update(model=model), real(model, *rest)))
        trained.metrics = obtain_detector(detector_config(), _folder, scenes, seed=0)["metrics"]
        trained.model = kept["model"]
    return _folder, trained.metrics, trained.model


@pytest.fixture
def images(scenes):
    """Images of different shapes and sizes."""
    pictures = [open_image(scenes.path(row)) for row in scenes.records.itertuples()][:3]
    return [pictures[0], pictures[1].resize((200, 90)), pictures[2].crop((0, 0, 30, 48))]


def ids(images):
    return [str(index) for index in range(len(images))]


def detect(detector, images):
    return detector.detect(images, ids(images))


def load(folder, config=EVERYTHING):
    return load_detector(folder, config, None, CPU)


def assert_same(a, b, atol=0.0):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=atol)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=atol)
        assert one.labels == other.labels


def test_what_is_stored(trained):
    folder, metrics, _ = trained
    info = json.loads((folder / "detector.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"detector.json", "detector.safetensors"}
    assert (info["kind"], info["format"], info["weights"]) == ("trained", "safetensors", "yolo11n.yaml")
    assert info["names"] == ["object"]
    assert len(info["sha256"]) == 64
    assert 0 <= metrics["mAP50"] <= 1
    assert (metrics["train_images"], metrics["held_out_images"]) == (4, 1)  # of the five with two objects or more


def test_the_rebuilt_model_has_the_weights_of_the_trained_one(trained):
    folder, _, model = trained
    info = json.loads((folder / "detector.json").read_text())
    rebuilt = module._rebuild(info["architecture"], info["names"], folder / "detector.safetensors")
    for (name, before), (other, after) in zip(model.state_dict().items(), rebuilt.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(before, after)


def test_detections_are_those_of_ultralytics_own_predict(trained, images):
    from ultralytics import YOLO

    folder, _, model = trained
    yolo = YOLO("yolo11n.yaml", task="detect")
    yolo.model = model.eval()
    arrays = [np.ascontiguousarray(np.asarray(image)[..., ::-1]) for image in images]  # it takes blue, green, red
    settings = {"conf": EVERYTHING.confidence, "iou": EVERYTHING.iou, "imgsz": 64, "rect": False, "max_det": MAX_BOXES}
    expected = yolo.predict(arrays, **settings, verbose=False, device="cpu", project=module._runs_folder())
    found = detect(load(folder), images)
    assert sum(len(one.labels) for one in found) > 10
    for one, result in zip(found, expected, strict=True):
        rows = result.boxes.data.numpy()
        np.testing.assert_allclose(one.boxes, rows[:, :4], atol=1e-3)
        np.testing.assert_allclose(one.scores, rows[:, 4], atol=1e-5)
        assert one.labels == ["object"] * len(rows)


def test_an_image_does_not_depend_on_the_others_of_its_batch(trained, images):
    detector = load(trained[0])
    together = detect(detector, images)
    assert_same(together, [detect(detector, [image])[0] for image in images])  # to the last bit
    assert_same(together[::-1], detect(detector, images[::-1]))
    assert_same(together * 4, detect(detector, images * 4))  # more than the network sees at once
    assert_same(together, detect(load(trained[0]), images))


def test_images_can_be_prepared_in_threads(trained, images):
    detector = load(trained[0])
    with ThreadPoolExecutor(3) as pool:
        prepared = list(pool.map(detector.prepare, images))
    assert prepared[0].pixels.shape == (64, 64, 3)
    assert_same(detect(detector, prepared), detect(detector, images))


def test_boxes_lie_in_the_image_and_thresholds_hold(trained, images):
    for settings in (EVERYTHING, flism_config(confidence=0.002, max_detections=3, iou=0.1)):
        for image, found in zip(images, detect(load(trained[0], settings), images), strict=True):
            assert len(found.labels) == len(found.boxes) == len(found.scores) <= MAX_BOXES
            assert (found.boxes >= 0).all()
            assert (found.boxes[:, 2:] <= image.size).all()
            assert (found.scores >= settings.confidence).all()
            assert (np.diff(found.scores) <= 0).all()


def test_what_the_digest_covers(trained):
    def digest(**changes):
        return load(trained[0], flism_config(**changes)).digest

    assert digest() == digest(max_detections=3, min_area=0.1, merge_iou=0.5, classes=["object"], batch_size=7)
    assert len({digest(), digest(confidence=0.3), digest(iou=0.5)}) == 3


def test_an_unknown_class_stops_before_any_work(trained):
    with pytest.raises(ConfigError, match=r"flism\.classes = \['cat'\].*object"):
        load(trained[0], flism_config(classes=["object", "cat"]))


class Network:
    """Stands for ultralytics' backend: keeps the batches, finds the same raw boxes (centre, size, class scores) in all."""

    dynamic, stride, end2end, device = True, 32, False, torch.device("cpu")

    def __init__(self, boxes=((32.0, 32.0, 20.0, 10.0),), batch=1):
        self.seen, self.batch = [], batch
        self.raw = torch.tensor([[*box, 0.1, 0.5 - 0.0001 * index] for index, box in enumerate(boxes)]).T

    def __call__(self, batch):
        self.seen.append(batch)
        return self.raw.expand(len(batch), -1, -1).clone()


def faked(format_name="safetensors", **changes):
    info = {"format": format_name, "sha256": "0", "names": ["cat", "dog"], "image_size": 64}
    prepare_ultralytics()
    network = Network(**changes)
    return network, module.UltralyticsDetector(network, info, flism_config())


def test_the_network_gets_a_padded_square_of_red_green_blue():
    network, detector = faked()
    (found,) = detect(detector, [Image.new("RGB", (40, 20), (200, 100, 50))])
    (batch,) = network.seen
    assert batch.shape == (module.BATCH[0], 3, 64, 64)
    np.testing.assert_allclose(batch[0, :, 32, 32] * 255, [200, 100, 50], atol=1e-3)
    np.testing.assert_allclose(batch[0, :, [15, 48], 32] * 255, 114, atol=1e-3)  # 64 x 32 pixels in the middle
    assert not batch[1:].any()
    np.testing.assert_allclose(found.boxes, [[22 / 1.6, (27 - 16) / 1.6, 42 / 1.6, (37 - 16) / 1.6]], atol=1e-5)
    assert found.labels == ["dog"]


@pytest.mark.parametrize(("format_name", "batch", "sizes"), [("litert", 1, [1, 1, 1]), ("engine", 2, [2, 1])])
def test_exported_formats_get_no_more_images_than_they_were_exported_for(format_name, batch, sizes):
    network, detector = faked(format_name, batch=batch)
    assert len(detect(detector, [Image.new("RGB", (40, 30))] * 3)) == 3
    assert [len(seen) for seen in network.seen] == sizes


def test_slow_suppression_loses_no_image(monkeypatch):
    """ultralytics stops after 2 seconds of it and leaves the images that follow empty."""
    from ultralytics.utils import nms

    _, detector = faked()
    clock = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(nms.time, "time", lambda: next(clock))
    found = detect(detector, [Image.new("RGB", (40, 30))] * 5)
    assert [len(one.labels) for one in found] == [1] * 5
    monkeypatch.setattr(module.math, "inf", 0.05)  # ultralytics' own limit: the test would see the loss
    assert [len(one.labels) for one in detect(detector, [Image.new("RGB", (40, 30))] * 5)] == [1, 0, 0, 0, 0]


def test_crowded_images_keep_the_most_confident():
    boxes = [(float(x), float(y), 1.0, 1.0) for x in range(1, 40, 2) for y in range(1, 40, 2)]
    _, detector = faked(boxes=boxes)
    (found,) = detect(detector, [Image.new("RGB", (64, 64))])
    assert len(found.labels) == MAX_BOXES < len(boxes)
    np.testing.assert_allclose(found.boxes[:, 0], [x - 0.5 for x, *_ in boxes[:MAX_BOXES]], atol=1e-4)


def test_strips_and_empty_batches():
    network, detector = faked()
    found = detect(detector, [Image.new("RGB", (1, 65)), Image.new("RGB", (40, 30)), Image.new("RGB", (130, 2))])
    assert [len(one.labels) for one in found] == [0, 1, 0]
    assert detect(detector, []) == []
    assert len(network.seen) == 1


def test_every_kind_of_the_configuration_has_a_detector():
    from fast_goal.flism import detectors

    for kind in typing.get_args(typing.get_type_hints(DetectorConfig)["kind"]):
        detectors._kind(kind)
    assert set(detectors._KINDS) == set(typing.get_args(typing.get_type_hints(DetectorConfig)["kind"]))


def test_training_images_and_labels(scenes, tmp_path):
    chosen, objects = module._training_sample(scenes, detector_config(images=50), seed=0)
    counts = scenes.objects["image_id"].value_counts()
    assert (counts[chosen["image_id"]] >= 2).all()
    assert set(chosen["split"]) == {"train"}
    _, sizes = module._write_yolo_dataset(scenes, chosen, objects, tmp_path)
    assert sizes == {"train": 4, "val": 1}
    written = sorted(tmp_path.glob("labels/*/*.txt"))
    assert len(written) == len(list(tmp_path.glob("images/*/*.png"))) == 5
    for path, image_id in zip(sorted(written, key=lambda p: p.name), chosen["image_id"], strict=True):
        true = objects[objects["image_id"] == image_id]
        lines = [line.split() for line in path.read_text().splitlines()]
        assert [line[0] for line in lines] == ["0"] * len(true)
        x, y, w, h = np.array([line[1:] for line in lines], dtype=float).T * np.array([[64], [48], [64], [48]])
        boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        assert box_iou(boxes, true[["x1", "y1", "x2", "y2"]].to_numpy(float)).min() > 0.99


def test_the_sample_is_seeded(scenes):
    def sample(seed, images=3):
        return list(module._training_sample(scenes, detector_config(images=images), seed)[0]["image_id"])

    assert sample(0) == sample(0)
    assert len(sample(0)) == 3
    assert len({tuple(sample(seed)) for seed in range(8)}) > 1


def test_close_ups_are_used_where_there_is_nothing_else(scenes):
    counts = scenes.objects["image_id"].value_counts()
    single = scenes.objects[scenes.objects["image_id"].map(counts) == 1]
    dataset = dataclasses.replace(scenes, objects=single)
    assert len(module._training_sample(dataset, detector_config(images=50), 0)[0]) == 3


def test_training_needs_boxes(scenes, tmp_path):
    without = Dataset(scenes.name, scenes.root, scenes.records)
    with pytest.raises(ConfigError, match=r"base\.detector\.kind=ultralytics"):
        obtain_detector(detector_config(), tmp_path, without, 0)
    with pytest.raises(ConfigError, match=r"base\.detector\.split = 'test'"):
        obtain_detector(detector_config(split="test"), tmp_path, scenes, 0)


def test_training_needs_an_architecture(scenes, tmp_path):
    with pytest.raises(ConfigError, match=r"yolo99q\.yaml"):
        obtain_detector(detector_config(weights="yolo99q.yaml"), tmp_path, scenes, 0)


def test_no_detector(tmp_path, scenes):
    assert obtain_detector(detector_config(kind="none"), tmp_path, scenes, 0) == {"kind": "none"}
    assert load(tmp_path) is None


def test_missing_and_changed_weights(trained, tmp_path):
    with pytest.raises(ModelError, match="fast-goal base"):
        load(tmp_path)
    (tmp_path / "detector.json").write_text((trained[0] / "detector.json").read_text())
    (tmp_path / "detector.safetensors").write_bytes(b"something else")
    with pytest.raises(ModelError, match="not the file"):
        load(tmp_path)


def obtain(tmp_path, weights, **changes):
    config = detector_config(kind="ultralytics", weights=str(weights), **changes)
    return obtain_detector(config, tmp_path / "detector", Dataset("none", tmp_path, pd.DataFrame()), 0)


@pytest.fixture
def pickled(tmp_path):
    """A .pt as ultralytics writes one, of an untrained detector."""
    prepare_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    model.names = {0: "cat", 1: "dog"}
    torch.save({"model": model, "train_args": {}}, tmp_path / "own.pt")
    return tmp_path / "own.pt", model


def test_a_local_pickle_is_opened_only_if_trusted(pickled, tmp_path, images, monkeypatch):
    path, model = pickled
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: pytest.fail("the pickle was opened"))
        with pytest.raises(ConfigError, match=r"base\.detector\.trust_pickle"):
            obtain(tmp_path, path)
    info = obtain(tmp_path, path, trust_pickle=True)
    assert info["names"] == ["cat", "dog"]
    assert {file.name for file in (tmp_path / "detector").iterdir()} == {"detector.json", "detector.safetensors"}
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    weights = load_file(tmp_path / "detector" / "detector.safetensors")
    assert torch.equal(weights["model.0.conv.weight"], model.state_dict()["model.0.conv.weight"])
    assert len(detect(load(tmp_path / "detector"), images)) == 3


@pytest.mark.parametrize("name", ["own.PT", "own.pt.bin", "own.pth"])
def test_no_spelling_gets_a_pickle_opened(pickled, tmp_path, monkeypatch, name):
    path = pickled[0].rename(tmp_path / name)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("the pickle was opened"))
    with pytest.raises(ConfigError, match=r"base\.detector\.trust_pickle"):
        obtain(tmp_path, path)


def test_an_official_name_offline(tmp_path, monkeypatch):
    prepare_ultralytics()
    from ultralytics.utils import downloads

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "safe_download", offline)
    with pytest.raises(ModelError, match=r"(?s)no network.*base\.detector\.kind=none"):
        obtain(tmp_path, "yolo11n.pt")


def test_an_official_name_online(pickled, tmp_path, monkeypatch):
    from ultralytics.utils import downloads

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloads, "safe_download", lambda url, file, **_: file.write_bytes(pickled[0].read_bytes()))
    assert obtain(tmp_path, "yolo11n.pt")["weights"] == "yolo11n.pt"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere.onnx", ModelError, "does not exist"),
        ("nowhere.pt", ModelError, "neither a file"),
        ("architecture.yaml", ConfigError, "kind=trained"),
        ("broken.onnx", ModelError, "could not be run"),
    ],
)
def test_other_weights(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    if not name.startswith("nowhere"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(error, match=message):
        obtain(tmp_path, name)


def test_an_exported_model(tmp_path, images, pickled):
    """TorchScript, which needs no further package: it detects what the model it was exported from detects."""
    from ultralytics import YOLO

    path, model = pickled
    for name, parameter in model.named_parameters():
        if ".cv3." in name and name.endswith(".2.bias"):  # an untrained network is sure of nothing
            torch.nn.init.normal_(parameter, -3, 1)
    torch.save({"model": model, "train_args": {}}, path)
    exported = YOLO(str(path)).export(format="torchscript", imgsz=64, verbose=False, device="cpu")
    info = obtain(tmp_path, exported, image_size=640)
    assert (info["format"], info["names"], info["image_size"]) == ("torchscript", ["cat", "dog"], 64)
    found = detect(load(tmp_path / "detector"), images)
    obtain(tmp_path / "torch", path, image_size=64, trust_pickle=True)
    original = detect(load(tmp_path / "torch" / "detector"), images)
    assert [len(one.labels) for one in found] == [len(one.labels) for one in original]
    assert sum(len(one.labels) for one in found) > 10
    np.testing.assert_allclose(found[1].boxes[:5], original[1].boxes[:5], atol=0.01)


@pytest.mark.skipif("FAST_GOAL_TEST_TFLITE" not in os.environ, reason="FAST_GOAL_TEST_TFLITE names no detector (.tflite)")
def test_a_tflite_model(tmp_path, images):
    """A real one from outside, as `FAST_GOAL_TEST_TFLITE=yolov8n_int8.tflite pytest ...`."""
    pytest.importorskip("ai_edge_litert")
    info = obtain(tmp_path, Path(os.environ["FAST_GOAL_TEST_TFLITE"]).resolve())
    assert (info["format"], info["image_size"] % 32) == ("litert", 0)
    detector = load(tmp_path / "detector", flism_config(confidence=0.01))
    assert_same(detect(detector, images), [detect(detector, [image])[0] for image in images])


def test_a_missing_tflite_runtime_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    (tmp_path / "model.tflite").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"fast-goal\[tflite\]"):
        obtain(tmp_path, tmp_path / "model.tflite")


def test_pillow_stays_as_it_was(trained):
    assert Image.open.__module__ == "PIL.Image"


def test_pillow_is_put_right_if_ultralytics_was_imported_before(trained, monkeypatch):
    from ultralytics.utils import patches

    monkeypatch.setattr(Image, "open", patches.image_open)  # as an import of ultralytics leaves it
    prepare_ultralytics()
    assert Image.open.__module__ == "PIL.Image"


def test_ultralytics_stays_quiet_and_alone(trained):
    from ultralytics import settings
    from ultralytics.utils import AUTOINSTALL, ONLINE

    assert not any(settings[name] for name in ("sync", "mlflow", "dvc", "comet", "clearml"))
    assert not ONLINE
    assert not AUTOINSTALL


def test_ultralytics_leaves_torch_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        prepare_ultralytics()
        from ultralytics.utils.torch_utils import select_device

        select_device("cpu", verbose=False)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
