"""No detector: the five spatial regions alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import DetectorConfig, FlismConfig
from fast_goal.data.records import Dataset
from fast_goal.flism.detectors import detector

if TYPE_CHECKING:
    import torch


@detector("none")
class NoDetector:
    """Stores nothing and detects nothing."""

    @staticmethod
    def obtain(config: DetectorConfig, folder: Path, dataset: Dataset, seed: int) -> dict[str, Any]:
        """Nothing has to be obtained."""
        return {}

    @staticmethod
    def load(folder: Path, info: dict[str, Any], config: FlismConfig, dataset: Dataset | None, device: torch.device) -> None:
        """None."""
        return None
