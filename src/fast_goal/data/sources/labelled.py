"""The data sources `labelled` and `torchvision`: images with classes, for zero-shot classification.

`labelled`: a folder of images for each class, as ImageNet has them (`val/n01440764/ILSVRC2012_val_00000293.JPEG`).
`torchvision`: any data set of `torchvision.datasets` that yields an image and the number of its class.

The set of classes has the data set's name; `data.prompts` has the published templates of their captions.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_goal.data import prompts
from fast_goal.data.fetch import ManualStep, downloads_folder
from fast_goal.data.images import SUFFIXES
from fast_goal.data.samples import Sample, Skipped, draw, look, storable, unique
from fast_goal.data.sources import Loaded, source
from fast_goal.data.sources.folder import image_files
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import atomic_path, digest, write_json
from fast_goal.progress import Progress

OURS = ("root", "loader", "download", "transform", "transforms", "target_transform")  # of a constructor's arguments


@dataclass(frozen=True)
class LabelledConfig(prompts.PromptedConfig):
    """root: the folder that holds one for each class; where there is none of this path, one below the downloads folder.
    steps: what a person has to do where it is not there. names: a file beside the folders that has their names in words (JSON,
    or lines of folder, blank, name), `imagenet`, or null: the folder's own name."""

    root: str
    steps: list[str]
    names: str | None


@dataclass(frozen=True)
class TorchvisionConfig(prompts.PromptedConfig):
    """dataset: a class of `torchvision.datasets`. root: its folder; null: `torchvision` in the downloads folder. arguments: of
    its constructor, such as `split: test`. download: whether torchvision may fetch it. names: of the classes, in their order;
    null: the data set's own."""

    dataset: str
    root: str | None
    arguments: dict[str, Any]
    download: bool
    names: list[str] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if ours := sorted(set(self.arguments).intersection(OURS)):
            raise ConfigError(f"arguments = {self.arguments}: {ours} are set by the other keys")


@source("labelled", LabelledConfig)
def load(config: LabelledConfig, name: str, folder: Path) -> Loaded:
    """Looks at every image; its class is the folder it is in, at any depth. A file that is no image is no row of `skipped`.

    Raises ManualStep where the folder is not there and `steps` say how to get it, DataError where it is not or has no
    classes, or the names do not fit them.
    """
    where = f"download.datasets.{name}"
    root = _root(config, where)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root} holds no folders: expected one for each class; correct {where}.root")
    names = _names(config, root, folders, where)
    samples, label_of, notes = [], {}, []
    for place in folders:
        paths = image_files(root, place)
        if not paths:
            notes.append(f"the class {place} has no image ({', '.join(sorted(SUFFIXES))})")
        for path in paths:
            image_id = str(Path(path).with_suffix(""))
            samples.append(Sample(image_id, path, config.split, row=len(samples) + 1))
            label_of[path] = names[place]
    classes = [names[place] for place in folders]
    skipped = Skipped()
    return _finish(config, name, folder, root, unique(samples, skipped), label_of, classes, skipped, notes)


@source("torchvision", TorchvisionConfig)
def load_torchvision(config: TorchvisionConfig, name: str, folder: Path) -> Loaded:
    """Opens the data set and looks at every image. One that lets its files be named is read where it is; the images of
    another are written to `folder` as PNG files.

    A sample without an image or with a class that has no name is a row of `skipped`, numbered by its place from 1. Raises
    ConfigError for what torchvision does not know, DataError where it does not find the data set.
    """
    where = f"download.datasets.{name}"
    root = downloads_folder() / "torchvision" if config.root is None else Path(config.root)
    data, by_path = _open(config, root, where)
    names = _torchvision_names(config, data, where)
    home = root.absolute() if by_path else folder
    skipped, label_of, samples = Skipped(), {}, []
    images = f"images-{digest([config.dataset, config.arguments], 8)}"  # those of another split may lie beside them
    for index, image, label in _items(data, f"download {name}", skipped):
        path = Path(image).absolute() if by_path else home / images / f"{index:06d}.png"
        if not isinstance(label, int) or not 0 <= label < len(names):
            skipped.note(path.stem, index + 1, "no class of that number", f"{label!r} of {len(names)} classes")
            continue
        if by_path and not path.is_relative_to(home):
            skipped.note(path.stem, index + 1, "path outside the data root", str(path))
            continue
        if not by_path:
            _write(image, path)
        relative = path.relative_to(home)
        samples.append(Sample(str(relative.with_suffix("")), relative.as_posix(), config.split, row=index + 1))
        label_of[relative.as_posix()] = names[label]
    if by_path:  # some list their files as the disk does
        samples.sort(key=lambda sample: sample.image_path)
    return _finish(config, name, folder, home, unique(samples, skipped), label_of, names, skipped, [])


