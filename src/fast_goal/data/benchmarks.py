"""What the sources of benchmarks of true and false captions share: files that may have to be brought by hand, the check of a
case, and the rows of the table of choices.

A case is a caption and its foils about an image or a box of it. Boxes are float pixels of the original image, x2 and y2
exclusive; they are clipped to the image.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_goal.data.archives import unpack
from fast_goal.data.fetch import ManualStep, Remote, downloads_folder, fetch_all, require_manual
from fast_goal.data.samples import Sample, Skipped, look, storable
from fast_goal.data.sources import Loaded
from fast_goal.data.sources.karpathy import ManualArchive
from fast_goal.errors import ConfigError, DataError
from fast_goal.files import digest

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Origin:
    """Where a file comes from: fetched from `remote`, or brought by a person as `manual` says; one of the two is null."""

    remote: Remote | None
    manual: ManualArchive | None

    def __post_init__(self) -> None:
        if (self.remote is None) == (self.manual is None):
            raise ConfigError("remote and manual: expected one of them, and the other null")


def bring(origins: Sequence[Origin]) -> list[Path]:
    """The files, in the order of `origins`. Raises ManualStep, before anything is fetched, that names all that a person has
    to bring; else as `fetch_all`."""
    found: dict[int, Path] = {}
    missing: list[tuple[ManualArchive, ManualStep]] = []
    for number, origin in enumerate(origins):
        if origin.manual is not None:
            try:
                found[number] = require_manual(origin.manual.file, origin.manual.steps)
            except ManualStep as error:
                missing.append((origin.manual, error))
    if len(missing) == 1:
        raise missing[0][1]
    if missing:
        folder = downloads_folder().absolute()
        steps = [" ".join([*wanted.steps, f"Put it at {folder / wanted.file}."]) for wanted, _ in missing]
        raise ManualStep(", ".join(posixpath.basename(wanted.file) for wanted, _ in missing), steps)
    remotes = {number: origin.remote for number, origin in enumerate(origins) if origin.remote is not None}
    found |= dict(zip(remotes, fetch_all(list(remotes.values())), strict=True))
    return [found[number] for number in range(len(origins))]


def read_cases(path: Path, kind: type, expected: str) -> Any:
    """The value of a JSON file. Raises DataError where it is no JSON, or no `kind`; `expected` says what it should be."""
    try:
        content = json.loads(path.read_bytes())  # bytes: with or without a byte-order mark
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}. Delete it and run the step again.") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: expected {expected}, found {type(content).__name__}")
    return content


def unpack_named(archive: Path, folder: Path, files: set[str]) -> None:
    """Unpacks the named files to `folder`, without the folder that they have in the archive."""
    unpack(
        archive,
        folder,
        strip=1,
        select=lambda member: posixpath.basename(member) in files,
        asked=digest(sorted(files)),  # another release of the cases may name others
    )


@dataclass(frozen=True)
class _Case:
    image_id: str
    suite: str
    group: str
    caption: str
    foils: list[str]
    row: int
    box: Box | None


@dataclass
class Cases:
    """Gathers the cases of a benchmark, and in the end looks at their images. What cannot be used is in `skipped`."""

    skipped: Skipped = field(default_factory=Skipped)
    _samples: dict[str, Sample] = field(default_factory=dict)
    _cases: list[_Case] = field(default_factory=list)
    _clipped: int = 0

    def files(self, folder: str) -> set[str]:
        """The names of the images that lie in `folder`, as it was given to `add`."""
        paths = [posixpath.split(sample.image_path) for sample in self._samples.values()]
        return {file for place, file in paths if place == folder}

    def add(
        self,
        file: Any,
        place: str | Callable[[str], str | None],
        suite: str,
        group: str,
        caption: Any,
        foils: Any,
        row: int,
        box: Box | None = None,
    ) -> bool:
        """Takes a case, or notes why not. `file` is the image's name, `place` its folder below the data set's own, or
        what finds it (None: unknown); `row` is the case's number in its file, from 1."""
        name = posixpath.basename(file) if isinstance(file, str) else ""
        image_id = storable(posixpath.splitext(name)[0])
        where = f"{suite}, {group}"
        if not image_id:
            self.skipped.note("", row, "no image named", f"{where}: {file!r}"[:200])
            return False
        folder = place if isinstance(place, str) else place(name)
        if folder is None:
            self.skipped.note(image_id, row, "image of no known archive", f"{where}: {name}")
            return False
        texts = _texts(caption, foils, image_id, row, where, self.skipped)
        if texts is None:
            return False
        sample = self._samples.setdefault(image_id, Sample(image_id, f"{folder}/{name}", "test", row=row))
        if sample.image_path != f"{folder}/{name}":
            self.skipped.note(f"{folder}/{name}", row, "duplicate id", f"the id {image_id!r} belongs to {sample.image_path}")
            return False
        self._cases.append(_Case(image_id, suite, group, *texts, row, box))
        return True

    def finish(self, root: Path, source: str, name: str, published: Mapping[str, int]) -> Loaded:
        """Looks at every image below `root` and makes the tables. A case whose image or box cannot be used is noted.

        The records have no captions of their own: what is said of an image here is only to be chosen from. Raises
        DataError where nothing can be used.
        """
        rows, hashes = look(list(self._samples.values()), root, source, f"download {name}", self.skipped)
        sizes = {row["image_id"]: (float(row["width"]), float(row["height"])) for row in rows}
        choices = [row for case in self._cases if (row := self._row(case, sizes)) is not None]
        if not choices:
            reasons = dict(Counter(entry["reason"] for entry in self.skipped))
            raise DataError(f"download.datasets.{name}: none of its cases can be used: {reasons or 'there is none'}")
        counts = Counter(row["suite"] for row in choices)
        notes = [f"{suite}: {count:,} cases" for suite, count in counts.items()]
        if self._clipped:
            notes.append(f"boxes that reach beyond their image, and were clipped to it: {self._clipped:,}")
        return Loaded(root, rows, list(self.skipped), notes=notes, hashes=hashes, published=dict(published), choices=choices)

    def _row(self, case: _Case, sizes: Mapping[str, tuple[float, float]]) -> dict[str, Any] | None:
        where = f"{case.suite}, {case.group}"
        if case.image_id not in sizes:
            self.skipped.note(case.image_id, case.row, "case without its image", f"{where}: {case.caption}"[:120])
            return None
        width, height = sizes[case.image_id]
        x1, y1, x2, y2 = case.box or (0.0, 0.0, width, height)
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height))
        if not (box[0] < box[2] and box[1] < box[3]):
            detail = f"{where}: box ({x1:g}, {y1:g}, {x2:g}, {y2:g}) in an image of {width:g} x {height:g}"
            self.skipped.note(case.image_id, case.row, "box outside the image", detail)
            return None
        self._clipped += box != (x1, y1, x2, y2)
        return choice(case.image_id, box, case.suite, case.group, case.caption, case.foils)


