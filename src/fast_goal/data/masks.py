"""Masks: PNG files of an image's size whose pixels are the numbers of classes.

A mask may have a palette (Pascal VOC), be grey (ADE20K, COCO-Stuff, Cityscapes) or have 16 bits; what counts is the number of
each pixel. Letters: H, W height and width of the mask in pixels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fast_goal.errors import DataError

IGNORED = -1
MOST = 1 << 16  # numbers that a pixel can be
_DEPTH, _KIND, _GREY = 24, 25, 0  # of a PNG file: the bytes of bits per pixel and of the kind of pixels, and the kind `grey`
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class NoMask(DataError):
    """An image whose pixels are no numbers of classes."""


def read_mask(path: Path | str, content: bytes | None = None) -> np.ndarray:
    """The numbers [H, W] of the pixels, uint8 or uint16; `content` are the file's bytes where they are at hand.

    Raises DataError for a file that is missing or damaged, NoMask for one that is no PNG or has colours for numbers.
    """
    path = Path(path)
    try:
        content = path.read_bytes() if content is None else content
    except FileNotFoundError:
        raise DataError(f"{path}: the mask does not exist") from None
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            mode = image.mode
            pixels = np.asarray(image)
    except Image.UnidentifiedImageError:
        raise NoMask(f"{path}: a mask has to be a PNG file") from None
    except _DAMAGED as error:
        raise DataError(f"{path}: the mask is damaged ({str(error) or type(error).__name__})") from None
    if mode == "1":
        return pixels.astype(np.uint8)
    if mode not in ("L", "P") and not mode.startswith("I"):
        raise NoMask(f"{path}: a mask has one number for each pixel, this is a picture of mode {mode}")
    if mode == "L" and content[_KIND] == _GREY and content[_DEPTH] < 8:
        pixels = pixels // (255 // ((1 << content[_DEPTH]) - 1))  # Pillow spreads 2 and 4 bits over the range of 8
    return pixels.astype(np.uint8 if mode in ("L", "P") else np.uint16)


class Numbers:
    """What the numbers in the masks of a suite mean: `values` of the classes, in the order of their names, and `ignored`."""

    def __init__(self, values: Sequence[int], ignored: Sequence[int]):
        self.values, self.ignored = list(values), list(ignored)
        unknown = len(self.values)
        table = np.full(MOST, unknown, dtype=np.int32)
        table[self.ignored] = IGNORED
        table[self.values] = np.arange(len(self.values))
        self._table, self._unknown = table, unknown

    @classmethod
    def of(cls, segments: Mapping[str, Sequence[Any]]) -> Numbers:
        """Of an entry of `data.records.Dataset.segments`."""
        return cls(segments["values"], segments["ignored"])

    def unknown(self, mask: np.ndarray) -> list[int]:
        """The numbers in the mask that are neither a class nor ignored, ascending."""
        found = np.flatnonzero(np.bincount(mask.ravel()))
        return found[self._table[found] == self._unknown].tolist()

    def classes(self, mask: np.ndarray, path: Path | str) -> np.ndarray:
        """int32 [H, W]: the place of each pixel's class among the names, IGNORED for those that do not count.
        Raises DataError for a number that means nothing."""
        found = self._table[mask]
        if (found == self._unknown).any():
            raise DataError(f"{path}: the numbers {self.unknown(mask)[:5]} are no class, and not among those to ignore")
        return found
