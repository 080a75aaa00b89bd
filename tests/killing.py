"""A training that ends as by a `kill -9`, at a chosen state."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


class Killed(BaseException):
    """Not an Exception: nothing on the way may take it for an error of its own."""


@contextmanager
def killed_after(module: ModuleType, step: int) -> Iterator[None]:
    """Ends the block's training once its state of `step` is written; fails where there is no such state.

    `module` is where the training calls `save_state`: training.loop or training.pretraining.
    """
    save = module.save_state

    def kill(*arguments):
        save(*arguments)
        if arguments[4]["step"] == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, "save_state", kill)
        yield
