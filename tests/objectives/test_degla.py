"""DeGLA's losses against the published values and sums of single logarithms."""

import math

import pytest
import torch
import torch.nn.functional as F

from fast_goal.objectives.degla import global_loss, igc_loss, tgc_loss


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def choose_first(logits: list[float]) -> float:
    return math.log(sum(math.exp(logit - logits[0]) for logit in logits))


def slow_own(query: list, positive: list, negatives: list, scale: float, mask: list) -> float:
    total = 0.0
    for i, row in enumerate(query):
        own = [negative for negative, kept in zip(negatives[i], mask[i], strict=True) if kept]
        total += choose_first([scale * dot(row, other) for other in [positive[i], *own]])
    return total / len(query)


def slow_global(image: list, text: list, negatives: list, scale: float, mask: list) -> float:
    every = [n for rows, kept in zip(negatives, mask, strict=True) for n, keep in zip(rows, kept, strict=True) if keep]
    total = 0.0
    for i in range(len(image)):
        others = text[:i] + text[i + 1 :] + every
        total += choose_first([scale * dot(image[i], other) for other in [text[i], *others]])
        others = image[:i] + image[i + 1 :]
        total += choose_first([scale * dot(text[i], other) for other in [image[i], *others]])
    return total / len(image) / 2


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    return unit(4, 5, seed=1), unit(4, 5, seed=2), unit(4, 3, 5, seed=3), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("loss", "slow"), [(global_loss, slow_global), (igc_loss, slow_own), (tgc_loss, slow_own)])
def test_against_loops(sample, loss, slow, masked):
    one, other, negatives, mask = sample
    found = loss(one, other, negatives, 9.0, mask if masked else None)
    kept = mask.tolist() if masked else [[True] * 3] * 4
    assert found.item() == pytest.approx(slow(one.tolist(), other.tolist(), negatives.tolist(), 9.0, kept), abs=1e-10)


@pytest.mark.parametrize("count", [0, 1, 6, 12])
def test_global_with_negatives_of_nobody_in_particular(sample, count):
    image, text, negatives, _ = sample
    every = negatives.flatten(0, 1)[:count]
    mask = [[True] * count]
    expected = slow_global(image.tolist(), text.tolist(), [every.tolist()], 9.0, mask)
    assert global_loss(image, text, every, 9.0).item() == pytest.approx(expected, abs=1e-10)


def test_published_values(vectors):
    vector = vectors["V8_degla"]
    inputs, outputs = vector["inputs"], vector["outputs"]
    image = torch.tensor(inputs["image(B,D)"], dtype=torch.float64)
    rows = "text rows: B positives then B*K negatives, negative k of image i at row B+i*K+k"
    texts = torch.tensor(inputs[rows], dtype=torch.float64)
    teacher = torch.tensor(inputs["teacher_text"], dtype=torch.float64)
    batch, count, scale = len(image), inputs["K"], inputs["logit_scale_exp"]
    text, negatives = texts[:batch], texts[batch:].reshape(batch, count, -1)
    assert global_loss(image, text, negatives, scale).item() == pytest.approx(outputs["global"], abs=1e-6)
    igc = igc_loss(image, text, negatives, scale).item()
    assert igc == pytest.approx(outputs["IGC_closed_form(own 4 negatives)"], abs=1e-6)
    tgc = tgc_loss(text, teacher[:batch], negatives).item()
    assert tgc == pytest.approx(outputs["TGC_intended(own 4 negatives)"], abs=1e-8)
    assert tgc != pytest.approx(outputs["TGC_as_coded"], abs=1e-4)  # with the other images' negatives


@pytest.mark.parametrize("loss", [global_loss, igc_loss, tgc_loss])
def test_masked_negatives_do_not_matter(sample, loss):
    one, other, negatives, mask = sample
    moved = torch.where(mask[..., None], negatives, 5.0)
    assert loss(one, other, negatives, 9.0, mask).item() == pytest.approx(loss(one, other, moved, 9.0, mask).item())


@pytest.mark.parametrize("loss", [igc_loss, tgc_loss])
def test_without_negatives_nothing_is_to_choose(sample, loss):
    one, other, negatives, mask = sample
    assert loss(one, other, negatives[:, :0], 9.0).item() == 0
    assert loss(one, other, negatives, 9.0, torch.zeros_like(mask)).item() == 0


def test_global_without_negatives_is_clips(sample):
    from fast_goal.objectives.contrastive import clip_loss

    image, text, negatives, _ = sample
    assert global_loss(image, text, negatives[:, :0], 9.0).item() == pytest.approx(clip_loss(image, text, 9.0).item())


@pytest.mark.parametrize("loss", [global_loss, igc_loss, tgc_loss])
def test_gradient(sample, loss):
    one, other, negatives, mask = sample
    arguments = [value.clone().requires_grad_() for value in (one, other, negatives)]
    assert torch.autograd.gradcheck(lambda *values: loss(*values, 2.0, mask), arguments)
    loss(*arguments, 2.0, mask).backward()
    assert not arguments[2].grad[~mask].any()
