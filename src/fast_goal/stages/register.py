"""The step `register`: the fine-tuned model as a version in the MLflow registry, with its model card.

    dvc repro register        (or `fast-goal register` by hand)

Reads models/finetune and models/reports; writes models/register/{registration.json, model_card.md}.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fast_goal.config import Params
from fast_goal.errors import DataError
from fast_goal.files import read_json, write_json, write_text
from fast_goal.tracking import Tracker

MODEL = Path("models/finetune")
REPORT = Path("models/reports/metrics.json")
RECORDS = Path("data/records")
OUTPUT = Path("models/register")


def main(params: Params, track: Tracker) -> None:
    """Registers models/finetune under `register.model_name` and moves `register.alias` to it.

    Raises ModelError when there is no fine-tuned model or the registered one cannot be loaded back, DataError when the
    report or the data sets' descriptions are missing.
    """
    from fast_goal.evaluation.headline import headline
    from fast_goal.tracking import identity
    from fast_goal.tracking.model_card import model_card
    from fast_goal.tracking.registry import Measured, model_digest, pooling_heads, register

    digest = model_digest(MODEL)
    metrics = _read(REPORT, "evaluate")
    names = dict.fromkeys([*params.training_datasets, *params.evaluate.datasets])
    datasets = [_read(RECORDS / f"{name}.json", "download") for name in names]
    tags = {
        "git_commit": identity.git_commit(),
        "dvc_lock": identity.dvc_lock(),
        "dataset": params.download.train_dataset,
        "dataset_digest": datasets[0]["digest"],
        "experiment": params.experiment,
        "objective": str(params.objective.get("name")),
    }
    if params.intermediate.dataset is not None:
        tags["intermediate_dataset"] = params.intermediate.dataset
    card = model_card(params, datasets, metrics, {**tags, "model_digest": digest}, pooling_heads(MODEL))
    digests = {info["name"]: info["digest"] for info in datasets}
    measured = [Measured(name, digests[name], headline({name: metrics[name]})) for name in params.evaluate.datasets]
    registration, is_new = register(
        MODEL, params.register.model_name, params.register.alias, card, tags, track.run_id, measured
    )

    write_text(OUTPUT / "model_card.md", card)
    write_json(OUTPUT / "registration.json", asdict(registration))
    track.tags({**tags, "model_digest": digest, "model_version": registration.version})
    track.artifact(OUTPUT / "model_card.md")
    was = "registered" if is_new else "was registered before"
    print(f"{MODEL} {was} as version {registration.version} of {registration.model}; load it as {registration.uri}")


def _read(path: Path, step: str) -> dict:
    if not path.is_file():
        raise DataError(f"{path} does not exist. The step `{step}` writes it: `dvc repro {step}`.")
    return read_json(path)
