"""The benchmark of FLISM runs, and its reference finds what the engine finds."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

from fast_goal.flism.detectors import load_detector, obtain_detector
from fast_goal.flism.engine import extract
from fast_goal.model.clip import Clip

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_flism", FOLDER / "flism.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def small(benchmark, tmp_path_factory):
    """Six small photographs, the smallest CLIP, and boxes from a table."""
    tmp_path = tmp_path_factory.mktemp("small")
    dataset = benchmark.inputs._generated("six", tmp_path, 6, (64, 48), 3, benchmark.inputs._speck)
    base = benchmark.inputs.tiny_base(tmp_path / "base", dataset)
    boxes = pd.DataFrame(
        [
            {"image_id": f"{index:06d}", "x1": 4.0 + index, "y1": 5.0, "x2": 30.5, "y2": 40.0, "label": "thing", "score": 0.9}
            for index in range(6)
        ]
    )
    boxes.to_csv(tmp_path / "boxes.csv", index=False)
    config = replace(benchmark.inputs.demo_base_config().detector, kind="table", weights=str(tmp_path / "boxes.csv"))
    obtain_detector(config, tmp_path / "table", dataset, 0)
    settings = benchmark.inputs.settings(batch_size=4, shard_size=3, top_k=2)
    clip = Clip.load(base / "clip").eval()
    return dataset, clip, load_detector(tmp_path / "table", settings, dataset, "cpu"), settings


def test_help_names_the_parts():
    done = subprocess.run([sys.executable, FOLDER / "flism.py", "--help"], capture_output=True, text=True, check=True)
    for part in ("baseline", "share", "large", "memory", "kills", "h200"):
        assert f"--{part}" in done.stdout


def test_the_reference_equals_the_engine(benchmark, small, tmp_path):
    dataset, clip, detector, settings = small
    expected = benchmark.per_image(dataset, clip, detector, settings, torch.device("cpu"), dataset.split("train"))
    result = extract(dataset, clip, detector, settings, tmp_path / "cache")
    assert len(expected["regions"]) == 36
    assert len(expected["pairs"]) == 12
    found = benchmark.assert_equal(expected, result, dataset, benchmark.TOLERANCE)
    assert found["largest_similarity_difference"] <= 1e-5
    expected["pairs"].loc[3, "similarity"] += 1e-3
    with pytest.raises(AssertionError, match="similarities differ"):
        benchmark.assert_equal(expected, result, dataset, benchmark.TOLERANCE)


def test_another_choice_is_a_difference_unless_it_is_a_tie(benchmark, small, tmp_path):
    dataset, clip, detector, settings = small
    expected = benchmark.per_image(dataset, clip, detector, settings, torch.device("cpu"), dataset.split("train"))
    result = extract(dataset, clip, detector, settings, tmp_path / "cache")
    result.pairs.loc[0, "region_index"] += 1
    expected["pairs"].loc[0, "runner_up"] = expected["pairs"].loc[0, "similarity"] - 0.01
    with pytest.raises(AssertionError, match="other pairs"):
        benchmark.assert_equal(expected, result, dataset, benchmark.TOLERANCE)
    expected["pairs"].loc[0, "runner_up"] = expected["pairs"].loc[0, "similarity"]
    assert benchmark.assert_equal(expected, result, dataset, benchmark.TOLERANCE)["ties"] == 1


def test_the_stop_watch_sees_every_forward_pass(benchmark, small, tmp_path):
    dataset, clip, detector, settings = small
    forwards = benchmark.Forwards()
    with forwards.measured(), benchmark.Sampler() as sampler:
        extract(dataset, clip, detector, settings, tmp_path / "cache")
    passed = [arguments for part, _, arguments in forwards.inputs if part == "embed"]
    assert sum(arguments["images"][0][0] for arguments in passed if "images" in arguments) >= 36
    assert sum(arguments["tokens"][0][0] for arguments in passed if "tokens" in arguments) >= 18
    assert forwards.seconds("embed") == forwards.seconds() > 0
    assert forwards.seconds("detect") == 0
    assert forwards.replay() > 0
    assert sum(cell["main"] for cell in sampler.table().values()) == pytest.approx(1)


def test_time_under_two_forward_passes_at_once_counts_once(benchmark):
    forwards = benchmark.Forwards()
    forwards.spans["detect"] = [(0.0, 2.0), (5.0, 6.0)]
    forwards.spans["embed"] = [(1.0, 3.0), (5.2, 5.5)]
    assert forwards.seconds() == pytest.approx(4)
    assert forwards.seconds("embed") == pytest.approx(2.3)
