"""The sentences of the report follow the numbers."""

import dataclasses
import json
import re
from copy import deepcopy

import pytest
from browser import browser, look
from PIL import Image

from fast_goal.errors import DataError
from fast_goal.evaluation.headline import headline
from fast_goal.evaluation.published import Recipe
from fast_goal.evaluation.report import (
    Facts,
    Picture,
    comparisons,
    headlines,
    notes,
    rewrite_report,
    significance,
    verdict,
    write_report,
)
from fast_goal.evaluation.tasks import Section
from fast_goal.evaluation.tracked import tracked
from fast_goal.tracking.model_card import metrics_table

WAYS = ("text_to_image", "image_to_text")


def retrieval(base, tuned, low, high):
    ranks = {"median_rank": 1.0, "mean_rank": 1.0, "mrr": 1.0, "tied": 0.0}
    return {
        "images": 800,
        "captions": 800,
        "truncated": {"base": 0, "finetuned": 0},
        "context_length": {"base": 248, "finetuned": 248},
        "base": {way: {"R@1": base, **ranks} for way in ("text_to_image", "image_to_text")},
        "finetuned": {way: {"R@1": tuned, **ranks} for way in ("text_to_image", "image_to_text")},
        "difference": {
            way: {"R@1": {"value": tuned - base, "low": low, "high": high, "p": 0.001}}
            for way in ("text_to_image", "image_to_text")
        },
        "chance": {way: {"R@1": 0.1} for way in ("text_to_image", "image_to_text")},
    }


def localisation(boxes="truth"):
    return {
        "boxes": boxes,
        "sentences": 4000,
        "without_centre": {"base": 0, "finetuned": 0},
        "base": {"hit@1": 15.0},
        "finetuned": {"hit@1": 46.0},
        "difference": {"hit@1": {"value": 31.0, "low": 28.0, "high": 34.0, "p": 0.001}},
        "chance": {"hit@1": 14.0},
        "chance_of_base": {"hit@1": 14.0},
    }


@pytest.fixture
def facts():
    values = {field: "x" for field in Facts.__dataclass_fields__}
    tables = {name: {} for name in ("seconds", "objective", "first_stage", "tasks", "params")}
    lists = {"datasets": [], "skipped": []}
    numbers = {"bootstrap_samples": 1000, "epochs": 2, "batch_size": 64}
    recipes = {"base": Recipe("CLIP"), "finetuned": Recipe("CLIP", ("docci",), "global", batch_sizes=(64,), epochs=(10,))}
    more = {"base_kind": "pretrained", "recipes": recipes, "views": {"base": "crop", "finetuned": "crop"}}
    return Facts(**{**values, **tables, **lists, **numbers, **more})


def test_headline():
    lines = headlines({"scenes": {"long": retrieval(24.1, 50.3, 22.9, 29.4), "localisation": localisation()}})
    assert lines[0].endswith("text-to-image R@1 24.1 → 50.3 % (+26.2, 95 % interval +22.9 to +29.4).")
    assert "the most similar patch lies in the sentence's true box for 15.0 → 46.0 %" in lines[1]
    assert "random patches: 14.0 %" in lines[1]


def test_headline_of_an_unclear_difference():
    assert headlines({"x": {"long": retrieval(24.0, 24.5, -1.0, 2.0)}})[0].endswith(
        "(+0.5, 95 % interval −1.0 to +2.0: no difference shown)."
    )
    assert "the box that FLISM itself chose" in headlines({"x": {"localisation": localisation("flism")}})[0]


@pytest.mark.parametrize(
    ("low", "high", "p", "words"),
    [
        (0.1, 2, 0.01, "higher"),
        (-2, -0.1, 0.01, "lower"),
        (0.8, 10, 0.07, "no difference shown"),  # the interval alone says so, the test does not
        (-1, 1, 0.01, "no difference shown"),
        (0, 2, 0.01, "no difference shown"),
        (0, 0, 1, "no difference shown"),
    ],
)
def test_verdict(low, high, p, words):
    assert verdict({"low": low, "high": high, "p": p}) == words


