"""Several objectives in one run: the sum, what it needs, and where the parts disagree."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fast_goal.configure import CONF, compose
from fast_goal.errors import ConfigError
from fast_goal.objectives import Features, make_objective, objective_config

FAST_GOAL, DEGLA = (compose([f"objective={name}", "negatives=rules"])["objective"] for name in ("fast_goal", "degla"))
PLAIN = compose(["objective=global"])["objective"]


def parts(**described: tuple[float, dict]) -> dict:
    return {
        "name": "weighted",
        "parts": {name: {"weight": weight, "objective": values} for name, (weight, values) in described.items()},
    }


@pytest.fixture
def given() -> Features:
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, 6, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()

    return Features(
        image_global=unit(4),
        text_global=unit(4),
        image_local=unit(3),
        text_local=unit(3),
        region=unit(3),
        sentence=unit(3),
        region_weight=torch.ones(3, dtype=torch.float64),
        sentence_weight=torch.ones(3, dtype=torch.float64),
        text_negatives=unit(5),
        negative_rows=torch.tensor([0, 0, 1, 3, 3]),
        negative_slots=torch.tensor([0, 1, 0, 0, 1]),
        negative_count=2,
        teacher_image=unit(4).detach(),
        teacher_text=unit(4).detach(),
        teacher_negatives=unit(5).detach(),
        scale=torch.tensor(10.0, dtype=torch.float64, requires_grad=True),
    )


def test_the_sum_of_the_parts(given):
    one, other = make_objective(FAST_GOAL)(given), make_objective(DEGLA)(given)
    found = make_objective(parts(fine=(0.5, FAST_GOAL), words=(3.0, DEGLA)))(given)
    assert found["loss"].item() == pytest.approx(0.5 * one["loss"].item() + 3.0 * other["loss"].item(), abs=1e-10)
    expected = {f"fine/{term}": value for term, value in one.items()} | {
        f"words/{term}": value for term, value in other.items()
    }
    del expected["fine/loss"], expected["words/loss"]
    assert list(found) == [*expected, "loss"]
    assert all(found[name].item() == value.item() for name, value in expected.items())


def test_the_gradient_is_the_sum_of_those_of_the_parts(given):
    inputs = [
        value for field in dataclasses.fields(given) if getattr(value := getattr(given, field.name), "requires_grad", False)
    ]

    def gradients(values: dict) -> list[torch.Tensor]:
        made = torch.autograd.grad(make_objective(values)(given)["loss"], inputs, allow_unused=True)
        return [torch.zeros_like(value) if found is None else found for found, value in zip(made, inputs, strict=True)]

    one, other = gradients(FAST_GOAL), gradients(DEGLA)
    both = gradients(parts(a=(0.5, FAST_GOAL), b=(3.0, DEGLA)))
    assert len(inputs) == 8 and all(found.any() for found in both)
    for found, left, right in zip(both, one, other, strict=True):
        torch.testing.assert_close(found, 0.5 * left + 3.0 * right)


def test_it_needs_what_any_part_needs():
    def needs(values: dict) -> tuple:
        made = make_objective(values)
        return made.needs_local, made.needs_pooled, made.needs_negatives, made.teacher_decay, made.alignment

    goal = FAST_GOAL | {"alignment": "goal"}
    assert needs(parts(a=(1.0, DEGLA), b=(1.0, goal))) == (True, True, True, 0.9996, "goal")
    assert needs(parts(a=(1.0, PLAIN))) == (False, False, False, None, "exact")
    without_tsl = FAST_GOAL | {"weights": FAST_GOAL["weights"] | {"tsl_image": 0.0, "tsl_text": 0.0}}
    assert needs(parts(a=(1.0, PLAIN), b=(2.0, without_tsl))) == (True, False, False, None, "exact")
    assert needs(parts(a=(0.0, DEGLA), b=(1.0, PLAIN))) == (False, False, False, None, "exact")


def test_a_part_of_weight_zero_is_left_out(given):
    found = make_objective(parts(a=(0.0, DEGLA), b=(2.0, PLAIN)))(given)
    assert list(found) == ["b/global", "loss"] and found["loss"].item() == pytest.approx(2 * found["b/global"].item())


def test_a_sum_of_sums(given):
    values = parts(outer=(2.0, parts(inner=(3.0, PLAIN))))
    found = make_objective(values)(given)
    assert list(found) == ["outer/inner/global", "loss"]
    assert found["loss"].item() == pytest.approx(6 * found["outer/inner/global"].item())


def test_fast_goal_with_degla(given):
    """The shipped combination: every term of both but FAST-GOAL's global one."""
    found = make_objective(compose(["objective=fast_goal_degla", "negatives=rules"])["objective"])(given)
    one, other = make_objective(FAST_GOAL)(given), make_objective(DEGLA)(given)
    expected = one["loss"] - one["global"] + other["loss"]
    assert found["loss"].item() == pytest.approx(expected.item(), abs=1e-10)
    assert {name.partition("/")[0] for name in found} == {"fast_goal", "degla", "loss"} and len(found) == 8


