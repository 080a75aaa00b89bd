"""Where in the tokens of a whole image and a long caption a local pair lies: its box in input pixels, its span of tokens.

`exact` follows the pixels and characters. `goal` is what the code of GOAL (arXiv 2503.17782), the authors' earlier system,
does; it is there to compare with. Its defects that are kept:

* The box is squashed onto the input, x and y apart, whatever the view does to the pixels, and rounded to whole pixels: under
  the view `crop` it covers other patches than the region does, also for a region of which nothing is visible.
* The span starts one token late, because the start token and the end token of the text before it are both counted: it lacks
  the sentence's first token and ends with the one after the sentence, which may be the end token.
* A sentence is looked for by its words, so that the second of two equal ones gets the span of the first.
* A sentence beyond the context gets as many tokens at its end as it has itself; one that would start at the end token, as
  many from the beginning on.

What cannot be kept: a box that rounds to nothing has no patch there, and the loss becomes NaN; here it takes no part in the
image term. A sentence that the caption does not have stops the training there; here it is a part of the caption by its
offsets, which are checked before. Padding after the end token, which a span may reach there where a stop is part of a longer
token (".)"), is not in a batch here. A patch of 16 pixels is written into that code, so that it pools unrelated patches with
a ViT-L/14; here the patches are the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fast_goal.data.captions import token_span, tokenize
from fast_goal.data.images import View

Box = tuple[float, float, float, float]


class Alignment(NamedTuple):
    """box(view, xyxy in pixels of the original, side of a patch) -> xyxy in pixels of the input, as `patch_mask` takes it;
    (0, 0, 0, 0) covers no patch. span(caption, char_start, char_end, context_length) -> token positions (first, last
    exclusive); (0, 0) holds no token."""

    box: Callable[[View, Box, int], Box]
    span: Callable[[str, int, int, int], tuple[int, int]]


def _exact_box(view: View, xyxy: Box, patch_size: int) -> Box:
    return view.box(xyxy)


def _goal_box(view: View, xyxy: Box, patch_size: int) -> Box:
    """Enlarged to whole patches, because a box that is rounded to no width still covers a patch there, unless it lies on
    the border of two."""
    size = view.size
    # round() goes to the even number at a half, there too
    x1, x2 = (round(x * size / view.width) for x in xyxy[::2])
    y1, y2 = (round(y * size / view.height) for y in xyxy[1::2])
    first = [min(max(value, 0), size - 1) // patch_size * patch_size for value in (x1, y1)]
    last = [-(-min(max(value, 0), size) // patch_size) * patch_size for value in (x2, y2)]
    if first[0] >= last[0] or first[1] >= last[1]:
        return 0.0, 0.0, 0.0, 0.0
    return float(first[0]), float(first[1]), float(last[0]), float(last[1])


def _goal_span(caption: str, char_start: int, char_end: int, context_length: int) -> tuple[int, int]:
    text, sentence = " ".join(caption.split()), " ".join(caption[char_start:char_end].split())
    pieces = [piece.strip() for piece in text.split(".") if piece.strip()]
    if sentence in pieces:
        before = "".join(f"{piece}. " for piece in pieces[: pieces.index(sentence)])
    else:
        before = text[: text.index(sentence)]
    lengths = tokenize([before, sentence, text], context_length)[1]
    first, count = int(lengths[0]), int(lengths[1]) - 2
    end = context_length - 1  # the end token's position where the text is cut off
    last = min(first + count, end)
    if first >= context_length:
        first, last = max(1, end - count), end
    elif first == end:
        first, last = 1, min(1 + count, context_length)
    last = min(last, int(lengths[2]))
    return (first, last) if first < last else (0, 0)


ALIGNMENTS = {"exact": Alignment(_exact_box, token_span), "goal": Alignment(_goal_box, _goal_span)}
