"""Hard negatives by rules, without any model but a part-of-speech tagger (`negatives.generator=rules`).

* reshuffle: phrases of a sentence trade places (`the cup is on a table` -> `a table is on the cup`), or its words stand in
  random order;
* swap_nouns, swap_adjectives: two words of one number, or of one class, trade places: in a sentence, or between two sentences
  where no single one has a pair;
* replace_nouns, replace_adjectives: another word of the same kind (`vocabulary.py`) that the caption does not have.

A change that would leave the meaning as it is (`a red cup and a red star` the other way round) is not made, as far as rules
can tell. What is drawn for a caption follows from its text and the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise

from fast_goal.config import NegativesConfig
from fast_goal.data.speech import Word, tagged
from fast_goal.negatives import Candidate, Made, generator
from fast_goal.negatives.vocabulary import NEAREST, Vocabulary, article_of, caption_hash, chosen, is_colour, starts, usable
from fast_goal.negatives.words import (
    NEGATIONS,
    OPPOSITES,
    PLACE_NOUNS,
    PLACES,
    SYMMETRIC,
    VIEWS,
    akin,
    article,
    class_of,
    forms,
    near,
)
from fast_goal.progress import Progress

SPARE = 2  # candidates of a type beyond those that are kept; a guess: some turn out to be cut off, or too close
CLOSE = 3  # words between which none is said twice; a guess
SHUFFLED = 5  # words that a sentence needs for a random order of them; a guess
TRIES = 20  # at an order that is another one
Edit = tuple[int, int, str]  # start and end in the caption, what stands there then


@generator("rules")
class Rules:
    """See the module."""

    name = "rules-2"  # another number where the rules change what they make

    def __init__(self, config: NegativesConfig):
        self._types, self._seed = config.types, config.seed
        self._each = -(-config.per_caption // len(config.types)) + SPARE

    def make(self, captions: Sequence[str]) -> Made:
        """Candidates for each caption, by type in the order of `negatives.types`."""
        read = chosen(captions, self._seed)
        with Progress("negatives: vocabulary", len(read), "captions") as progress:
            vocabulary = Vocabulary(_counted(read, progress))
        made = Made([])
        with Progress("negatives: rules", len(captions), "captions") as progress:
            for row, words in enumerate(_counted(captions, progress)):
                candidates = self._candidates(Parsed(captions[row], words), vocabulary)
                made.candidates.append(candidates)
                if not candidates:
                    made.reasons[row] = "nothing to change" if words else "no words"
        return made

    def _candidates(self, caption: Parsed, vocabulary: Vocabulary) -> list[Candidate]:
        draw = random.Random()
        makers: dict[str, Callable[[], Iterator[str]]] = {
            "reshuffle": lambda: _reshuffled(caption, draw),
            "swap_nouns": lambda: _swapped(caption, caption.nouns, draw, vocabulary),
            "swap_adjectives": lambda: _swapped(caption, caption.adjectives, draw, vocabulary),
            "replace_nouns": lambda: _replaced(caption, caption.nouns, draw, vocabulary),
            "replace_adjectives": lambda: _replaced(caption, caption.adjectives, draw, vocabulary),
        }
        seen, made = {caption.text}, []
        for kind in self._types:
            # each type draws from its own numbers: it makes the same whichever others are asked for
            draw.seed(caption_hash(f"{kind} {caption.text}", self._seed))
            fresh = (text for text in makers[kind]() if text not in seen and not seen.add(text))
            made += [Candidate(text, kind) for text in islice(fresh, self._each)]
        return made


@dataclass(frozen=True)
class Phrase:
    """Words first to last of a caption, inclusive: `a large red star`; the last is the noun it is about."""

    first: int
    last: int
    sentence: int


@dataclass(frozen=True)
class Spot:
    """A word that can be changed. group: only words of one group trade places; those of `opposite` only with their opposite,
    which alone replaces them."""

    place: int
    kind: str  # noun, adjective
    group: str
    sentence: int
    phrase: Phrase | None


class Parsed:
    """A caption in words, sentences, phrases, and the words that can be changed."""

    def __init__(self, text: str, words: Sequence[Word]):
        self.text, self.words = text, words
        self.sentence_of = _sentences(text, words)
        self.present = {form for word in words for form in (word.text.lower(), word.lemma)}
        self.phrases = list(_phrases(words, self.sentence_of))
        self._inside = {place: phrase for phrase in self.phrases for place in range(phrase.first, phrase.last + 1)}
        self.quoted = _quoted(words)  # of each word whether it is: writing in the picture
        self.nouns: list[Spot] = []
        self.adjectives: list[Spot] = []
        for place in range(len(words)):
            phrase = self._inside.get(place)
            fixed = self.quoted[place] or self.negated(place, phrase)
            found = None if fixed else _group(words, place, phrase)
            if found is not None:
                spots = self.nouns if found[0] == "noun" else self.adjectives
                spots.append(Spot(place, *found, self.sentence_of[place], phrase))

    def lower(self, place: int) -> str:
        """The word in lower case."""
        return self.words[place].text.lower()

    def rest(self, phrase: Phrase, place: int) -> list[str]:
        """What the phrase says beside the word at `place`, without articles."""
        return sorted(
            self.words[other].lemma
            for other in range(phrase.first, phrase.last + 1)
            if other != place and self.words[other].kind != "determiner"
        )

    def symmetric(self, first: int, last: int) -> bool:
        """Whether what stands between the two places, phrases aside, makes the sentence mean the same both ways."""
        between = [place for place in range(first + 1, last) if place not in self._inside]
        return all(self.lower(place) in SYMMETRIC or self.words[place].kind in ("adjective", "adverb") for place in between)

    def joined(self, first: int, last: int) -> bool:
        """Whether nothing but `and`, `or` and commas stands between the two places."""
        return all(word.kind in ("conjunction", "punctuation") for word in self.words[first + 1 : last])

    def doubled(self, new: dict[int, str]) -> bool:
        """Whether one of the new words would stand close to the same word: `a chair chair`, `white and white`."""
        steps = [step for step in range(-CLOSE, CLOSE + 1) if step]
        beside = [(text, place + step) for place, text in new.items() for step in steps if 0 <= place + step < len(self.words)]
        return any(text == new.get(other, self.lower(other)) for text, other in beside)

    def negated(self, place: int, phrase: Phrase | None) -> bool:
        """Whether a `no` or `without` stands in the phrase or just before it: another word would be as true."""
        first = place if phrase is None else phrase.first
        return any(self.lower(before) in NEGATIONS for before in range(max(0, first - 2), place))

    def phrase_between(self, first: int, last: int) -> bool:
        """Whether a phrase stands between the two places."""
        return any(first < phrase.first and phrase.last < last for phrase in self.phrases)

    def changed(self, new: dict[int, str]) -> str:
        """The caption with other words at some places; capitals stay where they are, and articles fit what follows."""
        new = {place: self._cased(place, text) for place, text in new.items()}
        for place in sorted({place - 1 for place in new} | set(new)):
            text = new.get(place, self.words[place].text) if place >= 0 else ""
            following = place + 1
            if text.lower() in ("a", "an") and following < len(self.words) and self._touch(place):
                fitting = article(new.get(following, self.words[following].text))
                if fitting != text.lower() and self.words[following].kind != "punctuation":
                    new[place] = fitting.capitalize() if text[0].isupper() else fitting
        return self.edited((self.words[place].start, self.words[place].end, text) for place, text in new.items())

    def edited(self, edits: Iterable[Edit]) -> str:
        """The caption with stretches of it, none of which overlap, replaced."""
        pieces, position = [], 0
        for start, end, text in sorted(edits):
            pieces += [self.text[position:start], text]
            position = end
        return "".join([*pieces, self.text[position:]])

    def _touch(self, place: int) -> bool:
        return self.text[self.words[place].end : self.words[place + 1].start].strip() == ""

    def _cased(self, place: int, text: str) -> str:
        first = starts(self.words, place) and self.words[place].text[0].isupper()
        return text[:1].upper() + text[1:] if first else text


def _counted(captions: Sequence[str], progress: Progress) -> Iterator[list[Word]]:
    for text in captions:
        yield tagged([text])[0]
        progress.update()


def _sentences(text: str, words: Sequence[Word]) -> list[int]:
    """The number of the sentence that each word belongs to: one ends with . ! or ? before a blank, and with a line."""
    numbers, number = [], 0
    for place, word in enumerate(words):
        numbers.append(number)
        following = text[word.end : words[place + 1].start] if place + 1 < len(words) else ""
        number += (word.text in (".", "!", "?") and bool(following)) or "\n" in following
    return numbers


def _quoted(words: Sequence[Word]) -> list[bool]:
    inside, quoted = False, []
    for word in words:
        inside = {'"': not inside, "“": True, "”": False}.get(word.text, inside)
        quoted.append(inside)
    return quoted


def _phrases(words: Sequence[Word], sentence_of: Sequence[int]) -> Iterator[Phrase]:
    """Stretches of articles, numbers, adverbs, adjectives and nouns, from an article or any of them to the last noun."""
    first, noun = None, None
    for place, word in enumerate([*words, None]):
        inner = word is not None and (
            word.kind in ("noun", "adjective", "number")
            or (word.kind == "adverb" and words[place + 1 : place + 2] and words[place + 1].kind == "adjective")
        )
        begins = word is not None and word.kind == "determiner"
        if first is not None and (not inner or sentence_of[place] != sentence_of[first]):
            if noun is not None:
                yield Phrase(first, noun, sentence_of[first])
            first = noun = None
        if first is None and (inner or begins):
            first = place
        if inner and word is not None and word.kind == "noun":
            noun = place


def _group(words: Sequence[Word], place: int, phrase: Phrase | None) -> tuple[str, str] | None:
    """noun or adjective, and the group of the word; None where it is to stay."""
    word, lower = words[place], words[place].text.lower()
    if lower in OPPOSITES and lower in PLACES | PLACE_NOUNS and word.kind in ("noun", "adjective"):
        return word.kind, "opposite"
    if not usable(words, place):
        return None
    if phrase is not None and word.kind == "adjective" and words[phrase.last].lemma in VIEWS:
        return ("adjective", "opposite") if lower in OPPOSITES else None  # `a medium view`
    if is_colour(word):
        return "adjective", "colour"
    if word.tag in ("NN1", "NN2"):
        return "noun", word.tag
    if word.tag != "AJ0":
        return None
    following = words[place + 1] if place + 1 < len(words) else None
    if class_of(lower) == "other" and (following is None or following.kind not in ("noun", "adjective")):
        return None  # `is seated`: what it says of whom is not known
    return "adjective", class_of(lower)


def _reshuffled(caption: Parsed, draw: random.Random) -> Iterator[str]:
    sentences = list(dict.fromkeys(caption.sentence_of))
    draw.shuffle(sentences)
    for sentence in sentences:
        yield from islice(_moved_phrases(caption, sentence, draw), 1)
    for sentence in sentences:
        yield from _shuffled_words(caption, sentence, draw)


def _moved_phrases(caption: Parsed, sentence: int, draw: random.Random) -> Iterator[str]:
    nouns = {spot.place: spot.group for spot in caption.nouns if spot.group != "opposite"}
    phrases = [phrase for phrase in caption.phrases if phrase.sentence == sentence and phrase.last in nouns]
    pairs = list(combinations(phrases, 2))
    draw.shuffle(pairs)
    for one, other in pairs:
        if nouns[one.last] != nouns[other.last] or caption.symmetric(one.last, other.first):
            continue
        if akin(caption.words[one.last].lemma, caption.words[other.last].lemma):
            continue
        yield caption.edited([_moved(caption, one, other), _moved(caption, other, one)])


def _moved(caption: Parsed, phrase: Phrase, target: Phrase) -> Edit:
    """The text of `phrase` in the place of `target`."""
    words = caption.words
    text = _plain(words, phrase.first) + caption.text[words[phrase.first].end : words[phrase.last].end]
    start, end = words[target.first].start, words[target.last].end
    if starts(words, target.first) and caption.text[start].isupper():
        text = text[:1].upper() + text[1:]
    return start, end, text


def _shuffled_words(caption: Parsed, sentence: int, draw: random.Random) -> Iterator[str]:
    words = caption.words
    places = [
        place
        for place, word in enumerate(words)
        if caption.sentence_of[place] == sentence and word.kind != "punctuation" and not caption.quoted[place]
    ]
    glued = {b for a, b in pairwise(places) if words[a].end == words[b].start}  # 's and n't go with what they end
    places = [place for place in places if place not in glued and place + 1 not in glued]
    told = [place for place in places if words[place].kind in ("noun", "adjective", "verb", "number", "adverb")]
    if len(places) < SHUFFLED or len(told) < 3:
        return
    for _ in range(TRIES):
        order = draw.sample(places, len(places))
        moved = sum(caption.lower(new) != caption.lower(old) for old, new in zip(places, order, strict=True))
        if 2 * moved >= len(places) and [place for place in order if place in set(told)] != told:
            yield caption.changed({old: _plain(words, new) for old, new in zip(places, order, strict=True)})
            return


def _plain(words: Sequence[Word], place: int) -> str:
    """The word without the capital that is only a sentence's."""
    word = words[place]
    single = word.text in ("A", "a") or (len(word.text) > 1 and not word.text.isupper())
    return word.text.lower() if starts(words, place) and single and word.tag != "NP0" else word.text


