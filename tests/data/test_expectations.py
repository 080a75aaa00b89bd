"""Every expectation holds on a good data set, and exactly the right one fails on each corrupted one."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from planted_defects import DEFECTS
from tiny_dataset import CAPTIONS, CONFIG, WORDS, change, make_subject, suites, with_records

from fast_goal.data.expectations import check
from fast_goal.data.rules import MAX_WORDS, Seen, pairs_rules, records_rules, regions_rules
from fast_goal.data.validation import Cosines


def failures(subject, docs, **options):
    """(suite and rule) -> the outcome, for the rules that fail."""
    made = suites(subject, **options)
    return failing(made, docs)


def failing(made, docs):
    outcomes = check(made, docs)
    return {f"{outcome.suite}.{outcome.rule.name}": outcome for outcome in outcomes if not outcome.passed}


def records(where, **values):
    return lambda subject: with_records(subject, change(subject.dataset.records, where(subject.dataset.records), **values))


def regions(row, **values):
    return lambda subject: replace(subject, regions=change(subject.regions, row, **values))


def pairs(row, **values):
    return lambda subject: replace(subject, pairs=change(subject.pairs, row, **values))


def image(name):
    return lambda table: (table["image_id"] == name).to_numpy()


def remove_file(subject):
    (subject.dataset.root / "a1.png").unlink()
    return subject


def truncate_file(subject):
    path = subject.dataset.root / "a1.png"
    Image.effect_noise((40, 30), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-400])
    return subject


def grow_file(subject):
    Image.new("RGB", (41, 30)).save(subject.dataset.root / "a1.png")
    return subject


def same_id(subject):
    return replace(
        with_records(subject, change(subject.dataset.records, 3, image_id="a1")),
        regions=subject.regions[subject.regions["image_id"] != "a2"],
        pairs=subject.pairs[subject.pairs["image_id"] != "a2"].reset_index(drop=True),
    )


def copy_of(name, other):
    def corrupt(subject):
        table = subject.dataset.records
        hash_ = table.loc[table["image_id"] == other, "content_hash"].item()
        return with_records(subject, change(table, image(name)(table), content_hash=hash_))

    return corrupt


def skip_more(subject):
    more = [subject.skipped.assign(sample=f"gone{number}") for number in range(2)]
    return replace(subject, skipped=pd.concat([subject.skipped, *more]))


def without_regions(subject):
    return replace(
        subject,
        regions=subject.regions[subject.regions["image_id"] != "v0"].reset_index(drop=True),
        pairs=subject.pairs[subject.pairs["image_id"] != "v0"].reset_index(drop=True),
    )


def few_pairs(subject):
    return replace(subject, pairs=subject.pairs[subject.pairs["image_id"].isin(["a0", "a1"])].reset_index(drop=True))


def twice(subject):
    return replace(subject, regions=pd.concat([subject.regions, subject.regions.iloc[[1]]], ignore_index=True))


def stray_region(subject):
    return replace(
        subject, regions=pd.concat([subject.regions, subject.regions.iloc[[1]].assign(image_id="zz")], ignore_index=True)
    )


def stray_pair(subject):
    row, region = subject.pairs.iloc[[0]].assign(image_id="zz"), subject.regions.iloc[[0]].assign(image_id="zz")
    return replace(
        subject,
        pairs=pd.concat([subject.pairs, row], ignore_index=True),
        regions=pd.concat([subject.regions, region], ignore_index=True),
    )


# what is done, the expectations that then fail, and what the message must say
CORRUPTIONS = {
    "same id twice": (same_id, {"records.ids_unique"}, ["row 2", "row 3", "'a1'", "'a2.png'"]),
    "file missing": (remove_file, {"records.files_exist"}, ["row 2", "'a1'", "no file a1.png"]),
    "file truncated": (truncate_file, {"records.images_decode"}, ["row 2", "'a1'", "truncated"]),
    "file of another size": (grow_file, {"records.sizes_agree"}, ["row 2", "41 x 30", "40 x 30"]),
    # a split that is misspelt is also a split that lacks an image
    "unknown split": (
        records(image("a2"), split="trian"),
        {"records.splits_known", "records.count_train"},
        ["row 3", "split 'trian'", "found 2"],
    ),
    "wrong count": (
        lambda subject: with_records(subject, subject.dataset.records[subject.dataset.records["image_id"] != "p0"]),
        {"records.count_pretrain"},
        ["split pretrain has 1 images", "found 0"],
    ),
    "no long caption": (
        lambda subject: replace(
            records(image("a2"), long_caption=" \n")(subject), pairs=subject.pairs[subject.pairs["image_id"] != "a2"]
        ),
        {"records.long_captions_present"},
        ["row 3", "'a2'", "'train'", "the long caption is empty"],
    ),
    "captions too short": (
        lambda subject: replace(
            records(lambda table: (table["split"] != "pretrain").to_numpy(), long_caption="A ball.")(subject),
            pairs=subject.pairs[subject.pairs["rank"] == 1].assign(sentence="A ball.", char_start=0, char_end=7),
        ),
        {"records.mean_words", "records.captions_not_shared"},
        ["found 2", "5 to 50 words"],
    ),
    "caption of thousands of words": (
        lambda subject: with_records(
            subject,
            change(subject.dataset.records, 1, long_caption=subject.dataset.records["long_caption"][1] + " word" * MAX_WORDS),
        ),
        {"records.max_words", "records.mean_words", "records.captions_fit", "records.captions_finished"},
        ["row 1", "'a0'", f"{MAX_WORDS + WORDS}"],
    ),
    "test image among the training images": (
        copy_of("t0", "a1"),
        {"records.no_test_image_in_training"},
        ["row 5", "'t0'", "image 'a1' of split train of tiny (row 2)"],
    ),
    "validation image among the training images": (
        copy_of("v0", "a1"),
        {"records.no_validation_image_in_training"},
        ["row 4", "'v0'", "image 'a1'"],
    ),
    "too many skipped": (skip_more, {"records.few_skipped"}, ["at most 25.0%", "found 0.3333"]),
    "image without regions": (without_regions, {"records.regions_present"}, ["row 4", "'v0'", "'val'", "no row for it"]),
    "too few pairs": (few_pairs, {"records.pairs_present"}, ["row 3", "'a2'", "3 of 5 rows", "at least 50.0%"]),
    "region twice": (twice, {"regions.indices_unique"}, ["row 1", "row 20", "'a0'", "region_index 1"]),
    "region of no image": (stray_region, {"regions.images_known"}, ["row 20", "'zz'"]),
    "region outside": (regions(3, x2=40.5), {"regions.boxes_inside"}, ["row 3", "'a0'", "40.5", "40 x 30"]),
    "region without area": (regions(3, x2=1.0), {"regions.areas_positive"}, ["row 3", "box (1, 2, 1, 8)"]),
    "unknown kind": (regions(3, kind="circle"), {"regions.kinds_known"}, ["row 3", "kind 'circle'", "region_index 3"]),
    "score above 1": (regions(3, score=1.25), {"regions.scores_in_range"}, ["row 3", "score 1.25"]),
    "score missing": (regions(3, score=float("nan")), {"regions.values_complete"}, ["row 3", "no value in score"]),
    "pair of no image": (stray_pair, {"regions.images_known", "pairs.images_known"}, ["row 10", "'zz'"]),
    "sentence not its span": (pairs(2, char_end=9), {"pairs.sentences_are_spans"}, ["row 2", "'a1'", "characters 0 to 9"]),
    "similarity above 1": (pairs(2, similarity=1.5), {"pairs.similarities_in_range"}, ["row 2", "similarity 1.5"]),
    "similarity missing": (pairs(2, similarity=float("nan")), {"pairs.values_complete"}, ["row 2", "no value in similarity"]),
    "two best pairs": (pairs(3, rank=1), {"pairs.one_best"}, ["row 2", "row 3", "'a1'", "2 pairs of rank 1"]),
    "ranks with a gap": (pairs(3, rank=3), {"pairs.ranks_contiguous"}, ["row 3", "'a1'", "rank 3 without a rank 2"]),
    "pair with another box": (pairs(2, x2=21.0), {"pairs.boxes_of_regions"}, ["row 2", "(0, 0, 21, 15)", "(0, 0, 20, 15)"]),
}
SEVERITIES = {
    "records.max_words": "warning",
    "records.no_validation_image_in_training": "warning",
    "records.captions_not_shared": "warning",
    "records.captions_fit": "warning",
    "records.captions_finished": "info",
}


@pytest.fixture
def subject(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    return make_subject(root)


@pytest.fixture(scope="module")
def outcomes_of_corruptions(tmp_path_factory):
    """Case -> the failed outcomes. All cases are judged in one run, because each run builds a site of pages."""
    made = []
    for number, (corrupt, *_) in enumerate(CORRUPTIONS.values()):
        root = tmp_path_factory.mktemp("images")
        good = make_subject(root)
        before = suites(good)
        # a table that the corruption leaves alone passes, as the test of the good tables shows
        pairs_of_suites = zip(suites(corrupt(good)), before, strict=True)
        made += [replace(new, name=f"{number}_{new.name}") for new, old in pairs_of_suites if not new.table.equals(old.table)]
    found = {case: {} for case in CORRUPTIONS}
    for name, outcome in failing(made, tmp_path_factory.mktemp("docs")).items():
        number, _, rule = name.partition("_")
        found[list(CORRUPTIONS)[int(number)]][rule.removeprefix("tiny_")] = outcome
    return found


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_a_corruption_fails_exactly_its_expectation_and_names_the_row(outcomes_of_corruptions, case):
    _, expected, said = CORRUPTIONS[case]
    found = outcomes_of_corruptions[case]
    assert set(found) == expected
    text = "\n".join(line for outcome in found.values() for line in outcome.lines(10))
    for words in said:
        assert words in text
    for name, outcome in found.items():
        assert outcome.rule.severity == SEVERITIES.get(name, "critical")
        assert outcome.rule.fix in text


def test_good_tables_pass_and_the_data_docs_show_each_suite(subject, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "stale.html").write_text("of an earlier run")
    outcomes = check(suites(subject), docs)
    assert [outcome.rule.name for outcome in outcomes if not outcome.passed] == []
    assert len({(outcome.suite, outcome.rule.name) for outcome in outcomes}) == len(outcomes)
    index = (docs / "index.html").read_text()
    for name in ("tiny_records", "tiny_regions", "tiny_pairs"):
        assert name in index
        assert (docs / "expectations" / f"{name}.html").is_file()
        assert list((docs / "validations" / name).rglob("*.html"))
    page = next((docs / "validations" / "tiny_records").rglob("*.html"))
    assert "Every image file exists" in page.read_text()
    assert page.relative_to(docs).as_posix() in index
    assert index.count("all hold") == 3
    assert not (docs / "stale.html").exists()


def test_the_data_docs_load_nothing_from_elsewhere(subject, tmp_path):
    docs = tmp_path / "docs"
    check(suites(pairs(2, char_end=9)(subject)), docs)
    pages = [*docs.rglob("*.html"), *docs.rglob("*.css")]
    assert len(pages) >= 7
    for page in pages:
        text = page.read_text()
        assert not re.search(r"""(src\s*=|url\(|@import|<link[^>]*href=)\s*["']?(https?:)?//""", text), page
        assert "<script" not in text
    assert "1 of 8 fail" in (docs / "index.html").read_text()


def test_data_docs_name_the_failing_row(subject, tmp_path):
    docs = tmp_path / "docs"
    check(suites(pairs(2, char_end=9)(subject)), docs)
    page = next((docs / "validations" / "tiny_pairs").rglob("*.html")).read_text()
    assert "characters 0 to 9 are" in page


def test_a_test_image_with_the_id_of_a_training_image(subject, tmp_path):
    # the id is then also not unique, and the second row's regions are counted for the first
    table = subject.dataset.records
    leak = with_records(
        subject, pd.concat([table, table[table["image_id"] == "a1"].assign(split="test", content_hash="other")])
    )
    found = failures(leak, tmp_path / "docs")
    assert set(found) == {"tiny_records.ids_unique", "tiny_records.no_test_id_in_training", "tiny_records.count_test"}
    assert "row 6, image_id 'a1': the same image_id as image 'a1' of split train" in "\n".join(
        found["tiny_records.no_test_id_in_training"].lines(3)
    )


def test_many_failing_rows_are_counted_and_a_few_named(subject, tmp_path):
    outcome = failures(replace(subject, regions=subject.regions.assign(score=2.0)), tmp_path / "docs")[
        "tiny_regions.scores_in_range"
    ]
    lines = outcome.lines(3)
    assert outcome.failing == 20
    assert lines[0].endswith("20 of 20 rows fail")
    assert [line.split(",")[0] for line in lines[1:4]] == ["row 0", "row 1", "row 2"]
    assert lines[4] == "... and 17 more"


def test_an_image_without_a_detection_is_only_a_warning_where_regions_come_from_the_detector_alone(subject, tmp_path):
    found = failures(without_regions(subject), tmp_path / "docs", detector_only=True)
    assert set(found) == {"tiny_records.regions_present"}
    assert found["tiny_records.regions_present"].rule.severity == "warning"


def test_an_image_that_flism_skipped_needs_no_regions(subject, tmp_path):
    entry = {"sample": "v0", "row": -1, "step": "flism", "reason": "unreadable", "detail": ""}
    bare = without_regions(subject)
    bare = replace(bare, skipped=pd.DataFrame([entry]))
    assert failures(bare, tmp_path / "docs") == {}


def test_an_evaluation_data_set_of_short_captions(subject, tmp_path):
    """It has no regions and no long captions; its ids may be those of the training set, its images may not."""
    table = subject.dataset.records.assign(long_caption="", split="test", content_hash=[f"h{i}" for i in range(6)])
    other = replace(with_records(subject, table), regions=None, pairs=None, flism_splits=())
    other = replace(other, dataset=replace(other.dataset, name="other"))
    assert failures(other, tmp_path / "docs", training=subject.dataset) == {}
    hash_ = subject.dataset.records["content_hash"][1]
    leak = with_records(other, change(table, 4, content_hash=hash_))
    found = failures(leak, tmp_path / "docs", training=subject.dataset)
    assert set(found) == {"other_records.no_test_image_in_training"}
    assert "row 4" in found["other_records.no_test_image_in_training"].examples[0]


def test_empty_tables_fail_and_nothing_breaks(subject, tmp_path):
    empty = replace(with_records(subject, subject.dataset.records[:0]), regions=subject.regions[:0], pairs=subject.pairs[:0])
    found = failures(empty, tmp_path / "docs")
    assert {f"tiny_{table}.not_empty" for table in ("records", "regions", "pairs")} <= set(found)


def test_no_expectation_is_left_without_a_corruption():
    rules = {f"records.{rule.name}" for rule in records_rules(CONFIG, True, True, False, True, Seen(context_length=77))}
    rules |= {f"regions.{rule.name}" for rule in regions_rules()} | {f"pairs.{rule.name}" for rule in pairs_rules()}
    tested = set().union(*(expected for _, expected, _ in CORRUPTIONS.values())) | {defect.rule for defect in DEFECTS}
    elsewhere = {"records.no_test_id_in_training", "records.count_test"}
    like_another = {"records.count_val"}
    assert {name for name in rules - tested if not name.endswith("not_empty")} == elsewhere | like_another


def test_a_large_table_names_its_failing_rows_too(subject, tmp_path, monkeypatch):
    """Beyond COMPLETE_ROWS Great Expectations is asked for the first failing rows only."""
    bad = replace(subject, regions=subject.regions.assign(score=2.0), pairs=change(subject.pairs, 2, similarity=1.5))
    complete = failures(bad, tmp_path / "one")
    monkeypatch.setattr("fast_goal.data.expectations.COMPLETE_ROWS", 3)
    short = failures(bad, tmp_path / "two")
    assert {name: outcome.lines(10) for name, outcome in short.items()} == {
        name: outcome.lines(10) for name, outcome in complete.items()
    }


def test_the_front_page_tells_information_from_failures(subject, tmp_path):
    unfinished = change(subject.dataset.records, 0, long_caption=CAPTIONS[0].removesuffix("."))
    failures(with_records(subject, unfinished), tmp_path / "docs")
    assert "all hold, but for 1 for information" in (tmp_path / "docs" / "index.html").read_text()


def test_published_facts(subject, tmp_path):
    facts = {"counts": {"train": 3, "qual_dev": 2, "all": 5}, "mean_words": 21.5, "captions": 1, "pairs": 2}
    good = replace(subject, dataset=replace(subject.dataset, facts=facts, published={"train": 3, "qual_dev": 2}))
    assert failures(good, tmp_path / "docs") == {}
    fewer = {"counts": {"train": 4, "test": 1}, "mean_words": 25, "captions": 2, "pairs": 3}
    found = failures(replace(good, dataset=replace(good.dataset, facts=fewer)), tmp_path / "docs")
    severities = {name.partition(".")[2]: outcome.rule.severity for name, outcome in found.items()}
    assert severities == {
        "published_counts": "critical",
        "published_mean_words": "warning",
        "published_captions": "critical",
        "published_pairs": "critical",
    }
    assert found["tiny_facts.published_counts"].examples == [
        "row 0, fact 'samples of train': 3 samples, published are 4",
        "row 1, fact 'samples of test': 0 samples, published are 1",
    ]
    assert "21.0 words, published are 25" in found["tiny_facts.published_mean_words"].examples[0]
    assert found["tiny_records.published_pairs"].failing == 5  # FLISM is not asked for pretrain


def test_captions_of_other_images_are_found_by_their_cosines(subject, tmp_path):
    rows = np.arange(1, 5)
    others = np.full(4, 0.2)
    assert failures(subject, tmp_path / "docs", cosines=Cosines("a CLIP", rows, np.array([0.3, 0.1, 0.3, 0.3]), others)) == {}
    mixed = Cosines("a CLIP", rows, np.array([0.1, 0.2, 0.2, 0.2]), others)
    found = failures(subject, tmp_path / "docs", cosines=mixed)
    assert found["tiny_cosines.captions_fit_images"].rule.severity == "warning"
    assert "found -0.025" in found["tiny_cosines.captions_fit_images"].observed
    assert len(found) == 1


def test_samples_are_stated(subject, tmp_path):
    small = replace(CONFIG, max_decoded=2, caption_sample=3)
    made = suites(with_records(subject, change(subject.dataset.records, 1, width=41)), config=small)
    titles = {rule.name: (rule.title, rule.looked_at) for rule in made[0].rules}
    assert titles["images_decode"] == ("every image of a random sample of 2 decodes", 2)
    assert titles["language"] == ("every long caption is in the language 'en', in a random sample of 3", 3)
    assert made[0].table["decoded"].sum() == 2
    assert made[0].table["long_tokens"].notna().sum() == 3
