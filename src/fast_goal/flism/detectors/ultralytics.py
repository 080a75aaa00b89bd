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
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from fast_goal.flism.detectors import MAX_BOXES, NO_DETECTOR, check_file, detections_digest, detector, sha256_of
from fast_goal.flism.regions import Detections
from fast_goal.progress import Progress

HELD_OUT = 0.1  # of the detector's training images, for mAP50
TRAINED_CLASS = "object"
WEIGHTS_FILE = "detector.safetensors"
# Images that the network sees at once, on a CPU and on a GPU. Always so many, the last ones filled up with black: kernels
# round differently for another number of images, and a box near a whole pixel would then make another crop.
BATCH = (8, 32)


@dataclass(frozen=True)
class _Prepared:
    """An image as the network takes it: uint8 RGB [H, W, 3], None for a strip; and its size (width, height) before."""

    pixels: np.ndarray | None
    size: tuple[int, int]


@detector("ultralytics")
class UltralyticsDetector:
    """An ultralytics detection model with the thresholds of the step `flism`. Made by `load`.

    It runs the steps of ultralytics' own `predict` on its functions, with what would hurt here left out: `predict`
    letterboxes in the thread that feeds the device, copies every whole image, and after 2 seconds of suppression leaves
    the rest of the batch without detections.
    """

    reads_pixels = True

    def __init__(self, backend: Any, info: dict[str, Any], config: FlismConfig):
        from ultralytics.data.augment import LetterBox

        self._backend = backend
        self._confidence, self._iou = config.confidence, config.iou
        self._shape = _input_shape(backend, info["image_size"])
        # one shape for every image, so that the result does not depend on the others of the batch
        self._letterbox = LetterBox(self._shape, auto=False, stride=backend.stride)
        self._fixed = info["format"] == "safetensors"
        # exported graphs mostly have a fixed batch of 1, and not every format says so
        self._batch = BATCH[torch.device(backend.device).type == "cuda"] if self._fixed else max(int(backend.batch), 1)
        self.names: list[str] = info["names"]
        facts = {key: info[key] for key in ("format", "sha256", "names", "image_size")}
        self.digest = detections_digest(type(self), **facts, confidence=config.confidence, iou=config.iou)

    def prepare(self, image: Image.Image) -> _Prepared:
        """The image scaled into the model's square. Of an image so thin that less than a pixel of it would be left
        there are no detections."""
        width, height = image.size
        if min(width, height) * max(self._shape) < max(width, height):
            return _Prepared(None, image.size)
        return _Prepared(self._letterbox(image=np.asarray(image.convert("RGB"))), image.size)

    def detect(self, images: Sequence[Image.Image | _Prepared | None], image_ids: Sequence[str]) -> list[Detections]:
        """The detections of each image (or of what `prepare` made of it), most confident first, clipped to the image."""
        prepared = [image if isinstance(image, _Prepared) else self.prepare(image) for image in images]
        found = [Detections.none() for _ in prepared]
        seen = [index for index, image in enumerate(prepared) if image.pixels is not None]
        for start in range(0, len(seen), self._batch):
            batch = seen[start : start + self._batch]
            rows = self._run([prepared[index].pixels for index in batch])
            for index, one in zip(batch, rows, strict=True):
                found[index] = self._detections(one, prepared[index].size)
        return found

    @torch.inference_mode()
    def _run(self, pixels: list[np.ndarray]) -> list[torch.Tensor]:
        """Rows [D, 6] for each image, on the CPU: xyxy in the square, score, class; the best score first."""
        from ultralytics.utils.nms import non_max_suppression

        batch = torch.from_numpy(np.stack(pixels)).to(self._backend.device)
        batch = batch.permute(0, 3, 1, 2).contiguous().float().div_(255)
        if self._fixed and len(pixels) < self._batch:
            batch = torch.cat([batch, batch.new_zeros(self._batch - len(pixels), *batch.shape[1:])])
        raw = self._backend(batch)
        rows = non_max_suppression(
            (raw[0] if isinstance(raw, list | tuple) else raw)[: len(pixels)],
            self._confidence,
            self._iou,
            max_det=MAX_BOXES,
            end2end=self._backend.end2end,
            max_time_img=math.inf,  # past its time limit it leaves the images that follow without detections
        )
        return list(torch.cat(rows).float().cpu().split([len(one) for one in rows]))

    def _detections(self, rows: torch.Tensor, size: tuple[int, int]) -> Detections:
        from ultralytics.utils.ops import scale_boxes

        width, height = size
        boxes = scale_boxes(self._shape, rows[:, :4].clone(), (height, width)).numpy().astype(np.float64)
        labels = [self.names[int(index)] for index in rows[:, 5]]
        return Detections(boxes, labels, rows[:, 4].numpy().astype(np.float64))

    @staticmethod
    def obtain(config: DetectorConfig, folder: Path, dataset: Dataset, seed: int) -> dict[str, Any]:
        """Takes `config.weights`, see `_obtain`."""
        return _obtain(config, folder)

    @classmethod
    def load(
        cls, folder: Path, info: dict[str, Any], config: FlismConfig, dataset: Dataset | None, device: torch.device
    ) -> UltralyticsDetector:
        """Rebuilds the model from its safetensors, or opens the exported file."""
        weights = folder / info["file"]
        check_file(weights, info["sha256"])
        if info["format"] == "safetensors":
            model = _rebuild(info["architecture"], info["names"], weights)
        else:
            model = _checked_export(weights)
        return cls(_backend(model, device), info, config)


