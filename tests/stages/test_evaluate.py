"""The step `evaluate` on two tiny models and a handful of drawn images, in a folder of its own."""

import base64
import csv
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from browser import browser, look
from small_project import params, write_models, write_scenes
from typer.testing import CliRunner

from fast_goal.cli import app
from fast_goal.data.records import PAIRS, write_table
from fast_goal.errors import ConfigError, DataError
from fast_goal.evaluation.features import FeatureStore
from fast_goal.stages import evaluate

KINDS = ("recall", "retrieval", "mistakes", "hits", "localisation", "components", "map")  # too few captions for `lengths`


class Recorder:
    """A tracker that remembers."""

    run_id = None

    def __init__(self):
        self.numbers, self.heads, self.files, self.inputs = {}, {}, [], []

    def params(self, values):
        pass

    def metrics(self, values, step=None):
        self.numbers |= values

    def headline(self, values):
        self.heads |= values

    def artifact(self, path, folder=""):
        assert Path(path).is_file()
        self.files.append(Path(path).name)

    def tags(self, values):
        pass

    def input(self, dataset, context=""):
        self.inputs.append((dataset.name, context))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The step run once over a data set with true boxes, choices and labels, and one with none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        write_scenes("scenes", choices=True)
        write_scenes("photos", count=6, truth=False)
        write_models()
        track = Recorder()
        evaluate.main(params("evaluate.datasets=[scenes,photos]"), track)
        yield Path.cwd() / "models/reports", track


def test_metrics_have_every_part(evaluated):
    folder, _ = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["seconds"] > 0
    scenes = metrics["scenes"]
    for kind in ("long", "short"):
        for direction in ("text_to_image", "image_to_text"):
            base, tuned = (scenes[kind][model][direction] for model in ("base", "finetuned"))
            difference = scenes[kind]["difference"][direction]["R@1"]
            assert difference["value"] == pytest.approx(tuned["R@1"] - base["R@1"])
            assert difference["low"] <= difference["value"] <= difference["high"]
            assert base["R@1"] <= base["R@5"] <= base["R@50"] == 100
            assert base["median_rank"] >= 1
    assert (scenes["long"]["captions"], scenes["long"]["images"]) == (12, 12)
    assert scenes["short"]["captions"] == 18  # every fourth image has none
    assert scenes["long"]["chance"]["text_to_image"]["R@1"] == pytest.approx(100 / 12)
    assert scenes["localisation"]["boxes"] == "truth"
    assert scenes["localisation"]["sentences"] == 24
    assert metrics["photos"]["localisation"]["boxes"] == "flism"
    assert metrics["photos"]["localisation"]["sentences"] == 6  # the best pair of each image


def test_every_task_is_measured(evaluated):
    folder, track = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    tasks = params().evaluate.tasks
    lacking = {"segmentation": "masks", "conditioned": "a model with text-conditioned pooling"}
    lacking = {task: reason for task, reason in lacking.items() if task in tasks}
    assert set(metrics["scenes"]) == {*tasks, "images", "independent", "seconds", "skipped"} - set(lacking)
    assert metrics["scenes"]["skipped"] == lacking
    assert metrics["photos"]["skipped"] == {**lacking, "composition": "captions to choose from", "zero_shot": "labels"}
    assert set(metrics["photos"]) == set(metrics["scenes"]) - {"composition", "zero_shot"}
    scenes = metrics["scenes"]
    for task in ("sentence_average", "robustness", "shuffled", "dropped"):
        for model in ("base", "finetuned"):
            whole, changed = (scenes[name][model] for name in ("long", task))
            falls = [whole[way]["R@1"] - changed[way]["R@1"] for way in ("text_to_image", "image_to_text")]
            assert scenes[task]["drop"][model]["R@1"] == pytest.approx(sum(falls) / 2)
    assert list(scenes["truncation"]) == ["77", "full"]
    assert scenes["truncation"]["full"] == scenes["long"]
    assert scenes["truncation"]["77"]["truncated"] == {"base": 4, "finetuned": 4}
    assert scenes["sentences"]["captions"] == 36
    assert (scenes["joint"]["regions"], scenes["joint"]["boxes"], metrics["photos"]["joint"]["boxes"]) == (12, "truth", "flism")
    assert "scenes.robustness.drop.finetuned.R1" in track.numbers
    assert "scenes.joint.finetuned.text_to_image.mAP10" in track.numbers
    report = (folder / "report.md").read_text()
    for title in ("Averaged sentences", "Truncated captions", "One false sentence", "Single sentences", "Shuffled sentences"):
        assert report.count(f"* **{title}**. ") == 2
        assert report.count(f"\n| {title}") == 2 * {"Single sentences": 2}.get(title, 3)


