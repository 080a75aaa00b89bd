"""The data card: its figures against counts made by hand, and that it names no machine."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_dataset import CAPTION, make_subject, with_records

from fast_goal.data import captions
from fast_goal.data.card import NOT_STATED, CaptionLengths, caption_lengths, describe, draw_tokens


@pytest.fixture
def subject(tmp_path):
    return make_subject(tmp_path)


def cells(text, name):
    """The cells of the first table row that starts with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_caption_lengths(subject):
    lengths = caption_lengths(subject.dataset.records)
    _, tokens = captions.tokenize([CAPTION], 77)
    assert lengths.words.tolist() == [17] * 5
    assert lengths.sentences.tolist() == [2] * 5
    assert lengths.tokens.tolist() == [int(tokens[0])] * 5


def test_sentences_are_counted_on_a_sample_of_many_captions(subject, monkeypatch):
    monkeypatch.setattr("fast_goal.data.card.SENTENCE_SAMPLE", 3)
    records = subject.dataset.records
    lengths = caption_lengths(records)
    assert len(lengths.sentences) == 3
    assert "Sentences: of 3 captions." in describe(subject, lengths, None)


def test_figures(subject):
    lengths = CaptionLengths(np.array([10, 20, 30, 40]), np.array([50, 77, 78, 300]), np.array([1, 2, 3, 4]))
    text = describe(subject, lengths, "tiny.png")
    assert cells(text, "train") == ["3", "3", "3"]
    assert cells(text, "pretrain") == ["1", "0", "1"]
    assert cells(text, "all") == ["6", "5", "6"]
    assert cells(text, "words") == ["25", "10", "11.5", "25", "38.5", "40"]
    assert "50.0% have more than 77 tokens; 25.0% have more than 248 tokens" in text
    assert "![Length of the long captions in tokens](tiny.png)" in text
    assert cells(text, "width") == ["40"] * 6
    assert cells(text, "regions per image") == ["4"] * 6
    assert cells(text, "similarity of the pairs")[:2] == ["0.450", "0.400"]
    assert cells(text, "quadrant") == ["10", "10", "100.0%"]
    assert cells(text, "detector") == ["5", "0", "0.0%"]
    assert "5 of the 5 images FLISM was asked for (train, val, test) have a pair." in text
    assert cells(text, "download") == ["missing image", "1", "gone (row 7)"]
    assert "14.29% of all samples." in text
    assert NOT_STATED in text
    assert "`0123456789abcdef`" in text


def test_the_licence_of_generated_scenes_is_known(subject):
    scenes = replace(subject, dataset=replace(subject.dataset, source="scenes"))
    assert NOT_STATED not in describe(scenes, caption_lengths(scenes.dataset.records), None)


def test_the_same_data_elsewhere_give_the_same_card(tmp_path):
    texts = []
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        subject = make_subject(root)
        inside = subject.skipped.assign(sample=str(root / "sub" / "bad.png"))
        outside = subject.skipped.assign(sample=str(tmp_path.parent / "stray.png"))
        subject = replace(subject, skipped=pd.concat([inside, outside]))
        texts.append(describe(subject, caption_lengths(subject.dataset.records), None))
    assert texts[0] == texts[1]
    assert str(tmp_path.parent) not in texts[0]
    assert "sub/bad.png (row 7); stray.png (row 7)" in texts[0]


def test_without_long_captions_regions_and_skipped_samples(subject):
    bare = with_records(subject, subject.dataset.records.assign(long_caption=""))
    bare = replace(bare, regions=None, pairs=None, skipped=subject.skipped[:0])
    text = describe(bare, caption_lengths(bare.dataset.records), None)
    assert "### Long captions\n\nNone." in text
    assert "### Skipped samples\n\nNone." in text
    assert "Regions" not in text


def test_a_bar_in_a_reason_does_not_break_the_table(subject):
    odd = replace(subject, skipped=subject.skipped.assign(reason="a|b\nc"))
    assert "| a\\|b c |" in describe(odd, caption_lengths(odd.dataset.records), None)


@pytest.mark.parametrize("tokens", [[12], [30, 60, 90, 400], [77] * 3])
def test_the_picture_is_a_png_and_the_same_each_time(tmp_path, tokens):
    lengths = CaptionLengths(np.array(tokens), np.array(tokens), np.array(tokens))
    for name in ("one.png", "two.png"):
        draw_tokens(lengths, "tiny", tmp_path / name)
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 400
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
