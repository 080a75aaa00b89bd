"""The region detector, and the only user of ultralytics: obtained or trained by the step `base`, run by the step `flism`.

On disk (`models/base/detector/`): `detector.json` and one weights file or folder. A torch model is stored as a
safetensors state dict plus its architecture, and rebuilt, so that no pickle is opened after the step `base`; an exported
model (.onnx, .tflite, ...) is stored as it came. `detector.json` holds: kind, weights (as configured), format
(safetensors, or ultralytics' name of the exported format), file, sha256, names (class names in order), image_size
(pixels, the square the model sees), architecture, and for a trained one its metrics.

Boxes are float xyxy in pixels of the image given, x2 and y2 exclusive. `D` detections.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # before ultralytics, which otherwise limits torch to one thread
from PIL import Image

from fast_goal.config import DetectorConfig, FlismConfig
from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.environment import ULTRALYTICS_FOLDER, prepare
from fast_goal.environment import device as default_device
from fast_goal.errors import ConfigError, DataError, ModelError
from fast_goal.files import digest, file_digest, read_json, tree_digest, write_json
from fast_goal.flism.regions import Detections
from fast_goal.progress import Progress

HELD_OUT = 0.1  # of the detector's training images, for mAP50
TRAINED_CLASS = "object"
WEIGHTS_FILE = "detector.safetensors"
NO_DETECTOR = "set base.detector.kind=none to work with the spatial regions alone"


class Detector:
    """An ultralytics detection model with the thresholds of the step `flism`. Made by `load_detector`."""

    def __init__(self, model: Any, info: dict[str, Any], config: FlismConfig, device: torch.device):
        self._model = model
        self._arguments = {
            "conf": config.confidence,
            "iou": config.iou,
            "max_det": config.max_detections,
            "imgsz": info["image_size"],
            "device": _device_name(device),
            # a square for every image, so that the result does not depend on the others of the batch
            "rect": False,
            "verbose": False,
            "project": _runs_folder(),
        }
        self._image_size = info["image_size"]
        # exported graphs mostly have a fixed batch of 1, and not every format says so
        self._batched = info["format"] == "safetensors"
        self.names: list[str] = info["names"]
        self.digest: str = digest({key: info[key] for key in ("format", "sha256", "names", "image_size")})

    def detect(self, images: list[Image.Image]) -> list[Detections]:
        """The detections of each RGB image, most confident first, clipped to the image.

        An image so thin that less than a pixel of it would be left at the model's size has none.
        """
        found = [Detections.none() for _ in images]
        seen = [index for index, image in enumerate(images) if min(image.size) * self._image_size >= max(image.size)]
        step = max(len(seen), 1) if self._batched else 1
        for start in range(0, len(seen), step):
            batch = seen[start : start + step]
            arrays = [np.ascontiguousarray(np.asarray(images[index].convert("RGB"))[..., ::-1]) for index in batch]  # BGR
            for index, result in zip(batch, self._model.predict(arrays, **self._arguments), strict=True):
                found[index] = self._detections(result, images[index])
        return found

    def _detections(self, result: Any, image: Image.Image) -> Detections:
        rows = result.boxes.data.float().cpu().numpy()  # [D, 6]: xyxy, score, class
        width, height = image.size
        boxes = np.clip(rows[:, :4].astype(np.float64), 0, [width, height, width, height])
        return Detections(boxes, [self.names[int(index)] for index in rows[:, 5]], rows[:, 4].astype(np.float64))


def load_detector(folder: Path | str, config: FlismConfig, device: torch.device | None = None) -> Detector | None:
    """The detector stored in `folder`, or None where the base has none.

    Raises ModelError if the folder is missing, or its weights are not the ones recorded.
    """
    folder = Path(folder)
    if not (folder / "detector.json").is_file():
        raise ModelError(f"{folder / 'detector.json'} does not exist. The step `base` writes it: fast-goal base")
    info = read_json(folder / "detector.json")
    if info["kind"] == "none":
        return None
    weights = folder / info["file"]
    if not weights.exists() or _sha256(weights) != info["sha256"]:
        raise ModelError(
            f"{weights} is missing or is not the file that detector.json describes. Run the step again: fast-goal base"
        )
    if info["format"] == "safetensors":
        model = _rebuild(info["architecture"], info["names"], weights)
    else:
        model = _open_exported(weights)
    return Detector(model, info, config, device or default_device())


def obtain_detector(config: DetectorConfig, folder: Path | str) -> dict[str, Any]:
    """Stores the detector that `config` names (kind `ultralytics` or `none`) in `folder`; returns detector.json.

    `weights` is an official name (`yolo11n.pt`, downloaded by ultralytics from its own releases and trusted), a local
    .pt (only with `trust_pickle`, because opening it runs whatever code it holds), or a local exported model, file or
    folder. Raises ConfigError or ModelError with the way out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config.kind == "none":
        info = {"kind": "none"}
        write_json(folder / "detector.json", info)
        return info
    prepare_ultralytics()
    from ultralytics.nn.autobackend import AutoBackend
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    source = Path(config.weights)
    if source.suffix.lower() == ".pt":
        official = not source.exists() and config.weights in GITHUB_ASSETS_NAMES
        if official:
            source = _download(config.weights)
        elif not source.is_file():
            raise ModelError(
                f"base.detector.weights = {config.weights!r} is neither a file here nor a name that ultralytics publishes. "
                f"Give a path or a name such as yolo11n.pt, or {NO_DETECTOR}."
            )
        elif not config.trust_pickle:
            raise ConfigError(
                f"base.detector.weights = {config.weights!r} is a pickle: opening it runs whatever code it holds. If you "
                "trust its origin, set base.detector.trust_pickle=true; else give an exported model (.onnx, .tflite)."
            )
        info = _store_torch(config, source, folder)
    elif not source.exists():
        raise ModelError(
            f"base.detector.weights = {config.weights!r} does not exist. Give a path to a model, or {NO_DETECTOR}."
        )
    else:
        format_name = AutoBackend._model_type(str(source))
        if format_name == "pt":  # `.pt` in the middle of the name; ultralytics would open it as a pickle
            raise ConfigError(
                f"base.detector.weights = {config.weights!r} would be opened as a pickle, which runs whatever code it holds. "
                "If you trust its origin, rename it so that it ends in .pt and set base.detector.trust_pickle=true."
            )
        if format_name not in AutoBackend._BACKEND_MAP:
            raise ConfigError(
                f"base.detector.weights = {config.weights!r} is not in a format that ultralytics runs. An architecture (.yaml) "
                "belongs to base.detector.kind=trained."
            )
        info = _store_exported(config, source, folder, format_name)
    write_json(folder / "detector.json", info)
    return info


