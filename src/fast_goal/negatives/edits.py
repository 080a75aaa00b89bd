"""Which words of a caption are others in its negative."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

_BARE = re.compile(r"^\W+|\W+$")
FEW = 8  # words that differ place by place, up to which nothing was moved along


def changed_words(caption: str, negative: str) -> tuple[list[int], list[int]]:
    """The places of the words (between blanks) of each that the other has not there. Marks around a word and its capitals do
    not count."""
    old, new = [_bare(word) for word in caption.split()], [_bare(word) for word in negative.split()]
    shorter = min(len(old), len(new))
    head = next((place for place in range(shorter) if old[place] != new[place]), shorter)
    tail = next((place for place in range(shorter - head) if old[-1 - place] != new[-1 - place]), shorter - head)
    old, new = old[head : len(old) - tail], new[head : len(new) - tail]
    if len(old) == len(new):
        places = [head + place for place, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
        if len(places) <= FEW:
            return places, places
    first, second = [], []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind != "equal":
            first += range(head + a, head + b)
            second += range(head + c, head + d)
    return first, second


def edit_size(caption: str, negative: str) -> int:
    """How many words differ."""
    return max(map(len, changed_words(caption, negative)))


def _bare(word: str) -> str:
    return _BARE.sub("", word).lower() or word
