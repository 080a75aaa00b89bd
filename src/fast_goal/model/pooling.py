"""The pooling of FLAIR (arXiv 2412.03561, section 3.2): a text decides which patches of an image count.

Letters: B images, N patches, Q texts asked of each image, D embedding width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START_SCALE, START_BIAS, MAX_SCALE = 1 / 0.07, -10.0, 100.0  # of the sigmoid losses, as published


class TextConditionedPooling(nn.Module):
    """Cross-attention from texts to the patches of an image, without residual or MLP.

    The key and value of zeros that `add_zero_attn` appends let a text attend to nothing. `forward` is the whole of it; its
    parts, `queries`, `keys_values` and `attend`, are for whoever asks many texts of many images.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_query = nn.LayerNorm(dim)
        self.norm_key = nn.LayerNorm(dim)
        self.norm_value = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True, add_zero_attn=True)

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.attention.num_heads

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """tokens [B, N, D] projected patches, queries [B, Q, D] projected texts; [B, Q, D], not normalised."""
        return self.attend(self.queries(queries), *self.keys_values(tokens))

    def queries(self, texts: Tensor) -> Tensor:
        """Projected texts [..., D], not normalised, as queries [..., D]."""
        return F.linear(self.norm_query(texts), *self._projection(0))

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Projected patches [B, N, D], not normalised, as keys and values, each [B, N+1, D] with the zeros at the end."""
        keys = F.linear(self.norm_key(tokens), *self._projection(1))
        values = F.linear(self.norm_value(tokens), *self._projection(2))
        return F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What `queries` [B, Q, D] take from each image's keys and values [B, N+1, D]: [B, Q, D], not normalised."""
        parts = (self._split(one) for one in (queries, keys, values))
        taken = F.scaled_dot_product_attention(*parts)  # [B, heads, Q, D/heads]
        return self.attention.out_proj(taken.transpose(1, 2).flatten(2))

    def weights(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """How much each text looks at each patch, the mean over the heads: [B, Q, N], from 0 to 1; what is lacking to a sum of
        1 goes to the zeros. tokens [B, N, D], queries [B, Q, D], as for `forward`."""
        keys, _ = self.keys_values(tokens)
        queries, keys = self._split(self.queries(queries)), self._split(keys)
        logits = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        return logits.softmax(-1).mean(1)[..., :-1]

    def _projection(self, part: int) -> tuple[Tensor, Tensor]:
        return self.attention.in_proj_weight.chunk(3)[part], self.attention.in_proj_bias.chunk(3)[part]

    def _split(self, rows: Tensor) -> Tensor:
        """[B, R, D] -> [B, heads, R, D/heads]."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PoolingHead(nn.Module):
    """What a CLIP that is trained with `objective=flair` has beside its towers: the pooling, and the logit scale (as its
    logarithm) and bias of the sigmoid losses."""

    def __init__(self, dim: int, heads: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # making a head does not disturb the caller's random numbers
            torch.manual_seed(seed)
            self.pooling = TextConditionedPooling(dim, heads)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))
        self.logit_bias = nn.Parameter(torch.tensor(START_BIAS))

    @torch.no_grad()
    def clamp(self) -> None:
        """Holds the logit scale between 1 and MAX_SCALE; to be called after each step."""
        self.logit_scale.clamp_(0, math.log(MAX_SCALE))
