"""The exponential moving average of a model's weights: it may be the better result of a training than the last ones, or the
teacher of the model that is trained."""

from __future__ import annotations

import copy

import torch


class Average:
    """Holds the average in `model`, a copy of the trained one.

    It starts with the weights after the first step, or, as a teacher's, with those before it (`from_start`); from then on
    average = decay * average + (1 - decay) * weights.
    """

    def __init__(self, trained: torch.nn.Module, decay: float, from_start: bool = False):
        self.model, self.decay, self._from_start = copy.deepcopy(trained), decay, from_start
        pairs = zip(self.model.parameters(), trained.parameters(), strict=True)
        moving = [(own, value) for own, value in pairs if value.requires_grad]  # not of a frozen tower
        self._own, self._trained = [own for own, _ in moving], [value for _, value in moving]
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step, counted from 1. Waits for no device, as torch's AveragedModel does."""
        taken = 1.0 if step == 1 and not self._from_start else 1 - self.decay
        torch._foreach_lerp_(self._own, self._trained, taken)
