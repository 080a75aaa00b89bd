"""The sentences of the report follow the numbers."""

from copy import deepcopy

import pytest

from fast_goal.evaluation.report import Facts, headlines, notes, verdict, write_report
from fast_goal.evaluation.tasks import Section


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
            way: {"R@1": {"value": tuned - base, "low": low, "high": high}} for way in ("text_to_image", "image_to_text")
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
        "difference": {"hit@1": {"value": 31.0, "low": 28.0, "high": 34.0}},
        "chance": {"hit@1": 14.0},
        "chance_of_base": {"hit@1": 14.0},
    }


@pytest.fixture
def facts():
    values = {field: "x" for field in Facts.__dataclass_fields__}
    tables = {name: {} for name in ("seconds", "objective", "first_stage", "tasks")}
    return Facts(**{**values, **tables, "bootstrap_samples": 1000, "base_kind": "pretrained"})


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
    ("low", "high", "words"),
    [
        (0.1, 2, "higher"),
        (-2, -0.1, "lower"),
        (-1, 1, "no difference shown"),
        (0, 2, "no difference shown"),
        (0, 0, "no difference shown"),
    ],
)
def test_verdict(low, high, words):
    assert verdict({"low": low, "high": high}) == words


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


def test_clear_results_need_no_warning(facts):
    text = said({"scenes": {"long": retrieval(24.0, 50.0, 22.0, 30.0), "localisation": localisation()}}, facts)
    for words in ("no difference shown", "worse", "exceed", "tied", "weak", "FLISM", "too small", "intervals are wide"):
        assert words not in text
    assert "1.1 times chance for the base, 3.3 times for the fine-tuned model" in text
    assert "another training seed" in text


def test_each_doubt_is_said(facts):
    clear = {"long": retrieval(24.0, 50.0, 22.0, 30.0), "localisation": localisation()}
    scratch = Facts(**{**facts.__dict__, "base_kind": "scratch", "scratch_split": "pretrain"})
    assert "**The base is weak.**" in said({"x": clear}, scratch)
    assert "24.0 % R@1 text-to-image on the long captions of `x` (chance 0.1 %)" in said({"x": clear}, scratch)
    assert "no difference shown in R@1" in said({"x": {"long": retrieval(24.0, 25.0, -1.0, 3.0)}}, facts)
    assert "partly forgotten" in said({"x": {"short": retrieval(24.0, 20.0, -6.0, -2.0)}}, facts)
    nothing = {"skipped": {"localisation": "boxes", "sentence_average": "long captions"}}
    assert "`x`: no localisation, for want of boxes in the split `x`." in said({"x": clear | nothing}, facts)
    assert "no sentence average, for want of long captions" in said({"x": clear | nothing}, facts)
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


def test_every_task_has_a_table(tmp_path, facts):
    views = {"base": "crop", "finetuned": "crop"}
    names = ("truncation", "robustness", "short", "joint", "dropped")
    sections = {name: Section(f"Title of {name}", f"About {name}.") for name in names}
    joint = {
        "base": {way: {"mAP@10": 30.0} for way in ("text_to_image", "image_to_text")},
        "finetuned": {way: {"mAP@10": 31.5} for way in ("text_to_image", "image_to_text")},
        "difference": {
            way: {"mAP@10": {"value": 1.5, "low": -1.0, "high": 4.0, "p": 0.3}} for way in ("text_to_image", "image_to_text")
        },
    }
    found = {
        "truncation": {"77": block(20.0, 40.0, -3.0), "full": block(21.0, 50.0)},
        "robustness": block(10.0, 30.0, -4.0),
        "joint": joint,
        "images": 800,
        "independent": 800,
        "seconds": {},
        "skipped": {"dropped": "long captions"},
    }
    write_report(tmp_path, {"x": found}, Facts(**{**facts.__dict__, "views": views, "tasks": sections}), [])
    text = (tmp_path / "report.md").read_text()
    parts = {part.splitlines()[0]: part for part in text.split("\n### ")[1:]}
    assert list(parts) == ["Title of truncation", "Title of robustness", "Title of joint"]
    assert "About truncation." in parts["Title of truncation"]
    rows = [line for line in parts["Title of truncation"].splitlines() if line.startswith("|")][2:]
    assert rows[0] == "| 77 | text to image | R@1 | 20.0 | 40.0 | +20.0 | +19.0 to +21.0 | below 0.001 | higher |"
    assert rows[4] == "| 77 | both, mean | drop of R@1 | 9.0 | 6.0 | −3.0 | −4.0 to −2.0 | 0.250 | lower |"
    assert [row.split(" | ")[0] for row in rows] == ["| 77"] * 5 + ["| full"] * 4
    assert "R@10" not in text
    row = "| all | image to text | mAP@10 | 30.0 | 31.5 | +1.5 | −1.0 to +4.0 | 0.300 | no difference shown |"
    assert row in parts["Title of joint"]
    assert "no dropped, for want of long captions" in text
