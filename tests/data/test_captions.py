"""Sentences and tokens of captions, against open_clip's own tokenizer and published cases."""

import random
import threading
import time
from itertools import pairwise

import pytest
import torch

from fast_goal.data.captions import Sentence, split_sentences, token_span, token_spans, tokenize, trim
from fast_goal.environment import prepare

BUS = "A red bus stands at the stop. Two people wait near the bench. The sky is clear and blue."

ODD = [
    "",
    " ",
    "\n\n \t",
    ".",
    "...",
    '"',
    "(" * 500,
    "'" * 501,
    "a." * 300,
    "1. " * 300,
    "∯ȸ&ᓰ& a dog ∯. &ᓱ& a cat ♬ runs ☏ .",
    "[](){}\\1 \\g<0> *+?^$| . a(b. c)d. [e",
    "\ud83d half a pair. \udc00 the other.",
    "\x00 null. \x1f unit \x1c file. next",
    "İstanbul is tall. ΟΔΟΣ. ŒUVRE ﬁne.",
    "👩‍👩‍👧‍👦 a family 🏳️‍🌈. emoji 🎉🎉!",
    "cafÃ© itâ€™s broken. naÃ¯ve &amp;amp; sons &lt;b&gt; &nbsp; end &#x1F600;.",
    "ｆｕｌｌ ｗｉｄｔｈ　text。 次の文。",
    "\u200b\ufeffzero\u200bwidth\u00ad soft. \u2028 line \u2029 para",
    "<start_of_text> a dog <end_of_text> !!!",
    "word " * 3000,
    "e\u0301 decomposed a\u0300. " * 40,
    "‘Curly’ “quotes” … and — dashes – don’t stop. " * 5,
]


def sentences(text: str) -> list[str]:
    return [sentence.text for sentence in split_sentences(text)]


def simple_tokenizer():
    prepare()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


