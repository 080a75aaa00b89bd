"""The authors' earlier mapping against the published vectors and against slow readings of its rules; the exact one beside it.

`slow_goal_patches` and `slow_goal_positions` list single patches and positions, as METHOD section 3 describes the mapping.
"""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from fast_goal.data.captions import token_span, tokenize
from fast_goal.data.images import View
from fast_goal.model.tokens import patch_mask, span_mask
from fast_goal.training.alignment import ALIGNMENTS

GOAL, EXACT = ALIGNMENTS["goal"], ALIGNMENTS["exact"]


def slow_goal_patches(xyxy, width: int, height: int, size: int, patch: int) -> list[int]:
    """Row-major, without the class token."""

    def nearest(value: Fraction) -> int:
        low = math.floor(value)
        if value - low != Fraction(1, 2):
            return low + (value - low > Fraction(1, 2))
        return low if low % 2 == 0 else low + 1

    x1, x2 = (nearest(Fraction(x) * size / width) for x in (xyxy[0], xyxy[2]))
    y1, y2 = (nearest(Fraction(y) * size / height) for y in (xyxy[1], xyxy[3]))
    x1, y1 = (sorted((0, value, size - 1))[1] for value in (x1, y1))
    x2, y2 = (sorted((0, value, size))[1] for value in (x2, y2))
    grid = size // patch
    return [
        row * grid + column
        for row in range(grid)
        for column in range(grid)
        if math.floor(y1 / patch) <= row < math.ceil(y2 / patch) and math.floor(x1 / patch) <= column < math.ceil(x2 / patch)
    ]


def slow_goal_positions(caption: str, sentence: str, context_length: int) -> list[int]:
    """Of a caption that is padded to the context."""

    def ids(text: str) -> int:
        return int(tokenize([text], 10)[1])

    caption, sentence = " ".join(caption.split()), " ".join(sentence.split())
    before, pieces = None, [piece.strip() for piece in caption.split(".")]
    pieces = [piece for piece in pieces if piece]
    for number, piece in enumerate(pieces):
        if piece == sentence:
            before = ". ".join([*pieces[:number], ""])
            break
    if before is None:
        if sentence not in caption:
            return []
        before = caption.partition(sentence)[0]
    everything = list(range(context_length))
    start, length = ids(before), ids(sentence) - 2
    if start < context_length:
        chosen = [at for at in everything[:-1] if start <= at < start + length]
    else:
        chosen = everything[:-1][-length:] if length < context_length - 1 else everything[1:-1]
    return chosen or everything[1 : 1 + length]


def goal_patches(xyxy, width, height, size, patch) -> list[int]:
    # the view does not matter: the box is squashed whatever becomes of the pixels
    boxes = {GOAL.box(View(width, height, size, mode), xyxy, patch) for mode in ("crop", "squash", "pad")}
    assert len(boxes) == 1
    return patch_mask(torch.tensor([*boxes], dtype=torch.float32), size, patch)[0].nonzero().flatten().tolist()


def test_published_patches(vectors):
    """All of V2. A mean of nothing, there NaN, is here a box that covers nothing."""
    cases = vectors["V2_bbox_to_patch"]["cases"]
    assert len(cases) == 12
    for case in cases:
        published = [] if isinstance(case["indices"], str) else [index - 1 for index in case["indices"]]
        box = tuple(case[name] for name in ("x1", "y1", "x2", "y2"))
        size, patch = case["image_size"], case["patch"]
        assert goal_patches(box, case["width"], case["height"], size, patch) == published, case["name"]
        assert slow_goal_patches(box, case["width"], case["height"], size, patch) == published, case["name"]


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (224, 14), (336, 14), (96, 16)])
def test_goal_patches_against_loops(size, patch, vectors):
    generator = random.Random(size + patch)
    boxes = [
        (tuple(case[name] for name in ("x1", "y1", "x2", "y2")), case["width"], case["height"])
        for case in vectors["V2_bbox_to_patch"]["cases"]
    ]
    for _ in range(150):
        width, height = generator.choice([(size * 4, size * 4), (size * 2, size * 8), (640, 427), (375, 500), (size, size)])
        x1, y1 = generator.uniform(-0.1, 1) * width, generator.uniform(-0.1, 1) * height
        # some of less than an input pixel, some beyond the image
        x2, y2 = x1 + generator.choice([0.3, 1, 5, width / 3, width]), y1 + generator.choice([0.3, 2, height / 2])
        box = (x1, y1, x2, y2)
        boxes.append((tuple(round(value) for value in box) if generator.random() < 0.7 else box, width, height))
    empty = 0
    for box, width, height in boxes:
        expected = slow_goal_patches(box, width, height, size, patch)
        empty += not expected
        assert goal_patches(box, width, height, size, patch) == expected, (box, width, height)
    assert 0 < empty < len(boxes) / 2


def test_exact_box_goes_through_the_view():
    for mode in ("crop", "squash", "pad"):
        view = View(300, 200, 64, mode)
        box = (31.0, 20.0, 170.5, 90.0)
        assert EXACT.box(view, box, 16) == tuple(view.boxes(np.array(box))[0].tolist())
    cut_off = (0.0, 0.0, 40.0, 200.0)  # left of the centre crop, where the squashed box covers a column
    assert EXACT.box(View(300, 200, 64), cut_off, 16) == (0, 0, 0, 0)
    assert goal_patches(cut_off, 300, 200, 64, 16) == [0, 4, 8, 12]


