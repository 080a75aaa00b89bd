"""From a language model's answer to hard negatives. What surrounds the JSON object may be anything; what it holds is held
against the caption, and what is refused has a reason to count by."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fast_goal.data.captioning.editing import refuses
from fast_goal.data.generation import Answer
from fast_goal.negatives.llm_prompt import count_words

NO_OBJECT = "no JSON object"
CUT = "cut off by max_new_tokens"
EMPTY_ANSWER = "empty answer"
REFUSED = "refused by the model"
UNKNOWN = "unknown type"
MISSING = "missing"
NOT_TEXT = "not text"
EMPTY = "empty"
UNREADABLE = "unreadable characters"
SAME = "the caption itself"
SHORT = "too short"
LONG = "too long"
OTHER = "another text than the caption"

SHORTEST, LONGEST, SLACK = 0.5, 1.5, 2  # of the caption's words; guesses: one small change needs less
COMMON = 0.4  # of the words, that stay; of a caption of so few ...
FEW = 3  # ... words any may be replaced
_READ = 20_000  # characters of an answer, beyond which it has gone astray
_BEGINNINGS = 50  # curly brackets at which an object is looked for
_SPACE = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder(strict=False)  # line breaks inside of texts are common
_END = re.compile(r"[.!?…。！？]+$")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»"}


@dataclass
class Reading:
    """accepted: pairs of a type and a text, in the answer's order. refused: pairs of a type ("" for the whole answer) and a
    reason. declined: types that the model says the caption does not allow."""

    accepted: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    declined: set[str] = field(default_factory=set)


def read(answer: Answer, text: str, wanted: Sequence[str], allowed: Sequence[str]) -> Reading:
    """What the answer to a question about `text` brings. wanted: the types that were asked for; allowed: those that may be
    there."""
    reading, seen = Reading(), set()
    pairs = next((pairs for pairs in _objects(answer.text) if any(_type(key) in allowed for key, _ in pairs)), None)
    if pairs is None:
        pairs = next(_objects(answer.text), None)
    if not pairs:
        reading.refused.append(("", _no_object(answer, pairs)))
        return reading
    for key, value in pairs:
        kind = _type(key)
        if kind not in allowed:
            reading.refused.append((kind, UNKNOWN))
            continue
        seen.add(kind)
        if value is None:
            reading.declined.add(kind)
            continue
        for one in value if isinstance(value, list) else [value]:
            made = in_style(one, text) if isinstance(one, str) else ""
            if reason := fault(made, text) if isinstance(one, str) else NOT_TEXT:
                reading.refused.append((kind, reason))
            else:
                reading.accepted.append((kind, made))
    missing = CUT if answer.finish == "length" else MISSING
    reading.refused += [(kind, missing) for kind in wanted if kind not in seen]
    return reading


def in_style(text: str, caption: str) -> str:
    """One line that begins and ends as the caption does: a full stop too many would tell a negative by itself."""
    text = " ".join(text.split())
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and caption[:1] != text[0]:
        text = text[1:-1].strip()
    ends = _END.search(caption.rstrip())
    text = _END.sub("", text).rstrip() + (ends.group() if ends else "")
    if caption[:1].isupper():
        text = text[:1].upper() + text[1:]
    elif caption[:1].islower() and not text[1:2].isupper():  # `TV` stays
        text = text[:1].lower() + text[1:]
    return text


def fault(text: str, caption: str) -> str:
    """Why a text cannot be a negative of the caption, or ""."""
    words, own = _words(text), _words(caption)
    count, most = count_words(text), count_words(caption)
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn") or letter == "\ufffd" for letter in text):
        return UNREADABLE
    if not words:
        return EMPTY
    if words == own:
        return SAME
    if count < SHORTEST * most:
        return SHORT
    if count > LONGEST * most + SLACK:
        return LONG
    common = (Counter(words) & Counter(own)).total()
    return OTHER if len(own) > FEW and common < COMMON * max(len(words), len(own)) else ""


def _no_object(answer: Answer, pairs: Sequence[Any] | None) -> str:
    if answer.finish == "refused" or refuses(answer.text):
        return REFUSED
    if not answer.text.strip():
        return EMPTY_ANSWER
    if answer.finish == "length" and pairs is None:
        return CUT
    return NO_OBJECT if pairs is None else MISSING


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _type(key: str) -> str:
    return re.sub(r"[\s-]+", "_", key.strip().lower())[:40]


def _objects(text: str) -> Iterator[list[tuple[str, Any]]]:
    """The pairs of each JSON object in a text that has some; of one that is cut off, those that are whole. What a model
    thinks aloud before it answers does not count."""
    text = text[-_READ:] if "</think>" in text[-_READ:] else text[:_READ]
    text = text.rpartition("</think>")[2]
    place = -1
    for _ in range(_BEGINNINGS):
        place = text.find("{", place + 1)
        if place < 0:
            return
        pairs = _pairs(text, place + 1)
        inner = [value for _, value in pairs if isinstance(value, Mapping)]
        if inner and len(pairs) == 1:  # {"negatives": {...}}
            pairs = list(inner[0].items())
        if pairs or text[place + 1 :].lstrip().startswith("}"):
            yield pairs


def _pairs(text: str, place: int) -> list[tuple[str, Any]]:
    """The pairs from behind a curly bracket to its end, or to what cannot be read."""
    pairs = []
    while True:
        place = _SPACE.match(text, place).end()
        if place >= len(text) or text[place] != '"':
            return pairs
        try:
            key, place = _DECODER.raw_decode(text, place)
            place = _SPACE.match(text, place).end()
            if place >= len(text) or text[place] != ":":
                return pairs
            value, place = _DECODER.raw_decode(text, _SPACE.match(text, place + 1).end())
        except (ValueError, RecursionError):
            return pairs
        pairs.append((key, value))
