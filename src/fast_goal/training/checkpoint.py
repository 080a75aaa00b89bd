"""Resume states: everything a killed training needs to go on as if nothing had happened.

A state is one file, written under a temporary name and renamed, and read with `weights_only=True`. It carries a key, a
digest of the parameters and inputs of the training; a state of another training is never continued.
"""

from __future__ import annotations

import errno
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from fast_goal.errors import FastGoalError
from fast_goal.files import atomic_path

VERSION = 2
_log = logging.getLogger(__name__)


def save_state(
    path: Path | str,
    key: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    average: torch.nn.Module | None = None,
) -> None:
    """Writes the state atomically. `progress` holds plain values: steps done, seconds spent, the history so far;
    `average` is the average of the model's weights, where one is kept.

    Raises FastGoalError when the disk is full; the former state, if any, is then still there and whole.
    """
    path = Path(path)
    state = {
        "version": VERSION,
        "key": key,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": None if average is None else average.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "progress": progress,
    }
    try:
        # Through an open file: torch's own writer loses the reason for a failed write.
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)
    except (OSError, RuntimeError) as error:
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise FastGoalError(
            f"No space left for the resume state {path} (about {_megabytes(state):,.0f} MB needed, {free / 1e6:,.0f} MB free). "
            f"Free some disk space and run the step again; it continues at the last state that was written."
        ) from None


def load_state(
    path: Path | str,
    key: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: torch.nn.Module | None = None,
) -> dict[str, Any] | None:
    """Puts a saved state into the model, the optimiser and the average, and returns its `progress`; None when there is none
    to continue.

    A state of another key or version, or one that cannot be read, is left alone with a warning: the training starts from
    the beginning and will overwrite it.
    """
    path = Path(path)
    _remove_halves(path)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        _log.warning("The resume state %s cannot be read (%s): starting from the beginning.", path, error)
        return None
    if not isinstance(state, dict) or state.get("version") != VERSION or state.get("key") != key:
        _log.warning("The resume state %s belongs to other parameters or inputs: starting from the beginning.", path)
        return None
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["progress"]


def remove_state(path: Path | str) -> None:
    """Removes a state, and what a killed save left beside it, once the result it led to is written."""
    path = Path(path)
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}.best").unlink(missing_ok=True)
    _remove_halves(path)


def _disk_full(error: BaseException | None) -> bool:
    # torch reports a failed write as a RuntimeError about positions in its archive, raised while handling the OSError.
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _remove_halves(path: Path) -> None:
    for half in path.parent.glob(f".{path.name}.*.tmp"):
        half.unlink(missing_ok=True)


def _megabytes(state: dict[str, Any]) -> float:
    slots = [value for slot in state["optimizer"]["state"].values() for value in slot.values()]
    values = [*state["model"].values(), *(state["average"] or {}).values(), *slots]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
