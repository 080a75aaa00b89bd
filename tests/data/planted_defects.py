"""A clean data set of forty images, twenty-five defects planted in it all at once, and the table in docs/validation.md.

python tests/data/planted_defects.py > docs/validation.md
"""

import hashlib
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fast_goal.config import ValidateConfig
from fast_goal.data import quality, validation
from fast_goal.data.expectations import Outcome, check
from fast_goal.data.records import Dataset

SPLITS = ["train"] * 28 + ["val"] * 6 + ["test"] * 6
THINGS = [
    "dog",
    "cat",
    "horse",
    "bicycle",
    "car",
    "table",
    "chair",
    "lamp",
    "tree",
    "house",
    "bridge",
    "boat",
    "train",
    "bird",
    "cow",
    "sheep",
    "bench",
    "clock",
    "vase",
    "kite",
]
PLACES = ["a park", "a kitchen", "a street", "a field", "a harbour", "a garden", "an office", "a beach"]
CONFIG = ValidateConfig(
    expected_counts={"train": 28, "val": 6, "test": 6},
    max_skipped=0.05,
    min_mean_words=5,
    max_mean_words=1000,
    min_pairs=0.9,
    max_cut_off=0.05,
    language="en",
    max_aspect=5,
    near_duplicate_bits=4,
    max_decoded=20000,
    caption_sample=2000,
    quality_pairs=0,
    seed=0,
)
GERMAN = (
    "Ein alter Mann mit grauem Bart sitzt auf einer Bank im Park und liest die Zeitung. Neben ihm schläft sein kleiner Hund."
)
FACTS = {"counts": {"train": 28, "val": 6, "test": 6}, "mean_words": None, "captions": 2, "pairs": 1}


@dataclass(frozen=True)
class Defect:
    """What is planted, the rule that must find it, and the rows it must name (of the records, regions or pairs)."""

    what: str
    rule: str
    rows: tuple[int, ...]


DEFECTS = [
    Defect("an image file is deleted", "records.files_exist", (1,)),
    Defect("an image file is cut off", "records.images_decode", (2,)),
    Defect("an image is replaced by one of another size", "records.sizes_agree", (3,)),
    Defect("a poster, a banner and a thumbnail among photographs of one size", "records.usual_area", (4, 20, 21)),
    Defect("the file of a training image is copied into the test split", "records.no_test_image_in_training", (36,)),
    Defect(
        "the file of a training image is copied into the validation split", "records.no_validation_image_in_training", (29,)
    ),
    Defect("a test image is a training image, saved again", "records.no_near_duplicate_in_training", (37,)),
    Defect("a training image is saved twice", "records.no_near_duplicate_in_split", (8, 9)),
    Defect("a long caption is empty", "records.long_captions_present", (10,)),
    Defect("the captioner refused", "records.no_refusals", (11,)),
    Defect("the captioner repeats its instruction", "records.no_leaked_prompts", (12,)),
    Defect("the captioner says a sentence twice", "records.no_repeated_sentences", (13,)),
    Defect("one caption for three images", "records.captions_not_shared", (14, 15, 16)),
    Defect("a caption has HTML in it", "records.no_markup", (17,)),
    Defect("a caption is in German", "records.language", (18,)),
    Defect("a caption is cut off in mid-sentence", "records.captions_finished", (19,)),
    Defect("a banner, eight times as wide as high", "records.not_long", (20,)),
    Defect("a picture smaller than the model's input", "records.not_small", (21,)),
    Defect("an image has lost one of its two short captions", "records.published_captions", (23,)),
    Defect("an image has lost its local pair", "records.published_pairs", (24,)),
    Defect("the download lost two samples of the split train", "facts.published_counts", (0,)),
    Defect("a region reaches beyond its image", "regions.boxes_inside", (25,)),
    Defect("a local sentence is not in its caption", "pairs.sentences_are_spans", (5,)),
    Defect("a cosine above 1", "pairs.similarities_in_range", (6,)),
    Defect("a local pair has another box than its region", "pairs.boxes_of_regions", (7,)),
]


