"""A training step only queues work on its device: nothing in it waits for a value, nor copies one there from the host."""

import itertools

import pytest
import torch
from flair_settings import flair_config
from test_step import fast_goal
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fast_goal.objectives import make_objective
from fast_goal.training.average import Average
from fast_goal.training.batches import PairDataset
from fast_goal.training.schedule import make_optimizer
from fast_goal.training.step import TrainStep, fit_pooling

# Operators whose result, or its shape, is read by the host.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "argwhere", "bincount", "histc", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Reading without an operator on the CPU, and values that would be copied from the host.
READING = {
    *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"),
    *("tensor", "as_tensor", "from_numpy"),
}


class Operators(TorchDispatchMode):
    """Notes the operators that wait, those of the backward pass too."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        masks = [one for one in args[1] if one is not None and one.dtype == torch.bool] if name in INDEXING else []
        if name in WAITING or masks:
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes the calls that read, or bring in, a value."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (name := getattr(function, "__name__", "")) in READING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def syncs(run) -> list[str]:
    found: list[str] = []
    with Operators(found), Calls(found):
        run()
    return found


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: float(x.sum()),
        lambda x: range(x[0].long()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.detach().numpy(),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.ones(())),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.long)),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x * torch.as_tensor(2.0),
    ],
)
def test_what_waits_is_noticed(waits):
    values = torch.tensor([0.5, -1.0, 2.0, 0.0])
    assert syncs(lambda: waits(values))
    assert not syncs(lambda: torch.ones(4)[torch.arange(3)].where(torch.ones(3) > 2, 0.0).sum())


def test_what_waits_in_the_backward_pass_is_noticed():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    assert "_local_scalar_dense" in syncs(lambda: Reads.apply(torch.ones(2, requires_grad=True)).sum().backward())


FAST_GOAL = {
    "name": "fast_goal",
    "weights": {"global": 1.0, "local": 0.5, "tsl_image": 1.0, "tsl_text": 1.0},
    "target_matrix": "identity",
    "in_image_negatives": 0.5,
    "alignment": "goal",
}
OBJECTIVES = {
    "fast_goal": fast_goal(),
    "global": fast_goal(local=0.0, tsl_image=0.0, tsl_text=0.0),
    "identity": make_objective(FAST_GOAL),
}


OBJECTIVES["degla"] = make_objective(
    {
        "name": "degla",
        "weights": {"global": 1.0, "igc": 0.1, "tgc": 0.1, "distillation": 0.005},
        "distillation": "sum",
        "tgc_scale": 10.0,
        "teacher_decay": 0.9996,
    }
)

OBJECTIVES["flair"] = make_objective(flair_config())
OBJECTIVES["flair_fast_goal"] = make_objective(
    {
        "name": "weighted",
        "parts": {
            "flair": {"weight": 1.0, "objective": flair_config()},
            "fast_goal": {"weight": 1.0, "objective": FAST_GOAL},
        },
    }
)


def trained(make_scenes, make_negatives, clip, objective, parts, device, pairs_of=None, **settings):
    """A step, with that of the teacher, as a function, after one that made the optimiser's state."""
    dataset, pairs = make_scenes()
    pairs = pairs.drop([4, 7]) if pairs_of is None else pairs[pairs.image_id.isin(pairs_of)]
    needs = {"local": objective.needs_local, "alignment": objective.alignment}
    negatives = make_negatives(dataset) if objective.needs_negatives else None
    samples = PairDataset(dataset, "train", pairs, clip, **needs, negatives=negatives, sub_captions=objective.sub_captions)
    fit_pooling(clip, objective)
    batches = [samples[[7, 1, 4, 2, 5]], samples[[0, 3, 4, 9, 7]]]
    optimizer, decay = make_optimizer(clip.to(device).parameters(), 1e-3, 0.1), objective.teacher_decay
    teacher = None if decay is None else Average(clip, decay, from_start=True)
    step = TrainStep(clip, objective, optimizer, **settings, teacher=teacher and teacher.model)
    batches = [[part.to(device) for part in batch.split(parts)] for batch in batches]

    def run(number=1):
        step(batches[number])
        if teacher is not None:
            teacher.update(number + 1)

    run(0)
    return run


@pytest.mark.parametrize(
    ("objective", "parts", "settings"),
    [
        *itertools.product(OBJECTIVES, [1, 3], [{}]),
        ("fast_goal", 1, {"gradient_clip": 1.0, "max_logit_scale": 100.0}),
        ("fast_goal", 3, {"gradient_clip": 1.0, "max_logit_scale": 100.0, "dtype": torch.bfloat16}),
        ("identity", 1, {"dtype": torch.bfloat16}),
        ("degla", 3, {"dtype": torch.bfloat16}),
        ("flair", 3, {"dtype": torch.bfloat16, "gradient_clip": 1.0}),
        ("fast_goal", 2, {"pairs_of": []}),
    ],
)
def test_a_step_does_not_wait(make_scenes, make_negatives, tiny_clip, objective, parts, settings):
    run = trained(make_scenes, make_negatives, tiny_clip(), OBJECTIVES[objective], parts, torch.device("cpu"), **settings)
    assert syncs(run) == []


def test_a_step_with_checkpointed_activations_does_not_wait(make_scenes, make_negatives, tiny_clip):
    clip = tiny_clip()
    clip.checkpointed()
    assert syncs(trained(make_scenes, make_negatives, clip, OBJECTIVES["fast_goal"], 1, torch.device("cpu"))) == []


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_on_the_gpu_does_not_wait(make_scenes, make_negatives, tiny_clip, objective, parts):
    settings = {"gradient_clip": 1.0, "max_logit_scale": 100.0}
    run = trained(make_scenes, make_negatives, tiny_clip(), OBJECTIVES[objective], parts, torch.device("cuda"), **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
