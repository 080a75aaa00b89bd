"""Joint mAP against a slow oracle and the published vector."""

import itertools
import random
from fractions import Fraction

import pytest
import torch

from fast_goal.evaluation.joint import joint_precision, link
from fast_goal.evaluation.retrieval import paired_scores


def slow_precision(scores, relevant, k, divisor, ties):
    """scores of the candidates of one query, the set of relevant ones -> AP@k, from a sorted list."""
    order = sorted(range(len(scores)), key=lambda c: (-scores[c], (c in relevant) == (ties == "worst")))
    hits, total = 0, Fraction(0)
    for position, candidate in enumerate(order[:k], 1):
        if candidate in relevant:
            hits += 1
            total += Fraction(hits, position)
    return float(total / (len(relevant) if divisor == "relevant" else min(k, len(relevant))))


def slow_joint(images, texts, item_texts, originals, **options):
    """Both directions by Python loops over the items."""
    items = range(len(images))
    related = [{j for j in items if j == i or originals[i] == j or originals[j] == i} for i in items]
    scores = [[paired_scores(image[None], text[None]).item() for text in texts] for image in images]
    forward = [slow_precision(scores[i], {item_texts[j] for j in related[i]}, **options) for i in items]
    backward = []
    for text in range(len(texts)):
        wanted = {i for j in items if item_texts[j] == text for i in related[j]}
        backward.append(slow_precision([row[text] for row in scores], wanted, **options))
    return forward, backward


def random_items(seed):
    """Whole images with up to eight local items each, texts that several items share, many ties."""
    draw = random.Random(seed)
    whole = draw.randint(1, 6)
    parents = [draw.randrange(whole) for _ in range(draw.randint(0, 20))]
    originals = [*range(whole), *parents]
    texts = draw.randint(1, len(originals))
    item_texts = [*range(texts), *(draw.randrange(texts) for _ in originals[texts:])]
    draw.shuffle(item_texts)
    generator = torch.Generator().manual_seed(seed)
    width = draw.choice([1, 2, 5])
    features = [torch.randint(-2, 3, (count, width), generator=generator).float() for count in (len(originals), texts)]
    if draw.random() < 0.5:
        features = [feature + torch.randn(feature.shape, generator=generator) for feature in features]
    return *features, item_texts, originals, draw.choice([1, 2, 3, 10])


@pytest.mark.parametrize("seed", range(40))
def test_random_items_agree_with_a_slow_oracle(seed):
    images, texts, item_texts, originals, k = random_items(seed)
    rows = torch.tensor(item_texts), torch.tensor(originals)
    for divisor, ties in itertools.product(("relevant", "reachable"), ("best", "worst")):
        expected = slow_joint(images, texts, item_texts, originals, k=k, divisor=divisor, ties=ties)
        for chunk in (3, 100):
            found = joint_precision(images, texts, *rows, k, divisor, ties, chunk)
            assert found.image_to_text.tolist() == pytest.approx(expected[0], abs=1e-12)
            assert found.text_to_image.tolist() == pytest.approx(expected[1], abs=1e-12)


def test_the_published_numbers(vectors):
    vector = vectors["V6_map_joint"]
    scores = torch.tensor(vector["sim"])
    originals = link(["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"])
    for k in (1, 10):
        found = joint_precision(scores, torch.eye(4), torch.arange(4), originals, k)
        expected = vector[f"result_basename_k{k}"]
        assert found.image_to_text.mean().item() == pytest.approx(expected["mAP_i2t"])
        assert found.text_to_image.mean().item() == pytest.approx(expected["mAP_t2i"])
    # what is left where no local item finds its whole image, as in the file that GOAL ships
    found = joint_precision(scores, torch.eye(4), torch.arange(4), torch.arange(4))
    assert found.image_to_text.mean().item() == pytest.approx(vector["result_with_directory_k10"]["mAP_i2t"])
    assert found.text_to_image.mean().item() == pytest.approx(vector["result_with_directory_k10"]["mAP_t2i"])


def test_the_divisor_matters_where_more_is_relevant_than_looked_at():
    texts = torch.eye(4)
    images = torch.tensor([[9.0, 8.0, 7.0, 6.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    items = torch.arange(4), torch.tensor([0, 0, 0, 0])
    assert joint_precision(images, texts, *items, 2).image_to_text[0].item() == 0.5
    assert joint_precision(images, texts, *items, 2, "reachable").image_to_text[0].item() == 1.0


def test_siblings_are_not_relevant_for_each_other():
    # item 1 and item 2 are parts of item 0; the image of item 1 finds the text of item 2 before its own
    images = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    found = joint_precision(images, torch.eye(3), torch.arange(3), torch.zeros(3, dtype=torch.long))
    assert found.image_to_text[1].item() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_local_items_are_linked_by_id():
    assert link(["x", "y"], ["y", "y", "x"]).tolist() == [0, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="2 local items belong to no whole image, the first to 'z'"):
        link(["x"], ["z", "x", "w"])
    with pytest.raises(ValueError, match="'x' stands more than once"):
        link(["x", "y", "x"], [])


@pytest.mark.parametrize(
    ("item_texts", "originals", "k", "message"),
    [
        ([0, 1], [0, 0], 0, "k = 0"),
        ([0, 2], [0, 0], 1, "item_texts must hold a row from 0 to 1"),
        ([0, 1], [0, 2], 1, "originals must hold"),
        ([0, 1], [0], 1, "for each of 2 items"),
        ([0, 1], [1, 0], 1, "the original of item 0 is a local item itself"),
        ([0, 0], [0, 0], 1, "1 of 2 texts belong to no item"),
    ],
)
def test_bad_input_is_refused(item_texts, originals, k, message):
    with pytest.raises(ValueError, match=message):
        joint_precision(torch.eye(2), torch.eye(2), torch.tensor(item_texts), torch.tensor(originals), k)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="row 1"):
        joint_precision(torch.eye(2), torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]), torch.arange(2), torch.arange(2))
