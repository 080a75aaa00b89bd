"""What has to hold before torchvision, open_clip, timm or ultralytics is imported, and the device to compute on.

Call `prepare()` first; `fast-goal doctor` shows the switches it sets.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from fast_goal.errors import ConfigError

if TYPE_CHECKING:
    import torch

# No dependency reports anything to its makers unless the user asks for it by setting the variable first. Downloads of
# weights stay possible: HF_HUB_OFFLINE and YOLO_OFFLINE are the user's to set.
TELEMETRY_SWITCHES = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
WORK = Path(".fast_goal")  # caches, and what a killed run left
WORK_VARIABLE = "FAST_GOAL_WORK"  # the folder of that kind to share, for a copy of the project
WORK_SHARED_VARIABLE = "FAST_GOAL_WORK_SHARED"  # `caches`: without what a killed run left, for copies side by side
SHARED = ("captions", "downloads", "embeddings", "features", "flism", "negatives", "pixels", "shards")  # addressed by content
SHARED_ALONE = ("state",)  # by one process at a time
ULTRALYTICS_FOLDER = Path(".fast_goal/ultralytics")  # its settings file, which would else go to the home folder

_library: Any = None  # torch drops the operators when their Library object dies


def prepare() -> None:
    """Sets the switches that are not set yet and makes torchvision importable. Cheap, and idempotent.

    torchvision itself is not imported here: a hook on its import adds the operators that its compiled part fails to
    bring, and does nothing where that part loads.
    """
    for name, value in {
        **TELEMETRY_SWITCHES,
        "MPLBACKEND": "Agg",
        "YOLO_CONFIG_DIR": str(ULTRALYTICS_FOLDER.absolute()),
    }.items():
        os.environ.setdefault(name, value)
    if "torchvision" in sys.modules or any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        return
    # An import that failed before leaves submodules behind, which would be taken for complete ones.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _ExtensionFinder())


def share_work() -> None:
    """In a copy of the project (an experiment of DVC's queue): uses the caches of the folder that FAST_GOAL_WORK names, and
    goes on where a run that was killed stopped."""
    named = os.environ.get(WORK_VARIABLE)
    if not named or Path(named).resolve() == WORK.resolve():
        return
    WORK.mkdir(exist_ok=True)
    alone = () if os.environ.get(WORK_SHARED_VARIABLE) == "caches" else SHARED_ALONE
    for name in (*SHARED, *alone):
        link, folder = WORK / name, Path(named) / name
        if not link.exists():
            folder.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)  # one that leads nowhere
            link.symlink_to(folder, target_is_directory=True)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Turns a SIGTERM into SystemExit, so that what has to be closed is closed: a run as KILLED, a queue as empty."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may set handlers
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def device() -> torch.device:
    """The device of the environment variable FAST_GOAL_DEVICE (`cpu`, `cuda`, `cuda:1`), else a GPU if there is one.

    Raises ConfigError for a name that torch does not know and for a device this machine does not have.
    """
    import torch

    name = os.environ.get("FAST_GOAL_DEVICE", "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.ones(1, device=chosen).cpu()  # a name may be well formed and the device missing, or hold no data (meta)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError(
            f"FAST_GOAL_DEVICE = {name!r} cannot be used here ({reason}). Set it to cpu, cuda or cuda:N, or leave it unset."
        ) from None
    return chosen


class _ExtensionFinder(importlib.abc.MetaPathFinder):
    """Runs `_complete` on `torchvision.extension`, the first module torchvision loads, before the others need operators."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision.extension":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_complete(module: ModuleType) -> None:
            execute(module)
            _complete(module)

        spec.loader.exec_module = execute_and_complete  # type: ignore[method-assign]
        return spec


def _complete(extension: ModuleType) -> None:
    """Defines the operators without which torchvision does not import, if its compiled part did not load.

    That happens when a torchvision built for CUDA stands beside a CPU-only torch. `torchvision.io` and the operators
    for deformable convolution stay unavailable then.
    """
    global _library
    if extension._has_ops() or _library is not None:
        return
    import torch

    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", nms, "CPU")
    extension._assert_has_ops = lambda: None  # torchvision.ops.boxes asks before it calls nms


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression with the meaning of `torchvision.ops.nms`.

    boxes [R, 4] are x1, y1, x2, y2; scores [R]. Returns the kept indices (int64), best score first; of equal scores the
    lower index counts as better. A box is dropped if its IoU with a kept one is above `iou_threshold`.
    """
    import torch

    order = torch.argsort(scores, descending=True, stable=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        intersection = (high - low).clamp(min=0).prod(dim=1)
        overlap = intersection / (areas[best] + areas[order] - intersection)
        # in double, as the compiled operator compares; and a NaN overlap (two boxes without area) drops nothing
        order = order[~(overlap.double() > iou_threshold)]
    return torch.stack(kept) if kept else order
