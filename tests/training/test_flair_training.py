"""Training with sub-captions and a text-conditioned pooling: the batches, the step against loops, and a resume."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from flair_settings import flair_config
from killing import killed_after
from PIL import Image
from test_batches import same
from test_loop import CONFIG, CPU, WEIGHTS, fast_goal, run
from test_step import assert_close, gradients

from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.images import normalised
from fast_goal.data.sub_captions import CHOICES, TEXTS, choices, draw, drawing
from fast_goal.errors import ConfigError
from fast_goal.objectives import make_objective
from fast_goal.training import loop as loop_module
from fast_goal.training.batches import PairDataset, pair_dataset
from fast_goal.training.checkpoint import states
from fast_goal.training.distributed import Group
from fast_goal.training.loader import Loader
from fast_goal.training.schedule import make_optimizer, parameter_groups
from fast_goal.training.step import TrainStep, batch_features, fit_pooling

INDICES, SEED, EPOCH, K = [7, 0, 5, 2, 4], 3, 2, 3
DRAWN = make_objective(flair_config(count=K)).sub_captions


@pytest.fixture
def drawn(make_scenes, tiny_clip):
    """Makes the samples, with changes of PairDataset's arguments."""
    dataset, pairs = make_scenes()
    return lambda **changes: PairDataset(dataset, "train", pairs, tiny_clip(), **({"sub_captions": DRAWN} | changes))


def expected_texts(dataset, index, epoch=EPOCH):
    sentences = [sentence.text for sentence in split_sentences(dataset.split("train").long_caption.iloc[index])]
    return draw(sentences, K, DRAWN.most_sentences, DRAWN.consecutive, drawing(SEED, epoch, index, TEXTS))


def rows_of(tokens):
    return [[token for token in row if token] for row in tokens.tolist()]


def test_a_batch_holds_what_is_drawn_for_its_samples(drawn, make_scenes):
    dataset, _ = make_scenes()
    samples = drawn(local=False)
    batch = samples.batch(INDICES, SEED, EPOCH)
    texts = [text for index in INDICES for text in expected_texts(dataset, index)]
    assert rows_of(batch.sub_tokens) == rows_of(tokenize(texts, 40)[0])
    assert batch.sub_tokens.shape == (15, max(map(len, rows_of(batch.sub_tokens))))
    for row, index in enumerate(INDICES):
        assert batch.sub_choices[row].tolist() == choices(K, 5, drawing(SEED, EPOCH, index, CHOICES)).tolist()
    assert samples.counts["sentences"] == 36 and samples.counts["with_one_sentence"] == 0
    other = samples.batch(INDICES, SEED, EPOCH + 1)
    assert rows_of(other.sub_tokens) != rows_of(batch.sub_tokens) and not torch.equal(other.sub_choices, batch.sub_choices)
    assert same(replace(other, sub_tokens=None, sub_choices=None), drawn(local=False, sub_captions=None)[INDICES])


def test_parts_and_shares_are_those_of_the_whole(drawn):
    batch = drawn().batch(INDICES[:4], SEED, EPOCH)
    parts = batch.split(3)
    shares = [drawn(group=Group(rank, 2)).batch(INDICES[:4], SEED, EPOCH) for rank in range(2)]
    for some in (parts, shares):
        assert [row for part in some for row in rows_of(part.sub_tokens)] == rows_of(batch.sub_tokens)
        assert torch.equal(torch.cat([part.sub_choices for part in some]), batch.sub_choices)
    assert all(len(part.sub_tokens) == K * len(part) for part in parts)


def test_workers_and_a_start_in_the_middle_draw_the_same(drawn):
    loaders = [Loader(drawn(), 4, SEED, workers) for workers in (0, 1)]
    found = [[batch for epoch in range(2) for batch in loader.epoch(epoch)] for loader in loaders]
    assert all(same(a, b) for a, b in zip(*found, strict=True))
    assert all(same(a, b) for a, b in zip(found[0][5:], loaders[1].epoch(1, start=2), strict=True))
    loaders[1].close()
    assert rows_of(found[0][0].sub_tokens) != rows_of(Loader(drawn(), 4, SEED + 1).epoch(0).__next__().sub_tokens)


def test_captions_with_little_to_draw_from_are_counted(make_scenes, tiny_clip, caplog):
    dataset, _ = make_scenes(count=4)
    dataset.records["long_caption"] = ["Just one.", " \n ", "Two. Of them.", ""] * 2
    samples = PairDataset(dataset, "train", None, tiny_clip(), local=False, sub_captions=DRAWN)
    assert len(samples) == 2 and samples.counts["without_long_caption"] == 2
    assert samples.counts["with_one_sentence"] == 1 and samples.counts["sentences"] == 3
    assert (
        "2 of 4 images have no long caption" in caplog.text and "1 of 2 samples have a caption of one sentence" in caplog.text
    )
    assert len({tuple(row) for row in samples[[0]].sub_tokens.tolist()}) == 1


