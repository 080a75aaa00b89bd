"""experiment=paper_degla from `download` to `evaluate`, as a user runs it: its own configuration with a few small images in the
published layouts, a base from scratch and negatives by rules. No image has a long caption, and nothing is matched."""

import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
from noting_tracker import Tracker

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import publications as p
from test_karpathy import entry

from fast_goal.config import Params
from fast_goal.configure import configure
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, load_dataset, read_table, write_dataset
from fast_goal.errors import ConfigError, ValidationError
from fast_goal.files import read_json
from fast_goal.flism import engine
from fast_goal.stages import flism, publish, validate
from fast_goal.tracking import NullTracker

STEPS = ("download", "base", "flism", "validate", "publish", "negatives", "intermediate", "finetune", "evaluate")
SPLITS = {"train": 12, "restval": 1, "val": 3, "test": 4}  # Karpathy's
KINDS = ["replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att"]
CLASSES = {"cat": 2, "cow": 3, "dog": 1}  # images
COLOURS, THINGS = ["red", "green", "blue", "white", "black"], ["dog", "cat", "cow", "horse"]
SHRUNK = [
    "experiment=paper_degla",
    "negatives=rules",
    "negatives.max_similarity=0.9999999",  # the base, hardly trained, takes nearly everything for the same
    "dataset=[mscoco,sugarcrepe,imagenet]",
    "evaluate.datasets=[mscoco,sugarcrepe,imagenet]",
    *(f"download.datasets.mscoco.archives.{name}.size=null" for name in ("train2014", "val2014")),
    *(f"download.datasets.mscoco.facts.counts.{split}={count}" for split, count in SPLITS.items()),
    *(f"validate.expected_counts.{split}={SPLITS[split]}" for split in ("train", "val", "test")),
    *(f"download.datasets.sugarcrepe.facts.counts.{kind}=2" for kind in KINDS if kind != "swap_obj"),
    "download.datasets.imagenet.names=null",
    "download.datasets.imagenet.templates=['a photo of a {}.','a {}.']",
    f"download.datasets.imagenet.facts.counts.test={sum(CLASSES.values())}",
    "base.kind=scratch",
    *(f"base.scratch.{name}={size}" for name, size in tiny.CLIP.items()),
    "base.scratch.steps=4",
    "base.scratch.batch_size=4",
    "finetune.epochs=2",
    "finetune.batch_size=16",
    "finetune.workers=0",
    "evaluate.bootstrap_samples=20",
    "evaluate.pictures=0",
]  # fmt: skip


def captions(number: int) -> list[str]:
    """Five, of which rules make negatives."""
    thing, other = THINGS[number % 4], THINGS[(number + 1) % 4]
    return [f"A {COLOURS[(number + k) % 5]} {thing} is beside a {COLOURS[(number + k + 2) % 5]} {other}." for k in range(5)]


def coco() -> dict[str, bytes]:
    """The archives of MSCOCO with Karpathy's splits, by their places in the downloads folder."""
    entries = []
    for split, count in SPLITS.items():
        for _ in range(count):
            number = len(entries)
            entries.append(entry(number, split, "train2014" if split == "train" else "val2014", captions(number)))
    files = {"karpathy/caption_datasets.zip": p.zipped({"dataset_coco.json": json.dumps({"images": entries}).encode()})}
    for folder in ("train2014", "val2014"):
        own = {f"{folder}/{row['filename']}": p.jpeg(row["imgid"], (40, 32)) for row in entries if row["filepath"] == folder}
        files[f"mscoco/{folder}.zip"] = p.zipped(own)
    return files


def sugarcrepe() -> dict[str, bytes]:
    files = {
        "mscoco/val2017.zip": p.zipped({f"val2017/{number:012d}.jpg": p.jpeg(100 + number, (36, 40)) for number in range(2)})
    }
    for kind in KINDS:
        cases = {
            str(row): {"filename": f"{row:012d}.jpg", "caption": f"A {row} {kind}.", "negative_caption": f"{kind} {row} no."}
            for row in range(2)
        }
        files[f"sugarcrepe/{kind}.json"] = json.dumps(cases).encode()
    return files


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Params, dict[str, Tracker]]:
    """A project after `evaluate`, its parameters, and what each step told the tracker."""
    root = tmp_path_factory.mktemp("project")
    numbers = iter(range(200, 300))
    with pytest.MonkeyPatch.context() as patch:
        p.project(root, patch)
        patch.setenv("FAST_GOAL_MIRROR", str(root / "mirror"))
        patch.setattr(engine, "extract", lambda *_, **__: pytest.fail("FLISM"))
        patch.setattr(flism, "load_models", lambda *_: pytest.fail("models for FLISM"))
        write(root / "mirror", coco() | sugarcrepe())
        pictures = [f"{name}/{index}.jpg" for name, count in CLASSES.items() for index in range(count)]
        write(root / ".fast_goal/downloads/imagenet/val", {name: p.jpeg(next(numbers), (40, 40)) for name in pictures})
        params, trackers = configure(SHRUNK), {}
        for step in STEPS:
            trackers[step] = Tracker()
            importlib.import_module(f"fast_goal.stages.{step}").main(params, trackers[step])
    return root, params, trackers


