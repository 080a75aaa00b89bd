"""Robustness against a false statement (FAST-GOAL, Table XVII)."""

from __future__ import annotations

import dataclasses

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import NotAsked, generator, task
from fast_goal.evaluation.tasks.long import long_captions

TRIES = 1000  # a guess: drawn sentences that may all belong to the same scene, or stand in the caption, before we give up


@task(
    "robustness",
    "One false sentence",
    "Into the middle of each long caption goes one sentence of another image, drawn at random (seed {config.seed}). The paper "
    "reports the mean drop of R@1 over both directions.",
)
def robustness(study: Study) -> list[Variant]:
    """The long captions, each with a sentence of another scene after the first half of its own (rounded up).

    Raises NotAsked where no caption finds a sentence that it does not have itself.
    """
    whole, scenes = long_captions(study), study.asked.groups
    pool = [(row, text) for row, found in zip(whole.images, study.asked.sentences, strict=True) for text in found]
    queries, inserted = [], 0
    for (text,), sentences, image in zip(whole.queries, study.asked.sentences, whole.images, strict=True):
        draw = generator("robustness", study.config.seed, text)
        drawn = (pool[draw.integers(len(pool))] for _ in range(TRIES))
        false = next((other for row, other in drawn if scenes[row] != scenes[image] and other not in text), None)
        if false is None:
            queries.append((text,))
            continue
        middle = (len(sentences) + 1) // 2
        queries.append((" ".join([*sentences[:middle], false, *sentences[middle:]]),))
        inserted += 1
    if not inserted:
        raise NotAsked("sentences of other images")
    return [dataclasses.replace(whole, name="robustness", queries=queries, altered=True)]