def _swapped(caption: Parsed, spots: Sequence[Spot], draw: random.Random, vocabulary: Vocabulary) -> Iterator[str]:
    """Pairs of one sentence first, then others; words that are there more than once trade places once."""
    pairs = list(combinations(spots, 2))
    draw.shuffle(pairs)
    pairs.sort(key=lambda pair: (pair[0].sentence != pair[1].sentence, pair[0].group in ("opposite", "other")))
    for one, other in pairs:
        new = {one.place: caption.lower(other.place), other.place: caption.lower(one.place)}
        if _may_trade(caption, one, other, vocabulary) and not caption.doubled(new):
            yield caption.changed(new)


def _may_trade(caption: Parsed, one: Spot, other: Spot, vocabulary: Vocabulary) -> bool:
    """Whether the caption says something else when two words trade places."""
    first, second = caption.lower(one.place), caption.lower(other.place)
    if one.group != other.group or akin(first, second):
        return False
    if one.group == "opposite":  # `top left` and `bottom right`: only what excludes each other
        return OPPOSITES.get(first) == second
    phrases = one.phrase, other.phrase
    if None not in phrases and phrases[0] == phrases[1]:
        return False
    noun = one.kind == "noun"
    if noun and not (_fits(caption, one, second, vocabulary) and _fits(caption, other, first, vocabulary)):
        return False
    if one.sentence != other.sentence or caption.symmetric(one.place, other.place):
        if None in phrases:  # `red, blue and white`; but not `the cup is red and the star is blue`
            return one.sentence == other.sentence and caption.phrase_between(one.place, other.place)
        same_head = caption.words[phrases[0].last].lemma == caption.words[phrases[1].last].lemma
        if not noun and same_head:
            return False
        if noun and phrases[1].first == other.place and caption.joined(one.place, other.place):
            return False  # `dried leaves and branches`: both may be dried
        return caption.rest(phrases[0], one.place) != caption.rest(phrases[1], other.place)
    return True


