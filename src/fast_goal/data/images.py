"""Images: opening a file safely, and the one geometric view through which pixels and boxes both reach the model.

Letters: R boxes, S side of the model's input. Boxes are xyxy, x2 and y2 exclusive.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile

from fast_goal.errors import DataError

if TYPE_CHECKING:
    import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Formats of photographs. The others that Pillow knows are rare, and some start helper programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".avif"})

# What Pillow's decoders raise on damaged files, beside OSError (which covers UnidentifiedImageError).
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Beyond this ratio of the sides only the visible part is resized: a 1 x 10,000 strip would become 224 x 2,240,000.
_STRIP = 16


def open_image(path: Path | str, content: bytes | None = None, scale: int = 1) -> Image.Image:
    """The image as RGB, rotated as its EXIF says, fully decoded; `content` are the file's bytes where they are at hand.

    Transparency is laid over white, 16-bit grey is scaled to 8 bit; of an animation it is the first picture. `scale` 2, 4
    or 8: a JPEG is decoded with sides of 1 / scale (rounded up), which is quicker; other formats come in full.
    Raises DataError, with the file and the reason, for a file that is missing, empty, truncated, no image, or so large
    that it may be a decompression bomb.
    """
    with _opened(path, content) as image:
        orientation = _orientation(image)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        try:
            image.load()
        except _DAMAGED as error:
            raise DataError(f"{path}: the image is truncated or damaged ({_reason(error)})") from None
        except MemoryError:
            raise DataError(f"{path}: the image ({image.width} x {image.height}) does not fit in memory") from None
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
        try:
            return _to_rgb(image)
        except _DAMAGED as error:
            raise DataError(f"{path}: pixels of mode {image.mode} cannot be turned into RGB ({_reason(error)})") from None


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) after the EXIF rotation, from the file's header alone. Raises DataError as `open_image` does,
    except for damage that only decoding would find."""
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def plain_jpeg(path: Path | str, content: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that any decoder takes for the same picture: grey or YCbCr, upright and complete; else None.
    Read from the header and the mark of the end alone. Raises DataError as `image_size` does."""
    with _opened(path, content) as image:
        # of other colour spaces (CMYK, and RGB that is no YCbCr) each decoder has its own idea
        plain = image.format == "JPEG" and image.mode in ("L", "RGB") and image.info.get("adobe_transform", 1) == 1
        complete = content.rstrip(b"\0").endswith(b"\xff\xd9")
        return image.size if plain and complete and _orientation(image) == 1 else None


def crop(image: Image.Image, xyxy: tuple[float, float, float, float]) -> Image.Image:
    """The pixels that the box touches, see `touched`."""
    return image.crop(touched(np.asarray(xyxy), image.width, image.height)[0].tolist())


def touched(boxes: np.ndarray, width: int | np.ndarray, height: int | np.ndarray) -> np.ndarray:
    """The pixels that boxes [R, 4] touch, int64 [R, 4]: rounded outwards, clipped to the image, at least one pixel.
    width, height: of the one image, or [R] of the image of each box."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    sides = np.stack(np.broadcast_arrays(width, height), axis=-1)
    first = np.clip(np.floor(boxes[:, :2]), 0, sides - 1)
    last = np.maximum(np.minimum(np.ceil(boxes[:, 2:]), sides), first + 1)
    return np.concatenate([first, last], axis=1).astype(np.int64)


@dataclass(frozen=True)
class View:
    """One geometric view: original size -> the model's square input, for pixels and boxes alike.

    width, height: pixels of the original image. size: side S of the model's input.
    mode: `crop` resizes the short edge to S and keeps the centre (open_clip's evaluation transform); `squash` resizes
    both edges to S; `pad` resizes the long edge to S and centres the picture on black (open_clip's `longest`).
    """

    width: int
    height: int
    size: int
    mode: Literal["crop", "squash", "pad"] = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.size) < 1:
            raise ValueError(f"a view needs sides of at least 1 pixel: {self.width} x {self.height} -> {self.size}")
        if self.mode not in ("crop", "squash", "pad"):
            raise ValueError(f"view mode {self.mode!r}: expected crop, squash or pad")

    @property
    def resized(self) -> tuple[int, int]:
        """(width, height) of the whole image after resizing, before it is cropped or padded."""
        if self.mode == "squash":
            return self.size, self.size
        if self.mode == "pad":  # rounds as open_clip's ResizeKeepRatio
            ratio = max(self.width / self.size, self.height / self.size)
            return max(1, round(self.width / ratio)), max(1, round(self.height / ratio))
        if self.width <= self.height:  # truncates as torchvision's Resize
            return self.size, int(self.size * self.height / self.width)
        return int(self.size * self.width / self.height), self.size

    @property
    def offset(self) -> tuple[int, int]:
        """(left, top): what is cut off (positive) or added as a margin (negative), in input pixels."""
        width, height = self.resized
        if self.mode == "pad":
            return -((self.size - width) // 2), -((self.size - height) // 2)
        # round() goes to the even number, as torchvision's center_crop
        return round((width - self.size) / 2.0), round((height - self.size) / 2.0)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [R, 4] in pixels of the original -> float64 [R, 4] in input pixels, clipped to what is visible;
        a box of which nothing is visible is (0, 0, 0, 0)."""
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        sides = np.array([self.width, self.height, self.width, self.height], dtype=np.float64)
        scale = np.array(self.resized * 2, dtype=np.float64) / sides
        seen = np.clip(boxes, 0.0, sides) * scale - np.array(self.offset * 2, dtype=np.float64)
        seen = np.clip(seen, 0.0, float(self.size))
        visible = (seen[:, 2] > seen[:, 0]) & (seen[:, 3] > seen[:, 1])
        return np.where(visible[:, None], seen, 0.0)

    def box(self, xyxy: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """One box, as `boxes`."""
        x1, y1, x2, y2 = self.boxes(np.asarray(xyxy))[0].tolist()
        return x1, y1, x2, y2

    @property
    def strip(self) -> bool:
        """Whether the sides differ so much that only the visible part is resized."""
        return self.mode == "crop" and max(self.resized) > _STRIP * self.size

    def pixels(self, image: Image.Image, part: tuple[float, float, float, float] | None = None) -> Image.Image:
        """The view as an RGB picture of S x S pixels, bicubic. Raises ValueError for an image of another size.

        `part`: which part of `image`, in its pixels, is the original, where it was decoded at a smaller scale.
        """
        if part is None and image.size != (self.width, self.height):
            raise ValueError(f"the view is of an image of {self.width} x {self.height} pixels, not {image.size}")
        x1, y1, x2, y2 = part or (0, 0, *image.size)
        image = image.convert("RGB")
        resized, (left, top) = self.resized, self.offset
        window = (left, top, left + self.size, top + self.size)
        if self.strip:
            across, down = (x2 - x1) / resized[0], (y2 - y1) / resized[1]
            source = (x1 + left * across, y1 + top * down, x1 + window[2] * across, y1 + window[3] * down)
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=source)
        image = image.resize(resized, Image.Resampling.BICUBIC, box=(x1, y1, x2, y2))
        return image if image.size == (self.size, self.size) else image.crop(window)

    def apply(self, image: Image.Image) -> torch.Tensor:
        """The view as the model's input: float32 [3, S, S], normalised by `mean` and `std`.

        In the mode `crop` equal to open_clip's evaluation transform. Raises ValueError for an image of another size.
        """
        import torch

        pixels = torch.from_numpy(np.array(self.pixels(image))).permute(2, 0, 1).contiguous()  # uint8 [3, S, S]
        return normalised(pixels, self.mean, self.std)


def normalised(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 [..., 3, S, S] -> float32 of the same shape and device, normalised by `mean` and `std` of the channels."""
    import torch

    # filled where they are needed: to copy them there would wait for the device
    centre, spread = (
        torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=pixels.device) for value in values])
        for values in (mean, std)
    )
    return pixels.to(torch.float32).div_(255).sub_(centre).div_(spread)


def _opened(path: Path | str, content: bytes | None = None) -> ImageFile.ImageFile:
    """The file with its header read. The caller closes it."""
    path = Path(path)
    try:
        if (path.stat().st_size if content is None else len(content)) == 0:
            raise DataError(f"{path}: the file is empty (0 bytes)")
        return Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)
    except FileNotFoundError:
        raise DataError(f"{path}: the image file does not exist") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not an image of a known format ({', '.join(FORMATS)}); convert it to JPEG or PNG") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: the image is suspiciously large ({error}); scale it down") from None
    except _DAMAGED as error:
        raise DataError(f"{path}: the image cannot be opened ({_reason(error)})") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it is unreadable. To be asked before the pixels are
    loaded, because Pillow rotates a TIFF by itself on loading."""
    if image.format == "TIFF":
        return 1
    try:
        # The base class's method: that of PNG decodes the whole picture first.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit, in 16 or 32 bits of memory
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        background.alpha_composite(image)
        image = background
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return os.linesep.join(str(error).splitlines()[:1]) or type(error).__name__
