"""From records to regions and local pairs, shard by shard: the part of FLISM that does the work.

A stream through one process: threads read and decode images ahead, the detector runs on batches of them, threads cut and
resize the crops, and CLIP embeds the crops of many images in full batches; meanwhile captions are split beside, and a
finished shard is matched in a thread while the next one is embedded. Decoding runs ahead over the end of a shard. What
the caches know is not computed; an image of which they know everything is not opened. Nothing is written here: a shard
comes back with its tables and with what was computed for the first time.

`R` regions and `S` sentences of one image, `K` different pixel boxes among the regions, `D` embedding width.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from fast_goal.cache import DetectionCache, EmbeddingCache, SplitCache
from fast_goal.config import FlismConfig
from fast_goal.data.captions import Sentence
from fast_goal.data.images import open_image
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED
from fast_goal.data.splitter import Split, Splitter
from fast_goal.errors import DataError
from fast_goal.files import digest
from fast_goal.flism.detectors import RegionDetector
from fast_goal.flism.embedder import Embedder, cut, decoding_scale, pixel_boxes
from fast_goal.flism.matching import Match, match_many, pair_weights, rematch
from fast_goal.flism.regions import Detections, Regions, candidate_regions
from fast_goal.flism.shards import FILE_REASONS, Outcome, fingerprint
from fast_goal.model.clip import Clip
from fast_goal.model.inference import arithmetic

BATCH_PIXELS = 200_000_000  # decoded at once (600 MB, and twice: ahead, and in the detector): large photographs wait
CHILD_FROM = 1000  # images from which the start of a process for the sentences pays ...
CHILD_CORES = 4  # ... on a machine with so many cores; on fewer it would take one from the model

TrueBox = tuple[int, tuple[float, float, float, float]]  # where a sentence begins in the caption, and the box it is about


@dataclass(frozen=True, slots=True)
class Record:
    """What is asked for: one image with its caption. `path` is absolute, or relative to the working directory."""

    image_id: str
    path: str
    width: int
    height: int
    caption: str
    content_hash: str
    truth: tuple[TrueBox, ...] = ()  # only where they are the regions (flism.choice = truth)

    @property
    def fingerprint(self) -> str:
        """What the shards know the image by."""
        found = fingerprint(self.image_id, self.content_hash, self.width, self.height, self.caption)
        return digest([found, self.truth], length=24) if self.truth else found


@dataclass
class Fresh:
    """What was computed for the first time, as the caches' `add_` methods take it."""

    crops: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)
    sentences: list[tuple[str, np.ndarray, bool]] = field(default_factory=list)
    detections: list[tuple[str, np.ndarray, list[str], np.ndarray]] = field(default_factory=list)
    spans: list[tuple[str, np.ndarray]] = field(default_factory=list)


@dataclass
class Done:
    """A processed shard: the tables by name (regions, pairs, skipped), and an outcome for each image, in order."""

    tables: dict[str, pd.DataFrame]
    outcomes: list[Outcome]
    fresh: Fresh


@dataclass
class Caches:
    """The stores of one model, one detector (None without one) and the splitter."""

    embeddings: EmbeddingCache
    detections: DetectionCache | None
    splits: SplitCache

    @classmethod
    def open(cls, folder: Path | str, embeddings: str, detections: str | None, splits: str) -> Caches:
        """Opens the databases of the three digests in `folder`."""
        found = DetectionCache(folder, detections) if detections else None
        return cls(EmbeddingCache(folder, embeddings), found, SplitCache(folder, splits))

    def add(self, fresh: Fresh) -> None:
        """Keeps what a shard computed."""
        self.embeddings.add_crops(fresh.crops)
        self.embeddings.add_sentences(fresh.sentences)
        self.splits.add_spans(fresh.spans)
        if self.detections is not None:
            self.detections.add_detections(fresh.detections)

    def close(self) -> None:
        """Closes the databases."""
        for cache in (self.embeddings, self.splits, self.detections):
            if cache is not None:
                cache.store.close()


class Source(Protocol):
    """Where shards come from."""

    def take(self, wait: bool) -> list[Record] | None:
        """The next shard. None: with `wait`, there is no more; without, there is none at the moment."""
        ...


class Shards:
    """A source that has them all."""

    def __init__(self, shards: Iterable[Sequence[Record]]):
        self._shards = iter(shards)

    def take(self, wait: bool) -> list[Record] | None:
        """See `Source`."""
        return next((list(shard) for shard in self._shards), None)


