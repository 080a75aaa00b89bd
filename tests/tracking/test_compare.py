"""`fast-goal compare` over a store with three pipelines."""

import json
import math
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fast_goal.cli import app
from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.data.records import Dataset
from fast_goal.errors import FastGoalError
from fast_goal.evaluation.headline import MODES
from fast_goal.operations import compare
from fast_goal.tracking.lookup import Recorded, read_runs
from fast_goal.tracking.runs import step_run
from fast_goal.tracking.server import connect

RECALL = "scenes.long.finetuned.text_to_image.R1"
PIPELINES = [  # overrides, recall, loss, digest of the data
    (["experiment=demo"], 30.0, 0.5, "aaaa"),
    (["experiment=demo", "finetune.learning_rate=5e-4"], 31.5, math.nan, "aaaa"),
    (["experiment=demo", "objective=global"], 25.0, 0.9, "bbbb"),
]


@pytest.fixture(scope="module")
def ids(tmp_path_factory, empty_store):
    """The ids of the pipelines' runs, oldest first; the current folder of this module is theirs."""
    folder, found = tmp_path_factory.mktemp("compared"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("FAST_GOAL_SYSTEM_METRICS", "0")
        patch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
        shutil.copy(empty_store, folder / "mlflow.db")
        for number, (words, recall, loss, digest) in enumerate(PIPELINES):
            patch.setenv("FAST_GOAL_PIPELINE_ID", f"pipeline {number}")
            params = build(Params, compose(words), "params.yaml")
            data = Dataset("scenes", Path("data"), pd.DataFrame({"split": ["train"]}), digest=digest)
            for again in range(2 if number == 1 else 1):  # one of them ran a step twice
                with step_run("finetune", params) as track:
                    track.metrics({"loss": loss + 1 - again, "system/cpu": 50.0 + number}, step=again)
                    track.input(data, "training")
            with step_run("evaluate", params) as track:
                track.headline({RECALL: recall})
                track.metrics({"scenes.dropped.finetuned.text_to_image.R1": 12.0, "seconds": 3.0})
            found.append(track.pipeline_run_id)
            client, _ = connect()
        client.create_registered_model("fast-goal")
        with step_run("register", params) as track:  # of the last one
            client.create_model_version("fast-goal", "file:nowhere", run_id=track.run_id)
        client.set_registered_model_alias("fast-goal", "champion", "1")
        patch.setattr("fast_goal.tracking.identity.pipeline_id", lambda: "single-gate")
        with step_run("gate", params):  # by hand, and later than all
            pass
        yield found


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, ["compare", *words])
    if done.exception:
        raise done.exception
    return done.output


def test_runs_are_found_by_what_people_call_them(ids):
    named = [
        *ids,
        ids[0][:8],
        "latest",
        "latest~2",
        "scratch_global-scenes-none",
        "models:/fast-goal@champion",
        "models:/fast-goal/1",
    ]
    assert [run.id for run in read_runs(named)] == [*ids, ids[0], ids[2], ids[0], ids[2], ids[2], ids[2]]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("scratch_fast_goal-scenes-none", "names 2 runs"),
        ("finetune", "names 4 runs"),
        ("scratch_globe-scenes-none", "scratch_global-scenes-none  FINISHED"),
        ("it's", "No run"),
        ("latest~7", "only 3 pipelines"),
        ("models:/fast-goal@nobody", "not in the registry"),
        ("models:fast-goal", "expected models:/NAME@ALIAS"),
    ],
)
def test_an_unknown_or_ambiguous_run_is_an_error_with_candidates(ids, word, said):
    with pytest.raises(FastGoalError, match=said) as error:
        read_runs([word])
    if "names 2" in said:
        assert ids[0][:8] in str(error.value) and ids[1][:8] in str(error.value) and ids[2][:8] not in str(error.value)


def test_only_what_differs_is_printed(ids):
    lines = {line.split("  ")[0]: line.split() for line in invoke("latest~2", "latest~1").splitlines() if line}
    assert lines["finetune.learning_rate"] == ["finetune.learning_rate", "0.001", "0.0005"]
    assert lines[RECALL] == [RECALL, "30", "31.5", "+1.5", "better"]
    assert lines["finetune.loss"][1:] == ["1.5", "nan", "+nan"], "the step that ran last"
    assert "No difference in: data sets." in invoke("latest~2", "latest~1")
    names = " ".join(lines)
    assert "seed" not in names and "dropped" not in names and "system/" not in names and "commit" not in names
    everything = invoke("latest~2", "latest~1", "--all")
    assert "finetune.system/cpu" in everything and "\nseed " in everything and "\ncommit " in everything
    assert "\x1b" not in everything and max(map(len, everything.splitlines())) < 600, "plain where it is piped"


def test_the_objective_has_the_name_that_people_give_it(ids):
    """`global` is made by `fast_goal`, with other weights."""
    told = [line.split() for line in invoke(ids[0], ids[2]).splitlines() if line.startswith("objective ")]
    assert told == [["objective", "fast_goal", "global"]]


