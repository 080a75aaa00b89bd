"""Where in the tokens of a whole image and a long caption a local pair lies: its box in input pixels, its span of tokens.

`exact` follows the pixels and characters. `goal` is what the authors' earlier code does, to compare with (METHOD, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fast_goal.data.captions import token_span
from fast_goal.data.images import View

Box = tuple[float, float, float, float]


class Alignment(NamedTuple):
    """box(view, xyxy in pixels of the original) -> xyxy in pixels of the input; span(caption, char_start, char_end,
    context_length) -> token positions (first, last exclusive)."""

    box: Callable[[View, Box], Box]
    span: Callable[[str, int, int, int], tuple[int, int]]


def _exact_box(view: View, xyxy: Box) -> Box:
    return view.box(xyxy)


ALIGNMENTS = {"exact": Alignment(_exact_box, token_span)}
