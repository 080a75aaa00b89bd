"""Which candidates are kept: against a slow, obvious version, and the reasons for the others."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from fast_goal.config import NEGATIVE_TYPES, Params, build
from fast_goal.configure import compose
from fast_goal.negatives import Candidate
from fast_goal.negatives.choice import choose, problem
from fast_goal.negatives.edits import changed_words, edit_size
from fast_goal.negatives.vocabulary import caption_hash

CAPTION = "a red cup is on a small table near the old wooden door"
WORDS = CAPTION.split()


@pytest.fixture(scope="module")
def config():
    made = build(Params, compose(["negatives=rules"]), "params.yaml").negatives
    return replace(made, max_similarity=0.9, per_caption=4)


def swapped(kind, first, second, caption=CAPTION):
    words = caption.split()
    words[first], words[second] = words[second], words[first]
    return Candidate(" ".join(words), kind)


def no_similarity(pairs):
    raise AssertionError("not asked for")


def test_the_reasons_for_what_is_left_out(config):
    good = swapped("swap_nouns", 2, 7)
    other = swapped("swap_nouns", 2, 12)
    offered = [
        good,
        good,
        Candidate(CAPTION + " ", "reshuffle"),
        Candidate("a blue cup", "replace_adjectives"),
        Candidate(CAPTION.replace("red", "blue"), "swap_adjectives"),
        Candidate(CAPTION.replace("a red cup is on a small", "some big tin can was under no").ljust(60, "x"), "replace_nouns"),
        swapped("reshuffle", 1, 6),
        Candidate(CAPTION.replace("cup", "star"), "replace_nouns"),
        other,
    ]
    asked = replace(config, types=["swap_nouns", "swap_adjectives", "replace_adjectives", "replace_nouns"])
    similar = {good.text: 0.5, other.text: 0.95}
    chosen = choose(
        [CAPTION],
        [offered],
        [{CAPTION, CAPTION.replace("cup", "star")}],
        asked,
        77,
        lambda pairs: np.array([similar[b] for _, b in pairs]),
    )
    assert chosen.kept == [[(good, 0.5)]]
    assert chosen.dropped == [
        Counter(
            {
                "twice": 1,
                "type not asked for": 2,
                "much longer or shorter": 1,
                "too few words changed": 1,
                "too many words changed": 1,
                "a true caption": 1,
                "a paraphrase": 1,
            }
        )
    ]
    assert problem(CAPTION, Candidate(f" {CAPTION}\n", "reshuffle"), NEGATIVE_TYPES) == "the caption itself"


@pytest.mark.parametrize(
    ("old", "new", "kind", "reason"),
    [
        ("on a small", "behind an old", "reshuffle", "other words"),  # `old` is there once only
        ("red cup is on a small table", "table is on small red cups", "reshuffle", ""),  # another form of one
        ("red cup is on a small table", "red table is on an small cup", "swap_nouns", ""),  # articles do not count
        ("red cup is on a small table", "old table is on a small star", "swap_nouns", "other words"),
        ("red cup", "blue star", "replace_nouns", ""),
    ],
)
def test_what_trades_places_is_no_other_word(old, new, kind, reason):
    assert problem(CAPTION, Candidate(CAPTION.replace(old, new), kind), NEGATIVE_TYPES) == reason


def slow(caption, offered, config, similar):
    """One after the other, in turns, with every cosine known beforehand."""
    first = int.from_bytes(caption_hash(caption, config.seed)[:4]) % len(config.types)
    types = config.types[first:] + config.types[:first]
    queues = {kind: [one for one in offered if one.type == kind] for kind in types}
    kept, paraphrases = [], 0
    while any(queues.values()):
        for kind in types:
            if queues[kind] and len(kept) < config.per_caption:
                candidate = queues[kind].pop(0)
                if similar[candidate.text] > config.max_similarity:
                    paraphrases += 1
                else:
                    kept.append((candidate, similar[candidate.text]))
        if len(kept) == config.per_caption:
            break
    return kept, paraphrases


def test_against_a_slow_version(config):
    draw = random.Random(0)
    captions = [f"{CAPTION} number {number}" for number in range(60)]
    offered, similar = [], {}
    for caption in captions:
        seen = {}
        for _ in range(draw.randint(0, 14)):
            candidate = swapped(
                draw.choice(("swap_nouns", "swap_adjectives", "reshuffle")), *draw.sample(range(1, 14), 2), caption
            )
            if candidate.text.split() != caption.split() and edit_size(caption, candidate.text) > 1:
                seen.setdefault(candidate.text, candidate)
        offered.append(list(seen.values()))
        similar |= {text: draw.choice((0.2, 0.5, 0.95)) for text in seen}
    asked = []

    def similarity(pairs):
        asked.extend(pairs)
        return np.array([similar[negative] for _, negative in pairs])

    chosen = choose(captions, offered, [{caption} for caption in captions], config, 77, similarity)
    for caption, candidates, kept, dropped in zip(captions, offered, chosen.kept, chosen.dropped, strict=True):
        expected, paraphrases = slow(caption, candidates, config, similar)
        assert kept == expected
        assert dropped["a paraphrase"] == paraphrases
    assert len(asked) == len(set(asked)) == sum(map(len, chosen.kept)) + sum(one.total() for one in chosen.dropped)


def test_the_types_are_about_equally_frequent_where_fewer_are_kept_than_there_are(config):
    captions = [f"{CAPTION} number {number}" for number in range(400)]
    offered = [
        [
            swapped("reshuffle", 1, 2, one),
            swapped("swap_nouns", 2, 7, one),
            swapped("swap_adjectives", 1, 6, one),
            Candidate(one.replace("red", "blue"), "replace_adjectives"),
            Candidate(one.replace("cup", "star"), "replace_nouns"),
        ]
        for one in captions
    ]
    few = replace(config, per_caption=2, max_similarity=None)
    chosen = choose(captions, offered, [set()] * len(captions), few, 77, None)
    counts = Counter(candidate.type for kept in chosen.kept for candidate, _ in kept)
    assert sum(counts.values()) == 800
    assert all(abs(counts[kind] - 160) < 40 for kind in NEGATIVE_TYPES), counts
    assert all(np.isnan(cosine) for kept in chosen.kept for _, cosine in kept)


def test_a_change_that_the_model_cannot_see_is_left_out(config):
    seen, hidden = swapped("swap_adjectives", 1, 6), swapped("swap_nouns", 7, 12)
    for context_length, kept in ((9, [seen]), (77, [seen, hidden])):
        chosen = choose([CAPTION], [[hidden, seen]], [set()], replace(config, max_similarity=None), context_length, None)
        assert sorted((candidate for candidate, _ in chosen.kept[0]), key=str) == sorted(kept, key=str)
        assert chosen.dropped[0]["beyond the model's context"] == 2 - len(kept)


def test_nothing_to_choose_from(config):
    assert choose([CAPTION], [[]], [set()], config, 77, no_similarity).kept == [[]]


@pytest.mark.parametrize(
    ("negative", "old", "new"),
    [
        (CAPTION, [], []),
        (CAPTION.replace("red", "blue"), [1], [1]),
        (CAPTION.replace("a red cup", "An, old cup!"), [0, 1], [0, 1]),
        (CAPTION.replace("red ", ""), [1], []),
        (CAPTION.replace("red", "very red"), [], [1]),
        (CAPTION.upper() + ".", [], []),
        ("", list(range(13)), []),
    ],
)
def test_the_words_that_differ(negative, old, new):
    assert changed_words(CAPTION, negative) == (old, new)


def test_without_the_words_that_differ_the_texts_are_equal():
    draw = random.Random(1)
    for _ in range(200):
        one, other = ([draw.choice("abcd") for _ in range(draw.randint(0, 30))] for _ in range(2))
        old, new = changed_words(" ".join(one), " ".join(other))
        left = [word for place, word in enumerate(one) if place not in old]
        assert left == [word for place, word in enumerate(other) if place not in new]
        assert edit_size(" ".join(one), " ".join(other)) == max(len(old), len(new))
