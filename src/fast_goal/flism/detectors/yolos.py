"""YOLOS through transformers (extra `transformers`); the paper's detector is `hustvl/yolos-base`.

On disk (`models/base/detector/`): config.json, preprocessor_config.json and model.safetensors, as transformers writes
them, and `detector.json` with kind, weights (as configured), revision (of the hub, null for a folder), names and sha256.

YOLOS suppresses no overlapping boxes, and none is suppressed here: `flism.iou` has no effect on it, `flism.merge_iou` has.

It has no mask for padding, and its positions are stretched over the padded image: an image that is padded to the
largest of its batch gets other boxes than alone. So none is padded here; only images that come out of the resizing with
the same shape share a batch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from fast_goal.config import DetectorConfig, FlismConfig
from fast_goal.data.records import Dataset
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, ModelError
from fast_goal.files import tree_digest
from fast_goal.flism.detectors import INFO_FILE, MAX_BOXES, NO_DETECTOR, detections_digest, detector
from fast_goal.flism.regions import Detections

CONFIG_FILES = ("config.json", "preprocessor_config.json")
SAFE_FILES = ("*.safetensors", "*.safetensors.index.json")
PICKLE_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
MULTIPLE = 16  # pixels; the processor rounds both sides down to it
# Images at once, on a CPU and on a GPU. One image is work enough for a CPU (4,200 tokens at the usual 800 x 1,333
# pixels), and one at a time is exact to the last bit; in a batch kernels round differently.
BATCH = (1, 8)


@dataclass(frozen=True)
class _Prepared:
    """An image as the network takes it: float32 [3, H, W], None for a strip; and its size (width, height) before."""

    pixels: torch.Tensor | None
    size: tuple[int, int]


@detector("yolos")
class YolosDetector:
    """A YOLOS model with the confidence of the step `flism`. Made by `load`."""

    reads_pixels = True

    def __init__(self, model: Any, processor: Any, info: dict[str, Any], config: FlismConfig, device: torch.device):
        self._model, self._processor, self._device = model, processor, device
        self._batch = BATCH[device.type == "cuda"]
        self._confidence = config.confidence
        self.names: list[str] = info["names"]
        self.digest = detections_digest(type(self), sha256=info["sha256"], confidence=config.confidence)

    def prepare(self, image: Image.Image) -> _Prepared:
        """The image resized and normalised by the model's own processor. Of an image so thin that it would come out
        with a side under 16 pixels there are no detections."""
        low, high = sorted(image.size)
        edges = dict(self._processor.size)
        if edges.get("shortest_edge") and edges.get("longest_edge"):
            shortest = min(edges["shortest_edge"], edges["longest_edge"] * low / high)
            if round(shortest) < MULTIPLE:
                return _Prepared(None, image.size)
        inputs = self._processor(images=image.convert("RGB"), do_pad=False, return_tensors="pt")
        return _Prepared(inputs["pixel_values"][0], image.size)

    def detect(self, images: Sequence[Image.Image | _Prepared | None], image_ids: Sequence[str]) -> list[Detections]:
        """The detections of each image (or of what `prepare` made of it), most confident first, clipped to the image."""
        prepared = [image if isinstance(image, _Prepared) else self.prepare(image) for image in images]
        found = [Detections.none() for _ in prepared]
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for index, image in enumerate(prepared):
            if image.pixels is not None:
                groups[image.pixels.shape].append(index)
        for members in groups.values():
            for start in range(0, len(members), self._batch):
                batch = members[start : start + self._batch]
                for index, one in zip(batch, self._run([prepared[index] for index in batch]), strict=True):
                    found[index] = one
        return found

    @torch.inference_mode()
    def _run(self, batch: list[_Prepared]) -> list[Detections]:
        outputs = self._model(torch.stack([image.pixels for image in batch]).to(self._device))
        plain = SimpleNamespace(logits=outputs.logits.float().cpu(), pred_boxes=outputs.pred_boxes.float().cpu())
        sizes = [(height, width) for width, height in (image.size for image in batch)]
        results = self._processor.post_process_object_detection(plain, threshold=self._confidence, target_sizes=sizes)
        return [self._detections(result, image.size) for result, image in zip(results, batch, strict=True)]

    def _detections(self, result: dict[str, torch.Tensor], size: tuple[int, int]) -> Detections:
        scores = result["scores"].numpy().astype(np.float64)
        order = np.argsort(-scores, kind="stable")[:MAX_BOXES]
        boxes = np.clip(result["boxes"].numpy().astype(np.float64)[order], 0, [*size, *size])
        labels = result["labels"].numpy()[order]
        return Detections(boxes, [self.names[index] for index in labels], scores[order])

    @staticmethod
    def obtain(config: DetectorConfig, folder: Path, dataset: Dataset, seed: int) -> dict[str, Any]:
        """Takes `config.weights`, a folder or a name on the Hugging Face hub (`owner/name`, or `owner/name@revision`).

        Raises ConfigError or ModelError with the way out.
        """
        transformers = _transformers()
        key = f"base.detector.weights = {config.weights!r}"
        if Path(config.weights).is_dir():
            source, revision = Path(config.weights), None
        else:
            source = _download(config.weights, config.trust_pickle)
            revision = source.name  # the hub's cache names a snapshot by its commit
        safe = _check_files(source, key, config.trust_pickle)
        model, processor = _load(transformers, source, key, use_safetensors=safe)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        names = [model.config.id2label[index] for index in range(model.config.num_labels)]
        return {"weights": config.weights, "revision": revision, "names": names, "sha256": _sha256(folder)}

    @classmethod
    def load(
        cls, folder: Path, info: dict[str, Any], config: FlismConfig, dataset: Dataset | None, device: torch.device
    ) -> YolosDetector:
        """From `folder` alone; nothing is downloaded."""
        if _sha256(folder) != info["sha256"]:
            raise ModelError(f"{folder} does not hold the files that {INFO_FILE} describes. Run the step again: fast-goal base")
        model, processor = _load(_transformers(), folder, str(folder), use_safetensors=True)
        return cls(model.to(device), processor, info, config, device)


def _transformers() -> Any:
    prepare()
    try:
        import transformers
    except ImportError:
        raise ModelError('base.detector.kind = yolos needs transformers: pip install "fast-goal[transformers]"') from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _download(weights: str, trust_pickle: bool) -> Path:
    """The hub's files in its cache on this machine; downloaded where they are not there yet."""
    from huggingface_hub import snapshot_download

    name, _, revision = weights.partition("@")
    patterns = [*CONFIG_FILES, *SAFE_FILES]
    try:
        source = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
        if trust_pickle and not any(source.glob("*.safetensors")):
            source = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*CONFIG_FILES, *PICKLE_FILES]))
    except Exception as error:  # the hub's client has errors of a dozen unrelated classes
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"base.detector.weights = {weights!r} is no folder here and could not be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Download it elsewhere with `hf download {name} --local-dir FOLDER` and set "
            f"base.detector.weights=FOLDER, or {NO_DETECTOR}."
        ) from None
    return source


