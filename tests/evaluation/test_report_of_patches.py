"""The report of what a model does with its patches: the modes of asking one with a pooling, and segmentation."""

import copy
import dataclasses

import pytest

from fast_goal.evaluation.exchange import _hit_rows
from fast_goal.evaluation.headline import headline
from fast_goal.evaluation.published import Recipe
from fast_goal.evaluation.report import Facts, comparisons, headlines, notes, write_report
from fast_goal.evaluation.tasks import Section
from fast_goal.evaluation.tracked import tracked

WAYS = ("text_to_image", "image_to_text")
COUNTS = {"images": 800, "independent": 800, "seconds": {}, "skipped": {}}


def change(value, p=0.0001):
    return {"value": value, "low": value - 1, "high": value + 1, "p": p}


def modes(conditioned=50.0, rerank=49.5, p=0.0001, captions=5000):
    """Numbers of the task `conditioned` with one kind of query."""
    recall = {"global": 40.0, "conditioned": conditioned, "rerank": rerank}
    ranks = {"median_rank": 2.0, "mean_rank": 9.0, "mrr": 0.5, "tied": 0.0}
    return {
        "images": 1000,
        "captions": captions,
        "top_k": 128,
        "timed_images": 1000,
        **{
            mode: {way: {**{f"R@{k}": value + k for k in (1, 5, 10, 50)}, **ranks} for way in WAYS}
            for mode, value in recall.items()
        },
        "difference": {
            mode: {way: {f"R@{k}": change(recall[mode] - 40, p) for k in (1, 5, 10, 50)} for way in WAYS}
            for mode in ("conditioned", "rerank")
        },
        "seconds_per_query": {"global": 0.00002, "conditioned": 0.0123, "rerank": 0.004},
    }


def segmented(base=10.0, tuned=25.0, p=0.0001, classes=("dog", "c|at", "tree")):
    def numbers(value, names):
        return {
            "mIoU": value,
            "pixel_accuracy": value + 5,
            "classes": {name: value + place for place, name in enumerate(names)},
        }

    return {
        "images": 300,
        "independent": 300,
        "names": len(classes),
        "templates": 2,
        "pixels": 1000,
        "ignored": 50,
        "outside": {"base": 0, "finetuned": 0},
        "base": numbers(base, classes[:2]),
        "finetuned": numbers(tuned, classes),
        "difference": {"mIoU": change(tuned - base, p), "pixel_accuracy": change(tuned - base, p)},
        "chance": {"mIoU": 4.0, "pixel_accuracy": 8.0},
    }


@pytest.fixture
def facts():
    values = {field: "x" for field in Facts.__dataclass_fields__}
    tables = {name: {} for name in ("seconds", "objective", "first_stage", "params")}
    recipes = {"base": Recipe("CLIP"), "finetuned": Recipe("CLIP", ("docci",), "flair")}
    more = {"base_kind": "pretrained", "recipes": recipes, "views": {"base": "crop", "finetuned": "crop"}}
    tasks = {"conditioned": Section("Asked by the text", "About."), "segmentation": Section("Segmentation", "So.")}
    numbers = {"bootstrap_samples": 1000, "epochs": 2, "batch_size": 64, "tasks": tasks}
    return Facts(**{**values, **tables, "datasets": [], "skipped": [], **numbers, **more})


def written(folder, metrics, facts):
    write_report(folder, metrics, facts, [])
    assert (folder / "report.html").stat().st_size > 1000
    return (folder / "report.md").read_text()


def rows(text, title):
    return [line for line in text.split(title)[1].split("##")[0].splitlines() if line.startswith("| ")]


def test_three_modes_side_by_side(tmp_path, facts):
    found = {"conditioned": {"long": modes(), "sentences": modes(41.0, 40.0, p=0.6)}, **COUNTS}
    text = written(tmp_path, {"x": found}, facts)
    table = rows(text, "#### Long captions\n")
    assert (
        table[2]
        == "| text to image | R@1 | 41.0 | 51.0 | +10.0 (+9.0 to +11.0) | < 0.001 | 50.5 | +9.5 (+8.5 to +10.5) | < 0.001 |"
    )
    assert [row.split(" | ")[1] for row in table[2:]] == ["R@1", "R@5", "R@10"] * 2
    assert "| single sentences | 1,000 | 0.02 ms | 12.3 ms | 4 ms |" in text
    assert "5,000 queries and 1,000 images; the best 128 are ranked again." in text
    few = {"conditioned": {"long": {**modes(captions=128), "images": 32}}, **COUNTS}
    small = written(tmp_path, {"x": few}, facts)
    assert "32 images; the best 128 are ranked again, which is all of them: rerank is as conditioned." in small
    [long, sentences] = headlines({"x": found})
    assert "text-to-image R@1 41.0 → 51.0 % (+10.0, 95 % interval +9.0 to +11.0)." in long
    assert sentences.startswith("`x`, single sentences,") and "no difference shown" in sentences
    assert comparisons({"x": found}, facts) == [], "they compare a model with itself"


