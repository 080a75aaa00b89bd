"""The data source `sugarcrepe`: SugarCrepe (Hsieh et al., 2023; github.com/RAIVNLab/sugar-crepe).

Seven JSON files, one for each kind of foil (replace_obj, replace_att, replace_rel, swap_obj, swap_att, add_obj, add_att): an
object of `filename`, `caption` and `negative_caption` by number. The images are those of COCO's val2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fast_goal.data.benchmarks import Cases, read_cases, unpack_named
from fast_goal.data.fetch import Remote, fetch_all
from fast_goal.data.sources import Loaded, source

IMAGES = "images"


@dataclass(frozen=True)
class SugarCrepeConfig:
    """files: by the kind of foil, which becomes the group. images: the archive of COCO's val2017."""

    files: dict[str, Remote]
    images: Remote


@source("sugarcrepe", SugarCrepeConfig)
def load(config: SugarCrepeConfig, name: str, folder: Path) -> Loaded:
    """Fetches files and images, of which those that are named are unpacked; a case is a row of the table of choices.

    A case that cannot be used is a row of `skipped`, numbered by its place in its file. Raises DataError for a file that
    cannot be understood.
    """
    cases, published = Cases(), {}
    for group, path in zip(config.files, fetch_all(list(config.files.values())), strict=True):
        entries = read_cases(path, dict, "an object of cases by number, as in add_att.json")
        published[group] = len(entries)
        for row, entry in enumerate(entries.values(), 1):
            entry = entry if isinstance(entry, dict) else {}
            foils = [entry.get("negative_caption")]
            cases.add(entry.get("filename"), IMAGES, "sugarcrepe", group, entry.get("caption"), foils, row)
    unpack_named(fetch_all([config.images])[0], folder / IMAGES, cases.files(IMAGES))
    return cases.finish(folder, "sugarcrepe", name, published)
