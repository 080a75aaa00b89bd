"""Where texts look in images by text-conditioned pooling (FLAIR, arXiv 2412.03561): the weights of the patches.

Letters: `S` sentences, `I` images at once, `Q` most sentences of one of them, `N` patches, `D` embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fast_goal.evaluation.embedding import Questions, held, input_boxes
from fast_goal.evaluation.features import FeatureStore, ImageFile
from fast_goal.evaluation.localisation import centres_inside, first_hits
from fast_goal.model.inference import arithmetic

AT_ONCE = 64  # images whose patches are held in memory, a guess: 25 MB of 196 x 512


def has_pooling(store: FeatureStore) -> bool:
    """Whether the model was trained with a pooling."""
    return getattr(store.clip, "pooling", None) is not None


def attention(store: FeatureStore, files: Sequence[ImageFile], sentences: Sequence[tuple[int, str]]) -> Tensor:
    """How much each sentence looks at each patch of its image: [S, N], from 0 to 1; what is lacking to a sum of 1 goes to none
    of them. sentences: (row of `files`, text), in any order. Raises DataError as `FeatureStore.images`."""
    assert store.clip.pooling is not None
    pooling = store.clip.to(store.device).eval().pooling.pooling
    found = torch.zeros(len(sentences), store.patch_count)
    if not sentences:
        return found
    owners = np.array([row for row, _ in sentences], dtype=np.int64)
    queries = store.queries([text for _, text in sentences])
    images = np.unique(owners)
    for start in range(0, len(images), AT_ONCE):
        chosen = images[start : start + AT_ONCE]
        mine = np.flatnonzero(np.isin(owners, chosen))
        mine = mine[np.argsort(owners[mine], kind="stable")]
        places = np.searchsorted(chosen, owners[mine])  # of each sentence's image among the chosen ones
        slots = np.arange(len(mine)) - np.searchsorted(places, places)  # of each sentence among those of its image
        asked = torch.zeros(len(chosen), int(slots.max()) + 1, queries.shape[1])
        asked[places, slots] = queries[mine]
        with arithmetic("fp32", store.device):
            patches = store.tokens([files[row] for row in chosen]).to(store.device)
            weights = pooling.weights(patches, asked.to(store.device))  # [I, Q, N]
        found[mine] = weights.float().cpu()[places, slots]
    return found


def attention_hits(store: FeatureStore, asked: Questions) -> np.ndarray:
    """The rank of the patch in its box that each sentence looks at most, as `PatchHits.first_hits`: int64 [S]."""
    clip = store.clip
    inside = centres_inside(input_boxes(clip, asked), clip.image_size, clip.patch_size)
    return first_hits(attention(store, asked.files, held(asked)), inside).numpy()
