"""The model registry: a fine-tuned model as a version of an MLflow registered model.

The version holds the open_clip folder, a copy of this package's source, the pinned requirements, a signature and an
input example, so that `mlflow.pyfunc.load_model` needs nothing of the project. A model whose files are already
registered gets no second version: the alias moves to the one there is.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fast_goal.errors import ModelError
from fast_goal.evaluation.headline import MODES
from fast_goal.files import tree_digest
from fast_goal.tracking.pyfunc import COLUMNS, OUTPUTS, TOP_K
from fast_goal.tracking.server import connect, tracking_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature
    from mlflow.tracking.client import MlflowClient

PACKAGE = Path(__file__).parents[1]
MODEL_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
POOLING_FILE = "pooling.safetensors"  # beside them, of a model with text-conditioned pooling
# what the modules that load and embed import, by their names on the package index
REQUIREMENTS = ("mlflow", "numpy", "open_clip_torch", "pandas", "pillow", "pyyaml", "safetensors", "torch", "torchvision")
LOGGED_MODEL = re.compile(r"models:/(?P<id>m-[^/]+)")  # the source of a version
DESCRIPTION_LENGTH = 5000  # MLflow's limit
MODEL_TAGS = {"task": "image-text retrieval", "framework": "open_clip", "flavour": "pyfunc"}
MODEL_DESCRIPTION = """CLIP fine-tuned so that it understands long, detailed descriptions: embeds images and texts into one \
space, for search and ranking.

Every version has its model card as description, and what it reached among the metrics of its logged model. Aliases: \
`candidate` is the version registered last, `champion` the one that passed the gate and is in use, `previous` the one in use \
before it.

```python
model = mlflow.pyfunc.load_model("models:/{name}@champion")
model.predict(pandas.DataFrame({{"text": ["A red kite flies over a green field."]}}))["embedding"]
```
"""


@dataclass(frozen=True)
class Registration:
    """A version in the registry, as written to registration.json."""

    model: str
    version: int
    alias: str
    run_id: str
    digest: str
    uri: str


@dataclass(frozen=True)
class Measured:
    """What a model reached on one data set: `values` by name, in percent."""

    dataset: str
    digest: str
    values: Mapping[str, float]


def model_digest(folder: Path) -> str:
    """What makes two models the same: configuration and weights, those of a pooling too. Raises ModelError if one of the files
    is missing."""
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} does not exist. `dvc repro` makes it.")
    return tree_digest(folder, lambda path: path.name in (*MODEL_FILES, POOLING_FILE))


def pooling_heads(folder: Path) -> int | None:
    """The number of heads of a model's text-conditioned pooling, None where it has none."""
    from safetensors import safe_open

    if not (folder / POOLING_FILE).is_file():
        return None
    with safe_open(folder / POOLING_FILE, framework="numpy") as stored:
        return int(stored.metadata()["heads"])


def register(
    folder: Path,
    name: str,
    alias: str,
    description: str,
    tags: Mapping[str, Any],
    run_id: str | None,
    measured: Sequence[Measured] = (),
) -> tuple[Registration, bool]:
    """Registers the model in `folder` and gives it the alias; returns the version and whether it is new.

    `measured` is shown with the version and on the run, where there is one; MLflow has no metrics of a model alone.
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
        _check_loads(name, version, (folder / POOLING_FILE).is_file())
        client.update_model_version(name, version.version, _shorten(description))
        logged = LOGGED_MODEL.fullmatch(version.source or "")
        if run_id is not None and logged is not None:
            _link(client, logged["id"], run_id, measured)
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
    """All columns are optional and of any type MLflow can carry: an image may be bytes or base64 text. Which columns come out
    depends on the parameter `output`: `embedding`, or for `scores` the others. `mode` says how images and texts are compared,
    and `top_k` how many of them again for `rerank`; a model without text-conditioned pooling has the mode `global` alone."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    outputs = {
        "embedding": Array(DataType.double),
        "row": DataType.long,
        "text_rows": Array(DataType.long),
        "scores": Array(DataType.double),
    }
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), name, required=False) for name in COLUMNS]),
        outputs=Schema([ColSpec(kind, name, required=False) for name, kind in outputs.items()]),
        params=ParamSchema(
            [
                ParamSpec("output", DataType.string, OUTPUTS[0]),
                ParamSpec("mode", DataType.string, MODES[0]),
                ParamSpec("top_k", DataType.long, TOP_K),
            ]
        ),
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
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

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
        client.create_registered_model(name, tags=MODEL_TAGS, description=MODEL_DESCRIPTION.format(name=name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(name, logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id)
    # by which the page of the logged model and those of its runs know that it is registered
    named = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: named})
    return version


def _link(client: MlflowClient, model_id: str, run_id: str, measured: Sequence[Measured]) -> None:
    """Shows the metrics with the model, they stand on the run as well, and the model with the pipeline's run."""
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    now = int(time.time() * 1000)
    about = [
        Metric(name, value, now, 0, model_id=model_id, dataset_name=one.dataset, dataset_digest=one.digest, run_id=run_id)
        for one in measured
        for name, value in one.values.items()
    ]
    client.log_batch(run_id, metrics=about)
    above = client.get_run(run_id).data.tags.get(MLFLOW_PARENT_RUN_ID)
    if above is not None:
        outputs = client.get_run(above).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:  # twice is an error
            client.log_outputs(above, [LoggedModelOutput(model_id, step=0)])


def _check_loads(name: str, version: ModelVersion, pooled: bool) -> None:
    """Loads the version as a user would and embeds the example, and compares what is in it by the pooling if there is one."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())
    uri = f"models:/{name}/{version.version}"
    try:
        model = mlflow.pyfunc.load_model(uri)
        lengths = np.linalg.norm(np.array(model.predict(input_example())["embedding"].tolist(), dtype=np.float64), axis=1)
        mode = {"mode": "conditioned"} if pooled else {}
        scores = model.predict(input_example(), {"output": "scores", **mode})["scores"].tolist()
    # loading runs whatever the stored model brings along
    except Exception as error:
        raise ModelError(
            f"{uri} is registered at {tracking_uri()} but cannot be used: {error}\n"
            "Delete that version in MLflow and run this step again."
        ) from error
    if not np.allclose(lengths, 1, atol=1e-3):
        raise ModelError(f"{uri} gives embeddings of length {lengths.tolist()} instead of 1. Is the training broken (NaN)?")
    if not np.isfinite(scores).all():
        raise ModelError(f"{uri} gives the scores {scores}{' in the mode conditioned' * pooled}. Is the training broken (NaN)?")


def _shorten(text: str) -> str:
    note = "\n\n(Shortened; the whole card is the artifact model_card.md of the run.)"
    return text if len(text) <= DESCRIPTION_LENGTH else text[: DESCRIPTION_LENGTH - len(note)] + note
