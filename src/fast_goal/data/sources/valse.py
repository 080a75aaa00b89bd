"""The data source `valse`: VALSE (Parcalabescu et al., 2022; github.com/Heidelberg-NLP/VALSE).

One JSON file for each instrument of its six pieces: an object of cases by id, each with `image_file`, `caption`, `foil` and
`mturk`, how many of three annotators chose the caption alone, the foil (also), or neither. As in its own code, a case counts
where two at least chose the caption. The images are those of other data sets; their names say of which.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fast_goal.config import number
from fast_goal.data.benchmarks import Cases, Origin, bring, read_cases, unpack_named
from fast_goal.data.fetch import Remote, fetch_all
from fast_goal.data.sources import Loaded, source
from fast_goal.errors import ConfigError


@dataclass(frozen=True)
class Images:
    """An archive of images, and the pattern of their names (`*` and `?`)."""

    match: str
    origin: Origin


@dataclass(frozen=True)
class ValseConfig:
    """files: by the instrument, which becomes the group. images: archives by the folder that their images are put in; an
    image belongs to the first whose pattern fits. min_votes: for the caption, of three."""

    files: dict[str, Remote]
    images: dict[str, Images]
    min_votes: int = number(0, 3)

    def __post_init__(self) -> None:
        if not self.files or not self.images:
            raise ConfigError("files and images: expected one at least of each")


@source("valse", ValseConfig)
def load(config: ValseConfig, name: str, folder: Path) -> Loaded:
    """Fetches the files and the archives that their cases need; a case is a row of the table of choices.

    A case that cannot be used is a row of `skipped`, numbered by its place in its file; so is one that has too few votes,
    with the case's id as detail: nothing is lost there. Raises DataError for a file that cannot be understood.
    """
    cases, published = Cases(), {}

    def place(file: str) -> str | None:
        return next((key for key, images in config.images.items() if fnmatchcase(file, images.match)), None)

    for group, path in zip(config.files, fetch_all(list(config.files.values())), strict=True):
        entries = read_cases(path, dict, "an object of cases by id, as in existence.json")
        published[group] = 0
        for row, (key, entry) in enumerate(entries.items(), 1):
            entry = entry if isinstance(entry, dict) else {}
            votes = _votes(entry)
            if votes is None or votes < config.min_votes:
                reason = "no votes" if votes is None else f"fewer than {config.min_votes} votes for the caption"
                cases.skipped.note("", row, reason, f"{group}: {key}, {votes} votes")
                continue
            published[group] += 1
            cases.add(entry.get("image_file"), place, "valse", group, entry.get("caption"), [entry.get("foil")], row)
    needed = {key: cases.files(key) for key in config.images if cases.files(key)}
    for key, archive in zip(needed, bring([config.images[key].origin for key in needed]), strict=True):
        unpack_named(archive, folder / key, needed[key])
    return cases.finish(folder, "valse", name, published)


def _votes(entry: dict[str, Any]) -> int | None:
    votes = entry.get("mturk")
    count = votes.get("caption") if isinstance(votes, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None
