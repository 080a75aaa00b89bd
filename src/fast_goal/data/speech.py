"""Parts of speech of English captions, by HanTa, the only user of it.

HanTa's English model is a part of the installed package and is read as pickle, as its code is: it comes from the package
index and from nowhere else. Its tags are those of the British National Corpus (C5): NN1 a singular noun, NN2 a plural one, NP0
a name, AJ0 an adjective.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

Kind = Literal[
    "noun",
    "adjective",
    "verb",
    "adverb",
    "number",
    "preposition",
    "determiner",
    "conjunction",
    "pronoun",
    "punctuation",
    "other",
]
KINDS: dict[str, Kind] = {  # by the first letters of the tag
    "NN": "noun",
    "NP": "noun",
    "AJ": "adjective",
    "V": "verb",
    "AV": "adverb",
    "CRD": "number",
    "ORD": "number",
    "PR": "preposition",
    "AT": "determiner",
    "DT": "determiner",
    "DPS": "determiner",
    "CJ": "conjunction",
    "PN": "pronoun",
    "PU": "punctuation",
}

# A number; a word, with hyphens, of which the contracted end ('s, n't) is a word of its own; any other character that shows.
_WORD = re.compile(
    r"\d+(?:[.,]\d+)*(?:st|nd|rd|th)?\b"
    r"|['’](?:s|re|ve|ll|d|m)\b|n['’]t\b"
    r"|[^\W_]+?(?=n['’]t\b)|[^\W_]+(?:-[^\W_]+)*(?:['’](?!(?:s|re|ve|ll|d|m)\b)[^\W_]+)*"
    r"|\S",
    re.IGNORECASE,
)
_ENDS = frozenset(".!?;:")  # the tagger sees what stands between two of them at once, as it learnt from sentences
_LONGEST = 120  # words; a guess: its time grows with them, and no sentence needs more


class Word(NamedTuple):
    """A word or mark of a text: `text[start:end] == word.text`. tag: of C5; lemma: in lower case, `dog` of `Dogs`."""

    text: str
    start: int
    end: int
    kind: Kind
    tag: str
    lemma: str


def tagged(texts: Sequence[str]) -> list[list[Word]]:
    """The words of each text with their parts of speech, in order; every character that is not blank lies in one word.

    The same text always gives the same words. Threads may call it at once; the first call takes a second.
    """
    return [[word for part in _parts(text) for word in _tag(part)] for text in texts]


def _parts(text: str) -> Iterator[list[re.Match[str]]]:
    part: list[re.Match[str]] = []
    for match in _WORD.finditer(text):
        part.append(match)
        if match.group() in _ENDS or len(part) == _LONGEST:
            yield part
            part = []
    if part:
        yield part


def _tag(part: Sequence[re.Match[str]]) -> list[Word]:
    words = [match.group() for match in part]
    tags = _model().tag_sent([word.replace("’", "'") for word in words], taglevel=0)
    return [
        Word(word, match.start(), match.end(), _kind(word, tag), tag, _lemma(word.lower(), tag))
        for word, match, tag in zip(words, part, tags, strict=True)
    ]


def _kind(word: str, tag: str) -> Kind:
    if not word[0].isalnum() and len(word) == 1:
        return "punctuation"
    return next((KINDS[tag[:length]] for length in (3, 2, 1) if tag[:length] in KINDS), "other")


@lru_cache(maxsize=1 << 17)
def _lemma(word: str, tag: str) -> str:
    return _model().analyze(word, pos=tag)[0].lower()


_loading = threading.Lock()
_loaded: list[Any] = []


def _model() -> Any:
    if not _loaded:
        with _loading:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def _load() -> Any:
    from HanTa.HanoverTagger import HanoverTagger

    class Tagger(HanoverTagger):
        """Analyses a word that its lexicon lacks once: a third of the time."""

        @lru_cache(maxsize=1 << 17)  # noqa: B019  # one object, which lives as long as the process
        def analyze_forward(self, word: str) -> list[tuple[int, float]]:
            return super().analyze_forward(word)

    return Tagger("morphmodel_en.pgz")