def _check_files(source: Path, key: str, trust_pickle: bool) -> bool:
    """Whether the weights are safetensors. Raises ModelError or ConfigError where a file is missing or must not be used."""
    for name in CONFIG_FILES:
        if not (source / name).is_file():
            raise ModelError(f"{key}: {source / name} is missing. A YOLOS model has {', '.join(CONFIG_FILES)} and its weights.")
    try:
        found = json.loads((source / CONFIG_FILES[0]).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{key}: {source / CONFIG_FILES[0]} is no JSON mapping ({error})") from None
    if found != "yolos":
        raise ConfigError(f"{key}: {source / CONFIG_FILES[0]} describes a {found!r} model; base.detector.kind=yolos runs YOLOS")
    if any(source.glob("*.safetensors")):
        return True
    if not any(source.glob("pytorch_model*.bin")):
        raise ModelError(f"{key}: {source} has no weights (model.safetensors)")
    if not trust_pickle:
        raise ConfigError(
            f"{key} has its weights only as a pickle (pytorch_model.bin), which can run code when it is opened. If you trust "
            "its origin, set base.detector.trust_pickle=true; it is then converted to safetensors."
        )
    return False


def _load(transformers: Any, source: Path, key: str, use_safetensors: bool) -> tuple[Any, Any]:
    """The model and its image processor from a folder. Raises ModelError where weights are missing or do not fit."""
    try:
        model, report = transformers.YolosForObjectDetection.from_pretrained(
            source,
            local_files_only=True,
            use_safetensors=use_safetensors,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        processor = transformers.YolosImageProcessor.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers, safetensors and torch raise errors of a dozen unrelated classes
        raise ModelError(f"{key} cannot be loaded from {source}: {type(error).__name__}: {error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[problem])):
            raise ModelError(
                f"{key}: the weights in {source} do not fit its config.json: {len(keys)} {problem}, such as {keys[0]}"
            )
    return model.eval(), processor


def _sha256(folder: Path) -> str:
    return tree_digest(folder, lambda path: path.name != INFO_FILE, length=64)