def said(metrics, facts):
    counts = {"images": 800, "independent": 800, "skipped": {}}
    return "\n".join(notes({name: counts | values for name, values in metrics.items()}, facts))


def test_a_first_stage_of_the_training_is_said(tmp_path, facts):
    views = {"base": "crop", "finetuned": "crop"}
    for first in ({}, {"dataset": "large", "epochs": 3, "name": "fast_goal", "weights": {"global": 1.0, "local": 0.5}}):
        write_report(tmp_path, {}, Facts(**{**facts.__dict__, "views": views, "first_stage": first}), [])
        text = (tmp_path / "report.md").read_text()
        row = "| first stage | dataset: large; epochs: 3; name: fast_goal; weights: global 1.0, local 0.5 |"
        assert (row in text.splitlines()) == bool(first) == ("first stage" in text)


def test_an_objective_of_parts_is_told_with_all_its_settings(tmp_path, facts):
    part = {"weight": 0.5, "objective": {"name": "degla", "weights": {"global": 1.0, "tgc": 0.1}, "other": None}}
    objective = {"name": "weighted", "parts": {"words": part}}
    write_report(tmp_path, {}, Facts(**{**facts.__dict__, "objective": objective}), [])
    row = "name: weighted; parts: words (weight 0.5, objective (name degla, weights (global 1.0, tgc 0.1), other none))"
    assert f"| objective | {row} |" in (tmp_path / "report.md").read_text().splitlines()


def test_clear_results_need_no_warning(facts):
    text = said({"scenes": {"long": retrieval(24.0, 50.0, 22.0, 30.0), "localisation": localisation()}}, facts)
    for words in ("no difference shown", "worse", "exceed", "tied", "weak", "FLISM", "too small", "intervals are wide"):
        assert words not in text
    assert "1.1 times chance for the base, 3.3 times for the fine-tuned model" in text
    assert "another training seed" in text


def test_each_doubt_is_said(facts):
    clear = {"long": retrieval(24.0, 50.0, 22.0, 30.0), "localisation": localisation()}
    scratch = Facts(**{**facts.__dict__, "base_kind": "scratch", "scratch_split": "pretrain"})
    assert "**The base is weak.**" in said({"x": clear}, scratch) and "of the split `pretrain`" in said({"x": clear}, scratch)
    drawn = Facts(**{**scratch.__dict__, "scratch_split": ""})
    assert "a small one, with weights as they were drawn; it reaches 24.0 %" in said({"x": clear}, drawn)
    assert "24.0 % R@1 text-to-image on the long captions of `x` (chance 0.1 %)" in said({"x": clear}, scratch)
    assert "no difference shown in R@1" in said({"x": {"long": retrieval(24.0, 25.0, -1.0, 3.0)}}, facts)
    assert "partly forgotten" in said({"x": {"short": retrieval(24.0, 20.0, -6.0, -2.0)}}, facts)
    assert "scenes; those of one" not in said({"x": clear}, facts)
    assert "the 800 images show 400 scenes; those of one, which differ" in said({"x": clear | {"independent": 400}}, facts)
    assert "not ground truth" in said({"x": {"localisation": localisation("flism")}}, facts)

    changed = deepcopy(clear)
    changed["long"]["truncated"] = {"base": 30, "finetuned": 30}
    changed["long"]["captions"] = 100
    changed["long"]["finetuned"]["text_to_image"]["tied"] = 12.0
    changed["localisation"]["without_centre"] = {"base": 7, "finetuned": 7}
    text = said({"x": changed}, facts)
    assert text.count("30 of 100 captions exceed the 248 tokens of either model") == 1
    assert "only 100 captions" in text
    assert "up to 12.0 % of the queries have a wrong candidate tied" in text
    assert text.count("7 of 4,000 boxes are too small, or too far out of the view of either model") == 1
    assert "different views" not in text

    changed["long"]["truncated"] = {"base": 60, "finetuned": 30}
    changed["long"]["context_length"] = {"base": 77, "finetuned": 248}
    text = said({"x": changed}, facts)
    assert "60 of 100 captions exceed the 77 tokens of the base model" in text
    assert "30 of 100 captions exceed the 248 tokens of the fine-tuned model" in text

    changed["localisation"] |= {"without_centre": {"base": 9, "finetuned": 0}, "chance_of_base": {"hit@1": 10.0}}
    text = said({"x": changed}, facts)
    assert "9 of 4,000 boxes are too small, or too far out of the view of the base model" in text
    assert "10.0 % for the base, 14.0 % (shown) for the fine-tuned model at hit@1" in text
    assert "1.5 times chance for the base, 3.3 times for the fine-tuned model" in text


