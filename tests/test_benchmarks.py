"""The benchmarks run, and their references compute what the project computes."""

import argparse
import importlib.util
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    with loaded("flism") as module:
        yield module


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small more of them only wait for each other
    with loaded("train_step") as module:
        yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few(training, tmp_path_factory):
    """The smallest CLIP and three samples with captions beyond its context."""
    clip = training.inputs.model("tiny").train()
    dataset, pairs = training.inputs.captioned(tmp_path_factory.mktemp("few"), 3, "full")
    return clip, training.inputs.samples(dataset, pairs, clip, 3, torch.device("cpu"))


@pytest.fixture(scope="module")
def small(benchmark, tmp_path_factory):
    """Six small photographs, the smallest CLIP, and boxes from a table."""
    tmp_path = tmp_path_factory.mktemp("small")
    dataset = benchmark.inputs.generated("six", tmp_path, 6, (64, 48), 3, benchmark.inputs.draw_speck)
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


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("flism", ("baseline", "share", "large", "memory", "kills", "h200")),
        ("train_step", ("reference", "tsl", "throughput", "loader", "accumulation", "h200", "smoke")),
    ],
)
def test_help_names_the_parts(name, parts, monkeypatch, capsys):
    """As a script, in this process: a fresh one takes seconds to import what is here already."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for part in parts:
        assert f"--{part}" in said


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


def test_every_formulation_of_the_step_computes_the_same(training, few):
    clip, given = few
    plain = training.plain_optimizer(clip)
    train = training.TrainStep(clip, training.inputs.objective(), plain)
    expected = train([given.batch])
    gradients = [parameter.grad for parameter in clip.parameters()]
    assert expected["tsl_text"] > 0 and expected["local"] > 0
    for rung, formulation in training.ladder(clip.context_length).items():
        terms = training.SlowStep(clip, formulation, given, training.inputs.tokenizer().encode, plain)()
        for name, value in terms.items():
            assert value.item() == pytest.approx(expected[name].item(), abs=1e-5), (rung, name)
        for parameter, gradient in zip(clip.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)


def test_the_published_formulation_encodes_twice_and_pads(training, few):
    clip, given = few
    images, texts = [], []
    hooks = [
        clip.model.visual.conv1.register_forward_hook(lambda module, inputs, output: images.append(len(output))),
        clip.model.token_embedding.register_forward_hook(lambda module, inputs, output: texts.append(output.shape[:2])),
    ]
    asked, seen = [], {}

    def encode(text):
        asked.append(text)
        return training.inputs.tokenizer().encode(text)

    for rung, formulation in training.ladder(clip.context_length).items():
        images.clear(), texts.clear(), asked.clear()
        training.SlowStep(clip, formulation, given, encode, training.plain_optimizer(clip))()
        seen[rung] = (list(images), [tuple(shape) for shape in texts], len(asked))
    for hook in hooks:
        hook.remove()
    length = given.batch.sentence_tokens.shape[1]
    assert 20 < length < 77
    assert seen["published"] == ([6, 6], [(6, 248), (6, 248)], 3 * 4)
    assert seen["sentences padded to 77"] == ([6, 6], [(3, 248), (3, 77)] * 2, 3 * 4)
    assert seen["each input encoded once"] == ([6], [(3, 248), (3, 77)], 3 * 4)
    assert seen["texts trimmed"] == ([6], [(3, 248), (3, length)], 3 * 4)
    assert seen["patches and spans in one go"] == seen["fused AdamW"] == ([6], [(3, 248), (3, length)], 0)


def test_a_step_that_differs_from_the_published_one_is_noticed(training, few):
    clip, given = few
    assert training.assert_equal(clip, given)["gradient_difference"] < 1e-4
    moved = replace(given, batch=replace(given.batch, spans=given.batch.spans + 1))
    with pytest.raises(AssertionError, match="a term differs"):
        training.assert_equal(clip, moved)


def test_ways_take_turns_there_and_back(training):
    calls = []
    seconds = training.in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=2)
    assert "".join(calls) == "abc" + "abc" + "cba"
    assert [len(values) for values in seconds.values()] == [2, 2, 2]
    assert training.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3.0, "low": 2.5, "high": 3.5}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_device(training, name, expected):
    assert training.peak_flops(name) == expected


def test_operations_are_those_of_the_formula(training, few):
    def tower(tokens, width, layers):
        matrices = 12 * width * width * tokens  # queries, keys, values, output, and the two of the MLP
        return 2 * layers * (matrices + 2 * tokens * tokens * width)

    patches, sentence = 4, training.inputs.SENTENCE_TOKENS
    images = 2 * tower(patches + 1, 32, 1) + 2 * 2 * patches * 3 * 16 * 16 * 32 * 2 / 3  # no gradient of the pixels
    texts = tower(248, 32, 1) + tower(sentence, 32, 1)
    counted = training.flops_per_sample(few[0], torch.device("cpu"))
    assert counted == pytest.approx(3 * (images + texts), rel=0.02)


def test_a_batch_that_does_not_fit_ends_its_variant(training, tmp_path, monkeypatch):
    def call(self, parts):
        if len(parts[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.TrainStep, "__call__", call)
    run = training.Run(options(tmp_path, batches=[2, 4, 8], variants=["fp32", "fp32+checkpointing:1"]), torch.device("cpu"))
    rows = training.throughput(run)["rows"]
    assert [(row["variant"], row["batch"], row["seconds"] is None) for row in rows] == [
        ("fp32", 2, False),
        ("fp32", 4, True),
        ("fp32+checkpointing", 1, False),
    ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_parts_of_the_training_benchmark_run(training, tmp_path, device, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the index of shards is written there
    run = training.Run(options(tmp_path), torch.device(device))
    training.measure(run, training.PARTS, tmp_path / "results")
    known = json.loads((tmp_path / "results.json").read_text())
    assert set(known) == {f"{part} ({device})" for part in training.PARTS}
    assert known[f"accumulation ({device})"]["largest_loss_difference"] < (1e-5 if device == "cpu" else 1e-2)
    ways = {row["way"] for row in known[f"loader ({device})"]["rates"]}
    assert ways - {"GPU decoding"} == {"files", "scaled decoding", "shards", "pixel cache cold", "pixel cache warm"}
    text = (tmp_path / "results.md").read_text()
    assert ("python benchmarks/train_step.py --h200" in text) == (device == "cpu")  # what a GPU has still to measure
    assert text in capsys.readouterr().out


def options(work: Path, **changes) -> argparse.Namespace:
    """Those of a smoke run of the training's benchmark, without worker processes."""
    values = {"smoke": True, "repeats": 1, "models": None, "variants": None, "batches": None, "workers": [0], "work": work}
    return argparse.Namespace(**(values | changes))


