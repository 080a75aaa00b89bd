"""Patch hits against a slow oracle, and the chance level against an enumeration."""

import itertools

import pytest
import torch

from fast_goal.evaluation.localisation import centres_inside, chance, first_hits, patch_centres


def slow_hit(similarity, box, side, patch, k):
    """One sentence: the k best patches, ties to the lower index, and whether one of their centres is in the box."""
    best = sorted(range(len(similarity)), key=lambda index: (-similarity[index], index))[:k]
    centres = [((index % side + 0.5) * patch, (index // side + 0.5) * patch) for index in best]
    return any(box[0] <= x < box[2] and box[1] <= y < box[3] for x, y in centres)


@pytest.mark.parametrize("levels", [3, 1000])
def test_hits_agree_with_a_slow_oracle(levels):
    generator = torch.Generator().manual_seed(levels)
    side, patch = 6, 16
    similarity = torch.randint(levels, (80, side * side), generator=generator).float()
    corners = torch.rand(80, 2, 2, generator=generator) * side * patch
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    found = first_hits(similarity, centres_inside(boxes, side * patch, patch))
    for k in (1, 2, 5, 15, 36):
        expected = [slow_hit(s, b, side, patch, k) for s, b in zip(similarity.tolist(), boxes.tolist(), strict=True)]
        assert (found <= k).tolist() == expected


def test_centres_run_along_the_rows():
    assert patch_centres(64, 32).tolist() == [[16, 16], [48, 16], [16, 48], [48, 48]]


def test_the_right_and_lower_edge_of_a_box_are_outside():
    boxes = torch.tensor([[16.0, 0.0, 48.0, 32.0], [0.0, 16.0, 32.0, 48.0], [0, 0, 64, 64], [17, 17, 47, 47], [0, 0, 0, 0]])
    inside = centres_inside(boxes, 64, 32)
    assert inside.tolist() == [[True, False, False, False], [True, False, False, False], [True] * 4, [False] * 4, [False] * 4]


def test_a_box_without_a_centre_is_a_miss_at_every_k():
    assert first_hits(torch.rand(1, 9), torch.zeros(1, 9, dtype=torch.bool)).tolist() == [10]


@pytest.mark.parametrize("good", range(7))
@pytest.mark.parametrize("k", [1, 2, 5, 6, 50])
def test_chance_is_the_share_of_all_draws(good, k):
    draws = list(itertools.combinations(range(6), min(k, 6)))
    assert chance(6, good, k) == pytest.approx(sum(any(i < good for i in draw) for draw in draws) / len(draws))


def test_random_patches_hit_as_often_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    inside = centres_inside(torch.tensor([[10.0, 10.0, 50.0, 60.0]]), 96, 16).expand(20_000, -1)
    found = first_hits(torch.rand(inside.shape, generator=generator), inside)
    for k in (1, 5):
        assert (found <= k).float().mean().item() == pytest.approx(chance(36, int(inside[0].sum()), k), abs=0.01)


def test_half_precision_similarities_are_accepted():
    assert first_hits(torch.tensor([[0.1, 0.9]], dtype=torch.bfloat16), torch.tensor([[False, True]])).tolist() == [1]
