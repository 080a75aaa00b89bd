"""Training with hard negative captions and a teacher: the batches, the step against a slow formulation, and a resume."""

import logging
from dataclasses import replace
from itertools import chain

import pandas as pd
import pytest
import torch
from killing import killed_after
from PIL import Image
from test_batches import same
from test_loop import CONFIG, CPU, GLOBAL, fast_goal, run

from fast_goal.data.captions import tokenize
from fast_goal.errors import ConfigError, DataError
from fast_goal.training import loop as loop_module
from fast_goal.training.batches import PairDataset, pair_dataset
from fast_goal.training.checkpoint import states
from fast_goal.training.distributed import Group
from fast_goal.training.loader import Loader
from fast_goal.training.step import TrainStep

INDICES = [7, 0, 5, 2, 4]  # with 3, 0, 1, 2 and 0 negatives


@pytest.fixture
def hard(make_scenes, make_negatives, tiny_clip):
    """Makes the samples, with changes of PairDataset's arguments."""
    dataset, pairs = make_scenes()
    table = make_negatives(dataset)
    return lambda **changes: PairDataset(dataset, "train", pairs, tiny_clip(), **({"negatives": table} | changes))


def texts_of(tokens):
    """The rows without their padding."""
    return [[token for token in row if token] for row in tokens.tolist()]


def tokens_of(texts, context_length=40):
    return texts_of(tokenize(texts, context_length)[0])


def test_the_negatives_of_each_caption_in_the_order_of_the_table(hard, make_negatives, make_scenes):
    dataset, _ = make_scenes()
    table, records = make_negatives(dataset), dataset.split("train")
    samples = hard()
    batch = samples[INDICES]
    assert batch.negative_rows.tolist() == [0, 0, 0, 2, 3, 3] and batch.negative_slots.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.negative_count == samples.negative_count == 3 and batch.rank_negatives == (6,)
    expected = []
    for index in INDICES:
        captions = table.caption == records.long_caption[index]
        expected += table[captions & (table.image_id == records.image_id[index])].negative.tolist()
    assert texts_of(batch.negative_tokens) == tokens_of(expected)
    assert batch.negative_tokens.shape[1] == max(map(len, tokens_of(expected)))  # no more padding than the longest needs
    assert same(samples[[0, 4]], replace(hard(negatives=None)[[0, 4]], negative_count=3))  # nobody has any


def test_the_parts_and_shares_of_a_batch_have_their_own_negatives(hard):
    batch = hard()[INDICES]
    parts = batch.split(3)
    assert [part.negative_rows.tolist() for part in parts] == [[0, 0, 0], [0], [0, 0]]
    assert torch.equal(torch.cat([part.negative_slots for part in parts]), batch.negative_slots)
    assert [*chain(*(texts_of(part.negative_tokens) for part in parts))] == texts_of(batch.negative_tokens)
    assert {part.negative_count for part in parts} == {3}
    shares = [hard(group=Group(rank, 2))[[3, *INDICES]] for rank in (0, 1)]
    assert [share.rank_negatives for share in shares] == [(6, 3)] * 2
    assert [len(share.negative_tokens) for share in shares] == [6, 3]
    assert [share.negative_rows.tolist() for share in shares] == [[0, 0, 0, 1, 1, 1], [0, 1, 1]]


def test_negatives_that_cannot_be_used_are_counted(hard, make_scenes, make_negatives, tiny_clip, caplog):
    dataset, _ = make_scenes()
    table = make_negatives(dataset)
    long = table.caption.str.startswith("A noisy")
    table.loc[long & (table.image_id == "image1"), "negative"] += " Or is there" + " more" * 40 + "?"
    changed = table.negative[long & (table.image_id == "image5")].iloc[0].replace("Nothing", "Everything")
    beyond = table[long & (table.image_id == "image5")].assign(negative=lambda found: found.caption + " Or not.")
    upper = beyond.assign(negative=lambda found: found.caption.str.upper())
    other = beyond.assign(caption="A caption of nobody.", negative=changed)
    with caplog.at_level(logging.WARNING):
        samples = hard(negatives=pd.concat([table, upper, other]))
    # of the long captions 0, 1, 2 and 3 for each four of the twelve images; the short ones are not trained on
    assert {name: samples.counts[name] for name in list(samples.counts)[-6:]} == {
        "negatives": 18,
        "listed_negatives": 3 * 18 + 2,
        "negatives_of_no_caption": 2 * 18 + 1,
        "negatives_like_their_caption": 1,
        "truncated_negatives": 1,
        "without_negative": 3,
    }
    assert "3 of 12 samples have no hard negative caption" in caplog.text
    assert "1 of 56 listed negatives are to the model the same text as their caption" in caplog.text
    assert "1 of 18 negatives are longer than the text context" in caplog.text
    # the colour lies beyond a shorter context, and is not seen
    front = beyond.assign(negative=beyond.caption.str.replace("A noisy", "No"))
    some = pd.concat([front, table[long & (table.image_id == "image5")]])
    seen = PairDataset(dataset, "train", None, tiny_clip(10), local=False, negatives=some)
    assert (seen.counts["negatives"], seen.counts["negatives_like_their_caption"]) == (1, 1)
    assert texts_of(seen[[5]].negative_tokens) == tokens_of(front.negative, 10)
    with pytest.raises(DataError, match=r"none can be used with the long captions .*dvc repro negatives"):
        hard(negatives=other)


