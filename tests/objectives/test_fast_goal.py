"""The FAST-GOAL objective and the registry it is chosen from."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fast_goal.errors import ConfigError
from fast_goal.model.tokens import masked_mean, patch_mask, span_mask
from fast_goal.objectives import Features, make_objective, objective, objective_config
from fast_goal.objectives.contrastive import clip_loss
from fast_goal.objectives.fast_goal import FastGoal, FastGoalConfig
from fast_goal.objectives.tsl import tsl_loss

WEIGHTS = {"global": 1.0, "local": 0.5, "tsl_image": 1.0, "tsl_text": 1.0}
VALUES = {
    "name": "fast_goal",
    "weights": WEIGHTS,
    "target_matrix": "diagonal",
    "in_image_negatives": None,
    "alignment": "exact",
}


def features(batch: int = 4, local: int = 3, dtype: torch.dtype = torch.float64) -> Features:
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        rows = F.normalize(torch.randn(rows, 6, generator=generator, dtype=torch.float64), dim=-1)
        return rows.to(dtype).requires_grad_()

    return Features(
        image_global=unit(batch),
        text_global=unit(batch),
        image_local=unit(local),
        text_local=unit(local),
        region=unit(local),
        sentence=unit(local),
        region_weight=(torch.arange(local) % 2 == 0).to(dtype),
        sentence_weight=torch.ones(local, dtype=dtype),
        scale=torch.tensor(10.0, dtype=dtype, requires_grad=True),
    )


def with_weights(**weights: float) -> FastGoal:
    return make_objective(VALUES | {"weights": dict.fromkeys(WEIGHTS, 0.0) | weights})


def test_the_published_total(vectors):
    """From pre-norm tokens, boxes and spans to the total, every step with the functions of this project."""
    inputs, outputs = (vectors["V4_goal_losses"][key] for key in ("inputs", "outputs"))
    value = {name: torch.tensor(x, dtype=torch.float64) for name, x in inputs.items() if isinstance(x, list)}
    boxes = value["boxes(x1,y1,x2,y2,W,H) on 32px/16 patches"]
    boxes = boxes[:, :4] * 32 / boxes[:, 4:].repeat(1, 2)
    patches = value["patch_tokens_preLN(B,1+4,D)"][:, 1:]
    tokens, spans = value["text_tokens_preLN(B,8,D)"], value["token_ranges[start,end)"]

    def project(pooled: torch.Tensor, norm: str, projection: str) -> torch.Tensor:
        normed = F.layer_norm(pooled, (4,), *value[norm], eps=inputs["ln_eps"])
        return F.normalize(normed @ value[projection].T, dim=-1)

    image, text = value["image_embeds(global rows 0-2, local rows 3-5)"], value["text_embeds"]
    found = make_objective(VALUES)(
        Features(
            image_global=image[:3],
            text_global=text[:3],
            image_local=image[3:],
            text_local=text[3:],
            region=project(masked_mean(patches, patch_mask(boxes, 32, 16)), "ln_v", "visual_projection_weight(E,D)"),
            sentence=project(masked_mean(tokens, span_mask(spans, 8)), "ln_t", "text_projection_weight(E,D)"),
            region_weight=torch.ones(3),
            sentence_weight=torch.ones(3),
            scale=torch.tensor(inputs["logit_scale"], dtype=torch.float64).exp(),
        )
    )
    assert found["global"].item() == pytest.approx(outputs["loss_global"], abs=1e-5)
    assert found["local"].item() == pytest.approx(outputs["loss_local"], abs=1e-5)
    assert found["tsl_image"].item() == pytest.approx(outputs["loss_tsl_image"], abs=1e-7)
    assert found["tsl_text"].item() == pytest.approx(outputs["loss_tsl_text"], abs=1e-7)
    total = outputs["total = global + 0.5*local + tsl_image + tsl_text"]
    assert found["loss"].item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
def test_terms_and_sum(matrix):
    weights = {"global": 0.3, "local": 2.0, "tsl_image": 0.7, "tsl_text": 5.0}
    given = features()
    found = make_objective(VALUES | {"weights": weights, "target_matrix": matrix})(given)
    expected = {
        "global": clip_loss(given.image_global, given.text_global, given.scale),
        "local": clip_loss(given.image_local, given.text_local, given.scale),
        "tsl_image": tsl_loss(given.region, given.image_local, given.region_weight, matrix),
        "tsl_text": tsl_loss(given.sentence, given.text_local, given.sentence_weight, matrix),
    }
    assert list(found) == [*expected, "loss"]
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value.item())
    assert found["loss"].item() == pytest.approx(sum(weights[term] * value.item() for term, value in expected.items()))
    assert all(value.shape == () for value in found.values())


def test_each_input_gets_a_gradient():
    given = features()
    make_objective(VALUES)(given)["loss"].backward()
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            assert value.grad.isfinite().all() and value.grad.any(), field.name


def test_no_local_pair_in_the_batch():
    given = features(local=0)
    found = make_objective(VALUES)(given)
    assert found["local"] == found["tsl_image"] == found["tsl_text"] == 0
    assert found["loss"].item() == pytest.approx(found["global"].item())
    found["loss"].backward()
    assert given.image_global.grad.any() and given.scale.grad.isfinite()


@pytest.mark.parametrize("term", list(WEIGHTS))
def test_terms_of_weight_zero_are_left_out(term):
    chosen = with_weights(**{term: 2.0})
    found = chosen(features())
    assert list(found) == [term, "loss"] and found["loss"].item() == pytest.approx(2 * found[term].item())
    assert chosen.needs_local is (term != "global")


def test_global_alone_needs_no_local_features():
    given = features()
    alone = Features(image_global=given.image_global, text_global=given.text_global, scale=given.scale)
    chosen = with_weights(**{"global": 1.0})
    assert chosen(alone)["loss"].item() == pytest.approx(chosen(given)["loss"].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    """Losses are float32 at least, also where the features, or the matrix products around, are not."""
    exact = make_objective(VALUES)(features())["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_objective(VALUES)(features(dtype=dtype))["loss"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, abs=1e-4 if dtype == torch.float32 else 0.1)


def test_config():
    make, config = objective_config(VALUES, "objective")
    assert make is FastGoal and config == FastGoalConfig(WEIGHTS, "diagonal", None, "exact")
    assert make(config).alignment == "exact"
    assert VALUES["name"] == "fast_goal"  # what was given is not changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "nothing"}, "objective.name = 'nothing': expected one of .*fast_goal"),
        ({"target_matrix": "full"}, "objective.target_matrix = 'full'"),
        ({"temperature": 1}, "unknown key objective.temperature"),
        ({"weights": WEIGHTS | {"local_image": 1.0}}, "objective.weights.local_image = 1.0: unknown term"),
        ({"weights": WEIGHTS | {"local": -0.5}}, "objective.weights.local = -0.5: expected a number, at least 0"),
        ({"weights": WEIGHTS | {"local": math.nan}}, "objective.weights.local = nan"),
        ({"weights": WEIGHTS | {"local": "much"}}, "objective.weights.local = 'much'"),
        ({"weights": {"global": 1.0}}, "objective.weights.local is missing"),
        ({"weights": dict.fromkeys(WEIGHTS, 0.0)}, "at least one has to be above 0"),
        ({"weights": None}, "objective.weights = None"),
        ({"in_image_negatives": 1.01}, "objective.in_image_negatives = 1.01: expected at most 1"),
        ({"in_image_negatives": -0.5}, "objective.in_image_negatives = -0.5: expected at least 0"),
        ({"in_image_negatives": math.nan}, "objective.in_image_negatives = nan"),
        ({"in_image_negatives": True}, "objective.in_image_negatives = True"),
        (
            {"in_image_negatives": 0.5, "weights": WEIGHTS | {"local": 0.0}},
            "objective.in_image_negatives = 0.5 .*set weights.local above 0",
        ),
        ({"alignment": "fuzzy"}, "objective.alignment = 'fuzzy': expected one of 'exact', 'goal'"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        objective_config(VALUES | change, "objective")


def test_missing_name():
    with pytest.raises(ConfigError, match=r"missing key objective.name"):
        objective_config({"weights": WEIGHTS}, "objective")


def test_two_objectives_of_one_name():
    with pytest.raises(ValueError, match="two objectives are named 'fast_goal'"):
        objective("fast_goal", FastGoalConfig)(FastGoal)
