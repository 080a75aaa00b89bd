"""The versions of the registered model by their aliases, and their files.

    with registered("fast-goal") as versions:
        versions.by_alias("champion")
    fetch("models:/fast-goal@champion")     # the folder of its open_clip files

`candidate` is what the step `register` made last; `champion` is the version in use; `previous` the one in use before.
`tracking.promotion` moves the last two.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fast_goal.config import PARAMS_FILE, load_params
from fast_goal.environment import WORK
from fast_goal.errors import FastGoalError, ModelError, TemporaryError
from fast_goal.files import atomic_folder
from fast_goal.tracking.registry import MODEL_FILES, model_digest
from fast_goal.tracking.server import connect, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking.client import MlflowClient

CHAMPION, PREVIOUS = "champion", "previous"
FOLDER = WORK / "registry"  # of the versions that were downloaded
URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")
AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")  # also what MLflow says of a lost connection
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the second: for an alias that nothing has


@dataclass(frozen=True)
class Version:
    """A version of a registered model, as it was when it was read."""

    name: str
    number: int
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def digest(self) -> str:
        """Of its configuration and weights. Raises ModelError for a version that the step `register` did not make."""
        found = self.tags.get("model_digest", "")
        if not found:
            raise ModelError(
                f"{self.uri} at {tracking_uri()} has no tag model_digest, so its files cannot be checked. "
                "Register the model with `fast-goal register`."
            )
        return found


class Versions:
    """The versions of one registered model. Use it through `registered`, which turns MLflow's errors into ours."""

    def __init__(self, name: str, client: MlflowClient):
        self.name = name
        self._client = client

    def by_alias(self, alias: str) -> Version | None:
        """The version with this alias, None where there is no such alias, or no such model."""
        return self._find(lambda: self._client.get_model_version_by_alias(self.name, alias))

    def named(self, uri: re.Match[str]) -> Version | None:
        """The version that a match of URI names, None where there is no such one."""
        return self.numbered(int(uri["version"])) if uri["version"] else self.by_alias(uri["alias"])

    def numbered(self, number: int) -> Version | None:
        """The version of this number, None where it was never made or was deleted."""
        return self._find(lambda: self._client.get_model_version(self.name, str(number)))

    def tag(self, version: Version, tags: Mapping[str, str | None]) -> None:
        """Sets tags of a version; one of None is removed."""
        for key, value in tags.items():
            if value is not None:
                self._client.set_model_version_tag(self.name, str(version.number), key, value)
            elif key in version.tags:
                self._client.delete_model_version_tag(self.name, str(version.number), key)

    def point(self, alias: str, version: Version | None) -> None:
        """Moves an alias, or removes it."""
        if version is not None:
            self._client.set_registered_model_alias(self.name, alias, str(version.number))
        elif self.by_alias(alias) is not None:
            self._client.delete_registered_model_alias(self.name, alias)

    def noted(self, key: str) -> str | None:
        """A tag of the registered model itself."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(self.name).tags.get(key)
        except MlflowException as error:
            if error.error_code in ABSENT:
                return None
            raise

    def note(self, key: str, value: str | None) -> None:
        """Sets a tag of the registered model, or removes it."""
        if value is not None:
            self._client.set_registered_model_tag(self.name, key, value)
        else:
            self._client.delete_registered_model_tag(self.name, key)

    def _find(self, ask: Callable[[], ModelVersion]) -> Version | None:
        from mlflow.exceptions import MlflowException

        try:
            found = ask()
        except MlflowException as error:
            if error.error_code in ABSENT:
                return None
            raise
        return Version(found.name, int(found.version), dict(found.tags))


def champion_uri() -> str:
    """Of the model that params.yaml of this folder names; where there is none, the project's own name."""
    name = load_params().register.model_name if PARAMS_FILE.is_file() else "fast-goal"
    return f"models:/{name}@{CHAMPION}"


@contextmanager
def registered(name: str) -> Iterator[Versions]:
    """The versions of a registered model. Raises FastGoalError, naming the store, when it cannot be used; TemporaryError
    when it is away."""
    from mlflow.exceptions import MlflowException

    client, _ = connect()
    try:
        yield Versions(name, client)
    except MlflowException as error:
        kind = TemporaryError if error.error_code in AWAY else FastGoalError
        raise kind(f"The registry at {tracking_uri()} failed, asked for the model {name}: {error}") from error


def fetch(uri: str) -> Path:
    """The folder of a model's open_clip files: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a local folder as it is.

    What is registered is downloaded once, to .fast_goal/registry/NAME-VERSION, and held against the version's digest each
    time. Raises ModelError for a model that is not there or whose files are not those that were registered.
    """
    if not uri.startswith("models:"):
        missing = [name for name in MODEL_FILES if not (Path(uri) / name).is_file()]
        if missing:
            raise ModelError(f"{uri}/{missing[0]} does not exist: {uri} is neither a model's folder nor models:/NAME@ALIAS.")
        return Path(uri)
    parts = URI.fullmatch(uri)
    if parts is None:
        raise ModelError(f"{uri!r} names no model: expected models:/NAME@ALIAS, models:/NAME/VERSION or a folder.")
    with registered(parts["name"]) as versions:
        version = versions.named(parts)
    if version is None:
        raise ModelError(
            f"{uri} is not in the registry at {tracking_uri()}. `fast-goal register` makes a version, with the alias "
            "candidate; `fast-goal gate` makes it the champion."
        )
    return download(version)


def download(version: Version) -> Path:
    """As `fetch`, of a version that was looked up."""
    from filelock import FileLock

    folder = FOLDER / f"{version.name}-{version.number}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two processes that want the same version
        if not _is(folder, version.digest):
            with atomic_folder(folder) as temporary:
                _download(version, temporary)
    return folder


def _is(folder: Path, digest: str) -> bool:
    try:
        return model_digest(folder) == digest
    except ModelError:  # not downloaded yet, or not all of it is there
        return False


def _download(version: Version, folder: Path) -> None:
    """Brings the open_clip files of a version into an empty folder. Raises ModelError if they are not what was registered."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())
    whole = folder / "download"
    whole.mkdir()
    try:
        mlflow.artifacts.download_artifacts(artifact_uri=f"{version.uri}/data", dst_path=str(whole))
    # Any error: the artifacts may lie in a store of their own, whose client (boto3, ...) has errors of its own.
    except Exception as error:
        raise ModelError(f"The files of {version.uri} cannot be had from {tracking_uri()}: {error}") from error
    found = sorted(whole.rglob(MODEL_FILES[0]))
    if len(found) != 1:
        raise ModelError(f"{version.uri} at {tracking_uri()} holds {len(found)} files {MODEL_FILES[0]}: expected one.")
    for path in found[0].parent.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(whole)
    seen = model_digest(folder)
    if seen != version.digest:
        raise ModelError(
            f"The files of {version.uri} at {tracking_uri()} have the digest {seen}, but {version.digest} was registered: "
            "they were changed or damaged. Delete that version in MLflow and register the model again."
        )
