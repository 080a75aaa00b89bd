"""What a batch shows of its samples: the whole image and crops of it, as uint8 views made from one decoding of the image.

Letters: N samples, M local pairs of all of them, B and P those of a batch, S side of a view.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from fast_goal.data.images import View, open_image, plain_jpeg, touched
from fast_goal.errors import DataError


class Source(Protocol):
    """Where the images' files are, by the number of the sample."""

    def path(self, index: int) -> Path:
        """What errors call the file."""

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises DataError, naming it."""

    def state(self, index: int) -> str:
        """Changes with the file, as far as can be told without reading it."""


class Files:
    """Image files of their own."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def path(self, index: int) -> Path:
        """The file."""
        return self._paths[index]

    def read(self, index: int) -> bytes:
        """The file's bytes. Raises DataError, naming it."""
        path = self._paths[index]
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: the image file does not exist") from None
        except OSError as error:
            raise DataError(f"{path}: the image cannot be opened ({error.strerror or error})") from None

    def state(self, index: int) -> str:
        """Path, size and time of the last change."""
        path = self._paths[index]
        try:
            found = path.stat()
        except OSError:
            return str(path)  # what is wrong is said when it is read
        return f"{path}|{found.st_size}|{found.st_mtime_ns}"


class Views:
    """The views of all samples and of their local pairs.

    sizes [N, 2]: width and height that the records give. crops [M, 4]: boxes in pixels of the original; those of sample i
    are the rows first[i] to first[i + 1]. `view` is of any size. hashes: SHA-256 of the files, where the records have it.
    `scaled` decodes a JPEG at 1/2, 1/4 or 1/8 of its sides where all of its views are at most as large as that.
    """

    def __init__(
        self,
        source: Source,
        sizes: np.ndarray,
        view: View,
        first: np.ndarray,
        crops: np.ndarray,
        hashes: Sequence[str] | None = None,
        scaled: bool = False,
    ):
        self.source, self.sizes, self.first, self.hashes, self.scaled = source, sizes, first, hashes, scaled
        self._view, self.size, self.mode = view, view.size, view.mode
        self.owner = np.repeat(np.arange(len(sizes)), np.diff(first))  # [M]
        self.crops = touched(crops, sizes[self.owner, 0], sizes[self.owner, 1])  # int64 [M, 4]

    def boxes(self, index: int) -> np.ndarray:
        """Whole pixels [1 + pairs, 4]: the image, then the crops."""
        width, height = self.sizes[index]
        return np.concatenate([[[0, 0, width, height]], self.crops[self.first[index] : self.first[index + 1]]])

    def view(self, box: Sequence[int]) -> View:
        """How the part `box` of an image becomes S x S pixels."""
        x1, y1, x2, y2 = (int(edge) for edge in box)
        return dataclasses.replace(self._view, width=x2 - x1, height=y2 - y1)

    def scale(self, index: int) -> int:
        """1, 2, 4 or 8: of 1 / scale of its sides the sample's image may be, so that no view enlarges it because of that."""
        if not self.scaled:
            return 1
        views = [self.view(box) for box in self.boxes(index).tolist()]
        for scale in (8, 4, 2):
            if all(view.resized[0] * scale <= view.width and view.resized[1] * scale <= view.height for view in views):
                return scale
        return 1

    def of(self, index: int, content: bytes | None = None) -> Iterator[np.ndarray]:
        """uint8 [3, S, S] of the sample's image and of each of its crops. `content`: the file's bytes where they are at hand.

        Raises DataError for an image that cannot be read or is of another size than the records say.
        """
        scale, path = self.scale(index), self.source.path(index)
        width, height = self.sizes[index].tolist()
        content = self.source.read(index) if content is None else content
        if (width % scale or height % scale) and plain_jpeg(path, content) is None:
            scale = 1  # a picture that EXIF rotates may have its incomplete pixels at the left or at the top
        image = open_image(path, content, scale)
        if image.size == (width, height):  # no JPEG, or scale 1
            scale = 1
        if image.size != (-(-width // scale), -(-height // scale)):
            raise self.changed(index, *image.size, scale)
        for box in self.boxes(index).tolist():
            yield np.asarray(self._pixels(image, box, scale)).transpose(2, 0, 1)

    def _pixels(self, image: Image.Image, box: list[int], scale: int) -> Image.Image:
        if scale == 1:
            return self.view(box).pixels(image if box == [0, 0, *image.size] else image.crop(box))
        edges = np.array(box) / scale
        outer = touched(edges, *image.size)[0]  # what lies beside the box must not mix into its edges
        part = tuple((edges - np.tile(outer[:2], 2)).tolist())
        return self.view(box).pixels(image.crop(outer.tolist()), part)

    def changed(self, index: int, width: int, height: int, scale: int = 1) -> DataError:
        """The error of an image that was decoded with other sides than the records say."""
        expected = " x ".join(str(side) for side in self.sizes[index].tolist())
        part = f" at 1/{scale}" if scale > 1 else ""
        return DataError(
            f"{self.source.path(index)} is {width} x {height} pixels{part}, but the records say {expected}: the file was "
            "changed. Run `fast-goal download` again."
        )

    def checked(self, index: int) -> bytes:
        """The file's bytes, held against its hash. Raises DataError."""
        content = self.source.read(index)
        if self.hashes is not None and hashlib.sha256(content).hexdigest() != self.hashes[index]:
            raise DataError(
                f"{self.source.path(index)}: the records know another content: the file was changed. "
                "Run `fast-goal download` again."
            )
        return content

    def batch(self, indices: np.ndarray, pairs: np.ndarray) -> torch.Tensor:
        """uint8 [B+P, 3, S, S]: the images of the samples `indices` [B], then the crops of all their `pairs` [P]."""
        images = self.empty(len(indices) + len(pairs))
        rows = images.numpy()
        place = len(indices)
        for row, index in enumerate(indices.tolist()):
            whole, *crops = self.of(index)
            rows[row] = whole
            for crop in crops:
                rows[place] = crop
                place += 1
        return images

    def empty(self, count: int) -> torch.Tensor:
        """uint8 [count, 3, S, S], to be filled."""
        return torch.empty(count, 3, self.size, self.size, dtype=torch.uint8)
