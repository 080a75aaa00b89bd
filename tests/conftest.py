"""Shared fixtures. The suite is offline and runs on the CPU; a test marked `gpu` is skipped without a CUDA device."""

import json
import os
from pathlib import Path

import pytest

# Before any import of torch. The models are tiny: threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FAST_GOAL_DEVICE", "cpu")


@pytest.fixture(scope="session")
def vectors() -> dict:
    """Numbers computed once from the published reference code: inputs and outputs of its formulas."""
    return json.loads((Path(__file__).parent / "vectors" / "vectors.json").read_text())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