def test_short_captions_are_refused(make_scenes, tiny_clip, flair):
    with pytest.raises(ConfigError, match=r"first\.captions = 'short': the sub-captions"):
        config = replace(CONFIG, captions="short")
        pair_dataset(*(make_scenes()[0], "train", None), tiny_clip(), flair(), config, Group(), CPU, "first")


def test_captions_whose_sub_captions_are_cut_off_are_counted(make_scenes, tiny_clip, caplog):
    """Of three sentences at most; the context of 40 holds 38 tokens beside the start and the end."""
    dataset, _ = make_scenes(count=4)
    sentence = "The " + "red " * 10 + "dog."  # 13 tokens
    fits, not_all = " ".join([sentence] * 2), " ".join([sentence] * 4)
    dataset.records["long_caption"] = [fits, not_all, "The " + "red " * 50 + "dog.", "A dog."] * 2
    drawn = replace(DRAWN, most_sentences=3)
    samples = PairDataset(dataset, "train", None, tiny_clip(), local=False, sub_captions=drawn, whole=False)
    assert samples.counts["truncated_sub_captions"] == 2 and samples.counts["truncated_captions"] == 0
    assert "2 of 4 samples have sub-captions that can be longer than the text context, cut off" in caplog.text


def test_a_pooling_that_is_not_trained_is_told(tiny_clip, flair, caplog):
    clip = ready(tiny_clip(), flair())
    fit_pooling(clip, make_objective(FAST_GOAL))
    assert "has a text-conditioned pooling, and the objective does not train it" in caplog.text


def ready(clip, objective):
    fit_pooling(clip, objective, seed=1)
    return clip


def unit(vector):
    return vector / vector.square().sum().sqrt()


def log_sigmoid(value):
    return -torch.log1p(torch.exp(-value))


def reference(clip, dataset, indices):
    """The terms and the loss, one image and one text at a time, nothing trimmed; the pooling by torch's own module."""
    model, head, records = clip.model, clip.pooling, dataset.split("train")
    images, patches, texts = [], [], []
    for index in indices:
        record = records.iloc[index]
        with Image.open(dataset.path(record.image_path)) as image:
            pixels = clip.view(*image.size).apply(image)[None]
        tokens = model.visual.forward_intermediates(pixels, indices=1, output_fmt="NLC")["image_intermediates"][-1][0]
        images.append(unit(model.encode_image(pixels)[0]))
        patches.append(torch.stack([model.visual.ln_post(token) @ model.visual.proj for token in tokens]))
        texts.append([model.encode_text(tokenize([text], 40)[0])[0] for text in expected_texts(dataset, index)])
    scale, bias, pooling = head.logit_scale.exp(), head.logit_bias, head.pooling
    total, tcs, mps = len(indices), 0.0, 0.0
    for i, index in enumerate(indices):
        asked = choices(K, total, drawing(SEED, EPOCH, index, CHOICES))
        for j in range(total):
            sign = 1 if i == j else -1
            for k in range(K):
                text = texts[j][k]
                mps = mps - log_sigmoid(sign * (scale * images[i] @ unit(text) + bias)) / (total * K)
                if i == j or k == asked[j]:
                    query, keys, values = pooling.norm_query(text), pooling.norm_key(patches[i]), pooling.norm_value(patches[i])
                    pooled, _ = pooling.attention(query[None, None], keys[None], values[None])
                    logit = scale * unit(pooled[0, 0]) @ unit(text) + bias
                    tcs = tcs - log_sigmoid(sign * logit) / (total + K - 1)
    return {"tcs": tcs, "mps": mps, "loss": (tcs + mps) / 2}


@pytest.mark.parametrize("parts", [1, 3])
def test_the_step_is_that_of_the_slow_formulation(make_scenes, tiny_clip, flair, parts):
    (dataset, _), objective = make_scenes(), flair()
    clip, slow = (ready(tiny_clip(), objective) for _ in range(2))
    expected = reference(slow, dataset, INDICES)
    expected["loss"].backward()
    samples = PairDataset(dataset, "train", None, clip, local=False, sub_captions=objective.sub_captions)
    texts = []
    clip.model.token_embedding.register_forward_hook(lambda m, i, o: texts.append(len(o)))
    step = TrainStep(clip, objective, torch.optim.SGD(clip.parameters(), 0.0))
    found = step(samples.batch(INDICES, SEED, EPOCH).split(parts))
    assert found.keys() == {*expected, "sigmoid_scale", "sigmoid_bias", "logit_scale"}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for (name, parameter), other in zip(clip.named_parameters(), slow.parameters(), strict=True):
        if name == "model.logit_scale":  # the losses have a scale of their own
            assert parameter.grad is None and other.grad is None
            continue
        largest = max(1.0, other.grad.abs().max().item())  # as in test_reference
        assert (parameter.grad - other.grad).abs().max().item() <= 2e-5 * largest, name
    assert texts == [15] if parts == 1 else texts == [6, 3, 6] * 2  # sub-captions alone, in one pass


