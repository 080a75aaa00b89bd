"""Captions: sentences with their place in the text, tokens, and the tokens of a sentence.

Letters: B texts, L token positions. In a token row, position 0 is the start token; the end token follows the text,
and where the text is cut off the end token takes the last position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


class Sentence(NamedTuple):
    """A sentence of a text: `text[start:end] == sentence.text`, without blanks at its ends."""

    text: str
    start: int
    end: int


# pysbd's time grows faster than the text, so it sees this many characters at once (a guess: some 20 sentences) ...
_WINDOW = 2000
# ... and a single sentence longer than this is cut at a blank, so that no text takes long.
_LONGEST = 8000
_PARAGRAPH = re.compile(r"[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def split_sentences(text: str) -> list[Sentence]:
    """The sentences of a text, in order, with their character spans; abbreviations, decimals and quotes survive.

    Every character that is not blank lies in exactly one sentence. A line break ends a sentence. Any text is accepted.
    """
    sentences = []
    for paragraph in _PARAGRAPH.finditer(text):
        starts = [*_sentence_starts(paragraph.group()), len(paragraph.group())]
        for first, last in pairwise(starts):
            piece = paragraph.group()[first:last]
            start = paragraph.start() + first + len(piece) - len(piece.lstrip())
            if trimmed := piece.strip():
                sentences.append(Sentence(trimmed, start, start + len(trimmed)))
    return sentences


def token_spans(caption: str, spans: Sequence[tuple[int, int]], context_length: int) -> list[tuple[int, int]]:
    """For each character span (start, end) of the caption, the positions (first, last) of its tokens in the caption's
    token row, last exclusive. A token belongs to a span if it shares a character with it.

    Only positions that hold text count (1 to context_length - 2 where the caption is cut off): a span is clipped to
    them, and one without any visible token is (0, 0). One tokenisation serves all spans.
    """
    if not len(spans):
        return []
    starts, ends = _token_characters(caption)
    bounds = np.clip(np.asarray(spans, dtype=np.int64).reshape(-1, 2), 0, len(caption))
    first = np.searchsorted(ends, bounds[:, 0], side="right") + 1  # + 1 for the start token
    last = np.minimum(np.searchsorted(starts, bounds[:, 1], side="left") + 1, context_length - 1)
    visible = (last > first) & (bounds[:, 1] > bounds[:, 0])
    return [(int(a), int(b)) if seen else (0, 0) for a, b, seen in zip(first, last, visible, strict=True)]


def token_span(caption: str, start: int, end: int, context_length: int) -> tuple[int, int]:
    """The token positions of `caption[start:end]`, as `token_spans`."""
    return token_spans(caption, [(start, end)], context_length)[0]


def tokenize(texts: Sequence[str], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's byte pairs, equal to open_clip's tokenizer.

    Returns tokens, int64 [B, context_length] padded with 0, and lengths, int64 [B]: the number of ids of the whole text
    with start and end token. A text is cut off iff its length exceeds context_length.
    """
    import torch

    tokenizer = _tokenizer()
    tokens = np.zeros((len(texts), context_length), dtype=np.int64)
    lengths = np.zeros(len(texts), dtype=np.int64)
    for row, text in enumerate(texts):
        ids = _token_ids(text)
        lengths[row] = len(ids) + 2
        shown = min(len(ids), context_length - 2)
        tokens[row, 0] = tokenizer.sot_token_id
        tokens[row, 1 : shown + 1] = ids[:shown]
        tokens[row, shown + 1] = tokenizer.eot_token_id
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


def trim(tokens: torch.Tensor) -> torch.Tensor:
    """tokens [B, L] -> [B, longest text of the batch]: the columns that are padding in every row are dropped.

    Exact for CLIP, whose text attention is causal.
    """
    # Id 0 is also "!", but the last token of a row is the end token, never 0.
    used = (tokens != 0).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1] if len(used) else tokens[:, :1]


def _sentence_starts(paragraph: str) -> Iterator[int]:
    """Where sentences start, window by window; the last sentence of a window is read again with what follows it."""
    position = 0
    while position < len(paragraph):
        size = _WINDOW
        while True:
            window = paragraph[position : position + size]
            starts = _window_starts(window)
            whole = position + size >= len(paragraph)
            if whole or len(starts) > 1 or size >= _LONGEST:
                break
            size *= 2
        if whole:
            yield from (position + start for start in starts)
            return
        if len(starts) == 1:
            blank = max(window.rfind(" "), window.rfind("\t"))
            starts.append(blank if blank > 0 else len(window))
        yield from (position + start for start in starts[:-1])
        position += starts[-1]


def _window_starts(window: str) -> list[int]:
    """Starts of sentences, the first at 0. pysbd's sentences are looked up in the text itself, in order: one that it
    altered is not found, and then stays part of the sentence before it."""
    segmenter = _segmenter()
    try:
        # Not segment(): it keeps state (threads would mix texts), and its spans go wrong where sentences repeat.
        pieces = segmenter.processor(window).process()
    except (re.error, ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError):
        pieces = _SENTENCE_END.split(window)  # pysbd builds patterns from the text and can fail on odd ones
    starts, end = [0], 0
    for piece in pieces:
        piece = piece.strip()
        found = window.find(piece, end) if piece else -1
        if found < 0:
            continue
        if window[:found].strip():
            starts.append(found)
        end = found + len(piece)
    return starts


