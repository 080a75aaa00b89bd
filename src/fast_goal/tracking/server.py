"""Where the runs are kept: an SQLite file of the project by default, or the server MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from fast_goal.environment import prepare
from fast_goal.errors import FastGoalError, TemporaryError

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

EXPERIMENT = "fast-goal"
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # which pages MLflow shows: those of training, not of language models
    "mlflow.note.content": "Pipelines of FAST-GOAL: a run for each, and below it one for each step that ran. The menu *Views* "
    "has charts that compare them; `fast-goal compare RUN RUN` prints in what two differ.",
}
REACH_SECONDS = 12  # to wait for a server's first answer


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the current folder (the project's), with artifacts in mlruns/ beside it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def connect() -> tuple[MlflowClient, str]:
    """The MLflow client and the id of the experiment, which is made when missing.

    Raises FastGoalError, naming MLFLOW_TRACKING_URI and within seconds, when the store cannot be used.
    """
    prepare()  # MLflow reads its telemetry switch when it is imported
    # MLflow's own 120 s and 7 retries would hold up the work for a quarter of an hour; what fails is retried by the
    # tracker in the background.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # the client alone: `import mlflow` takes a second longer
    from mlflow.exceptions import MlflowException
    from mlflow.tracking.client import MlflowClient
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    uri = tracking_uri()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    try:
        _reach(uri)
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(name)
        experiment_id = _create_experiment(client, name) if experiment is None else experiment.experiment_id
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        away = isinstance(error, OSError | OperationalError)  # what requests raises is an OSError, too
        raise (TemporaryError if away else FastGoalError)(
            f"The MLflow store MLFLOW_TRACKING_URI = {uri} cannot be used: {reason}\n"
            "Start the server or correct the variable; without it, runs are kept in the project's own mlflow.db. "
            "A damaged or outdated mlflow.db can be moved away: a new one is made."
        ) from None
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise FastGoalError(
            f"The MLflow experiment {name!r} was deleted. Bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment_id}`, or set MLFLOW_EXPERIMENT_NAME to another name."
        )
    return client, experiment_id


def quoted(text: str) -> str:
    """A text as a literal of MLflow's search expressions, which know no escapes. Raises FastGoalError for both quotes in it."""
    if "'" not in text:
        return f"'{text}'"
    if '"' not in text:
        return f'"{text}"'
    raise FastGoalError(f"MLflow cannot search for {text!r}, which has both kinds of quotes.")


def _create_experiment(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(name, tags=EXPERIMENT_TAGS)
    except MlflowException:
        made = client.get_experiment_by_name(name)  # by another process since we looked
        if made is None:
            raise
        return made.experiment_id


def _reach(uri: str) -> None:
    """Asks once, without MLflow's retries, whether anything answers. Raises OSError or SQLAlchemyError."""
    if uri.startswith(("http://", "https://")):
        import requests

        # any answer will do; what it says is MLflow's to judge
        requests.get(f"{uri.rstrip('/')}/health", timeout=(5, REACH_SECONDS))
    elif uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        _reach_database(uri)


def _reach_database(uri: str) -> None:
    import sqlalchemy

    errors: list[Exception] = []

    def ask() -> None:
        engine = sqlalchemy.create_engine(uri)
        try:
            sqlalchemy.inspect(engine).get_table_names()
        except (sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            errors.append(error)
        finally:
            engine.dispose()

    # in a thread, because each database driver has its own idea of a time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {REACH_SECONDS} s")
    if errors:
        raise errors[0]
