"""Switches, device, and torchvision beside a torch it was not built for."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch

from fast_goal import environment
from fast_goal.errors import ConfigError


def run(code: str, **variables: str) -> str:
    """The standard output of `code` in a fresh interpreter; an empty variable is unset."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    environ = {name: value for name, value in environ.items() if value}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_prepare_sets_every_switch_and_keeps_the_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in (*environment.TELEMETRY_SWITCHES, "YOLO_CONFIG_DIR", "HF_HUB_OFFLINE", "YOLO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    environment.prepare()
    environment.prepare()
    assert os.environ["DO_NOT_TRACK"] == "0"
    for name, value in environment.TELEMETRY_SWITCHES.items():
        assert name == "DO_NOT_TRACK" or os.environ[name] == value
    assert os.environ["YOLO_CONFIG_DIR"] == str(tmp_path / ".fast_goal/ultralytics")
    assert "HF_HUB_OFFLINE" not in os.environ and "YOLO_OFFLINE" not in os.environ  # downloads of weights stay possible
    for name in (*environment.TELEMETRY_SWITCHES, "YOLO_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)  # set by prepare: not for the tests that follow


def test_prepare_imports_nothing_heavy():
    assert run("import sys, fast_goal.environment as e; e.prepare(); print('torch' in sys.modules)").strip() == "False"


def test_prepare_installs_one_hook():
    environment.prepare()
    environment.prepare()
    assert sum(isinstance(finder, environment._ExtensionFinder) for finder in sys.meta_path) <= 1


def test_torchvision_works_after_prepare():
    out = run(
        """
import fast_goal.environment as e
e.prepare()
import torch, torchvision
from torchvision.ops import batched_nms, nms, roi_align
boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
scores = torch.tensor([.5, .9, .7])
print(nms(boxes, scores, 0.5).tolist(), batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.5).tolist())
print(roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0., 0, 0, 4, 4]]), (1, 1)).item())
"""
    )
    assert out.splitlines() == ["[1, 2] [1, 2, 0]", "1.0"]


def test_prepare_mends_an_import_that_failed_before():
    run(
        """
try:
    import torchvision
except RuntimeError:
    pass
import fast_goal.environment as e
e.prepare()
import torchvision.transforms
"""
    )


def test_nothing_is_defined_where_the_compiled_operators_load():
    class Extension:
        _assert_has_ops = "untouched"

        @staticmethod
        def _has_ops() -> bool:
            return True

    library = environment._library
    environment._complete(Extension)
    assert Extension._assert_has_ops == "untouched" and environment._library is library


def slow_nms(boxes: list, scores: list, threshold: float) -> list[int]:
    """Written from the definition: pairwise, in plain Python."""

    def overlap(a: list, b: list) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
        return width * height / area if area else 0.0

    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(overlap(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


def test_nms_equals_the_definition():
    generator = random.Random(0)
    for _ in range(200):
        count = generator.randint(0, 25)
        # whole coordinates and few scores: many ties, equal boxes and boxes without area
        corners = [[generator.randint(0, 12) for _ in range(4)] for _ in range(count)]
        boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]
        scores = [generator.choice([0.1, 0.5, 0.9, generator.random()]) for _ in range(count)]
        threshold = generator.choice([0.0, 0.25, 0.5, 0.7, 1.0])
        found = environment.nms(
            torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), torch.tensor(scores, dtype=torch.float64), threshold
        )
        assert found.dtype == torch.int64
        assert found.tolist() == slow_nms(boxes, scores, threshold)


@pytest.mark.gpu
def test_nms_equals_the_compiled_operator():
    environment.prepare()
    import torchvision

    if not torchvision.extension._has_ops():
        pytest.skip("this torchvision has no compiled operators")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        corners = torch.rand(40, 2, 2, generator=generator).sort(dim=1).values
        boxes, scores = corners.flatten(1), torch.rand(40, generator=generator)
        assert torch.equal(environment.nms(boxes, scores, 0.3), torchvision.ops.nms(boxes, scores, 0.3))


def test_device(monkeypatch):
    monkeypatch.setenv("FAST_GOAL_DEVICE", "cpu")
    assert environment.device() == torch.device("cpu")
    monkeypatch.setenv("FAST_GOAL_DEVICE", "")
    assert environment.device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:x", "meta", "cuda:99"])
def test_device_refuses_what_is_not_there(monkeypatch, name):
    monkeypatch.setenv("FAST_GOAL_DEVICE", name)
    with pytest.raises(ConfigError, match=f"FAST_GOAL_DEVICE = '{name}'.*leave it unset"):
        environment.device()


def test_prepare_is_cheap():
    environment.prepare()
    begin = time.perf_counter()
    for _ in range(100):
        environment.prepare()
    assert time.perf_counter() - begin < 1
