"""Text positions for captions longer than CLIP was trained on (Long-CLIP, arXiv 2403.15378, section 3.1)."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fast_goal.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Stretch:
    """How a table of `count` positions becomes one of `length`.

    The first `keep` rows, which short captions have trained well, stay. The other count - keep are drawn out by the ratio
    r = (length - keep) / (count - keep), which need not be an integer: row p >= keep is read off at keep + (p - keep) / r, by
    linear interpolation, and beyond the last row by continuing the last step. CLIP's 77 rows become 248 with r = 4, of which
    the last 3 lie beyond.

    Raises ModelError for a table that has more rows than asked for, or too few to stretch. One of the same length stays as
    it is, whatever `keep`.
    """

    count: int
    length: int
    keep: int

    def __post_init__(self) -> None:
        if self.length < self.count:
            raise ModelError(
                f"base.context_length = {self.length}: the model has {self.count} text positions already, and is never "
                f"shortened. Set it to {self.count} or more."
            )
        if self.length > self.count and not 0 <= self.keep <= self.count - 2:
            raise ModelError(
                f"base.keep_positions = {self.keep}: expected 0 to {self.count - 2} for a table of {self.count} text positions"
            )

    @property
    def ratio(self) -> Fraction:
        """New rows for each old one that is not kept."""
        return Fraction(1) if self.length == self.count else Fraction(self.length - self.keep, self.count - self.keep)

    @property
    def kept(self) -> int:
        """Rows that stay as they are, from the first on."""
        return self.count if self.length == self.count else self.keep

    @property
    def extrapolated(self) -> int:
        """Rows at the end that lie beyond the last old one: those p with (p - keep) / r > count - 1 - keep."""
        if self.length == self.count:
            return 0
        return self.length - 1 - self.keep - int(self.ratio * (self.count - 1 - self.keep))

    def describe(self) -> dict[str, Any]:
        """The same for a JSON file."""
        return {
            "from": self.count,
            "to": self.length,
            "kept": self.kept,
            "ratio": float(self.ratio),
            "extrapolated": self.extrapolated,
        }


def stretch_positions(table: Tensor, length: int, keep: int = 20) -> Tensor:
    """Stretches a table of position embeddings: table [n, d] -> [length, d]; see `Stretch`, also for what it raises."""
    if table.ndim != 2:
        raise ModelError(f"position table of shape {list(table.shape)}: expected [positions, width]")
    count = len(table)
    Stretch(count, length, keep)
    if length == count:
        return table
    steps = torch.arange(length - keep, device=table.device) * (count - keep)  # in units of 1 / (length - keep) rows
    row = keep + steps // (length - keep)
    fraction = (steps % (length - keep)).to(table.dtype) / (length - keep)
    start = row.clamp(max=count - 2)
    step = table[start + 1] - table[start]
    return torch.cat([table[:keep], table[row] + fraction[:, None] * step])