def _finish(
    config: LabelledConfig | TorchvisionConfig,
    name: str,
    folder: Path,
    root: Path,
    samples: Sequence[Sample],
    label_of: dict[str, str],
    classes: list[str],
    skipped: Skipped,
    notes: list[str],
) -> Loaded:
    """Draws the images, looks at them, and makes the tables; `label_of` has the class by the image's path."""
    count = len(samples)
    if config.images is not None and config.images < count:
        drawn = sorted(samples, key=lambda sample: (draw(sample.image_id, config.seed), sample.image_id))[: config.images]
        chosen = {sample.image_id for sample in drawn}
        samples = [sample for sample in samples if sample.image_id in chosen]
        notes = [*notes, f"{len(samples):,} of {count:,} images were drawn, as download.datasets.{name}.images says"]
    section = "torchvision" if isinstance(config, TorchvisionConfig) else "labelled"
    rows, hashes = look(samples, root, section, f"download {name}", skipped)
    if not rows:
        raise DataError(f"download.datasets.{name}: none of the {len(samples):,} images below {root} can be used")
    labels = [
        {
            "image_id": row["image_id"],
            **{"x1": 0.0, "y1": 0.0, "x2": float(row["width"]), "y2": float(row["height"])},
            "suite": name,
            "label": label_of[row["image_path"]],
        }
        for row in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "SOURCE.json", {"source": section, "root": str(root)})
    return Loaded(
        root,
        rows,
        list(skipped),
        notes=notes,
        hashes=hashes,
        published={config.split: count},
        labels=labels,
        classes={name: {"names": classes, "templates": prompts.templates(config.templates)}},
    )


def _root(config: LabelledConfig, where: str) -> Path:
    for root in (Path(config.root).expanduser(), downloads_folder() / config.root):
        if root.is_dir():
            return root
    if config.steps:
        raise ManualStep(f"The folder {config.root}", config.steps, downloads_folder() / config.root)
    raise DataError(f"{where}: the folder {config.root} does not exist, nor below {downloads_folder()}; set {where}.root")


def _names(config: LabelledConfig, root: Path, folders: list[str], where: str) -> dict[str, str]:
    """The name of the class of each folder. Raises DataError where one has none, or two have the same."""
    if config.names is None:
        names = {folder: prompts.readable(folder) for folder in folders}
    elif config.names == "imagenet":
        known = prompts.imagenet_names()
        if len(folders) != len(known):
            raise DataError(
                f"{root} has {len(folders):,} folders, ImageNet {len(known):,} classes; for a part of them set {where}.names "
                "to a file of folders and names"
            )
        names = dict(zip(folders, known, strict=True))
    else:
        names = _named(root, config.names, where)
        if missing := [folder for folder in folders if folder not in names]:
            raise DataError(f"{where}.names: {config.names} has no name for {len(missing)} folders of {root}: {missing[:5]}")
    names = {folder: storable(names[folder]) for folder in folders}
    first: dict[str, str] = {}
    for folder in folders:
        if not names[folder].strip():
            raise DataError(f"{where}: the class {folder} has an empty name")
        other = first.setdefault(names[folder], folder)
        if other != folder:
            raise DataError(
                f"{where}: the classes {other} and {folder} are both called {names[folder]!r}: no image could be told to be of "
                f"one of them. Give them names of their own in a file, {where}.names"
            )
    return names


