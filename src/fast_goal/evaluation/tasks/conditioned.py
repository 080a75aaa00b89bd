"""Retrieval by text-conditioned pooling (FLAIR), beside the plain embeddings of the same model.

Letters: `I` images, `T` queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fast_goal.evaluation import conditioned
from fast_goal.evaluation.comparison import Study, Variant, differences, percent
from fast_goal.evaluation.conditioned import MODES, Asked
from fast_goal.evaluation.retrieval import DIRECTIONS, summary
from fast_goal.evaluation.tasks import Needs, NotAsked, queries_of, task
from fast_goal.model.conditioned import ConditionedScorer

MODEL = "finetuned"
TIMED_NUMBERS = 1 << 26  # keys and values of the images that are held to time a query: 256 MB, a guess


@task(
    "conditioned",
    "Asked by the text",
    "The fine-tuned model compares each text with each image as that text pools its patches (conditioned); with the image's "
    "plain embedding, as in all other sections (global); and by the latter first, the best {config.rerank} of each query again "
    "by the former (rerank).",
)
class Conditioned:
    """The recall of each mode both ways, the difference from `global`, and the time of a query."""

    def needs(self, study: Study) -> Needs:
        """The queries, and the fine-tuned model's patches. Raises NotAsked where it has no pooling, or there is no query."""
        if study.stores[MODEL].clip.pooling is None:
            raise NotAsked("a model with text-conditioned pooling")
        texts = [(text, variant.tokens) for _, variant in _variants(study) for text in variant.texts]
        return Needs(texts, patches=True, patches_of=[MODEL])

    def measure(self, study: Study) -> dict[str, Any]:
        """By retrieval task of `evaluate.conditioned_on`; see `_measured`."""
        clip = study.stores[MODEL].clip.to(study.stores[MODEL].device)
        scorer = ConditionedScorer(clip.pooling.pooling)
        return {name: _measured(study, scorer, variant, name) for name, variant in _variants(study)}


def _variants(study: Study) -> Iterator[tuple[str, Variant]]:
    """What is asked, by name. Raises NotAsked where all tasks do."""
    reasons, some = [], False
    for name in study.config.conditioned_on:
        try:
            found = queries_of(study, name)
        except NotAsked as reason:
            reasons.append(str(reason))
            continue
        some = True
        yield from ((name if variant.name == name else f"{name}_{variant.name}", variant) for variant in found)
    if not some:
        raise NotAsked(" or ".join(dict.fromkeys(reasons)) or "queries")


def _measured(study: Study, scorer: ConditionedScorer, variant: Variant, name: str) -> dict[str, Any]:
    """For each mode and direction what `retrieval.summary` gives, and `tied` (see comparison.py); `difference`: from `global`,
    with interval and p over the images. `seconds_per_query`: the median for a text that asks `timed_images` images."""
    config, store, files = study.config, study.stores[MODEL], study.asked.files
    asked = Asked(
        image_features=study.image_features[MODEL],
        text_features=study.features(MODEL, variant),
        queries=store.queries(variant.texts, variant.tokens),
        owners=torch.from_numpy(variant.images),
        pictures=torch.from_numpy(np.unique([file.content for file in files], return_inverse=True)[1]),
        tokens=lambda rows: store.tokens([files[row] for row in rows]),
    )
    known, said = study.ranks(MODEL, variant), f"conditioned, {name}"
    found = conditioned.mode_ranks(scorer, asked, known, config.rerank, config.score_block, said)
    queries = found["global"]["best"].query_images.numpy()
    resampled = {"text_to_image": study.asked.groups[variant.images], "image_to_text": study.asked.groups[queries]}

    def of(mode: str, ties: str, direction: str) -> np.ndarray:
        return getattr(found[mode][ties], direction).numpy()

    numbers: dict[str, Any] = {
        mode: {
            direction: {
                **summary(getattr(found[mode]["best"], direction), config.ks),
                "tied": percent(of(mode, "best", direction) != of(mode, "worst", direction)),
            }
            for direction in DIRECTIONS
        }
        for mode in MODES
    }
    numbers["difference"] = {
        mode: {
            direction: differences(
                # of one model: the mode takes the place of the fine-tuned model, `global` that of the base
                {"finetuned": of(mode, "best", direction), "base": of("global", "best", direction)},
                {f"R@{k}": k for k in config.ks},
                resampled[direction],
                config.bootstrap_samples,
            )
            for direction in DIRECTIONS
        }
        for mode in MODES[1:]
    }
    timed = max(1, min(len(files), TIMED_NUMBERS // (2 * store.patch_count * store.clip.embed_dim)))
    return {
        "images": len(files),
        "captions": len(variant.queries),
        "top_k": config.rerank,
        **numbers,
        "seconds_per_query": conditioned.seconds_per_query(scorer, asked, timed, config.rerank),
        "timed_images": timed,
    }