@dataclass(eq=False)
class _Item:
    """One image on its way."""

    record: Record
    shard: _Shard
    last: bool = False  # of its shard
    image: Image.Image | None = None
    prepared: Any = None  # the image as the detector takes it
    regions: Regions | None = None
    boxes: np.ndarray | None = None  # int32 [K, 4], the different pixel boxes of the regions
    first_region: list[int] = field(default_factory=list)  # [K], the first region of each pixel box
    scale: int = 1  # of the decoding
    known: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)  # pixel box -> embedding [D]
    new: list[int] = field(default_factory=list)  # the rows of `boxes` that have to be embedded
    crops: Tensor | None = None  # uint8 [different ones, I, I, 3]
    crop_of: list[int] = field(default_factory=list)  # for each of `new`, its row of `crops`
    sentences: list[Sentence] = field(default_factory=list)
    problem: tuple[str, str] | None = None  # reason, detail: why the image is skipped

    def skip(self, reason: str, detail: str) -> None:
        self.problem, self.image, self.prepared = (reason, detail), None, None

    @property
    def to_decode(self) -> bool:
        return self.problem is None and (self.regions is None or bool(self.new))

    @property
    def crops_name(self) -> str:
        return f"{self.record.content_hash}/{self.scale}"


@dataclass(eq=False)
class _Shard:
    items: list[_Item] = field(default_factory=list)
    spans: dict[str, np.ndarray] = field(default_factory=dict)  # by caption, from the cache
    captions: list[str] = field(default_factory=list)  # that are being split
    splits: list[Future[list[Split]]] = field(default_factory=list)
    fresh: Fresh = field(default_factory=Fresh)


