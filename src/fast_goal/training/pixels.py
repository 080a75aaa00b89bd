"""The views of a training, kept on disk from their first decoding on: later epochs and later runs decode nothing.

    .fast_goal/pixels/images-<key>.views, crops-<key>.views, base-<key>.views

One file holds the images of a set of samples, one their crops, one those of a base trained from scratch; the key is a digest
of all that the pixels follow from. A file begins with a sum for each view (0: not there yet); its pixels lie in a slot of their
own behind these. The sum is written after the pixels, so that a killed writer leaves nothing that is taken for a view; after a
power cut, which may lose any page of the file, the sum does not fit what is left. Nothing here is precious: to free the space,
delete the folder.

Letters: B samples of a batch, P local pairs of them, K slots, S side of a view.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import features

from fast_goal.data.archives import locked
from fast_goal.errors import DataError
from fast_goal.training.views import Views

VERSION = 1  # of the files
_PAGE, _WORD = 4096, 8  # bytes
_GB = 10**9
_ODD = np.uint64(0x9E3779B97F4A7C15)  # any odd number
_WAYS = "Free some space, delete what older settings left in that folder, or set pixel_cache=false."


class Slots:
    """`count` slots of `size` bytes in the file `path`, of which each is empty or whole. Processes of one machine may read
    and write it at the same time, if they write the same."""

    def __init__(self, path: Path, count: int, size: int):
        self.path, self.count = path, count
        self._size, self._stride = size, -(-size // _WORD) * _WORD
        self._start = -(-count * _WORD // _PAGE) * _PAGE
        self.bytes = self._start + count * self._stride
        self._open: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_open": None}  # each process opens the file itself

    def __del__(self) -> None:
        if self._open is not None:
            os.close(self._open[0])

    @property
    def to_allocate(self) -> int:
        """Bytes of the disk that the file has not been given yet."""
        if self._allocated:
            return 0
        return max(0, self.bytes - (self.path.stat().st_blocks * 512 if self.path.exists() else 0))

    @property
    def _allocated(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self.bytes

    def allocate(self) -> None:
        """Makes the file, all of its space included: a full disk shows now, and not as a crash of whoever has it mapped."""
        if self._allocated:
            return
        made = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, self.bytes)
        except OSError:
            if made:
                self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    @property
    def filled(self) -> int:
        """How many slots are not empty."""
        return int(np.count_nonzero(self._maps()[1])) if self.count else 0

    def read(self, slots: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copies the slots [K] to `out` [K, size] and returns which of them hold something whole, bool [K]."""
        if not len(slots):
            return np.zeros(0, dtype=bool)
        _, sums, rows = self._maps()
        if self._stride == self._size:
            found = np.take(rows, slots, axis=0, out=out, mode="clip")  # another mode would copy twice
        else:
            found = rows[slots]
            out[:] = found[:, : self._size]
        return _sums(found, slots) == sums[slots]

    def write(self, slot: int, values: np.ndarray) -> None:
        """Fills a slot. Raises DataError where the disk does not take it."""
        row = np.zeros((1, self._stride), dtype=np.uint8)
        row[0, : self._size] = values.reshape(-1)
        descriptor, *_ = self._maps()
        try:
            _write(descriptor, row, self._start + slot * self._stride)
            _write(descriptor, _sums(row, np.array([slot])), slot * _WORD)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror or error}). {_WAYS}") from None

    def _maps(self) -> tuple[int, np.ndarray, np.ndarray]:
        """File descriptor, sums uint64 [count], slots uint8 [count, stride]."""
        if self._open is None:
            try:
                sums = np.memmap(self.path, np.uint64, "r", 0, (self.count,))
                rows = np.memmap(self.path, np.uint8, "r", self._start, (self.count, self._stride))
                # as plain arrays: what is computed from a memmap is one too
                self._open = os.open(self.path, os.O_RDWR), np.asarray(sums), np.asarray(rows)
            except OSError as error:  # somebody has deleted it, or it belongs to another user
                reason = error.strerror or error
                raise DataError(f"{self.path}: the pixel cache cannot be opened ({reason}). Run the step again.") from None
        return self._open


