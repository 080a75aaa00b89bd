"""Token Similarity-based Learning (FAST-GOAL section III-C, equations 11 to 14).

A region pooled from the tokens of its whole image is drawn to the embedding of the crop; a sentence pooled from the
tokens of its long caption, to the embedding of the sentence by itself. Letters: P pairs, D embedding width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TargetMatrix = Literal["diagonal", "identity"]


def tsl_loss(
    pooled: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    target_matrix: TargetMatrix = "diagonal",
    group: Tensor | None = None,
) -> Tensor:
    """The mean squared distance of the cosines between `pooled` and `target` from what they should be. A scalar.

    pooled, target [P, D] need not be normalised; gradients flow into both. weight [P] >= 0, all ones if None; rows of
    weight 0 take no part, and without any weight the loss is 0 with zero gradients.
    target_matrix "diagonal": matching pairs should have cosine 1, sum_i w_i (1 - cos_ii)^2 / sum_i w_i, as in the authors'
    code. "identity": all pairs count and the others should have cosine 0, sum_ij w_ij (cos_ij - [i=j])^2 / sum_ij w_ij with
    w_ij = w_i w_j, the other reading of equation 14. group [P] of integers: rows of the same group, such as several regions
    of one image, need not differ; then w_ij = 0 for them, and w_ii = w_i, so that all regions of an image count as one.
    """
    if target_matrix not in ("diagonal", "identity"):
        raise ValueError(f"target_matrix = {target_matrix!r}: expected 'diagonal' or 'identity'")
    pooled, target = F.normalize(pooled, dim=-1), F.normalize(target, dim=-1)
    weight = pooled.new_ones(len(pooled)) if weight is None else weight.to(pooled.dtype)
    if target_matrix == "diagonal":
        error = (1 - (pooled * target).sum(-1)).square()  # [P]
    else:
        identity = torch.eye(len(pooled), dtype=pooled.dtype, device=pooled.device)
        error = (pooled @ target.T - identity).square()  # [P, P]
        both = weight[:, None] * weight[None, :]
        weight = both if group is None else both * (group[:, None] != group[None, :]) + torch.diag(weight)
    total = weight.sum()
    return (weight * error).sum() / torch.where(total > 0, total, torch.ones_like(total))