@detector("trained")
class TrainedDetector(UltralyticsDetector):
    """One trained by the step `base`."""

    @staticmethod
    def obtain(config: DetectorConfig, folder: Path, dataset: Dataset, seed: int) -> dict[str, Any]:
        """See `train_detector`."""
        return train_detector(dataset, config, folder, seed)


def _obtain(config: DetectorConfig, folder: Path) -> dict[str, Any]:
    """Stores the detector that `config` names in `folder`; returns its detector.json.

    `weights` is an official name (`yolo11n.pt`, downloaded by ultralytics from its own releases and trusted), a local
    .pt (only with `trust_pickle`, because opening it runs whatever code it holds), or a local exported model, file or
    folder. Raises ConfigError or ModelError with the way out.
    """
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
        return _store_torch(config, source, folder)
    if not source.exists():
        raise ModelError(
            f"base.detector.weights = {config.weights!r} does not exist. Give a path to a model, or {NO_DETECTOR}."
        )
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
    return _store_exported(config, source, folder, format_name)


def train_detector(dataset: Dataset, config: DetectorConfig, folder: Path, seed: int) -> dict[str, Any]:
    """Trains the architecture `config.weights` from scratch on the true boxes of `dataset` and stores it in `folder`.

    It learns one class, `object`: FLISM needs to know where things are, and a few hundred images teach a small network
    that long before they teach it to tell sixteen shapes apart.
    The images are a seeded sample of `config.images` of the split `config.split`, of those with at least two objects
    (a close-up teaches a box around the whole image) where there are any; a tenth of them is held out and chosen
    nothing by. Returns its detector.json with `metrics`: the mAP50 on the held-out images (fraction), their numbers, and
    seconds. Raises ConfigError if the data set has no boxes or the architecture is unknown.
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
    info = _info(config, folder, WEIGHTS_FILE, "safetensors", [TRAINED_CLASS], config.image_size)
    return {**info, "architecture": _architecture(model), "metrics": metrics}


def prepare_ultralytics() -> None:
    """Imports ultralytics so that it neither calls home, installs packages, nor logs to other trackers."""
    prepare()
    # offline, it does not ask the name servers at import whether it is online; downloads that are asked for still work
    for name, value in {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}.items():
        os.environ.setdefault(name, value)
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    import torchvision  # noqa: F401  ultralytics uses its non-maximum suppression only if it is imported already
    from ultralytics import settings
    from ultralytics.utils import LOGGER, patches, torch_utils

    # On a CPU it would set torch to one thread fewer than there are cores, for all that the process does after it.
    torch_utils.NUM_THREADS = torch.get_num_threads()
    # It replaces Pillow's `open` by one that, for a file that is no image, tries to install a package. What it keeps is
    # Pillow's own, also if somebody else imported it first, or another thread does at this moment.
    Image.open = patches._image_open
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
    info = _info(config, folder, WEIGHTS_FILE, "safetensors", names, config.image_size)
    return {**info, "source_sha256": sha256_of(source), "architecture": _architecture(model)}


def _store_exported(config: DetectorConfig, source: Path, folder: Path, format_name: str) -> dict[str, Any]:
    """Copies an exported model and runs it once, so that what is missing shows here and not in the middle of `flism`."""
    target = folder / source.name
    if target.resolve() != source.resolve():
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)
    try:
        backend = _backend(_checked_export(target), torch.device("cuda" if format_name == "engine" else "cpu"))
        shape = _input_shape(backend, config.image_size)
        with torch.inference_mode():
            backend(torch.zeros(1, 3, *shape, device=backend.device))
    except ModelError:
        raise
    except Exception as error:
        # any runtime's own exceptions can come out of an exported graph; the user needs the file and the key, and the cause
        raise ModelError(
            f"base.detector.weights = {config.weights!r} ({format_name}) could not be run at base.detector.image_size = "
            f"{config.image_size}: {type(error).__name__}: {error}"
        ) from error
    if backend.task not in (None, "detect"):
        raise ModelError(
            f"base.detector.weights = {config.weights!r} is a model for the task {backend.task!r}, not a plain detection model."
        )
    names = [backend.names[index] for index in range(len(backend.names))]
    return _info(config, folder, target.name, format_name, names, max(shape))


def _checked_export(path: Path) -> str:
    """The path of an exported model, for `_backend`. Raises ModelError where its runtime is missing."""
    if path.suffix == ".tflite":
        try:
            import ai_edge_litert.interpreter  # noqa: F401
        except ImportError:
            raise ModelError(f'{path} needs the LiteRT runtime: pip install "fast-goal[tflite]"') from None
    return str(path)


def _backend(model: Any, device: torch.device) -> Any:
    """A model or an exported file under ultralytics' one interface: a batch [B, 3, H, W] in 0..1 to raw predictions.

    As `predict` sets it up: layers fused, full precision, suppression outside of the model.
    """
    prepare_ultralytics()
    from ultralytics.nn.autobackend import AutoBackend

    return AutoBackend(model, device=device, fp16=False, fuse=True, verbose=False, end2end=False).eval()


def _input_shape(backend: Any, image_size: int) -> tuple[int, int]:
    """(height, width) of what the model takes: its own where it is exported for one, else the square of `image_size`."""
    from ultralytics.utils.checks import check_imgsz

    fixed = None if backend.dynamic else getattr(backend, "imgsz", None)
    height, width = check_imgsz(fixed or image_size, stride=backend.stride, min_dim=2)
    return height, width


def _rebuild(architecture: dict[str, Any], names: list[str], weights: Path) -> torch.nn.Module:
    """The model of an architecture with the weights of a safetensors file."""
    prepare_ultralytics()
    from safetensors.torch import load_file
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(copy.deepcopy(architecture), ch=architecture.get("channels", 3), nc=len(names), verbose=False)
    model.load_state_dict(load_file(weights))
    model.names = dict(enumerate(names))
    return model.eval()


def _save_state(model: torch.nn.Module, path: Path, save_file: Any) -> None:
    state = {
        name: value.detach().float() if value.is_floating_point() else value.detach()
        for name, value in model.state_dict().items()
    }
    save_file({name: value.cpu().contiguous().clone() for name, value in state.items()}, path)


def _architecture(model: torch.nn.Module) -> dict[str, Any]:
    return {key: value for key, value in model.yaml.items() if key != "yaml_file"}


def _info(
    config: DetectorConfig, folder: Path, file: str, format_name: str, names: list[str], image_size: int
) -> dict[str, Any]:
    return {
        "weights": config.weights,
        "format": format_name,
        "file": file,
        "sha256": sha256_of(folder / file),
        "names": names,
        "image_size": image_size,
    }


def _runs_folder() -> str:
    return str(ULTRALYTICS_FOLDER.resolve() / "runs")


def _device_name(device: torch.device) -> str:
    """ultralytics' spelling: it reads a bare `cuda` as a request to choose."""
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type
