"""The words of a data set's captions by kind, learnt from the captions themselves.

Two words are of one kind where they stand in the same contexts (Harris 1954): each word is the vector of what stands beside
it, weighted by positive pointwise mutual information (Church and Hanks 1990), and the kind of a word is its nearest words by
cosine. Synonyms are such too: those that `words.py` knows are left out.

`V` words, `F` contexts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fast_goal.data.speech import Word
from fast_goal.negatives.words import COLOURS, PICTURE_NOUNS, PLACE_NOUNS, PLACES, VAGUE, akin, class_of

CAPTIONS = 10_000  # that are read for it, those with the smallest hashes; a guess: words that are not in them are rare
WORDS, CONTEXTS = 3000, 4000  # the most frequent ones; a guess that keeps the matrix below 50 MB
RARE = 5000  # captions to one time that a word has to be met; two times at least
NEAREST = 12  # words that count as of one kind; a guess
LEAST = 0.1  # cosine below which no word is of the kind; a guess
FITTING = 0.05  # of the times a noun is met, with an article or without, from which on it may stand so; a guess
TAGS = ("NN1", "NN2", "AJ0")
_OWNING = frozenset(("of", "'s", "’s", "'"))
_ONE = frozenset(("a", "an", "one", "another", "each", "every"))


class Vocabulary:
    """kind(word, tag): what may stand in its place, the nearest first; fits(word, article): where a singular noun may stand."""

    def __init__(self, captions: Iterable[Sequence[Word]]):
        counts: dict[str, Counter[str]] = {tag: Counter() for tag in TAGS}
        contexts: dict[str, Counter[tuple[str, str]]] = {tag: Counter() for tag in TAGS}
        self._articles: Counter[tuple[str, str]] = Counter()
        self._singular = counts["NN1"]
        read = 0
        for words in captions:
            read += 1
            for place, word in enumerate(words):
                tag = "AJ0" if is_colour(word) else word.tag
                if tag not in counts or not usable(words, place):
                    continue
                lower = word.text.lower()
                counts[tag][lower] += 1
                contexts[tag].update((lower, context) for context in _contexts(words, place))
                if tag == "NN1":
                    self._articles[lower, article_of(words, place)] += 1
        least = max(2, read // RARE)
        self._nearest = {tag: _nearest(counts[tag], contexts[tag], least) for tag in TAGS}
        self._classes: dict[str, list[str]] = {}  # the words of each closed class, the most frequent first
        self._kinds: dict[tuple[str, str], list[str]] = {}  # what was asked for
        for word, count in sorted(counts["AJ0"].items(), key=lambda item: (-item[1], item[0])):
            if count >= least and class_of(word) != "other":
                self._classes.setdefault(class_of(word), []).append(word)

    def knows(self, word: str, tag: str) -> bool:
        """Whether the word is met often enough to stand in a negative."""
        return word in self._nearest[tag]

    def fits(self, word: str, article: str) -> bool:
        """Whether a singular noun is met as `article_of` says: neither `a water` nor `on plane`."""
        met = self._articles[word, article]
        return article == "the" or (met > 0 and met >= FITTING * self._singular[word])

    def kind(self, word: str, tag: str) -> list[str]:
        """Words of the same kind and number as the lower-case `word`, none of which means the same, the nearest first."""
        if (word, tag) not in self._kinds:
            of_class = tag == "AJ0" and class_of(word) != "other"
            found = self._classes.get(class_of(word), []) if of_class else self._nearest[tag].get(word, [])
            self._kinds[word, tag] = [other for other in found if not akin(word, other)]
        return self._kinds[word, tag]


def chosen(captions: Sequence[str], seed: int) -> list[str]:
    """The captions that the vocabulary is read from, in the order of their hashes: whatever order they come in."""
    return sorted(captions, key=lambda text: caption_hash(text, seed))[:CAPTIONS]


def caption_hash(text: str, seed: int) -> bytes:
    """What is drawn for a caption follows from it."""
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogatepass")).digest()


def is_colour(word: Word) -> bool:
    """Colours are told as nouns too: `in red`."""
    return word.text.lower() in COLOURS and word.tag in ("NN1", "NN0", "AJ0")


def usable(words: Sequence[Word], place: int) -> bool:
    """Whether the word says what is shown and how it looks: no name, no part of a compound (`tree line`) but its last, no
    `pair of`, no place in the picture (also `bottom-left`), no verb that is told as a noun (`is setting`)."""
    word, lower = words[place], words[place].text.lower()
    if len(word.text) < 3 or not word.text.replace("-", "").isalpha() or word.text.isupper():
        return False
    if word.text != lower and not starts(words, place):
        return False
    if "-" in lower and not (PICTURE_NOUNS | PLACE_NOUNS | PLACES).isdisjoint(lower.split("-")):
        return False
    if word.tag == "AJ0" or is_colour(word):
        return lower not in VAGUE | PLACES
    if lower.endswith("ing") and place and words[place - 1].kind in ("verb", "adverb"):
        return False
    following = words[place + 1] if place + 1 < len(words) else None
    owning = following is not None and following.text.lower() in _OWNING
    if owning or {lower, word.lemma} & (PICTURE_NOUNS | PLACE_NOUNS):
        return False
    return following is None or not (following.kind == "noun" or is_colour(following))  # nor `light gray`


def article_of(words: Sequence[Word], place: int) -> str:
    """How the phrase of a noun begins: with `a` or what counts as that, with nothing, or, as `the`, with anything else."""
    before = next((word for word in reversed(words[:place]) if word.kind not in ("noun", "adjective", "adverb")), None)
    if before is None or before.kind not in ("determiner", "number", "pronoun", "other"):
        return ""
    return "a" if before.text.lower() in _ONE else "the"


def starts(words: Sequence[Word], place: int) -> bool:
    """Whether the word is the first of a sentence."""
    return place == 0 or words[place - 1].text in (".", "!", "?", ":", '"', "“")


def _contexts(words: Sequence[Word], place: int) -> Iterator[str]:
    if place:
        yield f"before {words[place - 1].text.lower()}"
    if place + 1 < len(words):
        yield f"after {words[place + 1].text.lower()}"
    for back in range(place - 1, max(-1, place - 5), -1):  # what governs the phrase
        if words[back].kind in ("preposition", "verb"):
            yield f"governed {words[back].lemma}"
            break
    if words[place].kind == "adjective":
        head = next((word for word in words[place + 1 : place + 4] if word.kind == "noun"), None)
        if head is not None:
            yield f"of {head.lemma}"


def _nearest(counts: Counter[str], contexts: Counter[tuple[str, str]], least: int) -> dict[str, list[str]]:
    """The words of one tag, each with its nearest; ties by the alphabet."""
    names = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= least][:WORDS]
    totals: Counter[str] = Counter()
    for (_, context), count in contexts.items():
        totals[context] += count
    columns = {
        context: column
        for column, (context, _) in enumerate(sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:CONTEXTS])
    }
    rows = {word: row for row, word in enumerate(names)}
    table = np.zeros((len(rows), len(columns)), np.float64)  # [V, F]
    for (word, context), count in contexts.items():
        if word in rows and context in columns:
            table[rows[word], columns[context]] = count
    total = table.sum()
    if not total:
        return {}
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(table / expected)
    information = np.where(table > 0, np.maximum(information, 0), 0)
    norms = np.linalg.norm(information, axis=1, keepdims=True)
    unit = information / np.where(norms > 0, norms, 1)
    # where a word stands tells its kind even if all words stand there: frequencies, beside what is special
    share = np.sqrt(table / np.maximum(table.sum(1, keepdims=True), 1))
    cosines = (unit @ unit.T + share @ share.T) / 2  # [V, V]
    np.fill_diagonal(cosines, 0)
    found = {}
    for row, word in enumerate(names):
        order = sorted(
            np.flatnonzero(cosines[row] >= LEAST).tolist(), key=lambda other: (-round(cosines[row, other], 9), other)
        )
        found[word] = [names[other] for other in order[: 4 * NEAREST]]
    return found