def test_each_short_caption_is_a_sample_of_its_own(hard, make_scenes, tmp_path):
    dataset, _ = make_scenes()
    samples = hard(captions="short", pixel_cache=tmp_path / "pixels")
    assert len(samples) == samples.counts["samples"] == 24 and samples.counts["without_short_caption"] == 0
    captions = [text for texts in dataset.split("train").captions for text in texts]
    batch = samples[[2, 3, 4, 5, 14]]
    assert texts_of(batch.caption_tokens) == tokens_of([captions[index] for index in (2, 3, 4, 5, 14)])
    # both captions of an image have its pixels, its pair and their own negatives
    assert batch.local_rows.tolist() == [0, 1, 2, 3, 4] and batch.negative_rows.tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 4]
    assert torch.equal(batch.images[0], batch.images[1]) and torch.equal(batch.boxes[2], batch.boxes[3])
    assert not batch.spans.any() and "without_visible_span" not in samples.counts  # no sentence is looked for
    assert texts_of(batch.negative_tokens)[:2] == tokens_of(["a blue box", "one blue rectangle"])
    assert len(samples.views.sizes) == 12  # an image is kept once, whatever its captions
    loader = Loader(samples, 6, seed=0)
    for step in range(3 * loader.steps):
        assert len(set(loader.image_ids(step))) == 6
    assert same(hard(captions="short")[[2, 3, 4, 5, 14]], batch)


def test_an_image_without_a_short_caption_is_left_out(make_scenes, tiny_clip, caplog):
    dataset, pairs = make_scenes(count=3)
    dataset.records["captions"] = [["", "one"], [" "], ["two", "three"]] * 2
    samples = PairDataset(dataset, "train", pairs, tiny_clip(), captions="short")
    assert samples.image_ids == ["image0", "image2", "image2"] and samples.groups == [0, 1, 1]
    assert "1 of 3 images have no short caption" in caplog.text
    dataset.records["captions"] = [[]] * 6
    with pytest.raises(DataError, match="no image with a short caption"):
        PairDataset(dataset, "train", pairs, tiny_clip(), captions="short")


def test_what_does_not_fit_the_objective_is_refused(make_scenes, tiny_clip, degla):
    dataset, pairs = make_scenes(count=3)

    def made(objective, **changes):
        return pair_dataset(dataset, "train", pairs, tiny_clip(), objective, replace(CONFIG, **changes), Group(), CPU)

    with pytest.raises(ConfigError, match=r"finetune\.captions = 'short': the TSL terms"):
        made(fast_goal(), captions="short")
    assert len(made(fast_goal(GLOBAL), captions="short")) == 6
    with pytest.raises(ConfigError, match=r"needs hard negative captions.*negatives=rules.*dvc repro negatives"):
        made(degla())


def unit(vector):
    return vector / vector.square().sum().sqrt()


def reference(clip, teacher, dataset, table, indices, weights):
    """The terms and the loss, one image and one text at a time, nothing trimmed."""
    records = dataset.split("train")
    pixels, captions, negatives = [], [], []
    for index in indices:
        record = records.iloc[index]
        with Image.open(dataset.path(record.image_path)) as image:
            pixels.append(clip.view(*image.size).apply(image))
        captions.append(record.long_caption)
        negatives.append(table[(table.image_id == record.image_id) & (table.caption == record.long_caption)].negative.tolist())

    def encoded(model):
        text = lambda one: unit(model.encode_text(tokenize([one], 40)[0])[0])  # noqa: E731
        images = [unit(model.encode_image(one[None])[0]) for one in pixels]
        return images, [text(one) for one in captions], [[text(one) for one in some] for some in negatives]

    images, texts, hard = encoded(clip.model)
    with torch.no_grad():
        own = encoded(teacher.model)
    scale, total = clip.model.logit_scale.exp(), len(indices)
    everything = texts + [one for some in hard for one in some]
    contrast = 0.0
    for i in range(total):
        to_texts = torch.stack([scale * images[i] @ one for one in everything])
        to_images = torch.stack([scale * texts[i] @ one for one in images])
        contrast += (to_texts.logsumexp(0) - to_texts[i] + to_images.logsumexp(0) - to_images[i]) / (2 * total)
    grounded = {"igc": [], "tgc": []}
    for i in range(total):
        for term, query, positive, factor in (("igc", images[i], texts[i], scale), ("tgc", texts[i], own[1][i], 10.0)):
            if hard[i]:
                logits = torch.stack([factor * query @ one for one in (positive, *hard[i])])
                grounded[term].append(logits.logsumexp(0) - logits[0])
    flat = lambda found: [*found[0], *found[1], *(one for some in found[2] for one in some)]  # noqa: E731
    pairs = zip(flat((images, texts, hard)), flat(own), strict=True)
    terms = {
        "global": contrast,
        **{term: sum(found) / len(found) for term, found in grounded.items()},
        "distillation": sum((one - other).square().sum() for one, other in pairs),
    }
    return terms | {"loss": sum(weights[term] * value for term, value in terms.items())}


