"""The objective `degla` on ragged negatives: against the published values, loops over single captions, and its config."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fast_goal.errors import ConfigError
from fast_goal.objectives import Features, make_objective, objective_config
from fast_goal.objectives.contrastive import clip_loss
from fast_goal.objectives.degla import Degla, distillation_loss, padded_negatives

WEIGHTS = {"global": 1.0, "igc": 0.1, "tgc": 0.1, "distillation": 0.005}
VALUES = {"name": "degla", "weights": WEIGHTS, "distillation": "sum", "tgc_scale": 10.0, "teacher_decay": 0.9996}
COUNTS = ([3, 0, 1, 2], [2, 2, 2, 2], [0, 0, 0, 1], [0, 0, 0, 0])  # negatives of each caption
INPUTS = ("image_global", "text_global", "text_negatives", "scale")


def features(counts: list[int], count: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(rows, 5, generator=generator, dtype=torch.float64), dim=-1).to(dtype)

    batch, total = len(counts), sum(counts)
    return Features(
        image_global=unit(batch).requires_grad_(),
        text_global=unit(batch).requires_grad_(),
        text_negatives=unit(total).requires_grad_(),
        negative_rows=torch.tensor([row for row, own in enumerate(counts) for _ in range(own)], dtype=torch.long),
        negative_slots=torch.tensor([slot for own in counts for slot in range(own)], dtype=torch.long),
        negative_count=max(counts) if count is None else count,
        teacher_image=unit(batch),
        teacher_text=unit(batch),
        teacher_negatives=unit(total),
        scale=torch.tensor(9.0, dtype=dtype, requires_grad=True),
    )


def with_weights(**weights: float) -> Degla:
    return make_objective(VALUES | {"weights": dict.fromkeys(WEIGHTS, 0.0) | weights})


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def missed(right: float, wrong: list[float]) -> float:
    """-log of the share of the right one."""
    return -math.log(math.exp(right) / (math.exp(right) + sum(math.exp(logit) for logit in wrong)))


def apart(a: list[list[float]], b: list[list[float]]) -> float:
    return sum((x - y) ** 2 for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def slow(given: Features, reduction: str, tgc_scale: float) -> dict[str, float]:
    """Every term, caption by caption, from the definitions of the paper."""
    lists = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    lists = {name: value.tolist() for name, value in lists.items() if isinstance(value, torch.Tensor)}
    image, text, scale = lists["image_global"], lists["text_global"], lists["scale"]
    own = [[] for _ in image]
    for row, negative in zip(lists["negative_rows"], lists["text_negatives"], strict=True):
        own[row].append(negative)
    having = [row for row, negatives in enumerate(own) if negatives]
    found = dict.fromkeys(WEIGHTS, 0.0)
    for i in range(len(image)):
        others = [*(text[j] for j in range(len(text)) if j != i), *lists["text_negatives"]]
        to_text = missed(scale * dot(image[i], text[i]), [scale * dot(image[i], other) for other in others])
        others = [image[j] for j in range(len(image)) if j != i]
        to_image = missed(scale * dot(text[i], image[i]), [scale * dot(text[i], other) for other in others])
        found["global"] += (to_text + to_image) / 2 / len(image)
    for i in having:
        wrong = [scale * dot(image[i], negative) for negative in own[i]]
        found["igc"] += missed(scale * dot(image[i], text[i]), wrong) / len(having)
        wrong = [tgc_scale * dot(text[i], negative) for negative in own[i]]
        found["tgc"] += missed(tgc_scale * dot(text[i], lists["teacher_text"][i]), wrong) / len(having)
    found["distillation"] = (
        apart(image, lists["teacher_image"])
        + apart(text, lists["teacher_text"])
        + apart(lists["text_negatives"], lists["teacher_negatives"])
    )
    if reduction == "mean":
        found["distillation"] /= len(image)
    return found


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_against_loops(counts, reduction):
    weights = {"global": 0.3, "igc": 2.0, "tgc": 0.7, "distillation": 5.0}
    given = features(counts)
    found = make_objective(VALUES | {"weights": weights, "distillation": reduction, "tgc_scale": 4.0})(given)
    expected = slow(given, reduction, 4.0)
    assert list(found) == [*expected, "loss"] and all(value.shape == () for value in found.values())
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value, abs=1e-10), term
    assert found["loss"].item() == pytest.approx(sum(weights[term] * value for term, value in expected.items()))


def test_against_loops_on_random_batches():
    drawn = random.Random(0)
    for seed in range(20):
        counts = [drawn.randrange(5) for _ in range(drawn.randrange(1, 7))]
        given = features(counts, count=max(counts) + drawn.randrange(2), seed=seed)  # more in the data set than in the batch
        found, expected = make_objective(VALUES)(given), slow(given, "sum", 10.0)
        for term, value in expected.items():
            assert found[term].item() == pytest.approx(value, abs=1e-10), (counts, term)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_gradient(counts):
    given = features(counts)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return with_weights(**{"global": 0.4, "igc": 1.0, "tgc": 1.0, "distillation": 0.3})(
            dataclasses.replace(given, **dict(zip(INPUTS, values, strict=True)))
        )["loss"]

    values = [getattr(given, name) for name in INPUTS]
    assert torch.autograd.gradcheck(loss, values)
    loss(*values).backward()
    assert all(value.grad.isfinite().all() for value in values)


def published(vectors: dict) -> tuple[Features, dict]:
    """The case of V8 as features."""
    inputs = vectors["V8_degla"]["inputs"]
    rows = "text rows: B positives then B*K negatives, negative k of image i at row B+i*K+k"
    given = {"image": "image(B,D)", "teacher_image": "teacher_image", "text": rows, "teacher_text": "teacher_text"}
    tensors = {name: torch.tensor(inputs[key], dtype=torch.float64) for name, key in given.items()}
    batch, count = len(tensors["image"]), inputs["K"]
    return Features(
        image_global=tensors["image"].requires_grad_(),
        text_global=tensors["text"][:batch].requires_grad_(),
        text_negatives=tensors["text"][batch:].requires_grad_(),
        negative_rows=torch.arange(batch).repeat_interleave(count),
        negative_slots=torch.arange(count).repeat(batch),
        negative_count=count,
        teacher_image=tensors["teacher_image"],
        teacher_text=tensors["teacher_text"][:batch],
        teacher_negatives=tensors["teacher_text"][batch:],
        scale=torch.tensor(inputs["logit_scale_exp"], dtype=torch.float64, requires_grad=True),
    ), vectors["V8_degla"]["outputs"]


def test_the_published_terms(vectors):
    given, outputs = published(vectors)
    found = make_objective(VALUES)(given)
    intended = outputs["TGC_intended(own 4 negatives)"]
    assert found["global"].item() == pytest.approx(outputs["global"], abs=1e-6)
    assert found["igc"].item() == pytest.approx(outputs["IGC_as_coded"], abs=1e-6)
    assert found["tgc"].item() == pytest.approx(intended, abs=1e-8)
    assert found["distillation"].item() == pytest.approx(outputs["distill_sum_mse"], abs=1e-8)
    # the published total has the TGC of the published mask
    total = outputs["total"] + 0.1 * (intended - outputs["TGC_as_coded"])
    assert found["loss"].item() == pytest.approx(total, abs=1e-5)
    mean = make_objective(VALUES | {"distillation": "mean"})(given)
    assert mean["distillation"].item() == pytest.approx(outputs["distill_sum_mse"] / 3, abs=1e-8)


def test_the_published_mask_is_another_loss(vectors):
    """TGC with the negatives that the published code takes gives its number, and that is not ours."""
    given, outputs = published(vectors)
    batch, count = len(given.image_global), given.negative_count
    taken = torch.arange(batch)[:, None] + batch * torch.arange(count)  # [B, K] of the flat negatives
    named = [[f"image {place // count} neg {place % count}" for place in row] for row in taken.tolist()]
    assert named == list(vectors["V8_degla"]["negatives_used_by_TGC_as_coded"].values())
    coded = dataclasses.replace(
        given, text_negatives=given.text_negatives[taken.flatten()], teacher_negatives=given.teacher_negatives[taken.flatten()]
    )
    chosen = with_weights(tgc=1.0)
    assert chosen(coded)["tgc"].item() == pytest.approx(outputs["TGC_as_coded"], abs=1e-8)
    assert abs(chosen(given)["tgc"].item() - outputs["TGC_as_coded"]) > 5e-4


def test_the_published_gradients(vectors):
    """Against the slope of the slow loops, for every number of every input."""
    given, _ = published(vectors)
    given = dataclasses.replace(given, scale=torch.tensor(10.0, dtype=torch.float64, requires_grad=True))
    make_objective(VALUES)(given)["loss"].backward()
    step = 1e-6
    for name in INPUTS:
        value = getattr(given, name)
        for place in range(value.numel()):
            sides = []
            for sign in (1, -1):
                moved = value.detach().clone()
                moved.view(-1)[place] += sign * step
                terms = slow(dataclasses.replace(given, **{name: moved}), "sum", 10.0)
                sides.append(sum(WEIGHTS[term] * terms[term] for term in WEIGHTS))
            slope = (sides[0] - sides[1]) / 2 / step
            assert value.grad.view(-1)[place].item() == pytest.approx(slope, abs=1e-6), (name, place)


def test_the_teacher_gets_no_gradient_and_is_not_looked_at_without_a_term():
    given = features([2, 0, 1])
    alone = dataclasses.replace(given, teacher_image=None, teacher_text=None, teacher_negatives=None)
    chosen = with_weights(**{"global": 1.0, "igc": 1.0})
    assert chosen.teacher_decay is None
    assert chosen(alone)["loss"].item() == pytest.approx(chosen(given)["loss"].item())
    for term in ("tgc", "distillation"):
        assert with_weights(**{"global": 1.0, term: 0.1}).teacher_decay == 0.9996
    assert (chosen.needs_local, chosen.needs_pooled, chosen.needs_negatives) == (False, False, True)


@pytest.mark.parametrize("term", list(WEIGHTS))
def test_terms_of_weight_zero_are_left_out(term):
    found = with_weights(**{term: 2.0})(features([1, 2]))
    assert list(found) == [term, "loss"] and found["loss"].item() == pytest.approx(2 * found[term].item())


@pytest.mark.parametrize("count", [0, 3])
def test_a_batch_without_negatives(count):
    """As the data set may have some, and this batch none: the global term is CLIP's, the others of negatives are 0."""
    given = features([0, 0, 0], count)
    found = make_objective(VALUES)(given)
    assert found["global"].item() == pytest.approx(clip_loss(given.image_global, given.text_global, given.scale).item())
    assert found["igc"] == found["tgc"] == 0
    with_weights(igc=1.0, tgc=1.0)(given)["loss"].backward()
    for name in ("image_global", "text_global", "scale"):
        gradient = getattr(given, name).grad
        assert gradient.isfinite().all() and not gradient.any(), name


