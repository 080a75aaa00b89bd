"""Fine-grained retrieval: each sentence of a long caption asks for its image."""

from __future__ import annotations

import numpy as np

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import task
from fast_goal.evaluation.tasks.long import long_captions


@task(
    "sentences",
    "Single sentences",
    "Every sentence of the long captions is a query of its own; image to text, the best of an image's sentences counts. Other "
    "images may fit a sentence as well.",
)
def sentences(study: Study) -> list[Variant]:
    """Every sentence of every long caption."""
    whole = long_captions(study)
    queries = [(sentence,) for found in study.asked.sentences for sentence in found]
    return [Variant("sentences", queries, np.repeat(whole.images, [len(found) for found in study.asked.sentences]))]
