"""The step `negatives` on generated scenes, with the real configuration and a tiny untrained base."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from noting_tracker import Tracker
from small_project import tiny_clip

import fast_goal.negatives
from fast_goal.config import NEGATIVE_TYPES, Params, build
from fast_goal.configure import compose
from fast_goal.data.records import NEGATIVES, SKIPPED, load_dataset, read_table, write_dataset
from fast_goal.data.sources.scenes.samples import make_samples
from fast_goal.errors import DataError, ModelError, ValidationError
from fast_goal.evaluation.features import FeatureStore
from fast_goal.negatives import Candidate, Made
from fast_goal.stages import negatives
from fast_goal.tracking import NullTracker

# The untrained base takes nearly everything for the same.
RULES = ("negatives=rules", "negatives.max_similarity=0.9999999")
SCENES = 16


def params(*overrides: str) -> Params:
    return build(Params, compose([*overrides]), "params.yaml")


@pytest.fixture(scope="module")
def samples():
    return [sample for index in range(SCENES) for sample in make_samples(0, "train", index, 32)]


@pytest.fixture(scope="module")
def base():
    return tiny_clip(0)


def write(name, samples, source="scenes", **changes):
    records = [sample.record | changes for sample in samples]
    objects = [row for sample in samples for row in sample.objects]
    write_dataset(name, f"data/datasets/{name}", records, [], objects=objects, source=source)


@pytest.fixture
def project(tmp_path, monkeypatch, samples, base):
    """A project after `publish`, whose images are not there: nobody looks at them."""
    monkeypatch.chdir(tmp_path)
    base.save(negatives.BASE, {"step": "base"})
    write("scenes", samples)
    return tmp_path


def test_without_a_generator_there_are_no_tables(project):
    left = negatives.OUTPUT / "scenes.parquet"
    left.parent.mkdir(parents=True)
    left.touch()
    negatives.main(params(), NullTracker())
    assert sorted(path.name for path in negatives.OUTPUT.iterdir()) == ["digests.json", "metrics.json"]
    assert json.loads(negatives.DIGESTS.read_text()) == {}
    assert json.loads((negatives.OUTPUT / "metrics.json").read_text()) == {"used": False}


def test_the_rules_on_scenes(project, monkeypatch):
    track = Tracker()
    negatives.main(params(*RULES), track)
    table = read_table(negatives.OUTPUT / "scenes.parquet", NEGATIVES)
    captions = load_dataset("scenes").records.set_index("image_id").long_caption
    assert set(table["type"]) == set(NEGATIVE_TYPES)
    assert (table["caption"] == table["image_id"].map(captions)).all()
    assert set(table["generator"]) == {"rules-2"} and set(table["seed"]) == {0}
    assert table.groupby("image_id").size().max() <= 4
    assert table["image_id"].nunique() == SCENES
    assert table["image_id"].drop_duplicates().tolist() == captions.index.tolist(), "in the order of the records"

    numbers = json.loads((negatives.OUTPUT / "metrics.json").read_text())["scenes"]
    assert numbers["captions"] == SCENES and numbers["share_with_negative"] == 1.0
    assert numbers["negatives"] == len(table)
    assert sum(numbers["share"].values()) == pytest.approx(1)
    for kind, share in numbers["share_true"].items():
        assert share + numbers["share_false"][kind] + numbers["share_unjudged"][kind] == pytest.approx(1)
    assert numbers["share_true"]["all"] <= 0.02
    assert numbers["share_false"]["swap_adjectives"] == numbers["share_false"]["replace_adjectives"] == 1.0
    assert track.numbers["share_false_swap_nouns"] == numbers["share_false"]["swap_nouns"]
    assert track.numbers["negatives"] == len(table)
    assert track.inputs == [("scenes", "negatives")]
    assert [Path(file).name for file in track.files] == ["metrics.json", "summary.md", "scenes_sample.md", "data_docs"]

    assert "12 of 12 expectations hold" in (negatives.OUTPUT / "summary.md").read_text()
    sample = (negatives.OUTPUT / "scenes_sample.md").read_text()
    assert all(f"## {kind}" in sample for kind in NEGATIVE_TYPES) and "**" in sample
    assert len(read_table(negatives.OUTPUT / "scenes_skipped.parquet", SKIPPED)) == 0

    # again: the embeddings of the first run serve, and the training steps see the same digests
    digests = negatives.DIGESTS.read_text()
    assert list(json.loads(digests)) == ["scenes"]
    monkeypatch.setattr(FeatureStore, "_embed_texts", lambda *_: pytest.fail("embedded again"))
    negatives.main(params(*RULES), NullTracker())
    assert negatives.DIGESTS.read_text() == digests
    pd.testing.assert_frame_equal(read_table(negatives.OUTPUT / "scenes.parquet", NEGATIVES), table)


def test_short_captions_of_another_source_without_the_base_weights(project, samples):
    (negatives.BASE / "open_clip_model.safetensors").unlink()
    write("scenes", samples, source="folder", captions=["A red cup is on a blue star.", "A dog is on a cat.", " "])
    negatives.main(
        params("negatives=rules", "negatives.captions=short", "finetune.captions=short", "negatives.max_similarity=null"),
        NullTracker(),
    )
    table = read_table(negatives.OUTPUT / "scenes.parquet", NEGATIVES)
    assert set(table["caption"]) == {"A red cup is on a blue star.", "A dog is on a cat."}
    assert table.groupby("image_id").size().eq(len(table) / SCENES).all(), "images with the same captions have the same"
    numbers = json.loads((negatives.OUTPUT / "metrics.json").read_text())["scenes"]
    assert numbers["captions"] == 2 * SCENES
    assert "share_true" not in numbers and "similarity" not in numbers


def test_a_failing_expectation_stops_the_step_and_names_rows(project, samples):
    mute = samples[0].record | {"image_id": "mute", "long_caption": "Hm."}
    dataset = load_dataset("scenes")
    rows = [*dataset.records.to_dict("records"), mute]
    write_dataset("scenes", dataset.root, rows, [], objects=dataset.objects, source="scenes")
    with pytest.raises(ValidationError) as caught:
        negatives.main(params(*RULES, "negatives.min_share=1.0"), NullTracker())
    message = str(caught.value)
    assert message.startswith("1 critical expectation failed; data/negatives/summary.md lists more rows")
    assert "scenes_negatives_captions, captions_with_negatives: at least 100.0% of the captions have a negative" in message
    assert f"row {SCENES}, image_id 'mute', reason 'nothing to change', caption 'Hm.'" in message
    assert not negatives.DIGESTS.exists(), "nothing is trained on what failed"
    skipped = read_table(negatives.OUTPUT / "scenes_skipped.parquet", SKIPPED)
    assert skipped[["sample", "step", "reason"]].values.tolist() == [["mute", "negatives", "nothing to change"]]
    assert "critical: " in (negatives.OUTPUT / "summary.md").read_text()
    negatives.main(params(*RULES, "negatives.min_share=0.9"), NullTracker())
    assert negatives.DIGESTS.exists()


class Careless:
    """Makes what is no negative."""

    name = "careless"

    def make(self, captions):
        others = [*captions[1:], captions[0]]
        return Made(
            [
                [Candidate(caption, "swap_nouns"), Candidate(other, "swap_nouns"), Candidate("Short.", "replace_nouns")]
                for caption, other in zip(captions, others, strict=True)
            ],
            notes=["three of each"],
        )


def test_what_a_generator_makes_is_filtered_and_counted(project, monkeypatch, capsys):
    monkeypatch.setattr(fast_goal.negatives, "load_generator", lambda config: Careless())
    with pytest.raises(ValidationError, match=r"scenes_negatives, not_empty"):
        negatives.main(params(*RULES, "negatives.generator=llm"), NullTracker())
    assert "negatives: scenes: three of each" in capsys.readouterr().out
    numbers = json.loads((negatives.OUTPUT / "metrics.json").read_text())["scenes"]
    assert Counter(numbers["dropped"]).total() == 3 * SCENES
    assert numbers["dropped"]["the caption itself"] == SCENES
    assert numbers["dropped"]["much longer or shorter"] >= SCENES
    assert numbers["skipped"] == {"every candidate left out": SCENES}
    skipped = read_table(negatives.OUTPUT / "scenes_skipped.parquet", SKIPPED)
    assert "the caption itself 1" in skipped["detail"][0]


def test_a_data_set_without_such_captions(project, samples):
    write("scenes", samples, long_caption="")
    with pytest.raises(DataError, match=r"scenes: no image of its split 'train' has a long caption; set negatives.captions"):
        negatives.main(params(*RULES), NullTracker())


def test_without_a_base(project):
    for path in negatives.BASE.iterdir():
        path.unlink()
    with pytest.raises(ModelError, match=r"models/base/clip"):
        negatives.main(params("negatives=rules", "negatives.max_similarity=null"), NullTracker())
    with pytest.raises(ModelError, match=r"models/base/clip"):
        negatives.main(params(*RULES), NullTracker())
