"""What is wrong with long captions, found for a million of them in seconds.

The patterns run over all captions at once, in arrow. What needs Python for each caption (its tokens, its language) is
looked at on a random sample of a large set; a column then holds nothing for the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fast_goal.data import captions

SAME_CAPTION = 3  # images: two may be shots of one scene, a caption of three describes none of them
CLIP_CONTEXT = 77  # tokens that CLIP was pre-trained on
SENTENCE_SAMPLE = 200  # captions whose sentences are counted: the splitter takes 4 ms for each
TOKENIZE_AT_ONCE = 1024
COUNTED_AT_ONCE = 20_000  # captions; some 100 MB
BLANK = np.isin(np.arange(256), list(b" \t\n\r\v\f"))
SURE = 0.9  # from which the guessed language counts: Chinese gets 0.92, English full of foreign names less than this for others
LETTERS = 40  # of a caption below which its language is not guessed
REPEATED = 20  # characters of a sentence from which saying it twice is no accident

# In the syntax that RE2 and Python share; upper and lower case alike where a pattern starts with (?i).
REFUSAL = (
    r"(?i)\bi(?:['’]m| am) (?:very |so |really )?sorry\b|\bi apologi[sz]e\b|\bas an? (?:ai|artificial intelligence|(?:large )?"
    r"language model)\b|\bi(?: can(?:not|['’]t|not)|['’]m unable to| am unable to|['’]m not able to| am not able to) (?:see|"
    r"view|assist|help|provide|describe|identify|process|access|determine|fulfil)|\bno image (?:was |is )?(?:provided|attached|"
    r"visible)\b|\bthe image (?:is not|isn['’]t|was not) (?:provided|attached|visible)\b"
)
PROMPT = (
    r"(?:^|\s)(?:USER|ASSISTANT|SYSTEM|Human|Assistant):|\[/?INST\]|<\|[a-z_]+\|>|</?s>|<image>|<<SYS>>"
    r"|###\s*(?:Human|Assistant|Instruction|Response)|(?i:\bdescribe (?:this|the) (?:image|picture|photo)\b"
    r"|\b(?:sure|certainly|of course)[,!] here(?:'s| is)\b|\bhere(?:'s| is) (?:a|the|your) (?:\w+ ){0,3}(?:description|caption)"
    r"|\b(?:in|as) (?:one|a single) paragraph\b|\bas (?:you )?(?:requested|instructed)\b)"
)
MARKUP = (
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\x{fffd}|\x{200b}|\x{feff}|</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>|&(?:[a-z]+|#[0-9]+);"
    r"|\*\*|```|(?:^|\n)#{1,6} |â€|Ã[\x{80}-\x{bf}]"
)
SENTENCE_END = r"[.!?…。！？][\"'”’»)\]*]*\s*$"


@dataclass(frozen=True)
class CaptionLengths:
    """Lengths of the long captions. tokens: BPE ids with both ends, untruncated, and sentences: each of a sample of the
    captions; `rows` [captions in `tokens`] are their rows in the records. contexts: the text contexts to compare `tokens`
    with, ascending: CLIP's own, and that of the model to be trained where it is known and another one."""

    words: np.ndarray
    tokens: np.ndarray
    sentences: np.ndarray
    rows: np.ndarray
    contexts: tuple[int, ...] = (CLIP_CONTEXT,)

    def beyond(self) -> str:
        """The share of the captions that each context cuts off, in words."""
        return "; ".join(f"{np.mean(self.tokens > length):.1%} have more than {length} tokens" for length in self.contexts)


def texts_of(records: pd.DataFrame) -> pa.Array:
    """The long captions as one arrow array."""
    texts = pa.array(records["long_caption"].fillna(""), type=pa.large_string())
    return texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts


def count_words(texts: pa.Array) -> np.ndarray:
    """Words between ASCII blanks of the texts of `texts_of`: int64 [captions]. Counted in the bytes, without making them."""
    counts = np.zeros(len(texts), dtype=np.int64)
    for first in range(0, len(texts), COUNTED_AT_ONCE):
        part = texts[first : first + COUNTED_AT_ONCE]
        _, offsets, data = part.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[part.offset : part.offset + len(part) + 1]
        letters = ~BLANK[np.frombuffer(data or b"", dtype=np.uint8)[ends[0] : ends[-1]]]
        starts = letters.copy()
        starts[1:] &= ~letters[:-1]
        filled = np.flatnonzero(np.diff(ends))
        borders = (ends - ends[0])[filled]
        starts[borders] = letters[borders]  # what stands before is another text
        counts[first + filled] = np.add.reduceat(starts, borders, dtype=np.int64) if len(filled) else 0
    empty = pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy(zero_copy_only=False)  # other blanks than ASCII
    return np.where(empty, 0, counts)


def sample_rows(count: int, size: int, seed: int) -> np.ndarray:
    """`size` of the rows 0 to count - 1, drawn without replacement and sorted; all of them where there are no more."""
    if size >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def caption_lengths(
    records: pd.DataFrame, sample: int, seed: int, words: np.ndarray | None = None, context_length: int | None = None
) -> CaptionLengths:
    """Measures the long captions that are not empty; the tokens on a random sample of `sample`. `words`: of each caption,
    where they were counted already. context_length: of the model to be trained, None where it is not known."""
    texts = texts_of(records)
    words = count_words(texts) if words is None else words
    filled = np.flatnonzero(words)
    rows = filled[sample_rows(len(filled), sample, seed)]
    chosen = texts.take(pa.array(rows)).to_pylist()
    tokens = [
        np.asarray(captions.tokenize(chosen[first : first + TOKENIZE_AT_ONCE], CLIP_CONTEXT)[1])
        for first in range(0, len(chosen), TOKENIZE_AT_ONCE)
    ]
    split = sample_rows(len(chosen), SENTENCE_SAMPLE, seed)
    return CaptionLengths(
        words=words[filled],
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=int),
        sentences=np.array([len(captions.split_sentences(chosen[index])) for index in split], dtype=int),
        rows=rows,
        contexts=tuple(sorted({CLIP_CONTEXT, context_length or CLIP_CONTEXT})),
    )


