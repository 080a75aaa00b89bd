"""The stretched position table against the published one, and against a slow reading of the rule."""

import pytest
import torch

from fast_goal.errors import ModelError
from fast_goal.model.positions import Stretch, stretch_positions


def slow_stretch(table: list[list[float]], length: int, keep: int) -> list[list[float]]:
    """Row by row: where row p lies in the old table, then a straight line through the two rows around it."""
    count, rows = len(table), []
    ratio = (length - keep) / (count - keep)
    for p in range(length):
        place = p if p < keep else keep + (p - keep) / ratio
        left = min(int(place + 1e-9), count - 2)
        rows.append([a + (place - left) * (b - a) for a, b in zip(table[left], table[left + 1], strict=True)])
    return rows


def test_published_table(vectors):
    vector = vectors["V1_pos_interp_77x4_to_248"]
    found = stretch_positions(torch.tensor(vector["input"], dtype=torch.float64), 248)
    expected = torch.tensor(vector["output"], dtype=torch.float64)
    assert found.dtype == torch.float64 and found.shape == (248, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for row, values in vector["key_rows"].items():
        assert found[int(row)].tolist() == pytest.approx(values, abs=1e-9)
    assert found.sum(0).tolist() == pytest.approx(vector["column_sums"], abs=1e-6)


@pytest.mark.parametrize(
    ("count", "length", "keep"), [(77, 248, 20), (77, 100, 20), (77, 78, 20), (77, 512, 1), (5, 9, 3), (8, 30, 0)]
)
def test_any_length(count, length, keep):
    table = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    found = stretch_positions(table, length, keep)
    torch.testing.assert_close(found, torch.tensor(slow_stretch(table.tolist(), length, keep), dtype=torch.float64))
    assert torch.equal(found[:keep], table[:keep])


@pytest.mark.parametrize(
    ("count", "length", "keep"),
    [(77, 248, 20), (77, 120, 20), (77, 400, 20), (77, 512, 1), (77, 78, 75), (248, 512, 246), (8, 30, 0)],
)
def test_a_stretch_says_what_it_does(count, length, keep):
    """By the places in the old table that the slow reading looks at."""
    ratio = (length - keep) / (count - keep)
    places = [keep + (p - keep) / ratio for p in range(keep, length)]
    stretch = Stretch(count, length, keep)
    assert stretch.extrapolated == sum(place > count - 1 + 1e-9 for place in places)
    assert stretch.describe() == pytest.approx(
        {"from": count, "to": length, "kept": keep, "ratio": ratio, "extrapolated": stretch.extrapolated}
    )
    table = torch.rand(count, 2, dtype=torch.float64)
    assert torch.equal(stretch_positions(table, length, keep)[: stretch.kept], table[: stretch.kept])


def test_no_stretch_keeps_all():
    expected = {"from": 77, "to": 77, "kept": 77, "ratio": 1.0, "extrapolated": 0}
    assert Stretch(77, 77, 20).describe() == expected == Stretch(77, 77, 500).describe()


def test_long_clips_ratio():
    assert Stretch(77, 248, 20).describe() == {"from": 77, "to": 248, "kept": 20, "ratio": 4.0, "extrapolated": 3}


def test_whole_ratio_keeps_every_row_exactly():
    table = torch.randn(77, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stretch_positions(table, 248)[20::4], table[20:])


def test_same_length_is_unchanged():
    table = torch.randn(77, 4)
    assert torch.equal(stretch_positions(table, 77), table)


def test_gradient():
    table = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: stretch_positions(rows, 11, 2), table)


@pytest.mark.parametrize(
    ("shape", "length", "keep", "message"),
    [
        ((77, 4), 76, 20, r"base\.context_length = 76: .* 77 .* Set it to 77 or more"),
        ((248, 4), 120, 20, r"base\.context_length = 120: .* 248 .* Set it to 248 or more"),
        ((77, 4), 248, 76, r"base\.keep_positions = 76: expected 0 to 75"),
        ((248, 4), 512, 247, r"base\.keep_positions = 247: expected 0 to 246"),
        ((77,), 248, 20, "shape"),
    ],
)
def test_refusals(shape, length, keep, message):
    with pytest.raises(ModelError, match=message):
        stretch_positions(torch.zeros(shape), length, keep)