def test_learning_curves_are_means_over_the_seeds(tmp_path):
    from PIL import Image

    def run(objective, seed, shift):
        scores = [{"step": step, "seconds": step * 2.0, "long R@1": step + shift, "localisation": 10.0} for step in (0, 4, 8)]
        terms = [{"step": step, "seconds": step * 2.0, "global": 1 / step} for step in (2, 4, 6, 8)]
        return {"objective": objective, "seed": seed, "learning_rate": 1e-3, "records": [scores[0], *terms, *scores[1:]]}

    runs = [run("fast_goal", 0, 0.0), run("fast_goal", 1, 2.0), run("global", 0, 1.0)]
    with loaded("learning_curves") as curves:
        assert curves.curve(runs[:2], "long R@1", "seconds") == ([0, 8, 16], [1, 5, 9], [pytest.approx(2**0.5)] * 3)
        assert curves.curve(runs[2:], "tsl_image", "step") == ([], [], [])
        curves.draw(runs, tmp_path / "curves.png")
        about = {"commit": "c0ffee", "device": "cpu", "cores": 2, "torch": "2", "torch_threads": 2}
        text = curves.table({"machine": about, "settings": [], "runs": runs})
    assert Image.open(tmp_path / "curves.png").size == (1500, 950)
    assert "| FAST-GOAL | 0.001 | 9.0 ± 1.4 | 10.0 ± 0.0 | 16 |" in text and "| base | | 1.0 | 10.0 | |" in text


def test_conditioned_scores_equal_the_published_formulation():
    with loaded("conditioned") as module:
        size = module.measured(4, 16, 2, 5, 7, 2, torch.device("cpu"))
        assert max(size["difference"].values()) < 2e-6
        told = "\n".join(module.lines({"images": 5, "texts": 7, **size}))
    assert "5 images of 4 patches, 7 texts, width 16, 2 heads." in told and "times as fast as published is" in told