def test_choices_and_classes_are_measured_and_told(evaluated):
    folder, track = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())["scenes"]
    chosen, named = metrics["composition"]["scenes_sentences"], metrics["zero_shot"]["scenes_colours"]
    assert (chosen["cases"], chosen["independent"], named["cases"], named["classes"]) == (24, 12, 24, 5)
    for model in ("base", "finetuned"):
        groups = chosen[model]["groups"]
        right = round(12 * groups["swap_colours"]["accuracy"] / 100)
        assert groups["tie"] == {"accuracy": 0, "cases": 12, "ties": right}, "where it is no tie, the other foil is above"
        assert chosen[model]["accuracy"] == pytest.approx(100 * right / 24) and chosen[model]["ties"] == right
        assert track.heads[f"scenes.composition.scenes_sentences.{model}.accuracy"] == chosen[model]["accuracy"]
        assert track.numbers[f"scenes.zero_shot.scenes_colours.{model}.macro"] == named[model]["macro"]
    assert not [name for name in track.numbers if "groups" in name or ".ties" in name]
    report = (folder / "report.md").read_text()
    part = report.split("### True and false captions: scenes_sentences")[1].split("###")[0]
    assert [line.split(" | ")[:2] for line in part.splitlines() if line.startswith("| ")][2:] == [
        ["| swap_colours", "12"],
        ["| tie", "12"],
        ["| mean of the groups", ""],
        ["| all", "24"],
    ]
    assert "24 images, whole or cut out, to put into 5 classes, each the mean of 2 prompts." in report
    assert report.count("\n| True and false captions (scenes_sentences) | accuracy |") == 1, "corrected with all the others"
    assert "`photos`, split `test`: no `composition`, for want of captions to choose from." in report
    suites = "composition of `scenes_sentences`, zero shot of `scenes_colours`"
    assert report.count(f"No number of DeGLA's paper (base and fine-tuned: {suites}): it measures") == 1
    assert "`scenes`, composition of scenes_sentences: only 24 choices" in report
    assert "`scenes`, scenes_sentences, 24 choices: the true caption is told from all its foils in" in report.split("##")[0]


def test_a_second_run_computes_nothing_and_finds_the_same(evaluated, monkeypatch):
    folder, _ = evaluated
    first = json.loads((folder / "metrics.json").read_text())
    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(FeatureStore, "_running", None)  # what it computes in
    evaluate.main(params("evaluate.datasets=[scenes,photos]"), Recorder())
    second = json.loads((folder / "metrics.json").read_text())
    assert second["scenes"]["seconds"] == {"base": 0, "finetuned": 0}
    for metrics in (first, second):
        del metrics["seconds"], metrics["scenes"]["seconds"], metrics["photos"]["seconds"]
    assert first == second


def test_only_the_tasks_asked_for_are_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scenes("photos", count=4)
    write_models()
    track = Recorder()
    evaluate.main(params("evaluate.datasets=[photos]", "evaluate.tasks=[shuffled,short]", "evaluate.precision=bf16"), track)
    found = json.loads(Path("models/reports/metrics.json").read_text())["photos"]
    assert set(found) == {"short", "shuffled", "images", "independent", "seconds", "skipped"}
    text = Path("models/reports/report.md").read_text()
    assert "| Shuffled sentences | R@1 text to image |" in text and "Retrieval with long captions" not in text
    assert "localisation" not in text.split("## Parameters")[0].lower() and "bf16, compared in float32" in text
    with pytest.raises(ConfigError, match=r"evaluate\.tasks\[0\] = 'one_shot': expected one of 'long', 'short'"):
        params("evaluate.tasks=[one_shot]")