def caption_columns(records: pd.DataFrame, lengths: CaptionLengths, language: str | None) -> pd.DataFrame:
    """The problems of the long captions, a column each, in the order of the records.

    `refusal`, `leaked_prompt`, `markup`, `repeated_sentence`, `shared_caption`, `unfinished`; and, for the captions of
    `lengths.rows` only, `other_language` (than `language`; not there where that is None) and the number `long_tokens`.
    """
    texts = texts_of(records)
    columns = {
        "refusal": _found(texts, REFUSAL, "it says {}"),
        "leaked_prompt": _found(texts, PROMPT, "it says {}"),
        "markup": _found(texts, MARKUP, "it has {}"),
        "repeated_sentence": _repeated_sentences(texts),
        "shared_caption": _shared(texts),
        "unfinished": _unfinished(texts),
    }
    tokens = np.full(len(texts), np.nan)
    tokens[lengths.rows] = lengths.tokens
    columns["long_tokens"] = pd.Series(tokens)
    if language is not None:
        columns["other_language"] = _other_language(texts, lengths.rows, language)
    return pd.DataFrame(columns)


def language_of(text: str) -> str | None:
    """The language of a text, None where it is too short to tell or the guess is not sure."""
    if sum(map(str.isalpha, text)) < LETTERS:
        return None
    guess, probability = _identifier().classify(text)
    return guess if probability >= SURE else None


def quote(text: str, length: int = 60) -> str:
    """The beginning of a text, as a Python string."""
    return repr(text if len(text) <= length else f"{text[:length]}…")


def _found(texts: pa.Array, pattern: str, words: str) -> pd.Series:
    """For the texts in which the pattern is found: `words` with the place and what stands around it."""
    rows = np.flatnonzero(pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False))
    python = re.compile(re.sub(r"\\x\{([0-9a-f]+)\}", lambda code: f"\\u{int(code[1], 16):04x}", pattern))
    problems = {}
    for row in rows:
        text = texts[row].as_py()
        match = python.search(text)
        start = match.start() if match else 0
        problems[row] = words.format(quote(text[start : start + 60])) + f" (from character {start})"
    return _column(len(texts), problems)


def _repeated_sentences(texts: pa.Array) -> pd.Series:
    """Sentences by the rule of full stop and blank: the splitter would take an hour for a million captions."""
    pieces = pc.split_pattern(pc.ascii_lower(texts), ". ")
    caption = pc.list_parent_indices(pieces).to_numpy(zero_copy_only=False)
    flat = pc.ascii_trim(pc.list_flatten(pieces), " \t\r\n.!?")
    long = np.flatnonzero(pc.greater_equal(pc.utf8_length(flat), REPEATED).to_numpy(zero_copy_only=False))
    codes = flat.take(pa.array(long)).dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    keys = pd.Series(caption[long].astype(np.int64) * (codes.max(initial=0) + 1) + codes)
    keys = keys[keys.duplicated(keep=False)]
    _, firsts, counts = np.unique(keys.to_numpy(), return_index=True, return_counts=True)
    problems: dict[int, str] = {}
    for place, count in zip(long[keys.index[firsts]], counts, strict=True):
        sentence = quote(flat[int(place)].as_py())
        problems.setdefault(int(caption[place]), f"the sentence {sentence} stands there {count} times")
    return _column(len(texts), problems)


def _shared(texts: pa.Array) -> pd.Series:
    series = pd.Series(texts.dictionary_encode().indices.to_numpy(zero_copy_only=False))
    empty = pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy(zero_copy_only=False)
    counts, firsts = series.groupby(series).transform("size").to_numpy(), np.unique(series, return_index=True)[1]
    problems = {
        row: f"{counts[row]:,} images have this caption, the first in row {firsts[series[row]]}: {quote(texts[row].as_py())}"
        for row in np.flatnonzero((counts >= SAME_CAPTION) & ~empty)
    }
    return _column(len(texts), problems)


def _unfinished(texts: pa.Array) -> pd.Series:
    ended = pc.match_substring_regex(texts, SENTENCE_END).to_numpy(zero_copy_only=False)
    empty = pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy(zero_copy_only=False)
    problems = {row: f"its last characters are {texts[row].as_py()[-40:]!r}" for row in np.flatnonzero(~ended & ~empty)}
    return _column(len(texts), problems)


def _other_language(texts: pa.Array, rows: np.ndarray, language: str) -> pd.Series:
    problems = {}
    for row in rows:
        text = texts[row].as_py()
        if sum(map(str.isalpha, text)) < LETTERS:
            continue
        guess, probability = _identifier().classify(text)
        if guess != language and probability >= SURE:
            problems[row] = f"it is in {guess!r} with a probability of {probability:.2f}: {quote(text)}"
    return _column(len(texts), problems)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _column(length: int, problems: dict[int, str]) -> pd.Series:
    column = np.full(length, None, dtype=object)
    for row, problem in problems.items():
        column[row] = problem
    return pd.Series(column, dtype=object)
