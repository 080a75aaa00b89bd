"""What may change how a step is computed, and must not change the step; and what must change it in just one way."""

import copy
import math

import pandas as pd
import pytest
import torch

from fast_goal.errors import ConfigError
from fast_goal.model.tokens import masked_mean
from fast_goal.objectives import Plain, make_objective
from fast_goal.training import step
from fast_goal.training.batches import PairDataset
from fast_goal.training.schedule import make_optimizer, parameter_groups, set_rate
from fast_goal.training.step import TrainStep, batch_features

WEIGHTS = {"global": 1.0, "local": 0.5, "tsl_image": 1.0, "tsl_text": 1.0}


def fast_goal(**changes):
    return make_objective(
        {
            "name": "fast_goal",
            "weights": WEIGHTS | changes,
            "target_matrix": "diagonal",
            "in_image_negatives": None,
            "alignment": "exact",
        }
    )


def train_step(clip, parts, objective, optimizer, **settings):
    return TrainStep(clip, objective, optimizer, **settings)(parts if isinstance(parts, list) else [parts])


def gradients(clip):
    return {name: value.grad.clone() for name, value in clip.named_parameters() if value.grad is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def samples(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    second = pairs.iloc[[1]].assign(rank=2, x1=0.0, weight=0.5)
    pairs.loc[1, "weight"] = 0.5
    pairs = pd.concat([pairs.drop([4, 7]), second])  # image 1 has two, 4 and 7 have none
    return PairDataset(dataset, "train", pairs, tiny_clip(), best=False)


@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(samples, tiny_clip, parts):
    whole, clip = tiny_clip(), tiny_clip()
    batch = samples[[7, 1, 4, 2, 9, 0, 3]]
    expected = train_step(whole, batch, fast_goal(), torch.optim.SGD(whole.parameters(), 0.0))
    split = batch.split(parts)
    assert len(split) == min(parts, 7) and sum(len(part) for part in split) == 7
    assert max(part.images.shape[0] for part in split) < batch.images.shape[0]
    found = train_step(clip, split, fast_goal(), torch.optim.SGD(clip.parameters(), 0.0))
    assert_close(found, expected)
    assert_close(gradients(clip), gradients(whole))


def test_parts_of_a_global_objective(samples, tiny_clip):
    whole, clip = tiny_clip(), tiny_clip()
    batch, objective = samples[[7, 1, 4, 2]], fast_goal(local=0.0, tsl_image=0.0, tsl_text=0.0)
    train_step(whole, batch, objective, torch.optim.SGD(whole.parameters(), 0.0))
    train_step(clip, batch.split(2), objective, torch.optim.SGD(clip.parameters(), 0.0))
    assert_close(gradients(clip), gradients(whole))


@pytest.mark.parametrize("term", ["local", "tsl_image", "tsl_text"])
def test_parts_without_a_share_in_the_loss(samples, tiny_clip, term):
    whole, clip = tiny_clip(), tiny_clip()
    batch, objective = samples[[4, 1, 2, 7]], fast_goal(**(dict.fromkeys(WEIGHTS, 0.0) | {term: 1.0}))
    train_step(whole, batch, objective, torch.optim.SGD(whole.parameters(), 0.0))
    train_step(clip, batch.split(4), objective, torch.optim.SGD(clip.parameters(), 0.0))  # the first and last have no pair
    assert_close(gradients(clip), gradients(whole))
    assert (clip.model.logit_scale.grad is None) == (term != "local")  # the others do not look at it


@pytest.mark.parametrize("parts", [1, 3])
def test_tokens_are_pooled_only_for_who_looks_at_them(samples, tiny_clip, monkeypatch, parts):
    class Pooling(Plain):
        needs_pooled = True

        def __init__(self, objective):
            self.objective = objective

        def __call__(self, features):
            assert features.region is not None and features.sentence_weight is not None
            return self.objective(features)

    def mean(*arguments):
        means.append(1)
        return masked_mean(*arguments)

    monkeypatch.setattr(step, "masked_mean", mean)
    batch, plain, found = samples[[7, 1, 4, 2, 9]], fast_goal(tsl_image=0.0, tsl_text=0.0), []
    for objective, calls in ((plain, 0), (Pooling(plain), 2), (fast_goal(tsl_text=0.0), 2)):
        clip, means = tiny_clip(), []
        terms = train_step(clip, batch.split(parts), objective, torch.optim.SGD(clip.parameters(), 0.0))
        assert bool(means) == bool(calls) and len(means) % 2 == 0
        found.append((terms, gradients(clip)))
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


def test_a_part_holds_the_features_of_its_samples(samples, tiny_clip):
    clip = tiny_clip().eval()
    batch = samples[[7, 1, 4, 2, 9]]
    whole = batch_features(clip, batch)
    parts = [batch_features(clip, part) for part in batch.split(3)]
    for name in ("image_global", "text_global", "image_local", "text_local", "region", "sentence", "local_weight"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name), atol=1e-5, rtol=0)


def test_checkpointed_activations_give_the_same_gradient(samples, tiny_clip):
    kept, again = tiny_clip(), tiny_clip()
    again.checkpointed()
    runs = []
    for clip in (kept, again):
        calls = []
        for block in [*clip.model.visual.transformer.resblocks, *clip.model.transformer.resblocks]:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        train_step(clip, samples[[1, 2, 3]], fast_goal(), torch.optim.SGD(clip.parameters(), 0.0))
        runs.append(len(calls))
    assert runs[1] == 2 * runs[0]  # every block once more, in the backward pass
    assert_close(gradients(again), gradients(kept))


def test_groups_by_default_are_one(tiny_clip):
    clip = tiny_clip()
    (group,) = parameter_groups(clip)
    assert len(group["params"]) == len(list(clip.parameters())) and group["factor"] == 1


def test_only_matrices_decay(tiny_clip):
    clip = tiny_clip()
    optimizer = make_optimizer(parameter_groups(clip, "matrices"), 0.1, 0.5)
    names = {id(value): name for name, value in clip.named_parameters()}
    for group in optimizer.param_groups:
        for value in group["params"]:
            name = names[id(value)]
            spared = value.ndim < 2 or name.endswith("positional_embedding")
            assert group["weight_decay"] == (0 if spared else 0.5), name


def test_the_rate_decays_towards_the_input(tiny_clip):
    clip = tiny_clip()
    optimizer = make_optimizer(parameter_groups(clip, layer_decay=0.5), 0.1, 0.0)
    set_rate(optimizer, 0.8)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    named = {name.removeprefix("model."): rates[id(value)] for name, value in clip.named_parameters()}
    blocks = len(clip.model.visual.transformer.resblocks)
    assert named["logit_scale"] == named["visual.proj"] == named["ln_final.weight"] == named["text_projection"] == 0.8
    assert named[f"visual.transformer.resblocks.{blocks - 1}.ln_1.weight"] == pytest.approx(0.4)
    assert named["visual.transformer.resblocks.0.mlp.c_fc.weight"] == pytest.approx(0.8 * 0.5**blocks)
    assert named["visual.conv1.weight"] == named["visual.class_embedding"] == pytest.approx(0.8 * 0.5 ** (blocks + 1))
    text_blocks = len(clip.model.transformer.resblocks)
    assert named["token_embedding.weight"] == named["positional_embedding"] == pytest.approx(0.8 * 0.5 ** (text_blocks + 1))


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_frozen_tower_stays_as_it_is(samples, tiny_clip, tower, parts):
    clip = tiny_clip()
    before = copy.deepcopy(clip.state_dict())
    optimizer = make_optimizer(parameter_groups(clip, freeze=[tower]), 0.01, 0.5)
    train_step(clip, samples[[1, 2, 3]].split(parts), fast_goal(), optimizer)
    for name, value in clip.state_dict().items():
        frozen = name.startswith("model.visual.") if tower == "image" else not name.startswith(("model.visual.", "model.logit"))
        if name in dict(clip.named_parameters()):
            assert torch.equal(value, before[name]) == frozen, name


def test_nothing_left_to_train_is_refused(samples, tiny_clip):
    with pytest.raises(ConfigError, match=r"finetune\.freeze"):
        parameter_groups(tiny_clip(), freeze=["image", "text"])
    with pytest.raises(ConfigError, match=r"intermediate\.training\.freeze"):
        parameter_groups(tiny_clip(), freeze=["image", "text"], section="intermediate.training")
    clip = tiny_clip()
    optimizer = make_optimizer(parameter_groups(clip, freeze=["image"]), 0.01, 0.5)
    with pytest.raises(ConfigError, match="`freeze`"):
        train_step(clip, samples[[1, 2, 3]], fast_goal(**(dict.fromkeys(WEIGHTS, 0.0) | {"tsl_image": 1.0})), optimizer)


def test_the_logit_scale_is_held(samples, tiny_clip):
    clip = tiny_clip()
    with torch.no_grad():
        clip.model.logit_scale.fill_(math.log(200.0))
    train_step(clip, samples[[1, 2]], fast_goal(), torch.optim.SGD(clip.parameters(), 0.0), max_logit_scale=100)
    assert clip.logit_scale.item() == pytest.approx(100)
