"""The problem columns: what each says, and that nothing is said of a row without the problem."""

from dataclasses import replace

import pandas as pd
import pytest
from tiny_dataset import change, make_subject, suites, with_records

from fast_goal.data.quality import inspect_images, outlier_columns, pairs_table, records_table, regions_table
from fast_goal.data.records import UNNAMED


@pytest.fixture
def subject(tmp_path):
    return make_subject(tmp_path)


FACTS = {"row", "image_id", "image_path", "split", "long_words", "has_pair", "skipped_share", "kind", "sentence"}


def problems(table):
    """(row, column) -> the text, for the problem columns."""
    columns = [name for name in table.columns if name not in FACTS]
    return {(row, name): text for name in columns for row, text in table[name].items() if isinstance(text, str)}


def test_good_tables_have_no_problem(subject):
    table = records_table(subject, inspect_images(subject.dataset), [subject.dataset])
    for made in (table, regions_table(subject), pairs_table(subject)):
        assert problems(made) == {}
        assert made["row"].tolist() == list(range(len(made)))
    assert table["has_pair"].tolist() == [None, "yes", "yes", "yes", "yes", "yes"]
    assert table["long_words"].isna().tolist() == [True] + [False] * 5


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"x1": -0.5}, {"outside": "box (-0.5, 2, 9, 8) in an image of 40 x 30"}),
        ({"y2": 30.5}, {"outside": "box (1, 2, 9, 30.5) in an image of 40 x 30"}),
        ({"x2": 40.0, "y2": 30.0}, {}),
        ({"x2": 40.0005}, {}),  # the rounding of float32
        ({"y1": 8.0, "y2": 2.0}, {"no_area": "box (1, 8, 9, 2)"}),
        ({"score": float("nan"), "x1": float("nan")}, {"incomplete": "no value in x1, score"}),
    ],
)
def test_regions(subject, values, problem):
    table = regions_table(replace(subject, regions=change(subject.regions, 3, **values)))
    assert problems(table) == {(3, column): text for column, text in problem.items()}


@pytest.mark.parametrize(
    ("values", "column", "problem"),
    [
        ({"kind": "centre"}, "not_the_region", "centre box (0, 0, 20, 15), but region 0 is quadrant (0, 0, 20, 15)"),
        ({"region_index": 9}, "not_the_region", "the image has no region 9"),
        ({"char_start": -45}, "not_the_span", "the caption's characters -45 to 28 are '', the sentence is"),
        ({"sentence": ""}, "not_the_span", "are 'A red ball lies on the left.', the sentence is ''"),
        ({"char_end": 2000}, "not_the_span", "characters 0 to 2000"),
    ],
)
def test_pairs(subject, values, column, problem):
    table = pairs_table(replace(subject, pairs=change(subject.pairs, 2, **values)))
    ((place, text),) = problems(table).items()
    assert place == (2, column)
    assert problem in text


@pytest.mark.parametrize(
    ("ranks", "gaps", "not_best"),
    [
        ([1, 2, 3], set(), set()),
        ([3, 1, 2], set(), set()),
        ([1, 1, 2], set(), {0, 1, 2}),
        ([1, 3, 4], {1}, set()),
        ([1, 2, 2], {1, 2}, set()),
        ([2, 3, 4], {0}, {0, 1, 2}),
    ],
)
def test_ranks(subject, ranks, gaps, not_best):
    pairs = pd.concat([subject.pairs.iloc[[0]]] * 3, ignore_index=True).assign(rank=ranks)
    table = pairs_table(replace(subject, pairs=pairs))
    assert {row for row, column in problems(table) if column == "rank_gap"} == gaps
    assert {row for row, column in problems(table) if column == "not_one_best"} == not_best


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (("short",), {"short_captions_present"}),
        (("long",), {"long_captions_present", "mean_words"}),
        (("short", "long"), {"short_captions_present", "long_captions_present", "mean_words"}),
        ((), {"long_captions_present", "mean_words"}),  # those that are only measured on
    ],
)
def test_captions_are_expected_of_those_that_are_trained_on(subject, trained, expected):
    captions = [["", "A ball."], [" "], [], ["A ball."], [], []]  # of pretrain, train three times, val and test
    subject = with_records(subject, subject.dataset.records.assign(captions=captions))
    subject = replace(subject, trained_captions=frozenset(trained))
    suite = suites(subject)[0]
    rules = {rule.name for rule in suite.rules}
    assert rules & {"short_captions_present", "long_captions_present", "mean_words"} == expected
    found = {key: text for key, text in problems(suite.table).items() if "short" in text}
    mute = dict.fromkeys([(1, "no_short_caption"), (2, "no_short_caption")], "there is no short caption")
    assert found == (mute if "short" in trained else {})


