"""Ranks and recall against a slow oracle, the published vectors, and ties."""

import importlib.util
import itertools
import math
import random
import statistics
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from fast_goal.evaluation import retrieval
from fast_goal.evaluation.retrieval import below, count_above, paired_scores, rank_bounds, ranks, recall_at_k, summary


def slow_ranks(scores, text_to_image, ties="best"):
    """scores[i][t] -> ranks of both directions, by sorting Python lists."""
    images, texts = len(scores), len(scores[0])
    forward = []
    for text in range(texts):
        own = scores[text_to_image[text]][text]
        rivals = [scores[image][text] for image in range(images) if image != text_to_image[text]]
        forward.append(1 + sum(r > own or (ties == "worst" and r == own) for r in rivals))
    backward = {}
    for image in range(images):
        mine = [scores[image][text] for text in range(texts) if text_to_image[text] == image]
        rivals = [scores[image][text] for text in range(texts) if text_to_image[text] != image]
        if mine:
            backward[image] = 1 + sum(r > max(mine) or (ties == "worst" and r == max(mine)) for r in rivals)
    return forward, backward


def as_features(scores):
    """Features whose products are exactly the given scores [I, T]."""
    scores = torch.tensor(scores)
    return scores, torch.eye(scores.shape[1])


@pytest.mark.parametrize("ties", ["best", "worst"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("levels", [3, 10_000])  # few levels: many ties
def test_ranks_agree_with_a_slow_oracle_for_unequal_numbers_of_captions(ties, chunk, levels):
    generator = torch.Generator().manual_seed(levels)
    text_to_image = torch.tensor([0, 0, 0, 1, 3, 3, 4, 6, 6, 6, 6, 0])  # 2 and 5 have none, 0's are not contiguous
    scores = torch.randint(levels, (7, 12), generator=generator).float()
    expected = slow_ranks(scores.tolist(), text_to_image.tolist(), ties)
    found = ranks(*as_features(scores.tolist()), text_to_image, chunk, ties)
    assert found.text_to_image.tolist() == expected[0]
    assert dict(zip(found.query_images.tolist(), found.image_to_text.tolist(), strict=True)) == expected[1]


def test_random_features_agree_with_a_slow_oracle_and_with_any_chunk():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(40, 8, generator=generator), torch.randn(60, 8, generator=generator)
    text_to_image = torch.randint(40, (60,), generator=generator)
    scores = (images.double() @ texts.double().T).float()
    forward, backward = slow_ranks(scores.tolist(), text_to_image.tolist())
    for chunk in (1, 13, 64):
        found = ranks(images, texts, text_to_image, chunk)
        assert found.text_to_image.tolist() == forward
        assert found.image_to_text.tolist() == list(backward.values())


def random_task(seed):
    """Unequal numbers of captions, down to none; few values, so that ties abound; repeated images and texts."""
    draw = random.Random(seed)
    images, texts, width = draw.randint(1, 9), draw.randint(1, 30), draw.choice([1, 2, 3, 7, 8])
    generator = torch.Generator().manual_seed(seed)
    image_features = torch.randint(-2, 3, (images, width), generator=generator).float()
    text_features = torch.randint(-2, 3, (texts, width), generator=generator).float()
    if draw.random() < 0.5:  # scores that no two pairs share, but for copies
        image_features += torch.randn(images, width, generator=generator)
        text_features += torch.randn(texts, width, generator=generator)
    if images > 1:
        image_features[1] = image_features[0]
    text_features[-1] = text_features[0]
    return image_features, text_features, torch.randint(images, (texts,), generator=generator), draw.choice([1, 2, 5, 64])


@pytest.mark.parametrize("seed", range(60))
def test_random_tasks_agree_with_a_slow_oracle(seed):
    images, texts, owners, chunk = random_task(seed)
    scores = [[paired_scores(image[None], text[None]).item() for text in texts] for image in images]
    bounds = rank_bounds(images, texts, owners, chunk)
    for ties in ("best", "worst"):
        forward, backward = slow_ranks(scores, owners.tolist(), ties)
        assert bounds[ties].text_to_image.tolist() == forward
        assert dict(zip(bounds[ties].query_images.tolist(), bounds[ties].image_to_text.tolist(), strict=True)) == backward
        one = ranks(images, texts, owners, chunk, ties)
        assert all(torch.equal(*pair) for pair in zip(one, bounds[ties], strict=True))


def test_a_score_is_the_dot_product_rounded_to_float32():
    generator = torch.Generator().manual_seed(3)
    for width in (1, 2, 3, 64, 511, 512):
        left, right = torch.randn(5, width, generator=generator), torch.randn(5, width, generator=generator)
        found = paired_scores(left, right)
        pairs = zip(left.tolist(), right.tolist(), strict=True)
        exact = [float(sum(Fraction(a) * Fraction(b) for a, b in zip(*rows, strict=True))) for rows in pairs]
        assert found.tolist() == torch.tensor(exact, dtype=torch.float64).float().tolist()
    assert paired_scores(torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [0, 0]


def test_what_lies_at_the_edge_of_a_float32_is_scored_again():
    """Two orders of the same products whose float64 sums round to different float32."""
    edge = 1 + 2**-24  # halfway between two float32, rounds to 1
    first = torch.tensor([[edge, 2**-53, 2**-53]], dtype=torch.float64)
    orders = [first[:, list(order)] for order in itertools.permutations(range(3))]
    rounded = {paired_scores(order, torch.ones_like(order)).item() for order in orders}
    assert len(rounded) == 2  # so the order matters here
    texts = torch.cat(orders).repeat(3, 1)
    expected = [paired_scores(text[None], torch.ones(1, 3, dtype=torch.float64)).item() for text in texts]
    for owner in range(6):
        bars = torch.tensor([[expected[owner]]])
        above, _ = count_above(torch.ones(1, 3, dtype=torch.float64), texts, bars, torch.full((len(texts), 1), torch.inf), 7)
        assert above.item() == sum(score > expected[owner] for score in expected)
        _, above = count_above(texts, torch.ones(1, 3, dtype=torch.float64), torch.full((len(texts), 1), torch.inf), bars, 7)
        assert above.item() == sum(score > expected[owner] for score in expected)


def test_a_matrix_product_that_is_a_little_off_changes_nothing(monkeypatch):
    """Half of the texts are copies, half of the images too, and every block's product errs in its own way."""
    generator = torch.Generator().manual_seed(5)
    images = torch.nn.functional.normalize(torch.randn(24, 33, generator=generator), dim=1).bfloat16().repeat(2, 1)
    texts = torch.nn.functional.normalize(torch.randn(30, 33, generator=generator), dim=1).bfloat16().repeat(3, 1)
    owners = torch.randint(48, (90,), generator=generator)
    expected = {ties: ranks(images, texts, owners, 1000, ties) for ties in ("best", "worst")}
    honest, errors = retrieval._above, torch.Generator().manual_seed(6)

    def disturbed(scores, bars, slack, queries, candidates):
        shift = (2 * torch.rand(scores.shape, generator=errors, dtype=torch.float64) - 1) * 0.9
        return honest(scores + shift * slack[:, None], bars, slack, queries, candidates)

    monkeypatch.setattr(retrieval, "_above", disturbed)
    for ties, chunk in itertools.product(("best", "worst"), (7, 64)):
        assert all(torch.equal(*pair) for pair in zip(ranks(images, texts, owners, chunk, ties), expected[ties], strict=True))


def test_counts_above_several_bars_of_a_query():
    rows, columns = torch.eye(2), torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 6.0]])
    bars = torch.tensor([[2.0, torch.inf, 0.0], [5.0, 4.0, torch.inf]])
    found, none = count_above(rows, columns, bars, torch.full((3, 1), torch.inf))
    assert found.tolist() == [[1, 0, 3], [1, 3, 0]]
    assert none.tolist() == [[0]] * 3
    assert count_above(rows, columns, below(bars), torch.full((3, 1), torch.inf))[0].tolist() == [[2, 0, 3], [3, 3, 0]]


