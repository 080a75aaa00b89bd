"""Aliases and tags on a real registry in SQLite. What moves aliases needs no files, so most versions here have none."""

import shutil
import threading
from pathlib import Path

import pytest
from tiny import CLIP

from fast_goal.config import ScratchConfig, build
from fast_goal.configure import configure
from fast_goal.errors import FastGoalError, ModelError
from fast_goal.model.clip import build_scratch
from fast_goal.tracking import champion, promotion, server
from fast_goal.tracking.champion import CHAMPION, PREVIOUS, champion_uri, fetch, registered
from fast_goal.tracking.registry import model_digest

REST = {"split": "train", "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 0}
NAME = "fast-goal"


class Killed(BaseException):
    """Not an Exception: nothing on the way may take it for an error of its own."""


class Dying:
    """The client of a process that is killed before its `number`-th write to the registry."""

    def __init__(self, client, number):
        self._client, self._left = client, number

    def __getattr__(self, name):
        method = getattr(self._client, name)
        if not name.startswith(("set_", "delete_")):
            return method

        def call(*arguments):
            if self._left == 0:
                raise Killed
            self._left -= 1
            return method(*arguments)

        return call


@pytest.fixture
def versions(project):
    """Four versions without files."""
    client, _ = server.connect()
    client.create_registered_model(NAME)
    for number in range(1, 5):
        client.create_model_version(NAME, source=f"file:///nowhere/{number}", tags={"model_digest": str(number)})
    with registered(NAME) as found:
        yield found


def test_the_champion_that_is_meant_is_that_of_the_params(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert champion_uri() == "models:/fast-goal@champion"
    configure(["experiment=own_photos", "download.datasets.photos.root=photos"])
    assert champion_uri() == "models:/own-photos@champion"


def state(versions):
    """The numbers that have the aliases, and the tags of all versions; nothing may be under way."""
    assert versions.noted(promotion.UNDER_WAY) is None
    numbers = {}
    for alias in (CHAMPION, PREVIOUS):
        found = versions.by_alias(alias)
        numbers[alias] = None if found is None else found.number
    tags = {number: dict(versions.numbered(number).tags) for number in range(1, 5) if versions.numbered(number)}
    return numbers, tags


def promote(versions, number, **tags):
    versions = versions if versions is not None else champion.Versions(NAME, server.connect()[0])
    given = {"gate.decision": "promoted", "gate.short_r1": None, **tags}
    promotion.promote(versions, versions.numbered(number), versions.by_alias(CHAMPION), given)


def test_promotions_and_rollbacks_in_turn(versions):
    assert versions.by_alias(CHAMPION) is None and registered_nowhere() is None
    promote(versions, 1)
    assert state(versions)[0] == {CHAMPION: 1, PREVIOUS: None}
    promote(versions, 2)
    promote(versions, 3)
    numbers, tags = state(versions)
    assert numbers == {CHAMPION: 3, PREVIOUS: 2}
    assert [tags[number].get("gate.replaced") for number in (1, 2, 3, 4)] == [None, "1", "2", None]

    note = promotion.take_back(versions, "slow", "noon")
    assert (note["from"], note["to"], note["previous"]) == (3, 2, 1)
    numbers, tags = state(versions)
    assert numbers == {CHAMPION: 2, PREVIOUS: 1}
    assert (tags[3]["rolled_back"], tags[3]["rolled_back.reason"]) == ("noon", "slow")
    promotion.take_back(versions, "", "one")
    numbers, tags = state(versions)
    assert numbers == {CHAMPION: 1, PREVIOUS: None}
    assert tags[2]["rolled_back.reason"] == "none given"
    before = state(versions)
    with pytest.raises(ModelError, match=r"nothing to go back to: version 1 of fast-goal at sqlite.*is the champion"):
        promotion.take_back(versions, "", "two")
    assert state(versions) == before

    promote(versions, 3)  # it is good after all
    numbers, tags = state(versions)
    assert numbers == {CHAMPION: 3, PREVIOUS: 1}
    assert "rolled_back" not in tags[3] and "rolled_back.reason" not in tags[3] and tags[3]["gate.replaced"] == "1"


def registered_nowhere():
    with registered("never-made") as found:
        assert found.numbered(1) is None and found.noted("anything") is None
        return found.by_alias(CHAMPION)


def test_a_rollback_without_a_champion_or_one_before(versions):
    with pytest.raises(ModelError, match="has the alias champion: nothing to take back"):
        promotion.take_back(versions, "", "noon")
    promote(versions, 1)
    with pytest.raises(ModelError, match="nothing to go back to"):
        promotion.take_back(versions, "", "noon")


def test_a_deleted_version_is_no_aim(versions):
    for number in (1, 2, 3):
        promote(versions, number)
    client, _ = server.connect()
    client.delete_model_version(NAME, "1")
    assert promotion.take_back(versions, "", "noon")["previous"] is None
    assert state(versions)[0] == {CHAMPION: 2, PREVIOUS: None}

    promote(versions, 4)
    client.delete_model_version(NAME, "4")  # the champion; MLflow takes its alias along
    assert state(versions)[0] == {CHAMPION: None, PREVIOUS: 2}
    with pytest.raises(ModelError, match="nothing to take back"):
        promotion.take_back(versions, "", "noon")
    promote(versions, 3)
    assert state(versions)[0] == {CHAMPION: 3, PREVIOUS: 2}
    assert "gate.replaced" not in state(versions)[1][3]


def test_a_rollback_never_ends_at_what_was_taken_back(versions):
    """2 takes the place of 1, then 1 that of 2 again: before 2 comes 1, which is taken back just now."""
    promote(versions, 1)
    promote(versions, 2)
    promote(versions, 1)
    promotion.take_back(versions, "", "noon")
    assert state(versions)[0] == {CHAMPION: 2, PREVIOUS: None}


def test_only_the_champion_that_was_judged_against_is_replaced(versions):
    promote(versions, 1)
    judged = versions.by_alias(CHAMPION)
    promote(versions, 2)
    before = state(versions)
    with pytest.raises(ModelError, match="moved while version 3 was judged"):
        promotion.promote(versions, versions.numbered(3), judged, {})
    assert state(versions) == before


def interrupted(act, prepare, finish, reference):
    """Kills `act` before each of its writes in turn; after `finish` everything must be as in `reference`."""
    for number in range(100):
        with registered(NAME) as versions:
            reset(versions)
            prepare(versions)
            dying = champion.Versions(NAME, Dying(versions._client, number))
            try:
                act(dying)
            except Killed:
                finish(versions)
                assert state(versions) == reference, f"killed before write {number + 1}"
            else:
                assert state(versions) == reference
                return number
    raise AssertionError("it never ends")


def reset(versions):
    """No alias and no tag but the digest's."""
    versions.note(promotion.UNDER_WAY, "{}")
    versions.note(promotion.UNDER_WAY, None)
    for alias in (CHAMPION, PREVIOUS):
        versions.point(alias, None)
    for number in range(1, 5):
        version = versions.numbered(number)
        versions.tag(version, dict.fromkeys(set(version.tags) - {"model_digest"}))


def test_a_promotion_killed_anywhere_is_completed(versions):
    def prepare(versions):
        versions.point(CHAMPION, versions.numbered(2))
        versions.point(PREVIOUS, versions.numbered(1))

    def finish(versions):
        if promotion.settle(versions) is None:  # killed before anything was written
            promote(versions, 3, **{"gate.reason": "better"})
        assert promotion.settle(versions) is None

    prepare(versions)
    promote(versions, 3, **{"gate.reason": "better"})
    reference = state(versions)
    assert reference[0] == {CHAMPION: 3, PREVIOUS: 2}
    writes = interrupted(lambda dying: promote(dying, 3, **{"gate.reason": "better"}), prepare, finish, reference)
    assert writes >= 5  # the note and its end, two aliases, the tags


def test_the_first_promotion_killed_anywhere_is_completed(versions):
    promote(versions, 3)
    reference = state(versions)

    def finish(versions):
        if promotion.settle(versions) is None:
            promote(versions, 3)

    interrupted(lambda dying: promote(dying, 3), lambda versions: None, finish, reference)


def test_a_rollback_killed_anywhere_goes_back_one_step_and_no_more(versions):
    def prepare(versions):
        versions.point(CHAMPION, versions.numbered(3))
        versions.point(PREVIOUS, versions.numbered(2))
        versions.tag(versions.numbered(2), {"gate.replaced": "1"})

    def finish(versions):
        if promotion.settle(versions) is None:
            promotion.take_back(versions, "slow", "noon")

    prepare(versions)
    promotion.take_back(versions, "slow", "noon")
    reference = state(versions)
    assert reference[0] == {CHAMPION: 2, PREVIOUS: 1}
    interrupted(lambda dying: promotion.take_back(dying, "slow", "noon"), prepare, finish, reference)


@pytest.mark.parametrize("meanwhile", ["moved", "deleted"])
def test_what_was_interrupted_is_not_completed_over_somebody_elses_decision(versions, meanwhile):
    promote(versions, 1)
    with pytest.raises(Killed):
        promote(champion.Versions(NAME, Dying(versions._client, 1)), 2)  # the note alone was written
    if meanwhile == "moved":
        versions.point(CHAMPION, versions.numbered(4))
    else:
        server.connect()[0].delete_model_version(NAME, "2")
    assert promotion.settle(versions) is None
    assert state(versions)[0] == {CHAMPION: 4 if meanwhile == "moved" else 1, PREVIOUS: None}


def save(folder, seed):
    clip = build_scratch(build(ScratchConfig, {**CLIP, **REST}, "scratch"), 77, seed=seed)
    clip.save(folder, {"step": "finetune"})
    return Path(folder)


@pytest.fixture
def digest(project):
    """That of one version with files, laid out as the step `register` has MLflow do it (see test_gate for the step)."""
    folder = save("models/finetune", 0)
    shutil.copytree(folder, stored(project))
    client, _ = server.connect()
    client.create_registered_model(NAME)
    client.create_model_version(NAME, (project / "stored").as_uri(), tags={"model_digest": model_digest(folder)})
    client.set_registered_model_alias(NAME, "candidate", "1")
    return model_digest(folder)


def stored(project) -> Path:
    return project / "stored/data/finetune"


def test_fetch_downloads_once_and_checks_each_time(digest, project, monkeypatch):
    folder = fetch("models:/fast-goal@candidate")
    assert folder == Path(".fast_goal/registry/fast-goal-1")
    assert {path.name for path in folder.iterdir()} == {path.name for path in Path("models/finetune").iterdir()}
    assert model_digest(folder) == digest
    with monkeypatch.context() as patched:
        patched.setattr(champion, "_download", None)
        assert fetch("models:/fast-goal/1") == folder
        assert fetch("models/finetune") == Path("models/finetune")

    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")  # damaged here: had again
    assert model_digest(fetch("models:/fast-goal/1")) == digest
    weights.unlink()  # half of it
    assert model_digest(fetch("models:/fast-goal/1")) == digest

    server.connect()[0].delete_model_version(NAME, "1")
    with pytest.raises(ModelError, match=r"models:/fast-goal/1 is not in the registry at sqlite"):
        fetch("models:/fast-goal/1")


def test_files_that_are_not_those_registered_are_refused(digest, project):
    weights = stored(project) / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelError, match=rf"models:/fast-goal/1.*digest \w+, but {digest} was registered"):
        fetch("models:/fast-goal@candidate")
    assert [path.name for path in Path(".fast_goal/registry").iterdir()] == ["fast-goal-1.lock"]

    (stored(project) / "open_clip_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds 0 files open_clip_config\.json"):
        fetch("models:/fast-goal@candidate")
    shutil.rmtree(stored(project).parent)
    with pytest.raises(ModelError, match="files of models:/fast-goal/1 cannot be had"):
        fetch("models:/fast-goal@candidate")
    assert [path.name for path in Path(".fast_goal/registry").iterdir()] == ["fast-goal-1.lock"]


def test_a_download_that_was_killed_is_not_used(digest, monkeypatch):
    import mlflow

    download = mlflow.artifacts.download_artifacts

    def half(**options):
        download(**options)
        next(Path(options["dst_path"]).rglob("*.safetensors")).write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(mlflow.artifacts, "download_artifacts", half)
        # what clears up in a process that is alive is not there in one that was killed
        patched.setattr("fast_goal.files.shutil.rmtree", lambda *arguments, **options: None)
        fetch("models:/fast-goal/1")
    assert list(Path(".fast_goal/registry").glob(".fast-goal-1.*.tmp"))
    assert not Path(".fast_goal/registry/fast-goal-1").exists()
    assert model_digest(fetch("models:/fast-goal/1")) == digest
    assert not list(Path(".fast_goal/registry").glob(".fast-goal-1.*"))


def test_two_that_want_the_same_version_download_it_once(digest, monkeypatch):
    calls, download = [], champion._download
    monkeypatch.setattr(champion, "_download", lambda *arguments: (calls.append(1), download(*arguments)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch("models:/fast-goal/1"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Path(".fast_goal/registry/fast-goal-1")] * 3 and len(calls) == 1


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/fast-goal@champion", "not in the registry at sqlite.*fast-goal gate"),
        ("models:/other/3", "not in the registry"),
        ("models:/fast-goal", "names no model: expected models:/NAME@ALIAS"),
        ("models:/fast-goal/one", "names no model"),
        ("models/nowhere", "models/nowhere/open_clip_config.json does not exist"),
    ],
)
def test_what_cannot_be_fetched_is_named(versions, uri, words):
    with pytest.raises(ModelError, match=words):
        fetch(uri)


def test_a_version_without_a_digest_is_not_trusted(versions):
    server.connect()[0].create_model_version(NAME, source="file:///nowhere")
    with pytest.raises(ModelError, match=r"models:/fast-goal/5 at sqlite.*has no tag model_digest"):
        fetch("models:/fast-goal/5")


def test_a_registry_that_is_away_is_named(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(FastGoalError, match=r"MLFLOW_TRACKING_URI = http://127\.0\.0\.1:9"):
        fetch("models:/fast-goal@champion")
