"""Resume states: everything a killed training needs to go on as if nothing had happened.

A training has one path, `<name>.pt`, and beside it its last states, `<name>.<step>.pt`, each written under a temporary name
and renamed, and read with `weights_only=True`. A state carries a key, a digest of the parameters and inputs of the training;
a state of another training is never continued.
"""

from __future__ import annotations

import errno
import logging
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from fast_goal.errors import FastGoalError
from fast_goal.files import atomic_path

VERSION = 4
_log = logging.getLogger(__name__)


def states(path: Path | str) -> dict[int, Path]:
    """The states of the training with this path by their steps, the newest first."""
    path = Path(path)
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d{{8,}}){re.escape(path.suffix)}")
    matches = [pattern.fullmatch(file.name) for file in path.parent.glob("*")]
    found = {int(match[1]): path.with_name(match[0]) for match in matches if match}
    return dict(sorted(found.items(), reverse=True))


def save_state(
    path: Path | str,
    key: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    average: torch.nn.Module | None = None,
    keep: int = 1,
    teacher: torch.nn.Module | None = None,
) -> None:
    """Writes the state atomically, then removes all but the last `keep`. `progress` holds plain values: steps done (`step`),
    seconds spent, the history so far; `average` is the average of the model's weights, `teacher` the one that teaches it, where
    they are kept.

    Raises FastGoalError when the disk is full; the former states, if any, are then still there and whole.
    """
    path = Path(path)
    target = path.with_name(f"{path.stem}.{progress['step']:08d}{path.suffix}")
    state = {
        "version": VERSION,
        "key": key,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": None if average is None else average.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "progress": progress,
    }
    try:
        # Through an open file: torch's own writer loses the reason for a failed write.
        with atomic_path(target) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)
    except (OSError, RuntimeError) as error:
        if not _disk_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        fewer = f", or set keep_states below {keep} in params.yaml" if keep > 1 else ""
        raise FastGoalError(
            f"No space left for the resume state {target} (about {_megabytes(state):,.0f} MB needed, {free / 1e6:,.0f} MB "
            f"free). Free some disk space{fewer}, and run the step again; it continues at the last state that was written."
        ) from None
    found = states(path)
    kept = [step for step in found if step <= progress["step"]][:keep]  # a later one could not be continued
    for step in found.keys() - kept:
        found[step].unlink(missing_ok=True)


def load_state(
    path: Path | str,
    key: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    average: torch.nn.Module | None = None,
    teacher: torch.nn.Module | None = None,
) -> dict[str, Any] | None:
    """Puts the newest state into the model, the optimiser, the average and the teacher, and returns its `progress`; None when
    there is none to continue.

    A state of another key or version, or one that cannot be read, is left alone with a warning and the one before is taken;
    without another the training starts from the beginning. Those left alone are removed as new ones are written.
    """
    path = Path(path)
    _remove_halves(path)
    files = list(states(path).values())
    for file in files:
        state = _read(file, key)
        if state is None:
            continue
        if file is not files[0]:
            _log.warning("Continuing with the resume state before it, %s.", file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        if teacher is not None:
            teacher.load_state_dict(state["teacher"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return state["progress"]
    if files:
        _log.warning("Starting from the beginning.")
    return None


def remove_state(path: Path | str) -> None:
    """Removes the states of a training, and what a killed save left beside them, once the result they led to is written."""
    path = Path(path)
    for file in (path, path.with_name(f"{path.name}.best"), *states(path).values()):
        file.unlink(missing_ok=True)
    _remove_halves(path)


def _read(file: Path, key: str) -> dict[str, Any] | None:
    """The state in the file; None, with a warning, for one that cannot be continued."""
    try:
        with zipfile.ZipFile(file) as archive:  # torch itself does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        _log.warning("The resume state %s cannot be read (%s).", file, error)
        return None
    if not isinstance(state, dict) or state.get("version") != VERSION or state.get("key") != key:
        _log.warning("The resume state %s belongs to other parameters or inputs.", file)
        return None
    return state


def _disk_full(error: BaseException | None) -> bool:
    # torch reports a failed write as a RuntimeError about positions in its archive, raised while handling the OSError.
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _remove_halves(path: Path) -> None:
    # of a state, or of the best epoch's weights; the number at the end is that of the process
    pattern = re.compile(rf"\.{re.escape(path.stem)}(\.\d{{8,}})?{re.escape(path.suffix)}(\.best)?\.\d+\.tmp")
    for half in path.parent.glob(".*.tmp"):
        if pattern.fullmatch(half.name):
            half.unlink(missing_ok=True)


def _megabytes(state: dict[str, Any]) -> float:
    slots = [value for slot in state["optimizer"]["state"].values() for value in slot.values()]
    values = [*slots, *(value for name in ("model", "average", "teacher") for value in (state[name] or {}).values())]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