def goal_span(caption: str, sentence: str, context_length: int) -> tuple[int, int]:
    start = caption.rindex(sentence)  # the last one: the mapping finds the first by itself
    return GOAL.span(caption, start, start + len(sentence), context_length)


def test_published_spans(vectors):
    """All of V3. A sentence that is not in the caption, there an AssertionError, cannot be asked for here."""
    cases = vectors["V3_text_token_lookup"]["cases"]
    assert len(cases) == 8
    for case in cases:
        published = list(range(*case["selected"])) if "selected" in case else []
        assert slow_goal_positions(case["caption"], case["sentence"], 248) == published, case["name"]
        if published:
            assert goal_span(case["caption"], case["sentence"], 248) == tuple(case["selected"]), case["name"]
            first, last = case["exact_range_of_sentence_tokens"]
            assert tuple(case["selected"]) == (first + 1, last + 1)
            start = case["caption"].index(case["sentence"])
            assert EXACT.span(case["caption"], start, start + len(case["sentence"]), 248) == (first, last)


@pytest.mark.parametrize("context_length", [248, 77, 40, 300])
def test_goal_spans_beyond_the_context(vectors, context_length):
    """The published long caption, sentence by sentence, with its stops and without them."""
    caption = " ".join(f"Item number {i} is a small wooden chair next to the wall." for i in range(40))
    assert int(tokenize([caption], 248)[1]) == vectors["V3_text_token_lookup"]["long_caption_total_ids"]
    end, kinds = context_length - 1, set()
    for sentence in caption.removesuffix(".").split(". "):
        for wanted in (sentence, f"{sentence}."):
            start = caption.index(wanted)
            span = GOAL.span(caption, start, start + len(wanted), context_length)
            assert list(range(*span)) == slow_goal_positions(caption, wanted, context_length)
            exact = token_span(caption, start, start + len(wanted), context_length)
            kinds.add("cut" if span[1] == end and exact != (0, 0) else "unrelated" if exact == (0, 0) else "late")
            if exact == (0, 0):
                assert span == (end - int(tokenize([wanted], 10)[1]) + 2, end)
    assert kinds == {"late", "cut", "unrelated"}


def test_goal_span_of_a_sentence_that_starts_at_the_end_token():
    caption = "One two three four five. Six seven eight nine ten. And more words follow here."
    # 6 tokens, the start token, and one too many: position 8
    assert goal_span(caption, "Six seven eight nine ten", 10) == (8, 9)
    assert goal_span(caption, "Six seven eight nine ten", 9) == (1, 6)
    assert goal_span(caption, "Six seven eight nine ten", 8) == (2, 7)
    for context_length in range(4, 24):
        for sentence in (
            "One two three four five",
            "Six seven eight nine ten",
            "And more words follow here",
            "nine ten. And more",
        ):
            expected = slow_goal_positions(caption, sentence, context_length)
            assert list(range(*goal_span(caption, sentence, context_length))) == expected, (context_length, sentence)


def test_goal_span_of_the_second_of_two_equal_sentences():
    caption = "Cats sit. Dogs run. Cats sit."
    assert GOAL.span(caption, 20, 28, 77) == GOAL.span(caption, 0, 8, 77) == (2, 4)
    assert EXACT.span(caption, 20, 28, 77) == (7, 9)
    # the equal piece between stops comes before an earlier occurrence within another sentence
    assert goal_span("Big Cats sit here. Cats sit", "Cats sit", 77) == (7, 9)


def test_goal_span_ends_with_the_text():
    """A last sentence with its stop ends with the end token; nothing reaches the padding, which a batch may not have."""
    caption = "A dog runs. It barks."
    length = int(tokenize([caption], 77)[1])
    assert goal_span(caption, "It barks.", 77) == (6, length)
    text = "Red.) blue.) big.) small. Go"  # cut at its stops and joined again it has more tokens before the last sentence
    length = int(tokenize([text], 77)[1])
    for context_length in range(4, 20):
        expected = [at for at in slow_goal_positions(text, "Go", context_length) if at < length]
        assert list(range(*goal_span(text, "Go", context_length))) == expected
    assert slow_goal_positions(text, "Go", 77) == [length + 2] and goal_span(text, "Go", 77) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_goal_spans_against_loops(seed):
    generator = random.Random(seed)
    words = ["red", "Bus", "3", "don't", "xylophonically", "the", "café", "stop", "a", "(left)"]
    for _ in range(60):
        sentences = [
            " ".join(generator.choices(words, k=generator.randint(1, 6))) + "." for _ in range(generator.randint(1, 6))
        ]
        caption = generator.choice([" ", "  ", "\n"]).join(sentences)
        context_length = generator.randint(4, 40)
        wanted = generator.choice(sentences)
        wanted = generator.choice([wanted, wanted.removesuffix(".")])
        length = int(tokenize([caption], 10)[1])
        expected = [at for at in slow_goal_positions(caption, wanted, context_length) if at < length]  # no padding
        assert list(range(*goal_span(caption, wanted, context_length))) == expected, (caption, wanted, context_length)


def test_goal_span_without_tokens():
    assert GOAL.span("a dog", 2, 2, 77) == (0, 0)
    assert GOAL.span("", 0, 0, 77) == (0, 0)
    assert not span_mask(torch.tensor([GOAL.span("a dog", 1, 2, 77)]), 5).any()
