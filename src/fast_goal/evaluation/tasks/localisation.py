"""Localisation of sentences by patches (FAST-GOAL, Table XVI)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fast_goal.evaluation.attention import attention_hits, has_pooling
from fast_goal.evaluation.comparison import MODELS, Study, differences, mean_chance, percent
from fast_goal.evaluation.embedding import held, patch_hits
from fast_goal.evaluation.tasks import Needs, NotAsked, task


@task(
    "localisation",
    "Localisation of sentences by patches",
    "A hit at k: the centre of one of the k patches most similar to the sentence lies in its box. Of a model with "
    "text-conditioned pooling also: of the k patches that the sentence attends to most.",
)
class Localisation:
    """hit@k of both models, their difference, what random patches would hit, and what the fine-tuned model's pooling does."""

    def needs(self, study: Study) -> Needs:
        """The sentences, and their images' patches. Raises NotAsked where none has a box."""
        if not study.asked.regions.sentences:
            raise NotAsked("boxes")
        patches = has_pooling(study.stores["finetuned"])
        return Needs(sentences=held(study.asked), patches=patches, patches_of=("finetuned",))

    def measure(self, study: Study) -> dict[str, Any]:
        """A sentence whose box holds no patch centre (`without_centre`) is a miss, with chance 0. Both depend on the view of
        the images: `chance` is that of the fine-tuned model, `chance_of_base` differs from it only where the views do. With
        models of different patches, `patches` is the number of the fine-tuned one. `attention`: hit@k by the weights of its
        pooling, where it has one."""
        regions, config = study.asked.regions, study.config
        hits = {model: patch_hits(study.stores[model], study.asked) for model in MODELS}
        patches = {model: study.stores[model].patch_count for model in MODELS}
        most = min(patches.values())
        found: dict[str, Any] = {
            "boxes": regions.source,
            "sentences": len(regions.sentences),
            "images": len(np.unique(regions.images)),
            "patches": patches["finetuned"],
            "without_centre": {model: int((hits[model].patches_inside == 0).sum()) for model in MODELS},
        }
        limits = {f"hit@{k}": min(k, most) for k in config.patch_ks}
        for model in MODELS:
            found[model] = {name: percent(hits[model].first_hits <= limit) for name, limit in limits.items()}
        ranks = {model: hits[model].first_hits for model in MODELS}
        groups = study.asked.groups[regions.images]
        found["difference"] = differences(ranks, limits, groups, config.bootstrap_samples)
        for name, model in (("chance", "finetuned"), ("chance_of_base", "base")):
            inside = hits[model].patches_inside
            found[name] = {f"hit@{k}": 100 * mean_chance(patches[model], inside, k) for k in config.patch_ks}
        if has_pooling(study.stores["finetuned"]):
            ranks = attention_hits(study.stores["finetuned"], study.asked)
            found["attention"] = {name: percent(ranks <= limit) for name, limit in limits.items()}
        return found
