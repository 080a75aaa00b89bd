"""JPEG files decoded, resized and cropped on the GPU, a batch at a time; the worker processes only read them.

A picture that two decoders may see differently, or that the GPU does not know, is decoded by the worker: other formats,
CMYK, pictures that EXIF rotates, files without an end, strips, of which only a part is resized, and very large pictures.

Letters: B samples of a batch, E of them for the GPU, P local pairs, F views made by the worker, S side of a view.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from fast_goal.data.images import View, plain_jpeg
from fast_goal.errors import ConfigError
from fast_goal.training.views import Views

AT_ONCE = 2**28  # bytes of pictures decoded at once, a guess: more need memory that the model may want
MOST = 32  # times a side may shrink: what torch's kernel needs for more does not fit in 48 KB of shared memory
Decode = Callable[[list[torch.Tensor], torch.device], list[torch.Tensor]]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """The images of a batch as a worker hands them over.

    indices int64 [B]: the samples. content uint8: the E files one after the other, bounds int64 [E+1] between them, and
    on_gpu bool [B] says whose they are. made uint8 [F, 3, S, S]: the views of the other samples, each image and its crops.
    """

    indices: torch.Tensor
    on_gpu: torch.Tensor
    content: torch.Tensor
    bounds: torch.Tensor
    made: torch.Tensor


def encoded(views: Views, indices: np.ndarray) -> Encoded:
    """What the GPU needs to make the views of these samples [B]. Raises DataError for an image that cannot be used."""
    files: list[np.ndarray] = []
    on_gpu: list[bool] = []
    made: list[np.ndarray] = []
    for index in indices.tolist():
        content = views.source.read(index)
        size = plain_jpeg(views.source.path(index), content)
        if size is not None and size != tuple(views.sizes[index].tolist()):
            raise views.changed(index, *size)
        on_gpu.append(size is not None and all(_resizable(views.view(box)) for box in views.boxes(index)))
        if on_gpu[-1]:
            files.append(np.frombuffer(content, dtype=np.uint8))
        else:
            made += views.of(index, content)
    return Encoded(
        indices=torch.from_numpy(indices),
        on_gpu=torch.tensor(on_gpu),
        content=torch.from_numpy(np.concatenate([*files, np.empty(0, np.uint8)])),
        bounds=torch.tensor([0, *(len(file) for file in files)]).cumsum(0),
        made=torch.from_numpy(np.stack(made)) if made else views.empty(0),
    )


def _resizable(view: View) -> bool:
    width, height = view.resized
    return not view.strip and view.width <= MOST * width and view.height <= MOST * height


def torchvision_decode(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """JPEG files, uint8 on the CPU, to pictures uint8 [3, height, width] on `device`. Raises RuntimeError."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)


class GpuDecoder:
    """Makes the views of a batch, uint8 [B+P, 3, S, S] on `device`, of what `encoded` made. `decode` is for tests."""

    def __init__(self, views: Views, device: torch.device, decode: Decode = torchvision_decode):
        self._views, self._device, self._decode = views, device, decode
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._warned = False

    def __call__(self, encoded: Encoded) -> torch.Tensor:
        """Complete when it returns, so that a thread may call it beside the training. Raises DataError for a damaged image."""
        if self._stream is None:
            return self._made(encoded)
        with torch.cuda.stream(self._stream):
            images = self._made(encoded)
        self._stream.synchronize()
        return images

    def _made(self, encoded: Encoded) -> torch.Tensor:
        indices = encoded.indices.tolist()
        counts = np.diff(self._views.first)[indices]
        firsts = len(indices) + np.cumsum(counts) - counts  # row of each sample's first crop
        rows = [[row, *range(first, first + count)] for row, (first, count) in enumerate(zip(firsts, counts, strict=True))]
        images = self._views.empty(len(indices) + int(counts.sum())).to(self._device)
        others = [row for own, on_gpu in zip(rows, encoded.on_gpu.tolist(), strict=True) if not on_gpu for row in own]
        if others:
            images[torch.tensor(others, device=self._device)] = encoded.made.to(self._device)
        files = [encoded.content[low:high] for low, high in zip(encoded.bounds, encoded.bounds[1:], strict=False)]
        places = encoded.on_gpu.nonzero()[:, 0].tolist()
        chosen = [indices[place] for place in places]
        for low, high in self._chunks(chosen):
            pictures = self._pictures(chosen[low:high], files[low:high])
            for place, views in zip(places[low:high], pictures, strict=True):
                for row, made in zip(rows[place], views, strict=True):
                    images[row] = made
        return images

    def _chunks(self, indices: list[int]) -> Iterator[tuple[int, int]]:
        """From where to where, so that the pictures of a chunk have AT_ONCE bytes together; one at least."""
        first = size = 0
        for place, index in enumerate(indices):
            own = 3 * int(self._views.sizes[index].prod())
            if place > first and size + own > AT_ONCE:
                yield first, place
                first, size = place, 0
            size += own
        if first < len(indices):
            yield first, len(indices)

    def _pictures(self, indices: list[int], files: list[torch.Tensor]) -> Iterator[Iterator[torch.Tensor]]:
        """The views of each sample, those of its image first."""
        try:
            pictures = self._decode(files, self._device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if len(files) > 1:  # it does not say which file it means
                for index, file in zip(indices, files, strict=True):
                    yield from self._pictures([index], [file])
                return
            if not self._warned:
                reason = str(error).splitlines()[0]
                _log.warning("The GPU cannot decode some of the images (%s): they are decoded on the CPU.", reason)
                self._warned = True
            views = self._views.of(indices[0], files[0].numpy().tobytes())
            yield (torch.from_numpy(made.copy()) for made in views)
            return
        for index, picture in zip(indices, pictures, strict=True):
            if (picture.shape[2], picture.shape[1]) != tuple(self._views.sizes[index].tolist()):
                raise self._views.changed(index, picture.shape[2], picture.shape[1])
            boxes = self._views.boxes(index).tolist()
            yield (resized(picture[:, y1:y2, x1:x2], self._views.view([x1, y1, x2, y2])) for x1, y1, x2, y2 in boxes)


def resized(picture: torch.Tensor, view: View) -> torch.Tensor:
    """uint8 [3, height, width] -> [3, S, S]: `View.pixels`, but for how intermediate values are rounded."""
    (width, height), (left, top) = view.resized, view.offset
    if (height, width) != picture.shape[1:]:
        values = interpolate(picture[None].float(), size=(height, width), mode="bicubic", antialias=True)
        picture = values[0].round_().clamp_(0, 255).to(torch.uint8)
    # negative margins cut off
    return pad(picture, (-left, left + view.size - width, -top, top + view.size - height))


def check_gpu(device: torch.device, section: str) -> None:
    """Raises ConfigError where JPEG files cannot be decoded on `device`, with the name of the settings `section`."""
    wanted = f"{section}.decode = 'gpu'"
    if device.type != "cuda":
        raise ConfigError(f"{wanted} needs a CUDA device, and the training runs on {device.type!r}. Set it to cpu.")
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    try:
        torchvision_decode([torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)], device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{wanted}: torchvision does not decode JPEG files on this GPU ({reason}). Set it to cpu.") from None
