"""The data sources `aro` and `aro_order`: ARO (Yuksekgonul et al., 2023; github.com/mertyg/vision-language-models-are-bows).

`aro`: VG-Relation and VG-Attribution, JSON lists with `image_path`, `bbox_x`, `bbox_y`, `bbox_w`, `bbox_h`, `true_caption`,
`false_caption` and `relation_name` or `attributes` (two). What is shown is the box, cut out.

`aro_order`: COCO-Order and Flickr30k-Order. A caption stands against four shuffles of its words: nouns among their places and
adjectives among theirs; all the others; the words of each three; the threes. Caption and foils are normalised as there, and
cut after so many words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fast_goal.config import number
from fast_goal.data import speech
from fast_goal.data.benchmarks import Box, Cases, Origin, bring, choice, read_cases, unpack_named
from fast_goal.data.samples import Skipped
from fast_goal.data.sources import Loaded, karpathy, source
from fast_goal.errors import DataError
from fast_goal.progress import Progress

IMAGES = "images"
_TAGGED_AT_ONCE = 1000  # captions between two reports of progress
_LEFT_OUT = re.compile(r'[.!"()*#:;~]')


@dataclass(frozen=True)
class AroConfig:
    """relation, attribution: the JSON files. images: the archive of both."""

    relation: Origin
    attribution: Origin
    images: Origin


@dataclass(frozen=True)
class OrderConfig:
    """captions: the images with their captions, with the keys of the source `karpathy`. max_words: of caption and foils."""

    suite: Literal["coco_order", "flickr_order"]
    captions: karpathy.KarpathyConfig
    max_words: int = number(1)
    seed: int = number(0)  # of the shuffles


@source("aro", AroConfig)
def load(config: AroConfig, name: str, folder: Path) -> Loaded:
    """Takes the files, unpacks the images that they name, and makes a row of the table of choices of every case.

    A case that cannot be used is a row of `skipped`, numbered by its place in its list. Boxes are clipped to their image,
    where the published code fills up with black. Raises ManualStep with all that has to be brought, DataError for a file
    that cannot be understood.
    """
    cases, published = Cases(), {}
    relation, attribution, images = bring([config.relation, config.attribution, config.images])
    for suite, path in (("vg_relation", relation), ("vg_attribution", attribution)):
        entries = read_cases(path, list, f"a list of cases, as in visual_genome_{suite.removeprefix('vg_')}.json")
        published[suite] = len(entries)
        for row, entry in enumerate(entries, 1):
            entry = entry if isinstance(entry, dict) else {}
            group, box = _group(suite, entry), _box(entry)
            if group is None or box is None:
                reason = "no box" if group is not None else "no relation" if suite == "vg_relation" else "no two attributes"
                cases.skipped.note("", row, reason, f"{suite}: {entry}"[:200])
                continue
            foils = [entry.get("false_caption")]
            cases.add(entry.get("image_path"), IMAGES, suite, group, entry.get("true_caption"), foils, row, box)
    unpack_named(images, folder / IMAGES, cases.files(IMAGES))
    return cases.finish(folder, "aro", name, published)


def _group(suite: str, entry: dict[str, Any]) -> str | None:
    """The relation, or the two attributes as the published code joins them."""
    if suite == "vg_relation":
        relation = entry.get("relation_name")
        return relation if isinstance(relation, str) and relation.strip() else None
    attributes = entry.get("attributes")
    named = isinstance(attributes, list) and len(attributes) >= 2 and all(isinstance(word, str) for word in attributes[:2])
    return "_".join(attributes[:2]) if named else None


def _box(entry: dict[str, Any]) -> Box | None:
    try:
        x, y, width, height = (float(entry[f"bbox_{side}"]) for side in "xywh")
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return x, y, x + width, y + height


@source("aro_order", OrderConfig)
def load_order(config: OrderConfig, name: str, folder: Path) -> Loaded:
    """Fetches images and captions as the source `karpathy`; every caption is a case with up to four foils.

    A shuffle that leaves the text as it was is no foil: it is left out and counted, and a caption without any is a row of
    `skipped`. The draws depend on image, caption and seed alone. The captions stand in the table of choices only.
    """
    loaded = karpathy.load(config.captions, f"{name}.captions", folder)
    asked = [(row, caption) for row in loaded.rows for caption in row["captions"]]
    skipped, choices, unchanged = Skipped(), [], 0
    with Progress(f"download {name}", len(asked), "captions") as progress:
        for begin in range(0, len(asked), _TAGGED_AT_ONCE):
            part = asked[begin : begin + _TAGGED_AT_ONCE]
            for (row, caption), words in zip(part, speech.tagged([caption for _, caption in part]), strict=True):
                image_id = row["image_id"]
                text = normalised(caption, config.max_words)
                rng = random.Random(f"{config.seed} {image_id} {caption}")
                foils = [normalised(foil, config.max_words) for foil in shuffles(words, rng)]
                same = normalised(" ".join(word.text for word in words), config.max_words)  # CLIP takes `dog ,` for `dog,`
                false = [foil for foil in foils if foil not in (text, same)]
                unchanged += len(foils) - len(false)
                if not false:
                    skipped.note(image_id, -1, "no shuffle differs", caption[:120])
                    continue
                box = (0.0, 0.0, float(row["width"]), float(row["height"]))
                choices.append(choice(image_id, box, config.suite, config.suite, text, false))
            progress.update(len(part))
    if not choices:
        raise DataError(f"download.datasets.{name}: no caption has a shuffle that differs from it")
    for row in loaded.rows:
        row |= {"captions": [], "source": "aro_order"}
    loaded.choices = choices
    loaded.skipped += skipped
    loaded.notes += [f"{config.suite}: {len(choices):,} cases", f"shuffles that left the caption as it was: {unchanged:,}"]
    return loaded


def normalised(caption: str, max_words: int) -> str:
    """Lower case, without . ! " ( ) * # : ; ~, single blanks, the first `max_words` words: what ARO compares."""
    return " ".join(_LEFT_OUT.sub(" ", caption.lower()).split()[:max_words])


def shuffles(words: Sequence[speech.Word], rng: random.Random) -> list[str]:
    """The four shuffles of a caption's words, in ARO's order, joined by blanks."""
    texts = [word.text for word in words]
    kinds = [word.kind for word in words]
    nouns, adjectives = ([place for place, kind in enumerate(kinds) if kind == wanted] for wanted in ("noun", "adjective"))
    others = [place for place, kind in enumerate(kinds) if kind not in ("noun", "adjective")]
    threes = [texts[begin : begin + 3] for begin in range(0, len(texts), 3)]
    within = [rng.sample(three, len(three)) for three in threes]
    return [
        " ".join(_permuted(_permuted(texts, nouns, rng), adjectives, rng)),
        " ".join(_permuted(texts, others, rng)),
        " ".join(word for three in within for word in three),
        " ".join(word for three in rng.sample(threes, len(threes)) for word in three),
    ]


def _permuted(texts: Sequence[str], places: Sequence[int], rng: random.Random) -> list[str]:
    """The texts, those at `places` in another order."""
    changed = list(texts)
    for place, other in zip(places, rng.sample(places, len(places)), strict=True):
        changed[place] = texts[other]
    return changed