def _named(root: Path, file: str, where: str) -> dict[str, str]:
    """Reads folder and name from a JSON object, or from lines in which they stand with a blank between; of several names
    with commas between, as ImageNet's LOC_synset_mapping.txt has them, the first."""
    path = next((path for path in (Path(file).expanduser(), root / file, root.parent / file) if path.is_file()), None)
    if path is None:
        raise DataError(f"{where}.names = {file!r}: there is no such file, here, in {root} or beside it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix.lower() != ".json":
            lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
            return {folder: rest.partition(",")[0].strip() for folder, rest in lines}
        names = json.loads(text)
        if isinstance(names, dict) and all(isinstance(value, str) for value in names.values()):
            return names
    except ValueError as error:
        raise DataError(f"{path} cannot be understood: expected folder, blank, name in every line ({error})") from None
    raise DataError(f'{path}: expected an object of folder: name, such as {{"n01440764": "tench"}}')


def _open(config: TorchvisionConfig, root: Path, where: str) -> tuple[Any, bool]:
    """The data set, and whether it yields paths in place of images. Raises ConfigError and DataError as the caller."""
    from fast_goal.environment import prepare

    prepare()
    from torchvision import datasets

    kind = getattr(datasets, config.dataset, None)
    if config.dataset not in datasets.__all__ or not inspect.isclass(kind):
        close = difflib.get_close_matches(config.dataset, datasets.__all__, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{where}.dataset = {config.dataset!r}: torchvision.datasets has no such class.{hint}")
    parameters = inspect.signature(kind).parameters
    arguments = {"root": str(root)} if "root" in parameters else {}
    arguments |= config.arguments
    if "download" in parameters:
        arguments["download"] = config.download
    elif config.download:
        raise ConfigError(f"{where}.download = true: torchvision does not fetch {config.dataset}; its documentation says how")
    # a class without `loader` that hands on what it does not know (ImageNet) takes that of the class below it
    by_path = "loader" in parameters or any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    if by_path:
        arguments["loader"] = str
    try:
        return kind(**arguments), by_path
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.arguments = {config.arguments}: {config.dataset} refuses them: {error}") from None
    except (RuntimeError, OSError, ImportError) as error:
        fix = f"set {where}.download=true" if "download" in parameters else "see torchvision's documentation"
        raise DataError(
            f"{where}: torchvision finds no {config.dataset} in {root} ({error}). Put it there, or {fix}; {where}.root names "
            "another folder."
        ) from None


def _torchvision_names(config: TorchvisionConfig, data: Any, where: str) -> list[str]:
    found = getattr(data, "classes", None) or getattr(data, "categories", None)
    known = [entry if isinstance(entry, str) else entry[0] for entry in found] if found else None
    names = config.names if config.names is not None else known and [prompts.readable(name) for name in known]
    if not names:
        raise ConfigError(f"{where}.names = null: {config.dataset} does not name its classes; give them, in their order")
    if known is not None and len(names) != len(known):
        raise ConfigError(f"{where}.names: {len(names)} names for the {len(known)} classes of {config.dataset}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{where}.names: {twice} stand twice: no image could be told to be of one of them; give all in `names`"
        )
    return list(names)


def _items(data: Any, label: str, skipped: Skipped) -> Iterator[tuple[int, Any, Any]]:
    """Number, image and class of each sample; one that torchvision cannot read is noted."""
    with Progress(label, len(data), "samples") as progress:
        for index in range(len(data)):
            progress.update()
            try:
                image, target = data[index][:2]
            except (OSError, ValueError, SyntaxError) as error:
                skipped.note("", index + 1, "unreadable sample", str(error))
                continue
            yield index, image, int(target) if hasattr(target, "__index__") else target


def _write(image: Any, path: Path) -> None:
    """As PNG, which loses nothing; one that is there already is the same."""
    if path.is_file():
        return
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")