def test_the_features_without_whole_captions(drawn, tiny_clip):
    clip, batch = tiny_clip().eval(), drawn(local=False).batch(INDICES, SEED, EPOCH)
    whole, without = batch_features(clip, batch, pooled=False), batch_features(clip, batch, pooled=False, captions=False)
    assert without.text_global is None and torch.equal(without.patches, whole.patches)
    assert torch.equal(without.sub_queries, whole.sub_queries) and whole.sub_queries.shape == (5, K, 16)
    tokens = clip(images=normalised(batch.images, clip.mean, clip.std)).image_tokens
    torch.testing.assert_close(clip.project_image(tokens), F.normalize(whole.patches, dim=-1))
    assert batch_features(clip, replace(batch, sub_tokens=None), pooled=False, captions=False).text_global is not None


def summed(*described):
    parts = {f"part{number}": {"weight": weight, "objective": one} for number, (weight, one) in enumerate(described)}
    return make_objective({"name": "weighted", "parts": parts})


FAST_GOAL = {
    "name": "fast_goal",
    "weights": WEIGHTS,
    "target_matrix": "diagonal",
    "in_image_negatives": None,
    "alignment": "exact",
}


@pytest.mark.parametrize("parts", [1, 3])
def test_beside_another_objective(drawn, tiny_clip, flair, parts):
    both = summed((2.0, flair_config()), (0.5, FAST_GOAL))
    batch, found = drawn().batch(INDICES, SEED, EPOCH), []
    for objective in (flair(), fast_goal(), both):
        clip = tiny_clip()
        fit_pooling(clip, flair(), seed=1)
        terms = TrainStep(clip, objective, torch.optim.SGD(clip.parameters(), 0.0))(batch.split(parts))
        found.append((terms, gradients(clip)))
    assert found[2][0]["loss"].item() == pytest.approx(
        2 * found[0][0]["loss"].item() + 0.5 * found[1][0]["loss"].item(), rel=1e-5
    )
    assert {"part0/sigmoid_bias", "part0/tcs", "part1/tsl_text"} <= found[2][0].keys()
    first, second, total = (gradient for _, gradient in found)
    expected = {name: 2 * first.get(name, torch.zeros(())) + 0.5 * second.get(name, torch.zeros(())) for name in first | second}
    assert_close(total, expected)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_frozen_tower_stays_as_it_is(drawn, tiny_clip, flair, tower, parts):
    clip = ready(tiny_clip(), flair())
    before = copy.deepcopy(clip.state_dict())
    optimizer = make_optimizer(parameter_groups(clip, freeze=[tower]), 0.01, 0.5)
    TrainStep(clip, flair(), optimizer)(drawn(local=False)[INDICES].split(parts))
    depths = clip.depths()
    for name, parameter in clip.named_parameters():
        # the losses have a scale of their own
        assert torch.equal(parameter, before[name]) == (depths[name][0] in (tower, "both")), name


def test_with_both_towers_frozen_nothing_is_left(tiny_clip, flair):
    with pytest.raises(ConfigError, match=r"finetune\.freeze = \['image', 'text'\]: with both towers"):
        parameter_groups(ready(tiny_clip(), flair()), freeze=["image", "text"])


def test_the_head_has_a_rate_of_its_own_and_its_scale_and_bias_do_not_decay(tiny_clip, flair):
    clip = ready(tiny_clip(), flair())
    for decayed in ("all", "matrices"):
        optimizer = make_optimizer(parameter_groups(clip, decayed, layer_decay=0.5, head_rate=20.0), 0.1, 0.5)
        of = {id(value): group for group in optimizer.param_groups for value in group["params"]}
        for name, value in clip.named_parameters():
            group = of[id(value)]
            assert (group["factor"] == 20) == name.startswith("pooling."), name
            spared = name in ("pooling.logit_scale", "pooling.logit_bias") or (decayed == "matrices" and value.ndim < 2)
            assert (group["weight_decay"] == 0) == (
                spared or (name.endswith("positional_embedding") and decayed == "matrices")
            ), name
    assert len(parameter_groups(clip)) == 2  # the scale and the bias


def test_the_scale_is_held_after_a_step(drawn, tiny_clip, flair):
    clip = ready(tiny_clip(), flair())
    with torch.no_grad():
        clip.pooling.logit_scale.fill_(math.log(500.0))
    TrainStep(clip, flair(), torch.optim.SGD(clip.parameters(), 0.0))([drawn(local=False)[INDICES]])
    assert clip.pooling.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize("term", ["tcs", "mps"])
