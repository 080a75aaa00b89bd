"""Boxes to patches, spans to tokens, and the masked mean, against loops over single patches and tokens."""

import math

import pytest
import torch

from fast_goal.errors import ModelError
from fast_goal.model.tokens import masked_mean, patch_mask, span_mask


def slow_patches(box: list[float], size: int, patch: int) -> list[int]:
    """Patch by patch: is the common area positive?"""
    grid, covered = size // patch, []
    for row in range(grid):
        for column in range(grid):
            width = min(box[2], (column + 1) * patch) - max(box[0], column * patch)
            height = min(box[3], (row + 1) * patch) - max(box[1], row * patch)
            if width > 0 and height > 0:
                covered.append(row * grid + column)
    return covered


def patches(box: list[float], size: int = 224, patch: int = 16) -> list[int]:
    return patch_mask(torch.tensor([box], dtype=torch.float64), size, patch)[0].nonzero().flatten().tolist()


def test_random_boxes():
    generator = torch.Generator().manual_seed(0)
    for size, patch in ((224, 16), (96, 16), (224, 14), (8, 8)):
        corners = torch.rand(50, 2, 2, generator=generator, dtype=torch.float64).sort(dim=1).values * size * 1.4 - 0.2 * size
        boxes = corners.flatten(1)
        boxes[::3] = boxes[::3].round()  # whole pixels, often on the border of a patch
        mask = patch_mask(boxes, size, patch)
        assert mask.dtype == torch.bool and mask.shape == (50, (size // patch) ** 2)
        for box, row in zip(boxes.tolist(), mask, strict=True):
            assert row.nonzero().flatten().tolist() == slow_patches(box, size, patch)


def test_published_map(vectors):
    """The published map squashes the box onto the input, rounds it to whole pixels, and counts the class token as 0.

    Ours takes a box already in input pixels, fractions and all. The two agree wherever rounding does not decide: it makes
    a box of 0.1 pixels vanish (the published mean is then NaN; here it covers its patch), and a box without width that
    lies off a border covers a patch there (here it covers none, and takes no part in the loss).
    """
    differ = {"one pixel top-left": [0], "degenerate off border x1=x2 -> 17": []}
    for case in vectors["V2_bbox_to_patch"]["cases"]:
        across, down = case["image_size"] / case["width"], case["image_size"] / case["height"]
        box = [case["x1"] * across, case["y1"] * down, case["x2"] * across, case["y2"] * down]
        published = [] if isinstance(case["indices"], str) else [index - 1 for index in case["indices"]]
        found = patches(box, case["image_size"], case["patch"])
        assert found == differ.get(case["name"], published), case["name"]
        if case["name"] in differ:
            assert found != published


def test_smallest_boxes_cover_one_patch():
    assert patches([0, 0, 1e-3, 1e-3]) == [0]
    assert patches([223.999, 223.999, 224, 224]) == [195]
    assert patches([15.5, 0, 16, 16]) == [0]
    assert patches([16, 0, 16.5, 16]) == [1]
    assert patches([15.99, 15.99, 16.01, 16.01]) == [0, 1, 14, 15]


@pytest.mark.parametrize(
    "box",
    [[0, 0, 0, 0], [5, 5, 5, 9], [9, 5, 5, 9], [224, 0, 300, 50], [-9, -9, 0, 0], [math.nan, 0, 9, 9], [0, 0, 9, math.nan]],
)
def test_boxes_without_area_cover_nothing(box):
    assert patches(box) == []


def test_boxes_beyond_the_input_are_cut():
    assert patches([-math.inf, -5, math.inf, 500]) == list(range(196))
    assert patches([-50, -50, 1, 1]) == [0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float32, torch.float64])
def test_box_dtypes(dtype):
    assert (
        patch_mask(torch.tensor([[0, 0, 32, 17]], dtype=dtype), 64, 16)[0].tolist()
        == [True, True, False, False] * 2 + [False] * 8
    )


def test_no_boxes():
    assert patch_mask(torch.zeros(0, 4), 224, 16).shape == (0, 196)


def test_patches_have_to_fill_the_input():
    with pytest.raises(ModelError, match="224 is not a multiple of patch size 15"):
        patch_mask(torch.zeros(1, 4), 224, 15)


def test_span_mask():
    mask = span_mask(torch.tensor([[1, 3], [0, 0], [2, 9], [0, 5]]), 5)
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert mask.dtype == torch.bool and span_mask(torch.zeros(0, 2, dtype=torch.long), 5).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_mean(dtype):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(6, 7, 3, generator=generator).to(dtype)
    mask = torch.rand(6, 7, generator=generator) < 0.4
    mask[2] = False
    found = masked_mean(tokens, mask)
    assert found.dtype == dtype and found.shape == (6, 3)
    for row, (values, keep) in enumerate(zip(tokens.tolist(), mask.tolist(), strict=True)):
        chosen = [value for value, kept in zip(values, keep, strict=True) if kept]
        mean = [sum(column) / len(chosen) for column in zip(*chosen, strict=True)] if chosen else [0.0] * 3
        assert found[row].tolist() == pytest.approx(mean, abs=1e-6 if dtype != torch.bfloat16 else 0.02)


def test_masked_mean_gradient():
    tokens = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda values: masked_mean(values, mask), tokens)
    masked_mean(tokens, mask).square().sum().backward()
    assert tokens.grad.isfinite().all() and not tokens.grad[1].any()


def test_masked_mean_does_not_depend_on_padding():
    tokens, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(masked_mean(tokens, mask), masked_mean(tokens[:, :3], mask[:, :3]))


def test_published_means(vectors):
    inputs, outputs = (vectors["V4_goal_losses"][key] for key in ("inputs", "outputs"))
    tokens = torch.tensor(inputs["patch_tokens_preLN(B,1+4,D)"], dtype=torch.float64)[:, 1:]
    boxes = torch.tensor(inputs["boxes(x1,y1,x2,y2,W,H) on 32px/16 patches"], dtype=torch.float64)
    boxes = boxes[:, :4] * 32 / boxes[:, 4:].repeat(1, 2)
    expected = torch.tensor(outputs["pooled_patch"], dtype=torch.float64)
    torch.testing.assert_close(masked_mean(tokens, patch_mask(boxes, 32, 16)), expected, rtol=0, atol=1e-9)
    text = torch.tensor(inputs["text_tokens_preLN(B,8,D)"], dtype=torch.float64)
    spans = torch.tensor(inputs["token_ranges[start,end)"])
    expected = torch.tensor(outputs["pooled_text"], dtype=torch.float64)
    torch.testing.assert_close(masked_mean(text, span_mask(spans, text.shape[1])), expected, rtol=0, atol=1e-9)
