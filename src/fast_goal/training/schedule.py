"""The optimiser and the learning rate of both trainings (METHOD section 3: AdamW on every parameter, cosine to zero)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fast_goal.errors import ConfigError
from fast_goal.model.clip import Clip


def learning_rate(step: int, total: int, base: float, warmup: int = 0) -> float:
    """The rate of the step numbered `step` from 0: linear warm-up to `base`, then a cosine that ends at zero.

    The warm-up reaches `base` in its last step, and the cosine starts from there; the last of the `total` steps still
    has a rate above zero. A warm-up as long as the training, or longer, never reaches the cosine.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(
    parameters: Iterable[Any],
    rate: float,
    weight_decay: float,
    betas: Sequence[float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW, by default with torch's betas and epsilon, over parameters or groups of them; where a group says nothing else,
    the decay acts on every parameter, biases and the logit scale too, as in the paper."""
    first, second = betas
    # Fused: the token embedding's 49,408 rows, most of them untouched in a step, would else dominate a small model's step.
    return torch.optim.AdamW(parameters, lr=rate, betas=(first, second), eps=epsilon, weight_decay=weight_decay, fused=True)


def parameter_groups(
    clip: Clip,
    decayed: str = "all",
    layer_decay: float = 1.0,
    freeze: Sequence[str] = (),
    section: str = "finetune",
    head_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """The trained parameters in groups of equal treatment; those of a frozen tower get `requires_grad` False and no group.

    decayed `matrices`: the weight decay is 0 for biases, norms, class embedding and logit scale (one dimension or none) and
    for the positional embeddings; scale and bias of the pooling's losses never decay, as published. layer_decay: the group's
    `factor` of the learning rate is layer_decay ** d with d the blocks from the parameter to its tower's end (`Clip.depths`),
    as in BEiT's fine-tuning; of the pooling it is `head_rate`. Raises ConfigError where no tower is left to train; `section` is
    where the settings stand in params.yaml.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    depths = clip.depths()
    for name, parameter in clip.named_parameters():
        tower, depth = depths[name]
        parameter.requires_grad_(tower not in freeze)
        if tower in freeze:
            continue
        decays = decayed == "all" or (parameter.ndim > 1 and not name.endswith("positional_embedding"))
        if tower == "pooling":
            decays = decays and parameter.ndim > 0
        factor = head_rate if tower == "pooling" else layer_decay**depth
        group = groups.setdefault((factor, decays), {"params": [], "factor": factor})
        group["params"].append(parameter)
        if not decays:
            group["weight_decay"] = 0.0
    if all(depths[name][0] in freeze or depths[name][0] in ("both", "pooling") for name in depths):
        raise ConfigError(f"{section}.freeze = {list(freeze)}: with both towers frozen nothing is left to train")
    return list(groups.values())


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every parameter group the learning rate, times the `factor` it may have."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