@pytest.mark.parametrize("parts", [1, 3])
def test_the_step_is_that_of_the_slow_formulation(make_scenes, make_negatives, tiny_clip, degla, parts):
    dataset, _ = make_scenes()
    table, objective = make_negatives(dataset), degla()
    clip, slow, teacher = tiny_clip(), tiny_clip(), tiny_clip(seed=1).eval()
    expected = reference(slow, teacher, dataset, table, INDICES, objective.config.weights)
    expected["loss"].backward()
    batch = PairDataset(dataset, "train", None, clip, local=False, negatives=table)[INDICES]
    step = TrainStep(clip, objective, torch.optim.SGD(clip.parameters(), 0.0), teacher=teacher)
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = step(batch.split(parts))
    assert found.keys() == {*expected, "logit_scale"}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-5), name
    for (name, parameter), other in zip(clip.named_parameters(), slow.parameters(), strict=True):
        largest = max(1.0, other.grad.abs().max().item())  # as in test_reference
        assert (parameter.grad - other.grad).abs().max().item() <= 1e-5 * largest, name
    # images with captions, and the negatives, once each in every part, without a graph
    assert calls == [False] * 2 * parts and all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("indices", [[0, 4, 8], [0, 5, 4]])  # no negative in the batch, and in two parts of three
def test_parts_without_negatives(hard, tiny_clip, degla, indices):
    batch, found = hard(local=False)[indices], []
    for parts in (1, 3):
        clip, teacher = tiny_clip(), tiny_clip(seed=1).eval()
        terms = TrainStep(clip, degla(), torch.optim.SGD(clip.parameters(), 0.0), teacher=teacher)(batch.split(parts))
        assert all(value.isfinite() for value in terms.values())
        found.append([*terms.values(), *(parameter.grad for parameter in clip.parameters())])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_a_step_without_a_teacher_has_none(hard, tiny_clip, degla):
    clip, objective = tiny_clip(), degla(tgc=0.0, distillation=0.0)
    assert objective.teacher_decay is None
    found = TrainStep(clip, objective, torch.optim.SGD(clip.parameters(), 0.0))([hard(local=False)[INDICES]])
    assert found.keys() == {"global", "igc", "loss", "logit_scale"}


def state_of(path, step):
    return torch.load(states(path / "state.pt")[step], weights_only=True)


def test_the_teacher_begins_with_the_start_and_survives_a_kill(make_scenes, make_negatives, tiny_clip, tmp_path, degla):
    (dataset, pairs), objective = make_scenes(), degla()
    config = replace(CONFIG, save_every=1, keep_states=9, ema=0.9, accumulate=2)
    more = {"negatives": make_negatives(dataset)}
    (tmp_path / "whole").mkdir()
    whole, start = tiny_clip(), dict(tiny_clip().named_parameters())
    summary = run(whole, dataset, pairs, tmp_path / "whole", config, objective, **more)
    assert summary["counts"]["without_negative"] == 3 and summary["final"]["distillation"] > 0
    expected = {name: value.detach() for name, value in start.items()}
    for step in range(1, 7):
        state = state_of(tmp_path / "whole", step)
        expected = {name: torch.lerp(value, state["model"][name], 0.5) for name, value in expected.items()}
        for name, value in expected.items():
            torch.testing.assert_close(state["teacher"][name], value, atol=1e-7, rtol=1e-6)
    assert not torch.equal(whole.state_dict()["model.text_projection"], state["teacher"]["model.text_projection"])

    with killed_after(loop_module, 4):
        run(tiny_clip(), dataset, pairs, tmp_path, config, objective, **more)
    continued = tiny_clip(seed=9)
    assert run(continued, dataset, pairs, tmp_path, config, objective, **more)["resumed_at_step"] == 4
    last = state_of(tmp_path, 6)
    for name in ("model", "teacher", "average"):
        assert all(torch.equal(value, last[name][key]) for key, value in state[name].items())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in continued.state_dict().items())
