"""Conditioned scores: the cosine of a text with an image as that text pools it (FLAIR, arXiv 2412.03561), of many pairs.

    scorer = ConditionedScorer(clip.pooling.pooling)
    scorer.scores(scorer.images(tokens), scorer.texts(queries))

Every image's keys and values and every text's query are made once. The pairs are then gone through in blocks that the cache
holds, and no pooled vector outlives its block. What is done differently from `TextConditionedPooling.forward`, with results
equal but for rounding (1e-6):

* A cosine stays as it is when both sides are rotated. They are, by the rotation Q' of W = QR, W the output projection: what is
  left to multiply with, R, is a triangle, 5/8 of the square when taken in four strips.
* The key of zeros is a logit of 0: a 1 in the sum below the softmax. With it the sum cannot vanish, so logits need not be
  shifted unless they might overflow, which the lengths of queries and keys tell.
* Powers of 2, not of e: torch has them 2.7 times as fast on CPUs.
* Texts come last in memory, so that products of head width 16 are still long.

Letters: I images, T texts, P pairs, N patches, D embedding width, H heads, d = D / H, b images and t texts of a block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_goal.model.pooling import TextConditionedPooling

BLOCKS = {"cpu": 5 << 17, "other": 1 << 27}  # logits of a block, guesses: about the caches of two cores; 512 MB
STRIPS = 4  # of the triangle; more leave out more zeros and make thinner products
MOST = 100.0  # logits (of 2) up to which their powers, summed and multiplied with values, stay far from float32's 2^128


@dataclass(frozen=True)
class Texts:
    """Texts as the scorer asks them."""

    queries: Tensor  # [H, d, T], so scaled that the softmax is one of powers of 2
    units: Tensor  # [D, T], rotated
    longest: Tensor  # [H], the length of the longest query of each head

    def __len__(self) -> int:
        return self.units.shape[1]


@dataclass(frozen=True)
class Images:
    """Images as the scorer looks at them."""

    keys: Tensor  # [I, H, N, d]
    values: Tensor  # [I, H, d, N]
    longest: Tensor  # [H], the length of the longest key of each head

    def __len__(self) -> int:
        return len(self.keys)


class ConditionedScorer:
    """Scores with one pooling, on its device and in its precision; a change of its weights after this is not seen.

    block: logits that are held at once (of all heads and patches), None: what suits the device. Beside the results and what
    `texts` and `images` return, memory is some three times that. A scorer is not for several callers at once.
    """

    def __init__(self, pooling: TextConditionedPooling, block: int | None = None):
        self._pooling = pooling
        weight, bias = pooling.attention.out_proj.weight.detach(), pooling.attention.out_proj.bias.detach()
        rotation, triangle = torch.linalg.qr(weight.cpu().double())
        self._triangle = triangle.to(weight)
        self._bias = (rotation.T @ bias.cpu().double()).to(weight)[:, None]
        self._rotation = rotation.to(weight)
        self._block = block or BLOCKS.get(weight.device.type, BLOCKS["other"])
        self._spaces: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Of the pooling, and of all that is scored."""
        return self._triangle.device

    def texts(self, queries: Tensor) -> Texts:
        """queries [T, D]: projected texts, not normalised (`Encoded.text_queries`)."""
        with self._exact():
            queries = queries.to(self._triangle)
            asked = self._pooling.queries(queries).unflatten(-1, (self._pooling.heads, -1))  # [T, H, d]
            asked = (asked * (math.log2(math.e) / math.sqrt(asked.shape[-1]))).permute(1, 2, 0).contiguous()
            units = (F.normalize(queries, dim=-1) @ self._rotation).T.contiguous()
            return Texts(asked, units, _longest(asked.norm(dim=1)))

    def images(self, tokens: Tensor) -> Images:
        """tokens [I, N, D]: projected patches, not normalised (`Clip.project_patches`)."""
        with self._exact():
            keys, values = self._pooling.keys_values(tokens.to(self._triangle))
            # without the zeros at the end, which the sum below the softmax stands for
            keys, values = (one[:, :-1].unflatten(-1, (self._pooling.heads, -1)) for one in (keys, values))  # [I, N, H, d]
            keys = keys.transpose(1, 2).contiguous()
            return Images(keys, values.permute(0, 2, 3, 1).contiguous(), _longest(keys.norm(dim=-1).transpose(0, 1).flatten(1)))

    def scores(self, images: Images, texts: Texts) -> Tensor:
        """The score of every image with every text, [I, T], on the device of the pooling."""
        found = self._new(len(images), len(texts))
        if not found.numel():
            return found
        per_pair, shifted = self._per_pair(images), self._may_overflow(images, texts)
        wide = _even(len(texts), self._block // per_pair)
        high = max(1, self._block // (per_pair * wide))

        with self._exact():
            for left in range(0, len(texts), wide):
                asked = slice(left, left + wide)
                queries, units = texts.queries[..., asked].contiguous(), texts.units[:, None, asked].contiguous()
                for top in range(0, len(images), high):
                    mine = slice(top, top + high)
                    self._score(images.keys[mine], images.values[mine], queries, units, shifted, found[mine, asked])
        return found

    def pairs(self, images: Images, texts: Texts, rows: Tensor, columns: Tensor) -> Tensor:
        """The scores [P] of the pairs of images `rows` [P] with texts `columns` [P].

        In any order; quickest where many pairs have the same image.
        """
        rows, columns = rows.cpu(), columns.cpu()
        found = self._new(len(rows))
        if not len(rows):
            return found
        order, shifted = rows.argsort(stable=True), self._may_overflow(images, texts)

        with self._exact():
            for places, which in self._grouped(rows[order], self._per_pair(images)):
                image, column = which.to(self.device), columns[order[places]].to(self.device)  # [b], [b, t]
                queries = texts.queries[..., column].permute(2, 0, 1, 3)  # [b, H, d, t]
                scores = self._new(*places.shape)
                self._score(images.keys[image], images.values[image], queries, texts.units[:, column], shifted, scores)
                found[order[places].flatten().to(self.device)] = scores.flatten()  # what was filled up has the same score twice
        return found

    def _grouped(self, rows: Tensor, per_pair: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of places [b, t] in the ascending `rows`, with the image of each line [b].

        Lines of like length are together; one that is short repeats its last place.
        """
        widest = max(1, self._block // per_pair)
        image, counts = rows.unique_consecutive(return_counts=True)
        lines = (counts + widest - 1) // widest  # of each image
        number = torch.arange(int(lines.sum())) - (lines.cumsum(0) - lines).repeat_interleave(lines)
        starts = (counts.cumsum(0) - counts).repeat_interleave(lines) + number * widest
        lengths = (counts.repeat_interleave(lines) - number * widest).clamp(max=widest)
        image = image.repeat_interleave(lines)
        order = lengths.argsort(descending=True, stable=True)
        first = 0
        while first < len(order):
            longest = int(lengths[order[first]])
            some = order[first : first + max(1, widest // longest)]
            yield starts[some, None] + torch.arange(longest).minimum(lengths[some, None] - 1), image[some]
            first += len(some)

    def _score(self, keys: Tensor, values: Tensor, queries: Tensor, units: Tensor, shifted: bool, out: Tensor) -> None:
        """One block, into out [b, t].

        keys [b, H, N, d], values [b, H, d, N], queries [H, d, t] or [b, H, d, t], units [D, 1, t] or [D, b, t].
        """
        b, H, N, d = keys.shape
        t, D = queries.shape[-1], H * d
        weights = self._empty("weights", b, H, N, t)
        torch.matmul(keys, queries, out=weights)
        if shifted:
            most = weights.amax(2, keepdim=True).clamp_(min=0)
            weights.sub_(most)
        weights.exp2_()
        sums = torch.sum(weights, 2, out=self._empty("sums", b, H, t))
        sums.add_(torch.exp2(-most.squeeze(2)) if shifted else 1)
        taken = self._empty("taken", b, H, d, t)
        torch.matmul(values, weights, out=taken)
        context = self._empty("context", H, d, b, t)
        torch.div(taken.permute(1, 2, 0, 3), sums.transpose(0, 1)[:, None], out=context)
        context, pooled = context.view(D, b * t), taken.view(D, b * t)  # `taken` is done with
        strip = -(-D // STRIPS)
        for top in range(0, D, strip):
            rows = slice(top, top + strip)
            torch.addmm(self._bias[rows], self._triangle[rows, top:], context[top:], out=pooled[rows])
        dots = torch.mul(pooled.view(D, b, t), units, out=context.view(D, b, t)).sum(0)
        norms = pooled.square_().sum(0).sqrt_().view(b, t)
        torch.div(dots, norms.clamp_(min=1e-12), out=out)

    def _empty(self, name: str, *shape: int) -> Tensor:
        """Memory that is kept from block to block, so that it stays in the cache."""
        size = math.prod(shape)
        if name not in self._spaces or self._spaces[name].numel() < size:
            self._spaces[name] = self._new(size)
        return self._spaces[name][:size].view(shape)

    def _new(self, *shape: int) -> Tensor:
        with self._exact():
            return self._triangle.new_empty(shape)

    def _per_pair(self, images: Images) -> int:
        return images.keys.shape[1] * images.keys.shape[2]

    def _may_overflow(self, images: Images, texts: Texts) -> bool:
        return bool((images.longest * texts.longest).max() > MOST)

    @contextlib.contextmanager
    def _exact(self) -> Iterator[None]:
        """In the precision of the weights; and, wherever it is called, with tensors that serve anywhere."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield


def conditioned_scores(pooling: TextConditionedPooling, tokens: Tensor, queries: Tensor, block: int | None = None) -> Tensor:
    """The scores [I, T] of projected patches [I, N, D] with projected texts [T, D], neither normalised."""
    scorer = ConditionedScorer(pooling, block)
    return scorer.scores(scorer.images(tokens), scorer.texts(queries))


def _longest(lengths: Tensor) -> Tensor:
    """[H, ...] -> [H], 0 where there is none."""
    return lengths.amax(1) if lengths.shape[1] else lengths.new_zeros(len(lengths))


def _even(total: int, most: int) -> int:
    """How many at a time, at most `most`, so that all parts are about as large; a multiple of 16 where several."""
    parts = -(-total // max(1, most))
    return total if parts == 1 else min(max(1, most), -(-total // (16 * parts)) * 16)
