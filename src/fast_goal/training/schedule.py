"""The optimiser and the learning rate of both trainings (METHOD section 3: AdamW on every parameter, cosine to zero)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def learning_rate(step: int, total: int, base: float, warmup: int = 0) -> float:
    """The rate of the step numbered `step` from 0: linear warm-up to `base`, then a cosine that ends at zero.

    The warm-up reaches `base` in its last step, and the cosine starts from there; the last of the `total` steps still
    has a rate above zero. A warm-up as long as the training, or longer, never reaches the cosine.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(parameters: Iterable[torch.nn.Parameter], rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with torch's defaults; the decay acts on every parameter, biases and the logit scale too, as in the paper."""
    # Fused: the token embedding's 49,408 rows, most of them untouched in a step, would else dominate a small model's step.
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