def block(base, tuned, drop=None):
    found = retrieval(base, tuned, tuned - base - 1, tuned - base + 1)
    for change in found["difference"].values():
        change["R@1"]["p"] = 0.0004
        change["R@5"] = change["R@10"] = change["R@1"]
    for part in ("base", "finetuned", "chance"):
        for way in found[part].values():
            way["R@5"] = way["R@10"] = way["R@1"]
    if drop is not None:
        change = {"R@1": {"value": drop, "low": drop - 1, "high": drop + 1, "p": 0.25}}
        found["drop"] = {"base": {"R@1": 9.0}, "finetuned": {"R@1": 9.0 + drop}, "difference": change}
    return found


def measured():
    joint = {
        "base": {way: {"mAP@10": 30.0} for way in WAYS},
        "finetuned": {way: {"mAP@10": 31.5} for way in WAYS},
        "difference": {way: {"mAP@10": {"value": 1.5, "low": -1.0, "high": 4.0, "p": 0.3}} for way in WAYS},
    }
    return {
        "truncation": {"77": block(20.0, 40.0, -3.0), "full": block(21.0, 50.0)},
        "robustness": block(10.0, 30.0, -4.0),
        "joint": joint,
        "images": 800,
        "independent": 800,
        "seconds": {},
        "skipped": {"sentence_average": "long captions"},
    }