def train_detector(dataset: Dataset, config: DetectorConfig, folder: Path | str, seed: int) -> dict[str, float]:
    """Trains the architecture `config.weights` from scratch on the true boxes of `dataset` and stores it in `folder`.

    It learns one class, `object`: FLISM needs to know where things are, and a few hundred images teach a small network
    that long before they teach it to tell sixteen shapes apart.
    The images are a seeded sample of `config.images` of the split `config.split`, of those with at least two objects
    (a close-up teaches a box around the whole image) where there are any; a tenth of them is held out and chosen
    nothing by. Returns the mAP50 on the held-out images (fraction), their numbers, and seconds. Raises ConfigError if
    the data set has no boxes or the architecture is unknown.
    """
    begin = time.monotonic()
    chosen, objects = _training_sample(dataset, config, seed)
    prepare_ultralytics()
    from safetensors.torch import save_file
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.nn.tasks import yaml_model_load

    try:
        yaml_model_load(config.weights)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base.detector.weights = {config.weights!r} is no architecture ({error}). kind=trained needs one that "
            "ultralytics knows, such as yolo11n.yaml, or the path of one."
        ) from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fast-goal-detector-") as temporary:
        data, counts = _write_yolo_dataset(dataset, chosen, objects, Path(temporary))
        trainer = DetectionTrainer(
            overrides={
                "model": config.weights,
                "data": str(data),
                "epochs": config.epochs,
                "imgsz": config.image_size,
                "batch": min(config.batch_size, counts["train"]),
                "nbs": config.batch_size,  # an optimizer step per batch: its default, 64 images, leaves too few
                "seed": seed,
                "deterministic": True,
                "device": _device_name(default_device()),
                "workers": 0,
                "pretrained": False,
                "amp": False,  # its self-check downloads a model
                "val": False,  # after the last epoch alone: the held-out images choose nothing
                "plots": False,
                "verbose": False,
                "patience": 0,
                "project": temporary,
                "name": "run",
                "exist_ok": True,
            }
        )
        with Progress("detector", 0, "batches") as progress:
            trainer.add_callback("on_train_start", lambda run: setattr(progress, "total", len(run.train_loader) * run.epochs))
            trainer.add_callback("on_train_batch_end", lambda run: progress.update(1, loss=float(run.loss.detach())))
            trainer.train()
        model = trainer.ema.ema.float().cpu()
        metrics = {
            "mAP50": float(trainer.metrics["metrics/mAP50(B)"]),
            "train_images": counts["train"],
            "held_out_images": counts["val"],
        }
    _save_state(model, folder / WEIGHTS_FILE, save_file)
    metrics["seconds"] = time.monotonic() - begin
    info = _info("trained", config, folder, WEIGHTS_FILE, "safetensors", [TRAINED_CLASS], config.image_size)
    write_json(folder / "detector.json", {**info, "architecture": _architecture(model), "metrics": metrics})
    return metrics


