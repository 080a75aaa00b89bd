"""Averaged sentences, the baseline that needs no long context (FAST-GOAL, Table XV)."""

from __future__ import annotations

import dataclasses

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import task
from fast_goal.evaluation.tasks.long import long_captions


@task(
    "sentence_average",
    "Averaged sentences",
    "Each long caption is split into sentences; the query is the mean of their unit embeddings, made unit again.",
)
def sentence_average(study: Study) -> list[Variant]:
    """One query for each long caption, made of its sentences."""
    queries = [tuple(sentences) for sentences in study.asked.sentences]
    return [dataclasses.replace(long_captions(study), name="sentence_average", queries=queries, altered=True)]
