"""Exact ranks by text-conditioned pooling (FLAIR), in its two modes beside the plain cosine, which is `global`.

* `conditioned`: every image is scored with every text as that text pools it.
* `rerank`: the best k candidates of a query by `global` are put into the order of their conditioned scores; the others keep
  their order behind them.

What a rank, a query and a tie are is said in evaluation/retrieval.py. A picture and a text are scored once, in float32, however
often the two occur: what is the same ties. Where candidates tie at the end of the best k, a positive is taken first with
`ties="best"` and last with `ties="worst"`, the others in their order.

Images go by in blocks, and with them blocks of scores: memory is some block x T numbers, and k x (I + T) for `rerank`.

Letters: I images, U pictures (images that differ), T texts, V texts that differ, D embedding width, N patches, b images of a
block, k as above.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fast_goal.evaluation.headline import MODES
from fast_goal.evaluation.retrieval import TIES, Ranks, Ties
from fast_goal.model.conditioned import ConditionedScorer, Texts
from fast_goal.progress import Progress

CHUNK = 1024  # images, and texts, whose plain cosines are held at once
INDEX_BITS, PLACE = 24, 1 << 24  # of a candidate's index in the keys by which the best k are found
TIMED = 21  # queries whose times the median is taken of


class Asked(NamedTuple):
    """One retrieval. `pictures`: images of one number show the same; `tokens`: the projected patches of some images (rows)."""

    image_features: Tensor  # [I, D], unit
    text_features: Tensor  # [T, D], unit
    queries: Tensor  # [T, D], projected texts, not normalised
    owners: Tensor  # int64 [T], the row of the image of each
    pictures: Tensor  # int64 [I], from 0 on
    tokens: Callable[[Sequence[int]], Tensor]  # -> [b, N, D]


def mode_ranks(
    scorer: ConditionedScorer, asked: Asked, known: dict[Ties, Ranks], top_k: int, block: int, name: str = "conditioned"
) -> dict[str, dict[Ties, Ranks]]:
    """The ranks of each mode with either tie rule. known: those by `global`; block: images at once."""
    counts = _Counts(asked, top_k)
    texts, which = asked.queries.unique(dim=0, return_inverse=True)  # [V, D], [T]
    shown = scorer.texts(texts)
    own, own_scores = _own_scores(scorer, asked, shown, which, block)
    scores_of_own = own_scores[torch.searchsorted(own, asked.pictures[asked.owners] * len(texts) + which)]  # [T]
    first = _first_rows(asked.pictures)
    with Progress(name, len(first), "images") as progress:
        for start in range(0, len(first), block):
            some = first[start : start + block]
            scores = scorer.scores(scorer.images(asked.tokens(some.tolist())), shown).cpu()  # [b, V]
            # computed in another block than before: the same to the last bit, or no tie would be one
            mine = (own >= start * len(texts)) & (own < (start + len(some)) * len(texts))
            scores.view(-1)[own[mine] - start * len(texts)] = own_scores[mine]
            rows = ((asked.pictures >= start) & (asked.pictures < start + len(some))).nonzero().flatten()
            for part in rows.split(block):
                counts.add(part, scores[asked.pictures[part] - start][:, which], scores_of_own)
            progress.update(len(some))
    return {"global": known, **counts.ranks(known)}


def seconds_per_query(scorer: ConditionedScorer, asked: Asked, images: int, top_k: int) -> dict[str, float]:
    """The median time that a text takes to put `images` images in order, by mode: with its embedding made, and the images'
    features, keys and values held ready."""
    device = scorer.device
    looked, features = scorer.images(asked.tokens(range(images))), asked.image_features[:images].to(device)
    top_k = min(top_k, images)
    everyone = torch.zeros(top_k, dtype=torch.int64)

    def plain(text: Tensor, _: Tensor) -> Tensor:
        return (features @ text).argsort(descending=True)

    def conditioned(_: Tensor, query: Tensor) -> Tensor:
        return scorer.scores(looked, scorer.texts(query[None]))[:, 0].argsort(descending=True)

    def rerank(text: Tensor, query: Tensor) -> Tensor:
        order = plain(text, query)
        best = order[:top_k]
        scores = scorer.pairs(looked, scorer.texts(query[None]), best, everyone)
        return torch.cat([best[scores.argsort(descending=True)], order[top_k:]])

    found = {}
    for mode, answer in zip(MODES, (plain, conditioned, rerank), strict=True):
        seconds = []
        for number in range(TIMED + 1):  # the first is not counted
            row = number % len(asked.queries)
            text, query = asked.text_features[row].to(device), asked.queries[row].to(device)
            _wait(device)
            begin = time.perf_counter()
            answer(text, query)
            _wait(device)
            seconds.append(time.perf_counter() - begin)
        found[mode] = median(seconds[1:])
    return found


class _Counts:
    """Counts, block by block, the candidates that stand before each query's positive."""

    def __init__(self, asked: Asked, top_k: int):
        self._asked, images, texts = asked, len(asked.image_features), len(asked.owners)
        self._of_texts, self._of_images = min(top_k, images), min(top_k, texts)
        self._bars = {ties: self._text_bars(ties) for ties in TIES}
        self._forward = {(mode, ties): torch.zeros(texts, dtype=torch.int64) for mode in MODES[1:] for ties in TIES}
        self._backward = {(mode, ties): torch.zeros(images, dtype=torch.int64) for mode in MODES[1:] for ties in TIES}
        # whether a positive is among the best k at all
        self._text_found = {ties: torch.zeros(texts, dtype=torch.bool) for ties in TIES}
        self._image_found = {ties: torch.zeros(images, dtype=torch.bool) for ties in TIES}

    def add(self, rows: Tensor, scores: Tensor, own: Tensor) -> None:
        """rows: of some images [b]; scores: theirs with the texts [b, T]; own: of each text with its image [T]."""
        owners = self._asked.owners
        positive = owners[None] == rows[:, None]  # [b, T]
        wrong = ~positive
        plain = self._plain(rows, slice(None))
        for ties in TIES:
            keys = _keys(plain, positive, ties, rows[:, None])
            listed = keys >= self._bars[ties][None]  # among the best k images of the text
            before = wrong & _beats(scores, own[None], ties)
            self._forward["conditioned", ties] += before.sum(0)
            self._forward["rerank", ties] += (before & listed).sum(0)
            self._text_found[ties] |= (positive & listed).any(0)

            keys = _keys(plain, positive, ties, torch.arange(len(owners))[None])
            listed = keys >= keys.topk(self._of_images, dim=1).values[:, -1:]  # among the best k texts of the image
            best = scores.masked_fill(wrong, -torch.inf).amax(1, keepdim=True)
            self._backward["conditioned", ties][rows] = (wrong & _beats(scores, best, ties)).sum(1)
            best = scores.masked_fill(~(positive & listed), -torch.inf).amax(1, keepdim=True)
            self._backward["rerank", ties][rows] = (wrong & listed & _beats(scores, best, ties)).sum(1)
            self._image_found[ties][rows] = (positive & listed).any(1)

    def ranks(self, known: dict[Ties, Ranks]) -> dict[str, dict[Ties, Ranks]]:
        """Those of both modes; known: by `global`, which those keep whose positives are not among the best k."""
        found: dict[str, dict[Ties, Ranks]] = {mode: {} for mode in MODES[1:]}
        for ties in TIES:
            asking = known[ties].query_images
            forward, backward = (
                {mode: counts[mode, ties] + 1 for mode in MODES[1:]} for counts in (self._forward, self._backward)
            )
            found["conditioned"][ties] = Ranks(forward["conditioned"], backward["conditioned"][asking], asking)
            found["rerank"][ties] = Ranks(
                torch.where(self._text_found[ties], forward["rerank"], known[ties].text_to_image),
                torch.where(self._image_found[ties][asking], backward["rerank"][asking], known[ties].image_to_text),
                asking,
            )
        return found

    def _text_bars(self, ties: Ties) -> Tensor:
        """The key [T] of the last of the best k images of each text."""
        images, texts = len(self._asked.image_features), len(self._asked.owners)
        bars = []
        for left in range(0, texts, CHUNK):
            best = torch.empty(0, min(CHUNK, texts - left), dtype=torch.int64)
            for top in range(0, images, CHUNK):
                rows = torch.arange(top, min(top + CHUNK, images))
                positive = self._asked.owners[None, left : left + CHUNK] == rows[:, None]
                keys = _keys(self._plain(rows, slice(left, left + CHUNK)), positive, ties, rows[:, None])
                best = torch.cat([best, keys])
                best = best.topk(min(self._of_texts, len(best)), dim=0).values
            bars.append(best[-1])
        return torch.cat(bars)

    def _plain(self, rows: Tensor, columns: slice) -> Tensor:
        """Plain cosines [b, t] as in evaluation/retrieval.py: added up in float64, rounded to float32."""
        return (self._asked.image_features[rows].double() @ self._asked.text_features[columns].double().T).float()


