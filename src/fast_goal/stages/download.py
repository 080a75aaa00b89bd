"""Fetch or generate the data sets named in params.yaml: `dvc repro download`, or `fast-goal download`.

For each of `download.datasets` its source is asked for rows; they become the tables in `data/records/`. The source's
own files are in `data/datasets/<name>/`. Tables and files of data sets that params.yaml no longer names are removed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fast_goal.config import Params, to_dict
from fast_goal.data.records import (
    DATASETS_FOLDER,
    RECORDS_FOLDER,
    SPLITS,
    check_name,
    dataset_files,
    load_dataset,
    remove_dataset,
    write_dataset,
)
from fast_goal.data.sources import Loaded, source_config, source_facts
from fast_goal.files import read_json, write_json
from fast_goal.tracking import Tracker


def main(params: Params, track: Tracker) -> None:
    """Writes data/records/ and data/datasets/. Raises ConfigError before any work for a section that is wrong, and
    DataError for a data set that cannot be used."""
    begin = time.monotonic()
    sections = params.download.datasets
    sources = {}
    for name, values in sections.items():
        check_name(name)
        sources[name] = (*source_config(values, f"download.datasets.{name}"), source_facts(values, f"download.datasets.{name}"))
    RECORDS_FOLDER.mkdir(parents=True, exist_ok=True)
    DATASETS_FOLDER.mkdir(parents=True, exist_ok=True)
    for path in dataset_files():
        if path.stem not in sections:
            remove_dataset(path.stem)
            print(f"download: the data set {path.stem} is no longer in params.yaml; its tables were removed")
        elif read_json(path)["source"] != sections[path.stem]["source"]:
            remove_dataset(path.stem)  # the files of one source are nothing to another
    for folder in DATASETS_FOLDER.iterdir():  # DVC empties data/records before this step, and keeps what was unpacked
        hidden = folder.name.startswith(".")  # being unpacked, perhaps by another process
        if folder.name not in sections and not hidden and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)

    metrics: dict[str, Any] = {}
    for name, (load, config, published_facts) in sources.items():
        loaded = load(config, name, DATASETS_FOLDER / name)
        write_dataset(
            name,
            loaded.root,
            loaded.rows,
            loaded.skipped,
            loaded.truth,
            loaded.objects,
            loaded.hashes,
            loaded.choices,
            loaded.labels,
            loaded.masks,
            classes=loaded.classes,
            segments=loaded.segments,
            source=sections[name]["source"],
            published=loaded.published,
            facts=to_dict(published_facts) if published_facts else None,
        )
        metrics[name] = facts(loaded)
        print(summary(name, loaded, metrics[name]))
        track.input(load_dataset(name))
        track.metrics({f"{name}.{key}": float(value) for key, value in metrics[name].items() if not isinstance(value, Mapping)})
    path = RECORDS_FOLDER / "metrics.json"
    write_json(path, {"datasets": metrics, "seconds": round(time.monotonic() - begin, 1)})
    track.artifact(path)


def facts(loaded: Loaded) -> dict[str, Any]:
    """Counts of a data set: images, per split, skipped rows, images lost (skipped_images), words of the captions."""
    kept = {row["image_id"] for row in loaded.rows}
    long_words = [len(row["long_caption"].split()) for row in loaded.rows if row["long_caption"]]
    short_words = [len(caption.split()) for row in loaded.rows for caption in row["captions"]]
    reasons: dict[str, int] = {}
    for row in loaded.skipped:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    return {
        "images": len(loaded.rows),
        **{split: sum(row["split"] == split for row in loaded.rows) for split in SPLITS},
        "short_captions": len(short_words),
        "mean_words_long": round(sum(long_words) / len(long_words), 2) if long_words else 0.0,
        "mean_words_short": round(sum(short_words) / len(short_words), 2) if short_words else 0.0,
        "skipped": len(loaded.skipped),
        "skipped_images": len({row["sample"] for row in loaded.skipped} - kept - {""}),
        "skipped_by_reason": dict(sorted(reasons.items())),
    }


def summary(name: str, loaded: Loaded, numbers: Mapping[str, Any], examples: int = 3) -> str:
    """What a reader of the log needs: sizes, and every reason for skipping with its first examples."""
    splits = ", ".join(f"{split} {numbers[split]:,}" for split in SPLITS if numbers[split])
    lines = [
        f"download: {name}: {numbers['images']:,} images ({splits}); words per long caption {numbers['mean_words_long']:g}, "
        f"{numbers['short_captions']:,} short captions of {numbers['mean_words_short']:g} words"
    ]
    lines += [f"  note: {note}" for note in loaded.notes]
    if loaded.skipped:
        lines.append(f"  skipped: {len(loaded.skipped):,} rows ({RECORDS_FOLDER / f'{name}_skipped.parquet'})")
    for reason, count in numbers["skipped_by_reason"].items():
        lines.append(f"    {reason}: {count:,}")
        shown = [row for row in loaded.skipped if row["reason"] == reason][:examples]
        lines += [f"      {_example(row)}" for row in shown]
    return "\n".join(lines)


def _example(row: Mapping[str, Any]) -> str:
    parts: Sequence[str] = (row["sample"], f"row {row['row']}" if row["row"] >= 0 else "", row["detail"])
    return "  ".join(part for part in parts if part)
