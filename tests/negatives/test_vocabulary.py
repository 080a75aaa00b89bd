"""The words of one kind: against a slow version of the formula, and which words count."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from fast_goal.data.speech import tagged
from fast_goal.negatives.vocabulary import LEAST, Vocabulary, _nearest, article_of, chosen, usable


def slow(counts, contexts, least):
    """Positive pointwise mutual information and shares of the contexts as dictionaries; the mean of the two cosines."""
    names = [word for word in counts if counts[word] >= least]
    met = {(word, context): count for (word, context), count in contexts.items() if word in names}
    total = sum(met.values())
    of_word, of_context = Counter(), Counter()
    for (word, context), count in met.items():
        of_word[word] += count
        of_context[context] += count
    special, plain = {}, {}
    for (word, context), count in met.items():
        special[word, context] = max(0.0, math.log(count * total / (of_word[word] * of_context[context])))
        plain[word, context] = math.sqrt(count / of_word[word])

    def cosine(table, one, other):
        rows = [{context: value for (word, context), value in table.items() if word == name} for name in (one, other)]
        norms = [math.sqrt(sum(value**2 for value in row.values())) for row in rows]
        dot = sum(value * rows[1].get(context, 0.0) for context, value in rows[0].items())
        return dot / (norms[0] * norms[1]) if all(norms) else 0.0

    return {
        one: {other: (cosine(special, one, other) + cosine(plain, one, other)) / 2 for other in names if other != one}
        for one in names
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_words_against_a_slow_version(seed):
    draw = random.Random(seed)
    words, contexts = [f"w{n}" for n in range(12)], Counter()
    counts = Counter({word: draw.randint(1, 9) for word in words})
    for word in words:
        for _ in range(3 * counts[word]):
            contexts[word, f"c{min(draw.randint(0, 14), draw.randint(0, 14))}"] += 1
    expected = slow(counts, contexts, 2)
    found = _nearest(counts, contexts, 2)
    assert set(found) == set(expected) and 0 < len(found) < len(words)
    for word, others in found.items():
        near = [other for other, cosine in expected[word].items() if cosine >= LEAST]
        assert sorted(others) == sorted(near)
        cosines = [expected[word][other] for other in others]
        assert all(a >= b - 1e-9 for a, b in pairwise(cosines))


def test_words_in_the_same_places_are_of_one_kind():
    draw = random.Random(0)
    texts = []
    for _ in range(150):
        animal, dish = draw.choice(("dog", "horse", "zebra", "goose")), draw.choice(("bowl", "plate", "pan"))
        texts.append(f"A {draw.choice(('brown', 'white', 'black'))} {animal} runs over the field.")
        texts.append(f"Soup is served in a {draw.choice(('deep', 'hot'))} {dish} with bread.")
    vocabulary = Vocabulary(tagged(texts))
    assert set(vocabulary.kind("dog", "NN1")[:3]) == {"horse", "zebra", "goose"}
    assert vocabulary.kind("plate", "NN1")[0] == "pan"  # a bowl is too near to a plate
    assert vocabulary.kind("brown", "AJ0") == vocabulary.kind("brown", "AJ0")
    assert set(vocabulary.kind("brown", "AJ0")) == {"white", "black"}
    assert vocabulary.fits("dog", "a") and vocabulary.fits("bowl", "a") and not vocabulary.fits("field", "a")
    assert vocabulary.fits("bread", "") and not vocabulary.fits("bread", "a") and not vocabulary.fits("dog", "")
    assert vocabulary.fits("field", "the") and vocabulary.fits("dog", "the") and not vocabulary.fits("unheard", "a")
    assert vocabulary.knows("dog", "NN1") and not vocabulary.knows("dog", "AJ0") and not vocabulary.knows("unheard", "NN1")
    assert vocabulary.kind("unheard", "NN1") == []


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("A red cup is here.", "cup", True),
        ("A red cup is here.", "red", True),
        ("Cups are here.", "Cups", True),
        ("We see the Cup here.", "Cup", False),  # a name
        ("A tree line is here.", "tree", False),
        ("A tree line is here.", "line", False),  # of the picture
        ("A cup of tea is here.", "cup", False),
        ("The dog's bowl is here.", "dog", False),
        ("Several visible cups.", "visible", False),
        ("The top of the picture.", "picture", False),
        ("Two objects are here.", "objects", False),
        ("It is on the left side.", "left", False),
        ("The letter S is here.", "S", False),
        ("A bottom-left corner is here.", "bottom-left", False),
        ("A low-angle view of a cup.", "low-angle", False),
        ("There are multiple cups.", "multiple", False),
        ("The sun is setting.", "setting", False),
        ("A neon green cup is here.", "neon", False),
    ],
)
def test_which_words_may_be_changed(text, word, expected):
    words = tagged([text])[0]
    (place,) = [place for place, one in enumerate(words) if one.text == word]
    assert usable(words, place) == expected


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("A very large red cup.", "cup", "a"),
        ("Another cup.", "cup", "a"),
        ("The small cup.", "cup", "the"),
        ("It is on water.", "water", ""),
        ("Clear water.", "water", ""),
        ("Two cups and its handle.", "handle", "the"),
    ],
)
def test_how_the_phrase_of_a_noun_begins(text, word, expected):
    words = tagged([text])[0]
    (place,) = [place for place, one in enumerate(words) if one.text == word]
    assert article_of(words, place) == expected


def test_the_captions_that_are_read_do_not_depend_on_their_order(monkeypatch):
    monkeypatch.setattr("fast_goal.negatives.vocabulary.CAPTIONS", 10)
    captions = [f"caption {number}" for number in range(50)]
    drawn = chosen(captions, 0)
    assert len(drawn) == 10 and drawn == chosen(captions[::-1], 0)
    assert set(drawn) != set(chosen(captions, 1))
    assert set(drawn) <= {*captions}
