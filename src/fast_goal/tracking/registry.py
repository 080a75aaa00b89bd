"""The model registry: a fine-tuned model as a version of an MLflow registered model.

The version holds the open_clip folder, a copy of this package's source, the pinned requirements, a signature and an
input example, so that `mlflow.pyfunc.load_model` needs nothing of the project. A model whose files are already
registered gets no second version: the alias moves to the one there is.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fast_goal.errors import ModelError
from fast_goal.files import tree_digest
from fast_goal.tracking.server import connect, tracking_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking.client import MlflowClient

PACKAGE = Path(__file__).parents[1]
MODEL_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
# what the modules that load and embed import, by their names on the package index
REQUIREMENTS = ("mlflow", "numpy", "open_clip_torch", "pandas", "pillow", "pyyaml", "safetensors", "torch", "torchvision")
DESCRIPTION_LENGTH = 5000  # MLflow's limit


@dataclass(frozen=True)
class Registration:
    """A version in the registry, as written to registration.json."""

    model: str
    version: int
    alias: str
    run_id: str
    digest: str
    uri: str


def model_digest(folder: Path) -> str:
    """What makes two models the same: configuration and weights. Raises ModelError if one of the files is missing."""
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} does not exist. `dvc repro` makes it.")
    return tree_digest(folder, lambda path: path.name in MODEL_FILES)


def register(
    folder: Path, name: str, alias: str, description: str, tags: Mapping[str, Any], run_id: str | None
) -> tuple[Registration, bool]:
    """Registers the model in `folder` and gives it the alias; returns the version and whether it is new.

    The alias moves only after the version has been loaded from the registry and has embedded the input example. Raises
    ModelError when that fails, FastGoalError when the store cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    digest = model_digest(folder)
    client, experiment_id = connect()
    try:
        version = _find(client, name, digest)
        is_new = version is None
        if version is None:
            version = _create(client, experiment_id, folder, name, {**tags, "model_digest": digest}, run_id)
        _check_loads(name, version)
        client.update_model_version(name, version.version, _shorten(description))
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise ModelError(f"{folder} could not be registered as {name} at {tracking_uri()}: {error}") from error
    registration = Registration(
        model=name,
        version=int(version.version),
        alias=alias,
        run_id=version.run_id or "",
        digest=digest,
        uri=f"models:/{name}@{alias}",
    )
    return registration, is_new


def requirements() -> list[str]:
    """The installed versions of what the registered model imports; local parts such as +cpu are no releases."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def input_example() -> pd.DataFrame:
    """A text and a small picture."""
    import pandas as pd
    from PIL import Image

    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    stream = io.BytesIO()
    Image.fromarray(np.stack([red, green, np.full_like(red, 128)], axis=2)).save(stream, "PNG")
    picture = base64.b64encode(stream.getvalue()).decode()
    return pd.DataFrame({"text": ["A red kite flies over a green field.", None], "image": [None, picture]})


def signature() -> ModelSignature:
    """Text and image are optional columns, of any type MLflow can carry: an image may be bytes or base64 text."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "text", required=False), ColSpec(AnyType(), "image", required=False)]),
        outputs=Schema([ColSpec(Array(DataType.double), "embedding")]),
    )


def _find(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' and tags.model_digest = '{digest}'", max_results=100)
    return max(found, key=lambda version: int(version.version), default=None)


def _create(
    client: MlflowClient, experiment_id: str, folder: Path, name: str, tags: Mapping[str, Any], run_id: str | None
) -> ModelVersion:
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    mlflow.set_tracking_uri(tracking_uri())
    mlflow.set_experiment(experiment_id=experiment_id)
    tags = {key: str(value) for key, value in tags.items()}
    logged = Model.log(
        artifact_path=None,
        flavor=mlflow.pyfunc,
        name=name,
        run_id=run_id,
        tags=tags,
        metadata=tags,
        loader_module="fast_goal.tracking.pyfunc",
        data_path=str(folder),
        code_paths=[str(PACKAGE)],
        pip_requirements=requirements(),
        signature=signature(),
        input_example=input_example(),
    )
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(name, logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id)


def _check_loads(name: str, version: ModelVersion) -> None:
    """Loads the version as a user would and embeds the example."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())
    uri = f"models:/{name}/{version.version}"
    try:
        made = mlflow.pyfunc.load_model(uri).predict(input_example())
        lengths = np.linalg.norm(np.array(made["embedding"].tolist(), dtype=np.float64), axis=1)
    # loading runs whatever the stored model brings along
    except Exception as error:
        raise ModelError(
            f"{uri} is registered at {tracking_uri()} but cannot be used: {error}\n"
            "Delete that version in MLflow and run this step again."
        ) from error
    if not np.allclose(lengths, 1, atol=1e-3):
        raise ModelError(f"{uri} gives embeddings of length {lengths.tolist()} instead of 1. Is the training broken (NaN)?")


def _shorten(text: str) -> str:
    note = "\n\n(Shortened; the whole card is the artifact model_card.md of the run.)"
    return text if len(text) <= DESCRIPTION_LENGTH else text[: DESCRIPTION_LENGTH - len(note)] + note
