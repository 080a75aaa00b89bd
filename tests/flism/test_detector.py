import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from colours import flism_config
from PIL import Image

from fast_goal.config import DetectorConfig
from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError, ModelError
from fast_goal.flism import detector as module
from fast_goal.flism.detector import load_detector, obtain_detector, prepare_ultralytics, train_detector
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
        trained.metrics = train_detector(scenes, detector_config(), _folder, seed=0)
        trained.model = kept["model"]
    return _folder, trained.metrics, trained.model


@pytest.fixture
def images(scenes):
    """Images of different shapes and sizes."""
    pictures = [open_image(scenes.path(row)) for row in scenes.records.itertuples()][:3]
    return [pictures[0], pictures[1].resize((200, 90)), pictures[2].crop((0, 0, 30, 48))]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
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


def test_the_rebuilt_model_detects_what_the_trained_one_did(trained, images):
    from ultralytics import YOLO

    folder, _, model = trained
    rebuilt = load_detector(folder, EVERYTHING, CPU)
    for (name, before), (other, after) in zip(
        model.state_dict().items(), rebuilt._model.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(before, after)
    yolo = YOLO("yolo11n.yaml", task="detect")
    yolo.model = model.eval()
    original = module.Detector(yolo, json.loads((folder / "detector.json").read_text()), EVERYTHING, CPU)
    found = rebuilt.detect(images)
    assert sum(len(one.labels) for one in found) > 10
    assert_same(original.detect(images), found)


def test_an_image_does_not_depend_on_the_others_of_its_batch(trained, images):
    detector = load_detector(trained[0], EVERYTHING, CPU)
    together = detector.detect(images)
    assert_same(together, [detector.detect([image])[0] for image in images])
    assert_same(together[::-1], detector.detect(images[::-1]))
    assert_same(together, load_detector(trained[0], EVERYTHING, CPU).detect(images))


def test_boxes_lie_in_the_image_and_thresholds_hold(trained, images):
    for settings in (EVERYTHING, flism_config(confidence=0.002, max_detections=3, iou=0.1)):
        for image, found in zip(images, load_detector(trained[0], settings, CPU).detect(images), strict=True):
            assert len(found.labels) == len(found.boxes) == len(found.scores) <= settings.max_detections
            assert (found.boxes >= 0).all()
            assert (found.boxes[:, 2:] <= image.size).all()
            assert (found.scores >= settings.confidence).all()
            assert (np.diff(found.scores) <= 0).all()


class Recorder:
    """Stands for a YOLO object: keeps the arrays it is given, and finds one box in each."""

    def __init__(self, box=(2.0, 3.0, 60.0, 20.0)):
        self.calls, self.box = [], box

    def predict(self, arrays, **arguments):
        self.calls.append(arrays)
        rows = torch.tensor([[*self.box, 0.5, 1.0]])
        return [type("Result", (), {"boxes": type("Boxes", (), {"data": rows})()})() for _ in arrays]


def recorded(format_name="safetensors", **changes):
    info = {"format": format_name, "sha256": "0", "names": ["cat", "dog"], "image_size": 64}
    recorder = Recorder(**changes)
    return recorder, module.Detector(recorder, info, flism_config(), CPU)


def test_the_model_gets_blue_green_red():
    recorder, detector = recorded()
    (found,) = detector.detect([Image.new("RGB", (40, 30), (200, 100, 50))])
    assert recorder.calls[0][0].shape == (30, 40, 3)
    assert recorder.calls[0][0][0, 0].tolist() == [50, 100, 200]
    assert found.boxes.tolist() == [[2, 3, 40, 20]]  # clipped
    assert found.labels == ["dog"]


@pytest.mark.parametrize(("format_name", "sizes"), [("safetensors", [3]), ("litert", [1, 1, 1]), ("onnx", [1, 1, 1])])
def test_exported_formats_get_one_image_at_a_time(format_name, sizes):
    recorder, detector = recorded(format_name)
    assert len(detector.detect([Image.new("RGB", (40, 30))] * 3)) == 3
    assert [len(call) for call in recorder.calls] == sizes


def test_strips_and_empty_batches():
    recorder, detector = recorded()
    found = detector.detect([Image.new("RGB", (1, 65)), Image.new("RGB", (40, 30)), Image.new("RGB", (130, 2))])
    assert [len(one.labels) for one in found] == [0, 1, 0]
    assert detector.detect([]) == []
    assert [len(call) for call in recorder.calls] == [1]


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
        train_detector(without, detector_config(), tmp_path, 0)
    with pytest.raises(ConfigError, match=r"base\.detector\.split = 'test'"):
        train_detector(scenes, detector_config(split="test"), tmp_path, 0)


def test_training_needs_an_architecture(scenes, tmp_path):
    with pytest.raises(ConfigError, match=r"yolo99q\.yaml"):
        train_detector(scenes, detector_config(weights="yolo99q.yaml"), tmp_path, 0)


def test_no_detector(tmp_path):
    obtain_detector(detector_config(kind="none"), tmp_path)
    assert load_detector(tmp_path, EVERYTHING, CPU) is None


def test_missing_and_changed_weights(trained, tmp_path):
    with pytest.raises(ModelError, match="fast-goal base"):
        load_detector(tmp_path, EVERYTHING, CPU)
    (tmp_path / "detector.json").write_text((trained[0] / "detector.json").read_text())
    (tmp_path / "detector.safetensors").write_bytes(b"something else")
    with pytest.raises(ModelError, match="not the file"):
        load_detector(tmp_path, EVERYTHING, CPU)


def obtain(tmp_path, weights, **changes):
    return obtain_detector(detector_config(kind="ultralytics", weights=str(weights), **changes), tmp_path / "detector")


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
    detector = load_detector(tmp_path / "detector", EVERYTHING, CPU)
    assert torch.equal(detector._model.model.state_dict()["model.0.conv.weight"], model.state_dict()["model.0.conv.weight"])
    assert len(detector.detect(images)) == 3


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


def test_a_missing_tflite_runtime_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    (tmp_path / "model.tflite").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"fast-goal\[tflite\]"):
        obtain(tmp_path, tmp_path / "model.tflite")


def test_pillow_stays_as_it_was(trained):
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
