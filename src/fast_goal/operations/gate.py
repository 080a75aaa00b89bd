"""`fast-goal gate` and `fast-goal rollback`: which version of the registered model is the champion.

The gate measures the candidate's registered files, not models/finetune, and the champion's on the present test sets, decides
(`promotion.gate`) and moves the aliases. Every decision is written to models/decisions/TIME-vVERSION/ as decision.json and
decision.md; models/decisions/latest.json is the last one's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params, load_params
from fast_goal.environment import WORK, device, prepare, share_work, termination_raises
from fast_goal.errors import FastGoalError, ModelError
from fast_goal.files import atomic_folder, digest, read_json, write_json, write_text
from fast_goal.promotion.report import markdown, title

if TYPE_CHECKING:
    from fast_goal.data.records import Dataset
    from fast_goal.promotion.gate import Decision
    from fast_goal.promotion.measure import Measured
    from fast_goal.tracking import Tracker
    from fast_goal.tracking.champion import Version

BASE, VALIDATION, OUTPUT = Path("models/base/clip"), Path("data/validation/summary.json"), Path("models/decisions")
LOCK = WORK / "gate.lock"
# Tags of a version. TEST_SET and AGAINST: what it was judged on, and against which model.
DECISION, REASON, TIME, LONG, SHORT = "gate.decision", "gate.reason", "gate.time", "gate.long_r1", "gate.short_r1"
TEST_SET, AGAINST = "gate.test_set", "gate.against"
REASON_LENGTH = 1000  # characters; decision.md has the whole


@dataclass(frozen=True)
class Case:
    """What is judged. champion: None while no version has that alias; the base model then stands for it."""

    params: Params
    candidate: Version
    champion: Version | None
    datasets: list[Dataset]
    time: str
    dry_run: bool

    @property
    def test_set(self) -> str:
        """What the decision hangs on beside the two models: test images, settings of the gate, and whether the data passed."""
        checked = read_json(VALIDATION)["expectations"]["critical"] if VALIDATION.exists() else None
        data = [[data.name, data.digest] for data in self.datasets]
        return digest([data, self.params.evaluate.split, asdict(self.params.gate), checked])

    @property
    def against(self) -> str:
        """The model it is held against, in words that name no other one."""
        from fast_goal.tracking.registry import model_digest

        return f"base model {model_digest(BASE)}" if self.champion is None else f"version {self.champion.number}"


def run(dry_run: bool = False, again: bool = False) -> str:
    """Judges the candidate; returns what was decided, in words.

    dry_run: changes nothing in the registry, neither aliases nor tags. again: also judges a version that was judged on this
    test set against this champion, or was rolled back. Raises ModelError where there is no candidate or its files are not
    those that were registered, FastGoalError when MLflow cannot be used or another gate runs.
    """
    prepare()
    share_work()
    params = load_params()
    with _alone(), termination_raises():
        from fast_goal.data.records import load_dataset
        from fast_goal.tracking.champion import CHAMPION, registered
        from fast_goal.tracking.promotion import settle
        from fast_goal.tracking.server import tracking_uri

        name, alias = params.register.model_name, params.register.alias
        with registered(name) as versions:
            settled = None if dry_run else settle(versions)
            candidate, champion = versions.by_alias(alias), versions.by_alias(CHAMPION)
        if candidate is None:
            raise ModelError(
                f"No version of {name} at {tracking_uri()} has the alias {alias}. The step `register` gives it: `dvc repro`."
            )
        datasets = [load_dataset(name) for name in params.evaluate.datasets]
        case = Case(params, candidate, champion, datasets, _now(), dry_run)
        notes = (
            []
            if settled is None
            else [f"A {settled['what']} that was interrupted is complete now: version {settled['to']} is the champion."]
        )
        reason = _nothing_to_judge(case, again)
        if reason is not None:
            record = _record(case, "nothing to judge", [*notes, reason])
            return _words(record, _write(record))
        return _judge(case, notes)


def rollback(reason: str = "") -> str:
    """Gives the alias `champion` back to the version that had it before; returns what was done, in words.

    Raises ModelError where there is nothing to go back to, FastGoalError as `run`.
    """
    prepare()
    params = load_params()
    with _alone(), termination_raises():
        from fast_goal.tracking.champion import registered
        from fast_goal.tracking.promotion import ROLLBACK, ROLLBACK_REASON, ROLLED_BACK, settle, take_back

        with registered(params.register.model_name) as versions:
            note = settle(versions)
            if note is None or note["what"] != ROLLBACK:
                note = take_back(versions, reason, _now())
            taken, target = (versions.numbered(note[way]) for way in ("from", "to"))
        before = note["previous"]
        record = {
            **_head(params, note["tags"][ROLLED_BACK]),
            "decision": "rolled back",
            "candidate": {"version": note["from"], "digest": _digest(taken)},
            "champion": {"version": note["to"], "digest": _digest(target)},
            "checks": [],
            "reasons": [
                f"Reason: {note['tags'][ROLLBACK_REASON]}.",
                f"Version {note['to']} is the champion again.",
                "No version before it is known." if before is None else f"Version {before} was champion before it.",
            ],
            "dry_run": False,
        }
        return _words(record, _write(record))


def _nothing_to_judge(case: Case, again: bool) -> str | None:
    """Why the candidate is not judged, None where it is."""
    from fast_goal.tracking.promotion import ROLLBACK_REASON, ROLLED_BACK

    tags, number = case.candidate.tags, case.candidate.number
    if case.champion is not None and case.champion.number == number:
        return f"Version {number} is the champion already."
    if again:
        return None
    if ROLLED_BACK in tags:
        return (
            f"Version {number} was rolled back at {tags[ROLLED_BACK]} (reason: {tags.get(ROLLBACK_REASON)}). It is not "
            "promoted again; `fast-goal gate --again` judges it all the same."
        )
    if DECISION in tags and (tags.get(TEST_SET), tags.get(AGAINST)) == (case.test_set, case.against):
        return (
            f"Version {number} was judged at {tags.get(TIME)} on this test set against the same model, {case.against}: "
            f"{tags[DECISION]}. `fast-goal gate --again` judges it once more."
        )
    return None


def _judge(case: Case, notes: list[str]) -> str:
    from fast_goal.model.clip import Clip
    from fast_goal.promotion.gate import PROMOTED, decide
    from fast_goal.promotion.measure import measure
    from fast_goal.tracking.champion import download, registered
    from fast_goal.tracking.promotion import promote
    from fast_goal.tracking.runs import step_run

    params = case.params
    with step_run("gate", params) as track:
        track.params({"gate": asdict(params.gate), "evaluate.split": params.evaluate.split})
        for dataset in case.datasets:
            track.input(dataset, "gate")
        candidate = Clip.load(download(case.candidate))
        champion = Clip.load(BASE if case.champion is None else download(case.champion))
        measured = measure(candidate, champion, case.datasets, params.evaluate, device(), params.gate.latency_ratio)
        decision = decide(measured, params.gate, read_json(VALIDATION) if VALIDATION.exists() else None)
        tags = _tags(case, measured, decision)
        if not case.dry_run:
            with registered(case.candidate.name) as versions:
                if decision.decision == PROMOTED:
                    promote(versions, case.candidate, case.champion, tags)
                else:
                    versions.tag(case.candidate, tags)
        record = _record(case, decision.decision, [*notes, *decision.reasons], measured, decision)
        folder = _write(record)
        _track(track, case, measured, decision, folder)
    return _words(record, folder)


def _tags(case: Case, measured: Measured, decision: Decision) -> dict[str, str | None]:
    reason = " ".join(decision.reasons)
    short = measured.short.get(measured.dataset)
    return {
        DECISION: decision.decision,
        REASON: reason if len(reason) <= REASON_LENGTH else f"{reason[: REASON_LENGTH - 1]}…",
        TIME: case.time,
        LONG: f"{measured.long[measured.dataset].candidate:.2f}",
        SHORT: None if short is None else f"{short.candidate:.2f}",
        TEST_SET: case.test_set,
        AGAINST: case.against,
    }


def _track(track: Tracker, case: Case, measured: Measured, decision: Decision, folder: Path) -> None:
    promoted = decision.decision == "promoted" and not case.dry_run
    track.metrics({**measured.numbers(), "promoted": float(promoted)})
    track.tags({"model_version": case.candidate.number, "against": case.against, "decision": decision.decision})
    for name in ("decision.json", "decision.md"):
        track.artifact(folder / name)


def _record(
    case: Case, word: str, reasons: list[str], measured: Measured | None = None, decision: Decision | None = None
) -> dict[str, Any]:
    name = measured.dataset if measured else case.datasets[0].name
    return {
        **_head(case.params, case.time),
        "decision": word,
        "candidate": {"version": case.candidate.number, "digest": _digest(case.candidate)},
        "champion": case.champion and {"version": case.champion.number, "digest": _digest(case.champion)},
        "checks": [_plain(asdict(check)) for check in decision.checks] if decision else [],
        "reasons": reasons,
        "numbers": _plain(measured.numbers()) if measured else {},
        "dataset": name,
        "split": case.params.evaluate.split,
        "dataset_digest": next(data.digest for data in case.datasets if data.name == name),
        "datasets": {data.name: data.digest for data in case.datasets},
        "dry_run": case.dry_run,
    }


def _head(params: Params, time: str) -> dict[str, Any]:
    from fast_goal.tracking.identity import git_commit

    head = {"model": params.register.model_name, "git_commit": git_commit(), "time": time}
    return {**head, "dataset": None, "split": None, "dataset_digest": None}


def _digest(version: Version | None) -> str | None:
    return None if version is None else version.tags.get("model_digest")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """With None for numbers that JSON does not know."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def _write(record: Mapping[str, Any]) -> Path:
    """Writes the decision's folder, then latest.json; returns the folder."""
    time = record["time"].replace("-", "").replace(":", "")
    folder = OUTPUT / f"{time}-v{record['candidate']['version']}"
    with atomic_folder(folder) as temporary:
        write_json(temporary / "decision.json", record)
        write_text(temporary / "decision.md", markdown(record))
    write_json(OUTPUT / "latest.json", record)
    return folder


def _words(record: Mapping[str, Any], folder: Path) -> str:
    return "\n".join(
        [_sentence(title(record)), *(f"  {reason}" for reason in record["reasons"]), f"  {folder / 'decision.md'}"]
    )


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def _alone() -> Iterator[None]:
    """No second gate or rollback of this project at the same time. Raises FastGoalError if there is one."""
    from filelock import FileLock, Timeout

    WORK.mkdir(exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            yield
    except Timeout:
        raise FastGoalError(
            f"Another `fast-goal gate` or `fast-goal rollback` is at work in this project ({LOCK} is locked). Wait for its end."
        ) from None
