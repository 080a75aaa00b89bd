"""One word per step: DVC stage, params section, Hydra group, stage module, Prefect task, command, test."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_layers import SOURCE, imports

from fast_goal.cli import STEPS as COMMANDS
from fast_goal.configure import CONF
from fast_goal.stages import STEPS

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_the_steps_are_those_of_the_pipeline_in_the_same_order():
    assert list(PIPELINE) == list(STEPS) == list(COMMANDS)


@pytest.mark.parametrize("step", PIPELINE)
def test_a_step_has_its_counterparts(step: str):
    assert PIPELINE[step]["cmd"] == f"fast-goal {step}"
    assert step in yaml.safe_load((ROOT / "params.yaml").read_text()), "section of params.yaml"
    assert (CONF / step).is_dir(), "Hydra group"
    assert (ROOT / f"tests/stages/test_{step}.py").is_file(), "test"
    assert callable(importlib.import_module(f"fast_goal.stages.{step}").main)
    assert f"src/fast_goal/stages/{step}.py" in PIPELINE[step]["deps"], "DVC dependency on the stage's own code"
    assert step in str(PIPELINE[step]["params"]), "DVC dependency on the step's parameters"


def reached(step: str) -> set[str]:
    """The files of the package that the step's module imports, over any number of others; paths below SOURCE."""
    waiting, seen = [SOURCE / f"stages/{step}.py"], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            package, *parts = name.split(".")
            if package != "fast_goal":
                continue
            # `from a import b`: b is a module, or a name in the module a
            places = [SOURCE.joinpath(*parts[:length]) for length in (len(parts), len(parts) - 1) if length > 0]
            waiting += [
                file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()
            ]
    return {path.relative_to(SOURCE).as_posix() for path in seen}


@pytest.mark.parametrize("step", PIPELINE)
def test_a_step_depends_on_the_code_that_makes_its_inputs(step: str):
    """Pixels, texts and features: where one of these changes, the result does."""
    deps = [path.removeprefix("src/fast_goal/") for path in PIPELINE[step]["deps"]]
    needed = {path for path in reached(step) if path in ("data/captions.py", "data/images.py") or path.startswith("model/")}
    needed.discard("model/__init__.py")
    assert not {path for path in needed if not any(path == dep or path.startswith(f"{dep}/") for dep in deps)}


def test_the_flow_has_a_task_per_step():
    # in a process of its own: Prefect changes logging when it is imported
    code = "import reproduce; print(*[task.name for task in reproduce.TASKS.values()])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "flows", capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(PIPELINE)


def test_every_file_that_dvc_watches_exists():
    for step, stage in PIPELINE.items():
        for path in stage["deps"]:
            if path.startswith("src/"):
                assert (ROOT / path).exists(), f"{step}: {path}"
