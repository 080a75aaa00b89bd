"""How much GPU memory a training step needs, and which setting makes it fit; shown by `fast-goal finetune advise`.

Nothing is computed and no GPU is needed: the towers of the real step run on fake tensors, which have a size and no data,
and every storage that comes and goes, forward and backward, is added up. What holds for a GPU and not for the CPU on
which the fake tensors pretend to be:

* Attention. Fused kernels keep queries, keys, values, output and one number per row, on both; nothing of size L x L.
* Layer norms. CUDA's autocast runs them in float32 and keeps a float32 copy of a half-precision input; so does `Float32Norm`.
* The gradients are counted as there from the start, as they are with accumulation. Without it they grow while the
  activations go, so that the estimate is too large by at most their size.
* A kernel's own workspace, the CUDA context and what the allocator cannot use are the allowances below, which are guesses.

With `compile` a step needs less than estimated here; what `decode` on the GPU needs is not counted.

Letters: B samples of a batch, n samples of a part of it, D embedding width.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast_goal.config import FinetuneConfig
from fast_goal.model.clip import Clip
from fast_goal.objectives import Features, Objective, Shares, given
from fast_goal.training.batches import Batch
from fast_goal.training.distributed import GLOBAL, NEGATIVE
from fast_goal.training.schedule import parameter_groups
from fast_goal.training.step import DRAWN, ENCODED, POOLED, TEACHER, batch_features, fit_pooling

CONTEXT = 600_000_000  # bytes of the CUDA context and of the libraries' workspaces; a guess
FRAGMENTED = 0.05  # of what a step allocates, lost between blocks; a guess
BF16_TIME = 0.5  # of a step in float32; a guess, and an upper bound where tensor cores do most of the work
TRACED = (64, 128)  # samples; from here on the activations, not the gradients of the embeddings, decide the peak
COMPARED = (512, 1024)  # samples, of the objective
SMALLEST_PART = 8  # samples; a guess of what still keeps a GPU busy


class Inputs(NamedTuple):
    """What a sample is made of: the tokens of the longest caption, of the longest sentence, of the longest hard negative and of
    the longest sub-caption, start and end included, and the local pairs of an image, hard negatives of a caption, and
    sub-captions of one."""

    caption_tokens: int
    sentence_tokens: int
    pairs: int
    negative_tokens: int = 0
    negatives: int = 0
    sub_tokens: int = 0
    sub_captions: int = 0


@dataclasses.dataclass(frozen=True, order=True)
class Plan:
    """The settings that decide the memory of a step and change no result (bf16: hardly)."""

    bf16: bool
    checkpointing: bool
    accumulate: int

    @property
    def time(self) -> float:
        """Of a step, in forward passes. A backward pass costs two; checkpointing and accumulation one more each. A teacher's
        pass, which is there with all plans, is left out."""
        passes = 3 + self.checkpointing + (self.accumulate > 1)
        return passes * (BF16_TIME if self.bf16 else 1)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that a step needs at its peak: `weights`, `gradients`, `optimizer` (AdamW's two averages), `average` (EMA) and
    `teacher` do not depend on the batch; `activations` do, with what else the towers and the objective hold, `inputs` too.
    What passes while the teacher computes is gone before the activations come, and less."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    teacher: int
    inputs: int
    activations: int

    @property
    def fixed(self) -> int:
        """What is there whatever the batch."""
        return self.weights + self.gradients + self.optimizer + self.average + self.teacher

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return self.fixed + self.inputs + self.activations

    @property
    def total(self) -> int:
        """With the allowances: what the GPU has to have."""
        return CONTEXT + round(self.allocated * (1 + FRAGMENTED))


class _Line(NamedTuple):
    """at * count + start."""

    start: float
    slope: float

    @classmethod
    def through(cls, counts: tuple[int, int], values: tuple[float, float]) -> _Line:
        slope = (values[1] - values[0]) / (counts[1] - counts[0])
        return cls(values[0] - slope * counts[0], slope)

    def at(self, count: int) -> float:
        return self.start + self.slope * count


class StepMemory:
    """The memory of the training steps of one model, objective and training; `clip` has fake weights (`fake`).

    `world`: the processes that share a batch, each on a GPU of its own; all numbers are of one of them, and a batch size is
    that of all together.
    """

    def __init__(self, clip: Clip, objective: Objective, config: FinetuneConfig, inputs: Inputs, world: int = 1):
        self.clip, self.objective, self.config, self.world = clip, objective, config, world
        with _mode(clip):
            fit_pooling(clip, objective)
        inputs = inputs if objective.needs_local else inputs._replace(pairs=0)
        inputs = inputs if objective.needs_negatives else inputs._replace(negatives=0)
        drawn = objective.sub_captions
        self.inputs = inputs._replace(sub_captions=0 if drawn is None else drawn.count)
        self._traced: dict[tuple[bool, bool], _Line] = {}

    def need(self, plan: Plan, batch_size: int) -> Need:
        """What a step of `batch_size` samples needs."""
        towers = self._towers(plan)
        own = -(-batch_size // self.world)
        part = -(-own // plan.accumulate)
        compared, leaves = self._compared(batch_size)
        # with accumulation first the loss of the whole batch, then part by part, beside the gradients of all features
        whole = plan.accumulate == 1
        activations = towers.at(part) + compared if whole else max(compared, towers.at(part)) + leaves
        weights = sum(map(_size, (*self.clip.parameters(), *self.clip.buffers())))
        trained = sum(_size(parameter) for parameter in self._trained)
        return Need(
            weights=weights,
            gradients=trained,
            optimizer=2 * trained,
            average=0 if self.config.ema is None else weights,
            teacher=0 if self.objective.teacher_decay is None else weights,
            inputs=round(own * self._input_bytes),
            activations=round(activations),
        )

    def per_sample(self, plan: Plan) -> int:
        """Bytes that one more sample in a part costs the towers; the objective, quadratic in the batch, is not in it."""
        return round(self._towers(plan).slope)

    def largest(self, plan: Plan, memory: int) -> int:
        """The largest batch size that `memory` bytes on each GPU suffice for: a multiple of the processes and parts."""
        step = self.world * plan.accumulate
        low, high = 0, 1
        while self.need(plan, high * step).total <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.need(plan, middle * step).total <= memory else (low, middle)
        return low * step

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        groups = parameter_groups(self.clip, freeze=self.config.freeze)
        return [parameter for group in groups for parameter in group["params"]]

    @cached_property
    def _input_bytes(self) -> float:
        return sum(map(_size, _tensors(self._batch(TRACED[0])))) / TRACED[0]

    def _towers(self, plan: Plan) -> _Line:
        """The peak of one part of n samples, forward and backward, over what is there before."""
        key = plan.bf16, plan.checkpointing
        if key not in self._traced:
            looked_at = self.objective.needs_pooled, self.objective.needs_negatives, self.objective.needs_captions
            found = tuple(encoding_peak(self.clip, self._batch(count), *key, self._trained, *looked_at) for count in TRACED)
            self._traced[key] = _Line.through(TRACED, found)
        return self._traced[key]

    def _compared(self, batch_size: int) -> tuple[float, float]:
        """The peak of the objective over a batch, and the features with their gradients, which stay."""
        (peak, leaves), (twice, _) = self._objective_peaks
        first, second = COMPARED
        square = (twice / second - peak / first) / (second - first)  # peak = (linear + square * B) * B
        linear = peak / first - square * first
        return (linear + square * batch_size) * batch_size, leaves / first * batch_size

    @cached_property
    def _objective_peaks(self) -> list[tuple[int, int]]:
        counts = self.inputs.pairs, self.inputs.negatives, self.inputs.sub_captions, self.world
        return [objective_peak(self.clip, self.objective, count, *counts) for count in COMPARED]

    def _batch(self, count: int) -> Batch:
        return fake_batch(self.clip, self.inputs, count)


def fake_batch(clip: Clip, inputs: Inputs, count: int) -> Batch:
    """A batch of `count` samples without content, on the fake tensors of `clip`."""
    pairs, negatives = count * inputs.pairs, count * inputs.negatives
    size = clip.image_size
    with _mode(clip):
        drawn = {}
        if inputs.sub_captions:
            drawn["sub_tokens"] = torch.zeros(count * inputs.sub_captions, inputs.sub_tokens, dtype=torch.int64)
            drawn["sub_choices"] = torch.zeros(count, count, dtype=torch.int64)
        return Batch(
            images=torch.zeros(count + pairs, 3, size, size, dtype=torch.uint8),
            caption_tokens=torch.zeros(count, inputs.caption_tokens, dtype=torch.int64),
            sentence_tokens=torch.zeros(pairs, inputs.sentence_tokens, dtype=torch.int64),
            local_rows=torch.zeros(pairs, dtype=torch.int64),
            boxes=torch.zeros(pairs, 4),
            spans=torch.zeros(pairs, 2, dtype=torch.int64),
            regions=torch.zeros(pairs, 4),
            local_weights=torch.zeros(pairs),
            rank_pairs=(pairs,),
            negative_tokens=torch.zeros(negatives, inputs.negative_tokens, dtype=torch.int64),
            negative_rows=torch.zeros(negatives, dtype=torch.int64),
            negative_slots=torch.zeros(negatives, dtype=torch.int64),
            negative_count=inputs.negatives,
            rank_negatives=(negatives,),
            **drawn,
        )


def fake(make: Any, *arguments: Any) -> Clip:
    """The Clip that `make(*arguments)` builds, on fake tensors, ready for training."""
    with FakeTensorMode():
        clip = make(*arguments)
    for module in clip.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = Float32Norm(module.forward)
    return clip.train()


def encoding_peak(
    clip: Clip,
    batch: Batch,
    bf16: bool,
    checkpointing: bool,
    trained: Iterable[nn.Parameter] | None = None,
    pooled: bool = True,
    negatives: bool = False,
    captions: bool = True,
) -> int:
    """Bytes that encoding a batch and going back through it takes at its peak, beside weights, their gradients and the batch
    itself. `pooled`: whether tokens are pooled; `negatives`, `captions`: whether hard negatives and whole captions are
    encoded."""
    clip.checkpointed(checkpointing)
    with _mode(clip):
        trained = list(clip.parameters() if trained is None else trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained]
        with Live([*clip.parameters(), *clip.buffers(), *gradients, *_tensors(batch)]) as live:
            features = batch_features(clip, batch, torch.bfloat16 if bf16 else None, pooled, negatives, captions)
            wanted = [value for value in given(features, ENCODED).values() if value.requires_grad]
            torch.autograd.backward(wanted, [torch.ones_like(value) for value in wanted])
        clip.zero_grad(set_to_none=True)
    clip.checkpointed(False)
    return live.peak


def objective_peak(
    clip: Clip, objective: Objective, count: int, pairs: int, negatives: int = 0, sub_captions: int = 0, world: int = 1
) -> tuple[int, int]:
    """Bytes at the peak of the objective over `count` samples with `pairs` local pairs, `negatives` hard negatives and
    `sub_captions` each, forward and backward, and bytes of the features with their gradients, the teacher's, which have none,
    included. Of `world` processes each has its share of the patches and sub-captions."""
    local, hard, own = count * pairs, count * negatives, count // world
    with _mode(clip), Live(clip.parameters()) as live:
        names = [name for name in ENCODED if (objective.needs_pooled or name not in POOLED) and name not in DRAWN]
        names = [name for name in names if objective.needs_negatives or name not in NEGATIVE]
        drawn: dict[str, Any] = {}
        if sub_captions:
            patches = (clip.image_size // clip.patch_size) ** 2
            sizes = {"patches": (own, patches, clip.embed_dim), "sub_queries": (own, sub_captions, clip.embed_dim)}
            drawn = {name: torch.ones(*size, requires_grad=True) for name, size in sizes.items()}
            drawn |= {"sub_choices": torch.zeros(own, count, dtype=torch.int64), "pooling": clip.pooling}
            drawn["shares"] = _Repeated(world)
        taught = [*TEACHER] if objective.teacher_decay is not None else []
        taught = [name for name in taught if objective.needs_negatives or name not in NEGATIVE]
        rows = {name: count if name in GLOBAL else hard if name in NEGATIVE else local for name in (*names, *taught)}
        features = Features(
            **{name: torch.ones(rows[name], clip.embed_dim, requires_grad=True) for name in names},
            **{name: torch.ones(rows[name], clip.embed_dim) for name in taught},
            **{f"{name}_weight": torch.ones(local) for name in names if name in POOLED},
            local_rows=torch.zeros(local, dtype=torch.int64),
            local_weight=torch.ones(local),
            local_boxes=torch.ones(local, 4),
            negative_rows=torch.zeros(hard, dtype=torch.int64) if objective.needs_negatives else None,
            negative_slots=torch.zeros(hard, dtype=torch.int64) if objective.needs_negatives else None,
            negative_count=negatives,
            **drawn,
            scale=torch.ones((), requires_grad=True),
        )
        objective(features)["loss"].backward()
        clip.zero_grad(set_to_none=True)
    names += [name for name in DRAWN if name in drawn]
    leaves = sum(2 * _size(getattr(features, name)) for name in names)
    return live.peak, leaves + sum(_size(getattr(features, name)) for name in taught)


class _Repeated(Shares):
    """Stands for processes with as many rows as this one, in what they take."""

    def __init__(self, world: int):
        self._world = world

    def rows(self, own: Tensor) -> Tensor:
        """See `Shares`."""
        return torch.cat([own] * self._world) if self._world > 1 else own


class Live(TorchDispatchMode):
    """Adds up the storages that are made while it is on, as long as they live: `bytes` now, `peak` at most. `before`: the
    tensors that were there already."""

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                self._add(value.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: weakref.ref) -> None:
            del self._known[key]
            self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class Float32Norm:
    """The forward of a layer norm as CUDA's autocast runs it: in float32, whatever the input."""

    def __init__(self, forward: Any):
        self._forward = forward

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._forward(hidden.float()).to(hidden.dtype)


def _mode(clip: Clip) -> FakeTensorMode:
    return next(clip.parameters()).fake_mode


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
