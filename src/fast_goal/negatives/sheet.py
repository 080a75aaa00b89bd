"""A sheet of negatives to read, as Markdown: the caption and the negative with the words that differ in bold."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from fast_goal.negatives.edits import changed_words
from fast_goal.negatives.vocabulary import caption_hash

SHOWN = 8  # of each type
AROUND = 8  # unchanged words that stand beside the changed ones


def sheet(name: str, table: pd.DataFrame, types: Sequence[str], seed: int) -> str:
    """Negatives drawn by hash, so that a table with the same rows has the same sheet."""
    lines = [
        f"# Negatives of {name}",
        "",
        f"{SHOWN} of each type, drawn at random and not chosen. What differs is in bold, longer stretches that do not are left "
        "out.",
    ]
    for kind in types:
        rows = table[table["type"] == kind]
        drawn = sorted(zip(rows["image_id"], rows["caption"], rows["negative"], strict=True), key=lambda row: _key(row, seed))
        lines += ["", f"## {kind} ({len(rows):,})", ""]
        for image_id, caption, negative in drawn[:SHOWN]:
            old, new = changed_words(caption, negative)
            lines += [f"* `{image_id}`", f"    * caption: {_marked(caption, old)}", f"    * negative: {_marked(negative, new)}"]
    return "\n".join(lines) + "\n"


def _marked(text: str, places: Sequence[int]) -> str:
    words, bold = text.split(), set(places)
    near = {place for changed in places for place in range(changed - AROUND, changed + AROUND + 1)}
    shown: list[str] = []
    for place, word in enumerate(words):
        if place in near or len(words) <= 2 * AROUND:
            plain = re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", word)
            shown.append(f"**{plain}**" if place in bold else plain)
        elif not shown or shown[-1] != "…":
            shown.append("…")
    return " ".join(shown)


def _key(row: tuple[str, str, str], seed: int) -> bytes:
    return caption_hash("\0".join(row), seed)