def _fits(caption: Parsed, spot: Spot, noun: str, vocabulary: Vocabulary) -> bool:
    """Whether the noun may stand there, by its number and article."""
    return caption.words[spot.place].tag != "NN1" or vocabulary.fits(noun, article_of(caption.words, spot.place))


def _replaced(caption: Parsed, spots: Sequence[Spot], draw: random.Random, vocabulary: Vocabulary) -> Iterator[str]:
    """Each word in turn by one of its kind, then by another one. What the new word surely excludes comes first."""
    spots = draw.sample(list(spots), len(spots))
    spots.sort(
        key=lambda spot: (spot.group == "opposite", spot.group == "other" and caption.lower(spot.place) not in OPPOSITES)
    )
    choices = [(spot, _others(caption, spot, draw, vocabulary)) for spot in spots]
    for turn in range(NEAREST):
        for spot, others in choices:
            if turn < len(others) and not caption.doubled({spot.place: others[turn]}):
                yield caption.changed({spot.place: others[turn]})


def _others(caption: Parsed, spot: Spot, draw: random.Random, vocabulary: Vocabulary) -> list[str]:
    """What may stand in the word's place, in a random order; its opposite alone where it has one and no closed class."""
    word = caption.words[spot.place]
    lower, noun = word.text.lower(), spot.kind == "noun"
    tag = word.tag if noun else "AJ0"
    opposite = OPPOSITES.get(lower)
    if spot.group == "opposite" or (spot.group == "other" and opposite is not None):
        told = spot.group == "opposite" or vocabulary.knows(opposite, tag)
        return [opposite] if opposite is not None and told and not _is_there(caption, opposite) else []
    known = [other for other in vocabulary.kind(lower, tag) if not _is_there(caption, other)]
    if noun:
        known = [other for other in known if _fits(caption, spot, other, vocabulary)]
        known = [other for other in known if caption.present.isdisjoint(near(other))]  # no seat beside the chair that is there
    return draw.sample(known[:NEAREST], min(NEAREST, len(known)))


def _is_there(caption: Parsed, word: str) -> bool:
    """Whether the caption has the word, or its singular; the singular of what it has are its lemmas."""
    return not caption.present.isdisjoint(forms(word))
