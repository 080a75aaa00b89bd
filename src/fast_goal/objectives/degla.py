"""The losses of DeGLA (arXiv 2504.16801): contrast with hard negative captions, without its distillation.

Letters: B pairs, K hard negative captions of each image, D embedding width. All features are L2-normalised. A mask
[B, K] is True for the negatives that exist; the others may hold anything finite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def global_loss(image: Tensor, text: Tensor, negatives: Tensor, scale: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE in which each image also has to tell its caption from the hard negatives of the whole batch.

    image, text [B, D]; negatives [B, K, D]; scale is the exponentiated logit scale. Image to text runs over B + B K
    captions; text to image over the B images, as no image belongs to a negative. A scalar.
    """
    batch = len(image)
    target = torch.arange(batch, device=image.device)
    positive_logits = scale * (image @ text.T)  # [B, B]
    negative_logits = scale * (image @ negatives.flatten(0, 1).T)  # [B, B*K]
    if mask is not None:
        negative_logits = negative_logits.masked_fill(~mask.flatten(), -torch.inf)
    image_to_text = F.cross_entropy(torch.cat([positive_logits, negative_logits], dim=1), target)
    return (image_to_text + F.cross_entropy(positive_logits.T, target)) / 2


def igc_loss(image: Tensor, text: Tensor, negatives: Tensor, scale: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """Image-grounded contrast: each image against its own caption and its own hard negatives.

    image, text [B, D]; negatives [B, K, D]; scale is the exponentiated logit scale. A scalar.
    """
    return _own_negatives(image, text, negatives, scale, mask)


def tgc_loss(text: Tensor, teacher_text: Tensor, negatives: Tensor, scale: float = 10.0, mask: Tensor | None = None) -> Tensor:
    """Text-grounded contrast: each caption against the teacher's embedding of it and its own hard negatives.

    text [B, D] and negatives [B, K, D] are the student's, teacher_text [B, D] the teacher's. A scalar.
    The scale is the paper's constant. The published code picks mostly negatives of other images by a slip in its mask;
    here, as the paper describes it, each caption meets its own.
    """
    return _own_negatives(text, teacher_text, negatives, scale, mask)


def _own_negatives(query: Tensor, positive: Tensor, negatives: Tensor, scale: Tensor | float, mask: Tensor | None) -> Tensor:
    positive_logit = scale * (query * positive).sum(-1, keepdim=True)  # [B, 1]
    negative_logits = scale * torch.einsum("bd,bkd->bk", query, negatives)
    if mask is not None:
        negative_logits = negative_logits.masked_fill(~mask, -torch.inf)
    logits = torch.cat([positive_logit, negative_logits], dim=1)  # [B, 1+K]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
