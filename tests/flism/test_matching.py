import math
import subprocess
import sys

import pytest
import torch

from fast_goal.flism.matching import Match, match, match_many, pair_weights


def oracle(regions, sentences, top_k):
    """Plain Python, one number at a time."""

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    pairs = []
    for s, sentence in enumerate(sentences):
        best = None
        for r, region in enumerate(regions):
            value = cosine(region, sentence)
            if best is None or value > best[0]:
                best = (value, r)
        pairs.append((-best[0], s, best[1]))
    return [(s, r, -value) for value, s, r in sorted(pairs)[:top_k]]


@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("seed", range(10))
def test_against_the_oracle(seed, top_k):
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 12, (2,), generator=generator).tolist()
    regions, sentences = (torch.randn(n, 6, generator=generator, dtype=torch.float64) * 7 for n in count)
    expected = oracle(regions.tolist(), sentences.tolist(), top_k)
    found = match(regions, sentences, top_k)
    assert [(m.sentence, m.region) for m in found] == [pair[:2] for pair in expected]
    assert [m.similarity for m in found] == pytest.approx([pair[2] for pair in expected], abs=1e-12)
    assert len({m.sentence for m in found}) == len(found)


def test_many_images_at_once_are_the_same_as_each_alone():
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 9, (150, 2), generator=generator).tolist()
    images = [[torch.randn(n, 16, generator=generator) for n in pair] for pair in counts]
    images[7] = [part.repeat(3, 1) for part in images[7]]  # ties
    together = match_many([r for r, _ in images], [s for _, s in images], 4)
    assert together == [match(*image, 4) for image in images]


def test_equal_vectors_are_a_tie_wherever_they_stand():
    generator = torch.Generator().manual_seed(2)
    for count in range(2, 40):
        regions = torch.randn(1, 512, generator=generator).repeat(count, 1)
        sentences = torch.randn(1, 512, generator=generator).repeat(count + 3, 1)
        found = match(regions, sentences, 50)
        assert [(m.sentence, m.region) for m in found] == [(index, 0) for index in range(count + 3)]


def test_pair_weights():
    assert pair_weights([0.5, 0.2], "uniform") == [0.5, 0.5]
    assert pair_weights([0.6, 0.2], "similarity") == pytest.approx([0.75, 0.25])
    assert pair_weights([0.4, 0.0, -0.3], "similarity") == [1, 0, 0]
    assert pair_weights([-0.1, -0.2], "similarity") == [0.5, 0.5]
    assert pair_weights([], "similarity") == []
    with pytest.raises(ValueError, match="pair_weights"):
        pair_weights([1.0], "other")


def test_best_pair_is_the_default():
    regions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    sentences = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    (found,) = match(regions, sentences)
    assert found == Match(1, 1, 1.0)
    assert isinstance(found.sentence, int)
    assert isinstance(found.similarity, float)


def test_ties_go_to_the_lower_region_then_the_lower_sentence():
    regions = torch.eye(3)[[2, 0, 0, 1, 1]]
    sentences = torch.eye(3)[[1, 0, 1, 0]] * torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    assert match(regions, sentences, 9) == [Match(0, 3, 1.0), Match(1, 1, 1.0), Match(2, 3, 1.0), Match(3, 1, 1.0)]


def test_sentences_may_share_a_region():
    assert [m.region for m in match(torch.eye(2)[:1], torch.eye(2), 2)] == [0, 0]


def test_nothing_to_match():
    assert match(torch.zeros(0, 4), torch.randn(2, 4)) == []
    assert match(torch.randn(2, 4), torch.zeros(0, 4)) == []


def test_the_scale_and_the_type_of_the_inputs_do_not_matter():
    regions, sentences = torch.randn(5, 8), torch.randn(4, 8)
    expected = match(regions, sentences, 4)
    scaled = match(regions * 1e3, sentences * 1e-3, 4)
    assert [m[:2] for m in scaled] == [m[:2] for m in expected]
    halves = match(regions.half(), sentences.half(), 4)
    assert [m.similarity for m in halves] == pytest.approx([m.similarity for m in expected], abs=1e-2)
    assert all(-1 <= m.similarity <= 1 for m in match(regions, regions, 5))


@pytest.mark.parametrize(
    ("regions", "sentences", "top_k", "message"),
    [
        (torch.randn(2, 3), torch.randn(2, 4), 1, "expected"),
        (torch.randn(2, 3), torch.randn(2, 3), 0, "top_k = 0"),
        (torch.tensor([[float("nan"), 1.0]]), torch.randn(2, 2), 1, "NaN"),
    ],
)
def test_wrong_input(regions, sentences, top_k, message):
    with pytest.raises(ValueError, match=message):
        match(regions, sentences, top_k)


def test_imports_torch_alone():
    heavy = ("pandas", "open_clip", "ultralytics", "PIL")
    code = f"import sys, fast_goal.flism.matching; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
