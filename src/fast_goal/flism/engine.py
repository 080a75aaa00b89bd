"""FLISM over a data set: from records to the tables of regions and local pairs (`fast-goal flism`).

The records are cut into shards; `pipeline` processes them, in this process, in worker processes (`workers`) or on a Ray
cluster (`cluster`), all with the same result. A finished shard is on disk with its completion mark, so that memory is
bounded and a killed run goes on where it stopped; an image that any earlier run has finished is only read.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import fast_goal
from fast_goal.config import FlismConfig, to_dict
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, Dataset
from fast_goal.data.sub_captions import splitter_digest
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import digest, file_digest
from fast_goal.flism.detectors import RegionDetector
from fast_goal.flism.metrics import flism_metrics
from fast_goal.flism.pipeline import Caches, Done, Pipeline, Record, Shards, TrueBox
from fast_goal.flism.shards import Shard, ShardStore, prune
from fast_goal.flism.workers import CacheNames, Models, Own, Spec, run_workers
from fast_goal.model.clip import Clip
from fast_goal.model.inference import model_digest
from fast_goal.progress import Progress

SHARDS_FOLDER, EMBEDDINGS_FOLDER = "flism", "embeddings"  # in the folder of caches
# settings that the result for an image depends on
SETTINGS = (
    "regions",
    "choice",
    "top_k",
    "pair_weights",
    "confidence",
    "iou",
    "classes",
    "min_area",
    "max_detections",
    "merge_iou",
    "scaled_decoding",
    "precision",
)
# code that the results depend on beside the detector's, which is in its digest; a change of it must not meet old results
_EMBEDDING = ("model/*.py", "data/images.py", "data/captions.py", "flism/embedder.py")
_SHARDS = (*_EMBEDDING, "flism/pipeline.py", "flism/matching.py", "flism/regions.py", "flism/shards.py", "data/splitter.py")

_log = logging.getLogger(__name__)


@dataclass
class FlismResult:
    """The tables (schemas REGIONS, PAIRS, SKIPPED) in the order of the records, and the metrics of `flism_metrics`."""

    regions: pd.DataFrame
    pairs: pd.DataFrame
    skipped: pd.DataFrame
    metrics: dict[str, Any]


def flism_records(dataset: Dataset, splits: list[str]) -> pd.DataFrame:
    """The records FLISM is asked for: those of the splits that have long captions at all, in the order of the table.

    Raises ConfigError if there is none.
    """
    if not splits:
        raise ConfigError("flism.splits = []: nothing is matched. Name splits whose images have long captions, such as [train]")
    records = dataset.split(*splits)
    captioned = records.loc[records["long_caption"].str.strip() != "", "split"].unique()
    chosen = records[records["split"].isin(captioned)].reset_index(drop=True)
    if chosen.empty:
        raise ConfigError(
            f"flism.splits = {splits}: no image of the data set {dataset.name!r} in these splits has a long caption. "
            f"Its splits: {dict(dataset.records['split'].value_counts())}"
        )
    return chosen


def extract(
    dataset: Dataset,
    clip: Clip,
    detector: RegionDetector | None,
    config: FlismConfig,
    cache: Path | str,
    device: torch.device | str = "cpu",
    records: pd.DataFrame | None = None,
    models: Models | None = None,
) -> FlismResult:
    """Regions and local pairs of `records`, or of the records of `config.splits`.

    `clip` and `detector` must be on `device`. `cache` is the folder of caches: `flism`/<key>/ holds finished shards, where
    the key covers models, settings and code but not the data: an image is found by its id, content, size and caption. So
    a run that was killed goes on, added images cost only themselves, and one that was skipped for its file is tried
    again. `embeddings` holds what was computed for crops, sentences, detections and sentence bounds, by their content.

    The result depends neither on the caches nor on `batch_size`, `shard_size`, `engine`, `processes` and the order of
    the records. An image that cannot be read, has no sentence or has no region is a row in `skipped`. Worker processes
    get their models from `models(device)`, or copies of these ones. Raises ConfigError where `regions = detector` meets
    no detector, or `choice = truth` a data set without true boxes; DataError where no pair results or a shard cannot be
    written.
    """
    if detector is None and config.regions == "detector":
        raise ConfigError("flism.regions = 'detector' needs a detector: set base.detector.kind, or flism.regions=spatial")
    if config.choice == "truth" and dataset.truth is None:
        raise ConfigError(f"flism.choice = 'truth': the data set {dataset.name!r} has no true boxes. Set it to best or random.")
    if records is None:
        records = flism_records(dataset, config.splits)
    truth = _truth(dataset) if config.choice == "truth" else {}
    device, used = torch.device(device), detector if config.regions != "spatial" else None
    wanted = [_record(dataset, row, truth.get(row.image_id, ())) for row in records.itertuples()]
    names, store = _stores(clip, used, config, Path(cache))
    store.touch()
    for folder in prune(Path(cache) / SHARDS_FOLDER, keep=[store.folder]):
        _log.info("flism: %s was not used for a long time and is removed.", folder)
    shards = store.load({record.fingerprint for record in wanted})
    finished = {outcome.fingerprint for shard in shards for outcome in shard.outcomes}
    waiting = [record for record in wanted if record.fingerprint not in finished]
    if waiting:
        jobs = [waiting[start : start + config.shard_size] for start in range(0, len(waiting), config.shard_size)]
        reasons = Counter(outcome.reason for shard in shards for outcome in shard.outcomes if outcome.reason)
        with Progress(f"flism {dataset.name}", len(wanted), "images", done=len(wanted) - len(waiting)) as progress:
            note = _Notes(progress, reasons, len(wanted) - len(waiting))
            begin = time.monotonic()
            spec = Spec(models or Own(clip, used), config, names)
            caches = names.open()
            with closing(caches), closing(_run(jobs, clip, used, config, caches, device, spec, note)) as results:
                for done in results:
                    caches.add(done.fresh)
                    now = time.monotonic()
                    shards.append(store.save(done.outcomes, done.tables, now - begin))
                    begin = now
    return _result(dataset, wanted, shards)


def _run(
    jobs: list[list[Record]],
    clip: Clip,
    detector: RegionDetector | None,
    config: FlismConfig,
    caches: Caches,
    device: torch.device,
    spec: Spec,
    on_image: Callable[[str | None], None],
) -> Iterator[Done]:
    """The processed shards, in any order."""
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
    processes = config.processes or (gpus if gpus > 1 else 0)
    if config.engine == "ray":
        from fast_goal.flism.cluster import run_ray

        yield from run_ray(spec, jobs, processes, device, on_image)
    elif processes > 1:
        yield from run_workers(spec, jobs, processes, device, on_image)
    else:
        images = sum(map(len, jobs))
        with Pipeline(clip, detector, config, caches, device, images=images) as pipeline:
            yield from pipeline.run(Shards(jobs), on_image)


class _Notes:
    """Counts an image in the progress line, with the share of those skipped by reason."""

    def __init__(self, progress: Progress, reasons: Counter[str], resumed: int):
        self._progress, self._reasons, self._resumed = progress, reasons, resumed
        progress.update(0, **self._notes())

    def __call__(self, reason: str | None) -> None:
        if reason:
            self._reasons[reason] += 1
        self._progress.update(1, **self._notes())

    def _notes(self) -> dict[str, str]:
        done = max(self._progress.done, 1)
        notes = {"resumed": f"{self._resumed}"} if self._resumed else {}
        if self._reasons:
            notes["skipped"] = ", ".join(f"{reason} {number / done:.1%}" for reason, number in self._reasons.most_common())
        return notes


def _record(dataset: Dataset, row: Any, truth: tuple[TrueBox, ...]) -> Record:
    size = int(row.width), int(row.height)
    return Record(row.image_id, str(dataset.path(row.image_path)), *size, row.long_caption, row.content_hash, truth)


def _truth(dataset: Dataset) -> dict[str, tuple[TrueBox, ...]]:
    """The true boxes of the sentences of each image, by its id."""
    found: dict[str, list[TrueBox]] = {}
    for row in dataset.truth.itertuples():
        found.setdefault(row.image_id, []).append((int(row.char_start), (row.x1, row.y1, row.x2, row.y2)))
    return {image_id: tuple(boxes) for image_id, boxes in found.items()}


def _result(dataset: Dataset, wanted: list[Record], shards: list[Shard]) -> FlismResult:
    position = {record.image_id: index for index, record in enumerate(wanted)}
    order = {"regions": ("image_id", "region_index"), "pairs": ("image_id", "rank"), "skipped": ("sample", "row")}
    tables = {}
    for name, schema in (("regions", REGIONS), ("pairs", PAIRS), ("skipped", SKIPPED)):
        table = pd.concat([shard.tables[name] for shard in shards], ignore_index=True)[list(schema.names)]
        image, within = order[name]
        keys = pd.DataFrame({"image": table[image].map(position), "within": table[within]})
        tables[name] = table.loc[keys.sort_values(["image", "within"], kind="stable").index].reset_index(drop=True)
    if tables["pairs"].empty:
        reasons = dict(tables["skipped"]["reason"].value_counts())
        raise DataError(f"{dataset.name}: no local pair came out of {len(wanted)} images. Skipped: {reasons}")
    outcomes = [outcome for shard in shards for outcome in shard.outcomes]
    seconds = sum(shard.seconds * len(shard.outcomes) for shard in shards)
    return FlismResult(**tables, metrics=flism_metrics(**tables, outcomes=outcomes, seconds=seconds, truth=dataset.truth))


def _stores(clip: Clip, detector: RegionDetector | None, config: FlismConfig, cache: Path) -> tuple[CacheNames, ShardStore]:
    """The names of the caches and the store of shards that belong to models, settings and code."""
    settings = {key: value for key, value in to_dict(config).items() if key in SETTINGS}
    model = model_digest(clip)
    key = {"model": model, "detector": detector.digest if detector else None, "settings": settings, "code": _code(_SHARDS)}
    names = CacheNames(
        folder=str((cache / EMBEDDINGS_FOLDER).absolute()),
        embeddings=digest([model, config.precision, _code(_EMBEDDING)]),
        # boxes that are known without the pixels are not worth keeping, and may differ for images with equal content
        detections=digest([detector.digest, config.precision, _code(("data/images.py",))])
        if detector and detector.reads_pixels
        else None,
        splits=splitter_digest(),
    )
    return names, ShardStore(cache / SHARDS_FOLDER / digest(key), key)


def _code(globs: tuple[str, ...]) -> list[list[str]]:
    package = Path(fast_goal.__file__).parent
    paths = [path for glob in globs for path in sorted(package.glob(glob))]
    return [[path.relative_to(package).as_posix(), file_digest(path)] for path in paths]
