"""`fast-goal gate` and `fast-goal rollback` with a registry in SQLite, tiny models and drawn images."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "stages"))
from fitted_clip import fitted
from small_project import tiny_clip, write_scenes

from fast_goal.cli import app
from fast_goal.configure import compose
from fast_goal.data.records import load_dataset
from fast_goal.errors import FastGoalError, ModelError
from fast_goal.files import read_json, write_json
from fast_goal.operations import gate
from fast_goal.promotion import latency
from fast_goal.tracking import promotion, server
from fast_goal.tracking.champion import registered
from fast_goal.tracking.registry import model_digest, register

CLEAN = {"datasets": {"scenes": {}}, "expectations": {"critical": 0, "warnings": 0}, "outcomes": []}
LOOSE = ["gate.short_tolerance=100", "gate.latency_ratio=100"]  # what these small models do on a busy machine is left to chance


class Killed(BaseException):
    """Not an Exception: nothing on the way may take it for an error of its own."""


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory, empty_store):
    """Data, a base model, and a registry with three versions that know 16, 8 and 12 of 18 captions."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("FAST_GOAL_PIPELINE_ID", "one")
        patch.setenv("FAST_GOAL_SYSTEM_METRICS", "0")
        patch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
        patch.setattr(latency, "SECONDS", 0.05)
        shutil.copy(empty_store, "mlflow.db")
        configure()
        write_scenes("scenes", 18)
        tiny_clip(0).save(gate.BASE, {"step": "base"})
        write_json(gate.VALIDATION, CLEAN)
        for known in (12, 6, 16):
            fitted(tiny_clip(0), load_dataset("scenes"), known).save(Path("models/finetune"), {"step": "finetune"})
            register(Path("models/finetune"), "fast-goal", "candidate", "", {}, None)
        shutil.rmtree("models/finetune")  # the gate judges what is registered
        yield folder
    import mlflow

    mlflow.set_tracking_uri(None)