def prepare_ultralytics() -> None:
    """Imports ultralytics so that it neither calls home, installs packages, nor logs to other trackers."""
    prepare()
    pillow_open = Image.open
    # offline, it does not ask the name servers at import whether it is online; downloads that are asked for still work
    for name, value in {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}.items():
        os.environ.setdefault(name, value)
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    import torchvision  # noqa: F401  ultralytics uses its non-maximum suppression only if it is imported already
    from ultralytics import settings
    from ultralytics.utils import LOGGER, torch_utils

    # On a CPU it would set torch to one thread fewer than there are cores, for all that the process does after it.
    torch_utils.NUM_THREADS = torch.get_num_threads()
    # it replaces Pillow's `open` by one that, for a file that is no image, tries to install a package
    Image.open = pillow_open
    LOGGER.setLevel(logging.ERROR)
    wanted = {
        name: False for name in ("sync", "mlflow", "dvc", "clearml", "comet", "raytune", "tensorboard", "wandb", "vscode_msg")
    }
    wanted |= {"runs_dir": _runs_folder(), "weights_dir": str(ULTRALYTICS_FOLDER.resolve() / "weights")}
    changed = {name: value for name, value in wanted.items() if settings.get(name) != value}
    if changed:
        settings.update(changed)


def _training_sample(dataset: Dataset, config: DetectorConfig, seed: int) -> tuple[Any, Any]:
    """The records to train on, and the objects of those records."""
    if dataset.objects is None or not len(dataset.objects):
        raise ConfigError(
            f"base.detector.kind = 'trained' needs a data set with true boxes, and {dataset.name!r} has none. Set "
            f"base.detector.kind=ultralytics with base.detector.weights=yolo11n.pt (or a local model), or {NO_DETECTOR}."
        )
    records = dataset.records[dataset.records["split"] == config.split]
    per_image = records["image_id"].map(dataset.objects["image_id"].value_counts()).fillna(0)
    for least in (2, 1):
        candidates = records[per_image >= least]
        if len(candidates) >= 2:
            break
    else:
        raise ConfigError(
            f"base.detector.split = {config.split!r} of {dataset.name!r} has {len(candidates)} images with true boxes; at "
            f"least 2 are needed. Splits: {sorted(dataset.records['split'].unique())}"
        )
    order = np.random.default_rng(seed).permutation(len(candidates))[: max(config.images, 2)]
    chosen = candidates.iloc[np.sort(order)]
    return chosen, dataset.objects[dataset.objects["image_id"].isin(chosen["image_id"])]