def test_a_test_image_among_the_pretraining_images(subject):
    table = subject.dataset.records
    leak = with_records(subject, change(table, 5, content_hash=table["content_hash"][0]))
    found = records_table(leak, inspect_images(leak.dataset), [leak.dataset])
    text = "the same content_hash as image 'p0' of split pretrain of tiny (row 0)"
    assert problems(found) == {(5, "bytes_in_training"): text}


def test_leaks_from_a_data_set_that_is_trained_on_before(subject):
    """Of a training data set only what is held out is a leak, by the bytes; the ids of another data set say nothing."""
    table = subject.dataset.records
    earlier = replace(subject.dataset, name="earlier", records=change(table, 0, split="train"))
    found = records_table(subject, inspect_images(subject.dataset), [subject.dataset, earlier])
    assert problems(found) == {}, "the training images of both may be the same"
    for row, column in ((5, "bytes_in_training"), (4, "validation_in_training")):
        leak = replace(earlier, records=change(earlier.records, 1, content_hash=table["content_hash"][row]))
        found = records_table(subject, inspect_images(subject.dataset), [subject.dataset, leak])
        name = table["image_id"][1]
        assert problems(found) == {(row, column): f"the same content_hash as image {name!r} of split train of earlier (row 1)"}


def test_an_empty_content_hash_is_equal_to_nothing(subject):
    blank = with_records(subject, subject.dataset.records.assign(content_hash=""))
    assert problems(records_table(blank, inspect_images(blank.dataset), [blank.dataset])) == {}


def test_twins_are_no_leak(subject):
    """Two test images alike in all but their bytes, and two copies within one split."""
    table = subject.dataset.records
    twins = with_records(subject, change(table, 2, content_hash=table["content_hash"][1]))
    assert problems(records_table(twins, inspect_images(twins.dataset), [twins.dataset])) == {}


def test_skipped_share_counts_a_sample_once(subject):
    skipped = pd.concat([subject.skipped] * 3 + [subject.skipped.assign(sample="a0", step="flism")])
    assert replace(subject, skipped=skipped).skipped_share == pytest.approx(2 / 7)
    assert replace(with_records(subject, subject.dataset.records[:0]), skipped=skipped[:0]).skipped_share == 0


def test_an_image_that_lost_only_a_caption_is_not_skipped(subject):
    skipped = pd.concat([subject.skipped, subject.skipped.assign(sample="a0", reason="duplicate caption")])
    assert replace(subject, skipped=skipped).skipped_share == pytest.approx(1 / 7)


def test_a_file_that_no_caption_names_is_not_lost(subject):
    skipped = pd.concat([subject.skipped, subject.skipped.assign(sample="images/other.jpg", reason=UNNAMED)])
    assert replace(subject, skipped=skipped).skipped_share == pytest.approx(1 / 7)


def test_images_are_inspected_alike_by_any_number_of_workers(subject):
    (subject.dataset.root / "a1.png").unlink()
    (subject.dataset.root / "a2.png").write_bytes(b"no image")
    one, many = (inspect_images(subject.dataset, workers=workers) for workers in (1, 4))
    pd.testing.assert_frame_equal(one, many)
    assert one["missing_file"].tolist() == [None, None, "no file a1.png", None, None, None]
    assert one["undecodable"].notna().tolist() == [False, False, False, True, False, False]
    assert "a2.png" not in one["undecodable"][3]  # the path stands beside it


def test_of_many_images_a_sample_is_decoded_and_all_are_looked_up(subject):
    for name, content in (("a0", b"no image"), ("a1", b""), ("a2", b"no image")):
        (subject.dataset.root / f"{name}.png").write_bytes(content)
    (subject.dataset.root / "t0.png").unlink()
    found = inspect_images(subject.dataset, most=3, seed=1)
    again = inspect_images(subject.dataset, most=3, seed=1)
    pd.testing.assert_frame_equal(found, again)
    assert found["decoded"].sum() == 3
    assert found["missing_file"].notna().tolist() == [False] * 5 + [True]
    for row in (1, 3):  # damage is seen only by decoding
        assert pd.notna(found["undecodable"][row]) == found["decoded"][row]
    assert found["undecodable"][2].endswith("(0 bytes)")
    assert inspect_images(subject.dataset, most=0)["decoded"].sum() == 0


def test_outliers():
    sizes = [(100 + number, 80) for number in range(20)] + [(3000, 2000), (20, 90), (700, 100)]
    found = outlier_columns(pd.DataFrame(sizes, columns=["width", "height"]), max_aspect=5, image_size=64)
    assert found["small_image"].notna().to_numpy().nonzero()[0].tolist() == [21]
    assert found["long_shape"].notna().to_numpy().nonzero()[0].tolist() == [22]
    assert found["odd_area"].notna().to_numpy().nonzero()[0].tolist() == [20, 21, 22]
    assert "one side is 7.0 times the other" in found["long_shape"][22]
    alike = pd.DataFrame([(100, 80)] * 20 + [(50, 40)], columns=["width", "height"])
    assert outlier_columns(alike, max_aspect=5, image_size=None).isna().all(axis=None)
