"""Text-to-image and image-to-text retrieval: exact ranks and recall@k.

Letters: `I` images, `T` texts, `D` embedding width, `M` bars of a row. An image may have any number of texts, also none;
every text belongs to one image, `text_to_image[t]`.

Score = the dot product of the features as they are, its products added up in float64 in a fixed order (`paired_scores`),
rounded to float32. Rank of a query = 1 + the number of candidates that score strictly above its best positive. A tie
therefore counts for the query (`ties="best"`). The other bound, in which every tied wrong candidate stands before the
positive, is `ties="worst"`; where the two differ, the recall hangs on ties and should not be believed. A model that gives
every input the same embedding has recall 100 % under the first and 0 % under the second.

* text-to-image: candidates are the images; the one positive is the text's own image. Every text is a query.
* image-to-text: candidates are the texts; the positives are the image's own texts and the best-ranked of them counts.
  Every image with at least one text is a query; an image without any has nothing to find and is left out, but stays a
  candidate of the other direction.

Both directions are counted in one pass over chunk x chunk blocks of the score matrix. A matrix product adds up in an order
of its own, which may differ from block to block; where that could decide a comparison, the pair is scored again in the
fixed order. So no result depends on `chunk`, on where a row stands, on the number of threads or on the device.

This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ties = Literal["best", "worst"]
TIES: tuple[Ties, ...] = ("best", "worst")
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

    Features are taken as they are, in any dtype: normalise them before, if the score should be a cosine.

    Args:
        image_features: [I, D].
        text_features: [T, D].
        text_to_image: [T], row of the image of each text.
        chunk: rows of either side per block; memory beyond the features is some chunk x (chunk + D) numbers of float64.
        ties: whether a tied wrong candidate stands behind the positive (`best`) or before it (`worst`).

    Raises:
        ValueError: shapes that do not fit, no text, a row that does not exist, features that are not finite or so large
            that their products exceed float32.
    """
    return _ranks(image_features, text_features, text_to_image, chunk, (ties,))[ties]


def rank_bounds(image_features: Tensor, text_features: Tensor, text_to_image: Tensor, chunk: int = 1024) -> dict[Ties, Ranks]:
    """`ranks` with either tie rule, for little more than the time of one. Arguments and errors as there."""
    return _ranks(image_features, text_features, text_to_image, chunk, TIES)


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


def paired_scores(left: Tensor, right: Tensor) -> Tensor:
    """The scores of left [P, D] with right [P, D], row by row: float32 [P].

    Halves are added to each other until one number is left, by elementwise sums that come out the same everywhere.
    """
    products = left.double() * right.double()
    while (width := products.shape[1]) > 1:
        half = width // 2
        products = torch.cat([products[:, :half] + products[:, half : 2 * half], products[:, 2 * half :]], 1)
    return products.sum(1).float()


def scores_of_pairs(rows: Tensor, columns: Tensor, row: Tensor, column: Tensor, chunk: int = 1024) -> Tensor:
    """The scores of rows[row[p]] with columns[column[p]]: float32 [P]."""
    parts = zip(row.split(chunk), column.split(chunk), strict=True)
    return torch.cat([paired_scores(rows[r], columns[c]) for r, c in parts])


def count_above(
    rows: Tensor, columns: Tensor, row_bars: Tensor, column_bars: Tensor, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """How many candidates score strictly above each bar of each query, with rows and columns as queries of each other.

    Args:
        rows: [R, D], columns: [C, D], finite, with products within float32.
        row_bars: float32 [R, M], column_bars: float32 [C, M]; inf for none (the count is then 0). A bar just below a score,
            `below(score)`, counts the candidates of that score too.
        chunk: rows and columns per block.

    Returns:
        int64 [R, M], among the columns, and int64 [C, M], among the rows.
    """
    row_counts = torch.zeros(row_bars.shape, dtype=torch.long, device=rows.device)
    column_counts = torch.zeros(column_bars.shape, dtype=torch.long, device=rows.device)
    row_norms, column_norms = _norms(rows, chunk), _norms(columns, chunk)
    # Two float64 sums of the same D products, added up in different orders, differ by less than this (Higham 2002, 3.5).
    slack = (rows.shape[1] + 4) * torch.finfo(torch.float64).eps
    row_slack, column_slack = slack * row_norms * column_norms.max(), slack * column_norms * row_norms.max()
    for r in range(0, len(rows), chunk):
        some, these = rows[r : r + chunk].double(), slice(r, r + chunk)
        for c in range(0, len(columns), chunk):
            others, those = columns[c : c + chunk].double(), slice(c, c + chunk)
            scores = some @ others.T  # [chunk, chunk]
            row_counts[these] += _above(scores, row_bars[these], row_slack[these], some, others)
            column_counts[those] += _above(scores.T, column_bars[those], column_slack[those], others, some)
    return row_counts, column_counts


def below(scores: Tensor) -> Tensor:
    """The float32 just below each score: who is above it scores at least as much."""
    return scores.nextafter(torch.full_like(scores, -torch.inf))


def check_features(images: Tensor, texts: Tensor, chunk: int) -> None:
    """Refuses, with a ValueError, features that cannot be scored with each other."""
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"expected features [I, D] and [T, D], got {tuple(images.shape)} and {tuple(texts.shape)}")
    if not len(texts) or not len(images):
        raise ValueError(f"nothing to rank: {len(images)} images and {len(texts)} texts")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: expected at least 1")
    largest = 1.0
    for name, features in (("image", images), ("text", texts)):
        norms = _norms(features.detach(), chunk)
        bad = (~norms.isfinite()).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} of {len(features)} rows of the {name} features are not finite, the first is row {bad[0]}"
            )
        largest *= norms.max().item()
    if largest > torch.finfo(torch.float32).max:
        raise ValueError(f"products of the features reach {largest:.1g}, more than float32 holds: normalise them")