def suite(first="accuracy", groups=("swap_obj", "add|obj"), cases=400, p=0.0001, gain=5.0):
    """Numbers of a suite whose groups have 70 and 80 percent with the base."""

    def change(value):
        return {"value": value, "low": value - 1, "high": value + 1, "p": p}

    def numbers(more):
        counts = {"cases": cases // 2, "ties": 3}
        listed = {name: {"accuracy": 70.0 + 10 * place + more, **counts} for place, name in enumerate(groups)}
        return {"accuracy": 76.0 + more, "macro": 75.0 + more, "ties": 4, "groups": listed, "families": {"swap": 70.0 + more}}

    others = {name: change(gain) for name in ("accuracy", "macro") if name != first}
    listed = {name: {"accuracy": change(gain)} for name in groups}
    return {
        "cases": cases,
        "independent": cases,
        "not_in_macro": {"groups": 0, "cases": 0},
        "base": numbers(0),
        "finetuned": numbers(gain),
        "difference": {first: change(gain), **others, "groups": listed, "families": {"swap": change(gain)}},
        "chance": {**numbers(-20), "ties": 0},
        "truncated": {"base": 0, "finetuned": 0},
        "context_length": {"base": 77, "finetuned": 248},
    }


def classified(**options):
    found = suite(groups=(), **options) | {"classes": 12, "templates": 1}
    for part in ("base", "finetuned", "chance"):
        found[part] |= {"accuracy@5": 95.0, "families": {}}
    found["difference"] |= {"accuracy@5": found["difference"]["accuracy"], "families": {}}
    return found


def suites(**options):
    values = {"composition": {"sugarcrepe": suite("macro")}, "zero_shot": {"imagenet": classified(**options)}}
    return {**values, "images": 800, "independent": 800, "seconds": {}, "skipped": {}}


def test_a_table_for_each_suite(tmp_path, full):
    facts = dataclasses.replace(
        full, tasks={"composition": Section("Choices", "About."), "zero_shot": Section("Classes", "So.")}
    )
    found = suites()
    found["composition"]["sugarcrepe"]["not_in_macro"] = {"groups": 2, "cases": 31}
    write_report(tmp_path, {"x": found}, facts, [])
    text = (tmp_path / "report.md").read_text()
    part = text.split("### Choices: sugarcrepe")[1].split("###")[0]
    rows = [line for line in part.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| swap_obj | 200 | 70.0 | 75.0 | +5.0 | +4.0 to +6.0 | < 0.001 | 50.0 | higher | 3, 3 |",
        "| add\\|obj | 200 | 80.0 | 85.0 | +5.0 | +4.0 to +6.0 | < 0.001 | 60.0 | higher | 3, 3 |",
        "| mean of swap |  | 70.0 | 75.0 | +5.0 | +4.0 to +6.0 | < 0.001 | 50.0 | higher |  |",
        "| mean of the groups |  | 75.0 | 80.0 | +5.0 | +4.0 to +6.0 | < 0.001 | 55.0 | higher |  |",
        "| all | 400 | 76.0 | 81.0 | +5.0 | +4.0 to +6.0 | < 0.001 | 56.0 | higher | 4, 4 |",
    ]
    assert "The mean is without 2 groups (31 of the choices)" in part
    part = text.split("### Classes: imagenet")[1].split("##")[0]
    assert "400 images, whole or cut out, to put into 12 classes, each the mean of 1 prompt." in part
    assert "The mean is without" not in part
    labels = [line.split(" | ")[0] for line in part.splitlines() if line.startswith("| ")][2:]
    assert labels == ["| mean of the classes", "| all", "| all, among the first 5"]
    lines = text.split("##")[0]
    told = "the true caption is told from all its foils in 75.0 → 80.0 %, the mean of the groups (+5.0, "
    assert f"`x`, sugarcrepe, 400 choices: {told}" in lines
    assert "`x`, imagenet, 400 images to classify: the right class is found in 76.0 → 81.0 % (+5.0, " in lines
    assert "chance: 55.0 %" in lines


def test_suites_are_corrected_with_the_other_comparisons(full):
    facts = dataclasses.replace(
        full, tasks={**full.tasks, "composition": Section("Choices", ""), "zero_shot": Section("Classes", "")}
    )
    found = comparisons({"x": {**measured(), **suites(p=0.003)}}, facts)
    mine = {comparison.title: comparison for comparison in found}
    assert len(found) == 12 and mine["Choices (sugarcrepe)"].metric == "macro"
    assert (mine["Classes (imagenet)"].metric, mine["Classes (imagenet)"].base) == ("accuracy", 76)
    # p-values, ascending: 0.0001, six of 0.0004, then this one, the eighth of twelve
    assert mine["Classes (imagenet)"].corrected == pytest.approx(0.003 * 5)


def test_suites_stand_beside_degla(tmp_path, full):
    recipes = {"base": Recipe("CLIP"), "finetuned": Recipe("CLIP", ("mscoco",), "degla", batch_sizes=(256,), epochs=(5,))}
    facts = dataclasses.replace(full, backbone="ViT-B-32", recipes=recipes, tasks={"composition": Section("Choices", "")})
    crepe, orders = suite("macro", ("swap_obj", "other"), cases=490), suite("accuracy", (), cases=25010)
    found = {"composition": {"sugarcrepe": crepe, "coco_order": orders, "own": orders}}
    found |= {"images": 800, "independent": 800, "seconds": {}, "skipped": {}}
    write_report(tmp_path, {"x": found}, facts, [])
    part = (tmp_path / "report.md").read_text().split("### Beside the paper")[1].split("##")[0]
    rows = [line for line in part.splitlines() if line.startswith("| Choices")]
    assert rows[0].startswith(
        "| Choices (sugarcrepe) | fine-tuned | swap_obj | accuracy | 75.0 | 81.6 | −6.6 | DeGLA's paper, DeGLA |"
    )
    assert rows[1].startswith("| Choices (coco_order) | base |  | accuracy | 76.0 | 48.4 | +27.6 | DeGLA's paper, CLIP |")
    assert len(rows) == 3
    assert "No number of DeGLA's paper (base and fine-tuned: composition of `own`): it measures " in part
    assert "DeGLA's paper (base: composition of `sugarcrepe`): its test has" in part


def test_the_doubts_about_suites_are_said(facts):
    assert "`x`," not in said({"x": suites()}, facts)
    text = said({"x": suites(gain=-5.0)}, facts)
    assert (
        "`x`, zero shot of imagenet: the fine-tuned model is worse in accuracy; what the base knew was partly forgotten."
        in text
    )
    text = said({"x": suites(gain=0.5, cases=120)}, facts)
    assert "imagenet: no difference shown in accuracy: the interval includes 0." in text
    assert "only 120 images to classify" in text
    text = said({"x": suites(p=0.07)}, facts)
    assert "no difference shown in accuracy: the interval leaves out 0, but p is 0.07." in text and "includes 0" not in text
    [*_, line] = headlines({"x": suites(p=0.07)})
    assert "(+5.0, 95 % interval +4.0 to +6.0, p 0.070: no difference shown; chance" in line
    doubtful = suites()
    doubtful["composition"]["sugarcrepe"] |= {"truncated": {"base": 30, "finetuned": 0}}
    doubtful["composition"]["sugarcrepe"]["finetuned"]["ties"] = 40
    text = said({"x": doubtful}, facts)
    assert (
        "composition of sugarcrepe: 1.0 % of the answers of the base model and 10.0 % of the answers of the fine-tuned" in text
    )
    assert "30 of 400 choices have a text of more than the 77 tokens of the base model, which sees only its beginning." in text


def test_what_is_kept_of_suites():
    kept = tracked({"x": suites()})
    assert kept["x.composition.sugarcrepe.base.macro"] == 75 and kept["x.zero_shot.imagenet.finetuned.accuracy"] == 81
    assert len(kept) == 2 * 2 * 2
    chosen = headline({"x": suites()})
    assert chosen == {
        "x.composition.sugarcrepe.base.macro": 75,
        "x.composition.sugarcrepe.finetuned.macro": 80,
        "x.zero_shot.imagenet.base.accuracy": 76,
        "x.zero_shot.imagenet.finetuned.accuracy": 81,
    }
    table = metrics_table({"x": suites()})
    assert "| x · composition · sugarcrepe · macro | 75.0 | 80.0 | +5.0 | +4.0 to +6.0 | 55.0 |" in table
    assert "swap" not in table and "imagenet · accuracy@5" not in table


@pytest.fixture
def full(facts):
    """Facts of a run of several tasks."""
    names = ("truncation", "robustness", "short", "joint", "sentence_average", "long")
    sections = {name: Section(f"Title of {name}", f"About {name}.") for name in names}
    return dataclasses.replace(facts, tasks=sections)


def test_one_table_holds_every_task(tmp_path, full):
    write_report(tmp_path, {"x": measured()}, full, [])
    text = (tmp_path / "report.md").read_text()
    part = text.split("### All tasks of x")[1].split("###")[0]
    rows = [line for line in part.splitlines() if line.startswith("| Title")]
    assert (
        rows[0]
        == "| Title of truncation (77) | R@1 text to image | 20.0 | 40.0 | +20.0 (+19.0 to +21.0) | < 0.001 | 0.004 | higher |"
    )
    assert (
        rows[7]
        == "| Title of joint | mAP@10 image to text | 30.0 | 31.5 | +1.5 (−1.0 to +4.0) | 0.300 | 1.000 | no difference shown |"
    )
    assert rows[8] == "| Title of truncation (77) | 9.0 | 6.0 | −3.0 (−4.0 to −2.0) | 0.250 | 1.000 | no difference shown |"
    assert len(rows) == 2 + 2 + 2 + 2 + 2, "two truncations, robustness and joint both ways, and two drops"
    assert "About truncation." in part and "About short." not in part
    assert "R@10" not in text
    assert "`x`, split `x`: no `sentence_average`, for want of long captions." in text.split("## What was left out")[1]


def test_significance_is_that_of_holms_correction(full):
    found = comparisons({"x": measured()}, full)
    p_values = [comparison.difference["p"] for comparison in found]
    ordered, highest, expected = sorted(range(len(p_values)), key=p_values.__getitem__), 0.0, {}
    for place, index in enumerate(ordered):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - place)))
        expected[index] = highest
    assert [comparison.corrected for comparison in found] == pytest.approx([expected[i] for i in range(len(found))])
    lines = significance(found)
    assert lines[0].startswith("**The fine-tuned model is better** (6 of 10). Title of truncation (77): text to image +20.0, ")
    assert lines[1].startswith("**No difference shown** (4 of 10). ") and "Title of robustness: drop −4.0" in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("value", "p", "count", "words"),
    [(5.0, 0.01, 1, "better"), (-5.0, 0.01, 1, "worse"), (5.0, 0.03, 2, "only without"), (5.0, 0.06, 1, "No difference")],
)
def test_each_finding_has_its_sentence(full, value, p, count, words):
    found = block(20.0, 20.0 + value)
    for way in WAYS:
        found["difference"][way]["R@1"] = {"value": value, "low": value - 1, "high": value + 1, "p": p}
    chosen = comparisons({"x": {"short": found}}, full)[:count]
    lines = significance(comparisons({"x": {"short": found}}, full) if count > 1 else chosen)
    assert len(lines) == 1 and words in lines[0]


