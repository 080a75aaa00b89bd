"""Patch localisation: do the patch tokens know where the object of a sentence is? (FAST-GOAL, Table XVI)

The embedding of a sentence is compared with every projected patch token of its image. The sentence is a hit at k if
the centre of any of the k most similar patches lies in the box the sentence speaks of.

Letters: `S` sentences, `N` patches in row-major order, `D` embedding width. Boxes are xyxy in pixels of the model's
input, x2 and y2 exclusive. Of equally similar patches the one with the lower index comes first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def patch_centres(image_size: int, patch_size: int) -> Tensor:
    """Centres [N, 2] (x, y) of the patches in input pixels, row-major."""
    middle = torch.arange(image_size // patch_size) * patch_size + patch_size / 2
    rows, columns = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], dim=1)


def centres_inside(boxes: Tensor, image_size: int, patch_size: int) -> Tensor:
    """Which patch centres lie in each box: bool [S, N] for boxes [S, 4]. A small or hidden box may hold none."""
    centres = patch_centres(image_size, patch_size).to(boxes.device)
    low = centres[None] >= boxes[:, None, :2]
    high = centres[None] < boxes[:, None, 2:]
    return (low & high).all(2)


def first_hits(similarity: Tensor, inside: Tensor) -> Tensor:
    """The rank, from 1, of the most similar patch inside the box: int64 [S].

    A sentence is a hit at k exactly if this is at most k. It is N + 1, a miss at every k, where the box holds no centre.

    Args:
        similarity: [S, N], of each sentence with the patches of its image.
        inside: bool [S, N], from `centres_inside`.
    """
    order = similarity.float().sort(dim=1, descending=True, stable=True).indices
    hit = inside.gather(1, order)  # [S, N], by falling similarity
    return torch.where(hit.any(1), hit.int().argmax(1) + 1, similarity.shape[1] + 1)


def chance(total: int, good: int, k: int) -> float:
    """The probability, 0 to 1, that k draws without replacement from `total` things hold at least one of `good`.

    The share of hits to expect of k random patches: 1 - C(total - good, k) / C(total, k).
    """
    k = min(k, total)
    return 1 - math.comb(total - good, k) / math.comb(total, k)
