"""The same tables from one process, from several, from Ray, and from a run that was killed again and again."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from colours import ColourClip, ColourDetector, flism_config

from fast_goal.data.records import Dataset
from fast_goal.errors import ConfigError, ModelError
from fast_goal.flism.engine import FlismResult, extract

HERE = Path(__file__).parent


def run(dataset: Dataset, cache: Path, detector=None, models=None, **changes) -> FlismResult:
    return extract(dataset, ColourClip(), detector or ColourDetector(), flism_config(**changes), cache, models=models)


def assert_same(a: FlismResult, b: FlismResult) -> None:
    for name in ("regions", "pairs", "skipped"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), atol=1e-5, rtol=0)


@pytest.fixture(autouse=True)
def workers_find_the_fakes(monkeypatch):
    """The fakes are pickled by name, and the workers have to import them."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))


class Odd(ColourDetector):
    def __init__(self):
        super().__init__()
        self.opened = threading.Lock()  # cannot be pickled


def odd_models(device: torch.device):
    return ColourClip(), Odd()


def test_two_processes_give_the_same_tables(scenes, tmp_path, capsys):
    expected = run(scenes, tmp_path / "one", shard_size=2)
    with pytest.raises(ConfigError, match=r"flism\.processes=1"):
        run(scenes, tmp_path / "two", detector=Odd(), processes=2)
    (scenes.root / "image03.png").rename(tmp_path / "away.png")
    partly = run(scenes, tmp_path / "two", detector=Odd(), shard_size=2, processes=2, models=odd_models)
    assert list(partly.skipped["sample"]) == ["image03"]
    (tmp_path / "away.png").rename(scenes.root / "image03.png")
    detector = ColourDetector()
    assert_same(run(scenes, tmp_path / "two", detector=detector, shard_size=2), expected)
    assert detector.seen == 1
    assert "11/11 images" in capsys.readouterr().err


class Dying(ColourDetector):
    """Kills the process at the fourth image, as the system does when memory runs out."""

    def detect(self, images, image_ids=()):
        if self.seen + len(images) >= 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(images, image_ids)


class Failing(ColourDetector):
    def detect(self, images, image_ids=()):
        raise RuntimeError("a bug")


def test_a_dead_worker_ends_the_run_and_costs_only_what_it_had_begun(scenes, tmp_path):
    with pytest.raises(ModelError, match="exit code -9"):
        run(scenes, tmp_path / "cache", detector=Dying(), batch_size=1, shard_size=1, processes=2)
    detector = ColourDetector()
    assert_same(run(scenes, tmp_path / "cache", detector=detector), run(scenes, tmp_path / "new"))
    assert detector.seen < 11


def test_an_error_in_a_worker_is_told(scenes, tmp_path):
    with pytest.raises(ModelError, match="a bug"):
        run(scenes, tmp_path / "cache", detector=Failing(), processes=2)


class Slow(ColourDetector):
    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def detect(self, images, image_ids=()):
        time.sleep(self.seconds)
        return super().detect(images, image_ids)


def start(scenes, cache, seconds: float, processes: int) -> multiprocessing.process.BaseProcess:
    """A run in a process of its own, one image a shard."""
    settings = {"batch_size": 1, "shard_size": 1, "processes": processes}
    # forked, because a new interpreter would take seconds to import torch
    process = multiprocessing.get_context("fork").Process(target=run, args=(scenes, cache, Slow(seconds)), kwargs=settings)
    process.start()
    return process


def test_killed_five_times_at_random_moments(scenes, tmp_path):
    expected = run(scenes, tmp_path / "whole")
    moments, finished = random.Random(7), [0]
    for _ in range(5):
        process = start(scenes, tmp_path / "cache", 0.1, processes=0)
        time.sleep(moments.uniform(0.1, 0.4))
        process.kill()
        process.join()
        finished.append(len(list((tmp_path / "cache/flism").glob("*/shard-*.json"))))
    assert finished == sorted(finished)
    assert finished[-1] < 11, "the kills came too late to mean something"
    assert_same(run(scenes, tmp_path / "cache"), expected)
    assert not list(tmp_path.glob("cache/embeddings/*.damaged-*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(scenes, tmp_path, how):
    parent = start(scenes, tmp_path / "cache", 1.0, processes=2)
    children: list[int] = []
    end = time.monotonic() + 60
    while time.monotonic() < end and not list((tmp_path / "cache/flism").glob("*/shard-*.json")):  # they are at work
        children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        time.sleep(0.05)
    assert len(children) >= 2
    os.kill(parent.pid, how)
    parent.join(30)
    while any(alive(pid) for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in children if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_ray_gives_the_same_tables(scenes, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    expected = run(scenes, tmp_path / "here", shard_size=4)
    made = run(scenes, tmp_path / "ray", shard_size=4, engine="ray")
    assert_same(made, expected)
    detector = ColourDetector()
    assert_same(run(scenes, tmp_path / "ray", detector=detector), expected)
    assert detector.seen == 0


def test_without_ray_the_way_out_is_named(scenes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"fast-goal\[ray\]"):
        run(scenes, tmp_path / "cache", engine="ray")