def test_what_repeats_the_long_captions_counts_once(full):
    found = {"long": block(21.0, 50.0), "truncation": {"77": block(20.0, 40.0, 1.0), "full": block(21.0, 50.0)}}
    titles = [comparison.title for comparison in comparisons({"x": found}, full)]
    assert titles == ["Title of truncation (77)"] * 3 + ["Title of long"] * 2


def test_the_papers_numbers_stand_beside_ours(tmp_path, full):
    facts = dataclasses.replace(full, backbone="ViT-B-16", tasks={"long": Section("Long", "About.")})
    found = {"long": block(60.0, 81.0) | {"images": 5000, "captions": 5000}, "images": 5000, "independent": 5000}
    found |= {"seconds": {}, "skipped": {}}
    found["long"] |= {"mean_tokens": 100.0, "over_77_tokens": 50.0, "slices": {}}
    write_report(tmp_path, {"docci": found}, facts, [])
    part = (tmp_path / "report.md").read_text().split("### Beside the paper")[1].split("##")[0]
    assert "| Long | fine-tuned | text to image | R@1 | 81.0 | 76.0 | +5.0 | Table VI, global |" in part
    assert "No number" not in part, "the base has one too"
    write_report(tmp_path, {"photos": found}, facts, [])
    part = (tmp_path / "report.md").read_text().split("### Beside the paper")[1].split("##")[0]
    assert "No number of the paper (base and fine-tuned: long): it measures" in part and "| Long" not in part


