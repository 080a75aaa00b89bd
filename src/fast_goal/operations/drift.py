"""`fast-goal drift`: data drift against what the champion was trained on, and model drift on a frozen probe set.

Writes models/drift/<time>/{drift.md,*.png,drift.json} (drift.json last), a line of models/drift/history.jsonl, and a snapshot
of the present training set to models/drift/references, which later runs are compared with. The first run draws the probe set,
models/drift/probe.parquet, and keeps a base that was trained here, models/drift/embedder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params, load_params
from fast_goal.environment import device, prepare, share_work, termination_raises
from fast_goal.errors import DataError, ModelError
from fast_goal.files import atomic_folder, digest, tree_digest, write_json, write_text
from fast_goal.monitoring.history import TIME

if TYPE_CHECKING:
    import pandas as pd

    from fast_goal.data.records import Dataset
    from fast_goal.evaluation.features import FeatureStore
    from fast_goal.monitoring.snapshot import Facts, Present, Sample, Snapshot
    from fast_goal.tracking import Tracker
    from fast_goal.tracking.champion import Version

BASE, FLISM, OUTPUT = Path("models/base"), Path("data/flism"), Path("models/drift")
# what decides which detections there are, of the section `flism`
DETECTION = ("regions", "confidence", "iou", "classes", "min_area", "max_detections", "merge_iou", "scaled_decoding")


def run() -> str:
    """Runs it in the current folder (the project's), recorded as an MLflow run; returns what to print.

    Raises DataError without training records, ModelError without the base model, FastGoalError when MLflow is away.
    """
    prepare()
    share_work()
    params = load_params()
    from fast_goal.tracking.runs import step_run

    with termination_raises(), step_run("drift", params) as track:
        return main(params, track, versions(params.register.model_name, params.register.alias))


def versions(name: str, candidate: str) -> dict[str, Version]:
    """The versions of the registered model that are the champion, the previous one or the candidate, where there are any."""
    from fast_goal.tracking.champion import CHAMPION, PREVIOUS, registered

    aliases = {"champion": CHAMPION, "previous": PREVIOUS, "candidate": candidate}
    with registered(name) as known:
        found = {role: known.by_alias(alias) for role, alias in aliases.items()}
    return {role: version for role, version in found.items() if version is not None}


def main(params: Params, track: Tracker, registry: Mapping[str, Version]) -> str:
    """Compares, measures, draws and writes. registry: see `versions`."""
    from fast_goal.data.records import load_dataset
    from fast_goal.monitoring import data, history, report
    from fast_goal.monitoring.snapshot import Present

    time, config = datetime.now(UTC), params.drift
    dataset = load_dataset(params.download.train_dataset)
    if dataset.split("train").empty:
        raise DataError(f"data set {dataset.name!r} has no image in the split 'train': there is nothing to compare.")
    track.params({"drift": vars(config)})
    track.input(dataset, "drift")

    base = _store(BASE / "clip", params)
    regions, detector = _regions(params)
    embedder = _embedder(params, base)
    here = Present(dataset, embedder, regions)
    present = _snapshot(here, dataset, time, embedder, detector, config.samples)
    reference, text = _reference(present, registry.get("champion"))
    samples: dict[data.Rows, Sample] = {"all": present.sample, "new": here.sample(config.samples, reference)}
    tests, left_out = data.compare(reference, samples, present, config)

    past = history.read(OUTPUT / "history.jsonl")
    probe, notes = _probe(params, registry, base, past)
    result = {
        "time": present.facts.time,
        "dataset": dataset.name,
        "digest": dataset.digest,
        "drifted": any(test.drifted for test in tests),
        "reference": {**asdict(reference.facts), "text": text},
        "data": _counts(present, reference),
        "significance": config.significance,
        "tests": [{**asdict(test), "text": test.text} for test in tests],
        "left_out": [asdict(one) for one in left_out],
        "probe": probe,
        "notes": notes,
    }
    line = {key: result[key] for key in ("time", "dataset", "digest", "drifted", "probe")}
    line |= {"reference": reference.facts.digest, "tests": [asdict(test) for test in tests]}

    folder = _folder(time)
    comparable = {what for what in data.WHAT if not data.hindrance(what, reference, present)}
    drawn = _draw({"reference": reference.sample, **samples}, comparable, [*past, line], folder)
    write_text(folder / "drift.md", report.markdown(result, drawn))
    _keep(present)
    history.append(OUTPUT / "history.jsonl", line)
    write_json(folder / "drift.json", result)
    _track(track, result, [folder / file for file in ("drift.json", "drift.md", *drawn)])
    return f"{report.verdict(result)}\nReference: {text}\n{folder / 'drift.md'}"


def _store(folder: Path, params: Params) -> FeatureStore:
    """The features of a model, kept with those of `evaluate`."""
    from fast_goal.evaluation import features
    from fast_goal.model.clip import Clip

    config = params.evaluate
    return features.FeatureStore(features.FOLDER, Clip.load(folder), device(), config.batch_size, config.precision)


def _embedder(params: Params, base: FeatureStore) -> FeatureStore:
    """The model whose embeddings are compared: the base; of bases trained on the data, which change with them, the first."""
    if params.base.kind != "scratch":
        return base
    kept = OUTPUT / "embedder"
    if not kept.exists():
        with atomic_folder(kept) as temporary:
            shutil.copytree(BASE / "clip", temporary, dirs_exist_ok=True)
    return _store(kept, params)


def _regions(params: Params) -> tuple[pd.DataFrame | None, str]:
    """FLISM's table, None where it has not run, and what tells the detector and its settings from others, "" for none."""
    from fast_goal.data.records import REGIONS, read_table

    kind = params.base.detector.kind
    if params.flism.regions == "spatial" or kind == "none" or not params.flism.splits:
        return None, ""
    path, detector = FLISM / params.download.train_dataset / "regions.parquet", BASE / "detector"
    # the boxes of a table are data, which are to be compared, and no detector that changes
    weights = tree_digest(detector) if kind != "table" and detector.is_dir() else kind
    identity = digest([weights, *(getattr(params.flism, name) for name in DETECTION)])
    return (read_table(path, REGIONS) if path.exists() else None), identity


def _snapshot(here: Present, dataset: Dataset, time: datetime, embedder: FeatureStore, detector: str, samples: int) -> Snapshot:
    from fast_goal.model.inference import model_digest
    from fast_goal.monitoring.snapshot import Facts, Snapshot

    model = f"{model_digest(embedder.clip)[:16]} {embedder.precision}"
    facts = Facts(dataset.name, dataset.digest, time.strftime(TIME), model, detector, samples)
    return Snapshot(facts, here.images, here.captions, here.sample(samples))


def _reference(present: Snapshot, champion: Version | None) -> tuple[Snapshot, str]:
    """What to compare with, and where it comes from, in words."""
    from fast_goal.monitoring.snapshot import load_snapshot

    why = "there is no champion yet"
    if champion is not None:
        who = f"on which the champion, version {champion.number}, was trained"
        wanted = champion.tags.get("dataset_digest", "")
        if wanted == present.facts.digest:
            return present, f"the present data themselves, {who} (digest {wanted})."
        if wanted and _path(wanted).exists():
            known = load_snapshot(_path(wanted))
            return known, f"{_named(known.facts)}, {who}."
        why = f"there is no snapshot of the data set {wanted or 'unknown'}, {who}"
    snapshots = [load_snapshot(path) for path in sorted(_path("*").parent.glob("*.npz"))]
    oldest = min(snapshots, key=lambda one: one.facts.time, default=None)
    if oldest is None:
        return present, f"the present data themselves: {why}, and this run is the first; later ones are compared with it."
    if oldest.facts.digest == present.facts.digest:
        return present, f"the present data themselves: {why}, and they are those of the first run."
    return oldest, f"{_named(oldest.facts)}, the oldest there is: {why}."


def _named(facts: Facts) -> str:
    return f"the snapshot of {facts.time} of the data set {facts.dataset} (digest {facts.digest})"


def _path(name: str) -> Path:
    return OUTPUT / "references" / f"{name}.npz"


def _keep(present: Snapshot) -> None:
    """Writes the snapshot, unless there is one that says the same; one that is replaced hands on its time."""
    from fast_goal.monitoring.snapshot import load_snapshot

    path = _path(present.facts.digest)
    if path.exists():
        known = load_snapshot(path)
        present = replace(present, facts=replace(present.facts, time=known.facts.time))
        if present.equals(known):
            return
    present.save(path)


def _counts(present: Snapshot, reference: Snapshot) -> dict[str, int]:
    from fast_goal.monitoring.snapshot import unknown

    return {
        "images": len(present.images),
        "captions": len(present.captions),
        "new_images": unknown(present.images, reference.images),
        "new_captions": unknown(present.captions, reference.captions),
        "gone_images": unknown(reference.images, present.images),
    }


def _probe(
    params: Params, registry: Mapping[str, Version], base: FeatureStore, past: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """What the models make of the probe set, and what there is to be said about it."""
    from fast_goal.data.records import load_dataset
    from fast_goal.monitoring import history, probe

    dataset = load_dataset(params.evaluate.datasets[0])
    pairs, drawn = probe.open_probe(OUTPUT / "probe.parquet", dataset, params.evaluate.split, params.drift.probe)
    stores, numbers, notes = _models(registry, partial(_store, params=params))
    against = "champion" if "champion" in stores else "base"
    measured = probe.measure({**stores, "base": base}, pairs, against)
    for model in measured.keys() & numbers.keys():
        measured[model]["version"] = numbers[model]
    if drawn:
        notes.append(f"The probe set was drawn now, and stays: {OUTPUT / 'probe.parquet'}.")
    notes += [
        f"The {model} measures otherwise on the probe set than before, with the same weights: the machine, a library or the "
        "code has changed."
        for model in history.unsteady(measured, pairs.digest, past)
    ]
    facts = {"dataset": pairs.dataset, "digest": pairs.digest, "drawn": pairs.drawn, "pairs": len(pairs.files)}
    return {**facts, "missing": pairs.missing, "changed": pairs.changed, "against": against, "models": measured}, notes


def _models(
    registry: Mapping[str, Version], load: Callable[[Path], FeatureStore]
) -> tuple[dict[str, FeatureStore], dict[str, int], list[str]]:
    """The registered models that can be had, their version numbers, and what is wrong with the others.

    A version with two aliases, as a candidate that became champion, is measured once, under the first.
    """
    from fast_goal.tracking.champion import download

    stores: dict[str, FeatureStore] = {}
    numbers: dict[str, int] = {}
    wrong = []
    for role, version in registry.items():
        if version.number in numbers.values():
            continue
        try:
            stores[role] = load(download(version))
            numbers[role] = version.number
        except ModelError as error:
            wrong.append(f"The {role} is not measured: {error}")
    return stores, numbers, wrong


def _draw(samples: Mapping[str, Sample], comparable: set[str], lines: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Draws what there is to be drawn and compares with the reference; returns the files, in the order of the report."""
    from fast_goal.monitoring import pictures, report

    drawers: dict[str, Callable[[Path], bool]] = {
        "drift_over_time.png": partial(pictures.draw_drift_over_time, lines),
        "probe_over_time.png": partial(pictures.draw_probe_over_time, lines),
        "map.png": partial(pictures.draw_map, samples if "images" in comparable else {}),
        "lengths.png": partial(pictures.draw_lengths, samples),
        "detections.png": partial(pictures.draw_detections, samples if "detections" in comparable else {}),
    }
    return [file for file in report.PICTURES if drawers[file](folder / file)]


def _track(track: Tracker, result: Mapping[str, Any], files: Sequence[Path]) -> None:
    from fast_goal.evaluation.headline import flatten

    numbers = {
        f"{test['rows']}.{test['what']}.{name}": test[name] for test in result["tests"] for name in ("statistic", "p_adjusted")
    }
    models = {
        model: {key: value for key, value in values.items() if key not in ("digest", "version")}
        for model, values in result["probe"]["models"].items()
    }
    track.metrics({**numbers, **flatten({"probe": models})})
    track.headline({"drifted": float(result["drifted"])})
    track.tags({"drifted": str(result["drifted"]).lower(), "reference": result["reference"]["digest"]})
    for file in files:
        track.artifact(file)


def _folder(time: datetime) -> Path:
    """A new folder for the run; two within one second are told apart by a number."""
    name, count = time.strftime("%Y%m%dT%H%M%SZ"), 1
    while True:
        folder = OUTPUT / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            count += 1
