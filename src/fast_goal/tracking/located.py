"""A model by its URI: the folder of its files, and what is known of it, for those who serve it or embed with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fast_goal.errors import ModelError
from fast_goal.files import read_json
from fast_goal.tracking.champion import CHAMPION, URI, download, fetch, registered
from fast_goal.tracking.registry import model_digest
from fast_goal.tracking.server import connect, tracking_uri

LISTED = 10  # versions named in an error
INFO_FILE = "fast_goal.json"


@dataclass(frozen=True)
class Located:
    """A model's folder, and what it is: `version` and `aliases` only of a registered one."""

    uri: str
    folder: Path
    name: str
    digest: str
    version: int | None = None
    aliases: list[str] = field(default_factory=list)
    tags: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    licence: str | None = None


def locate(uri: str) -> Located:
    """The model of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a local folder, downloaded if it has to be.

    Raises ModelError where there is none, which says what there is instead; FastGoalError where the registry cannot be used.
    """
    parts = URI.fullmatch(uri)
    if parts is None:
        folder = fetch(uri)
        info = read_json(folder / INFO_FILE) if (folder / INFO_FILE).is_file() else {}
        commit = info.get("git_commit") or info.get("commit")
        return Located(folder.name, folder, folder.name, model_digest(folder), git_commit=commit)
    with registered(parts["name"]) as versions:
        version = versions.named(parts)
        if version is None:
            raise ModelError(_absent(uri, parts["name"], parts["alias"]))
        client, _ = connect()
        pointing = client.get_registered_model(version.name).aliases
        card = client.get_model_version(version.name, str(version.number)).description or ""
    tags = dict(version.tags)
    return Located(
        uri=uri,
        folder=download(version),
        name=version.name,
        digest=version.digest,
        version=version.number,
        aliases=sorted(alias for alias, pointed in pointing.items() if int(pointed) == version.number),
        tags=tags,
        git_commit=tags.get("git_commit"),
        licence=tags.get("licence") or _section(card, "Licence"),
    )


def _section(card: str, title: str) -> str | None:
    """The text below a heading of a model card, None where there is no such heading."""
    _, found, rest = f"\n{card}".partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0].strip() if found else None


def _absent(uri: str, name: str, alias: str | None) -> str:
    """Why there is no such model, and what to do: a sentence that names the aliases and versions there are."""
    client, _ = connect()
    found = client.search_registered_models(filter_string=f"name = '{name}'") if "'" not in name else []
    if not found:
        known = ", ".join(model.name for model in client.search_registered_models(max_results=LISTED))
        return (
            f"{uri}: no model named {name} is registered at {tracking_uri()}"
            f"{f' (there is: {known})' if known else ''}. `dvc repro` registers one; MLFLOW_TRACKING_URI names another store."
        )
    versions = sorted((int(one.version) for one in client.search_model_versions(f"name = '{name}'")), reverse=True)
    aliases = found[0].aliases
    named = ", ".join(f"{key} (version {value})" for key, value in sorted(aliases.items())) or "none"
    listed = ", ".join(map(str, versions[:LISTED])) or "none"
    more = f" and {len(versions) - LISTED} more" if len(versions) > LISTED else ""
    fix = f"`fast-goal gate` makes the candidate the {CHAMPION} if it passes. " if alias == CHAMPION else ""
    first = next(iter(sorted(aliases)), None)
    usable = f"models:/{name}@{first}" if first else f"models:/{name}/{versions[0]}" if versions else None
    other = f"Or name another one: --model {usable}" if usable else "`dvc repro` registers a version."
    return f"{uri} does not exist at {tracking_uri()}. Aliases: {named}. Versions: {listed}{more}. {fix}{other}"
