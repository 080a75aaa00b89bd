"""Zero-shot semantic segmentation: each pixel gets the class whose prompts its patches are most like.

The projected patch tokens of the whole image, made unit, are compared with the embeddings of the classes (`classes`); the
similarities are brought to the size of the mask, bilinear between the centres of the patches, and the largest wins. Nothing of
the model is changed for it. What a view does not show (the edges that `crop` cuts off) is not scored, and counted.

IoU of a class, over all pixels that count of all images: those of the class that were found, divided by those that are of the
class or were put into it. mIoU is its mean over the classes that are true or were found anywhere. Pixels that the masks ignore
count nowhere, whatever is found there.

Letters: `I` images, `C` classes, `N` patches in row-major order, `h` of them in a row or column, `D` embedding width, `H`, `W`
height and width of a mask in pixels, `G` groups of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fast_goal.data.images import View
from fast_goal.data.masks import IGNORED, Numbers, read_mask
from fast_goal.errors import DataError
from fast_goal.evaluation.bootstrap import DRAWS_AT_ONCE, ENUMERATED, LEVEL
from fast_goal.evaluation.features import FeatureStore, ImageFile

NOTHING = IGNORED  # in a map of classes: what does not count, or is not seen
SCORES_AT_ONCE = 1 << 23  # of pixels with classes: 32 MB; a guess
TOKENS_AT_ONCE = 1 << 23  # numbers of patch tokens held in memory: 32 MB; a guess
PIXELS_AT_ONCE = 1 << 24  # of true masks held in memory: 64 MB; a guess
COINS_AT_ONCE = 4096  # rows of counts held in memory where all coins are gone through; a guess
SIGNS = 10_000  # drawn for the p-value, as many as `bootstrap.paired_test` draws


class Counts(NamedTuple):
    """Pixels of each image by class, int64 [I, C] each."""

    hits: np.ndarray  # true, and found
    truth: np.ndarray  # true
    found: np.ndarray  # found, where the truth is of any class


def class_map(similarity: Tensor, view: View, patch_size: int) -> Tensor:
    """The class of each pixel of the original image: int64 [H, W], NOTHING where the view does not show it.

    Of equal classes the first wins.

    Args:
        similarity: [N, C], of the patches of the view with the classes.
        view: of the image.
        patch_size: in input pixels.
    """
    side = view.size // patch_size
    classes, scores = _contenders(similarity.T.reshape(-1, side, side))  # [K], [K, h, h]
    rows, top = _weights(view.height, view.resized[1], view.offset[1], view.size, patch_size)  # [V, h]
    columns, left = _weights(view.width, view.resized[0], view.offset[0], view.size, patch_size)
    rows, columns = rows.to(scores), columns.to(scores)
    found = torch.full((view.height, view.width), NOTHING, dtype=torch.int64, device=scores.device)
    band = max(1, SCORES_AT_ONCE // (len(scores) * max(1, len(columns))))
    for start in range(0, len(rows), band):
        part = torch.einsum("vh,khw->kvw", rows[start : start + band], scores) @ columns.T  # [K, v, V]
        place = top + start
        found[place : place + part.shape[1], left : left + len(columns)] = classes[part.max(0).indices]
    return found


def image_counts(found: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """The rows of Counts of one image, int64 [3, C]. found, truth: [H, W], classes or NOTHING."""
    scored = (truth != NOTHING) & (found != NOTHING)
    found, truth = found[scored], truth[scored]
    return np.stack([np.bincount(part, minlength=classes) for part in (truth[found == truth], truth, found)]).astype(np.int64)


def read_truth(path: Path, content: str, numbers: Numbers, size: tuple[int, int]) -> np.ndarray:
    """The true classes [H, W] of an image of (width, height), NOTHING where they do not count. content: SHA-256 of the file.
    Raises DataError for a file that cannot be read or is not the one that the step `download` looked at."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: the mask does not exist") from None
    except OSError as error:
        raise DataError(f"{path}: the mask cannot be opened ({error.strerror or error})") from None
    mask = read_mask(path, found)
    if mask.shape[::-1] != size or hashlib.sha256(found).hexdigest() != content:
        raise DataError(f"{path}: the mask was changed since the step `download` looked at it. Run `fast-goal download` again.")
    return numbers.classes(mask, path)


