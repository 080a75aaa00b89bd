"""From a model's answer to a caption, by a few rules that are counted; the answer itself stays in the store.

The rules, in this order: characters that no table can hold are removed; the text becomes one paragraph; what max_new_tokens
cut off in the middle of a sentence is dropped. An answer without text, without a full sentence, or that declines to
answer gives no caption.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from fast_goal.data.caption_checks import REFUSAL
from fast_goal.data.captioning import Answer, Failure
from fast_goal.data.captions import split_sentences

CHARACTERS = "control characters removed"
PARAGRAPH = "line breaks and blanks joined"
CUT = "unfinished last sentence dropped"

_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]]*$")
# Declining is what a caption begins with, these words apart: "a sign says: I'm sorry, we are closed" is a description.
_REFUSAL = re.compile(REFUSAL)
_INTERJECTIONS = re.compile(
    r"^(?:[\s\"'“”‘’*_,.!]+|(?:oh|well|hello|hi|unfortunately|however|sorry|apologies|my apologies)\b)+(?=\S)", re.IGNORECASE
)


@dataclass(frozen=True)
class Caption:
    """`rules` names those that changed the answer."""

    text: str
    rules: tuple[str, ...]


def clean(answer: Answer) -> Caption | Failure:
    """The caption that an answer gives."""
    text, rules = answer.text, []
    readable = "".join(letter for letter in text if letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cs"))
    if readable != text:
        rules.append(CHARACTERS)
    paragraph = " ".join(readable.split())
    if paragraph != readable.strip():
        rules.append(PARAGRAPH)
    if not paragraph:
        return Failure("empty answer", f"the model ended with {answer.finish!r}")
    if answer.finish == "refused" or refuses(paragraph):
        return Failure("refused", paragraph[:200])
    if answer.finish == "length":
        whole = full_sentences(paragraph)
        if not whole:
            return Failure("no full sentence", f"cut off by max_new_tokens: {paragraph[:200]}")
        if whole != paragraph:
            rules.append(CUT)
        paragraph = whole
    return Caption(paragraph, tuple(rules))


def refuses(text: str) -> bool:
    """Whether the text declines to describe: it begins with words of refusal, interjections before them apart."""
    return _REFUSAL.match(_INTERJECTIONS.sub("", text)) is not None


def full_sentences(text: str) -> str:
    """The text up to the end of its last full sentence; "" if there is none."""
    for sentence in reversed(split_sentences(text)):
        if _SENTENCE_END.search(sentence.text):
            return text[: sentence.end]
    return ""