def _write_yolo_dataset(dataset: Dataset, records: Any, objects: Any, root: Path) -> tuple[Path, dict[str, int]]:
    """Writes images and labels in ultralytics' layout below `root`; returns the path of its YAML and images per split.

    Images are decoded by this project and written anew: what the detector trains on is then upright, RGB and 8-bit, as
    everywhere else. An unreadable one is left out.
    """
    import yaml

    boxes_of = dict(tuple(objects.groupby("image_id")))
    readable = []
    for row in records.itertuples():
        try:
            readable.append((row.image_id, open_image(dataset.path(row.image_path))))
        except DataError:
            continue
    if len(readable) < 2:
        raise DataError(f"{dataset.name}: only {len(readable)} of the detector's {len(records)} training images can be read")
    held_out = max(1, round(len(readable) * HELD_OUT))
    counts = {"train": len(readable) - held_out, "val": held_out}
    for number, (image_id, image) in enumerate(readable):
        # the sample is random already, but its order is the records'; every n-th spreads the held-out ones over it
        split = "val" if number * held_out // len(readable) != (number + 1) * held_out // len(readable) else "train"
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / split / f"{number:06d}.png", compress_level=1)
        size = np.array([image.width, image.height] * 2, dtype=np.float64)
        lines = []
        for found in boxes_of[image_id].itertuples():
            x1, y1, x2, y2 = np.clip(np.array([found.x1, found.y1, found.x2, found.y2]) / size, 0, 1)
            lines.append(f"0 {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}")
        (root / "labels" / split / f"{number:06d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = root / "data.yaml"
    content = {"path": str(root), "train": "images/train", "val": "images/val", "names": {0: TRAINED_CLASS}}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path, counts


def _download(name: str) -> Path:
    from ultralytics.utils.downloads import attempt_download_asset

    target = ULTRALYTICS_FOLDER / "weights" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        path = Path(attempt_download_asset(target))
    except (OSError, RuntimeError) as error:  # ConnectionError and URLError are OSErrors
        raise _unavailable(name, error) from None
    if not path.is_file():
        raise _unavailable(name, None)
    return path


def _unavailable(name: str, error: Exception | None) -> ModelError:
    reason = f" ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})" if error else ""
    return ModelError(
        f"base.detector.weights = {name!r} could not be downloaded{reason}. Give base.detector.weights a local path (an "
        f"exported .onnx or .tflite, or a .pt with base.detector.trust_pickle=true), or {NO_DETECTOR}."
    )


def _store_torch(config: DetectorConfig, source: Path, folder: Path) -> dict[str, Any]:
    """Opens a trusted .pt once and stores it as a state dict."""
    from safetensors.torch import save_file
    from ultralytics.nn.tasks import DetectionModel, load_checkpoint

    model, _ = load_checkpoint(str(source))
    if type(model) is not DetectionModel:
        raise ModelError(
            f"base.detector.weights = {config.weights!r} is a {type(model).__name__}, not a plain detection model. Give one of "
            "yolo's detection models, or export this one to ONNX and give that file."
        )
    names = [model.names[index] for index in range(len(model.names))]
    _save_state(model, folder / WEIGHTS_FILE, save_file)
    info = _info("ultralytics", config, folder, WEIGHTS_FILE, "safetensors", names, config.image_size)
    return {**info, "source_sha256": _sha256(source), "architecture": _architecture(model)}


def _store_exported(config: DetectorConfig, source: Path, folder: Path, format_name: str) -> dict[str, Any]:
    """Copies an exported model and runs it once, so that what is missing shows here and not in the middle of `flism`."""
    target = folder / source.name
    if target.resolve() != source.resolve():
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    model = _open_exported(target)
    try:
        blank = np.zeros((config.image_size, config.image_size, 3), dtype=np.uint8)
        model.predict([blank], imgsz=config.image_size, rect=False, verbose=False, device="cpu", project=_runs_folder())
    except ModelError:
        raise
    except Exception as error:
        # any runtime's own exceptions can come out of an exported graph; the user needs the file and the key, and the cause
        raise ModelError(
            f"base.detector.weights = {config.weights!r} ({format_name}) could not be run at base.detector.image_size = "
            f"{config.image_size}: {type(error).__name__}: {error}"
        ) from error
    backend = model.predictor.model
    names = [backend.names[index] for index in range(len(backend.names))]
    return _info("ultralytics", config, folder, target.name, format_name, names, int(max(model.predictor.imgsz)))


def _open_exported(path: Path) -> Any:
    if path.suffix == ".tflite":
        try:
            import ai_edge_litert.interpreter  # noqa: F401
        except ImportError:
            raise ModelError(f'{path} needs the LiteRT runtime: pip install "fast-goal[tflite]"') from None
    prepare_ultralytics()
    from ultralytics import YOLO

    return YOLO(str(path), task="detect")


def _rebuild(architecture: dict[str, Any], names: list[str], weights: Path) -> Any:
    """A YOLO object around a model built from its architecture, with the weights of a safetensors file."""
    prepare_ultralytics()
    from safetensors.torch import load_file
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG_DICT

    yolo = YOLO("yolo11n.yaml", task="detect")  # YOLO() starts from a file; this one comes with ultralytics
    model = DetectionModel(copy.deepcopy(architecture), ch=architecture.get("channels", 3), nc=len(names), verbose=False)
    model.load_state_dict(load_file(weights))
    model.names = dict(enumerate(names))
    model.args = {**DEFAULT_CFG_DICT, "task": "detect"}
    model.task = "detect"
    yolo.model = model.eval()
    return yolo


def _save_state(model: torch.nn.Module, path: Path, save_file: Any) -> None:
    state = {
        name: value.detach().float() if value.is_floating_point() else value.detach()
        for name, value in model.state_dict().items()
    }
    save_file({name: value.cpu().contiguous().clone() for name, value in state.items()}, path)


def _architecture(model: torch.nn.Module) -> dict[str, Any]:
    return {key: value for key, value in model.yaml.items() if key != "yaml_file"}


def _info(
    kind: str, config: DetectorConfig, folder: Path, file: str, format_name: str, names: list[str], image_size: int
) -> dict[str, Any]:
    return {
        "kind": kind,
        "weights": config.weights,
        "format": format_name,
        "file": file,
        "sha256": _sha256(folder / file),
        "names": names,
        "image_size": image_size,
    }


def _sha256(path: Path) -> str:
    return tree_digest(path, length=64) if path.is_dir() else file_digest(path, length=64)


def _runs_folder() -> str:
    return str(ULTRALYTICS_FOLDER.resolve() / "runs")


def _device_name(device: torch.device) -> str:
    """ultralytics' spelling: it reads a bare `cuda` as a request to choose."""
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
