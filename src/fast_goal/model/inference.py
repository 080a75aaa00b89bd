"""What every use of a trained model needs: its digest, the precision it computes in, and a check of what comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fast_goal.errors import ModelError
from fast_goal.model.clip import Clip


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Inference in `fp32`, `tf32` (products of matrices rounded to 10 bits, on GPUs) or `bf16` (autocast, 8 bits).

    In fp32 a GPU's results are those of a CPU but for the order of sums.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    rounded = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = rounded
    try:
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=rounded),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def model_digest(clip: Clip) -> str:
    """A hash of all that a model's embeddings depend on: its weights, its text context, its view."""
    hasher = hashlib.sha256(f"{clip.context_length} {clip.view(8, 8)}".encode())
    for name, value in sorted(clip.state_dict().items()):
        hasher.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def finite(embeddings: Tensor) -> Tensor:
    """The embeddings as they are. Raises ModelError where they are not finite."""
    if not embeddings.isfinite().all():
        raise ModelError("the model's embeddings hold NaN or infinity: its weights are damaged or its training diverged")
    return embeddings
