"""The estimate of a step's memory against what the CPU's allocator, and a GPU, really hand out."""

import dataclasses
import itertools
from itertools import pairwise

import pytest
import torch
from test_loop import CONFIG, GLOBAL, fast_goal
from torch.profiler import ProfilerActivity, profile

from fast_goal.errors import ConfigError
from fast_goal.model.clip import build_scratch, saved_structure
from fast_goal.objectives import Features, given
from fast_goal.training.batches import Batch
from fast_goal.training.memory import Float32Norm, Inputs, Plan, StepMemory, encoding_peak, fake, fake_batch, objective_peak
from fast_goal.training.schedule import make_optimizer
from fast_goal.training.step import DRAWN as OF_SUB_CAPTIONS
from fast_goal.training.step import ENCODED, TrainStep, batch_features, fit_pooling

INPUTS = Inputs(caption_tokens=40, sentence_tokens=12, pairs=1)
HARD = INPUTS._replace(negative_tokens=38, negatives=2)
DRAWN = INPUTS._replace(pairs=0, sub_tokens=12, sub_captions=3)
SAMPLES = 384  # the embedding's gradient, which a fake tensor adds up less sparingly, is small beside their activations
PLAIN = Plan(bf16=False, checkpointing=False, accumulate=1)


@pytest.fixture
def fake_clip(make_scratch_config):
    return fake(build_scratch, make_scratch_config(), INPUTS.caption_tokens)


@pytest.fixture
def memory(fake_clip):
    """Makes the estimator of the tiny CLIP, with changes of the training's settings."""
    return lambda world=1, objective=None, **changes: StepMemory(
        fake_clip, objective or fast_goal(), dataclasses.replace(CONFIG, **changes), INPUTS, world
    )


def real_batch(clip, count: int, inputs: Inputs = INPUTS, device: str = "cpu") -> Batch:
    size, pairs, drawn = clip.image_size, count * inputs.pairs, {}
    if inputs.sub_captions:
        drawn["sub_tokens"] = torch.randint(1, 1000, (count * inputs.sub_captions, inputs.sub_tokens))
        drawn["sub_choices"] = torch.randint(inputs.sub_captions, (count, count))
    batch = Batch(
        images=torch.randint(0, 256, ((1 + inputs.pairs) * count, 3, size, size), dtype=torch.uint8),
        caption_tokens=torch.randint(1, 1000, (count, inputs.caption_tokens)),
        sentence_tokens=torch.randint(1, 1000, (pairs, inputs.sentence_tokens)),
        local_rows=torch.arange(pairs),
        boxes=torch.tensor([[0.0, 0.0, 20.0, 20.0]]).repeat(pairs, 1),
        spans=torch.tensor([[1, 5]]).repeat(pairs, 1),
        regions=torch.zeros(pairs, 4),
        local_weights=torch.ones(pairs),
        rank_pairs=(pairs,),
        negative_tokens=torch.randint(1, 1000, (count * inputs.negatives, inputs.negative_tokens)),
        negative_rows=torch.arange(count).repeat_interleave(inputs.negatives),
        negative_slots=torch.arange(inputs.negatives).repeat(count),
        negative_count=inputs.negatives,
        rank_negatives=(count * inputs.negatives,),
        **drawn,
    )
    return batch.to(torch.device(device))


