"""The pooling and the loss of FLAIR (arXiv 2412.03561): a text decides which patches of an image count.

Letters: B images, N patches, Q texts asked of each image, M columns of a logit matrix, D embedding width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TextConditionedPooling(nn.Module):
    """Cross-attention from texts to the patches of an image (section 3.2), without residual or MLP.

    The key and value of zeros that `add_zero_attn` appends let a text attend to nothing.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_query = nn.LayerNorm(dim)
        self.norm_key = nn.LayerNorm(dim)
        self.norm_value = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True, add_zero_attn=True)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """tokens [B, N, D] projected patches, queries [B, Q, D] projected texts; [B, Q, D], not normalised."""
        attended, _ = self.attention(
            self.norm_query(queries), self.norm_key(tokens), self.norm_value(tokens), need_weights=False
        )
        return attended


def sigmoid_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Sigmoid loss (equations 5 and 6): every entry is a yes-or-no question of its own.

    logits [B, M], scaled and shifted; positives [B, M] bool. The sum of -log sigmoid(+logit) over the positives and of
    -log sigmoid(-logit) over the others, divided by M as in the published code. A scalar.
    """
    signs = positives.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / logits.shape[1]