def test_worse_and_better_and_three_runs(ids):
    found = json.loads(invoke(*ids, "--format", "json"))
    assert [run["id"] for run in found["runs"]] == ids
    assert found["params"]["objective.weights.tsl_text"] == ["1.0", "1.0", "0.0"]
    assert found["datasets"] == {"scenes (training)": ["aaaa", "aaaa", "bbbb"]}
    assert found["metrics"][RECALL] == {"values": [30.0, 31.5, 25.0], "differences": [0.0, 1.5, -5.0], "better": "higher"}
    loss = found["metrics"]["finetune.loss"]
    assert loss["values"] == [1.5, None, 1.9] and loss["better"] is None, "their weights differ"
    table = invoke(ids[0], ids[2], "--format", "md")
    assert f"| {RECALL} | 30 | 25 | -5 worse |" in table and "| finetune.loss | 1.5 | 1.9 | +0.4 |" in table
    assert "## Data sets" in table


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("evaluate.seconds", "lower"),
        ("scenes.long.base.image_to_text.median_rank", "lower"),
        ("scenes.robustness.drop.finetuned.R1", "lower"),
        ("scenes.joint.finetuned.text_to_image.mAP10", "higher"),
        ("finetune.val_text_to_image_R_at_1", "higher"),
        ("finetune.samples_per_second", "higher"),
        ("finetune.final_loss", "lower"),
        ("finetune.epoch", None),
        ("finetune.tcs", "lower"),
        ("scenes.segmentation.scenes_shapes.finetuned.mIoU", "higher"),
        ("scenes.composition.scenes_sentences.finetuned.macro", "higher"),
        ("scenes.conditioned.long.global.text_to_image.R1", "higher"),
        ("scenes.conditioned.long.seconds_per_query.global", "lower"),
    ],
)
def test_which_of_two_values_is_better(metric, better):
    assert compare.direction(metric) == better


def recorded(name, objective, params, metrics):
    started = datetime(2026, 1, 2, tzinfo=UTC)
    own = {"objective.name": objective, **params}
    return Recorded(name * 8, name, "FINISHED", started, 60.0, own, metrics, {}, {})


METHODS = [
    recorded(
        "a", "global", {"objective.weights.global": "1"}, {"s.long.finetuned.text_to_image.R1": 40.0, "finetune.loss": 1.0}
    ),
    recorded(
        "b",
        "fast_goal",
        {"objective.weights.global": "1", "objective.weights.local": "0.5"},
        {"s.long.finetuned.text_to_image.R1": 42.0, "finetune.loss": 2.0, "finetune.tsl_image": 0.25},
    ),
    recorded(
        "c",
        "flair",
        {"objective.heads": "8"},
        {
            "s.long.finetuned.text_to_image.R1": 41.0,
            "finetune.loss": 9.0,
            "finetune.tcs": 0.5,
            "s.conditioned.long.global.text_to_image.R1": 41.0,
            "s.conditioned.long.conditioned.text_to_image.R1": 50.0,
            "s.conditioned.long.rerank.text_to_image.R1": 49.0,
        },
    ),
]


def test_three_methods_read_side_by_side():
    """The modes of the one that has them beside the others' only one; what some lack in tables of its own."""
    text = compare.as_markdown(compare.compare(METHODS))
    tables = {part.splitlines()[0]: part.splitlines()[2:] for part in text.split("## ")[1:]}
    assert "| objective | global | fast_goal | flair |" in tables["Runs"]
    modes = ["a (aaaaaaaa) global", "b (bbbbbbbb) global", *(f"c (cccccccc) {mode}" for mode in MODES)]
    assert tables["Ways of asking"] == [
        f"|  | {' | '.join(modes)} |",
        "| --- | --- | --- | --- | --- | --- |",
        "| s.long.text_to_image.R1 | 40 | 42 | 41 | 50 | 49 |",
        "",
    ]
    assert "| s.long.finetuned.text_to_image.R1 | 40 | 42 | +2 better | 41 | +1 better |" in tables["Metrics"]
    assert "| finetune.loss | 1 | 2 | +1 | 9 | +8 |" in tables["Metrics"], "losses of different objectives do not compare"
    assert "| objective.heads | - | - | 8 |" in tables["Parameters that not every run has"]
    some = tables["Metrics that not every run has"]
    assert "| finetune.tsl_image | - | 0.25 | - |" in some and "| finetune.tcs | - | - | 0.5 |" in some
    assert not any("conditioned" in line for line in some), "they have a table of their own"
    found = json.loads(compare.as_json(compare.compare(METHODS)))
    assert found["about"]["objective"] == ["global", "fast_goal", "flair"]
    assert found["metrics"]["s.conditioned.long.rerank.text_to_image.R1"]["values"] == [None, None, 49.0]


def test_losses_of_one_objective_compare():
    again = recorded("d", "flair", {"objective.heads": "8"}, {"finetune.loss": 8.0, "base.loss": 1.0})
    assert "| finetune.loss | 9 | 8 | -1 better |" in compare.as_markdown(compare.compare([METHODS[2], again]))
    from_others = replace(METHODS[0], metrics={"base.loss": 2.0})
    assert "| base.loss | 2 | 1 | -1 better |" in compare.as_markdown(compare.compare([from_others, again]))


def test_without_a_pooling_there_are_no_ways_of_asking():
    assert "Ways of asking" not in compare.as_text(compare.compare(METHODS[:2]))


def test_one_run_is_not_enough(ids):
    with pytest.raises(FastGoalError, match="two or more"):
        compare.run(["latest"])


def test_colours_and_folding_on_a_terminal(ids, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = compare.run([ids[0], ids[2]])
    assert "\x1b[31m-5 worse" in text


def test_view(ids, monkeypatch):
    from fast_goal.configure import configure

    configure(["experiment=demo"], Path("params.yaml"))
    assert "Training curves: http://127.0.0.1:5000/#/experiments/" in invoke("--view")
