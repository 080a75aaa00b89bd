"""Retrieval with long captions (FAST-GOAL, Tables III and V)."""

from __future__ import annotations

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import NotAsked, task


def long_captions(study: Study) -> Variant:
    """The long captions as they are. Raises NotAsked where there are none."""
    if not study.asked.long.texts:
        raise NotAsked("long captions")
    return study.whole


@task("long", "Retrieval with long captions", "Each image has one long caption.")
def long(study: Study) -> list[Variant]:
    """The long captions."""
    return [long_captions(study)]
