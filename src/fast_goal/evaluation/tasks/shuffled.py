"""Does the order of the sentences matter?"""

from __future__ import annotations

import dataclasses

from fast_goal.evaluation.comparison import Study, Variant
from fast_goal.evaluation.tasks import generator, task
from fast_goal.evaluation.tasks.long import long_captions


@task(
    "shuffled",
    "Shuffled sentences",
    "The sentences of each long caption in a random order, another than their own (seed {config.seed}).",
)
def shuffled(study: Study) -> list[Variant]:
    """The long captions, each with its sentences in another order; one of a single sentence stays as it is."""
    queries = []
    for (text,), sentences in zip(long_captions(study).queries, study.asked.sentences, strict=True):
        draw, order = generator("shuffled", study.config.seed, text), list(range(len(sentences)))
        while len(sentences) > 1 and order == sorted(order):
            order = draw.permutation(len(sentences)).tolist()
        queries.append((" ".join(sentences[place] for place in order),) if len(sentences) > 1 else (text,))
    return [dataclasses.replace(study.whole, name="shuffled", queries=queries, altered=True)]
