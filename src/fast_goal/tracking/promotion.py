"""Moves the aliases `champion` and `previous`: a promotion, or a rollback.

Each is several calls to the registry. What is to be done is noted with the registered model first, so that a call which was
killed half-way is completed by the next one (`settle`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fast_goal.errors import ModelError
from fast_goal.tracking.champion import CHAMPION, PREVIOUS, Version, Versions
from fast_goal.tracking.server import tracking_uri

# Tags of a version. REPLACED: the number of the version that was champion before it.
REPLACED, ROLLED_BACK, ROLLBACK_REASON = "gate.replaced", "rolled_back", "rolled_back.reason"
UNDER_WAY = "gate.under_way"  # tag of the registered model: the note, as JSON
PROMOTION, ROLLBACK = "promotion", "rollback"
# what: one of them; from, to, previous: numbers of versions or None, `to` becomes champion; tags, of the version `tagged`
Note = dict[str, Any]


def promote(versions: Versions, version: Version, champion: Version | None, tags: Mapping[str, str | None]) -> None:
    """Makes a version the champion, with these tags; `champion`, which it was judged against, becomes `previous`.

    Raises ModelError if the champion is another one by now.
    """
    now, previous = versions.by_alias(CHAMPION), versions.by_alias(PREVIOUS)
    if _number(now) != _number(champion):
        raise ModelError(
            f"The alias {CHAMPION} of {versions.name} at {tracking_uri()} was moved while version {version.number} was judged. "
            "Nothing was changed; run `fast-goal gate` again."
        )
    if champion is not None:
        previous = champion
    elif previous is not None and previous.number == version.number:
        previous = None
    replaced = None if champion is None else str(champion.number)
    tags = {**tags, REPLACED: replaced, ROLLED_BACK: None, ROLLBACK_REASON: None}
    _begin(versions, PROMOTION, champion, version, previous, version, tags)


def take_back(versions: Versions, reason: str, time: str) -> Note:
    """Gives `champion` back to the version that had it before.

    Raises ModelError where there is no champion or none before it.
    """
    champion = versions.by_alias(CHAMPION)
    if champion is None:
        raise ModelError(f"No version of {versions.name} at {tracking_uri()} has the alias {CHAMPION}: nothing to take back.")
    target = versions.by_alias(PREVIOUS)
    if target is None or target.number == champion.number:
        target = _replaced_by(versions, champion)
    if target is None:
        raise ModelError(
            f"There is nothing to go back to: version {champion.number} of {versions.name} at {tracking_uri()} is the "
            f"champion, and no version that is still there was it before. To make another one champion, move the alias "
            f"{CHAMPION} in MLflow."
        )
    tags = {ROLLED_BACK: time, ROLLBACK_REASON: reason or "none given"}
    before = _replaced_by(versions, target)
    if _number(before) == champion.number:  # they took turns
        before = None
    return _begin(versions, ROLLBACK, champion, target, before, champion, tags)


def settle(versions: Versions) -> Note | None:
    """Completes what a call that was killed left undone. Returns its note, None where there was nothing, or where it makes no
    sense any more because somebody moved the alias or deleted the version."""
    noted = versions.noted(UNDER_WAY)
    if noted is None:
        return None
    note: Note = json.loads(noted)
    holds = versions.numbered(note["to"]) and _number(versions.by_alias(CHAMPION)) in (note["from"], note["to"])
    if holds:
        _carry_out(versions, note)
    versions.note(UNDER_WAY, None)
    return note if holds else None


def _begin(
    versions: Versions,
    what: str,
    champion: Version | None,
    target: Version,
    previous: Version | None,
    tagged: Version,
    tags: Mapping[str, str | None],
) -> Note:
    note: Note = {
        "what": what,
        "from": _number(champion),
        "to": target.number,
        "previous": _number(previous),
        "tagged": tagged.number,
        "tags": dict(tags),
    }
    versions.note(UNDER_WAY, json.dumps(note))
    _carry_out(versions, note)
    versions.note(UNDER_WAY, None)
    return note


def _carry_out(versions: Versions, note: Note) -> None:
    """Has the same effect however often it is done, and however much of it was done before."""
    previous, target = note["previous"], versions.numbered(note["to"])
    if target is None:
        raise ModelError(f"Version {note['to']} of {versions.name} at {tracking_uri()} was deleted meanwhile.")
    versions.point(PREVIOUS, None if previous is None else versions.numbered(previous))
    versions.point(CHAMPION, target)
    tagged = versions.numbered(note["tagged"])
    if tagged is not None:  # it was not deleted meanwhile
        versions.tag(tagged, note["tags"])


def _replaced_by(versions: Versions, version: Version) -> Version | None:
    """The version whose place `version` took, unless it was deleted or was itself taken back."""
    number = version.tags.get(REPLACED, "")
    found = versions.numbered(int(number)) if number.isdecimal() else None
    return None if found is None or ROLLED_BACK in found.tags else found


def _number(version: Version | None) -> int | None:
    return None if version is None else version.number
