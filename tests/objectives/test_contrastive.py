"""CLIP's loss against sums of single logarithms."""

import math

import pytest
import torch
import torch.nn.functional as F

from fast_goal.objectives.contrastive import clip_loss


def slow_clip_loss(image: list, text: list, scale: float) -> float:
    def cross_entropy(queries: list, candidates: list) -> float:
        total = 0.0
        for index, query in enumerate(queries):
            logits = [scale * sum(a * b for a, b in zip(query, other, strict=True)) for other in candidates]
            total += math.log(sum(math.exp(logit - logits[index]) for logit in logits))
        return total / len(queries)

    return (cross_entropy(image, text) + cross_entropy(text, image)) / 2


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_against_loops(batch):
    image, text = unit(batch, 5, seed=1), unit(batch, 5, seed=2)
    assert clip_loss(image, text, 14.0).item() == pytest.approx(slow_clip_loss(image.tolist(), text.tolist(), 14.0), abs=1e-10)


def test_published_values(vectors):
    inputs, outputs = (vectors["V4_goal_losses"][key] for key in ("inputs", "outputs"))
    image = torch.tensor(inputs["image_embeds(global rows 0-2, local rows 3-5)"], dtype=torch.float64)
    text = torch.tensor(inputs["text_embeds"], dtype=torch.float64)
    scale = math.exp(inputs["logit_scale"])
    assert clip_loss(image[:3], text[:3], scale).item() == pytest.approx(outputs["loss_global"], abs=1e-5)
    assert clip_loss(image[3:], text[3:], scale).item() == pytest.approx(outputs["loss_local"], abs=1e-5)


def test_symmetric_and_equal_candidates():
    image, text = unit(4, 3, seed=3), unit(4, 3, seed=4)
    assert clip_loss(image, text, 5.0).item() == pytest.approx(clip_loss(text, image, 5.0).item())
    same = unit(1, 3, seed=5).expand(4, 3)
    assert clip_loss(same, same, 100.0).item() == pytest.approx(math.log(4))


def test_no_pairs():
    image = torch.zeros(0, 3, requires_grad=True)
    scale = torch.tensor(10.0, requires_grad=True)
    loss = clip_loss(image, torch.zeros(0, 3), scale)
    loss.backward()
    assert loss.item() == 0 and scale.grad.item() == 0 and image.grad.shape == (0, 3)


def test_gradient():
    arguments = [unit(3, 4, seed=6).requires_grad_(), unit(3, 4, seed=7).requires_grad_()]
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clip_loss, (*arguments, scale))


def weighted_loops(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, weight: list, excluded: set[tuple[int, int]]
) -> torch.Tensor:
    total = 0.0
    for first, second in ((image, text), (text, image)):
        for row in range(len(image)):
            others = [column for column in range(len(image)) if (min(row, column), max(row, column)) not in excluded]
            parts = [torch.exp(scale * torch.dot(first[row], second[column])) for column in others]
            total = total + weight[row] * (torch.log(sum(parts)) - scale * torch.dot(first[row], second[row]))
    return total / sum(weight) / 2


@pytest.mark.parametrize(
    ("weight", "excluded"),
    [
        (None, {(0, 1), (3, 4)}),
        ([0.5, 0.5, 1.0, 0.25, 0.75], {(0, 1), (3, 4)}),
        ([0.5, 0.5, 1.0, 0.25, 0.75], {(0, 1), (1, 2)}),  # 0 and 2 are negatives all the same
        ([1.0, 0.0, 2.0, 0.5, 0.5], None),
        ([0.2, 0.3, 0.5, 0.5, 0.5], {(a, b) for b in range(5) for a in range(b)}),  # nothing to tell apart
    ],
)
def test_weights_and_excluded_against_loops(weight, excluded):
    found, expected = (
        [unit(5, 4, seed=8).requires_grad_(), unit(5, 4, seed=9).requires_grad_(), torch.tensor(3.0).double().requires_grad_()]
        for _ in range(2)
    )
    mask = None
    if excluded is not None:
        mask = torch.eye(5, dtype=torch.bool)  # the diagonal has no say
        for a, b in excluded:
            mask[a, b] = mask[b, a] = True
        given = mask.clone()
    loss = clip_loss(*found, None if weight is None else torch.tensor(weight, dtype=torch.float64), mask)
    slow = weighted_loops(*expected, weight or [1.0] * 5, excluded or set())
    assert loss.item() == pytest.approx(slow.item(), abs=1e-10)
    assert mask is None or torch.equal(mask, given)
    for value, other in zip(found, expected, strict=True):
        wanted = torch.autograd.grad(slow, other, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(loss, value, retain_graph=True)[0], wanted, atol=1e-10, rtol=0)