class CachedViews:
    """The batches of `views`, to the last bit, from files in `folder` where they have them, else decoded and kept there.

    main: whether to print how large the files are. Raises DataError where the disk has no room for all views, before any is
    decoded.
    """

    def __init__(self, views: Views, folder: Path, main: bool = True):
        self._views = views
        images, crops = _keys(views)
        size = 3 * views.size**2
        self._images = Slots(folder / f"images-{images}.views", len(views.sizes), size)
        self._crops = Slots(folder / f"crops-{crops}.views", len(views.crops), size)
        files = [slots for slots in (self._images, self._crops) if slots.count]
        try:
            with locked(folder / "allocation"):  # else another process's files would count as lost space
                missing = sum(slots.to_allocate for slots in files)
                free = shutil.disk_usage(folder).free
                if missing > free:
                    raise OSError(f"{missing / _GB:,.2f} GB are needed, {free / _GB:,.2f} GB are free")
                for slots in files:
                    slots.allocate()
        except OSError as error:
            count = sum(slots.count for slots in files)
            raise DataError(
                f"{folder} cannot take {count:,} views of {size:,} bytes ({error.strerror or error}). {_WAYS}"
            ) from None
        if main:
            for what, slots in zip(("images", "crops"), files, strict=False):
                print(
                    f"pixel cache: {slots.count:,} {what} x {size:,} bytes = {slots.bytes / _GB:,.2f} GB in {slots.path}, "
                    f"{slots.filled:,} of them from earlier"
                )

    def batch(self, indices: np.ndarray, pairs: np.ndarray) -> torch.Tensor:
        """As Views.batch."""
        views, count = self._views, len(indices)
        images = views.empty(count + len(pairs))
        rows = images.numpy().reshape(len(images), -1)
        there = np.concatenate([self._images.read(indices, rows[:count]), self._crops.read(pairs, rows[count:])])
        if there.all():
            return images
        owner = np.repeat(np.arange(count), views.first[indices + 1] - views.first[indices])
        owners = np.concatenate([np.arange(count), owner])  # of each row
        for sample in np.unique(owners[~there]).tolist():
            index = int(indices[sample])
            own = np.flatnonzero(owners == sample).tolist()  # the image, then its crops
            for row, made in zip(own, views.of(index, views.checked(index)), strict=True):
                rows[row] = made.reshape(-1)
                if not there[row]:
                    slots, slot = (self._images, index) if row < count else (self._crops, int(pairs[row - count]))
                    slots.write(slot, made)
        return images


def _sums(rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """uint64 [K], never 0: tells rows uint8 [K, stride] from the same with any pages lost, and from those of other slots."""
    found = rows.view(np.uint64).sum(axis=1, dtype=np.uint64) + (slots.astype(np.uint64) + np.uint64(1)) * _ODD
    return np.where(found == 0, _ODD, found)


def _write(descriptor: int, values: np.ndarray, offset: int) -> None:
    data = memoryview(values).cast("B")
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _keys(views: Views) -> tuple[str, str]:
    """Digests of all that the pixels of the images, and of the crops, follow from."""
    common = f"{decoder()} {views.mode} {views.size}"
    images = []
    for index, (width, height) in enumerate(views.sizes.tolist()):
        state = views.source.state(index) if views.hashes is None else views.hashes[index]
        images.append(f"{state} {width}x{height} {views.scale(index)}")
    crops = (f"{images[index]} {box}" for index, box in zip(views.owner.tolist(), views.crops.tolist(), strict=True))
    return _digest(common, images), _digest(common, crops)


def decoder() -> str:
    """What the pixels of every file follow from: its layout, and the libraries that decode."""
    return f"{VERSION} {PIL.__version__} {features.version_feature('libjpeg_turbo')}"


def _digest(common: str, lines: Iterable[str]) -> str:
    hasher = hashlib.sha256(common.encode())
    for line in lines:
        hasher.update(f"\n{line}".encode("utf-8", "surrogateescape"))
    return hasher.hexdigest()[:16]
