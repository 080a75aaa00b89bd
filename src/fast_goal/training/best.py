"""The best epoch of a training by what is measured on the validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fast_goal.files import atomic_path


class Best:
    """Knows the best epoch so far, and with `keep` its weights, in a file at `path`; of equal epochs the first is the best.

    An epoch's score is the mean of what was measured after it, such as R@1 both ways. A resumed training starts with the
    history of its state.
    """

    def __init__(self, path: Path, history: Sequence[Mapping[str, Any]], keep: bool):
        self.path, self.keep = path, keep
        self.epoch: int | None = None
        self._score = float("-inf")
        for record in history:
            if "loss" not in record:
                self._note(record["epoch"], {name: v for name, v in record.items() if name not in ("step", "epoch")})

    def offer(self, epoch: int, measured: Mapping[str, float]) -> None:
        """Notes what was measured after an epoch."""
        self._note(epoch, measured)

    def store(self, epoch: int, model: torch.nn.Module) -> None:
        """Keeps the weights of the model, which are those after `epoch`, if that is the best epoch.

        To be called once the resume state knows of the epoch: then the file never holds an epoch the state has not seen.
        """
        if self.keep and epoch == self.epoch:
            weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
            with atomic_path(self.path) as temporary:
                save_file(weights, temporary)

    def exhausted(self, epoch: int, patience: int | None) -> bool:
        """Whether the best epoch lies `patience` epochs or more before this one."""
        return patience is not None and self.epoch is not None and epoch - self.epoch >= patience

    def restore(self, model: torch.nn.Module) -> None:
        """Gives the model the best epoch's weights; without a measured epoch it stays as it is."""
        if self.epoch is not None:
            model.load_state_dict(load_file(self.path))

    def _note(self, epoch: int, measured: Mapping[str, float]) -> None:
        score = sum(measured.values()) / len(measured)
        if score > self._score:
            self.epoch, self._score = epoch, score