def _above(scores: Tensor, bars: Tensor, slack: Tensor, queries: Tensor, candidates: Tensor) -> Tensor:
    """The number of scores [A, B] above each bar [A, M]: int64 [A, M].

    scores: float64, off by less than slack [A]; queries: [A, D]; candidates: [B, D], to score again what is too close.
    """
    counts = torch.zeros(bars.shape, dtype=torch.long, device=scores.device)
    # halfway to the next float32: what exceeds it rounds to more than the bar
    edges = (bars.double() + bars.nextafter(torch.full_like(bars, torch.inf)).double()) / 2
    for slot in range(bars.shape[1]):
        asked = bars[:, slot].isfinite().nonzero().flatten()
        if not len(asked):
            continue
        mine = scores if len(asked) == len(bars) else scores[asked]
        edge, margin = edges[asked, slot, None], slack[asked, None]
        surely = (mine > edge + margin).sum(1, dtype=torch.int32)
        perhaps = (mine > edge - margin).sum(1, dtype=torch.int32)
        counts[asked, slot] = surely.long()
        for row in (perhaps > surely).nonzero().flatten().tolist():
            query = asked[row]
            close = candidates[(mine[row] > edge[row] - margin[row]) & (mine[row] <= edge[row] + margin[row])]
            counts[query, slot] += (paired_scores(queries[query].expand_as(close), close) > bars[query, slot]).sum()
    return counts


def _ranks(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, chunk: int, rules: Sequence[Ties]
) -> dict[Ties, Ranks]:
    images, texts, owners = _checked(image_features, text_features, text_to_image, chunk)
    own = scores_of_pairs(images, texts, owners, torch.arange(len(texts), device=owners.device), chunk)  # [T]
    best = torch.full((len(images),), torch.inf, device=own.device)  # [I], inf where an image has no text
    best.scatter_reduce_(0, owners, own, "amax", include_self=False)
    queries = owners.unique()  # ascending
    tied_own = owners[own == best[owners]].bincount(minlength=len(images))  # [I], own texts that score as the best one

    def bars(scores: Tensor) -> Tensor:
        return torch.stack([scores if ties == "best" else below(scores) for ties in rules], 1)

    above_best, above_own = count_above(images, texts, bars(best), bars(own), chunk)
    found: dict[Ties, Ranks] = {}
    for slot, ties in enumerate(rules):
        # under `worst` the own image, and the own texts that score best, are among those that score at least as much
        forward = above_own[:, slot] + (ties == "best")
        backward = above_best[:, slot] + 1 - (0 if ties == "best" else tied_own)
        found[ties] = Ranks(forward, backward[queries], queries)
    return found


def _norms(features: Tensor, chunk: int) -> Tensor:
    return torch.cat([part.double().norm(dim=1) for part in features.split(chunk)])


def _recall(found: Tensor, k: int) -> float:
    return 100 * (found <= k).double().mean().item()


def _checked(images: Tensor, texts: Tensor, text_to_image: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    text_to_image = torch.as_tensor(text_to_image, device=texts.device)
    if text_to_image.shape != texts.shape[:1]:
        raise ValueError(f"expected one image row per text, text_to_image [{len(texts)}], got {tuple(text_to_image.shape)}")
    check_features(images, texts, chunk)
    if text_to_image.is_floating_point() or text_to_image.min() < 0 or text_to_image.max() >= len(images):
        raise ValueError(f"text_to_image must hold whole image rows from 0 to {len(images) - 1}")
    return images.detach(), texts.detach(), text_to_image.long()
