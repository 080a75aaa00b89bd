"""How much is lost with a part of the sentences?"""

from __future__ import annotations

import dataclasses

import numpy as np

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import generator, task
from fast_goal.evaluation.tasks.long import long_captions


@task(
    "dropped",
    "Dropped sentences",
    "{config.dropped:.0%} of the sentences of each long caption are left out at random, but for one at least; the others keep "
    "their order (seed {config.seed}).",
)
def dropped(study: Study) -> list[Variant]:
    """The long captions, each without `evaluate.dropped` of its sentences (rounded half up)."""
    queries, counts = [], []
    for (text,), sentences in zip(long_captions(study).queries, study.asked.sentences, strict=True):
        keep = max(1, len(sentences) - int(study.config.dropped * len(sentences) + 0.5))
        kept = np.sort(generator("dropped", study.config.seed, text).permutation(len(sentences))[:keep])
        queries.append((" ".join(sentences[place] for place in kept),) if keep < len(sentences) else (text,))
        counts.append(keep)
    return [dataclasses.replace(study.whole, name="dropped", queries=queries, sentences=np.array(counts), altered=True)]
