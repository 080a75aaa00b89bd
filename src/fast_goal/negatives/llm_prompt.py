"""What a language model is asked for hard negatives, and about which part of a caption.

One turn holds the task, the kinds that are wanted, a few examples of our own and the caption, so that a model without a chat
template can go on from it as well. Of a long caption only a run of whole sentences is shown and put back changed: the answer
holds the text once for each kind and has to end before max_new_tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fast_goal.data.captions import split_sentences
from fast_goal.files import digest

KINDS = {
    "reshuffle": "the same words in another order, so that the sentence says something else; no word is added or left out",
    "swap_nouns": "two nouns trade places, all else stays",
    "swap_adjectives": "two adjectives (colours, sizes, materials) trade places, all else stays",
    "replace_adjectives": "an adjective gives way to one of the same kind that is false here (another colour, another size); "
    "no synonym",
    "replace_nouns": "a noun gives way to another thing of the same kind that is not there; no synonym, no wider or narrower "
    "word",
}
# Three captions of our own; null where a kind is not to be had.
EXAMPLES: tuple[tuple[str, Mapping[str, str | None]], ...] = (
    (
        "A small brown dog sleeps on a red sofa next to a black cat.",
        {
            "reshuffle": "A black cat sleeps on a small brown sofa next to a red dog.",
            "swap_nouns": "A small brown cat sleeps on a red sofa next to a black dog.",
            "swap_adjectives": "A small black dog sleeps on a red sofa next to a brown cat.",
            "replace_adjectives": "A small brown dog sleeps on a green sofa next to a black cat.",
            "replace_nouns": "A small brown dog sleeps on a red bench next to a black cat.",
        },
    ),
    (
        "a man in a yellow coat walks past an old church while a woman reads a long newspaper",
        {
            "reshuffle": "a woman in a long coat walks past a yellow church while an old man reads a newspaper",
            "swap_nouns": "a woman in a yellow coat walks past an old church while a man reads a long newspaper",
            "swap_adjectives": "a man in a long coat walks past an old church while a woman reads a yellow newspaper",
            "replace_adjectives": "a man in a green coat walks past an old church while a woman reads a long newspaper",
            "replace_nouns": "a man in a yellow coat walks past an old church while a woman reads a long letter",
        },
    ),
    (
        "A boy throws a ball to a girl.",
        {
            "reshuffle": "A girl throws a boy to a ball.",
            "swap_nouns": "A girl throws a ball to a boy.",
            "swap_adjectives": None,
            "replace_adjectives": None,
            "replace_nouns": "A boy throws a hat to a girl.",
        },
    ),
)

TOKENS_PER_WORD = 1.6  # of an answer, a guess on the safe side: English takes 1.3
OVERHEAD = 12  # tokens of an answer for each kind: its name, quotes, a comma
FEWEST, MOST = 8, 80  # words that are shown; of many a model does not keep all but one as they are (a guess)
VISIBLE = 120  # words; the end of a long caption lies beyond the context of a text encoder, where no change is seen
# What counts as a word: a run of ASCII, or a few letters of a script that may do without blanks.
_WORD = re.compile(r"[!-~]{1,24}|[^\s!-~]{1,4}")


@dataclass(frozen=True)
class Part:
    """Of a caption: `caption[start:end] == text`."""

    text: str
    start: int
    end: int


def count_words(text: str) -> int:
    """Words of any script, roughly."""
    return len(_WORD.findall(text))


def words_shown(max_new_tokens: int, kinds: int) -> int:
    """The most words of a caption of which the answer holds `kinds` versions before it is cut off."""
    return min(MOST, max(FEWEST, int((max_new_tokens / kinds - OVERHEAD) / TOKENS_PER_WORD)))


def parts(caption: str, most: int, seed: int) -> list[Part]:
    """What can be shown of a caption, in the order in which it is: all of it where it has `most` words at most; else its
    first sentences in runs that are as long as they may be, from one that caption and seed decide. [] for a caption without
    words."""
    spans = [match.span() for match in _WORD.finditer(caption)]
    if not spans:
        return []
    if len(spans) <= most:
        return [_part(caption, spans[0][0], spans[-1][1])]
    seen = caption[: spans[min(len(spans), max(VISIBLE, most)) - 1][1]]
    sentences = [(sentence.start, sentence.end) for sentence in split_sentences(seen)]
    if len(seen) < len(caption) and len(sentences) > 1:
        sentences.pop()  # cut in the middle, most likely
    found: list[Part] = []
    while sentences:
        start, end = sentences.pop(0)
        while sentences and count_words(caption[start : sentences[0][1]]) <= most:
            _, end = sentences.pop(0)
        words = [match.end() for match in _WORD.finditer(caption, start, end)]
        found.append(_part(caption, start, words[most - 1] if len(words) > most else end))
    turn = int(digest([seed, caption], 8), 16) % len(found)
    return found[turn:] + found[:turn]


def question(text: str, kinds: Sequence[str], wrong: Mapping[str, str] | None = None, known: Sequence[str] = ()) -> str:
    """The prompt for a text and the wanted kinds. wrong: what was wrong with an earlier answer, by kind ("" for all of it);
    known: what has been written already."""
    lines = [
        "You get a true caption of a picture and write false ones that look like it. For each of the kinds below, write the "
        "caption again with one small change of that kind, so that it no longer describes the picture. Each false caption is "
        "correct, complete and in the language of the caption; everything that is not changed stays word for word, and nothing "
        "is negated. Where the caption does not allow a kind, write null.",
        "",
        *(f"- {kind}: {KINDS[kind]}" for kind in kinds),
        "",
        "Answer with one JSON object with the kinds as keys, and nothing else.",
    ]
    for caption, negatives in EXAMPLES:
        lines += ["", *_asked(caption), json.dumps({kind: negatives[kind] for kind in kinds}, ensure_ascii=False)]
    if wrong:
        faults = "; ".join(f"{kind}: {reason}" if kind else reason for kind, reason in wrong.items())
        lines += ["", f"An earlier answer could not be used ({faults}). Avoid that."]
    if known:
        lines += ["", f"Write others than these: {json.dumps(list(known), ensure_ascii=False)}"]
    return "\n".join([*lines, "", *_asked(text)])


def _asked(caption: str) -> list[str]:
    # as JSON, so that a caption cannot end before its end
    return [f"Caption: {json.dumps(caption, ensure_ascii=False)}", "Answer:"]


def _part(caption: str, start: int, end: int) -> Part:
    return Part(caption[start:end], start, end)
