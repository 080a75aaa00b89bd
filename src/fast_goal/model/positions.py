"""Text positions for captions longer than CLIP was trained on (Long-CLIP, arXiv 2403.15378, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fast_goal.errors import ModelError


def stretch_positions(table: Tensor, length: int, keep: int = 20) -> Tensor:
    """Stretches a table of position embeddings: table [n, d] -> [length, d].

    The first `keep` rows, which short captions have trained well, stay. The other n - keep are drawn out by the ratio
    r = (length - keep) / (n - keep), which need not be an integer: row p >= keep is read off at keep + (p - keep) / r, by
    linear interpolation, and beyond the last row by continuing the last step. CLIP's 77 rows become 248 with r = 4.

    A table that has `length` rows is returned unchanged. Raises ModelError if it has more, or too few to stretch.
    """
    if table.ndim != 2:
        raise ModelError(f"position table of shape {list(table.shape)}: expected [positions, width]")
    count = len(table)
    if length == count:
        return table
    if length < count:
        raise ModelError(f"context_length = {length}: the model has {count} text positions already, and is never shortened")
    if not 0 <= keep <= count - 2:
        raise ModelError(f"keep_positions = {keep}: expected 0 to {count - 2} for a table of {count} text positions")
    steps = torch.arange(length - keep, device=table.device) * (count - keep)  # in units of 1 / (length - keep) rows
    row = keep + steps // (length - keep)
    fraction = (steps % (length - keep)).to(table.dtype) / (length - keep)
    start = row.clamp(max=count - 2)
    step = table[start + 1] - table[start]
    return torch.cat([table[:keep], table[row] + fraction[:, None] * step])
