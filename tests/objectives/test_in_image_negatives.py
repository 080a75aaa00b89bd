"""Pairs of one image as negatives of each other (Table XIV), against loops over single pairs."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from fast_goal.objectives import Features, make_objective
from fast_goal.training import distributed
from fast_goal.training.distributed import Group, gathered

# Image 0 has four pairs, image 1 none, image 2 two and image 3 three.
ROWS = [0, 0, 0, 0, 2, 2, 3, 3, 3]
BOXES = [
    [0, 0, 10, 10],
    [0, 0, 10, 5],  # half of the first: IoU 0.5
    [0, 0, 10, 10],  # the first again
    [20, 20, 30, 30],
    [0, 0, 8, 8],
    [1, 1, 9, 9],  # IoU 49 / 79 = 0.62 with the one before
    [5, 5, 5, 9],  # without area
    [0, 0, 40, 30],
    [50, 0, 90, 30],  # says the same as the one before
]
SAME_SENTENCES = (7, 8)
WEIGHTS = [0.4, 0.3, 0.2, 0.1, 0.9, 0.1, 0.5, 0.25, 0.25]
ENCODED = ("image_global", "text_global", "image_local", "text_local", "region", "sentence")


def objective(limit, matrix="diagonal"):
    weights = {"global": 1.0, "local": 0.5, "tsl_image": 1.0, "tsl_text": 1.0}
    values = {"name": "fast_goal", "weights": weights, "target_matrix": matrix, "in_image_negatives": limit}
    return make_objective(values | {"alignment": "exact"})


def features(rows=ROWS, boxes=BOXES, weights=WEIGHTS, images=4, dtype=torch.float64) -> Features:
    generator = torch.Generator().manual_seed(3)

    def unit(count: int) -> torch.Tensor:
        return F.normalize(torch.randn(count, 6, generator=generator, dtype=torch.float64), dim=-1).to(dtype)

    made = {name: unit(images if name.endswith("global") else len(rows)) for name in ENCODED}
    if len(rows) == len(ROWS):
        first, second = SAME_SENTENCES
        made["text_local"][second] = made["text_local"][first]
    return Features(
        **{name: value.requires_grad_() for name, value in made.items()},
        region_weight=torch.ones(len(rows), dtype=dtype),
        sentence_weight=torch.ones(len(rows), dtype=dtype),
        local_rows=torch.tensor(rows, dtype=torch.long),
        local_weight=torch.tensor(weights, dtype=dtype),
        local_boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scale=torch.tensor(5.0, dtype=dtype, requires_grad=True),
    )


def iou(a: list[float], b: list[float]) -> float:
    cells = lambda box: {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}  # noqa: E731
    union = cells(a) | cells(b)
    return len(cells(a) & cells(b)) / len(union) if union else 0.0


def are_negatives(i: int, j: int, limit: float | None) -> bool:
    if ROWS[i] != ROWS[j]:
        return True
    return limit is not None and BOXES[i] != BOXES[j] and {i, j} != {*SAME_SENTENCES} and iou(BOXES[i], BOXES[j]) <= limit


def slow_local_term(given: Features, limit: float | None) -> torch.Tensor:
    total = 0.0
    for queries, candidates in ((given.image_local, given.text_local), (given.text_local, given.image_local)):
        for i in range(len(ROWS)):
            logits = [
                given.scale * (queries[i] @ candidates[j]) for j in range(len(ROWS)) if j != i and are_negatives(i, j, limit)
            ]
            own = given.scale * (queries[i] @ candidates[i])
            total = total + WEIGHTS[i] * (torch.logsumexp(torch.stack([own, *logits]), 0) - own)
    return total / sum(WEIGHTS) / 2


@pytest.mark.parametrize("limit", [None, 0.0, 0.49, 0.5, 0.7, 1.0])
def test_against_loops(limit):
    given, other = features(), features()
    found, expected = objective(limit)(given)["local"], slow_local_term(other, limit)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    found.backward()
    expected.backward()
    for name in ("image_local", "text_local", "scale"):
        torch.testing.assert_close(getattr(given, name).grad, getattr(other, name).grad, atol=1e-12, rtol=0)


def test_the_limit_decides():
    losses = [objective(limit)(features())["local"].item() for limit in (None, 0.49, 0.5, 0.7)]
    assert losses == sorted(set(losses))  # each has more negatives than the one before
    assert losses[-1] == objective(1.0)(features())["local"].item()  # one region, or one sentence, is never its own negative


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
def test_the_other_terms_do_not_look_at_it(matrix):
    without, having = (objective(limit, matrix)(features()) for limit in (None, 0.5))
    for term in ("global", "tsl_image", "tsl_text"):
        assert without[term].item() == having[term].item()


def test_one_pair_of_each_image_has_none():
    given = features(rows=[0, 2, 3], boxes=BOXES[:3], weights=[1.0] * 3)
    assert objective(0.0)(given)["local"].item() == objective(None)(given)["local"].item()


def test_every_pair_of_an_image_of_its_own():
    given = dataclasses.replace(features(), local_rows=None)
    assert objective(0.5)(given)["local"].item() == objective(None)(given)["local"].item()


def test_regions_are_needed():
    with pytest.raises(ValueError, match="local_boxes is None"):
        objective(0.5)(dataclasses.replace(features(), local_boxes=None))


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_no_pairs(limit, matrix):
    given = features(rows=[], boxes=[], weights=[])
    terms = objective(limit, matrix)(given)
    assert terms["local"] == terms["tsl_image"] == terms["tsl_text"] == 0
    terms["loss"].backward()
    for name in (*ENCODED, "scale"):
        assert getattr(given, name).grad.isfinite().all(), name


@pytest.mark.parametrize("matrix", ["diagonal", "identity"])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(limit, matrix, dtype):
    """Float32 features, as a training has them, lose nothing; halved ones are raised, and a sentence stays its own."""
    exact = objective(limit, matrix)(features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective(limit, matrix)(features(dtype=dtype))
    for term, value in exact.items():
        assert found[term].dtype == torch.float32
        assert math.isclose(found[term].item(), value.item(), abs_tol=1e-5 if dtype == torch.float32 else 0.05), term


def test_shares_of_two_processes(monkeypatch):
    """Image 0 is on the first process, with fewer pairs than images 2 and 3 of the second."""
    whole, leaves = features(), features()
    objective(0.5)(whole)["loss"].backward()
    pairs, shares = (4, 5), []
    for low, high, first, images in ((0, 4, 0, slice(0, 2)), (4, 9, 2, slice(2, 4))):
        own = {
            field.name: getattr(leaves, field.name)[images if field.name.endswith("global") else slice(low, high)]
            for field in dataclasses.fields(leaves)
            if field.name != "scale" and isinstance(getattr(leaves, field.name), torch.Tensor)
        }
        shares.append(Features(**(own | {"local_rows": own["local_rows"] - first}), scale=leaves.scale))
    sent: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):  # what each process sends, for the other to find
        monkeypatch.setattr(distributed.dist, "all_gather", lambda _, own, rank=rank: sent[rank].append(own))
        gathered(shares[rank], pairs, Group(rank, 2))
    for rank in (0, 1):
        arrived = iter(zip(*sent, strict=True))

        def all_gather(found, own, arrived=arrived):
            for place, value in zip(found, next(arrived), strict=True):
                place.copy_(value)

        monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
        terms = objective(0.5)(gathered(shares[rank], pairs, Group(rank, 2)))
        terms["loss"].backward()
        assert terms["loss"].item() == pytest.approx(objective(0.5)(features())["loss"].item(), abs=1e-9)
    for name in (*ENCODED, "scale"):
        torch.testing.assert_close(getattr(leaves, name).grad, getattr(whole, name).grad, atol=1e-9, rtol=0)
