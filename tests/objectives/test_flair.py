"""FLAIR's pooling and sigmoid loss against the published values and plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from fast_goal.objectives.flair import TextConditionedPooling, sigmoid_loss


@pytest.fixture
def vector(vectors) -> dict:
    return vectors["V7_flair"]


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def published_pooling(inputs: dict) -> TextConditionedPooling:
    pooling = TextConditionedPooling(8, inputs["heads"]).double()
    state = {
        "attention.in_proj_weight": inputs["in_proj_weight"],
        "attention.in_proj_bias": inputs["in_proj_bias"],
        "attention.out_proj.weight": inputs["out_proj_weight"],
        "attention.out_proj.bias": inputs["out_proj_bias"],
    }
    for ours, theirs in (("query", "ln_q"), ("key", "ln_k"), ("value", "ln_v")):
        state[f"norm_{ours}.weight"], state[f"norm_{ours}.bias"] = inputs[theirs]
    pooling.load_state_dict({name: tensor(values) for name, values in state.items()})
    return pooling


def published_case(vector: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = vector["inputs"]
    texts = tensor(inputs["text_features(B*K,D)"])
    queries = texts[torch.tensor(inputs["selected_caption_indices(B,B+K-1)"])]  # [B, B+K-1, D]
    return published_pooling(inputs)(tensor(inputs["image_tokens(B,L,D)"]), queries), queries, texts


def test_published_pooling(vector):
    found, _, _ = published_case(vector)
    # the published features are what comes out of the module, before the caller normalises
    torch.testing.assert_close(found, tensor(vector["outputs"]["conditioned_features(B,B+K-1,D)"]), rtol=0, atol=1e-8)


def test_published_losses(vector):
    pooled, queries, texts = published_case(vector)
    inputs, outputs = vector["inputs"], vector["outputs"]
    scale, bias = inputs["logit_scale_exp"], inputs["logit_bias"]
    logits = scale * (F.normalize(pooled, dim=-1) * F.normalize(queries, dim=-1)).sum(-1) + bias
    conditioned = sigmoid_loss(logits, tensor(outputs["tcs_labels"]) > 0)
    assert conditioned.item() == pytest.approx(outputs["tcs_loss"], abs=1e-8)
    image = F.normalize(tensor(inputs["image_features(B,D)"]), dim=-1)
    logits = scale * image @ F.normalize(texts, dim=-1).T + bias
    positive = sigmoid_loss(logits, tensor(outputs["mps_labels"]) > 0)
    assert positive.item() == pytest.approx(outputs["mps_loss"], abs=1e-8)
    assert (conditioned + positive).item() / 2 == pytest.approx(outputs["total_loss=(tcs+mps)/2"], abs=1e-8)


def slow_pooling(pooling: TextConditionedPooling, tokens: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """One text and one image: tokens [N, D], query [D]; head by head, with the zero token written out."""
    width, heads = len(query), pooling.attention.num_heads
    weights = pooling.attention.in_proj_weight.chunk(3)
    biases = pooling.attention.in_proj_bias.chunk(3)
    q = weights[0] @ pooling.norm_query(query) + biases[0]
    keys = [weights[1] @ pooling.norm_key(token) + biases[1] for token in tokens] + [torch.zeros(width, dtype=q.dtype)]
    values = [weights[2] @ pooling.norm_value(token) + biases[2] for token in tokens] + [torch.zeros(width, dtype=q.dtype)]
    mixed = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        logits = [(q[part] @ key[part]).item() / math.sqrt(width / heads) for key in keys]
        total = sum(math.exp(logit) for logit in logits)
        mixed.append(sum(math.exp(logit) / total * value[part] for logit, value in zip(logits, values, strict=True)))
    return pooling.attention.out_proj(torch.cat(mixed))


@pytest.mark.parametrize("training", [True, False])
def test_pooling_against_loops(training):
    torch.manual_seed(0)
    pooling = TextConditionedPooling(6, 3).double().train(training)
    for weight in pooling.parameters():
        torch.nn.init.normal_(weight)
    tokens, queries = torch.randn(2, 5, 6).double(), torch.randn(2, 4, 6).double()
    with torch.no_grad():
        found = pooling(tokens, queries)
        for image in range(2):
            for text in range(4):
                torch.testing.assert_close(found[image, text], slow_pooling(pooling, tokens[image], queries[image, text]))


def test_parameter_names():
    names = {name.split(".")[0] for name, _ in TextConditionedPooling(4, 2).named_parameters()}
    assert names == {"attention", "norm_query", "norm_key", "norm_value"}


def test_pooling_gradient():
    torch.manual_seed(0)
    pooling = TextConditionedPooling(4, 2).double()
    arguments = [torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 2, 4).double().requires_grad_()]
    assert torch.autograd.gradcheck(pooling, arguments)


def test_sigmoid_loss_against_loops():
    generator = torch.Generator().manual_seed(2)
    logits = 5 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    positives = torch.rand(3, 4, generator=generator) < 0.4
    expected = 0.0
    for row, chosen in zip(logits.tolist(), positives.tolist(), strict=True):
        expected += sum(math.log1p(math.exp(-logit if own else logit)) for logit, own in zip(row, chosen, strict=True))
    assert sigmoid_loss(logits, positives).item() == pytest.approx(expected / 4, abs=1e-10)


def test_sigmoid_loss_gradient_and_large_logits():
    positives = torch.tensor([[True, False], [False, False]])
    logits = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: sigmoid_loss(values, positives), logits)
    extreme = torch.tensor([[-1e4, 1e4], [1e4, -1e4]], requires_grad=True)
    loss = sigmoid_loss(extreme, positives)
    loss.backward()
    assert loss.item() == pytest.approx(1.5e4) and extreme.grad.isfinite().all()