@lru_cache(maxsize=1)
def _segmenter() -> Any:
    import pysbd

    return pysbd.Segmenter(language="en", clean=False, char_span=True)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from fast_goal.environment import prepare

    prepare()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _mended(word: str) -> str:
    return _tokenizer().clean_fn(word)


@lru_cache(maxsize=65536)
def _token_ids(text: str) -> np.ndarray:
    """The ids of a text without start and end token; uint16, because the cache may hold a data set's captions."""
    tokenizer = _tokenizer()
    words = tokenizer.pat.findall(tokenizer.clean_fn(text))
    return np.array([piece for word in words for piece in _pieces(word)[0]], dtype=np.uint16)


@lru_cache(maxsize=65536)
def _pieces(word: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The byte pairs of a word of a cleaned text: their ids, and which characters of it hold their first and last bytes."""
    tokenizer = _tokenizer()
    # the character of each byte: byte pairs may cut a character in two
    characters = [index for index, letter in enumerate(word) for _ in letter.encode("utf-8")]
    pieces = tokenizer.bpe("".join(tokenizer.byte_encoder[byte] for byte in word.encode("utf-8"))).split(" ")
    ends = list(accumulate(len(piece.removesuffix("</w>")) for piece in pieces))
    firsts = tuple(characters[start] for start in [0, *ends[:-1]])
    return tuple(tokenizer.encoder[piece] for piece in pieces), firsts, tuple(characters[end - 1] for end in ends)


@lru_cache(maxsize=256)
def _token_characters(text: str) -> tuple[np.ndarray, np.ndarray]:
    """For each token of a text, the range of characters it came from: starts and ends, int64 [L], both ascending."""
    tokenizer = _tokenizer()
    cleaned = tokenizer.clean_fn(text)
    firsts, lasts = [], []
    for word in tokenizer.pat.finditer(cleaned):
        (_, first, last), start = _pieces(word.group()), word.start()
        firsts += [start + index for index in first]
        lasts += [start + index for index in last]
    starts, ends = np.array(firsts, dtype=np.int64), np.array(lasts, dtype=np.int64) + 1
    if cleaned == text.lower() and len(cleaned) == len(text):  # letter by letter, as nearly always
        return starts, ends
    first_of, last_of = (np.array(of, dtype=np.int64) for of in _align(text, cleaned))
    # A replaced stretch maps to the whole of what it replaced, so neighbours may share a range but never go back.
    return np.maximum.accumulate(first_of[starts]), np.maximum.accumulate(last_of[ends - 1])


def _align(text: str, cleaned: str) -> tuple[list[int], list[int]]:
    """For each character of the cleaned text (lower case, HTML entities and broken encodings mended, blanks merged) the
    range of characters of the original that it came from.

    Word by word: equal words match letter by letter, a mended one matches its counterpart, and where words were merged
    or split the two texts are matched up again at the next equal words.
    """
    old = [(match.group().lower(), match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    new = [(match.group(), match.start(), match.end()) for match in re.finditer(r"\S+", cleaned)]
    first_of, last_of = [0] * len(cleaned), [0] * len(cleaned)
    i = j = 0
    while j < len(new):
        if i < len(old) and (old[i][0] == new[j][0] or _mended(text[old[i][1] : old[i][2]]) == new[j][0]):
            _align_stretch(text, cleaned, old[i][1:], new[j][1:], first_of, last_of)
            i, j = i + 1, j + 1
            continue
        skip_old, skip_new = _resynchronise(old, new, i, j)
        here = old[i][1] if i < len(old) else len(text)
        old_range = (here, old[i + skip_old - 1][2]) if skip_old else (here, here)
        _align_stretch(
            text, cleaned, old_range, (new[j][1], new[j + skip_new - 1][2]) if skip_new else (0, 0), first_of, last_of
        )
        i, j = i + skip_old, j + skip_new
    return first_of, last_of


def _resynchronise(old: list[tuple[str, int, int]], new: list[tuple[str, int, int]], i: int, j: int) -> tuple[int, int]:
    """How many words to skip in both lists until they agree again, the fewest first; beyond 8 words, which no cleaning
    is known to need, word by word."""
    for total in range(1, 17):
        for skip_new in range(max(0, total - 8), min(total, 8) + 1):
            a, b = i + total - skip_new, j + skip_new
            if a == len(old) and b == len(new):
                return total - skip_new, skip_new
            if a < len(old) and b < len(new) and old[a][0] == new[b][0]:
                return total - skip_new, skip_new
    return min(1, len(old) - i), 1


def _align_stretch(
    text: str, cleaned: str, old: tuple[int, int], new: tuple[int, int], first_of: list[int], last_of: list[int]
) -> None:
    """Matches text[old] with cleaned[new] from both ends letter by letter; what differs between matches as a whole."""
    before, after = text[old[0] : old[1]], cleaned[new[0] : new[1]]
    if len(before) == len(after):
        head, tail = len(after), 0
    else:
        shorter = min(len(before), len(after))
        head = next((k for k in range(shorter) if before[k].lower() != after[k]), shorter)
        tail = next((k for k in range(shorter - head) if before[-1 - k].lower() != after[-1 - k]), shorter - head)
    for k in range(len(after)):
        if k < head:
            first, last = old[0] + k, old[0] + k + 1
        elif k >= len(after) - tail:
            first = old[1] - (len(after) - k)
            last = first + 1
        else:
            first, last = old[0] + head, old[1] - tail
        first_of[new[0] + k], last_of[new[0] + k] = first, last