def test_shipped_objectives_of_negatives_differ_by_their_weights(given):
    negclip = make_objective(compose(["objective=negclip", "negatives=rules"])["objective"])
    assert list(negclip(given)) == ["global", "loss"] and negclip.teacher_decay is None
    assert negclip(given)["loss"].item() == pytest.approx(make_objective(DEGLA)(given)["global"].item())
    assert (CONF / "objective" / "negclip.yaml").is_file()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "weighted", "parts": {}}, "objective.parts = none: at least one has to have a weight above 0"),
        (parts(a=(0.0, PLAIN)), "objective.parts = a: at least one"),
        (parts(a=(-1.0, PLAIN)), "objective.parts.a.weight = -1.0: expected a number, at least 0"),
        (parts(a=(math.inf, PLAIN)), "objective.parts.a.weight = inf"),
        (parts(**{"A/b": (1.0, PLAIN)}), "objective.parts.A/b: expected a name of small letters"),
        (parts(a=(1.0, PLAIN | {"name": "none"})), "objective.parts.a.objective.name = 'none': expected one of"),
        (parts(a=(1.0, {})), "objective.parts.a.objective: missing key name. Known objectives: degla, fast_goal"),
        (
            parts(a=(1.0, DEGLA | {"tgc_scal": 1.0})),
            r"objective.parts.a.objective: unknown key tgc_scal = 1.0. Did you mean tgc_scale\?",
        ),
        (parts(a=(1.0, DEGLA | {"tgc_scale": 0.0})), "objective.parts.a.objective.tgc_scale = 0.0: expected more than 0"),
        (
            parts(a=(1.0, DEGLA | {"weights": {"globl": 1.0}})),
            "objective.parts.a.objective.weights.globl = 1.0: unknown term",
        ),
        ({"name": "weighted", "parts": {"a": {"objective": PLAIN}}}, "missing key objective.parts.a.weight"),
        (
            parts(a=(1.0, FAST_GOAL), b=(1.0, FAST_GOAL | {"alignment": "goal"})),
            "objective.parts: alignment is exact in a, goal in b; set it to the same in all",
        ),
        (
            parts(a=(1.0, DEGLA), b=(1.0, DEGLA | {"teacher_decay": 0.99})),
            "objective.parts: teacher_decay is 0.9996 in a, 0.99 in b",
        ),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(ConfigError, match=message):
        objective_config(values)


def test_what_a_part_does_not_look_at_need_not_agree():
    negclip = DEGLA | {"weights": dict.fromkeys(DEGLA["weights"], 0.0) | {"global": 1.0}, "teacher_decay": 0.5}
    goal = PLAIN | {"alignment": "goal"}  # without local pairs
    objective_config(parts(a=(1.0, DEGLA), b=(1.0, negclip), c=(1.0, FAST_GOAL), d=(1.0, goal)))
    objective_config(parts(a=(1.0, DEGLA), b=(0.0, DEGLA | {"teacher_decay": 0.5})))