def configure(*overrides):
    values = compose(["evaluate.batch_size=5", "evaluate.bootstrap_samples=50", *LOOSE, *overrides])
    Path("params.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture(autouse=True)
def fresh(project):
    """No champion, no decision, no tags; the candidate is version 1."""
    configure()
    write_json(gate.VALIDATION, CLEAN)
    shutil.rmtree(gate.OUTPUT, ignore_errors=True)
    with registered("fast-goal") as versions:
        for alias in ("champion", "previous"):
            versions.point(alias, None)
        for number in (1, 2, 3):
            version = versions.numbered(number)
            versions.tag(version, dict.fromkeys(set(version.tags) - {"model_digest"}))
    candidate(1)


def candidate(number):
    with registered("fast-goal") as versions:
        versions.point("candidate", versions.numbered(number))


def aliases():
    return dict(server.connect()[0].get_registered_model("fast-goal").aliases)


def tags(number):
    return server.connect()[0].get_model_version("fast-goal", str(number)).tags


def latest():
    return read_json(gate.OUTPUT / "latest.json")


def fast_goal(*words):
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_the_life_of_a_champion():
    """Promoted against the base; a worse one is rejected, a better one promoted, taken back, and not promoted again."""
    words = fast_goal("gate", "--dry-run")
    assert "Version 1 of fast-goal would be promoted (dry run: nothing was changed)." in words
    assert aliases() == {"candidate": 1} and set(tags(1)) == {"model_digest"}
    assert latest()["decision"] == "promoted" and latest()["dry_run"] is True

    assert "Version 1 of fast-goal is promoted." in fast_goal("gate")
    assert aliases() == {"candidate": 1, "champion": 1}
    first = latest()
    assert first["champion"] is None and first["dry_run"] is False
    assert first["candidate"] == {"version": 1, "digest": tags(1)["model_digest"]}
    assert (first["dataset"], first["split"]) == ("scenes", "test") and first["git_commit"] == "none"
    assert first["dataset_digest"] == load_dataset("scenes").digest
    assert all(set(check) == {"name", "passed", "measured", "bound", "text"} for check in first["checks"])
    assert tags(1)["gate.decision"] == "promoted" and "gate.replaced" not in tags(1)
    assert tags(1)["gate.long_r1"] == f"{first['numbers']['scenes.long.candidate']:.2f}"
    assert tags(1)["gate.time"] == first["time"] and tags(1)["gate.reason"].startswith("R@1 with long captions on scenes")
    again = fast_goal("gate")
    assert "Nothing to judge" in again and "Version 1 is the champion already." in again
    assert latest()["decision"] == "nothing to judge" and latest()["checks"] == []

    candidate(2)
    assert "Version 2 of fast-goal is rejected." in fast_goal("gate")
    assert aliases() == {"candidate": 2, "champion": 1} and tags(2)["gate.decision"] == "rejected"
    assert latest()["champion"]["version"] == 1
    assert [check["name"] for check in latest()["checks"] if not check["passed"]] == [
        "long better",
        "long better, ties against",
    ]
    again = fast_goal("gate")
    assert "was judged at" in again and "rejected" in again and "--again" in again

    candidate(3)
    assert "Version 3 of fast-goal is promoted." in fast_goal("gate")
    assert aliases() == {"candidate": 3, "champion": 3, "previous": 1} and tags(3)["gate.replaced"] == "1"
    [folder] = gate.OUTPUT.glob(f"{latest()['time'].replace('-', '').replace(':', '')}-v3")
    assert read_json(folder / "decision.json") == latest()
    page = (folder / "decision.md").read_text()
    assert page.startswith("# Gate: version 3 of fast-goal is promoted\n") and page.count("\n| ✓ |") == 9
    assert f"| champion | version 1, digest `{tags(1)['model_digest']}` |" in page

    client, experiment = server.connect()
    run = client.search_runs([experiment], "tags.step = 'gate'", max_results=1)[0]
    assert run.info.status == "FINISHED" and run.data.tags["model_version"] == "3" and run.data.tags["decision"] == "promoted"
    assert run.data.metrics["scenes.long.difference"] == pytest.approx(latest()["numbers"]["scenes.long.difference"])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"decision.json", "decision.md"}

    words = fast_goal("rollback", "--reason", "search got slower")
    assert "Version 3 of fast-goal is rolled back." in words and "Version 1 is the champion again." in words
    assert aliases() == {"candidate": 3, "champion": 1}
    assert tags(3)["rolled_back.reason"] == "search got slower" and tags(3)["rolled_back"] == latest()["time"]
    assert latest()["decision"] == "rolled back" and latest()["candidate"]["version"] == 3
    with pytest.raises(ModelError, match="nothing to go back to: version 1"):
        gate.rollback()

    assert "was rolled back at" in fast_goal("gate") and aliases()["champion"] == 1
    assert "Version 3 of fast-goal is promoted." in fast_goal("gate", "--again")
    assert aliases() == {"candidate": 3, "champion": 3, "previous": 1} and "rolled_back" not in tags(3)


def test_a_champion_deleted_in_the_registry_leaves_the_base_to_beat():
    with registered("fast-goal") as versions:
        versions.point("champion", None)  # what MLflow does to the alias of a deleted version: see test_champion
        versions.point("previous", versions.numbered(2))
    gate.run()
    assert latest()["champion"] is None and latest()["decision"] == "promoted"
    assert aliases() == {"candidate": 1, "champion": 1, "previous": 2}


def test_data_with_critical_failures_is_enough_to_reject():
    outcome = {
        "suite": "scenes_records",
        "expectation": "decodes",
        "severity": "critical",
        "passed": False,
        "observed": "2 rows",
    }
    broken = {**CLEAN, "expectations": {"critical": 1, "warnings": 0}, "outcomes": [outcome]}
    write_json(gate.VALIDATION, broken)
    assert "scenes_records: decodes (2 rows)" in gate.run()
    assert [check["name"] for check in latest()["checks"] if not check["passed"]] == ["validation clean"]
    assert aliases() == {"candidate": 1}


