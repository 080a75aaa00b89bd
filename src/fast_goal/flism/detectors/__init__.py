"""Region detectors: a registry with one file per family of kinds.

A kind is a class:

    @detector("yolos")
    class YolosDetector:
        def obtain(config, folder, dataset, seed) -> dict: ...                         # static; the step `base`
        def load(folder, info, config, dataset, device) -> RegionDetector | None: ...  # static; the step `flism`

`obtain` puts into `folder` (`models/base/detector/`) all that `load` needs and returns what `detector.json` shall hold
beside the kind. A new kind is a new file here and its word in `config.DetectorConfig.kind`.

Boxes are float xyxy in pixels of the original image, x2 and y2 exclusive.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from PIL import Image

from fast_goal.config import DetectorConfig, FlismConfig
from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError, ModelError
from fast_goal.files import digest, file_digest, read_json, write_json
from fast_goal.flism.regions import Detections

if TYPE_CHECKING:
    import torch

INFO_FILE = "detector.json"
# A detector is asked for this many boxes of an image, whatever flism.max_detections says: the filters that follow
# (`regions.candidate_regions`) can then be counted, and detections that are remembered serve every ablation.
MAX_BOXES = 300
NO_DETECTOR = "set base.detector.kind=none to work with the spatial regions alone"  # the way out in many errors
C = TypeVar("C", bound=type)


class RegionDetector(Protocol):
    """What the engine needs of a detector.

    digest: changes with anything that the detections depend on: weights, input size, thresholds, the code that runs
    them. reads_pixels: False where the boxes are known without the image (`detect` then takes None for it).
    names: the labels that detections can have, None where they are not known.

    A detector may have a further method, `prepare(image) -> Any`: the part of its work that can be done image by image
    in the threads that decode (thread-safe, no device). `detect` then takes its result in the image's place, with the
    same detections.
    """

    digest: str
    reads_pixels: bool
    names: list[str] | None

    def detect(self, images: Sequence[Image.Image | None], image_ids: Sequence[str]) -> list[Detections]:
        """At most MAX_BOXES detections of each image, most confident first, independent of the others of the batch."""
        ...


class Kind(Protocol):
    """What a file here registers."""

    @staticmethod
    def obtain(config: DetectorConfig, folder: Path, dataset: Dataset, seed: int) -> dict[str, Any]:
        """Fills the empty `folder`; returns the contents of detector.json without the kind."""
        ...

    @staticmethod
    def load(
        folder: Path, info: dict[str, Any], config: FlismConfig, dataset: Dataset | None, device: torch.device
    ) -> RegionDetector | None:
        """The detector that `obtain` stored, on `device`; None for a kind that detects nothing."""
        ...


_KINDS: dict[str, Kind] = {}


def detector(kind: str) -> Callable[[C], C]:
    """Registers a class under the word that stands in `base.detector.kind`."""

    def register(cls: C) -> C:
        _KINDS[kind] = cls  # type: ignore[assignment]
        return cls

    return register


def obtain_detector(config: DetectorConfig, folder: Path | str, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Obtains or trains the detector that `config` names and stores it in `folder`; returns its detector.json.

    A trained one has `metrics` in it. Raises ConfigError, ModelError or DataError with the way out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"kind": config.kind, **_kind(config.kind).obtain(config, folder, dataset, seed)}
    write_json(folder / INFO_FILE, info)
    return info


def load_detector(
    folder: Path | str, config: FlismConfig, dataset: Dataset | None = None, device: torch.device | str | None = None
) -> RegionDetector | None:
    """The detector stored in `folder`, or None where the base has none. `device` None: the best there is.

    Raises ModelError if the folder is missing or its files are not the ones recorded, ConfigError for a name in
    `flism.classes` that the detector never gives.
    """
    import torch

    from fast_goal.environment import device as default_device

    folder = Path(folder)
    path = folder / INFO_FILE
    if not path.is_file():
        raise ModelError(f"{path} does not exist. The step `base` writes it: fast-goal base")
    info = read_json(path)
    chosen = default_device() if device is None else torch.device(device)
    found = _kind(info["kind"]).load(folder, info, config, dataset, chosen)
    if found is not None:
        _check_classes(config.classes, found.names)
    return found


def check_file(path: Path, sha256: str) -> None:
    """Raises ModelError unless `path` (in the detector's folder) holds what detector.json says."""
    if not path.exists() or sha256_of(path) != sha256:
        raise ModelError(f"{path} is missing or is not the file that {INFO_FILE} describes. Run the step again: fast-goal base")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, or one over the names and contents of a folder."""
    from fast_goal.files import tree_digest

    return tree_digest(path, length=64) if path.is_dir() else file_digest(path, length=64)


def detections_digest(cls: type, **facts: Any) -> str:
    """The digest of a detector: the facts that its detections depend on, and the code of its class."""
    return digest({**facts, "boxes": MAX_BOXES, "code": file_digest(inspect.getfile(cls))})


def _check_classes(classes: list[str] | None, names: list[str] | None) -> None:
    if classes is None or names is None:
        return
    if unknown := [name for name in classes if name not in names]:
        known = ", ".join(sorted(set(names))) or "none at all"
        raise ConfigError(f"flism.classes = {unknown}: the detector has no such class. Its classes: {known}")


def _kind(name: str) -> Kind:
    """The registered class of a kind; imports the files of this package on first use and not on import."""
    if name not in _KINDS:
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
    if name not in _KINDS:
        raise ConfigError(f"base.detector.kind = {name!r}: expected one of {', '.join(sorted(_KINDS))}")
    return _KINDS[name]
