"""The features of images and texts by one model, each computed once and then read back: by the next task, the next data
set, the next run.

A folder of the store belongs to one model: its weights and configuration, its view of images, the precision and the code.
Within it a feature is found by the content of the image or text alone. What `images` and `texts` return does not depend on
what was there before: texts are padded to a length that follows from their own, and batches are filled up to sizes at
which the results of a row do not depend on the other rows (seen on CPUs; a GPU, which chooses its kernels by the size, gets
full batches only).

Letters: `I` images, `T` texts, `S` sentences, `B` rows of a batch, `L` tokens, `N` patches, `D` embedding width, `P` side of
the model's input in pixels, `K` rows of a shard. Features are in float32 on the CPU; those of images and texts are unit
vectors, patches and queries, which text-conditioned pooling needs, are as projected.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fast_goal
from fast_goal.data.captions import tokenize
from fast_goal.data.images import normalised, open_image, touched
from fast_goal.errors import DataError
from fast_goal.files import atomic_path, digest, tree_digest
from fast_goal.model.clip import Clip
from fast_goal.model.inference import arithmetic, finite, model_digest
from fast_goal.progress import Progress

FOLDER = Path(".fast_goal/features")
CODE = ("data/captions.py", "data/images.py", "evaluation/features.py", "model/clip.py", "model/inference.py")
SHARD_ROWS = 1024  # rows computed between two writes, a guess: a kill costs at most the work on these
SHARD_NUMBERS = 1 << 25  # of a shard of wide rows (all patches of an image), which wait in memory until it is written; a guess
LENGTH_STEP = 16  # texts are padded to a multiple of so many tokens
LEAST_ROWS = 8  # of a batch on a CPU; with fewer, its kernels add up in another order
BATCHES_AHEAD = 3  # decoded while the models are busy; a guess that keeps memory small
KEEP_DAYS = 90  # a guess: features that no run has used for so long are removed

Box = tuple[int, int, int, int]
_log = logging.getLogger(__name__)


class ImageFile(NamedTuple):
    """An image as the records know it. `content` is the SHA-256 of the file; any other name will do in a store that is
    kept in memory, where files are not held against it."""

    path: Path
    size: tuple[int, int]  # width and height in pixels
    content: str


class FeatureTable:
    """Rows of float32 [width], each under a key of 16 bytes: shards that are only ever added, in a folder or in memory.

    A shard is two .npy files, values [K, width] and keys uint8 [K, 16], named by the digest of both, the keys written last.
    One that does not match its name, or was not finished, counts as not there. Where a disk cannot be written (full), the
    rows stay in memory and one warning is given.
    """

    def __init__(self, folder: Path | None, width: int):
        self._folder, self._width = folder, width
        self.shard_rows = max(1, min(SHARD_ROWS, SHARD_NUMBERS // width))
        self._shards: list[np.ndarray] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> shard, row
        if folder is not None:
            for path in sorted(folder.glob("*.keys.npy")):
                self._open(path.name.removesuffix(".keys.npy"))

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def read(self, keys: Sequence[bytes]) -> np.ndarray:
        """float32 [T, width], of keys that are all there."""
        places = np.array([self._places[key] for key in keys], dtype=np.int64).reshape(-1, 2)
        values = np.empty((len(keys), self._width), np.float32)
        for shard in np.unique(places[:, 0]):
            mine = places[:, 0] == shard
            values[mine] = self._shards[shard][places[mine, 1]]
        return values

    def add(self, keys: Sequence[bytes], values: np.ndarray) -> None:
        """Adds values [K, width] as a shard."""
        if not keys:
            return
        values = np.ascontiguousarray(values, np.float32)
        packed = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        if self._folder is not None:
            name = _shard_name(packed, values)
            try:
                for kind, array in (("values", values), ("keys", packed)):
                    with atomic_path(self._file(name, kind)) as temporary, temporary.open("wb") as stream:
                        np.save(stream, array)
                values = np.load(self._file(name, "values"), mmap_mode="r")
            except OSError as error:
                _log.warning("%s cannot be written (%s): the run goes on, the next one computes again.", self._folder, error)
                self._folder = None
        self._take(packed, values)

    def _open(self, name: str) -> None:
        try:
            values = np.load(self._file(name, "values"), mmap_mode="r")
            packed = np.load(self._file(name, "keys"))
            sound = values.shape == (len(packed), self._width) and _shard_name(packed, values) == name
        except (OSError, ValueError, EOFError):
            sound = False
        if sound:
            self._take(packed, values)
            return
        _log.warning("%s is damaged: its features are computed again.", self._file(name, "values"))
        for kind in ("keys", "values"):
            self._file(name, kind).unlink(missing_ok=True)

    def _take(self, packed: np.ndarray, values: np.ndarray) -> None:
        for row, key in enumerate(packed):
            self._places.setdefault(key.tobytes(), (len(self._shards), row))
        self._shards.append(values)

    def _file(self, name: str, kind: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.{kind}.npy"


class FeatureStore:
    """The features of one model.

    folder: below it the store of each model has a folder of its own; None keeps everything in memory. clip: moved to
    `device` and set to evaluation when something has to be computed. batch_size: images, or texts, at once. precision:
    `fp32` or `bf16`, of the computation.
    """

    def __init__(self, folder: Path | None, clip: Clip, device: torch.device, batch_size: int, precision: str = "fp32"):
        self.clip, self.device, self.precision = clip, device, precision
        self.batch_size = max(LEAST_ROWS, 1 << (batch_size.bit_length() - 1))  # a power of two, as partial batches are
        self.patch_count = (clip.image_size // clip.patch_size) ** 2
        self.folder = folder / store_key(clip, precision) if folder is not None else None
        if self.folder is not None:
            _remove_unused(self.folder)
        widths = {"images": clip.embed_dim, "texts": clip.embed_dim, "norms": 1, "patches": self.patch_count, "lengths": 1}
        self._images, self._texts, self._norms, self._patches, self._lengths = (
            self._table(kind, width) for kind, width in widths.items()
        )
        self._waiting: list[_Waiting] = []
        self._finished: list[tuple[FeatureTable, list[bytes], np.ndarray]] = []
        self.seconds = 0.0  # that the model was at work

    @functools.cached_property
    def _tokens(self) -> FeatureTable:
        return self._table("tokens", self.patch_count * self.clip.embed_dim)  # large: looked at only where asked for

    @property
    def context_length(self) -> int:
        """Tokens that the model reads."""
        return self.clip.context_length

    def texts(self, texts: Sequence[str], tokens: int | None = None, name: str = "features") -> tuple[Tensor, np.ndarray]:
        """The features [T, D], and the number of token ids of each whole text with start and end token, int64 [T].

        tokens: how many of them the model is shown at most; None: as many as it reads.
        """
        self.add_texts([(text, tokens) for text in texts], name)
        lengths = self.lengths(texts)
        return torch.from_numpy(self._texts.read(self._text_keys(texts, tokens, lengths))), lengths

    def queries(self, texts: Sequence[str], tokens: int | None = None, name: str = "features") -> Tensor:
        """The projected texts [T, D], not normalised: what asks text-conditioned pooling. Computed with their features, so who
        needs the one has the other; arguments as for `texts`."""
        features, lengths = self.texts(texts, tokens, name)
        return features * torch.from_numpy(self._norms.read(self._text_keys(texts, tokens, lengths)))

    def images(self, files: Sequence[ImageFile], boxes: Sequence[Box | None] | None = None) -> Tensor:
        """The features [I, D] of the images, or of the part of each in its box (whole pixels of the original).

        Raises DataError for an image that cannot be read or is not the one that the records know.
        """
        crops = list(enumerate(boxes)) if boxes is not None else [(row, None) for row in range(len(files))]
        embed_images([self], files, crops)
        return torch.from_numpy(self._images.read([_image_key(files[row], box) for row, box in crops]))

    def tokens(self, files: Sequence[ImageFile]) -> Tensor:
        """The projected patches [I, N, D] of the whole images, row-major, not normalised: what text-conditioned pooling reads.

        They are large (0.4 MB an image of ViT-B/16): have `embed_images` compute those of all images at once, then read some
        at a time. Raises DataError as `images`.
        """
        embed_images([self], files, patches=[self])
        found = self._tokens.read([_tokens_key(file) for file in files])
        return torch.from_numpy(found).unflatten(1, (self.patch_count, self.clip.embed_dim))

    def similarities(self, files: Sequence[ImageFile], sentences: Sequence[tuple[int, str]]) -> Tensor:
        """The cosine [S, N] of each sentence with every projected patch token of its image; sentences: (row of `files`,
        text). Raises DataError as `images`."""
        embed_images([self], files, sentences=sentences)
        return torch.from_numpy(self._patches.read([_patch_key(files[row], text) for row, text in sentences]))

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """The number of token ids of each whole text, with start and end token: int64 [T]."""
        keys = [_key("length", text) for text in texts]
        lacking = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._lengths}
        if lacking:
            counts = tokenize(list(lacking.values()), 2)[1]  # two tokens: here nobody reads the ids
            self._lengths.add(list(lacking), counts.numpy()[:, None])
        return self._lengths.read(keys)[:, 0].astype(np.int64)

    def add_texts(self, wanted: Iterable[tuple[str, int | None]], name: str = "features") -> None:
        """Computes what is lacking of these texts, each with the number of tokens to show (see `texts`)."""
        wanted = list(dict.fromkeys(wanted))
        lengths = self.lengths([text for text, _ in wanted]).tolist()
        groups: dict[int, dict[bytes, tuple[str, int]]] = {}  # padded length -> key -> text, tokens shown
        for (text, tokens), length in zip(wanted, lengths, strict=True):
            key = self._text_key(text, tokens, length)
            if key not in self._texts or key not in self._norms:
                shown = min(length, self._limit(tokens))
                padded = min(self.context_length, -(-shown // LENGTH_STEP) * LENGTH_STEP)
                groups.setdefault(padded, {})[key] = text, shown
        total = sum(len(group) for group in groups.values())
        if not total:
            return
        with Progress(f"{name}: texts", total, "texts") as progress:
            try:
                for padded in sorted(groups):
                    items = list(groups[padded].items())
                    for start in range(0, len(items), self.batch_size):
                        batch = items[start : start + self.batch_size]
                        keys = [key for key, _ in batch]
                        features, norms = self._embed_texts([row for _, row in batch], padded)
                        self._keep(self._texts, keys, features)
                        self._keep(self._norms, keys, norms)
                        progress.update(len(batch))
            finally:
                self.flush()

    def flush(self) -> None:
        """Writes what was computed and not written yet, and forgets what still waits to be computed."""
        finished, self._finished, self._waiting = self._finished, [], []
        for table in {id(owner): owner for owner, _, _ in finished}.values():
            mine = [(keys, values) for owner, keys, values in finished if owner is table]
            table.add([key for keys, _ in mine for key in keys], np.concatenate([values for _, values in mine]))

    def lacks(self, file: ImageFile, box: Box | None, sentences: Sequence[str], patches: bool = False) -> bool:
        """Whether the image or crop has to be computed, for itself, for its patches' similarity with a sentence, or, if
        `patches`, for these themselves."""
        keys = [_patch_key(file, text) for text in sentences]
        return (
            _image_key(file, box) not in self._images
            or any(key not in self._patches for key in keys)
            or (patches and _tokens_key(file) not in self._tokens)
        )

    def push(
        self, file: ImageFile, box: Box | None, pixels: np.ndarray, sentences: Sequence[str], patches: bool = False
    ) -> None:
        """Takes an image that the store lacks as uint8 [3, P, P], and computes as soon as a batch is full."""
        lacking = [text for text in sentences if _patch_key(file, text) not in self._patches]
        self._waiting.append(_Waiting(file, box, pixels, lacking, patches and _tokens_key(file) not in self._tokens))
        if len(self._waiting) == self.batch_size:
            self.compute()

    def compute(self) -> None:
        """Computes the images that wait."""
        batch, self._waiting = self._waiting, []
        if not batch:
            return
        begin = time.perf_counter()
        with self._running():
            pixels = torch.from_numpy(np.stack([one.pixels for one in self._filled(batch)])).to(self.device, non_blocking=True)
            encoded = self.clip(images=normalised(pixels, self.clip.mean, self.clip.std))
            features = finite(encoded.image_features[: len(batch)].float().cpu())
            self._keep(self._images, [_image_key(one.file, one.box) for one in batch], features.numpy())
            asked = [(row, text) for row, one in enumerate(batch) for text in one.sentences]
            if asked:
                keys = [_patch_key(batch[row].file, text) for row, text in asked]
                self._keep(self._patches, keys, self._similarities(encoded.image_tokens, asked).numpy())
            kept = [row for row, one in enumerate(batch) if one.patches]
            if kept:
                patches = finite(self.clip.project_patches(encoded.image_tokens).float().cpu()[kept])
                self._keep(self._tokens, [_tokens_key(batch[row].file) for row in kept], patches.flatten(1).numpy())
        self.seconds += time.perf_counter() - begin

    def _similarities(self, tokens: Tensor, asked: Sequence[tuple[int, str]]) -> Tensor:
        """[S, N], of sentences (row of the batch, text) with the patches of their images; tokens [B, N, W]."""
        rows = torch.tensor([row for row, _ in asked])
        counts = rows.bincount(minlength=len(tokens))
        slots = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]  # of each sentence among those of its image
        # sentences are few and patches many: these are laid out by image, so that no patch is copied for each sentence
        sentences = torch.zeros(len(tokens), int(counts.max()), self.clip.embed_dim)
        sentences[rows, slots] = self.texts([text for _, text in asked])[0]
        patches = self.clip.project_image(tokens).double()  # [B, N, D]
        # in float64: what is rounded to float32 then does not depend on how many sentences the batch has
        found = patches @ sentences.to(self.device).double().transpose(1, 2)  # [B, N, most sentences of an image]
        return found.float().cpu()[rows, :, slots]

    def _embed_texts(self, batch: Sequence[tuple[str, int]], padded: int) -> tuple[np.ndarray, np.ndarray]:
        """Features [B, D] of texts with the number of tokens to show of each, padded to the same length; and the norms [B, 1]
        that they had."""
        begin = time.perf_counter()
        filled = self._filled(batch)
        tokens = torch.zeros(len(filled), padded, dtype=torch.int64)
        for row, (text, shown) in enumerate(filled):
            tokens[row, :shown] = tokenize([text], shown)[0][0]
        with self._running():
            encoded = self.clip(tokens=tokens.to(self.device))
            features = finite(encoded.text_features[: len(batch)].float().cpu()).numpy()
            norms = encoded.text_queries[: len(batch)].float().norm(dim=1, keepdim=True).cpu().numpy()
        self.seconds += time.perf_counter() - begin
        return features, norms

    def _filled(self, batch: Sequence) -> list:
        """The batch with its last row repeated up to a size at which no row depends on the others."""
        full = self.device.type != "cpu"
        size = self.batch_size if full else max(LEAST_ROWS, 1 << (len(batch) - 1).bit_length())
        return [*batch, *[batch[-1]] * (size - len(batch))]

    def _keep(self, table: FeatureTable, keys: list[bytes], values: np.ndarray) -> None:
        new = np.array([key not in table for key in keys])
        self._finished.append((table, [key for key, fresh in zip(keys, new, strict=True) if fresh], values[new]))
        if sum(len(kept) for owner, kept, _ in self._finished if owner is table) >= table.shard_rows:
            self.flush()

    def _table(self, kind: str, width: int) -> FeatureTable:
        return FeatureTable(self.folder / kind if self.folder else None, width)

    def _running(self) -> AbstractContextManager[None]:
        self.clip.to(self.device).eval()
        return arithmetic(self.precision, self.device)

    def _limit(self, tokens: int | None) -> int:
        return min(tokens or self.context_length, self.context_length)

    def _text_keys(self, texts: Sequence[str], tokens: int | None, lengths: np.ndarray) -> list[bytes]:
        return [self._text_key(text, tokens, length) for text, length in zip(texts, lengths.tolist(), strict=True)]

    def _text_key(self, text: str, tokens: int | None, length: int) -> bytes:
        # a text that is not cut off is the same whatever the limit
        limit = self._limit(tokens)
        return _key("text", text, str(limit) if length > limit else "")


class _Waiting(NamedTuple):
    file: ImageFile
    box: Box | None
    pixels: np.ndarray  # uint8 [3, P, P]
    sentences: list[str]
    patches: bool  # whether they are kept


class _Job(NamedTuple):
    file: ImageFile
    parts: dict[Box | None, list[str]]  # what to show of it, and the sentences to hold against the patches


def embed_images(
    stores: Sequence[FeatureStore],
    files: Sequence[ImageFile],
    crops: Iterable[tuple[int, Box | None]] = (),
    sentences: Iterable[tuple[int, str]] = (),
    name: str = "features",
    patches: Collection[FeatureStore] = (),
) -> None:
    """Computes what each store lacks: the images and crops (row of `files`, box or None for the whole), the similarity of
    sentences (row of `files`, text) with the patches of whole images, and, in the stores named by `patches`, the projected
    patches of all `files`.

    An image is decoded once for all stores and parts, and stores that see it through the same view share the pixels.
    Raises DataError as `FeatureStore.images`.
    """
    keeping = {id(store) for store in patches}

    def lacks(store: FeatureStore, file: ImageFile, box: Box | None, texts: Sequence[str]) -> bool:
        return store.lacks(file, box, texts, box is None and id(store) in keeping)

    if keeping:
        crops = [*crops, *((row, None) for row in range(len(files)))]
    jobs = [
        _Job(file, part)
        for file, parts in _asked(files, crops, sentences)
        if (part := {box: texts for box, texts in parts.items() if any(lacks(store, file, box, texts) for store in stores)})
    ]
    if not jobs:
        return
    for store in stores:
        store.add_texts([(text, None) for job in jobs for texts in job.parts.values() for text in texts], name)
    clips = {_view(store): store.clip for store in stores}
    checked = any(store.folder is not None for store in stores)
    with Progress(f"{name}: images", len(jobs), "images") as progress:
        try:
            for job, shown in _decoded(jobs, clips, checked, BATCHES_AHEAD * max(store.batch_size for store in stores)):
                for (box, texts), pixels in zip(job.parts.items(), shown, strict=True):
                    for store in stores:
                        if lacks(store, job.file, box, texts):
                            store.push(job.file, box, pixels[_view(store)], texts, box is None and id(store) in keeping)
                progress.update()
            for store in stores:
                store.compute()
        finally:
            for store in stores:
                store.flush()


def store_key(clip: Clip, precision: str) -> str:
    """What a folder of features is named by: all that they depend on, beside the images and texts."""
    package = Path(fast_goal.__file__).parent
    code = tree_digest(package, lambda path: path.relative_to(package).as_posix() in CODE)
    return digest([model_digest(clip), clip.config, precision, code])


def pixel_box(xyxy: Sequence[float], size: tuple[int, int]) -> Box:
    """The whole pixels that a box touches, in an image of (width, height)."""
    x1, y1, x2, y2 = touched(np.asarray(xyxy), *size)[0].tolist()
    return x1, y1, x2, y2


def _asked(
    files: Sequence[ImageFile], crops: Iterable[tuple[int, Box | None]], sentences: Iterable[tuple[int, str]]
) -> Iterable[_Job]:
    """What is asked for of each file; the same file under two ids is one."""
    jobs: dict[str, _Job] = {}
    for row, box, texts in [*((row, box, []) for row, box in crops), *((row, None, [text]) for row, text in sentences)]:
        parts = jobs.setdefault(files[row].content, _Job(files[row], {})).parts
        parts.setdefault(box, []).extend(texts)
    return jobs.values()


def _view(store: FeatureStore) -> tuple[int, str]:
    """Models with the same one see the same pixels (before they are normalised)."""
    return store.clip.image_size, store.clip.view_mode


def _decoded(
    jobs: Sequence[_Job], clips: Mapping[tuple[int, str], Clip], checked: bool, ahead: int
) -> Iterator[tuple[_Job, list[dict[tuple[int, str], np.ndarray]]]]:
    """Each job with the pixels of its parts by view, decoded by threads `ahead` of the one who asks."""
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        waiting: deque[Future] = deque()
        for number, job in enumerate(jobs):
            for following in jobs[number + len(waiting) : number + ahead]:
                waiting.append(pool.submit(_pixels, following, clips, checked))
            yield job, waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pixels(job: _Job, clips: Mapping[tuple[int, str], Clip], checked: bool) -> list[dict[tuple[int, str], np.ndarray]]:
    image = _opened(job.file, checked)
    parts = [image if box is None else image.crop(box) for box in job.parts]
    return [
        {view: np.asarray(clip.view(*part.size).pixels(part)).transpose(2, 0, 1) for view, clip in clips.items()}
        for part in parts
    ]


def _opened(file: ImageFile, checked: bool) -> Image.Image:
    """The image, held against what the records know of it."""
    try:
        content = file.path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file.path}: the image file does not exist") from None
    except OSError as error:
        raise DataError(f"{file.path}: the image cannot be opened ({error.strerror or error})") from None
    image = open_image(file.path, content)
    if image.size != file.size or (checked and hashlib.sha256(content).hexdigest() != file.content):
        raise DataError(
            f"{file.path}: the file was changed since the step `download` looked at it. Run `fast-goal download` again."
        )
    return image


def _remove_unused(folder: Path) -> None:
    """Notes that the folder is in use, and removes its neighbours that were not for KEEP_DAYS."""
    with contextlib.suppress(OSError):  # a disk that cannot be written costs the store, not the run
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "used").touch()
        for used in folder.parent.glob("*/used"):
            if time.time() - used.stat().st_mtime > KEEP_DAYS * 86400:
                shutil.rmtree(used.parent, ignore_errors=True)


def _image_key(file: ImageFile, box: Box | None) -> bytes:
    return _key("image", file.content, "" if box is None else str(box))


def _tokens_key(file: ImageFile) -> bytes:
    return _key("tokens", file.content)


def _patch_key(file: ImageFile, sentence: str) -> bytes:
    return _key("patches", file.content, sentence)


def _key(*parts: str) -> bytes:
    # surrogatepass: a caption may hold half a character pair, which is no UTF-8
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()[:16]


def _shard_name(packed: np.ndarray, values: np.ndarray) -> str:
    hasher = hashlib.sha256(packed.tobytes())
    hasher.update(np.ascontiguousarray(values).data)
    return hasher.hexdigest()[:32]