def class_maps(store: FeatureStore, files: Sequence[ImageFile], classes: Tensor) -> Iterator[np.ndarray]:
    """The map [H, W] of each image, as `class_map`; classes [C, D]. All patch tokens are held in memory: give some images at a
    time (`some_at_once`). A map is made when it is asked for."""
    clip, device = store.clip, store.device
    patches = F.normalize(store.tokens(files).to(device), dim=-1)  # [I, N, D]
    similarity = patches @ classes.to(device).T  # [I, N, C]
    for own, file in zip(similarity, files, strict=True):
        yield class_map(own, clip.view(*file.size), clip.patch_size).cpu().numpy()


def some_at_once(stores: Iterable[FeatureStore], pixels: Sequence[int]) -> Iterator[range]:
    """All images in parts, of which patch tokens and true masks may be held in memory. pixels: of the mask of each image."""
    most = min(TOKENS_AT_ONCE // (store.patch_count * store.clip.embed_dim) for store in stores)
    start = held = 0
    for place, own in enumerate(pixels):
        if start < place and (place - start >= most or held + own > PIXELS_AT_ONCE):
            yield range(start, place)
            start, held = place, 0
        held += own
    if start < len(pixels):
        yield range(start, len(pixels))


def measures(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`mIoU` and `pixel_accuracy` in percent, [...], of summed counts [..., 3, C]; NaN where nothing is scored."""
    hits, truth, _ = np.moveaxis(counts, -2, 0)
    iou, there = class_iou(counts)
    with np.errstate(invalid="ignore"):
        means = 100 * np.where(there, iou, 0.0).sum(-1) / there.sum(-1)
        accuracy = 100 * hits.sum(-1) / truth.sum(-1)
    return {"mIoU": means, "pixel_accuracy": accuracy}


def class_iou(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The IoU [..., C], 0 to 1, of summed counts [..., 3, C], and whether a class is true or found anywhere, bool [..., C]."""
    hits, truth, found = np.moveaxis(counts, -2, 0)
    union = truth + found - hits
    return hits / np.maximum(union, 1), union > 0


def chance(truth: np.ndarray) -> dict[str, float]:
    """The measures, in percent, to expect of pixels that are put into classes at random. truth: [C], pixels of each class."""
    share = truth / truth.sum()
    each = 1 / len(truth)
    iou = share * each / (share + each - share * each)
    return {"mIoU": 100 * float(iou.mean()), "pixel_accuracy": 100 * each}


def differences(mine: Counts, other: Counts, groups: np.ndarray, samples: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """`mine` minus `other` of each measure, in percent points: value, low, high and p.

    The measures are no means over images: every resample adds up the counts of the groups that it drew, of both models the
    same (see `bootstrap`). p is that of models that are exchangeable on every group: the counts of a group are given to the one
    or to the other by a coin, and the measures taken anew. All coins are gone through where there are few groups.

    Args:
        mine, other: of the same images.
        groups: [I], what is drawn together.
        samples: resamples.
        seed: of the draws.
    """
    owners = np.unique(groups, return_inverse=True)[1]
    sums = []
    for counts in (mine, other):
        stacked = np.stack(counts, axis=1).astype(np.float64)  # [I, 3, C]
        total = np.zeros((owners.max() + 1, *stacked.shape[1:]))
        np.add.at(total, owners, stacked)
        sums.append(total)  # [G, 3, C]
    first, second = sums
    observed = _change(first.sum(0), second.sum(0))
    generator = np.random.default_rng(seed)
    drawn = _many(samples, len(first), lambda rows: _resampled(generator, rows, first, second))
    if len(first) <= ENUMERATED:
        coins = 1 - 2 * (np.arange(1 << len(first))[:, None] >> np.arange(len(first)) & 1)
        parts = np.array_split(coins, -(-len(coins) // COINS_AT_ONCE))
        exchanged, counted = _joined([_exchanged(part, first, second) for part in parts]), 0
    else:
        exchanged = _many(SIGNS, len(first), lambda rows: _exchanged(_coins(generator, rows, len(first)), first, second))
        counted = 1  # the observed one is one of the drawn
    result = {}
    for name, value in observed.items():
        low, high = np.nanquantile(drawn[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        # a hair below, as sums in another order are not the same to the last digit
        as_large = np.abs(exchanged[name]) >= abs(value) * (1 - 1e-9) - 1e-12
        p = (as_large.sum() + counted) / (len(as_large) + counted)
        result[name] = {"value": float(value), "low": float(low), "high": float(high), "p": float(p)}
    return result


def _weights(length: int, resized: int, offset: int, size: int, patch_size: int) -> tuple[Tensor, int]:
    """How much each row (or column) of patches counts in each of pixels of the original that are seen, [V, h], and the first of
    these. length: of the original; resized, offset: of the view; size: of the input."""
    count = size // patch_size
    place = (np.arange(length) + 0.5) * resized / length - offset  # of the pixels' centres in the input
    seen = np.flatnonzero((place >= 0) & (place < size))
    if not len(seen):
        return torch.zeros(0, count), 0
    between = np.clip(place[seen] / patch_size - 0.5, 0, count - 1)  # at whole numbers: the centre of a patch
    low = np.minimum(between.astype(np.int64), max(count - 2, 0))
    weights = np.zeros((len(seen), count), dtype=np.float32)
    rows = np.arange(len(seen))
    weights[rows, low] = 1 - (between - low)
    weights[rows, np.minimum(low + 1, count - 1)] += between - low
    return torch.from_numpy(weights), int(seen[0])


def _contenders(grid: Tensor) -> tuple[Tensor, Tensor]:
    """The classes that can win anywhere, ascending, and their scores, of scores [C, h, h]: with many classes these are few.

    Between four centres a score is at most the highest and at least the lowest of the four.
    """
    everything = torch.arange(len(grid), device=grid.device)
    if grid.shape[-1] < 2:
        return everything, grid
    corners = torch.stack([grid[:, :-1, :-1], grid[:, 1:, :-1], grid[:, :-1, 1:], grid[:, 1:, 1:]])  # [4, C, h-1, h-1]
    able = (corners.amax(0) >= corners.amin(0).amax(0) - 1e-6).flatten(1).any(1)
    return everything[able], grid[able]


def _change(mine: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Of summed counts [..., 3, C] of two models."""
    found, against = measures(mine), measures(other)
    return {name: found[name] - against[name] for name in found}


def _resampled(generator: np.random.Generator, rows: int, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    groups = len(first)
    drawn = generator.integers(groups, size=(rows, groups))
    times = np.stack([np.bincount(row, minlength=groups) for row in drawn]).astype(np.float64)  # [rows, G]
    return _change(*(_weighted(times, sums) for sums in (first, second)))


def _exchanged(coins: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """The changes [rows] where the models' counts stay (1) or are exchanged (-1), coins [rows, G]."""
    middle, half = (first + second).sum(0) / 2, _weighted(coins, (first - second) / 2)
    return _change(middle + half, middle - half)


def _weighted(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """[rows, 3, C], of weights [rows, G] and sums [G, 3, C]."""
    return (weights @ sums.reshape(len(sums), -1)).reshape(len(weights), *sums.shape[1:])


def _many(samples: int, groups: int, draw: Callable[[int], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All samples of what `draw` gives some of."""
    chunk = max(1, DRAWS_AT_ONCE // groups)
    return _joined([draw(min(chunk, samples - start)) for start in range(0, samples, chunk)])


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _coins(generator: np.random.Generator, rows: int, groups: int) -> np.ndarray:
    return generator.choice([-1.0, 1.0], (rows, groups))
