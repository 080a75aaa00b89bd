"""One word per step: DVC stage, params section, Hydra group, stage module, Prefect task, command, test."""

import ast
import importlib
from pathlib import Path

import pytest
import yaml

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


def test_the_flow_has_a_task_per_step():
    source = (ROOT / "flows/reproduce.py").read_text()
    names = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert "fast_goal.stages" in source or set(PIPELINE) <= names


def test_every_file_that_dvc_watches_exists():
    for step, stage in PIPELINE.items():
        for path in stage["deps"]:
            if path.startswith("src/"):
                assert (ROOT / path).exists(), f"{step}: {path}"