def test_better_by_significance_only():
    configure("gate.margin=99")
    words = gate.run()
    assert "Version 1 of fast-goal is promoted." in words and "less than +99, but significant" in words
    fresh_tags = tags(1)
    assert float(fresh_tags["gate.long_r1"]) > 50
    with registered("fast-goal") as versions:
        versions.point("champion", None)
    configure("gate.margin=99", "gate.significance=null")
    assert "rejected" in gate.run(again=True) and aliases() == {"candidate": 1}


def test_another_test_set_is_judged_again_and_with_other_settings_too(monkeypatch):
    configure("gate.margin=99", "gate.significance=null")
    assert "rejected" in gate.run()
    assert "Nothing to judge" in gate.run()
    configure("gate.margin=98", "gate.significance=null")
    assert "is rejected" in gate.run()
    info = read_json("data/records/scenes.json")
    try:
        write_json("data/records/scenes.json", {**info, "digest": "another"})
        assert "is rejected" in gate.run()
        assert latest()["dataset_digest"] == "another"
    finally:
        write_json("data/records/scenes.json", info)


def test_a_gate_that_was_killed_is_completed_by_the_next(monkeypatch):
    with registered("fast-goal") as versions:
        versions.point("champion", versions.numbered(2))

    def die(*arguments):
        raise Killed

    from fast_goal.tracking.champion import Versions

    for method in ("point", "tag"):  # before any alias moved; before the tags
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Versions, method, die)
            gate.run()
        assert aliases().get("champion") == (2 if method == "point" else 1)
        if method == "point":  # as if it had not been there
            with registered("fast-goal") as versions:
                versions.note(promotion.UNDER_WAY, None)
    words = gate.run()
    assert "A promotion that was interrupted is complete now: version 1 is the champion." in words
    assert "Version 1 is the champion already." in words
    assert aliases() == {"candidate": 1, "champion": 1, "previous": 2}
    assert tags(1)["gate.decision"] == "promoted" and tags(1)["gate.replaced"] == "2"


def test_two_gates_at_once_and_what_is_missing(monkeypatch):
    with gate._alone(), pytest.raises(FastGoalError, match=r"Another `fast-goal gate`.*gate\.lock is locked"):
        gate.rollback()

    with registered("fast-goal") as versions:
        versions.point("candidate", None)
    with pytest.raises(ModelError, match=r"No version of fast-goal at sqlite.* has the alias candidate"):
        gate.run()
    candidate(1)
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(FastGoalError, match=r"MLFLOW_TRACKING_URI = http://127\.0\.0\.1:9"):
            gate.run()
    assert not gate.OUTPUT.exists() and aliases() == {"candidate": 1}


def test_a_tampered_version_is_neither_judged_nor_promoted(project):
    shutil.rmtree(".fast_goal/registry", ignore_errors=True)
    digest = tags(1)["model_digest"]
    [weights] = [
        folder / "open_clip_model.safetensors"
        for folder in project.glob("mlruns/*/models/*/artifacts/data/finetune")
        if model_digest(folder) == digest
    ]
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + b"?")
        with pytest.raises(ModelError, match=f"{digest} was registered"):
            gate.run()
    finally:
        weights.write_bytes(before)
    assert aliases() == {"candidate": 1} and "gate.decision" not in tags(1) and not gate.OUTPUT.exists()
    client, experiment = server.connect()
    assert client.search_runs([experiment], "tags.step = 'gate'", max_results=1)[0].info.status == "FAILED"
    assert "promoted" in gate.run()


def test_every_decision_is_strict_json():
    gate.run()
    text = (gate.OUTPUT / "latest.json").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(word)) == latest()