def test_one_term_alone(drawn, tiny_clip, flair, term):
    objective = flair(**{"tcs": 0.0, "mps": 0.0} | {term: 1.0})
    clip = ready(tiny_clip(), objective)
    before = copy.deepcopy(clip.pooling.state_dict())
    TrainStep(clip, objective, make_optimizer(parameter_groups(clip), 0.01, 0.5))(drawn(local=False)[INDICES].split(2))
    for name, value in clip.pooling.named_parameters():
        assert torch.equal(value, before[name]) == (term == "mps" and name.startswith("pooling.")), name


def test_a_pooling_that_nobody_looks_at_stays(make_scenes, tiny_clip, tmp_path, flair):
    clip = ready(tiny_clip(), flair())
    before = copy.deepcopy(clip.pooling.state_dict())
    run(clip, *make_scenes(), tmp_path, replace(CONFIG, weight_decay=0.5, ema=0.5))
    assert all(torch.equal(value, before[name]) for name, value in clip.pooling.state_dict().items())


def test_a_fresh_head_by_the_seed_and_one_that_does_not_fit(tiny_clip, flair):
    made = []
    for seed in (0, 0, 1):
        clip = tiny_clip()
        fit_pooling(clip, flair(), seed)
        made.append(clip.pooling.pooling.attention.in_proj_weight.detach().clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    fit_pooling(clip, flair(), 5)
    assert torch.equal(clip.pooling.pooling.attention.in_proj_weight, made[2])  # it has one
    with pytest.raises(ConfigError, match="heads = 2, but the pooling that scratch begins with has 4"):
        fit_pooling(clip, flair(heads=2))
    with pytest.raises(ConfigError, match="heads = 3"):
        fit_pooling(tiny_clip(), flair(heads=3))
    plain = tiny_clip()
    fit_pooling(plain, fast_goal())
    assert plain.pooling is None


def test_it_learns(make_scenes, tiny_clip, tmp_path, flair):
    dataset, records = make_scenes()[0], []
    clip = tiny_clip()
    config = replace(CONFIG, epochs=30, batch_size=12, log_every=1, learning_rate=3e-3, head_rate=3.0)
    summary = run(clip, dataset, None, tmp_path, config, flair(), on_step=lambda step, record: records.append(record))
    first, last = records[0], records[-1]
    assert set(first) - {"step", "epoch", "learning_rate", "samples_per_second", "loss", "logit_scale"} == {
        *("tcs", "mps", "sigmoid_scale", "sigmoid_bias")
    }
    assert last["tcs"] < 0.7 * first["tcs"] and last["mps"] < 0.7 * first["mps"]
    assert first["sigmoid_bias"] == -10 and last["sigmoid_bias"] != -10
    assert summary["counts"]["sentences"] == 36 and summary["final"]["sigmoid_scale"] == last["sigmoid_scale"]
    clip.save(tmp_path / "model", {})
    again = type(clip).load(tmp_path / "model")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in clip.state_dict().items())


def test_a_killed_training_goes_on_to_the_same_end(make_scenes, make_negatives, tiny_clip, tmp_path):
    degla = {
        "name": "degla",
        "weights": {"global": 1.0, "igc": 0.1, "tgc": 0.1, "distillation": 0.1},
        "distillation": "sum",
        "tgc_scale": 10.0,
        "teacher_decay": 0.5,
    }
    objective = summed((1.0, flair_config()), (0.5, degla))
    dataset, pairs = make_scenes()
    config = replace(CONFIG, save_every=1, keep_states=9, ema=0.9, accumulate=2, head_rate=3.0)
    more = {"negatives": make_negatives(dataset)}
    (tmp_path / "whole").mkdir()
    whole, continued = tiny_clip(), tiny_clip(seed=9)
    run(whole, dataset, pairs, tmp_path / "whole", config, objective, **more)
    with killed_after(loop_module, 4):
        run(tiny_clip(), dataset, pairs, tmp_path, config, objective, **more)
    assert run(continued, dataset, pairs, tmp_path, config, objective, **more)["resumed_at_step"] == 4
    kept = [torch.load(states(path / "state.pt")[6], weights_only=True) for path in (tmp_path / "whole", tmp_path)]
    for name in ("model", "teacher", "average"):
        assert "pooling.logit_bias" in kept[0][name]
        assert all(torch.equal(value, kept[1][name][key]) for key, value in kept[0][name].items())
    assert not torch.equal(kept[0]["model"]["pooling.logit_bias"], kept[0]["teacher"]["pooling.logit_bias"])
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in continued.state_dict().items())
