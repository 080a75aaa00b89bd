"""The training step against a slow formulation of the method, in value and gradient.

`reference` follows METHOD section 3 one sample at a time: every input is encoded again for each use and nothing is trimmed;
pixels come from open_clip's own transform, boxes from a formula for each view, tokens from counting, losses from loops.
"""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from test_alignment import slow_goal_patches, slow_goal_positions
from tiny import scratch_config

import fast_goal
from fast_goal.data.captions import tokenize
from fast_goal.data.images import CLIP_MEAN, CLIP_STD
from fast_goal.model.clip import build_scratch
from fast_goal.objectives import make_objective
from fast_goal.training.batches import PairDataset
from fast_goal.training.step import TrainStep

OBJECTIVES = {
    path.stem: values
    for path in sorted(Path(fast_goal.__file__).parent.glob("conf/objective/*.yaml"))
    if (values := yaml.safe_load(path.read_text()))["name"] == "fast_goal"
}
DEFAULT = OBJECTIVES["fast_goal"]
RESIZE_MODES = {"crop": "shortest", "squash": "squash", "pad": "longest"}


def unit(vector):
    return vector / vector.square().sum().sqrt()


def tower_tokens(tower, run):
    """What leaves the last block of a tower while `run` runs."""
    caught = []
    hook = tower.resblocks[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    run()
    hook.remove()
    return caught[0]


def input_box(xyxy, width, height, size, view):
    """The box in pixels of the input, not clipped."""
    if view == "squash":
        resized, offset = (size, size), (0, 0)
    elif view == "pad":
        ratio = max(width, height) / size
        resized = round(width / ratio), round(height / ratio)
        offset = -((size - resized[0]) // 2), -((size - resized[1]) // 2)
    else:
        short = min(width, height)
        resized = int(size * width / short), int(size * height / short)
        offset = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    across, down = resized[0] / width, resized[1] / height
    x1, y1, x2, y2 = xyxy
    return x1 * across - offset[0], y1 * down - offset[1], x2 * across - offset[0], y2 * down - offset[1]


def exact_patches(xyxy, width, height, size, patch, view):
    x1, y1, x2, y2 = input_box(xyxy, width, height, size, view)
    covered = []
    for number in range((size // patch) ** 2):
        left, top = number % (size // patch) * patch, number // (size // patch) * patch
        if min(x2, left + patch) > max(x1, left) and min(y2, top + patch) > max(y1, top):
            covered.append(number)
    return covered


def exact_positions(caption, char_start, sentence, context_length):
    before = int(tokenize([caption[:char_start]], 1000)[1]) - 2
    count = int(tokenize([sentence], 1000)[1]) - 2
    return [at for at in range(1 + before, 1 + before + count) if at < context_length - 1]


def iou(a, b):
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(across, 0) * max(down, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def reference(clip, dataset, pairs, indices, values=DEFAULT, view="crop"):
    """The terms and the loss of the objective `values`, as in conf/objective."""
    from open_clip import image_transform

    model, size, patch = clip.model, clip.image_size, clip.patch_size
    transform = image_transform(size, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode=RESIZE_MODES[view])
    goal = values["alignment"] == "goal"
    images, texts, crops, sentences, regions, spans = [], [], [], [], [], []
    owners, weights, boxes, said = [], [], [], []

    def encode_image(picture):
        return unit(model.encode_image(transform(picture)[None])[0])

    def encode_text(text):
        return unit(model.encode_text(tokenize([text], clip.context_length)[0])[0])

    for index in indices:
        record = dataset.split("train").iloc[index]
        with Image.open(dataset.path(record.image_path)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        caption = record.long_caption
        images.append(encode_image(picture))
        texts.append(encode_text(caption))
        own = pairs[pairs.image_id == record.image_id]
        for pair in own.itertuples():
            owners.append(index)
            weights.append(pair.weight / own.weight.sum())
            said.append(pair.sentence)
            box = (pair.x1, pair.y1, pair.x2, pair.y2)
            boxes.append(box)
            crops.append(encode_image(picture.crop((*map(math.floor, box[:2]), *map(math.ceil, box[2:])))))
            sentences.append(encode_text(pair.sentence))
            if goal:
                covered = slow_goal_patches(box, *picture.size, size, patch)
                length = int(tokenize([caption], 1000)[1])
                found = slow_goal_positions(caption, pair.sentence, clip.context_length)
                covering = [at for at in found if at < length]  # no padding
            else:
                covered = exact_patches(box, *picture.size, size, patch, view)
                covering = exact_positions(caption, pair.char_start, pair.sentence, clip.context_length)
            hidden = tower_tokens(model.visual.transformer, lambda p=picture: model.encode_image(transform(p)[None]))[0]
            seen = [hidden[1 + number] for number in covered]
            regions.append(unit(model.visual.ln_post(sum(seen) / len(seen)) @ model.visual.proj) if seen else None)
            tokens = tokenize([caption], clip.context_length)[0]
            hidden = tower_tokens(model.transformer, lambda t=tokens: model.encode_text(t))[0]
            seen = [hidden[at] for at in covering]
            spans.append(unit(model.ln_final(sum(seen) / len(seen)) @ model.text_projection) if seen else None)

    def are_negatives(i, j):
        if owners[i] != owners[j]:
            return True
        limit = values["in_image_negatives"]
        return limit is not None and boxes[i] != boxes[j] and said[i] != said[j] and iou(boxes[i], boxes[j]) <= limit

    def contrast(left, right, negatives, weights):
        total = 0.0
        for own in range(len(left)):
            others = [other for other in range(len(left)) if other == own or negatives(own, other)]
            for queries, candidates in ((left, right), (right, left)):
                logits = {other: model.logit_scale.exp() * queries[own] @ candidates[other] for other in others}
                total = total + weights[own] * (torch.logsumexp(torch.stack([*logits.values()]), 0) - logits[own])
        return total / sum(weights) / 2

    def tsl(pooled, targets):
        total = parts = 0.0
        for i, a in enumerate(pooled):
            for j, b in enumerate(targets):
                if a is None or pooled[j] is None or (i != j and values["target_matrix"] == "diagonal"):
                    continue
                share = weights[i] if i == j else weights[i] * weights[j] * (owners[i] != owners[j])
                total, parts = total + share, parts + share * (a @ b - float(i == j)) ** 2
        return parts / total if total else 0.0 * texts[0].sum()

    everyone = lambda i, j: True  # noqa: E731
    terms = {"global": contrast(images, texts, everyone, [1.0] * len(images))}
    nothing = 0.0 * texts[0].sum()
    terms["local"] = contrast(crops, sentences, are_negatives, weights) if crops else nothing
    terms["tsl_image"], terms["tsl_text"] = tsl(regions, crops), tsl(spans, sentences)
    terms = {name: value for name, value in terms.items() if values["weights"][name]}
    return terms | {"loss": sum(values["weights"][name] * value for name, value in terms.items())}


def make_clip(context_length=40, **changes):
    return build_scratch(scratch_config(**changes), context_length=context_length, seed=0)


@pytest.fixture
def scenes(make_scenes):
    """Images 0, 3 and 9 are as made. 1: stored on its side, with three pairs, of which two regions overlap. 2: upright, with
    two pairs of one sentence that the caption says twice. 4: a box that the centre crop cuts off. 5: a sentence of which the
    context shows a part, and one beyond it. 6: a second pair of the same region. 7: no pair. 8: two boxes of
    less than an input pixel, one of them on the border of two patches."""
    dataset, pairs = make_scenes()
    records = dataset.records
    pairs = pairs.drop(7).astype({"x1": float, "y1": float, "x2": float, "y2": float})

    def caption_of(number):
        return records.loc[records.image_id == f"image{number}", "long_caption"].iloc[0]

    def describe(number, caption):
        records.loc[records.image_id == f"image{number}", "long_caption"] = caption

    def pair(number, sentence, box, weight, rank, last=False):
        caption = caption_of(number)
        start = caption.rindex(sentence) if last else caption.index(sentence)
        where = {"char_start": start, "char_end": start + len(sentence), "weight": weight, "rank": rank}
        return {
            "image_id": f"image{number}",
            "sentence": sentence,
            **where,
            **dict(zip(["x1", "y1", "x2", "y2"], box, strict=True)),
        }

    with Image.open(dataset.path("images/1.png")) as picture:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise when it is shown
        turned = picture.transpose(Image.Transpose.ROTATE_90)
        turned.save(dataset.root / "images/1.jpg", quality=95, exif=exif)
    records.loc[records.image_id == "image1", "image_path"] = "images/1.jpg"
    with Image.open(dataset.path("images/2.png")) as picture:
        picture.transpose(Image.Transpose.TRANSPOSE).save(dataset.root / "images/2.png")
    records.loc[records.image_id == "image2", ["width", "height"]] = [40, 62]
    describe(2, "It is tall. A dog sleeps there. It is tall.")
    first = "The first sentence has very many words indeed, more than anybody would ask for in a picture as small as this."
    describe(5, f"{first} The second one is cut off in its middle by the context that the text has. The third one is not seen.")
    made = [
        pair(1, "There is a green box at the left.", (9.0, 5.0, 31.0, 25.5), 0.5, 1),
        pair(1, "Nothing else is seen.", (10.0, 6.0, 33.0, 27.0), 0.3, 2),
        pair(1, "A noisy picture number 1.", (35.25, 2.0, 60.0, 39.5), 0.2, 3),
        pair(2, "It is tall.", (3.0, 0.0, 25.0, 30.0), 0.75, 1),
        pair(2, "It is tall.", (3.0, 35.0, 38.0, 62.0), 0.25, 2, last=True),
        pair(4, "There is a purple box at the left.", (0.0, 3.0, 8.0, 30.0), 1.0, 1),
        pair(5, "The second one is cut off in its middle by the context that the text has.", (13.0, 5.0, 35.0, 25.5), 0.5, 1),
        pair(5, "The third one is not seen.", (0.0, 0.0, 65.0, 40.0), 0.5, 2),
        pair(6, "Nothing else is seen.", tuple(pairs.loc[6, ["x1", "y1", "x2", "y2"]]), 0.5, 2),
        pair(8, "There is a brown box at the left.", (30.1, 20.1, 30.4, 20.3), 0.5, 1),
        pair(8, "Nothing else is seen.", (30.1, 22.1, 30.4, 22.3), 0.5, 2),
    ]
    pairs.loc[6, "weight"] = 0.5
    kept = pairs[~pairs.image_id.isin([f"image{number}" for number in (1, 2, 4, 5, 8)])]
    return dataset, pd.concat([kept, pd.DataFrame(made)], ignore_index=True)


INDICES = [7, 1, 4, 2, 6, 5, 8, 0]


def compare(make, dataset, pairs, indices, values, view="crop", parts=1):
    """The step of one batch against `reference`; the samples and the batch."""
    clip, slow = make(), make()
    clip.view_mode = view
    objective = make_objective(values)
    samples = PairDataset(dataset, "train", pairs, clip, local=objective.needs_local, best=False, alignment=objective.alignment)
    batch = samples[indices]
    expected = reference(slow, dataset, pairs, indices, values, view)
    expected["loss"].backward()
    found = TrainStep(clip, objective, torch.optim.SGD(clip.parameters(), 0.0))(batch.split(parts))
    assert found.keys() == {*expected, "logit_scale"}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), abs=1e-5), name
    for (name, parameter), other in zip(clip.named_parameters(), slow.parameters(), strict=True):
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in (parameter, other)]
        largest = max(1.0, grads[1].abs().max().item())  # float32 sums of large and small parts are rounded by the large ones
        assert (grads[0] - grads[1]).abs().max().item() <= 1e-5 * largest, name
    return samples, batch


@pytest.mark.parametrize("target_matrix", ["diagonal", "identity"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(scenes, name, target_matrix):
    values = OBJECTIVES[name] | {"target_matrix": target_matrix}
    samples, batch = compare(make_clip, *scenes, INDICES, values)
    if name == "global":
        assert not len(batch.local_rows)
    else:
        assert batch.local_rows.tolist() == [1, 1, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
        # image 5's third sentence and image 4's box; goal gives them tokens, and none to a box of image 8
        hidden_span, hidden_box = ([], [10]) if name == "goal" else ([9], [3])
        assert [row for row, span in enumerate(batch.spans) if not span.any()] == hidden_span
        assert [row for row, box in enumerate(batch.boxes) if not box.any()] == hidden_box
        assert samples.counts["without_visible_span"] == len(hidden_span)
        assert samples.counts["without_visible_box"] == len(hidden_box)


@pytest.mark.parametrize("name", ["fast_goal", "goal", "hard_negatives"])
def test_in_parts(scenes, name):
    compare(make_clip, *scenes, INDICES, OBJECTIVES[name], parts=3)


@pytest.mark.parametrize("alignment", ["exact", "goal"])
@pytest.mark.parametrize("view", ["crop", "squash", "pad"])
def test_every_view(scenes, view, alignment):
    values = DEFAULT | {"alignment": alignment}
    samples, _ = compare(lambda: make_clip(image_size=96, patch_size=16), *scenes, INDICES, values, view)
    assert samples.counts["without_visible_box"] == int(view == "crop" and alignment == "exact")


@pytest.mark.parametrize("alignment", ["exact", "goal"])
@pytest.mark.parametrize(("size", "patch"), [(224, 16), (224, 14), (336, 14)])
def test_every_size(scenes, size, patch, alignment):
    """ViT-B/16, ViT-L/14 and ViT-L/14 at 336 pixels, of tiny width; test_every_view has the demo's 96 and 16."""
    values = DEFAULT | {"alignment": alignment}
    compare(lambda: make_clip(image_size=size, patch_size=patch, vision_layers=1), *scenes, [1, 4, 5, 8], values)


@pytest.mark.parametrize("name", ["fast_goal", "goal", "hard_negatives"])
def test_no_pair_in_the_batch(scenes, name):
    dataset, pairs = scenes
    compare(make_clip, dataset, pairs[pairs.image_id == "image9"], [7, 1, 4], OBJECTIVES[name])


@pytest.mark.parametrize("name", ["fast_goal", "goal", "hard_negatives"])
def test_some_without_a_pair(scenes, name):
    dataset, pairs = scenes
    _, batch = compare(make_clip, dataset, pairs[pairs.image_id.isin(["image2", "image4"])], [7, 1, 4, 2], OBJECTIVES[name])
    assert batch.local_rows.tolist() == [2, 3, 3]


def test_neither_box_nor_span(scenes):
    """Of the only two pairs one has no visible box and the other no visible span."""
    dataset, pairs = scenes
    some = pairs[(pairs.image_id == "image4") | (pairs.sentence == "The third one is not seen.")]
    samples, batch = compare(make_clip, dataset, some, [5, 4, 7], DEFAULT)
    assert batch.boxes[1].tolist() == [0] * 4 and batch.spans[0].tolist() == [0, 0]
    assert samples.counts["without_visible_box"] == samples.counts["without_visible_span"] == 1


def test_in_image_negatives_change_the_gradient(scenes):
    """What `test_every_objective` compares for hard_negatives is another loss than that of fast_goal."""
    dataset, pairs = scenes
    losses = {
        name: reference(make_clip(), dataset, pairs, INDICES, OBJECTIVES[name])["local"].item()
        for name in ("fast_goal", "hard_negatives")
    }
    assert losses["hard_negatives"] > losses["fast_goal"] + 0.01