@pytest.fixture
def project(finished, tmp_path, monkeypatch) -> Params:
    """The parameters; the working directory is a copy of the tables of the finished project."""
    root, params, _ = finished
    for name in ("data/records", "data/flism", "data/datasets", ".fast_goal/downloads/imagenet"):
        shutil.copytree(root / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return params


def test_compositional_accuracy_is_measured_and_told(finished):
    root, _, trackers = finished
    metrics = read_json(root / "models/reports/metrics.json")
    found = metrics["sugarcrepe"]["composition"]["sugarcrepe"]
    for model in ("base", "finetuned"):
        assert 0 <= found[model]["accuracy"] <= 100
        assert list(found[model]["groups"]) == KINDS and {group["cases"] for group in found[model]["groups"].values()} == {2}
    assert found["chance"] and found["difference"]["accuracy"]["low"] <= found["difference"]["accuracy"]["high"]
    assert metrics["imagenet"]["zero_shot"]["imagenet"]["finetuned"]["accuracy"] >= 0
    short = metrics["mscoco"]["short"]
    assert short["captions"] == 5 * SPLITS["test"] and "R@1" in short["finetuned"]["text_to_image"]
    assert not {"long", "localisation", "sentences"} & metrics["mscoco"].keys()
    assert any("composition" in name for name in trackers["evaluate"].numbers)
    report = (root / "models/reports/report.md").read_text()
    assert "True and false captions" in report and "swap_att" in report and "Classification" in report


def test_degla_is_trained_on_the_short_captions(finished):
    root, *_ = finished
    metrics = read_json(root / "models/finetune/metrics.json")
    assert metrics["counts"]["samples"] == 5 * SPLITS["train"] and metrics["steps"] == 2 * (60 // 16)
    assert metrics["counts"]["negatives"] > 5 * SPLITS["train"]
    assert {"global", "igc", "tgc", "distillation"} <= metrics["final"].keys()
    history = [json.loads(line) for line in (root / "models/finetune/history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history if "val_text_to_image_R@1" in row] == [1, 2]
    used = read_json(root / "models/finetune/fast_goal.json")["params"]["finetune"]
    assert (used["betas"], used["adam_epsilon"]) == ([0.9, 0.98], 1e-6)


def test_nothing_is_matched_or_expected_of_what_is_not_there(finished):
    root, *_ = finished
    assert read_json(root / "data/flism/metrics.json") == {"used": False}
    assert {path.name for path in (root / "data/flism/mscoco").iterdir()} == {
        "regions.parquet", "pairs.parquet", "skipped.parquet"}  # fmt: skip
    for name, schema in (("regions", REGIONS), ("pairs", PAIRS), ("skipped", SKIPPED)):
        assert read_table(root / f"data/flism/mscoco/{name}.parquet", schema).empty
    summary = read_json(root / "data/validation/summary.json")
    assert summary["expectations"]["critical"] == 0
    of_mscoco = {outcome["expectation"] for outcome in summary["outcomes"] if outcome["suite"].startswith("mscoco_")}
    assert {"short_captions_present", "count_train", "published_counts"} <= of_mscoco
    assert not {"long_captions_present", "mean_words", "captions_fit", "regions_present", "one_best"} & of_mscoco
    elsewhere = {outcome["suite"] for outcome in summary["outcomes"] if outcome["expectation"] == "short_captions_present"}
    assert elsewhere == {"mscoco_records"}, "what is only evaluated on is not asked for captions"
    assert "### Regions and pairs" not in (root / "data/validation/data_card.md").read_text()


def test_what_is_published_says_that_it_has_no_pairs(finished):
    root, *_ = finished
    folder, images = root / "data/publish/mscoco", sum(SPLITS.values()) - SPLITS["restval"]
    info = read_json(folder / "dataset.json")
    assert (info["images"], info["pairs"], info["long_captions"], info["made"]) == (images, 0, 0, {})
    card = (folder / "README.md").read_text()
    assert f"{images} images with captions, without local pairs. Licence" in card and "None: no image has a local pair." in card
    for words in ("FLISM", "Long captions have", "region-sentence-pairs", "tags:\n- long-captions", "chosen by a model"):
        assert words not in card


def test_a_training_image_without_a_short_caption_stops_the_pipeline(project):
    dataset = load_dataset("mscoco")
    records = dataset.records
    for row in (0, len(records) - 1):  # of train, and of test, where it asks nothing
        records.at[row, "captions"] = ["  "]
    assert (records["split"].iloc[0], records["split"].iloc[-1]) == ("train", "test")
    write_dataset("mscoco", dataset.root, records, [], source="karpathy", published=dataset.published)
    with pytest.raises(ValidationError) as caught:
        validate.main(project, NullTracker())
    message = str(caught.value)
    assert message.startswith("1 critical expectation failed")
    assert "short_captions_present: every image of train has a short caption: 1 of 19 rows fail" in message
    assert f"row 0, image_id '{records['image_id'][0]}', split 'train': there is no short caption" in message


def test_tables_of_an_earlier_run_are_emptied(project):
    left = Path("data/flism/mscoco/pairs.png")
    left.write_bytes(b"of an earlier run")
    flism.main(project, NullTracker())
    assert not left.exists() and read_table("data/flism/mscoco/pairs.parquet", PAIRS).empty
    assert publish.how_it_was_made(project) == {}


def test_an_objective_with_local_pairs_is_refused(tmp_path):
    for objective in ("fast_goal", "local", "fast_goal_degla"):
        with pytest.raises(ConfigError, match=r"objective\.name = '\w+' needs local pairs, but flism\.splits = \[\]"):
            configure([*SHRUNK, f"objective={objective}", "finetune.captions=long"], tmp_path / "params.yaml")
    assert not (tmp_path / "params.yaml").exists()