def test_memory_is_bounded_by_the_chunk(monkeypatch):
    """No tensor of all images by all texts, nor of a chunk by all texts."""
    largest = [0]

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            result = function(*arguments, **(named or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, torch.Tensor):
                    largest[0] = max(largest[0], value.numel())
            return result

    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(40, 4, generator=generator), torch.randn(300, 4, generator=generator)
    with Watch():
        ranks(images, texts, torch.randint(40, (300,), generator=generator), 16)
    assert largest[0] == texts.numel()  # the features themselves


def test_published_ranks_without_ties(vectors):
    vector = vectors["V5c_recall_5_captions_no_ties"]
    owners = torch.arange(3).repeat_interleave(5)
    features = as_features(vector["sim"])
    found, expected = ranks(*features, owners), vector["flair_compute_retrieval"]
    for direction in ("text_to_image", "image_to_text"):
        numbers = summary(getattr(found, direction), [1, 5, 10])
        for k in (1, 5, 10):
            assert numbers[f"R@{k}"] == pytest.approx(100 * expected[f"{direction}_R@{k}"])
        assert numbers["mean_rank"] == pytest.approx(expected[f"{direction}_mean_rank"])
        assert numbers["median_rank"] == pytest.approx(expected[f"{direction}_median_rank"])
    recall = recall_at_k(*features, owners, [1, 2, 5, 10])
    for k, share in vector["longclip_t2i"].items():
        assert recall["text_to_image"][int(k)] == pytest.approx(100 * share)
    for k, share in vector["longclip_i2t"].items():
        assert recall["image_to_text"][int(k)] == pytest.approx(100 * share)


def test_published_bounds_with_ties(vectors):
    vector = vectors["V5_recall_paired_ties"]
    features, owners = as_features(vector["sim(image rows, text cols)"]), torch.arange(4)
    for index, ties in enumerate(("best", "worst")):
        found = ranks(*features, owners, ties=ties)
        assert (found.image_to_text - 1).tolist() == vector["optimistic/pessimistic_ranks_i2t"][index]
        assert (found.text_to_image - 1).tolist() == vector["optimistic/pessimistic_ranks_t2i"][index]


def test_published_tied_row_lies_between_the_bounds(vectors):
    vector = vectors["V5b_recall_5_captions"]
    features, owners = as_features(vector["sim(3 images x 15 captions)"]), torch.arange(3).repeat_interleave(5)
    best, worst = (recall_at_k(*features, owners, [1, 5, 10], ties=ties)["image_to_text"] for ties in ("best", "worst"))
    for published in (
        {k: vector["flair_compute_retrieval"][f"image_to_text_R@{k}"] for k in (1, 5, 10)},
        {int(k): share for k, share in vector["longclip_i2t"].items()},
    ):
        for k, share in published.items():
            assert worst[k] - 1e-9 <= 100 * share <= best[k] + 1e-9


def test_a_collapsed_model_is_perfect_under_one_bound_and_worthless_under_the_other():
    same = torch.ones(6, 4)
    assert recall_at_k(same, same, torch.arange(6), [1])["text_to_image"][1] == 100
    assert recall_at_k(same, same, torch.arange(6), [1, 5], ties="worst")["text_to_image"] == {1: 0, 5: 0}


def test_equal_texts_tie_exactly_wherever_they_stand():
    generator = torch.Generator().manual_seed(1)
    texts = torch.nn.functional.normalize(torch.randn(10, 67, generator=generator), dim=1).repeat(31, 1)
    images = torch.nn.functional.normalize(torch.randn(310, 67, generator=generator), dim=1)
    # every image: 10 distinct scores, each 31 times; so a rank is one more than a multiple of 31
    assert set((ranks(images, texts, torch.arange(310), 17).image_to_text - 1).remainder(31).tolist()) == {0}


def test_large_k_and_one_pair():
    one = torch.ones(1, 2)
    assert recall_at_k(one, one, torch.tensor([0]), [1, 50]) == {
        d: {1: 100.0, 50: 100.0} for d in ("text_to_image", "image_to_text")
    }


def test_images_without_captions_are_candidates_but_no_queries():
    images = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    found = ranks(images, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert found.text_to_image.tolist() == [2]  # the image without a caption stands above
    assert found.query_images.tolist() == [0]
    assert found.image_to_text.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_compared_in_float32(dtype):
    generator = torch.Generator().manual_seed(2)
    images, texts = (torch.randn(20, 16, generator=generator).to(dtype) for _ in range(2))
    expected = ranks(images.float(), texts.float(), torch.arange(20))
    found = ranks(images, texts, torch.arange(20))
    assert found.text_to_image.tolist() == expected.text_to_image.tolist()
    # two scores that differ by less than float32 resolves are a tie
    close = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)
    assert ranks(close, torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])).text_to_image.tolist() == [1]


