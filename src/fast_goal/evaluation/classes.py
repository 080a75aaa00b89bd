"""The embeddings of classes: of each the mean of the unit embeddings of its prompts, made unit again (arXiv 2103.00020, 3.1.4).

Letters: `K` classes, `D` embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast_goal.evaluation.comparison import Study, Variant

AT_ONCE = 16_384  # texts whose features are held in memory


def prompts(classes: Mapping[str, Sequence[Any]]) -> list[tuple[str, ...]]:
    """The texts of each class, from the `names` and `templates` of a suite."""
    return [tuple(template.replace("{}", name) for template in classes["templates"]) for name in classes["names"]]


def class_features(study: Study, model: str, classes: Mapping[str, Sequence[Any]]) -> Tensor:
    """[K, D]."""
    texts = prompts(classes)
    chunk = max(1, AT_ONCE // len(classes["templates"]))
    parts = [texts[start : start + chunk] for start in range(0, len(texts), chunk)]
    return torch.cat([study.features(model, Variant("", part, np.zeros(len(part), np.int64))) for part in parts])
