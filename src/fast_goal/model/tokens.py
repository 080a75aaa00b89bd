"""From boxes and text spans to the tokens they cover, and the mean of those tokens.

Letters: B samples, N image patches or tokens in general, L text tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fast_goal.errors import ModelError


def patch_mask(boxes: Tensor, image_size: int, patch_size: int) -> Tensor:
    """Which patches a box overlaps with positive area: boxes [B, 4] -> bool [B, N], row-major, without a class token.

    Boxes are x1, y1, x2, y2 in pixels of the model's input, x2 and y2 exclusive, fractions allowed; what lies outside the
    input is cut off. A box with area inside the input covers at least one patch; one without (also one that holds NaN)
    covers none. Raises ModelError if the patches do not fill the input.
    """
    if image_size % patch_size:
        raise ModelError(f"image size {image_size} is not a multiple of patch size {patch_size}")
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    x1, y1, x2, y2 = boxes.clamp(0, image_size)[:, :, None].unbind(1)  # each [B, 1]
    low = torch.arange(0, image_size, patch_size, dtype=boxes.dtype, device=boxes.device)  # [grid]
    high = low + patch_size
    has_area = (x2 > x1) & (y2 > y1)
    columns = (x1 < high) & (x2 > low)  # [B, grid]
    rows = (y1 < high) & (y2 > low) & has_area
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def span_mask(spans: Tensor, length: int) -> Tensor:
    """spans [B, 2] of token positions (first, last exclusive) -> bool [B, L]; an empty span, such as (0, 0), covers none."""
    position = torch.arange(length, device=spans.device)
    return (position >= spans[:, :1]) & (position < spans[:, 1:])


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens under the mask: tokens [B, N, D], mask bool [B, N] -> [B, D]; zeros where the mask is empty."""
    weight = mask.to(tokens.dtype)
    total = torch.bmm(weight[:, None, :], tokens).squeeze(1)
    return total / weight.sum(1, keepdim=True).clamp(min=1)
