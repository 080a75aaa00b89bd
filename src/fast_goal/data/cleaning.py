"""Rules that change a published caption: named in the key `clean` of a data set, counted, and off unless asked for.

The published text stays in the source's own file below `data/datasets/<name>/` or in the downloads, so that taking a rule
out of params.yaml and running the step `download` again brings it back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

Rule = Literal["strip", "first_line", "collapse_whitespace"]
RULES: dict[Rule, Callable[[str], str]] = {
    "strip": str.strip,  # no white space at the ends
    "first_line": lambda text: text.split("\n", 1)[0],
    "collapse_whitespace": lambda text: re.sub(r"\s+", " ", text),  # line breaks and runs of blanks become one blank
}


class Cleaner:
    """Applies rules in their order; `notes` says how many captions each has changed."""

    def __init__(self, rules: Sequence[Rule]):
        self._rules = tuple(rules)
        self.changed: Counter[str] = Counter()

    def __call__(self, caption: str) -> str:
        """The caption after all rules."""
        for rule in self._rules:
            cleaned = RULES[rule](caption)
            self.changed[rule] += cleaned != caption
            caption = cleaned
        return caption

    @property
    def notes(self) -> list[str]:
        """A sentence for each rule."""
        return [f"the rule {rule} changed {self.changed[rule]:,} captions" for rule in self._rules]
