"""FLISM over a data set: from records to the tables of regions and local pairs (`fast-goal flism`).

A pipeline: threads decode images ahead, the detector runs on a batch of them, threads cut and preprocess the crops, and
CLIP embeds the crops of many images in full batches. It runs shard by shard; a finished shard is on disk with its
completion mark, so that memory is bounded by a shard and a killed run goes on where it stopped.

Dimensions: `R` regions and `S` sentences of one image, `K` different crops, `D` embedding width, `I` side of CLIP's input.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import fast_goal
from fast_goal.config import FlismConfig, to_dict
from fast_goal.data import captions
from fast_goal.data.captions import Sentence, split_sentences, tokenize
from fast_goal.data.images import crop, open_image
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, Dataset
from fast_goal.errors import ConfigError, DataError, ModelError
from fast_goal.files import digest, file_digest
from fast_goal.flism.matching import match
from fast_goal.flism.metrics import flism_metrics
from fast_goal.flism.regions import Detections, Regions, candidate_regions
from fast_goal.flism.shards import Shard, ShardStore
from fast_goal.model.clip import Clip
from fast_goal.progress import Progress

WORKERS = min(8, os.cpu_count() or 1)
BATCH_PIXELS = 200_000_000  # decoded at once for the detector (600 MB): a batch of large photographs is cut short
REMEMBERED_SENTENCES = 50_000  # embeddings kept for sentences that come again
FILE_REASONS = ("unreadable image", "changed image")  # of a skipped image: its file may be mended
# what the result depends on beside the data, the models and the settings; a change of it must not meet an old cache
SOURCES = ("flism/*.py", "model/*.py", "data/images.py", "data/captions.py")

A = TypeVar("A")
B = TypeVar("B")


class RegionDetector(Protocol):
    """What the engine needs of a detector."""

    digest: str

    def detect(self, images: list[Image.Image]) -> list[Detections]:
        """The detections of each image, independent of the others."""
        ...


@dataclass
class FlismResult:
    """The tables (schemas REGIONS, PAIRS, SKIPPED) in the order of the records, and the metrics of `flism_metrics`."""

    regions: pd.DataFrame
    pairs: pd.DataFrame
    skipped: pd.DataFrame
    metrics: dict[str, Any]


@dataclass
class _Item:
    """One image on its way through the pipeline."""

    image_id: str
    path: Path
    size: tuple[int, int]  # as recorded
    caption: str
    sentences: list[Sentence] = field(default_factory=list)
    image: Image.Image | None = None
    regions: Regions | None = None
    crops: Tensor | None = None  # [K, 3, I, I], of the different pixel boxes among the regions
    crop_of: list[int] = field(default_factory=list)  # per region, its row of `crops`
    problem: tuple[str, str] | None = None  # reason, detail: why the image is skipped


def flism_records(dataset: Dataset, splits: list[str]) -> pd.DataFrame:
    """The records FLISM is asked for: those of the splits that have long captions at all, in the order of the table.

    Raises ConfigError if there is none.
    """
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
) -> FlismResult:
    """Regions and local pairs of the records of `config.splits`.

    `clip` and `detector` must be on `device`. Finished shards are kept in `cache`/<key>/, where the key covers
    everything the result depends on: a run that was killed goes on, and a finished one is only read; but a shard with
    an image that could not be used and now can be is made again. The result does not depend on `batch_size` and
    `shard_size`. An image that cannot be read, has no sentence or has no region is a row
    in `skipped`. Raises ConfigError where `regions = detector` meets no detector, DataError where no pair results.
    """
    if detector is None and config.regions == "detector":
        raise ConfigError("flism.regions = 'detector' needs a detector: set base.detector.kind, or flism.regions=spatial")
    records = flism_records(dataset, config.splits)
    store = ShardStore(Path(cache) / _key(dataset, clip, detector, config))
    shards = []
    for shard in store.load():
        if _files_changed(dataset, records, shard):
            store.discard(shard)
        else:
            shards.append(shard)
    finished = {position for shard in shards for position in shard.positions}
    waiting = [position for position in range(len(records)) if position not in finished]
    notes = {"resumed": len(finished)} if finished else {}
    embed = _Embedder(clip, torch.device(device), config.batch_size)
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ThreadPoolExecutor(WORKERS) as pool,
        Progress("flism", len(records), "images", done=len(finished)) as progress,
    ):
        progress.update(0, **notes)
        for start in range(0, len(waiting), config.shard_size):
            positions = waiting[start : start + config.shard_size]
            begin = time.monotonic()
            items = [_item(dataset, row) for row in records.iloc[positions].itertuples()]
            rows, counts = _shard(items, embed, detector, config, pool, lambda: progress.update(1, **notes))
            counts["seconds"] = time.monotonic() - begin
            shards.append(store.save(positions, rows, counts))
    return _result(dataset, records, shards)


def _shard(
    items: list[_Item],
    embed: _Embedder,
    detector: RegionDetector | None,
    config: FlismConfig,
    pool: ThreadPoolExecutor,
    on_image: Callable[[], None],
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """The rows of the three tables, and the counts, of one shard."""
    decoded = _ahead(pool, _decode, items, 2 * WORKERS)
    detected = _detect(decoded, detector, config)
    cropped = _ahead(pool, embed.cut, detected, 2 * WORKERS)
    done: list[_Item] = []
    region_embeddings = embed.crops(_passing(cropped, done, on_image))  # [sum of K, D]
    texts = [sentence.text for item in done if item.problem is None for sentence in item.sentences]
    sentence_embeddings, truncated = embed.sentences(texts)
    rows: dict[str, list[dict[str, Any]]] = {"regions": [], "pairs": [], "skipped": []}
    counts: Counter[str] = Counter(truncated_sentences=0, dropped_detections=0)
    offset = 0
    for item in done:
        if item.problem is not None:
            reason, detail = item.problem
            rows["skipped"].append({"sample": item.image_id, "row": -1, "step": "flism", "reason": reason, "detail": detail})
            continue
        found = region_embeddings[offset : offset + max(item.crop_of) + 1][item.crop_of]  # [R, D]
        offset += max(item.crop_of) + 1
        sentences = torch.stack([sentence_embeddings[sentence.text] for sentence in item.sentences])  # [S, D]
        rows["regions"] += _region_rows(item)
        rows["pairs"] += _pair_rows(item, match(found, sentences, config.top_k))
        counts["truncated_sentences"] += sum(sentence.text in truncated for sentence in item.sentences)
        counts["dropped_detections"] += item.regions.dropped
    return rows, dict(counts)


def _item(dataset: Dataset, row: Any) -> _Item:
    return _Item(row.image_id, dataset.path(row.image_path), (row.width, row.height), row.long_caption)


def _decode(item: _Item) -> _Item:
    item.sentences = split_sentences(item.caption)
    if not item.sentences:
        item.problem = ("no sentence", f"long caption {item.caption[:80]!r}")
        return item
    try:
        item.image = open_image(item.path)
    except DataError as error:
        item.problem = (FILE_REASONS[0], str(error))
        return item
    if item.image.size != item.size:
        item.problem = (FILE_REASONS[1], f"{item.path} is {item.image.size}, the records say {item.size}: run `download` again")
        item.image = None
    return item


def _files_changed(dataset: Dataset, records: pd.DataFrame, shard: Shard) -> bool:
    """Whether an image that the shard skipped for its file would no longer be, as after a disk was mounted again: the
    digest of the records, which names the cache, does not show that."""
    skipped = shard.tables["skipped"]
    samples = set(skipped.loc[skipped["reason"].isin(FILE_REASONS), "sample"])
    rows = records.iloc[shard.positions]
    return any(_decode(_item(dataset, row)).problem is None for row in rows[rows["image_id"].isin(samples)].itertuples())


def _detect(items: Iterable[_Item], detector: RegionDetector | None, config: FlismConfig) -> Iterator[_Item]:
    """Adds the regions, running the detector on batches of images."""
    batch: list[_Item] = []
    pixels = 0
    for item in items:
        batch.append(item)
        pixels += math.prod(item.size) if item.image else 0
        if len(batch) >= config.batch_size or pixels >= BATCH_PIXELS:
            yield from _with_regions(batch, detector, config)
            batch, pixels = [], 0
    yield from _with_regions(batch, detector, config)


def _with_regions(batch: list[_Item], detector: RegionDetector | None, config: FlismConfig) -> list[_Item]:
    seen = [item for item in batch if item.image is not None]
    if seen and detector is not None and config.regions != "spatial":
        detections = detector.detect([item.image for item in seen])
    else:
        detections = [Detections.none()] * len(seen)
    for item, found in zip(seen, detections, strict=True):
        item.regions = candidate_regions(*item.size, found, config.regions, config.min_area)
        if not len(item.regions):
            item.problem = ("no region", f"nothing was detected with a confidence of {config.confidence} or more")
            item.image = None
    return batch


def _passing(items: Iterable[_Item], done: list[_Item], on_image: Callable[[], None]) -> Iterator[Tensor]:
    """The crops of the items, which collect in `done` without them."""
    for item in items:
        crops, item.crops = item.crops, None
        done.append(item)
        on_image()
        if crops is not None:
            yield crops


class _Embedder:
    """CLIP on full batches; remembers sentences. Embeddings come back on the CPU, where matching is cheapest."""

    def __init__(self, clip: Clip, device: torch.device, batch_size: int):
        self._clip, self._device, self._batch_size = clip, device, batch_size
        self._known: OrderedDict[str, tuple[Tensor, bool]] = OrderedDict()  # text -> embedding, whether it was truncated

    def cut(self, item: _Item) -> _Item:
        """Cuts the item's regions and puts them through CLIP's own preprocessing; lets go of the image."""
        if item.image is None:
            return item
        # regions that are the same pixels get the same embedding to the last bit: a tie, which goes to the first
        first: dict[tuple[int, ...], int] = {}
        crops = []
        for x1, y1, x2, y2 in item.regions.boxes:
            pixels = (math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2))
            if pixels not in first:
                first[pixels] = len(crops)
                piece = crop(item.image, pixels)
                crops.append(self._clip.view(*piece.size).apply(piece))
            item.crop_of.append(first[pixels])
        item.crops, item.image = torch.stack(crops), None
        return item

    def crops(self, parts: Iterable[Tensor]) -> Tensor:
        """Embeds the rows of all parts [K, 3, I, I], in batches across them: [sum of K, D]."""
        outputs: list[Tensor] = []
        waiting: list[Tensor] = []
        count = 0
        for part in parts:
            waiting.append(part)
            count += len(part)
            if count < self._batch_size:
                continue
            *batches, rest = torch.cat(waiting).split(self._batch_size)
            if len(rest) == self._batch_size:
                batches, rest = [*batches, rest], rest[:0]
            outputs += [self._clip.encode_image(batch.to(self._device)) for batch in batches]
            waiting, count = [rest], len(rest)
        if count:
            outputs.append(self._clip.encode_image(torch.cat(waiting).to(self._device)))
        return _finite(torch.cat(outputs).float().cpu()) if outputs else torch.zeros(0, self._clip.embed_dim)

    def sentences(self, texts: list[str]) -> tuple[dict[str, Tensor], set[str]]:
        """The embedding [D] of every different text, and those that are longer than the context and were cut off."""
        different = list(dict.fromkeys(texts))
        new = [text for text in different if text not in self._known]
        if new:
            tokens, lengths = tokenize(new, self._clip.context_length)
            lengths = [int(length) for length in lengths]
            order = sorted(range(len(new)), key=lambda index: (lengths[index], index))  # equal lengths waste no padding
            outputs = []
            for start in range(0, len(order), self._batch_size):
                batch = captions.trim(tokens[order[start : start + self._batch_size]])
                outputs.append(self._clip.encode_text(batch.to(self._device)))
            embedded = _finite(torch.cat(outputs).float().cpu())
            for row, index in enumerate(order):
                self._known[new[index]] = (embedded[row], lengths[index] > self._clip.context_length)
        for text in different:
            self._known.move_to_end(text)
        found = {text: self._known[text][0] for text in different}
        truncated = {text for text in different if self._known[text][1]}
        while len(self._known) > REMEMBERED_SENTENCES:
            self._known.popitem(last=False)
        return found, truncated


def _region_rows(item: _Item) -> Iterator[dict[str, Any]]:
    regions = item.regions
    for index, box in enumerate(regions.boxes.tolist()):
        yield {
            "image_id": item.image_id,
            "region_index": index,
            **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
            "kind": regions.kinds[index],
            "label": regions.labels[index],
            "score": float(regions.scores[index]),
        }


def _pair_rows(item: _Item, matches: list[Any]) -> Iterator[dict[str, Any]]:
    for rank, found in enumerate(matches, 1):
        sentence = item.sentences[found.sentence]
        yield {
            "image_id": item.image_id,
            "rank": rank,
            "sentence_index": found.sentence,
            "sentence": sentence.text,
            "char_start": sentence.start,
            "char_end": sentence.end,
            "region_index": found.region,
            **dict(zip(("x1", "y1", "x2", "y2"), item.regions.boxes[found.region].tolist(), strict=True)),
            "kind": item.regions.kinds[found.region],
            "similarity": found.similarity,
        }


def _result(dataset: Dataset, records: pd.DataFrame, shards: list[Shard]) -> FlismResult:
    position = {image_id: index for index, image_id in enumerate(records["image_id"])}
    order = {"regions": ("image_id", "region_index"), "pairs": ("image_id", "rank"), "skipped": ("sample", "row")}
    tables = {}
    for name, schema in (("regions", REGIONS), ("pairs", PAIRS), ("skipped", SKIPPED)):
        table = pd.concat([shard.tables[name] for shard in shards], ignore_index=True)[list(schema.names)]
        image, within = order[name]
        keys = pd.DataFrame({"image": table[image].map(position), "within": table[within]})
        tables[name] = table.loc[keys.sort_values(["image", "within"], kind="stable").index].reset_index(drop=True)
    if tables["pairs"].empty:
        reasons = dict(tables["skipped"]["reason"].value_counts())
        raise DataError(f"{dataset.name}: no local pair came out of {len(records)} images. Skipped: {reasons}")
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.counts)
    return FlismResult(**tables, metrics=flism_metrics(**tables, counts=counts, images=len(records), truth=dataset.truth))


def _ahead(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], count: int) -> Iterator[B]:
    """`map` in threads, in order, at most `count` items ahead of the consumer."""
    pending: deque[Any] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _finite(embeddings: Tensor) -> Tensor:
    if not embeddings.isfinite().all():
        raise ModelError("the base model's embeddings hold NaN or infinity: its weights are damaged or its training diverged")
    return embeddings


def _key(dataset: Dataset, clip: Clip, detector: RegionDetector | None, config: FlismConfig) -> str:
    settings = {key: value for key, value in to_dict(config).items() if key not in ("batch_size", "shard_size")}
    package = Path(fast_goal.__file__).parent
    sources = [
        [path.relative_to(package).as_posix(), file_digest(path)] for glob in SOURCES for path in sorted(package.glob(glob))
    ]
    return digest(
        {
            "dataset": [dataset.name, dataset.digest],
            "model": _model_digest(clip),
            "detector": detector.digest if detector is not None and config.regions != "spatial" else None,
            "settings": settings,
            "sources": sources,
        }
    )


def _model_digest(clip: Clip) -> str:
    hasher = hashlib.sha256(f"{clip.context_length} {clip.view(8, 8)}".encode())
    for name, value in sorted(clip.state_dict().items()):
        hasher.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
