"""Models that write text, here or behind a server: what a captioner of images and a writer of hard negatives share.

`local.py` runs a model through transformers, `text.py` one that reads text; `server.py` asks OpenAI's chat interface;
`asking.py` works through many questions and keeps each answer (`store.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "refused"]  # length: the model was cut off by max_new_tokens


@dataclass(frozen=True)
class Answer:
    """What a model said, word for word, and why it stopped. model: its name, with the revision where that is known."""

    text: str
    finish: Finish
    model: str


@dataclass(frozen=True)
class Failure:
    """No answer to be had to one question: `reason` is one of a few words, to count by. The next run asks again."""

    reason: str
    detail: str


Result = Answer | Failure
