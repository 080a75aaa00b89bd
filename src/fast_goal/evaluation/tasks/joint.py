"""Joint retrieval of whole images and their regions (GOAL's joint mAP), see evaluation/joint.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fast_goal.evaluation.comparison import MODELS, Study, difference, percent
from fast_goal.evaluation.features import Box, pixel_box
from fast_goal.evaluation.joint import JointPrecision, joint_precision, link
from fast_goal.evaluation.retrieval import DIRECTIONS
from fast_goal.evaluation.tasks import Needs, NotAsked, generator, task
from fast_goal.evaluation.tasks.long import long_captions

K = 10  # as GOAL has it


@task(
    "joint",
    "Whole images and regions in one pool",
    f"Items are the whole images with their long captions, and one region of each image with its sentence. mAP@{K}: relevant "
    "for an item are its text and that of its whole image or region; the divisor is the number of relevant candidates.",
)
class Joint:
    """mAP@K of both models and their difference.

    The region is FLISM's best of the image; where the data set has true boxes, one of them drawn at random.
    """

    def needs(self, study: Study) -> Needs:
        """The captions, the regions' sentences, and the crops. Raises NotAsked where no image has a region."""
        rows = self._regions(study)
        texts = [*long_captions(study).texts, *(study.asked.regions.sentences[row] for row in rows)]
        return Needs([(text, None) for text in texts], crops=self._crops(study, rows))

    def measure(self, study: Study) -> dict[str, Any]:
        """See Task."""
        asked, rows = study.asked, self._regions(study)
        whole, local = asked.long.images, asked.regions.images[rows]
        texts = [*asked.long.texts, *(asked.regions.sentences[row] for row in rows)]
        distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        item_texts = torch.tensor([distinct[text] for text in texts])
        originals = link(whole.tolist(), local.tolist())
        precision = {}
        for model in MODELS:
            store = study.stores[model]
            crops = store.images([asked.files[row] for row in local], [box for _, box in self._crops(study, rows)])
            images = torch.cat([study.image_features[model][whole], crops])
            precision[model] = joint_precision(images, store.texts(list(distinct))[0], item_texts, originals, K)
        scenes = asked.groups[np.concatenate([whole, local])]
        # a text of several items counts with the scene of the first
        first = np.unique(item_texts.numpy(), return_index=True)[1]
        groups = {"image_to_text": scenes, "text_to_image": scenes[first]}
        return {
            "images": len(whole),
            "regions": len(local),
            "texts": len(distinct),
            "boxes": asked.regions.source,
            "divisor": "relevant",
            **{model: {way: {f"mAP@{K}": percent(_values(precision[model], way))} for way in DIRECTIONS} for model in MODELS},
            "difference": {
                way: {
                    f"mAP@{K}": difference(
                        {model: _values(precision[model], way) for model in MODELS}, groups[way], study.config.bootstrap_samples
                    )
                }
                for way in DIRECTIONS
            },
        }

    def _regions(self, study: Study) -> list[int]:
        """One row of the regions for each image that has any."""
        regions, captioned = study.asked.regions, set(study.asked.long.images.tolist())
        chosen: dict[int, tuple[float, int]] = {}
        for row, (image, sentence) in enumerate(zip(regions.images.tolist(), regions.sentences, strict=True)):
            if image in captioned:
                drawn = generator("joint", study.config.seed, f"{study.asked.image_ids[image]} {sentence}").random()
                chosen[image] = min(chosen.get(image, (1.0, row)), (drawn, row))
        if not chosen:
            raise NotAsked("boxes")
        return [row for _, row in chosen.values()]

    def _crops(self, study: Study, rows: list[int]) -> list[tuple[int, Box | None]]:
        regions, files = study.asked.regions, study.asked.files
        return [
            (image, pixel_box(regions.boxes[row], files[image].size))
            for row, image in zip(rows, regions.images[rows].tolist(), strict=True)
        ]


def _values(precision: JointPrecision, way: str) -> np.ndarray:
    return getattr(precision, way).numpy()