def test_a_model_with_a_pooling_and_images_with_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scenes("photos", count=6, masks=True)
    write_models(heads=4)
    track = Recorder()
    asked = [task for task in params().evaluate.tasks if task in ("long", "localisation", "segmentation", "conditioned")]
    evaluate.main(params("evaluate.datasets=[photos]", f"evaluate.tasks=[{','.join(asked)}]"), track)
    folder = Path("models/reports")
    assert json.loads((folder / "metrics.json").read_text())["photos"]["skipped"] == {}
    kinds = ("attention", "words", "segmentation_square_colours")
    text = (folder / "report.md").read_text()
    for kind in kinds:
        assert (folder / f"photos_{kind}.png").stat().st_size > 5000 and f"](photos_{kind}.png)" in text
    assert "By the attention of the fine-tuned model's pooling instead" in text
    assert "### Zero-shot semantic segmentation: square_colours" in text and "\n| white | " in text
    assert ("### Asked by the text" in text) == ("conditioned" in asked)
    assert "photos.localisation.attention.hit1" in track.heads and "photos.segmentation.square_colours.base.mIoU" in track.heads
    rows = list(csv.DictReader((folder / "localisation.csv").open()))
    assert {row["model"] for row in rows} == {"base", "finetuned", "attention", "chance"}


def test_the_report_says_what_the_numbers_say(evaluated):
    folder, _ = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    text = (folder / "report.md").read_text()
    recall = [metrics["scenes"]["long"][model]["text_to_image"]["R@1"] for model in ("base", "finetuned")]
    assert f"text-to-image R@1 {recall[0]:.1f} → {recall[1]:.1f} %" in text.split("##")[0]
    assert "| scenes | training, evaluation | " in text and "| photos | evaluation | " in text
    assert "No sample was skipped." in text
    part = text.split("## What is significant")[1].split("##")[0]
    counts = [int(count) for count in re.findall(r"\((\d+) of 50\)", part)]
    assert sum(counts) == 50, "every comparison has its place: 19 and 5 drops of either data set, two suites"
    assert "**The base is weak.**" in text
    assert "no difference shown" in text
    assert "Agreement with FLISM's own pairs, not ground truth" in text
    assert "1 min 15 s" in text, "the time of finetune"
    assert "{{" not in text and "{%" not in text


