"""benchmarks/scenes_large.py in miniature: in pieces, killed in between, and on a machine without the MLOps packages."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fast_goal.ablations import plan, tables
from fast_goal.configure import check, compose
from fast_goal.files import read_json

SCRIPT = Path(__file__).parents[1] / "benchmarks/scenes_large.py"
DATA, SCRATCH = "download.datasets.rich_scenes", "base.scratch"
TINY = [
    *(f"{DATA}.{name}={value}" for name, value in {"pretrain": 24, "train": 16, "val": 2, "test": 4, "image_size": 48}.items()),
    *(f"{SCRATCH}.{name}={value}" for name, value in {"image_size": 32, "patch_size": 8, "head_width": 8}.items()),
    *(f"{SCRATCH}.{name}=16" for name in ("embed_dim", "vision_width", "text_width")),
    *(f"{SCRATCH}.{name}=1" for name in ("vision_layers", "text_layers", "warmup_steps")),
    f"{SCRATCH}.steps=30",
    f"{SCRATCH}.batch_size=8",
    "base.detector.kind=table",
    "base.detector.weights=objects",
    *(f"finetune.{name}={value}" for name, value in {"epochs": 2, "batch_size": 8, "workers": 0, "save_every": 1}.items()),
    "flism.precision=fp32",
    *(f"evaluate.{name}={value}" for name, value in {"precision": "fp32", "batch_size": 8, "bootstrap_samples": 9}.items()),
]
# What a GPU machine may lack.
ABSENT = ["mlflow", "dvc", "prefect", "great_expectations", "hydra", "omegaconf", "typer", "matplotlib", "httpx", "psutil"]
# The first piece, in a process of its own: a state of the base every five steps, and time to be killed at one.
FIRST_PIECE = f"""
import sys, time
for name in {ABSENT}: sys.modules[name] = None
sys.path.insert(0, {str(SCRIPT.parent)!r})
from fast_goal.training import pretraining
save = pretraining.save_state
pretraining.SAVE_EVERY = 5
pretraining.save_state = lambda *given: (save(*given), given[4]["step"] == 10 and time.sleep(60))
import scenes_large
sys.exit(scenes_large.main())
"""


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("scenes_large", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def words(folder: Path, *more: str) -> list[str]:
    told = ["--work", str(folder / "work"), "--output", str(folder / "result"), "--seeds", "0", "--rates", "1e-3", "2e-3"]
    return [*told, "--arms", "global", "fast_goal", "wrong_region", "--set", *TINY, *more]


def call(script: ModuleType, folder: Path, *more: str) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["scenes_large.py", *words(folder), *more])
        return script.main()


def numbers(value: Any) -> Any:
    """The results without times."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items() if "second" not in key and key != "resumed_at_step"}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def weights(folder: Path) -> dict[str, bytes]:
    return {
        path.parent.parent.parent.name: path.read_bytes() for path in folder.glob("work/runs/*/models/finetune/*.safetensors")
    }


def test_the_composed_settings_are_current(script):
    assert read_json(script.COMPOSED) == json.loads(json.dumps(script.composed())), (
        "python benchmarks/scenes_large.py --compose"
    )


@pytest.mark.parametrize("name", ["V", "VI", "VII", "VIII", "XIV", "XVI", "XVII"])
def test_every_arm_is_that_of_the_ablation(script, name):
    table, known = tables.load(name), read_json(script.COMPOSED)
    assert name in script.TABLES and list(known["arms"][name]) == list(table.arms)  # none is left out
    for arm, sections in known["arms"][name].items():
        composed = compose(plan.overrides_of(table, arm, "scenes_large", ["seed=2"]))
        assert check({**known["params"], **sections, "seed": 2}) == check(composed)


def test_in_pieces_with_a_kill_the_result_is_that_of_one_go(script, tmp_path, capsys):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert call(script, whole) == script.DONE
    process = subprocess.Popen([sys.executable, "-c", FIRST_PIECE, *words(pieces)], stderr=subprocess.PIPE)
    state = pieces / "work/.fast_goal/state/base"
    begin = time.monotonic()
    while not list(state.glob("clip-*/clip.00000010.pt")):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() - begin < 120
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finetune, begun = "fast_goal.training.loop.save_state", []
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as ended:
        from fast_goal.training import loop

        save = loop.save_state
        patched.setattr(finetune, lambda *given: save(*given) or begun.append(1) or os.kill(os.getpid(), signal.SIGTERM))
        call(script, pieces)
    assert ended.value.code == 143 and begun  # asked to end by somebody else: no status of its own
    assert read_json(pieces / "work/models/base/metrics.json")["resumed_at_step"] == 10
    assert call(script, pieces) == script.DONE
    first, second = (read_json(folder / "result.json") for folder in (whole, pieces))
    assert len(first["runs"]) == 3 and first["left"] == second["left"] == 0
    assert numbers(first["runs"]) == numbers(second["runs"]) and numbers(first["base"]) == numbers(second["base"])
    assert len(weights(whole)) == 5 and weights(whole) == weights(pieces)  # with the two rates that were not chosen
    text = (whole / "result.md").read_text()
    assert "## rich_scenes" in text and "| FAST-GOAL with wrong regions |" in text and "learning rate 0.00" in text
    before = sorted(path.stat().st_mtime_ns for path in whole.glob("work/runs/*/models/finetune/*"))
    capsys.readouterr()
    assert call(script, whole) == script.DONE  # nothing is left to do
    assert sorted(path.stat().st_mtime_ns for path in whole.glob("work/runs/*/models/finetune/*")) == before
    assert "steps/s" not in capsys.readouterr().err


def test_it_stops_when_the_time_is_up(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "GRACE", 600.0)  # not to end the tests, on however busy a machine
    before, begin = signal.getsignal(signal.SIGTERM), time.monotonic()
    assert call(script, tmp_path, f"{SCRATCH}.steps=1000000", "--minutes", "0.05") == script.MORE
    assert 2.5 < time.monotonic() - begin < 60
    assert "time is up; 3 of 3 rows are left" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_wrong_words_are_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="no such setting"):
        call(script, tmp_path, "finetune.epoch=3")
    with pytest.raises(SystemExit, match="have no such arm"):
        call(script, tmp_path, "--arms", "nobody")
    assert not (tmp_path / "work/data").exists()