def choice(image_id: str, box: Box, suite: str, group: str, caption: str, foils: list[str]) -> dict[str, Any]:
    """A row of CHOICES."""
    corners = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
    return {"image_id": image_id, **corners, "suite": suite, "group": group, "caption": caption, "foils": foils}


def _texts(caption: Any, foils: Any, image_id: str, row: int, where: str, skipped: Skipped) -> tuple[str, list[str]] | None:
    """Caption and foils as they can be stored. None, with a note, where one is no text or empty, or says what the other
    says: white space and case make no difference to CLIP."""
    wrong = [foils] if not isinstance(foils, list) else [foil for foil in foils if not isinstance(foil, str)]
    if not isinstance(caption, str):
        skipped.note(image_id, row, "caption is not text", f"{where}: {caption!r} is {type(caption).__name__}"[:120])
    elif wrong or not foils:
        skipped.note(image_id, row, "foil is not text", f"{where}: {(wrong or foils)!r}"[:120])
    elif not caption.strip():
        skipped.note(image_id, row, "empty caption", where)
    elif not all(foil.strip() for foil in foils):
        skipped.note(image_id, row, "empty foil", where)
    elif _plain(caption) in map(_plain, foils):
        skipped.note(image_id, row, "foil is the caption", f"{where}: {caption}"[:120])
    else:
        return storable(caption), [storable(foil) for foil in foils]
    return None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
