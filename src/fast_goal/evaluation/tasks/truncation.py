"""How much of a long caption is needed: the models see only its first tokens."""

from __future__ import annotations

import dataclasses

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import task
from fast_goal.evaluation.tasks.long import long_captions

FULL = "full"  # the variant that shows all that a model reads


@task(
    "truncation",
    "Truncated captions",
    "The models see only the first tokens of each long caption, start and end token included; full: as many as they read. A "
    "limit that cuts off no caption is left out.",
)
def truncation(study: Study) -> list[Variant]:
    """A variant for each limit of `evaluate.truncation` that hides something, then the full captions."""
    whole = long_captions(study)
    longest = min(study.lengths(whole).max(), max(store.context_length for store in study.stores.values()))
    limits = sorted({limit for limit in study.config.truncation if limit < longest})
    return [
        *(dataclasses.replace(whole, name=str(limit), tokens=limit, sentences=None, altered=True) for limit in limits),
        dataclasses.replace(whole, name=FULL),
    ]
