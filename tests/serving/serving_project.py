"""What the tests of serving share: a model with a pooling, and a folder with a registered model."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_project import tiny_clip

from fast_goal.model.clip import Clip

OUTSIDE = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "FAST_GOAL_IMAGE_ROOT", "FAST_GOAL_ALLOW_URLS")


def pooled_clip(seed: int) -> Clip:
    """A model with a text-conditioned pooling that is far from what it starts as."""
    made = tiny_clip(seed).eval()
    made.add_pooling(4, seed=3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(8)
        for value in made.pooling.parameters():
            value += 0.3 * torch.randn_like(value)
    return made.eval()


@contextmanager
def registered(folder: Path, store: Path, clip: Clip, card: str, tags: Mapping[str, str]) -> Iterator[Path]:
    """The folder, the current one, with the model registered in a copy of `store`, and with nothing set outside."""
    from fast_goal.tracking import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in OUTSIDE:
            patch.delenv(name, raising=False)
        shutil.copy(store, "mlflow.db")
        clip.save(folder / "models/finetune", {"commit": "abc"})
        registry.register(folder / "models/finetune", "fast-goal", "candidate", card, dict(tags), None)
        yield folder
    import mlflow

    mlflow.set_tracking_uri(None)
