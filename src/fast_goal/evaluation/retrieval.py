"""Text-to-image and image-to-text retrieval: exact ranks and recall@k.

Letters: `I` images, `T` texts, `D` embedding width. An image may have any number of texts, also none; every text
belongs to one image, `text_to_image[t]`.

Rank of a query = 1 + the number of candidates that score strictly above its best positive. A tie therefore counts for
the query (`ties="best"`). The other bound, in which every tied wrong candidate stands before the positive, is
`ties="worst"`; where the two differ, the recall hangs on ties and should not be believed. A model that gives every
input the same embedding has recall 100 % under the first and 0 % under the second.

* text-to-image: candidates are the images; the one positive is the text's own image. Every text is a query.
* image-to-text: candidates are the texts; the positives are the image's own texts and the best-ranked of them counts.
  Every image with at least one text is a query; an image without any has nothing to find and is left out, but stays a
  candidate of the other direction.

This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ties = Literal["best", "worst"]
DIRECTIONS = ("text_to_image", "image_to_text")


class Ranks(NamedTuple):
    """Ranks, 1 is the best."""

    text_to_image: Tensor  # int64 [T], of each text's image among the I images
    image_to_text: Tensor  # int64 [Q], of the best own text among the T texts, for the Q images that have a text
    query_images: Tensor  # int64 [Q], the row of each such image, ascending


def ranks(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, chunk: int = 1024, ties: Ties = "best"
) -> Ranks:
    """Exact ranks of both directions.

    The dot products are compared in float32 whatever the dtype of the features. They are summed in float64 first, so
    that two equal texts score exactly the same wherever they stand, and no result depends on `chunk`. Features are
    taken as they are: normalise them before, if the score should be a cosine.

    Args:
        image_features: [I, D].
        text_features: [T, D].
        text_to_image: [T], row of the image of each text.
        chunk: queries per block; memory is chunk x max(I, T) scores.
        ties: whether a tied wrong candidate stands behind the positive (`best`) or before it (`worst`).

    Raises:
        ValueError: shapes that do not fit, no text, a row that does not exist, features that are not finite.
    """
    image_features, text_features, text_to_image = _checked(image_features, text_features, text_to_image, chunk)
    images, texts = image_features.double(), text_features.double()

    forward = []
    for rows in torch.arange(len(texts), device=texts.device).split(chunk):
        scores = (texts[rows] @ images.T).float()  # [C, I]
        own = scores.gather(1, text_to_image[rows, None])  # [C, 1]
        # the text's own image is the one candidate that is no rival; under `worst` it ties with itself
        rivals = (scores > own).sum(1) if ties == "best" else (scores >= own).sum(1) - 1
        forward.append(rivals + 1)

    queries = text_to_image.unique()  # ascending
    backward = []
    for rows in queries.split(chunk):
        scores = (images[rows] @ texts.T).float()  # [C, T]
        positive = text_to_image[None, :] == rows[:, None]  # [C, T]
        own = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)  # [C, 1]
        above = scores > own if ties == "best" else (scores >= own) & ~positive
        backward.append(above.sum(1) + 1)
    return Ranks(torch.cat(forward), torch.cat(backward), queries)


def recall_at_k(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    ks: Sequence[int],
    chunk: int = 1024,
    ties: Ties = "best",
) -> dict[str, dict[int, float]]:
    """Recall@k in percent: the share of queries whose rank is at most k.

    Arguments and errors as for `ranks`; a k above the number of candidates is allowed and gives 100.

    Returns:
        {"text_to_image": {k: percent}, "image_to_text": {k: percent}}
    """
    found = ranks(image_features, text_features, text_to_image, chunk, ties)
    return {direction: {k: _recall(getattr(found, direction), k) for k in ks} for direction in DIRECTIONS}


def summary(found: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """R@k in percent, mean and median rank, and the mean reciprocal rank, of ranks [Q] with Q > 0.

    The median of an even number of ranks is the mean of the middle two.
    """
    exact = found.double().sort().values
    middle = (exact[(len(exact) - 1) // 2] + exact[len(exact) // 2]) / 2
    return {
        **{f"R@{k}": _recall(found, k) for k in ks},
        "mean_rank": exact.mean().item(),
        "median_rank": middle.item(),
        "mrr": (1 / exact).mean().item(),
    }


def _recall(found: Tensor, k: int) -> float:
    return 100 * (found <= k).double().mean().item()


def _checked(images: Tensor, texts: Tensor, text_to_image: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    text_to_image = torch.as_tensor(text_to_image, device=texts.device)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"expected features [I, D] and [T, D], got {tuple(images.shape)} and {tuple(texts.shape)}")
    if text_to_image.shape != texts.shape[:1]:
        raise ValueError(f"expected one image row per text, text_to_image [{len(texts)}], got {tuple(text_to_image.shape)}")
    if not len(texts) or not len(images):
        raise ValueError(f"nothing to rank: {len(images)} images and {len(texts)} texts")
    if text_to_image.is_floating_point() or text_to_image.min() < 0 or text_to_image.max() >= len(images):
        raise ValueError(f"text_to_image must hold whole image rows from 0 to {len(images) - 1}")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: expected at least 1")
    for name, features in (("image", images), ("text", texts)):
        bad = (~features.isfinite()).any(1).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(features)} rows of the {name} features are not finite, the first is row {bad[0]}"
            )
    return images.detach(), texts.detach(), text_to_image.long()