class TestSplitSentences:
    @pytest.mark.parametrize(
        "expected",
        [
            ["A dog runs .", "the cat sits on a mat ."],
            ["Wait... what.", "It is 3.5 m tall."],
            ["Dr. Smith stands near Mr. Jones.", "They wear hats."],
            ['A sign reads "No. 5 St." on it.', "the wall is red"],
            ['The bus says "Stop. Now." and leaves.', "a man walks."],
            ["It is 5 p.m. in the U.S.", "The sky is blue."],
            ["What a view!", "Is that a boat?", "Yes."],
            ["A close-up of 2/3 of a gray cat's face.", "Daytime."],
            ["Cats sit.", "Dogs run.", "Cats sit."],
            ["a man on a bike", "a second line. still the second", "third"],
        ],
    )
    def test_cases(self, expected):
        if expected[-1] == "third":
            assert sentences("a man on a bike\na second line. still the second\r\n\r\n third ") == [
                "a man on a bike",
                "a second line.",
                "still the second",
                "third",
            ]
        else:
            assert sentences(" ".join(expected)) == expected

    def test_spans_of_repeated_sentences(self):
        assert split_sentences("Cats sit.  Dogs run. Cats sit. ") == [
            Sentence("Cats sit.", 0, 9),
            Sentence("Dogs run.", 11, 20),
            Sentence("Cats sit.", 21, 30),
        ]

    @pytest.mark.parametrize("text", [*ODD, BUS])
    def test_spans_cover_every_letter_once(self, text):
        found = split_sentences(text)
        end = 0
        for sentence in found:
            assert text[sentence.start : sentence.end] == sentence.text
            assert sentence.text == sentence.text.strip() != ""
            assert sentence.start >= end and not text[end : sentence.start].strip()
            end = sentence.end
        assert not text[end:].strip()

    def test_random_texts_are_accepted_and_covered(self):
        generator = random.Random(1)
        pieces = [
            "a dog",
            "Dr.",
            "3.5",
            '"',
            "'",
            "(",
            ")",
            "...",
            "…",
            "!",
            "?",
            ".",
            " ",
            " ",
            " ",
            "\n",
            "U.S.",
            "∯",
            "ȸ",
            "1.",
            "[3]",
            "e.g.",
            "&",
            "🎉",
        ]
        for _ in range(300):
            text = "".join(generator.choice(pieces) for _ in range(generator.randint(1, 60)))
            found = split_sentences(text)
            assert "".join("".join(s.text.split()) for s in found) == "".join(text.split())
            assert all(text[s.start : s.end] == s.text for s in found)

    def test_long_text_is_split_as_its_parts(self):
        parts = [f'Item {i} of Dr. Smith is 3.{i} m tall and says "no. 5" to the U.S. flag.' for i in range(200)]
        assert sentences(" ".join(parts)) == parts

    @pytest.mark.parametrize(
        "unit", ["word ", "A dog runs past the old house. ", "a dog, a cat; ", "word", "(a 'b\" ", "No. 5. "]
    )
    def test_ten_thousand_words_are_quick(self, unit):
        text = unit * (10_000 // max(len(unit.split()), 1))
        begin = time.perf_counter()
        found = split_sentences(text)
        assert time.perf_counter() - begin < 5  # measured: 0.2 s
        assert "".join("".join(s.text.split()) for s in found) == "".join(text.split())

    def test_threads_do_not_mix_texts(self):
        texts = [" ".join(f"Number {i} has the part {j}." for j in range(20)) for i in range(8)]
        expected = [split_sentences(text) for text in texts]
        wrong = []

        def work(index: int) -> None:
            for _ in range(15):
                if split_sentences(texts[index]) != expected[index]:
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestTokenSpan:
    def test_published_cases(self, vectors):
        checked = 0
        for case in vectors["V3_text_token_lookup"]["cases"]:
            if "exact_range_of_sentence_tokens" in case:
                start = case["caption"].index(case["sentence"])
                span = token_span(case["caption"], start, start + len(case["sentence"]), 248)
                assert span == tuple(case["exact_range_of_sentence_tokens"]), case["name"]
                checked += 1
        assert checked >= 7

    def test_second_of_two_equal_sentences(self):
        text = "Cats sit. Dogs run. Cats sit."
        assert token_span(text, 0, 9, 77) == (1, 4)
        assert token_span(text, 20, 29, 77) == (7, 10)

    def test_published_long_caption(self, vectors):
        case = vectors["V3_text_token_lookup"]
        text = " ".join(f"Item number {i} is a small wooden chair next to the wall." for i in range(40))
        tokens, lengths = tokenize([text], 248)
        assert lengths.tolist() == [case["long_caption_total_ids"]]
        spans = token_spans(text, [(s.start, s.end) for s in split_sentences(text)], 248)
        visible = [span for span in spans if span != (0, 0)]
        assert visible[0][0] == 1 and visible[-1][1] == 247  # position 247 holds the end token
        assert tokens[0, 247] == 49407
        assert all(a[1] == b[0] for a, b in pairwise(visible))
        assert spans[len(visible) :] == [(0, 0)] * (40 - len(visible)) and len(visible) < 40

    def test_end_token_is_never_in_a_span(self):
        text = "one two three four five"
        for context, expected in ((8, (1, 6)), (7, (1, 6)), (6, (1, 5)), (4, (1, 3)), (3, (1, 2)), (2, (0, 0))):
            assert token_span(text, 0, len(text), context) == expected

    def test_empty_and_blank_spans(self):
        assert token_span("a dog", 2, 2, 77) == (0, 0)
        assert token_span("a dog", 1, 2, 77) == (0, 0)
        assert token_span("", 0, 0, 77) == (0, 0)
        assert token_span("a dog", 50, 60, 77) == (0, 0)
        assert token_span("a dog", 4, 2, 77) == (0, 0)
        assert token_spans("a dog", [], 77) == []

    def test_part_of_a_word_takes_its_token(self):
        assert token_span("a dog sits", 3, 4, 77) == (2, 3)
        tokenizer = simple_tokenizer()
        word = "xylophonically"
        pieces = [tokenizer.decoder[i].removesuffix("</w>") for i in tokenizer.encode(word)]
        assert len(pieces) > 1
        assert token_span(word, 0, len(pieces[0]), 77) == (1, 2)
        assert token_span(word, len(pieces[0]) - 1, len(pieces[0]) + 1, 77) == (1, 3)

    @pytest.mark.parametrize("seed", range(4))
    def test_sentence_tokens_equal_the_tokens_of_the_sentence(self, seed):
        """Oracle: the ids in the span are those of the sentence tokenised alone."""
        generator = random.Random(seed)
        tokenizer = simple_tokenizer()
        words = [
            "A", "dog", "RUNS", "the", "xylophonist's", "don't", "3.5", "m", "café", "naïve", "Straße",
            "İstanbul", "日本語", "🎉🎉", "&amp;", "&lt;b&gt;", "&quot;x&quot;", "“curly”", "it’s", "ﬁne",
            "cafÃ©", "…", "(red)", "#1!?", "a\u0301", "—", "Ω", "&nbsp;x", "e-mail",
        ]  # fmt: skip
        blanks = [" ", "  ", "\t", " \u00a0", "   "]
        for _ in range(60):
            parts, spans, text = [], [], ""
            for _ in range(generator.randint(1, 7)):
                part = generator.choice(blanks).join(generator.choices(words, k=generator.randint(1, 9))) + generator.choice(
                    [".", " .", "!", ""]
                )
                text += generator.choice(blanks)
                spans.append((len(text), len(text) + len(part)))
                parts.append(part)
                text += part
            ids = [0, *tokenizer.encode(text)]
            alone = [tokenizer.encode(part) for part in parts]
            if ids[1:] != [token for part in alone for token in part]:
                continue  # the cleaning of one part depends on another: there is no such thing as its own tokens
            for (first, last), own in zip(token_spans(text, spans, 100_000), alone, strict=True):
                assert ids[first:last] == own, text

    @pytest.mark.parametrize("text", ODD)
    def test_odd_texts(self, text):
        found = split_sentences(text)
        spans = token_spans(text, [(s.start, s.end) for s in found], 248)
        _, lengths = tokenize([text], 248)
        last_visible = min(int(lengths[0]) - 1, 247)
        for first, last in spans:
            assert (first, last) == (0, 0) or 1 <= first < last <= last_visible
        shown = sorted(span for span in spans if span != (0, 0))
        if shown:  # every token lies in some sentence
            assert shown[0][0] == 1 and shown[-1][1] == last_visible
            assert all(b[0] <= a[1] for a, b in pairwise(shown))

    def test_mended_words_keep_their_place(self):
        text = "Tom &amp; Jerry run.  The cafÃ© is “open”. It’s &lt;red&gt;."
        found = split_sentences(text)
        tokenizer = simple_tokenizer()
        ids = [0, *tokenizer.encode(text)]
        decoded = [tokenizer.decode(ids[a:b]).strip() for a, b in token_spans(text, [(s.start, s.end) for s in found], 77)]
        assert decoded == ["tom & jerry run .", 'the café is " open ".', "it 's < red >."]


class TestTokenize:
    @pytest.mark.parametrize("context_length", [77, 248, 10])
    def test_equals_open_clip(self, context_length):
        prepare()
        import open_clip

        texts = [*ODD, BUS, "! !! !!!a", BUS * 20]
        tokens, lengths = tokenize(texts, context_length)
        assert tokens.dtype == torch.int64 and tokens.shape == (len(texts), context_length)
        assert torch.equal(tokens, open_clip.tokenize(texts, context_length))
        assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-16", context_length=context_length)(texts))
        tokenizer = simple_tokenizer()
        assert lengths.tolist() == [len(tokenizer.encode(text)) + 2 for text in texts]

    def test_no_texts(self):
        tokens, lengths = tokenize([], 77)
        assert tokens.shape == (0, 77) and lengths.shape == (0,)
        assert trim(tokens).shape[0] == 0

    def test_truncated_iff_longer_than_the_context(self):
        text = "one two three four five"  # 7 ids with start and end
        for context_length in (6, 7, 8):
            tokens, lengths = tokenize([text], context_length)
            assert (lengths[0] > context_length) == (context_length < 7)
            assert tokens[0, min(6, context_length - 1)] == 49407

    def test_trim(self):
        tokens, lengths = tokenize(["a dog", "a", "!" * 5 + " a cat sits"], 77)
        short = trim(tokens)
        assert short.shape == (3, int(lengths.max())) and torch.equal(short, tokens[:, : short.shape[1]])
        assert torch.equal(trim(short), short)

    def test_trim_keeps_zero_ids_inside(self):
        tokens = torch.tensor([[49406, 0, 0, 49407, 0, 0], [49406, 5, 49407, 0, 0, 0]])
        assert torch.equal(trim(tokens), tokens[:, :4])