def clean_set(root: Path) -> quality.Subject:
    """The clean data set; its images are written below `root`."""
    generator = np.random.default_rng(7)
    records, regions, pairs, hashes = [], [], [], []
    for number, split in enumerate(SPLITS):
        width, height = 60 + number % 7, 48 + number % 5
        path = root / f"{number:02d}.png"
        _noise(generator, width, height).save(path)
        caption = _caption(number)
        sentence = caption.split(". ")[0] + "."
        records.append(
            {
                "image_id": f"{number:02d}",
                "image_path": path.name,
                "width": width,
                "height": height,
                "split": split,
                "long_caption": caption,
                "captions": [f"A {THINGS[number % 20]}.", f"One {THINGS[number % 20]} outside."],
                "source": "folder",
                "content_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )
        box = {"x1": 0.0, "y1": 0.0, "x2": width / 2, "y2": height / 2, "kind": "quadrant"}
        regions.append({"image_id": f"{number:02d}", "region_index": 0, **box, "label": "", "score": 1.0})
        span = {"sentence_index": 0, "sentence": sentence, "char_start": 0, "char_end": len(sentence)}
        place = {"image_id": f"{number:02d}", "rank": 1, "region_index": 0, **box}
        pairs.append({**place, **span, "similarity": 0.3, "weight": 1.0})
        hashes.append({"image_id": f"{number:02d}", "perceptual_hash": f"{generator.integers(2**64, dtype=np.uint64):016x}"})
    dataset = Dataset(
        "photos",
        root,
        pd.DataFrame(records),
        source="folder",
        hashes=pd.DataFrame(hashes),
        published={"train": 28, "val": 6, "test": 6},
        facts=FACTS,
    )
    skipped = pd.DataFrame(columns=["sample", "row", "step", "reason", "detail"])
    return quality.Subject(dataset, pd.DataFrame(regions), pd.DataFrame(pairs), skipped, ("train", "val", "test"))


def plant(subject: quality.Subject) -> quality.Subject:
    """All defects, in the rows that DEFECTS names."""
    generator = np.random.default_rng(8)
    root, records = subject.dataset.root, subject.dataset.records.copy()
    regions, pairs, hashes = subject.regions.copy(), subject.pairs.copy(), subject.dataset.hashes.copy()
    (root / "01.png").unlink()
    (root / "02.png").write_bytes((root / "02.png").read_bytes()[:-2000])
    _noise(generator, 50, 50).save(root / "03.png")
    for row, width, height in ((4, 600, 450), (20, 400, 50), (21, 30, 40)):
        _noise(generator, width, height).save(root / f"{row:02d}.png")
        records.loc[row, ["width", "height"]] = [width, height]
        boxes = {"x2": width / 2, "y2": height / 2}
        for table in (regions, pairs):
            table.loc[row, list(boxes)] = list(boxes.values())
    for row, source in ((36, 0), (29, 5)):
        shutil.copy(root / f"{source:02d}.png", root / f"{row:02d}.png")
        records.loc[row, ["content_hash", "width", "height"]] = records.loc[
            source, ["content_hash", "width", "height"]
        ].tolist()
        hashes.loc[row, "perceptual_hash"] = hashes.loc[source, "perceptual_hash"]
        for table in (regions, pairs):
            table.loc[row, ["x2", "y2"]] = table.loc[source, ["x2", "y2"]].tolist()
    for row, source, bits in ((37, 6, 0b11), (9, 8, 0b1)):
        hashes.loc[row, "perceptual_hash"] = f"{int(hashes.loc[source, 'perceptual_hash'], 16) ^ bits:016x}"
    changes = {
        10: "",
        11: "I'm sorry, but I cannot see the picture well enough to describe all of it.",
        12: "Describe the image in one paragraph. " + _caption(12),
        13: f"{_caption(13)} A tall lamp stands behind it. The light is soft. A tall lamp stands behind it.",
        **dict.fromkeys((14, 15, 16), "A photograph of something on a surface, taken in daylight."),
        17: _caption(17) + "<br/>The background is blurred.",
        18: GERMAN,
        19: _caption(19).removesuffix(".") + " and in front of the",
    }
    for row, caption in changes.items():
        records.loc[row, "long_caption"] = caption
        sentence = caption.split(". ")[0]
        pairs.loc[row, ["sentence", "char_end"]] = [sentence, len(sentence)]
    records.at[23, "captions"] = records.at[23, "captions"][:1]
    regions.loc[25, ["x2"]] = pairs.loc[25, ["x2"]] = 75.0
    pairs.loc[5, "char_start"] = 2
    pairs.loc[6, "similarity"] = 1.2
    pairs.loc[7, "x1"] = 1.0
    pairs = pairs.drop(index=[10, 24]).reset_index(drop=True)
    lost = {"sample": "10", "row": -1, "step": "flism", "reason": "no sentence", "detail": ""}
    dataset = replace(subject.dataset, records=records, hashes=hashes, published={"train": 26, "val": 6, "test": 6})
    return replace(subject, dataset=dataset, regions=regions, pairs=pairs, skipped=pd.DataFrame([lost]))


def outcomes(subject: quality.Subject, docs: Path) -> dict[str, Outcome]:
    """Suite and rule -> the outcome, of all rules."""
    images = quality.inspect_images(subject.dataset)
    base = validation.Base("a CLIP", image_size=40, context_length=77)
    settings = validation.Settings(CONFIG, [subject.dataset], detector_only=False, top_k=1, base=base)
    found = check(validation.examine(subject, images, settings, None).suites, docs)
    return {f"{outcome.suite.removeprefix('photos_')}.{outcome.rule.name}": outcome for outcome in found}


def table(found: dict[str, Outcome]) -> str:
    """docs/validation.md."""
    lines = [
        "# What the validation catches",
        "",
        f"{len(DEFECTS)} defects, planted all at once in a clean data set of {len(SPLITS)} images with captions, regions,",
        "pairs, perceptual hashes and published facts. Each is found by its rule, which names its row and no other; on the",
        "clean set nothing is reported. `tests/data/test_planted_defects.py` asserts both, and that this table, made by",
        "`python tests/data/planted_defects.py`,",
        "is what the validation says. A failing `critical` rule stops the pipeline; `warning` and `info` are listed.",
        "",
        "| defect | rule | severity | what the report says |",
        "| --- | --- | --- | --- |",
    ]
    for defect in DEFECTS:
        outcome = found[defect.rule]
        said = "; ".join(outcome.examples).replace("|", "\\|")
        lines.append(f"| {defect.what} | `{defect.rule}` | {outcome.rule.severity} | {said} |")
    return "\n".join(lines) + "\n"


def _caption(number: int) -> str:
    thing, other, place = THINGS[number % 20], THINGS[(number * 7 + 3) % 20], PLACES[number % 8]
    return (
        f"In {place} a {thing} can be seen beside a {other} of dark wood, number {number}. "
        f"Behind the {thing} there is a wall, and the sky above it is pale."
    )


def _noise(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(table(outcomes(plant(clean_set(Path(folder))), Path(folder) / "docs")))
