"""The contrastive loss of CLIP: every image against every text of the batch. Letters: B pairs, D embedding width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor | float, weight: Tensor | None = None, excluded: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE: the mean of the cross-entropies of image to text and of text to image.

    image, text [B, D], L2-normalised, row i of one belonging to row i of the other; scale is the exponentiated logit
    scale. weight [B] >= 0: of the rows in the mean, all alike if None. excluded bool [B, B], symmetric: the pairs of rows that
    are no negatives of each other; the diagonal is not looked at. A scalar; 0, with zero gradients, for a batch without
    pairs.
    """
    logits = scale * (image @ text.T)  # [B, B]
    if not len(logits):
        return (image.sum() + text.sum()) * scale
    target = torch.arange(len(logits), device=logits.device)
    if excluded is not None:
        logits = logits.masked_fill(excluded.clone().fill_diagonal_(False), float("-inf"))
    if weight is None:
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    rows = F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    return (weight * rows).sum() / weight.sum() / 2
