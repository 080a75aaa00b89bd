"""Compositional understanding: is the true caption told from foils that differ from it in a word, or in the order of words?

SugarCrepe (arXiv 2306.14610), ARO (arXiv 2210.01936), VALSE (arXiv 2112.07566), and the same of generated scenes. `RULES` says
how each suite is summed up; one that it does not name is summed up plainly.

Letters: `C` choices, `N` candidates, the captions and foils of all choices, `D` embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fast_goal.evaluation.comparison import MODELS, Study
from fast_goal.evaluation.embedding import Choices
from fast_goal.evaluation.features import FeatureStore, ImageFile
from fast_goal.evaluation.retrieval import scores_of_pairs
from fast_goal.evaluation.suites import Answered, Rule, compare_suite
from fast_goal.evaluation.tasks import Needs, NotAsked, task

AT_ONCE = 32_768  # candidates whose features are held in memory: 64 MB of 512 numbers
# Relations of Visual Genome that are as true the other way round, or nearly so, and that ARO's own figures leave out.
SYMMETRIC = """
adjusting; around; attached to; beside; between; bigger than; biting; boarding; brushing; by; chewing; cleaning; climbing;
close to; coming from; coming out of; contain; crossing; dragging; draped over; drinking; drinking from; driving; driving down;
driving on; eating from; eating in; enclosing; exiting; facing; filled with; floating in; floating on; flying; flying above;
flying in; flying over; flying through; full of; going down; going into; going through; grazing in; growing in; growing on;
guiding; hanging from; hanging in; hanging off; hanging over; higher than; holding onto; hugging; in between; jumping off;
jumping on; jumping over; kept in; larger than; leading; leaning over; leaving; licking; longer than; looking in; looking into;
looking out; looking over; looking through; lying next to; lying on top of; making; mixed with; mounted on; moving; near;
next to; of; on the back of; on the edge of; on the front of; on the other side of; on the side of; opening; painted on;
parked at; parked beside; parked by; parked in; parked in front of; parked near; parked next to; perched on; petting; piled on;
playing; playing in; playing on; playing with; pouring; reaching for; reading; reflected on; riding on; running in; running on;
running through; seen through; sitting behind; sitting beside; sitting by; sitting in front of; sitting near; sitting next to;
sitting under; skiing down; skiing on; sleeping in; sleeping on; smiling at; sniffing; splashing; sprinkled on; stacked on;
standing against; standing around; standing behind; standing beside; standing in front of; standing near; standing next to;
staring at; stuck in; surrounding; swimming in; swinging; talking to; topped with; touching; traveling down; traveling on;
tying; typing on; underneath; wading in; waiting for; walking across; walking by; walking down; walking next to;
walking through; with; working in; working on; worn on; wrapped around; wrapped in
"""
RULES = {
    "sugarcrepe": Rule("macro", families={"replace": ("replace",), "swap": ("swap",), "add": ("add",)}),
    "vg_relation": Rule("macro", left_out=frozenset(" ".join(SYMMETRIC.split()).split("; "))),
    "vg_attribution": Rule("macro", least=25),
    "coco_order": Rule(),
    "flickr_order": Rule(),
    "valse": Rule("macro", families={"counting": ("counting",), "actions": ("act",), "coreference": ("coref",)}),
}


@task(
    "composition",
    "True and false captions",
    "The image, or a crop of it, is shown with its own caption and with foils that are false of it. Right is where its own "
    "caption scores strictly above all the foils; a tie is wrong.",
)
class Composition:
    """The accuracy of both models by suite, group and family of groups, their difference, and chance."""

    def needs(self, study: Study) -> Needs:
        """The captions, the foils and the crops. Raises NotAsked where there are none."""
        choices = _asked(study)
        return Needs([(text, None) for text in dict.fromkeys(_candidates(choices))], list(dict.fromkeys(choices.crops)))

    def measure(self, study: Study) -> dict[str, Any]:
        """By suite. `truncated` counts the choices of which a model does not see every text to its end."""
        choices = _asked(study)
        asked = _Asked(choices, study.asked.files)
        answers = {model: asked.answers(study.stores[model]) for model in MODELS}
        units = study.asked.groups[np.array([row for row, _ in choices.crops], dtype=np.int64)]
        found = {}
        for suite in dict.fromkeys(choices.suites.tolist()):
            mine = choices.suites == suite
            found[suite] = compare_suite(
                {model: Answered(right[mine], tied[mine]) for model, (right, tied, _) in answers.items()},
                choices.groups[mine],
                1 / asked.counts[mine],
                units[mine],
                RULES.get(suite, Rule()),
                study.config.bootstrap_samples,
            )
            found[suite]["truncated"] = {model: int(over[mine].sum()) for model, (_, _, over) in answers.items()}
            found[suite]["context_length"] = {model: study.stores[model].context_length for model in MODELS}
        return found


class _Asked:
    """The choices laid out: the candidates of each in a row, its own caption first."""

    def __init__(self, choices: Choices, files: Sequence[ImageFile]):
        self._files = files
        self.counts = np.array([1 + len(foils) for foils in choices.foils], dtype=np.int64)  # [C]
        self._ends = self.counts.cumsum()
        self._texts, self._text_rows = _distinct(_candidates(choices))  # of each candidate, [N]
        self._crops, self._crop_rows = _distinct(choices.crops)  # of each choice, [C]

    def answers(self, store: FeatureStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right, tied (see Answered) and truncated: bool [C] each."""
        parts = [self._part(store, *chunk) for chunk in self._chunks]
        right, tied, over = (np.concatenate(part) for part in zip(*parts, strict=True))
        return right, tied, over

    @cached_property
    def _chunks(self) -> list[tuple[int, int]]:
        """Runs of choices with at most AT_ONCE candidates, or one choice."""
        chunks, start = [], 0
        while start < len(self.counts):
            before = self._ends[start] - self.counts[start]
            stop = max(start + 1, int(np.searchsorted(self._ends, before + AT_ONCE, side="right")))
            chunks.append((start, stop))
            start = stop
        return chunks

    def _part(self, store: FeatureStore, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts, before = self.counts[start:stop], self._ends[start] - self.counts[start]
        first = self._ends[start:stop] - counts - before  # where the candidates of each choice begin, its own caption
        texts, columns = np.unique(self._text_rows[before : self._ends[stop - 1]], return_inverse=True)
        crops, rows = np.unique(self._crop_rows[start:stop], return_inverse=True)
        text_features, lengths = store.texts([self._texts[text] for text in texts])
        shown = [self._crops[crop] for crop in crops]
        image_features = store.images([self._files[row] for row, _ in shown], [box for _, box in shown])
        scores = scores_of_pairs(
            image_features, text_features, torch.from_numpy(np.repeat(rows, counts)), torch.from_numpy(columns)
        ).numpy()  # float32 [n]
        own = scores[first]
        scores[first] = -np.inf
        best = np.maximum.reduceat(scores, first)  # of the foils
        longest = np.maximum.reduceat(lengths[columns], first)
        return own > best, own == best, longest > store.context_length


def _asked(study: Study) -> Choices:
    if study.asked.choices is None:
        raise NotAsked("captions to choose from")
    return study.asked.choices


def _candidates(choices: Choices) -> Iterator[str]:
    for caption, foils in zip(choices.captions, choices.foils, strict=True):
        yield caption
        yield from foils


def _distinct(values: Any) -> tuple[list[Any], np.ndarray]:
    """Each value once, and where each of them stands there."""
    places: dict[Any, int] = {}
    rows = [places.setdefault(value, len(places)) for value in values]
    return list(places), np.array(rows, dtype=np.int64)
