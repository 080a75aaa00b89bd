"""The run of a whole pipeline: how it is named and described, how the steps find it again, and what lies with it.

It is named `<base model>_<objective>-<data>-<commit>`, or as DVC's experiment; a step that is run by hand has a run above it
too, with the step's name at the end. What belongs to all steps lies with it:
params.yaml, dvc.lock as the latest step found it, and the installed packages as requirements.txt.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fast_goal.config import Params
from fast_goal.tracking import identity

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

OBJECTIVES = Path(__file__).parents[1] / "conf" / "objective"


def run_name(params: Params, commit: str) -> str:
    """`ViT-B-16_fast_goal-docci-1a2b3c4`; DVC's name where the pipeline is one of its experiments."""
    if experiment := identity.dvc_experiment():
        return experiment
    # `hf-hub:owner/name` and `local-dir:some/folder` come down to their last word
    model = re.split(r"[:/]", params.base.model.rstrip("/"))[-1]
    return f"{model}_{objective_word(params.objective)}-{params.download.train_dataset}-{commit[:7]}"


def objective_word(objective: Mapping[str, Any]) -> str:
    """The option of the configuration group that this objective is (`global` is `fast_goal` with one weight), or its name."""
    for path in sorted(OBJECTIVES.glob("*.yaml")):
        if yaml.safe_load(path.read_text(encoding="utf-8")) == dict(objective):
            return path.stem
    return str(objective.get("name"))


def source_tags(source: str, commit: str, dirty: bool) -> dict[str, str]:
    """The tags from which MLflow fills its columns User, Source and Version."""
    from mlflow.utils import mlflow_tags as names

    tags = {names.MLFLOW_USER: user(), names.MLFLOW_SOURCE_NAME: source, names.MLFLOW_SOURCE_TYPE: "LOCAL"}
    if commit != "none":
        tags |= {names.MLFLOW_GIT_COMMIT: commit, names.MLFLOW_GIT_DIRTY: str(dirty).lower()}
    return tags


def user() -> str:
    """Who runs this, `unknown` in a container whose user has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # ImportError: no pwd module
        return "unknown"


def note(params: Params) -> str:
    """A few lines of Markdown on what the pipeline does, for MLflow's description of the run."""
    base, training = params.base, params.finetune
    origin = (
        "a small CLIP trained from scratch" if base.kind == "scratch" else f"{base.model} ({base.pretrained or 'no weights'})"
    )
    first = f", after a first stage on `{params.intermediate.dataset}`" if params.intermediate.dataset else ""
    measured = ", ".join(f"`{name}`" for name in params.evaluate.datasets)
    return (
        f"Fine-tunes {origin} with the objective `{objective_word(params.objective)}` on `{params.download.train_dataset}`"
        f"{first}: {training.epochs} epochs, batch {training.batch_size}, learning rate {training.learning_rate:g}, "
        f"seed {params.seed}. "
        f"Measured on {measured}, split `{params.evaluate.split}`.\n\n"
        "The steps are the runs below this one. The report is the artifact `report.html` of `evaluate`, the model card "
        "`model_card.md` of `register`."
    )


def installed() -> str:
    """The installed packages as a requirements file; a comment names the Python and the system."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]}
    lines = [f"{name}=={version}" for name, version in sorted(found.items(), key=lambda pair: pair[0].lower())]
    return "\n".join([f"# Python {platform.python_version()} on {platform.platform()}", *lines, ""])


def open_run(client: MlflowClient, experiment_id: str, tags: dict[str, str], name: str, note: str) -> tuple[str, bool]:
    """The run of the pipeline that `tags` names: (run id, whether it is new).

    A run found again is set to RUNNING and to what this step knows; its description stays, somebody may have written there.
    """
    from mlflow.entities import RunTag
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

    pipeline = tags["fast_goal.pipeline_id"]
    found = client.search_runs(
        [experiment_id],
        f"tags.`fast_goal.pipeline_id` = '{pipeline}' and tags.`fast_goal.role` = 'pipeline'",
        max_results=1,
    )
    if not found:
        above = identity.parent_run()
        more = {MLFLOW_PARENT_RUN_ID: above} if above else {}
        tags = {**tags, **more, MLFLOW_RUN_NOTE: note, "fast_goal.role": "pipeline"}
        return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id, True
    run_id = found[0].info.run_id
    client.update_run(run_id, status="RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return run_id, False


def close_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """Marks as KILLED the runs of this machine whose process is gone: a kill -9 leaves them RUNNING."""
    running = client.search_runs(
        [experiment_id], f"attributes.status = 'RUNNING' and tags.`fast_goal.host` = '{identity.host()}'", max_results=100
    )
    for run in running:
        if not identity.is_alive(run.data.tags.get("fast_goal.process", "")):
            client.set_terminated(run.info.run_id, "KILLED")
