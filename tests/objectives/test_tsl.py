"""Token similarity-based learning against loops over single pairs."""

import math

import pytest
import torch

from fast_goal.objectives.tsl import tsl_loss


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def slow_tsl(pooled: list, target: list, weight: list, matrix: str) -> float:
    total = parts = 0.0
    for i, a in enumerate(pooled):
        for j, b in enumerate(target):
            if matrix == "identity" or i == j:
                # the diagonal weighs a pair once, the matrix by both its rows
                share = weight[i] * weight[j] if matrix == "identity" else weight[i]
                total += share
                parts += share * (cosine(a, b) - (i == j)) ** 2
    return parts / total if total else 0.0


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
@pytest.mark.parametrize("weight", [None, [1, 1, 1, 1], [1, 0, 1, 0], [0.2, 0.0, 3.0, 1.0], [0, 0, 1, 0], [0, 0, 0, 0]])
def test_against_loops(matrix, weight):
    pooled, target = random(4, 6, seed=1) * 3, random(4, 6, seed=2)
    given = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    found = tsl_loss(pooled, target, given, matrix)
    assert found.item() == pytest.approx(slow_tsl(pooled.tolist(), target.tolist(), weight or [1] * 4, matrix), abs=1e-12)


def embed(vector: dict, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    embedded = "pooled_patch_embed" if kind == "image" else "pooled_text_embed"
    source = "image_embeds(global rows 0-2, local rows 3-5)" if kind == "image" else "text_embeds"
    pooled = torch.tensor(vector["outputs"][embedded], dtype=torch.float64)
    return pooled, torch.tensor(vector["inputs"][source], dtype=torch.float64)[3:]


@pytest.mark.parametrize(
    ("kind", "matrix", "key"),
    [
        ("image", "diagonal", "loss_tsl_image"),
        ("text", "diagonal", "loss_tsl_text"),
        ("image", "identity", "NOT the reference, for contrast: full-matrix MSE vs identity (image)"),
        ("text", "identity", "NOT the reference: full-matrix MSE vs identity (text)"),
    ],
)
def test_published_values(vectors, kind, matrix, key):
    vector = vectors["V4_goal_losses"]
    pooled, target = embed(vector, kind)
    # the published code adds 1e-8 to the features before it normalises them
    assert tsl_loss(pooled, target, None, matrix).item() == pytest.approx(vector["outputs"][key], abs=1e-7)
    assert tsl_loss(pooled * 7, target / 3, None, matrix).item() == pytest.approx(vector["outputs"][key], abs=1e-7)


def test_extremes():
    one = random(3, 4, seed=3)
    assert tsl_loss(one, one).item() == pytest.approx(0)
    assert tsl_loss(one, -one).item() == pytest.approx(4)


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
def test_nothing_to_compare(matrix):
    pooled = torch.zeros(3, 4, requires_grad=True)  # what an empty mask pools
    target = torch.randn(3, 4, requires_grad=True)
    loss = tsl_loss(pooled, target, torch.zeros(3), matrix)
    loss.backward()
    assert loss.item() == 0 and not pooled.grad.any() and not target.grad.any()
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = tsl_loss(empty, torch.zeros(0, 4), None, matrix)
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 4)


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
def test_rows_without_weight_get_no_gradient(matrix):
    pooled, target = random(3, 4, seed=4).requires_grad_(), random(3, 4, seed=5).requires_grad_()
    with torch.no_grad():
        pooled[1] = 0
    tsl_loss(pooled, target, torch.tensor([1.0, 0.0, 1.0]), matrix).backward()
    assert pooled.grad.isfinite().all() and target.grad.isfinite().all()
    assert not pooled.grad[1].any() and not target.grad[1].any()
    assert pooled.grad[0].any() and target.grad[0].any()


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
def test_gradient_into_both_sides(matrix):
    pooled, target = random(3, 4, seed=6).requires_grad_(), random(3, 4, seed=7).requires_grad_()
    weight = torch.tensor([1.0, 0.5, 0.0])
    assert torch.autograd.gradcheck(lambda a, b: tsl_loss(a, b, weight, matrix), (pooled, target))


def test_unknown_matrix():
    with pytest.raises(ValueError, match="'diag'"):
        tsl_loss(torch.ones(1, 2), torch.ones(1, 2), None, "diag")


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0, 1.0], [0.5, 0.3, 0.2, 1.0], [0.5, 0.0, 0.2, 1.0]])
def test_regions_of_one_image_need_not_differ(weight):
    pooled, target, group = random(4, 6, seed=4).requires_grad_(), random(4, 6, seed=5).requires_grad_(), [0, 0, 0, 1]
    total = parts = 0.0
    for i in range(4):
        for j in range(4):
            share = weight[i] if i == j else weight[i] * weight[j] * (group[i] != group[j])
            distance = torch.nn.functional.cosine_similarity(pooled[i], target[j], dim=0) - float(i == j)
            total, parts = total + share, parts + share * distance**2
    found = tsl_loss(pooled, target, torch.tensor(weight, dtype=torch.float64), "identity", torch.tensor(group))
    assert found.item() == pytest.approx((parts / total).item(), abs=1e-12)
    for value in (pooled, target):
        expected = torch.autograd.grad(parts / total, value, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(found, value, retain_graph=True)[0], expected, atol=1e-12, rtol=0)
