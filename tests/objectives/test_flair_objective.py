"""FLAIR's two losses against loops over single images and texts, in value and gradient, and shared by processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_flair import published_pooling, slow_pooling, tensor

from fast_goal.configure import compose
from fast_goal.errors import ConfigError
from fast_goal.model.pooling import PoolingHead
from fast_goal.objectives import Features, Shares, check_objectives, make_objective
from fast_goal.objectives.flair import TextConditionedPooling, conditioned_loss, multi_positive_loss

B, N, K, D, HEADS = 4, 5, 3, 6, 2
SCALE, BIAS = 7.0, -2.0
DRAWN = {"count": K, "most_sentences": 3, "consecutive": 0.5}


def case(batch: int = B, seed: int = 0):
    """Pooling, patches [B, N, D], texts [B, K, D], choices [B, B], images [B, D], all with gradients in double."""
    torch.manual_seed(seed)
    pooling = TextConditionedPooling(D, HEADS).double()
    for weight in pooling.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    patches, texts = (torch.randn(batch, rows, D).double().requires_grad_() for rows in (N, K))
    images = F.normalize(torch.randn(batch, D).double(), dim=-1).requires_grad_()
    return pooling, patches, texts, torch.randint(K, (batch, batch)), images


def log_sigmoid(value: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(torch.exp(-value))


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.square().sum().sqrt()


def slow_tcs(pooling, patches, texts, choices):
    total = 0.0
    for i in range(len(texts)):
        for j in range(len(texts)):
            for k in range(K):
                if i != j and k != choices[i, j]:
                    continue
                cosine = unit(slow_pooling(pooling, patches[i], texts[j, k])) @ unit(texts[j, k])
                total = total - log_sigmoid((SCALE * cosine + BIAS) * (1 if i == j else -1))
    return total / (len(texts) + K - 1)


def slow_mps(images, texts):
    total = 0.0
    for i in range(len(texts)):
        for j in range(len(texts)):
            for k in range(K):
                total = total - log_sigmoid((SCALE * images[i] @ unit(texts[j, k]) + BIAS) * (1 if i == j else -1))
    return total / (len(texts) * K)


def gradients(loss, values):
    return torch.autograd.grad(loss, values)


@pytest.mark.parametrize("block", [1, 2, 4, 128])
@pytest.mark.parametrize("batch", [1, B])
def test_tcs_against_loops(block, batch):
    pooling, patches, texts, choices, _ = case(batch)
    with torch.no_grad():
        found = conditioned_loss(pooling, patches, texts, choices, 0, SCALE, BIAS, block)
        assert found.item() == pytest.approx(slow_tcs(pooling, patches, texts, choices).item(), abs=1e-10)


def test_the_gradient_of_tcs_is_the_same_in_blocks_of_any_size():
    pooling, patches, texts, choices, _ = case()
    values = [patches, texts, *pooling.parameters()]

    def whole():
        """All texts of all images at once, picked from the full product afterwards."""
        logits = SCALE * F.cosine_similarity(pooling(patches, texts.flatten(0, 1)[None].expand(B, -1, -1)), flat[None], -1)
        logits = (logits + BIAS).unflatten(1, (B, K))
        own = torch.eye(B, dtype=torch.bool)[..., None]
        asked = own | F.one_hot(choices, K).bool()
        terms = -F.logsigmoid(torch.where(own, logits, -logits))
        return (terms * asked).sum() / (B + K - 1)

    flat = texts.flatten(0, 1)
    expected = gradients(whole(), values)
    for block in (1, 2, 3, 4, 5, 128):
        found = gradients(conditioned_loss(pooling, patches, texts, choices, 0, SCALE, BIAS, block), values)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_mps_against_loops():
    _, _, texts, _, images = case()
    found, expected = multi_positive_loss(images, texts, 0, SCALE, BIAS), slow_mps(images, texts)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradients(found, [images, texts]), gradients(expected, [images, texts]), atol=1e-12, rtol=1e-9)


def test_gradients_of_both_by_differences():
    pooling, patches, texts, choices, images = case(batch=2)
    scale, bias = torch.tensor(3.0).double().requires_grad_(), torch.tensor(-1.0).double().requires_grad_()
    names = [name for name, _ in pooling.named_parameters()]

    def tcs(patches, texts, scale, bias, *weights):
        weights = dict(zip(names, weights, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(pooling, weights):
            return conditioned_loss(pooling, patches, texts, choices[:2, :2], 0, scale, bias, block=2)

    assert torch.autograd.gradcheck(tcs, (patches, texts, scale, bias, *pooling.parameters()), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *one: multi_positive_loss(one[0], one[1], 0, *one[2:]), (images, texts, scale, bias))


def test_published_losses(vectors):
    vector = vectors["V7_flair"]
    inputs, outputs = vector["inputs"], vector["outputs"]
    flat, patches = tensor(inputs["text_features(B*K,D)"]), tensor(inputs["image_tokens(B,L,D)"])
    batch, count = len(patches), len(flat) // len(patches)
    choices = torch.zeros(batch, batch, dtype=torch.int64)
    for row, asked in enumerate(inputs["selected_caption_indices(B,B+K-1)"]):
        for index in asked:
            if index // count != row:
                choices[row, index // count] = index % count
    scale, bias = inputs["logit_scale_exp"], inputs["logit_bias"]
    texts = flat.unflatten(0, (batch, count))
    tcs = conditioned_loss(published_pooling(inputs), patches, texts, choices, 0, scale, bias, block=2)
    images = F.normalize(tensor(inputs["image_features(B,D)"]), dim=-1)
    mps = multi_positive_loss(images, texts, 0, scale, bias)
    assert tcs.item() == pytest.approx(outputs["tcs_loss"], abs=1e-8)
    assert mps.item() == pytest.approx(outputs["mps_loss"], abs=1e-8)


class Half(Shares):
    """One of two processes, which is given what the other one has."""

    def __init__(self, first: int, texts: torch.Tensor):
        self.first, self.texts = first, texts

    def rows(self, own):
        return torch.cat([self.texts[: self.first], own, self.texts[self.first + len(own) :]])


def features(pooling, patches, texts, choices, images, shares=None) -> Features:
    head = PoolingHead(D, HEADS).double()
    head.pooling = pooling
    shared = {} if shares is None else {"shares": shares}
    return Features(
        image_global=images,
        patches=patches,
        sub_queries=texts,
        sub_choices=choices,
        pooling=head,
        scale=torch.ones(()),
        **shared,
    )


def flair(tcs: float = 0.5, mps: float = 0.5):
    return make_objective({"name": "flair", "weights": {"tcs": tcs, "mps": mps}, "sub_captions": DRAWN, "heads": HEADS})


def test_shares_add_up_to_the_whole():
    pooling, patches, texts, choices, images = case()
    whole = flair()(features(pooling, patches, texts, choices, images))
    for name in ("tcs", "mps", "loss"):
        parts = 0.0
        for first, last in ((0, 1), (1, 4)):
            shares = Half(first, texts.detach())
            own = features(pooling, patches[first:last], texts[first:last], choices[first:last], images, shares)
            parts += flair()(own)[name].item()
        assert parts == pytest.approx(whole[name].item(), abs=1e-10), name


def test_terms_and_what_is_told_of_the_head():
    given = features(*case())
    found = flair()(given)
    assert list(found) == ["tcs", "mps", "sigmoid_scale", "sigmoid_bias", "loss"]
    assert found["loss"].item() == pytest.approx((found["tcs"] + found["mps"]).item() / 2)
    assert found["sigmoid_scale"].item() == pytest.approx(1 / 0.07) and found["sigmoid_bias"].item() == -10
    with torch.no_grad():
        given.pooling.logit_bias.add_(1)
    assert found["sigmoid_bias"].item() == -10  # as it was
    assert "tcs" not in flair(tcs=0.0)(given) and "mps" not in flair(mps=0.0)(given)


def test_half_precision_is_computed_in_float32():
    pooling, patches, texts, choices, images = case()
    half = [value.detach().bfloat16() for value in (patches, texts, images)]
    given = features(pooling.float(), half[0], half[1], choices, half[2])
    given.pooling.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flair()(given)
    exact = flair()(features(pooling, *(value.float() for value in half[:2]), choices, half[2].float()))
    assert found["loss"].dtype == torch.float32 and math.isclose(found["loss"].item(), exact["loss"].item(), rel_tol=1e-6)


def params(*overrides: str):
    from fast_goal.config import Params, build

    return build(Params, compose(["experiment=demo_flair", *overrides]), "params.yaml")


def test_what_does_not_fit_is_refused_before_any_work():
    check_objectives(params())
    with pytest.raises(ConfigError, match=r"finetune\.captions = 'short': the sub-captions"):
        check_objectives(params("finetune.captions=short"))
    with pytest.raises(
        ConfigError, match=r"objective\.heads = 7 does not divide base\.scratch\.embed_dim = 128\. Set objective\.heads=8"
    ):
        check_objectives(params("objective.heads=7"))
    for bad in ("objective.sub_captions.consecutive=1.5", "objective.sub_captions.count=0", "objective.heads=0"):
        with pytest.raises(ConfigError, match=bad.split("=")[0].replace(".", r"\.")):
            check_objectives(params(bad))


def test_two_stages_have_one_pooling():
    both = ("intermediate=before", "intermediate.dataset=scenes", "objective@intermediate.objective=flair")
    check_objectives(params(*both))
    with pytest.raises(ConfigError, match=r"^objective\.heads = 4 and intermediate\.objective\.heads = 8: .*Set the same"):
        check_objectives(params(*both, "objective.heads=4"))


def test_parts_of_a_sum_share_what_is_drawn():
    part = compose(["objective=flair"])["objective"]
    fine = compose(["objective=fast_goal"])["objective"]

    def weighted(other):
        described = {"parts": part, "words": other, "fine": fine}
        return {"name": "weighted", "parts": {name: {"weight": 1.0, "objective": one} for name, one in described.items()}}

    made = make_objective(weighted(part))
    assert made.heads == part["heads"] and made.sub_captions.count == part["sub_captions"]["count"]
    assert made.needs_captions and made.needs_local and not make_objective(part).needs_captions
    for changes, word in (({"heads": 4}, "heads"), ({"sub_captions": {**part["sub_captions"], "count": 2}}, "sub_captions")):
        with pytest.raises(ConfigError, match=f"{word} is .*set it to the same in all"):
            make_objective(weighted(part | changes))