class Pipeline:
    """FLISM in one process, on one device, with `threads` for images. `clip` and `detector` must be on `device`.

    `caches` None: everything is computed. `images` is how many are to be expected. A context manager.
    """

    def __init__(
        self,
        clip: Clip,
        detector: RegionDetector | None,
        config: FlismConfig,
        caches: Caches | None,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        images: int = 0,
    ):
        self._clip, self._config, self._caches = clip, config, caches
        self._detector = detector if config.regions != "spatial" and config.choice != "truth" else None
        self._device = torch.device(device)
        self._embed = Embedder(clip, self._device, config.batch_size, config.precision)
        self._threads = threads or cores()
        # images at most in each queue: enough for the threads to go on while the device works on a whole batch
        self._ahead = max(2 * self._threads, config.batch_size)
        self._pool = ThreadPoolExecutor(self._threads, "images")
        children = (1 if cores() < 16 else 2) if images >= CHILD_FROM and cores() >= CHILD_CORES else 0
        self._splitter = Splitter(clip.context_length, children)
        self._finisher = ThreadPoolExecutor(1, "matching")

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._finisher.shutdown(wait=True, cancel_futures=True)
        self._splitter.close()

    def process(self, records: Sequence[Record]) -> Done:
        """One shard."""
        (done,) = self.run(Shards([records]))
        return done

    def run(self, source: Source, on_image: Callable[[str | None], None] = lambda reason: None) -> Iterator[Done]:
        """The shards of the source, in its order. `on_image` is called for every image, with the reason if it is
        skipped. Raises ModelError for a model whose embeddings are not finite."""
        waiting: Future[Done] | None = None
        try:
            for item in self._cut(self._detected(self._decoded(source))):
                if item.crops is not None:
                    self._embed.add(item.crops)
                on_image(item.problem[0] if item.problem else None)
                if not item.last:
                    continue
                finish = self._end(item.shard)
                if waiting is not None:
                    yield waiting.result()
                waiting = self._finisher.submit(finish)
        except GeneratorExit:
            raise
        except BaseException:  # Ctrl-C included: what is done already is not lost
            if waiting is not None:
                yield waiting.result()
            raise
        if waiting is not None:
            yield waiting.result()

    def _items(self, records: Sequence[Record]) -> list[_Item]:
        """The items of a shard, with what the caches know of them; their captions are on the way to be split."""
        shard, config = _Shard(), self._config
        shard.items = items = [_Item(record, shard) for record in records]
        items[-1].last = True
        # every character that is not blank lies in a sentence
        for item in items:
            if not item.record.caption.strip():
                item.skip("no sentence", f"long caption {item.record.caption[:80]!r}")
        used = [item for item in items if item.problem is None]
        captions = list(dict.fromkeys(item.record.caption for item in used))
        shard.spans = self._caches.splits.spans(captions) if self._caches else {}
        shard.captions = [caption for caption in captions if caption not in shard.spans]
        shard.splits = self._splitter.submit(shard.captions)

        known: dict[str, Detections] = {}
        if self._detector is None:
            known = {item.record.image_id: Detections.none() for item in used}
        elif not self._detector.reads_pixels:
            ids = [item.record.image_id for item in used]
            known = dict(zip(ids, self._detector.detect([None] * len(ids), ids), strict=True))
        elif self._caches is not None and self._caches.detections is not None:
            stored = self._caches.detections.detections(item.record.content_hash for item in used)
            known = {
                item.record.image_id: Detections(*stored[item.record.content_hash])
                for item in used
                if item.record.content_hash in stored
            }
        for item in used:
            if item.record.image_id in known:
                self._set_regions(item, known[item.record.image_id])
            # only where the boxes never come from the pixels: else a result would depend on what the cache knows
            if config.scaled_decoding and item.boxes is not None and not self._looks:
                item.scale = decoding_scale(item.boxes, self._embed.input_side)
        if self._caches is not None:
            crops = self._caches.embeddings.crops(item.crops_name for item in used)
            for item in used:
                boxes, embeddings = crops.get(item.crops_name, ((), ()))
                for box, embedding in zip(boxes, embeddings, strict=True):
                    item.known.setdefault(tuple(box.tolist()), embedding)
        for item in used:
            if item.boxes is not None:
                self._set_new(item)
        return items

    @property
    def _looks(self) -> bool:
        """Whether the detector needs the pixels."""
        return self._detector is not None and self._detector.reads_pixels

    def _decoded(self, source: Source) -> Iterator[_Item]:
        """The items in order, with their images where they are needed; threads decode ahead, within BATCH_PIXELS."""
        items: deque[_Item] = deque()
        pending: deque[tuple[_Item, Future[None] | None, int]] = deque()
        pixels = 0
        while True:
            while len(pending) < self._ahead and (pixels < BATCH_PIXELS or not pending):
                if not items:
                    records = source.take(wait=not pending)
                    if records is None:
                        break
                    items.extend(self._items(records))
                item = items.popleft()
                future = self._pool.submit(self._decode, item) if item.to_decode else None
                size = item.record.width * item.record.height if future else 0
                pending.append((item, future, size))
                pixels += size
            if not pending:
                return
            item, future, size = pending.popleft()
            if future is not None:
                future.result()
            pixels -= size
            yield item

    def _decode(self, item: _Item) -> None:
        record = item.record
        try:
            data = Path(record.path).read_bytes()
        except OSError as error:
            item.skip(FILE_REASONS[0], f"{record.path}: the image file cannot be read ({error.strerror or error})")
            return
        if hashlib.sha256(data).hexdigest() != record.content_hash:
            # an empty or broken file is told as such
            reason = FILE_REASONS[1]
            detail = f"{record.path} is not the file that the records describe: run `download` again"
            try:
                open_image(record.path, data)
            except DataError as error:
                reason, detail = FILE_REASONS[0], str(error)
            item.skip(reason, detail)
            return
        try:
            image = open_image(record.path, data, item.scale)
        except DataError as error:
            item.skip(FILE_REASONS[0], str(error))
            return
        reduced = (-(-record.width // item.scale), -(-record.height // item.scale))
        if image.size not in ((record.width, record.height), reduced):
            detail = f"{record.path} is {image.size}, the records say {(record.width, record.height)}: run `download` again"
            item.skip(FILE_REASONS[1], detail)
            return
        item.image = image
        if item.regions is None:
            prepare = getattr(self._detector, "prepare", None)
            item.prepared = prepare(image) if prepare is not None else image

    def _detected(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Adds the regions, running the detector on batches of images; a batch ends with its shard."""
        batch: list[_Item] = []
        count = pixels = 0
        for item in items:
            batch.append(item)
            if item.image is not None:
                count, pixels = count + 1, pixels + math.prod(item.image.size)
            if item.last or count >= self._config.batch_size or pixels >= BATCH_PIXELS or not self._looks:
                self._detect([one for one in batch if one.prepared is not None])
                yield from batch
                batch, count, pixels = [], 0, 0

    def _detect(self, items: list[_Item]) -> None:
        if not items:
            return
        with arithmetic(self._config.precision, self._device):
            found = self._detector.detect([item.prepared for item in items], [item.record.image_id for item in items])
        for item, detections in zip(items, found, strict=True):
            item.prepared = None
            record = (item.record.content_hash, detections.boxes, list(detections.labels), detections.scores)
            item.shard.fresh.detections.append(record)
            self._set_regions(item, detections)
            if item.boxes is not None:
                self._set_new(item)
            if not item.new:
                item.image = None

    def _set_regions(self, item: _Item, detections: Detections) -> None:
        config, size = self._config, (item.record.width, item.record.height)
        if config.choice == "truth":
            boxes = np.array([box for _, box in item.record.truth], dtype=np.float64).reshape(-1, 4)
            detections = Detections(boxes, [""] * len(boxes), np.ones(len(boxes)))
            regions = candidate_regions(*size, detections, use="detector")
        else:
            regions = candidate_regions(
                *size,
                detections,
                use=config.regions,
                min_area=config.min_area,
                classes=config.classes,
                max_detections=config.max_detections,
                merge_iou=config.merge_iou,
            )
        item.regions = regions
        if not len(regions):
            why = f"no detection with a confidence of {config.confidence} or more passed the filters"
            item.skip("no region", "no sentence has a true box" if config.choice == "truth" else why)
            return
        first: dict[tuple[int, ...], int] = {}
        for index, box in enumerate(pixel_boxes(regions.boxes, *size).tolist()):
            first.setdefault(tuple(box), index)
        item.boxes, item.first_region = np.array(list(first), dtype=np.int32), list(first.values())

    def _set_new(self, item: _Item) -> None:
        item.new = [row for row, box in enumerate(item.boxes.tolist()) if tuple(box) not in item.known]

    def _cut(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Cuts the crops in threads, in order, and lets go of the images. All of a shard are out before the next."""
        pending: deque[tuple[_Item, Future[None] | None]] = deque()
        for item in items:
            pending.append((item, self._pool.submit(self._cut_one, item) if item.image is not None else None))
            while pending and (item.last or len(pending) > self._ahead):
                first, future = pending.popleft()
                if future is not None:
                    future.result()
                yield first

    def _cut_one(self, item: _Item) -> None:
        size = (item.record.width, item.record.height)
        item.crops, item.crop_of = cut(item.image, size, item.boxes[item.new], self._clip)
        item.image = None

    def _end(self, shard: _Shard) -> Callable[[], Done]:
        """Gives the device the rest of a shard; the function returned does what is left to do without it."""
        crops = self._embed.flush()
        tokens: dict[str, tuple[np.ndarray, int]] = {}
        new = [result for future in shard.splits for result in future.result()]
        for caption, result in zip(shard.captions, new, strict=True):
            shard.spans[caption] = result.spans
            shard.fresh.spans.append((caption, result.spans))
            for (start, end), row in zip(result.spans.tolist(), result.tokens, strict=True):
                tokens[caption[start:end]] = row
        texts: list[str] = []
        for item in shard.items:
            if item.problem is None:
                caption = item.record.caption
                spans = shard.spans[caption].tolist()
                item.sentences = [Sentence(caption[start:end], start, end) for start, end in spans]
                texts += [sentence.text for sentence in item.sentences]
        stored = self._caches.embeddings.sentences if self._caches is not None else lambda absent: {}
        embedded, new_texts = self._embed.sentences(texts, stored, tokens)
        shard.fresh.sentences = [(text, embedded[text][0].numpy(), embedded[text][1]) for text in new_texts]
        config = self._config

        def finish() -> Done:
            with torch.inference_mode():
                return _finish(shard, crops(), embedded, config)

        return finish


def _finish(shard: _Shard, crops: Tensor, sentences: dict[str, tuple[Tensor, bool]], config: FlismConfig) -> Done:
    """Matches the images of a shard and makes its tables; crops [sum of different ones, D]."""
    offset, region_parts, sentence_parts = 0, [], []
    used = [item for item in shard.items if item.problem is None]
    for item in used:
        if item.new:
            new = crops[offset : offset + len(item.crops)][item.crop_of]
            offset, item.crops = offset + len(item.crops), None
            shard.fresh.crops.append((item.crops_name, item.boxes[item.new], new.numpy()))
            item.known |= zip((tuple(box) for box in item.boxes[item.new].tolist()), new.numpy(), strict=True)
        rows = np.stack([item.known[tuple(box)] for box in item.boxes.tolist()])  # [K, D]
        item.known = {}
        region_parts.append(torch.from_numpy(rows))
        sentence_parts.append(torch.stack([sentences[sentence.text][0] for sentence in item.sentences]))  # [S, D]
    matches = match_many(region_parts, sentence_parts, config.top_k)
    if config.choice != "best":
        choose = {"random": _random_regions, "truth": _true_regions}[config.choice]
        parts = zip(used, matches, region_parts, sentence_parts, strict=True)
        matches = [choose(item, found, regions, texts, config.top_k) for item, found, regions, texts in parts]
    tables: dict[str, dict[str, list[Any]]] = {
        name: {column: [] for column in schema.names}
        for name, schema in (("regions", REGIONS), ("pairs", PAIRS), ("skipped", SKIPPED))
    }
    for item, found in zip(used, matches, strict=True):
        if not found:
            item.skip("no region", f"none that flism.choice = {config.choice!r} could take")
            continue
        _add_regions(tables["regions"], item)
        _add_pairs(tables["pairs"], item, found, config)
    outcomes = []
    for item in shard.items:
        reason = item.problem[0] if item.problem else None
        truncated = sum(sentences[sentence.text][1] for sentence in item.sentences)
        dropped = {name: count for name, count in item.regions.dropped.items() if count} if item.regions is not None else {}
        record = item.record
        outcomes.append(Outcome(record.fingerprint, record.image_id, reason, len(item.sentences), truncated, dropped))
        if item.problem is not None:
            row = (record.image_id, -1, "flism", *item.problem)
            for column, value in zip(SKIPPED.names, row, strict=True):
                tables["skipped"][column].append(value)
    frames = {name: pd.DataFrame(columns) for name, columns in tables.items()}
    return Done({name: frame if len(frame) else frame.iloc[:, :0] for name, frame in frames.items()}, outcomes, shard.fresh)


def _random_regions(item: _Item, found: list[Match], regions: Tensor, sentences: Tensor, top_k: int) -> list[Match]:
    """The same sentences, each with another region of the image, drawn by image and sentence; none where there is one only."""
    pairs = []
    for pair in found if len(regions) > 1 else []:
        drawn = int(digest([item.record.content_hash, item.sentences[pair.sentence].text]), 16) % (len(regions) - 1)
        pairs.append((pair.sentence, drawn + (drawn >= pair.region)))
    return rematch(regions, sentences, pairs)


def _true_regions(item: _Item, found: list[Match], regions: Tensor, sentences: Tensor, top_k: int) -> list[Match]:
    """The `top_k` sentences most similar to their own true boxes, best first."""
    size = (item.record.width, item.record.height)
    rows = {tuple(box): row for row, box in enumerate(item.boxes.tolist())}
    own = {}
    for start, box in item.record.truth:
        inside = np.clip(np.array([box], dtype=np.float64), 0, [*size, *size])
        row = rows.get(tuple(pixel_boxes(inside, *size)[0].tolist()))
        if row is not None:  # too thin a box is no region
            own[start] = row
    pairs = [(index, own[sentence.start]) for index, sentence in enumerate(item.sentences) if sentence.start in own]
    return sorted(rematch(regions, sentences, pairs), key=lambda pair: -pair.similarity)[:top_k]


def _add_regions(columns: dict[str, list[Any]], item: _Item) -> None:
    regions, count = item.regions, len(item.regions)
    columns["image_id"] += [item.record.image_id] * count
    columns["region_index"] += range(count)
    for name, values in zip(("x1", "y1", "x2", "y2"), regions.boxes.T.tolist(), strict=True):
        columns[name] += values
    columns["kind"] += regions.kinds
    columns["label"] += regions.labels
    columns["score"] += np.asarray(regions.scores, dtype=np.float64).tolist()


def _add_pairs(columns: dict[str, list[Any]], item: _Item, matches: list[Any], config: FlismConfig) -> None:
    weights = pair_weights([found.similarity for found in matches], config.pair_weights)
    for rank, (found, weight) in enumerate(zip(matches, weights, strict=True), 1):
        sentence, region = item.sentences[found.sentence], item.first_region[found.region]
        box = dict(zip(("x1", "y1", "x2", "y2"), item.regions.boxes[region].tolist(), strict=True))
        row = {
            "image_id": item.record.image_id,
            "rank": rank,
            "sentence_index": found.sentence,
            "sentence": sentence.text,
            "char_start": sentence.start,
            "char_end": sentence.end,
            "region_index": region,
            **box,
            "kind": item.regions.kinds[region],
            "similarity": found.similarity,
            "weight": weight,
        }
        for name, value in row.items():
            columns[name].append(value)


def cores() -> int:
    """The processor cores that this process may use, 16 at most: more threads would only wait for the device."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, available)