def test_what_was_skipped_is_counted_by_reason(tmp_path, full):
    write_report(tmp_path, {}, full, [])
    assert "No sample was skipped." in (tmp_path / "report.md").read_text()
    rows = [{"dataset": "x", "step": "flism", "reason": "no | region", "count": 1200}]
    write_report(tmp_path, {}, dataclasses.replace(full, skipped=rows), [])
    text = (tmp_path / "report.md").read_text()
    assert "| x | flism | no \\| region | 1,200 |" in text and "No sample was skipped." not in text


def test_the_contents_lead_to_every_section(tmp_path, full):
    found = {"x": measured(), "y": measured()}
    write_report(tmp_path, found, dataclasses.replace(full, params={"a": "# no heading"}), [])
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    links = re.findall(r"\[(.+?)\]\(#(.+?)\)", text.split("## Contents")[1].split("##")[0])
    ids = re.findall(r'<h([1-4]) id="(.+?)">(.+?)</h', page)
    assert [name for _, name in links] == [name for level, name, _ in ids if level in "23" and name != "contents"]
    assert [words for words, _ in links] == [words for level, name, words in ids if level in "23" and name != "contents"]
    assert len({name for _, name in links}) == len(links) >= 12
    assert {"beside-the-paper", "beside-the-paper-1"} <= {name for _, name, _ in ids}