def test_the_doubts_about_the_modes_are_said(facts):
    def said(block):
        return [line for line in notes({"x": {"conditioned": {"long": block}, **COUNTS}}, facts) if "asked by the text" in line]

    assert said(modes()) == []
    assert said(modes(30.0)) == [
        "`x`, asked by the text, long: conditioned: lower than global in R@1 text to image and R@1 image to text."
    ]
    assert "rerank: no difference shown from global in R@1 text to image" in said(modes(rerank=40.5))[0]
    assert "long: conditioned and rerank: lower than global in R@1 text to image and R@1" in said(modes(30.0, 31.0))[0]
    tied = copy.deepcopy(modes(captions=100))
    tied["conditioned"]["text_to_image"]["tied"] = 3.0
    assert "conditioned 3.0 %" in said(tied)[0] and "only 100 queries" in said(tied)[1]


def test_flairs_readme_beside_conditioned_short_captions(tmp_path, facts):
    recipe = Recipe("a CLIP trained from scratch", ("cc3m",), "flair", batch_sizes=(1024,), epochs=(32,))
    facts = dataclasses.replace(facts, backbone="ViT-B-16", recipes={"base": Recipe("CLIP"), "finetuned": recipe})
    found = {"conditioned": {"long": modes(), "short": modes()}, **COUNTS}
    table = rows(written(tmp_path, {"flickr30k": found}, facts), "### Beside the paper")
    assert table[2].startswith(
        "| Asked by the text | fine-tuned | text to image | R@1 | 51.0 | 65.7 | −14.7 | FLAIR's README, FLAIR CC3M |"
    )
    assert len(table) == 4, "R@1 of both directions; the long captions have no number"


def test_a_table_of_classes(tmp_path, facts):
    found = {"segmentation": {"s": segmented()}, **COUNTS}
    text = written(tmp_path, {"x": found}, facts)
    table = rows(text, "### Segmentation: s")
    assert "| mIoU | 10.0 | 25.0 | +15.0 | +14.0 to +16.0 | < 0.001 | higher | 4.0 |" in table
    assert table[-3:] == ["| dog | 10.0 | 25.0 | +15.0 |", "| c\\|at | 11.0 | 26.0 | +15.0 |", "| tree | – | 27.0 | – |"]
    assert "does not see" not in text and "in which the models differ most" not in text
    assert "the 3 classes of the pixels of 300 images: mIoU 10.0 → 25.0 % (+15.0, " in headlines({"x": found})[0]
    (one,) = comparisons({"x": found}, facts)
    assert (one.title, one.metric, one.base, one.finetuned) == ("Segmentation (s)", "mIoU", 10.0, 25.0)


def test_of_many_classes_those_that_changed_most(tmp_path, facts):
    names = [f"class {number}" for number in range(80)]
    block = segmented(classes=names)
    block["base"]["classes"] = {name: 1.0 for name in names}
    text = written(tmp_path, {"x": {"segmentation": {"s": block}, **COUNTS}}, facts)
    table = [row for row in rows(text, "### Segmentation: s") if row.startswith("| class ")][1:]
    assert len(table) == 60 and table[0].startswith("| class 20 |")
    assert "The IoU of the 60 classes in which the models differ most:" in text


def test_the_doubts_about_segmentation_are_said(facts):
    def said(block):
        return [line for line in notes({"x": {"segmentation": {"s": block}, **COUNTS}}, facts) if "classes of pixels" in line]

    assert said(segmented()) == []
    assert "the fine-tuned model is worse in mIoU." in said(segmented(30.0, 20.0))[0]
    assert "no difference shown in mIoU: the interval includes 0." in said(segmented(10.0, 10.5))[0]
    odd = segmented(3.0) | {"outside": {"base": 100, "finetuned": 100}, "independent": 20}
    text = " ".join(said(odd))
    assert "10.0 % of the pixels that count lie out of the view of either model" in text
    assert "below that of random classes" in text and "only 20 independent images" in text


def test_what_is_kept_and_what_stands_for_the_run():
    hits = {part: {"hit@1": 9.0, "hit@5": 30.0} for part in ("base", "finetuned", "chance", "attention")}
    found = {"conditioned": {"long": modes()}, "segmentation": {"s": segmented()}, "localisation": hits, **COUNTS}
    kept = tracked({"x": found})
    assert kept["x.conditioned.long.conditioned.text_to_image.R1"] == 51.0
    assert kept["x.conditioned.long.seconds_per_query.rerank"] == 0.004
    assert kept["x.segmentation.s.finetuned.mIoU"] == 25.0 and kept["x.localisation.attention.hit5"] == 30.0
    assert not any("difference" in name or "classes" in name or "R5" in name for name in kept)
    chosen = headline({"x": found})
    assert chosen["x.conditioned.long.rerank.image_to_text.R1"] == 50.5
    assert chosen["x.segmentation.s.base.mIoU"] == 10.0 and chosen["x.localisation.attention.hit1"] == 9.0
    del hits["attention"]
    assert not any("attention" in name for name in headline({"x": found}))
    assert {row["model"] for row in _hit_rows("x", found, [1])} == {"base", "finetuned", "chance"}