def _own_scores(scorer: ConditionedScorer, asked: Asked, texts: Texts, which: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The pairs of a picture and a text that belong together, as picture * V + text, ascending; and their scores."""
    count = len(texts)
    own = (asked.pictures[asked.owners] * count + which).unique()
    first, found = _first_rows(asked.pictures), []
    pictures = own // count
    for some in pictures.unique().split(block):  # both ascending
        mine = torch.isin(pictures, some)
        images = scorer.images(asked.tokens(first[some].tolist()))
        found.append(scorer.pairs(images, texts, torch.searchsorted(some, pictures[mine]), own[mine] % count).cpu())
    return own, torch.cat(found)


def _first_rows(pictures: Tensor) -> Tensor:
    """int64 [U], the first image of each picture."""
    rows = torch.full((int(pictures.max()) + 1,), len(pictures), dtype=torch.int64)
    return rows.scatter_reduce_(0, pictures, torch.arange(len(pictures)), "amin")


def _beats(scores: Tensor, bars: Tensor, ties: Ties) -> Tensor:
    return scores > bars if ties == "best" else scores >= bars


def _keys(scores: Tensor, positive: Tensor, ties: Ties, index: Tensor) -> Tensor:
    """int64, no two alike: in the order of the scores (float32), then positives first or last, then the lower index."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: there is no -0.0 then
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    place = positive.long() * (1 if ties == "best" else -1) * PLACE + PLACE + (PLACE - 1 - index)
    return (ordered << (INDEX_BITS + 2)) + place


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