def allocated(run) -> int:
    """The most bytes that the CPU's allocator had handed out at once during `run`, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def backward(features) -> None:
    wanted = [value for value in given(features, ENCODED).values() if value.requires_grad]
    torch.autograd.backward(wanted, [torch.ones_like(value) for value in wanted])


@pytest.mark.parametrize(
    ("bf16", "checkpointing", "inputs"), [*itertools.product([False, True], [False, True], [INPUTS]), (False, False, HARD)]
)
def test_the_estimate_is_what_the_allocator_hands_out(fake_clip, tiny_clip, bf16, checkpointing, inputs):
    clip = tiny_clip(INPUTS.caption_tokens).train()
    clip.checkpointed(checkpointing)
    for module in clip.modules():  # on the CPU, layer norms in float32 are the only thing to do as CUDA does it
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = Float32Norm(module.forward)
    for parameter in clip.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch, hard = real_batch(clip, SAMPLES, inputs), inputs.negatives > 0
    measured = allocated(lambda: backward(batch_features(clip, batch, torch.bfloat16 if bf16 else None, negatives=hard)))
    estimate = encoding_peak(fake_clip, fake_batch(fake_clip, inputs, SAMPLES), bf16, checkpointing, negatives=hard)
    assert estimate == pytest.approx(measured, rel=0.05)


def test_the_activations_are_those_that_autograd_saves(fake_clip, tiny_clip):
    """Counted by the hooks through which autograd keeps what the backward pass needs; the peak adds what is passing."""
    clip = tiny_clip(INPUTS.caption_tokens).train()
    batch = real_batch(clip, SAMPLES)
    known = [*clip.parameters(), *clip.buffers(), *(value for value in vars(batch).values() if isinstance(value, torch.Tensor))]
    there, saved = {tensor.untyped_storage().data_ptr() for tensor in known}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = batch_features(clip, batch)
    assert features.image_global.requires_grad
    estimate = encoding_peak(fake_clip, fake_batch(fake_clip, INPUTS, SAMPLES), False, False)
    assert sum(saved.values()) <= estimate <= 1.15 * sum(saved.values())


def test_no_attention_matrix_is_counted(make_scratch_config):
    """Fused attention keeps none: twice the tokens are twice the bytes."""
    peaks = []
    for tokens in (200, 400):
        clip = fake(build_scratch, make_scratch_config(), tokens)
        inputs = INPUTS._replace(caption_tokens=tokens, pairs=0)
        peaks.append(encoding_peak(clip, fake_batch(clip, inputs, SAMPLES), False, False))
    assert peaks[1] < 2 * peaks[0]


def test_the_objective_grows_with_the_square_of_the_batch(fake_clip):
    clip, objective = fake_clip, fast_goal()
    first, second, third = (objective_peak(clip, objective, count, 1)[0] for count in (1024, 2048, 4096))
    assert 3 < second / first < 4 < third / second * 1.1
    dim = clip.embed_dim
    leaves = {
        name: torch.rand(1024, dim).requires_grad_() for name in ENCODED if name not in ("text_negatives", *OF_SUB_CAPTIONS)
    }

    def run() -> None:
        rest = {name: torch.ones(1024) for name in ("region_weight", "sentence_weight", "local_weight")}
        rows, scale = torch.arange(1024), torch.ones((), requires_grad=True)
        objective(Features(**leaves, **rest, local_rows=rows, local_boxes=torch.ones(1024, 4), scale=scale))["loss"].backward()

    assert first == pytest.approx(allocated(run), rel=0.1)


def test_fixed_bytes(memory, fake_clip):
    parameters = sum(parameter.numel() for parameter in fake_clip.parameters())
    buffers = sum(buffer.numel() for buffer in fake_clip.buffers())
    need = memory().need(PLAIN, 64)
    assert need.weights == 4 * (parameters + buffers)
    assert (need.gradients, need.optimizer, need.average) == (4 * parameters, 8 * parameters, 0)
    assert memory(ema=0.99).need(PLAIN, 64).average == need.weights
    image = 64 * (2 * 3 * 32 * 32) + 64 * 8 * (40 + 12 + 1 + 2) + 64 * 4 * (4 + 4 + 1)
    assert need.inputs == image
    frozen = memory(freeze=["image"]).need(PLAIN, 64)
    text = sum(value.numel() for name, value in fake_clip.named_parameters() if ".visual." not in name)
    assert frozen.gradients == 4 * text and frozen.activations < need.activations


def test_negatives_and_teacher_are_counted(fake_clip, degla):
    def need(objective):
        return StepMemory(fake_clip, objective, CONFIG, HARD).need(PLAIN, 64)

    plain, hard, taught = need(fast_goal(GLOBAL)), need(degla(tgc=0.0, distillation=0.0)), need(degla())
    assert (plain.teacher, hard.teacher, taught.teacher) == (0, 0, plain.weights)
    assert hard.inputs - plain.inputs == 64 * 2 * (38 + 1 + 1) * 8
    # two more texts of 38 tokens beside one of 40: far more than what the objective makes of them
    text = encoding_peak(fake_clip, fake_batch(fake_clip, Inputs(40, 0, 0), 128), False, False, negatives=True)
    texts = encoding_peak(fake_clip, fake_batch(fake_clip, HARD._replace(pairs=0), 128), False, False, negatives=True)
    assert hard.activations - plain.activations >= 0.9 * (texts - text) / 2 > 0
    assert taught.fixed - hard.fixed == plain.weights and taught.activations > hard.activations


def test_the_estimate_of_sub_captions_is_what_the_allocator_hands_out(tiny_clip, make_scratch_config):
    inputs, clip = DRAWN, tiny_clip(DRAWN.caption_tokens).train()
    for parameter in clip.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = real_batch(clip, SAMPLES, inputs)

    def run() -> None:
        backward(batch_features(clip, batch, pooled=False, captions=False))

    fresh = fake(build_scratch, make_scratch_config(), inputs.caption_tokens)
    estimate = encoding_peak(fresh, fake_batch(fresh, inputs, SAMPLES), False, False, pooled=False, captions=False)
    assert estimate == pytest.approx(allocated(run), rel=0.05)


def test_the_objective_of_a_pooling_is_what_the_allocator_hands_out(fake_clip, tiny_clip, flair):
    objective, clip, patches = flair(), tiny_clip(), 16
    StepMemory(fake_clip, objective, CONFIG, DRAWN)  # gives it a pooling
    fit_pooling(clip, objective)
    counts = {"image_global": (192,), "patches": (192, patches), "sub_queries": (192, 3)}
    leaves = {name: torch.rand(*sizes, clip.embed_dim).requires_grad_() for name, sizes in counts.items()}
    chosen = torch.zeros(192, 192, dtype=torch.int64)

    def run() -> None:
        objective(Features(**leaves, sub_choices=chosen, pooling=clip.pooling, scale=torch.ones(())))["loss"].backward()

    own = sum(value.numel() for value in leaves.values()) * 4 + chosen.numel() * 8
    estimate, held = objective_peak(fake_clip, objective, 192, 0, sub_captions=3)
    # attention without autograd's fused kernel keeps its weights on the CPU, which a GPU does not
    assert estimate - own == pytest.approx(allocated(run), rel=0.15)
    assert held >= 2 * 4 * sum(value.numel() for value in leaves.values())
    assert objective_peak(fake_clip, objective, 192, 0, sub_captions=3, world=4)[0] < estimate / 2
    assert all(parameter.grad is None for parameter in fake_clip.parameters())


def test_sub_captions_and_the_pooling_are_counted(fake_clip, memory, flair):
    plain = memory(objective=fast_goal(GLOBAL)).need(PLAIN, 64)
    steps = StepMemory(fake_clip, flair(), CONFIG, DRAWN)
    need = steps.need(PLAIN, 64)
    head = sum(parameter.numel() for parameter in fake_clip.pooling.parameters())
    assert need.weights - plain.weights == 4 * head and need.optimizer - plain.optimizer == 8 * head
    # of the choices there is one for each two samples; the bytes are those of a batch of 64
    assert need.inputs - plain.inputs == 64 * (3 * 12 + 64) * 8
    assert steps.need(Plan(False, False, 4), 64).activations < need.activations


def test_a_saved_pooling_is_that_of_the_estimate(fake_clip, tiny_clip, flair, tmp_path):
    clip = tiny_clip(INPUTS.caption_tokens)
    fit_pooling(clip, flair())
    clip.save(tmp_path / "model", {})
    saved = fake(saved_structure, tmp_path / "model")
    assert saved.pooling.pooling.heads == 4
    needs = [StepMemory(one, flair(), CONFIG, DRAWN).need(PLAIN, 64) for one in (saved, fake_clip)]
    assert needs[0] == needs[1]
    with pytest.raises(ConfigError, match="heads = 2, but the pooling"):
        StepMemory(saved, flair(heads=2), CONFIG, DRAWN)


def test_more_samples_need_more(memory):
    steps = memory()
    for plan in (PLAIN, Plan(True, True, 4)):
        totals = [steps.need(plan, size).total for size in (64, 65, 128, 1000, 10_000)]
        assert all(before < after for before, after in pairwise(totals))


def test_every_setting_reduces(memory):
    steps = memory()
    now = steps.need(PLAIN, 512).total
    alone = [steps.need(plan, 512).total for plan in (Plan(True, False, 1), Plan(False, True, 1), Plan(False, False, 2))]
    assert max(alone) < now
    assert steps.need(Plan(True, True, 8), 512).total < min(alone)
    parts = [steps.need(Plan(False, False, count), 512).total for count in (1, 2, 4, 8)]
    assert all(before > after for before, after in pairwise(parts))
    assert steps.per_sample(Plan(False, True, 1)) < steps.per_sample(PLAIN)
    assert [Plan(False, *change).time for change in ((False, 1), (True, 1), (False, 2), (True, 2))] == [3, 4, 4, 5]


def test_the_largest_batch_is_the_largest(memory):
    for plan, world in ((PLAIN, 1), (Plan(False, True, 4), 2)):
        steps = memory(world)
        limit = steps.need(plan, 200).total
        most = steps.largest(plan, limit)
        assert most == 200 and most % (world * plan.accumulate) == 0
        assert steps.need(plan, most + world * plan.accumulate).total > limit
        assert steps.largest(plan, 1000) == 0


def test_processes_share_the_batch_but_not_the_loss(memory):
    one, two = memory(1), memory(2)
    assert two.need(PLAIN, 512).inputs == one.need(PLAIN, 256).inputs
    assert one.need(PLAIN, 256).total < two.need(PLAIN, 512).total < one.need(PLAIN, 512).total


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [PLAIN, Plan(True, False, 1), Plan(True, True, 1), Plan(True, False, 4), Plan(False, True, 1)])
def test_a_gpu_needs_what_is_estimated(make_scratch_config, plan):
    """Sizes at which the activations are most of it."""
    if plan.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    sizes = {"image_size": 224, "patch_size": 16, "vision_width": 384, "vision_layers": 6, "embed_dim": 256}
    config = make_scratch_config(**sizes, text_width=256, text_layers=6, head_width=64)
    inputs, batch_size = Inputs(248, 77, 1), 64
    gpu = torch.device("cuda")
    clip = build_scratch(config, 248).to(gpu).train()
    clip.checkpointed(plan.checkpointing)
    batch = real_batch(clip, batch_size, inputs)
    parts = [part.to(gpu) for part in batch.split(plan.accumulate)]
    step = TrainStep(clip, fast_goal(), make_optimizer(clip.parameters(), 1e-4, 0.05), torch.bfloat16 if plan.bf16 else None)
    step(parts)  # makes the optimiser's averages
    torch.cuda.reset_peak_memory_stats()
    step(parts)
    torch.cuda.synchronize()
    steps = StepMemory(fake(build_scratch, config, 248), fast_goal(), CONFIG, inputs)
    assert steps.need(plan, batch_size).allocated == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)
