"""A look at what FLISM does with the current settings, before or after the whole run (`fast-goal flism preview`)."""

from __future__ import annotations

from pathlib import Path

import torch

from fast_goal.config import FlismConfig
from fast_goal.data.records import Dataset
from fast_goal.flism.detectors import RegionDetector
from fast_goal.flism.engine import FlismResult, extract, flism_records
from fast_goal.flism.pictures import region_sheet, spread
from fast_goal.model.clip import Clip


def preview(
    dataset: Dataset,
    clip: Clip,
    detector: RegionDetector | None,
    config: FlismConfig,
    cache: Path | str,
    path: Path | str,
    count: int = 24,
    detector_name: str = "",
    device: torch.device | str = "cpu",
) -> Path:
    """Runs FLISM over `count` images, spread evenly over the records of `config.splits`, and draws them all at `path`.

    What is embedded here is in `cache` and need not be computed again by the whole run. Returns the path. Raises
    ValueError if count < 1, and what `extract` raises.
    """
    if count < 1:
        raise ValueError(f"count = {count}: expected at least 1")
    records = flism_records(dataset, config.splits)
    chosen = records.iloc[spread(len(records), count)].reset_index(drop=True)
    result = extract(dataset, clip, detector, config, cache, device, records=chosen)
    caption = describe(dataset.name, result, config, detector_name if detector else "none", len(chosen), len(records))
    return region_sheet(dataset, chosen, result.regions, result.pairs, result.skipped, path, caption)


def describe(name: str, result: FlismResult, config: FlismConfig, detector: str, shown: int, total: int) -> str:
    """One line on what the sheet shows: the detector with its threshold, and counts of regions, winners and skipped images."""
    best = result.pairs[result.pairs["rank"] == 1]
    images = max(len(best), 1)
    kinds = [kind for kind in ("detector", "quadrant", "centre") if (result.regions["kind"] == kind).any()]
    found = ", ".join(f"{kind} {(result.regions['kind'] == kind).sum() / images:.1f}" for kind in kinds)
    won = ", ".join(f"{kind} {(best['kind'] == kind).sum()}" for kind in kinds)
    parts = [
        f"{name}: {shown} of {total:,} images",
        f"detector {detector}" + ("" if detector == "none" else f", confidence at least {config.confidence:g}"),
        f"regions per image: {found}",
        f"won: {won}",
        f"mean similarity {best['similarity'].mean():.3f}",
    ]
    if len(result.skipped):
        reasons = result.skipped["reason"].value_counts()
        parts.append("skipped: " + ", ".join(f"{number} {reason}" for reason, number in reasons.items()))
    return "  ·  ".join(parts)