def test_negatives_of_a_caption_lie_in_its_row():
    given = features([2, 0, 1], count=4)
    padded, mask = padded_negatives(given)
    assert mask.tolist() == [[True, True, False, False], [False] * 4, [True, False, False, False]]
    assert torch.equal(padded[mask], given.text_negatives) and not padded[~mask].any()


def test_the_order_of_the_negatives_does_not_matter():
    """Of another caption's they are mixed up with, it does."""
    given = features([2, 1, 3])
    order = torch.tensor([1, 0, 2, 5, 3, 4])
    moved = dataclasses.replace(
        given, text_negatives=given.text_negatives[order], teacher_negatives=given.teacher_negatives[order]
    )
    chosen = make_objective(VALUES)
    assert chosen(moved)["loss"].item() == pytest.approx(chosen(given)["loss"].item())
    mixed = torch.tensor([0, 2, 1, 3, 4, 5])
    moved = dataclasses.replace(
        given, text_negatives=given.text_negatives[mixed], teacher_negatives=given.teacher_negatives[mixed]
    )
    assert abs(chosen(moved)["igc"].item() - chosen(given)["igc"].item()) > 1e-3


def test_the_sum_grows_with_the_batch_and_the_mean_does_not():
    one = features([1, 2])
    names = ("image_global", "text_global", "teacher_image", "teacher_text")
    twice = {name: torch.cat([getattr(one, name)] * 2) for name in names}
    negatives = [torch.cat([value] * 2) for value in (one.text_negatives, one.teacher_negatives)]
    for reduction, factor in (("sum", 2.0), ("mean", 1.0)):
        values = [
            distillation_loss(image, text, own, teacher_image, teacher_text, of_teacher, reduction).item()
            for image, text, teacher_image, teacher_text, own, of_teacher in (
                (*(getattr(one, name) for name in names), one.text_negatives, one.teacher_negatives),
                (*(twice[name] for name in names), *negatives),
            )
        ]
        assert values[1] == pytest.approx(factor * values[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    """Losses are float32 at least, also where the features, or the matrix products around, are not."""
    exact = make_objective(VALUES)(features([2, 0, 1]))["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_objective(VALUES)(features([2, 0, 1], dtype=dtype))["loss"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, abs=1e-4 if dtype == torch.float32 else 0.1)


def test_nothing_waits_for_the_device():
    seen = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    given = features([2, 0, 1])
    with Operations():
        make_objective(VALUES)(given)["loss"].backward()
    assert "index_copy" in seen and not {"_local_scalar_dense", "nonzero", "masked_select"} & set(seen)


def test_config():
    make, config = objective_config(VALUES)
    assert make is Degla and config.teacher_decay == 0.9996
    assert make(config).alignment == "exact"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": WEIGHTS | {"local": 1.0}}, "objective.weights.local = 1.0: unknown term. Known here: global, igc"),
        ({"weights": WEIGHTS | {"igc": -0.1}}, "objective.weights.igc = -0.1: expected a number, at least 0"),
        ({"weights": WEIGHTS | {"tgc": math.inf}}, "objective.weights.tgc = inf"),
        ({"weights": {"global": 1.0}}, "objective.weights.igc is missing"),
        ({"weights": dict.fromkeys(WEIGHTS, 0.0)}, "at least one has to be above 0"),
        ({"distillation": "batch"}, "objective.distillation = 'batch': expected one of 'sum', 'mean'"),
        ({"tgc_scale": 0.0}, "objective.tgc_scale = 0.0: expected more than 0"),
        ({"teacher_decay": 1.5}, "objective.teacher_decay = 1.5: expected at most 1"),
        ({"teacher_decay": math.nan}, "objective.teacher_decay = nan"),
        ({"alignment": "exact"}, "unknown key objective.alignment"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(ConfigError, match=message):
        objective_config(VALUES | change)