def test_markdown_and_page_say_the_same(tmp_path, full):
    write_report(tmp_path, {"x": measured()}, full, [])
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    cells = [cell.strip() for line in text.splitlines() if line.startswith("| ") for cell in line.strip("|").split(" | ")]
    shown = re.sub(r"<[^>]+>", "", page).replace("&lt;", "<")
    assert len(cells) > 80
    assert all(cell.strip("`") in shown for cell in cells if cell not in ("", "| |") and not set(cell) <= set("-: |"))


def test_the_report_is_written_again_without_measuring(tmp_path, full):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    pictures = [Picture("a.png", "A title", "A red field.", "x"), Picture("b.png", "Gone", "Not there.")]
    write_report(tmp_path, {"x": measured()}, full, pictures[:1])
    files = [tmp_path / f"report.{kind}" for kind in ("md", "html", "json")]
    before = [path.read_bytes() for path in files]
    (tmp_path / "metrics.json").write_text(json.dumps({"x": measured(), "seconds": 3.0}))
    for path in files[:2]:
        path.unlink()
    assert rewrite_report(tmp_path) == tmp_path
    assert [path.read_bytes() for path in files] == before

    write_report(tmp_path, {"x": measured()}, full, pictures)
    rewrite_report(tmp_path)
    assert "Gone" not in files[0].read_text() and "A red field." in files[0].read_text()

    files[2].write_text('{"facts": {"recipes": {}, "tasks": {}, "colour": 1}, "pictures": []}')
    with pytest.raises(DataError, match=r"of another version.*fast-goal evaluate"):
        rewrite_report(tmp_path)
    files[2].unlink()
    with pytest.raises(DataError, match=r"report\.json does not exist.*fast-goal evaluate"):
        rewrite_report(tmp_path)


@pytest.mark.skipif(browser() is None, reason="no Chromium here")
def test_the_page_in_a_browser(tmp_path, full):
    Image.new("RGB", (1600, 300), "red").save(tmp_path / "a.png")
    found = {"x": measured(), "a_data_set_with_a_very_long_name_that_nobody_would_break": measured()}
    params = {"download": {"origin": "https://example.org/" + "a" * 300}}
    facts = dataclasses.replace(full, params=params, experiment="an_experiment_with_a_long_name_" * 3)
    write_report(tmp_path, found, facts, [Picture("a.png", "A title", "A red field.", "x")])
    page = (tmp_path / "report.html").read_text()
    for width, seen in look(browser(), page, tmp_path, (320, 1200)).items():
        links = seen.pop("links")
        nothing = {"refused": [], "loaded": [], "broken": 0, "silent": 0, "overflow": 0, "dead_links": 0}
        assert seen == {**nothing, "images": 1}, f"at {width} pixels"
        assert links > 10


@pytest.mark.skipif(browser() is None, reason="no Chromium here")
def test_the_browser_would_tell(tmp_path):
    page = (
        '<html><head></head><body><img src="http://127.0.0.1:9/x.png"><a href="#nowhere">x</a>'
        '<div style="width: 900px">x</div></body></html>'
    )
    seen = look(browser(), page, tmp_path, (320,))["320"]
    assert seen["refused"] == ["http://127.0.0.1:9/x.png"] and seen["broken"] == seen["silent"] == seen["dead_links"] == 1
    assert seen["overflow"] > 500
