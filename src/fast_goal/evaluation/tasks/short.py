"""Retrieval with short captions (FAST-GOAL, Table IV)."""

from __future__ import annotations

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import NotAsked, task


@task("short", "Retrieval with short captions", "An image may have several; image to text, the best of its own counts.")
def short(study: Study) -> list[Variant]:
    """Every short caption is a query."""
    captions = study.asked.short
    if not captions.texts:
        raise NotAsked("short captions")
    return [Variant("short", [(text,) for text in captions.texts], captions.images)]