def test_tables_of_the_report_are_whole(evaluated):
    text = (evaluated[0] / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_html_report_needs_no_other_file(evaluated):
    folder, _ = evaluated
    page = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(re.findall(r"!\[", (folder / "report.md").read_text())) == 2 * 7 + 2 + 2
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "<script" not in page and not re.search(r'(src|href)="http', page)
    assert page.count("<table>") == page.count('<div class="table" tabindex="0">') >= 8


@pytest.mark.skipif(browser() is None, reason="no Chromium here")
def test_the_html_report_in_a_browser(evaluated, tmp_path):
    page = (evaluated[0] / "report.html").read_text()
    for width, seen in look(browser(), page, tmp_path, (390, 1200)).items():
        links = seen.pop("links")
        nothing = {"refused": [], "loaded": [], "broken": 0, "silent": 0, "overflow": 0, "dead_links": 0}
        assert seen == {**nothing, "images": 18}, f"at {width} pixels"
        assert links >= 15


def test_the_report_is_written_again_by_a_command(evaluated, monkeypatch):
    folder, _ = evaluated
    monkeypatch.chdir(folder.parents[1])
    files = [folder / f"report.{kind}" for kind in ("md", "html", "json")]
    before = [path.read_bytes() for path in files]
    files[0].unlink()
    done = CliRunner().invoke(app, ["report"])
    assert done.exit_code == 0, done.output
    assert [path.read_bytes() for path in files] == before


def test_the_pictures_are_those_of_the_data(evaluated):
    folder, track = evaluated
    drawn = {f"{name}_{kind}.png" for name in ("scenes", "photos") for kind in KINDS} | {"loss.png", "validation.png"}
    drawn |= {"scenes_composition.png", "scenes_zero_shot.png"}
    assert {path.name for path in folder.glob("*.png")} == drawn
    assert drawn <= set(track.files)
    known = json.loads((folder / "report.json").read_text())["pictures"]
    assert {picture["file"] for picture in known} == drawn
    assert all(len(picture["text"]) > 40 and picture["title"] for picture in known)


def test_the_curves_of_a_first_stage_are_drawn_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scenes("photos", count=4)
    write_models()
    Path("models/intermediate").mkdir()
    shutil.copy("models/finetune/history.jsonl", "models/intermediate")
    small = ("evaluate.datasets=[photos]", "evaluate.tasks=[short]", "evaluate.pictures=0")
    for first in ((), ("intermediate=before", "intermediate.dataset=photos")):
        shutil.rmtree("models/reports", ignore_errors=True)
        evaluate.main(params(*small, *first), Recorder())
        text = Path("models/reports/report.md").read_text()
        for name in ("intermediate_loss.png", "intermediate_validation.png"):
            assert Path("models/reports", name).exists() == (f"]({name})" in text) == bool(first)


def test_csv_files_for_the_plots(evaluated):
    folder, _ = evaluated
    rows = list(csv.DictReader((folder / "recall.csv").open()))
    assert list(rows[0]) == ["dataset", "captions", "direction", "k", "model", "recall"]
    assert len(rows) == 2 * 2 * 2 * 3 * 3  # data sets, caption kinds, directions, ks, models and chance
    history = list(csv.DictReader((folder / "history.csv").open()))
    assert len(history) == 10 and {"step", "loss", "global"} <= set(history[0])
    validation = list(csv.DictReader((folder / "validation.csv").open()))
    assert [tuple(row.values()) for row in validation] == [
        ("1", "text_to_image", "20.0"),
        ("2", "text_to_image", "40.0"),
    ]
    hits = list(csv.DictReader((folder / "localisation.csv").open()))
    assert len(hits) == 2 * 3 * len(params().evaluate.patch_ks)
    assert float(hits[0]["hit"]) == json.loads((folder / "metrics.json").read_text())["scenes"]["localisation"]["base"]["hit@1"]


def test_the_headline_is_short_and_holds_no_times(evaluated):
    folder, track = evaluated
    headline = json.loads((folder / "headline.json").read_text())
    assert headline == {name: pytest.approx(value, abs=1e-4) for name, value in track.heads.items()}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert headline["photos.long.finetuned.image_to_text.R1"] == pytest.approx(
        metrics["photos"]["long"]["finetuned"]["image_to_text"]["R@1"], abs=1e-4
    )


def test_what_is_tracked(evaluated):
    _, track = evaluated
    assert {"report.md", "report.html", "scenes_retrieval.png", "scenes_localisation.png", "loss.png"} <= set(track.files)
    assert "scenes.long.finetuned.text_to_image.R1" in track.numbers
    assert not [name for name in track.numbers if "difference" in name or "slices" in name], "they stand in metrics.json"
    assert "scenes.localisation.chance.hit1" in track.heads
    assert len(track.heads) == 2 * (2 * 2 * 2 + 3) + 2 * 2
    assert all(re.fullmatch(r"[\w./ -]+", name) for name in track.numbers), "the characters every MLflow store allows"
    assert track.inputs == [("scenes", "evaluation"), ("photos", "evaluation")]


def test_without_git_history_and_boxes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    write_scenes("photos", count=4, truth=False)
    write_models(view="pad")
    Path("data/flism/photos/pairs.parquet").unlink()
    Path("models/finetune/history.jsonl").unlink()
    evaluate.main(params("evaluate.datasets=[photos]", "evaluate.pictures=0", "base.kind=pretrained"), Recorder())
    text = Path("models/reports/report.md").read_text()
    assert "`none`" in text, "the commit"
    assert "no `localisation`, for want of boxes" in text
    assert "**The base is weak.**" not in text
    assert "crop (base), pad (fine-tuned)" in text
    assert Path("models/reports/history.csv").read_text() == "step,loss\n"
    assert Path("models/reports/validation.csv").read_text() == "epoch,direction,recall\n"
    assert Path("models/reports/localisation.csv").read_text() == "dataset,k,model,hit\n"
    assert not list(Path("models/reports").glob("*retrieval.png"))


def test_boxes_that_hold_no_patch_are_not_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scenes("photos", count=4, truth=False)
    write_models()
    path = Path("data/flism/photos/pairs.parquet")
    pairs = pd.read_parquet(path)
    pairs["x2"], pairs["y2"] = pairs["x1"] + 1, pairs["y1"] + 1
    write_table(path, pairs, PAIRS)
    evaluate.main(params("evaluate.datasets=[photos]"), Recorder())
    found = json.loads(Path("models/reports/metrics.json").read_text())["photos"]["localisation"]
    assert found["without_centre"] == {"base": 4, "finetuned": 4} and found["chance"]["hit@1"] == 0
    assert not Path("models/reports/photos_localisation.png").exists()
    assert "photos_localisation.png" not in Path("models/reports/report.md").read_text()


def test_an_empty_split_and_a_broken_image_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scenes("photos", count=4)
    write_models()
    with pytest.raises(DataError, match="no image in the split 'val'"):
        evaluate.main(params("evaluate.datasets=[photos]", "evaluate.split=val"), Recorder())
    Path("data/datasets/photos/2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2\.png"):
        evaluate.main(params("evaluate.datasets=[photos]"), Recorder())