def test_features_with_gradients_are_accepted():
    features = torch.eye(3, requires_grad=True)
    assert ranks(features, features, torch.arange(3)).text_to_image.tolist() == [1, 1, 1]


def test_summary_against_the_standard_library():
    values = [1, 4, 2, 60]
    numbers = summary(torch.tensor(values), [1, 5, 100])
    assert numbers["R@1"] == 25 and numbers["R@5"] == 75 and numbers["R@100"] == 100
    assert numbers["mean_rank"] == statistics.mean(values)
    assert numbers["median_rank"] == statistics.median(values)
    assert numbers["mrr"] == pytest.approx(math.fsum(1 / value for value in values) / 4)


@pytest.mark.parametrize(
    ("images", "texts", "owners", "message"),
    [
        (torch.tensor([[1.0], [math.nan]]), torch.ones(1, 1), [0], "image features are not finite, the first is row 1"),
        (torch.ones(2, 1), torch.tensor([[math.inf]]), [0], "text features are not finite"),
        (torch.ones(2, 3), torch.ones(2, 4), [0, 1], "got \\(2, 3\\) and \\(2, 4\\)"),
        (torch.ones(2, 3), torch.ones(2, 3), [0], "one image row per text"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 2], "from 0 to 1"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, -1], "from 0 to 1"),
        (torch.ones(2, 3), torch.ones(0, 3), [], "nothing to rank"),
        (torch.full((2, 3), 1e20), torch.full((1, 3), 1e20), [0], "more than float32 holds"),
    ],
)
def test_bad_input_is_refused(images, texts, owners, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(images, texts, torch.tensor(owners, dtype=torch.long), [1])


def test_the_benchmark_compares_with_the_plain_matrix(monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "retrieval.py"
    monkeypatch.setattr(sys, "path", [*sys.path])  # the benchmark puts its folder there
    spec = importlib.util.spec_from_file_location("benchmark_of_retrieval", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    made = benchmark.features(300, 1100, 16)
    assert all(torch.equal(*pair) for pair in zip(ranks(*made, chunk=128), benchmark.plain(*made), strict=True))
    assert len(made[1].unique(dim=0)) < len(made[1])  # copies among the texts
    assert {*benchmark.NAMES} == {*benchmark.VARIANTS}
