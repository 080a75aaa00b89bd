"""Photographs of SA-1B (Kirillov et al., 2023), which DCI and ShareGPT4V describe and which each user has to ask for.

Archives `sa_*.tar` or single photographs lie in `.fast_goal/downloads/sa1b`, for all data sets together; a data set takes
those that it names.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from fast_goal.data.archives import unpack
from fast_goal.data.fetch import ManualStep, downloads_folder
from fast_goal.data.samples import Sample
from fast_goal.files import digest

PAGE = "https://ai.meta.com/datasets/segment-anything-downloads/"
FOLDER = "photos"  # below the data set's own
_IN_AN_ARCHIVE = 11186  # a guess that fits what is known: sa_223750 is in archive 20, 1543972 to 1554261 are in 138


def take_photos(samples: Sequence[Sample], place: str, folder: Path, missing: Literal["stop", "skip"]) -> None:
    """Brings the samples' photographs below `folder`, unpacked or linked from `place`, and sets `image_path` to where they
    are; on entry it ends in the file's name.

    `place` is a folder below the downloads folder, or any other. An archive may be deleted once its photographs are here.
    Raises ManualStep with what to do where no photograph is found, and with "stop" where one is missing.
    """
    wanted = {posixpath.basename(sample.image_path) for sample in samples}
    source = downloads_folder() / place
    found = _present(folder, wanted)
    needed = wanted - found.keys()
    if needed and source.is_dir():
        for photo in sorted(source.rglob("*.jpg")):
            if photo.name in needed:
                _link(photo, folder / FOLDER / "single" / photo.name)
        # what is asked for is part of the name: unpacking is done once for a folder
        asked = digest(sorted(wanted), 8)
        for archive in sorted(source.rglob("*.tar")):
            unpack(archive, folder / FOLDER / f"{archive.stem}-{asked}", select=lambda name: posixpath.basename(name) in wanted)
        found = _present(folder, wanted)
    absent = sorted(wanted - found.keys())
    if absent and (missing == "stop" or not found):
        archives = likely_archives(absent)
        shown = ", ".join(archives[:60]) or "the archives"
        raise ManualStep(
            f"{len(absent):,} of {len(wanted):,} photographs of SA-1B (such as {absent[0]})",
            [
                f"Accept the licence at {PAGE}; you get a text file with the name and the address of each archive.",
                f"Download {shown}, about 11 GB each: by their numbers the missing photographs are there. One after the other "
                "will do: put one there, run the command, delete the archive, go on with the next.",
            ],
            source / (archives[0] if len(archives) == 1 else ""),
        )
    for sample in samples:
        sample.image_path = found.get(posixpath.basename(sample.image_path), sample.image_path)


def likely_archives(names: Collection[str]) -> list[str]:
    """The archives that the photographs' numbers point to: `sa_<number>.jpg` is in archive `number // 11186`."""
    numbers = {int(match[1]) // _IN_AN_ARCHIVE for name in names if (match := re.fullmatch(r"sa_(\d+)\.jpg", name))}
    return [f"sa_{number:06d}.tar" for number in sorted(numbers)]


def _present(folder: Path, wanted: set[str]) -> dict[str, str]:
    """By the photograph's name, its path. What a killed unpacking has left, in a hidden folder, may be half a photograph."""
    root = folder / FOLDER
    paths = sorted(root.rglob("*.jpg")) if root.is_dir() else []
    return {
        path.name: path.relative_to(folder).as_posix()
        for path in paths
        if path.name in wanted and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }


def _link(photo: Path, target: Path) -> None:
    """A second name of the file, or a copy on another disk: a data set keeps its photographs whatever becomes of `photo`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(photo, temporary)
    except OSError:
        shutil.copyfile(photo, temporary)
    temporary.replace(target)
