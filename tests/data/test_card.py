"""The data card: its figures against counts made by hand, and that it names no machine."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_dataset import CAPTIONS, WORDS, find, make_subject, with_records

from fast_goal.data import captions
from fast_goal.data import card as card_module
from fast_goal.data.caption_checks import CaptionLengths, caption_lengths
from fast_goal.data.card import NOT_STATED
from fast_goal.data.card_pictures import GRID, box_density, draw_lengths
from fast_goal.data.validation import Cosines


def describe(subject, lengths=None, pictures=None, cosines=None):
    found = find(subject, cosines=cosines)
    return card_module.describe(found if lengths is None else replace(found, lengths=lengths), pictures or {})


def lengths_of(records, sample=1000):
    return caption_lengths(records, sample, seed=0)


@pytest.fixture
def subject(tmp_path):
    return make_subject(tmp_path)


def cells(text, name):
    """The cells of the first table row that starts with `name`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_caption_lengths(subject):
    lengths = lengths_of(subject.dataset.records)
    _, tokens = captions.tokenize(CAPTIONS[1:], 77)
    assert lengths.words.tolist() == [WORDS] * 5
    assert lengths.sentences.tolist() == [3] * 5
    assert lengths.tokens.tolist() == tokens.tolist()
    assert lengths.rows.tolist() == [1, 2, 3, 4, 5]


def test_sentences_are_counted_on_a_sample_of_many_captions(subject, monkeypatch):
    monkeypatch.setattr("fast_goal.data.caption_checks.SENTENCE_SAMPLE", 3)
    records = subject.dataset.records
    lengths = lengths_of(records, sample=4)
    assert len(lengths.tokens) == len(lengths.rows) == 4
    assert len(lengths.sentences) == 3
    assert "Sentences: of 3 captions." in describe(subject, lengths)


def test_figures(subject):
    lengths = CaptionLengths(np.array([10, 20, 30, 40]), np.array([50, 77, 78, 300]), np.array([1, 2, 3, 4]), np.arange(4))
    lengths = replace(lengths, contexts=(77, 248))
    text = describe(subject, lengths, {"captions": "tiny.png"})
    assert cells(text, "train") == ["3", "3", "3"]
    assert cells(text, "pretrain") == ["1", "0", "1"]
    assert cells(text, "all") == ["6", "5", "6"]
    assert cells(text, "words") == ["25", "10", "11.5", "25", "38.5", "40"]
    assert "50.0% have more than 77 tokens; 25.0% have more than 248 tokens" in text
    assert "![Length of the long captions in words and tokens](tiny.png)" in text
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
    assert NOT_STATED not in describe(scenes)


def test_the_same_data_elsewhere_give_the_same_card(tmp_path):
    texts = []
    for name in ("one", "two"):
        root = tmp_path / name
        root.mkdir()
        subject = make_subject(root)
        inside = subject.skipped.assign(sample=str(root / "sub" / "bad.png"))
        outside = subject.skipped.assign(sample=str(tmp_path.parent / "stray.png"))
        subject = replace(subject, skipped=pd.concat([inside, outside]))
        texts.append(describe(subject))
    assert texts[0] == texts[1]
    assert str(tmp_path.parent) not in texts[0]
    assert "sub/bad.png (row 7); stray.png (row 7)" in texts[0]


def test_without_long_captions_regions_and_skipped_samples(subject):
    bare = with_records(subject, subject.dataset.records.assign(long_caption=""))
    bare = replace(bare, regions=None, pairs=None, skipped=subject.skipped[:0])
    text = describe(bare)
    assert "### Long captions\n\nNone." in text
    assert "### Skipped samples\n\nNone." in text
    assert "Regions" not in text


def test_a_bar_in_a_reason_does_not_break_the_table(subject):
    odd = replace(subject, skipped=subject.skipped.assign(reason="a|b\nc"))
    assert "| a\\|b c |" in describe(odd)


@pytest.mark.parametrize("tokens", [[12], [30, 60, 90, 400], [77] * 3])
def test_the_picture_is_a_png_and_the_same_each_time(tmp_path, tokens):
    lengths = CaptionLengths(np.array(tokens), np.array(tokens), np.array(tokens), np.arange(len(tokens)))
    for name in ("one.png", "two.png"):
        draw_lengths(lengths, "tiny", tmp_path / name)
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 400
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_density_of_the_boxes_against_counting_cell_by_cell(subject):
    records = subject.dataset.records
    boxes = np.random.default_rng(0).uniform(0, 1, (30, 2, 2))
    boxes = np.sort(boxes, axis=1) * [40, 30]
    pairs = pd.DataFrame(boxes.reshape(30, 4), columns=["x1", "y1", "x2", "y2"]).assign(image_id="a0")
    density = box_density(pairs, records)
    centres = (np.arange(GRID) + 0.5) / GRID
    for row, column in ((0, 0), (10, 50), (32, 32), (63, 63), (40, 7)):
        x, y = centres[column] * 40, centres[row] * 30
        covered = ((pairs.x1 <= x) & (x < pairs.x2) & (pairs.y1 <= y) & (y < pairs.y2)).mean()
        assert density[row, column] == pytest.approx(covered)


def test_all_pictures_are_drawn_and_shown(subject, tmp_path):
    hashes = [f"{number:x}" * 16 for number in range(6)]
    hashes[5] = hashes[1][:-1] + "0"  # t0 is like a0
    table = pd.DataFrame({"image_id": subject.dataset.records["image_id"], "perceptual_hash": hashes})
    subject = replace(subject, dataset=replace(subject.dataset, hashes=table))
    cosines = Cosines("a CLIP", np.arange(1, 5), np.full(4, 0.31234), np.full(4, 0.1))
    found = find(subject, cosines=cosines)
    pictures = card_module.draw(found, tmp_path, seed=0)
    assert list(pictures) == ["captions", "examples", "boxes", "near_duplicates"]
    text = card_module.describe(found, pictures)
    for name in pictures.values():
        assert f"]({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
    assert "1 held-out images like a training image" in text
    assert "0.3123, and 0.1000 where the captions are shuffled" in text
    assert "0.2434 for GLIT100k" in text
    assert "0.2448 for DOCCI" in text


def test_pictures_of_files_that_cannot_be_read_are_left_out(subject, tmp_path):
    for path in subject.dataset.root.glob("*.png"):
        path.unlink()
    assert list(card_module.draw(find(subject), tmp_path, seed=0)) == ["captions", "boxes"]


def test_published_facts_stand_beside_what_was_found(subject):
    facts = {"counts": {"train": 9647}, "mean_words": 136, "captions": None, "pairs": None}
    text = describe(replace(subject, dataset=replace(subject.dataset, facts=facts, published={"train": 9640})))
    assert cells(text, "samples of train") == ["9,647", "9,640"]
    assert cells(text, "mean words of the long captions") == ["136", "21"]
