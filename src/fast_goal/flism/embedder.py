"""Crops and sentences through CLIP in full batches, without a wait for the device between them.

`K` crops, `T` texts, `L` tokens, `D` embedding width, `I` side of CLIP's input in pixels.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fast_goal.data import captions
from fast_goal.data.captions import tokenize
from fast_goal.model.clip import Clip
from fast_goal.model.inference import arithmetic, finite

REMEMBERED_SENTENCES = 10_000  # embeddings kept for sentences that come again: 20 MB at a width of 512; the cache has all


class Embedder:
    """CLIP on `device`. Embeddings come back on the CPU in float32, where matching is cheapest."""

    def __init__(self, clip: Clip, device: torch.device, batch_size: int, precision: str = "fp32"):
        self._clip, self._device, self._batch_size = clip, device, batch_size
        self._arithmetic = partial(arithmetic, precision, device)
        view = clip.view(8, 8)
        self.input_side = view.size
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(view.mean, dtype=torch.float32).view(shape).to(device)
        self._std = torch.tensor(view.std, dtype=torch.float32).view(shape).to(device)
        self._waiting: list[Tensor] = []
        self._count = 0
        self._outputs: list[Tensor] = []  # on the device
        self._known: OrderedDict[str, tuple[Tensor, bool]] = OrderedDict()  # text -> embedding, whether it was truncated

    def add(self, crops: Tensor) -> None:
        """Takes crops, uint8 [K, I, I, 3], and embeds as many as fill whole batches."""
        self._waiting.append(crops)
        self._count += len(crops)
        if self._count < self._batch_size:
            return
        together = torch.cat(self._waiting)
        whole = self._count // self._batch_size * self._batch_size
        for batch in together[:whole].split(self._batch_size):
            self._outputs.append(self._embed(batch))
        self._waiting, self._count = [together[whole:]], self._count - whole

    def flush(self) -> Callable[[], Tensor]:
        """Embeds what still waits. Returns a function that gives the embeddings of all crops since the last flush,
        [sum of K, D], when the device has them. It raises ModelError for embeddings that are not finite."""
        if self._count:
            self._outputs.append(self._embed(torch.cat(self._waiting)))
        outputs, self._outputs, self._waiting, self._count = self._outputs, [], [], 0
        if not outputs:
            return lambda: torch.zeros(0, self._clip.embed_dim)
        with self._arithmetic():
            return self._fetch(torch.cat(outputs).float())

    def sentences(
        self,
        texts: Sequence[str],
        stored: Callable[[list[str]], Mapping[str, tuple[np.ndarray, bool]]],
        tokens: Mapping[str, tuple[np.ndarray, int]],
    ) -> tuple[dict[str, tuple[Tensor, bool]], list[str]]:
        """The embedding [D] of every different text, with whether it is longer than the context and was cut off; and
        the texts that were embedded now.

        `stored` is asked for texts that are not remembered. `tokens` may hold the ids of texts (uint16 [L], length of
        the whole text) and saves the tokenisation.
        """
        with self._arithmetic():
            return self._sentences(texts, stored, tokens)

    def _sentences(self, texts: Any, stored: Any, tokens: Any) -> tuple[dict[str, tuple[Tensor, bool]], list[str]]:
        different = list(dict.fromkeys(texts))
        absent = [text for text in different if text not in self._known]
        for text, (vector, truncated) in (stored(absent) if absent else {}).items():
            self._known[text] = torch.from_numpy(vector.copy()), truncated
        new = [text for text in absent if text not in self._known]
        if new:
            ids, lengths = self._tokens(new, tokens)
            order = sorted(range(len(new)), key=lambda index: (lengths[index], index))  # equal lengths waste no padding
            outputs = []
            for start in range(0, len(order), self._batch_size):
                batch = captions.trim(ids[order[start : start + self._batch_size]])
                outputs.append(self._clip.encode_text(self._to_device(batch)))
            embedded = self._fetch(torch.cat(outputs).float())()
            for row, index in enumerate(order):
                self._known[new[index]] = embedded[row], lengths[index] > self._clip.context_length
        for text in different:
            self._known.move_to_end(text)
        found = {text: self._known[text] for text in different}
        while len(self._known) > REMEMBERED_SENTENCES:
            self._known.popitem(last=False)
        return found, new

    def _tokens(self, texts: list[str], known: Mapping[str, tuple[np.ndarray, int]]) -> tuple[Tensor, list[int]]:
        width = self._clip.context_length
        absent = [text for text in texts if text not in known]
        made, counts = tokenize(absent, width) if absent else (torch.zeros(0, width, dtype=torch.int64), torch.zeros(0))
        rows = {text: (row, int(count)) for text, row, count in zip(absent, made, counts, strict=True)}
        ids = torch.zeros(len(texts), width, dtype=torch.int64)
        lengths = []
        for index, text in enumerate(texts):
            row, length = rows[text] if text in rows else known[text]
            ids[index, : len(row)] = row if isinstance(row, Tensor) else torch.from_numpy(row.astype(np.int64))
            lengths.append(length)
        return ids, lengths

    def _embed(self, crops: Tensor) -> Tensor:
        with self._arithmetic():
            pixels = self._to_device(crops).permute(0, 3, 1, 2).contiguous().to(torch.float32)
            # bytes travel to the device, and are normalised there with the operations of View.apply, in their order
            return self._clip.encode_image(pixels.div_(255).sub_(self._mean).div_(self._std))

    def _to_device(self, values: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def _fetch(self, values: Tensor) -> Callable[[], Tensor]:
        if values.device.type != "cuda":
            return lambda: finite(values.cpu())
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(values.device))

        def wait() -> Tensor:
            done.synchronize()
            return finite(host.clone())  # pinned memory is scarce: it is not kept in results

        return wait


def pixel_boxes(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """The pixels that boxes [K, 4] touch, int32 [K, 4]: rounded outwards, in the image, at least one (as `images.crop`)."""
    limit = np.array([width, height])
    low = np.clip(np.floor(boxes[:, :2]), 0, limit - 1)
    high = np.maximum(np.minimum(np.ceil(boxes[:, 2:]), limit), low + 1)
    return np.concatenate([low, high], axis=1).astype(np.int32)


def cut(image: Image.Image, size: tuple[int, int], boxes: np.ndarray, clip: Clip) -> tuple[Tensor, list[int]]:
    """The pixel boxes [K, 4] of an image of `size` (width, height) as CLIP's input before normalisation, uint8
    [different crops, I, I, 3], and for each box its crop. `image` may be the picture decoded smaller than `size`.

    Crops that are the same to the last bit are one, so that they get the same embedding: a tie, which goes to the first.
    """
    across, down = image.width / size[0], image.height / size[1]
    known: dict[int, list[int]] = {}  # by checksum
    crops: list[np.ndarray] = []
    crop_of = []
    for x1, y1, x2, y2 in boxes.tolist():
        if image.size != size:
            x1, y1 = min(math.floor(x1 * across), image.width - 1), min(math.floor(y1 * down), image.height - 1)
            x2, y2 = max(min(math.ceil(x2 * across), image.width), x1 + 1), max(min(math.ceil(y2 * down), image.height), y1 + 1)
        piece = image.crop((x1, y1, x2, y2))
        pixels = np.array(clip.view(*piece.size).pixels(piece))
        same = known.setdefault(zlib.crc32(pixels), [])
        number = next((index for index in same if np.array_equal(crops[index], pixels)), len(crops))
        if number == len(crops):
            same.append(number)
            crops.append(pixels)
        crop_of.append(number)
    return torch.from_numpy(np.stack(crops)), crop_of


def decoding_scale(boxes: np.ndarray, input_side: int) -> int:
    """The largest of 8, 4, 2 and 1 at which the short side of each pixel box [K, 4] keeps at least twice the model's
    input: below that, the decoder's reduction would show in the resized crop."""
    shortest = int((boxes[:, 2:] - boxes[:, :2]).min())
    return next((scale for scale in (8, 4, 2) if shortest >= 2 * input_side * scale), 1)
