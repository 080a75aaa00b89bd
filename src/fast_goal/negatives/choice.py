"""Which candidates are kept: those that are another text, of a sensible size, that the model sees and tells apart.

As many of each type as there are, in turns; with which type a caption begins follows from its text and the seed, so that the
types are about equally frequent over a data set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from fast_goal.config import NegativesConfig
from fast_goal.data.captions import tokenize
from fast_goal.negatives import Candidate
from fast_goal.negatives.edits import edit_size
from fast_goal.negatives.vocabulary import caption_hash

LENGTHS = (0.6, 1.7)  # of a negative in characters, as a share of the caption's; a guess
# By type: the least words that differ; and at most so many, or this share of the caption's words. Guesses.
EDITS = {
    "reshuffle": (2, 4, 1.0),
    "swap_nouns": (2, 8, 0.5),
    "swap_adjectives": (2, 8, 0.5),
    "replace_adjectives": (1, 4, 0.3),
    "replace_nouns": (1, 4, 0.3),
}
KEEP_WORDS = ("reshuffle", "swap_nouns", "swap_adjectives")  # types that put the same words elsewhere
ADDED = 1  # words that may be another form there, as `are` for `is`; an article is none. A guess
_WORD = re.compile(r"\w+")
_ARTICLES = frozenset(("a", "an"))
Similarity = Callable[[Sequence[tuple[str, str]]], np.ndarray]


@dataclass
class Chosen:
    """kept: of each caption, with the cosine of its negative and itself (NaN where it was not measured). dropped: of each
    caption, the reasons for what was left out; what was merely not needed is in none of them."""

    kept: list[list[tuple[Candidate, float]]]
    dropped: list[Counter[str]] = field(default_factory=list)


def choose(
    captions: Sequence[str],
    candidates: Sequence[Sequence[Candidate]],
    true: Sequence[Collection[str]],
    config: NegativesConfig,
    context_length: int,
    similarity: Similarity | None,
) -> Chosen:
    """Chooses for each caption at most `per_caption` of its candidates.

    true: of each caption, all captions of the images that have it. context_length: tokens that the model reads. similarity:
    the cosines of pairs of texts by the base's text embeddings; None where `max_similarity` is.
    """
    waiting: list[list[Candidate]] = []
    result = Chosen([[] for _ in captions])
    for caption, offered, others in zip(captions, candidates, true, strict=True):
        dropped: Counter[str] = Counter()
        sound, seen = [], set()
        for candidate in offered:
            reason = problem(caption, candidate, config.types) or ("a true caption" if candidate.text in others else "")
            reason = reason or ("twice" if candidate.text in seen else "")
            seen.add(candidate.text)
            if reason:
                dropped[reason] += 1
            else:
                sound.append(candidate)
        waiting.append(_in_turns(sound, config.types, int.from_bytes(caption_hash(caption, config.seed)[:4])))
        result.dropped.append(dropped)
    beyond = tokenize(captions, context_length)[1].numpy() > context_length
    asked = list(range(len(captions)))
    while asked:  # each round looks at no more than what is still wanted: most candidates are never embedded
        pairs: list[tuple[int, Candidate]] = []
        for row in asked:
            lacking = config.per_caption - len(result.kept[row])
            while waiting[row] and lacking:
                candidate = waiting[row].pop(0)
                if beyond[row] and _looks_alike(captions[row], candidate.text, context_length):
                    result.dropped[row]["beyond the model's context"] += 1
                else:
                    pairs.append((row, candidate))
                    lacking -= 1
        texts = [(captions[row], candidate.text) for row, candidate in pairs]
        cosines = similarity(texts) if similarity is not None and texts else np.full(len(texts), np.nan)
        again = set()
        for (row, candidate), cosine in zip(pairs, cosines.tolist(), strict=True):
            if config.max_similarity is not None and cosine > config.max_similarity:
                result.dropped[row]["a paraphrase"] += 1
                again.add(row)
            else:
                result.kept[row].append((candidate, cosine))
        asked = sorted(row for row in again if waiting[row])
    return result


def problem(caption: str, candidate: Candidate, types: Collection[str]) -> str:
    """Why a candidate is none, in a few words to count by; empty where it is one."""
    if candidate.type not in types:
        return "type not asked for"
    if " ".join(candidate.text.split()) == " ".join(caption.split()):
        return "the caption itself"
    if not LENGTHS[0] * len(caption) <= len(candidate.text) <= LENGTHS[1] * len(caption):
        return "much longer or shorter"
    least, most, share = EDITS[candidate.type]
    size = edit_size(caption, candidate.text)
    if size < least:
        return "too few words changed"
    if size > max(most, share * len(caption.split())):
        return "too many words changed"
    if candidate.type in KEEP_WORDS and (_words(candidate.text) - _words(caption)).total() > ADDED:
        return "other words"
    return ""


def _words(text: str) -> Counter[str]:
    return Counter(word for word in _WORD.findall(text.casefold()) if word not in _ARTICLES)


def _in_turns(candidates: Sequence[Candidate], types: Sequence[str], first: int) -> list[Candidate]:
    """One of each type, then a second of each, and so on, beginning with the type number `first`."""
    order = [types[(first + step) % len(types)] for step in range(len(types))]
    queues = [[candidate for candidate in candidates if candidate.type == kind] for kind in order]
    return [candidate for turn in zip_longest(*queues) for candidate in turn if candidate is not None]


def _looks_alike(caption: str, negative: str, context_length: int) -> bool:
    tokens, _ = tokenize([caption, negative], context_length)
    return bool((tokens[0] == tokens[1]).all())
