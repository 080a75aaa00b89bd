"""What the models are asked about one split of a data set, and what one of them makes of it.

Letters: `I` images, `T` texts, `U` distinct texts, `S` sentences with a box, `N` patches, `C` choices or labels, `D` embedding
width. Boxes are xyxy; of the original image in `Questions`, of the model's input wherever `input` is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from fast_goal.data.captions import split_sentences
from fast_goal.data.images import open_image, touched
from fast_goal.data.masks import MOST
from fast_goal.data.records import Dataset
from fast_goal.data.sources.scenes.samples import STYLES, scene_of
from fast_goal.errors import DataError
from fast_goal.evaluation.features import Box, FeatureStore, ImageFile, embed_images
from fast_goal.evaluation.localisation import centres_inside, first_hits
from fast_goal.model.clip import Clip


class Captions(NamedTuple):
    """Texts and the row of the image each belongs to."""

    texts: list[str]
    images: np.ndarray  # int64 [T]


class Regions(NamedTuple):
    """Sentences, each with the box of the thing it speaks of."""

    sentences: list[str]
    images: np.ndarray  # int64 [S], ascending
    boxes: np.ndarray  # float64 [S, 4], pixels of the original image
    source: Literal["truth", "flism", "none"]  # of the boxes


Crop = tuple[int, Box | None]  # row of an image, and whole pixels of it; None: the whole image


class Choices(NamedTuple):
    """True captions, each to be told from its foils by what a crop shows."""

    crops: list[Crop]  # [C]
    suites: np.ndarray  # str objects [C]
    groups: np.ndarray  # str objects [C]
    captions: list[str]  # [C]
    foils: list[list[str]]  # [C], one at least of each


class Labels(NamedTuple):
    """Crops, each to be put into one of the classes of its suite."""

    crops: list[Crop]  # [C]
    suites: np.ndarray  # str objects [C]
    labels: np.ndarray  # str objects [C]
    classes: Mapping[str, Mapping[str, Sequence[str]]]  # suite -> names, and templates in which {} stands for the name


class Masks(NamedTuple):
    """Images each pixel of which is to be put into one of the classes of a suite."""

    images: np.ndarray  # int64 [M], the row of each; once in a suite
    suites: np.ndarray  # str objects [M]
    paths: list[Path]  # [M]
    contents: list[str]  # [M], SHA-256 of the files
    segments: Mapping[str, Mapping[str, Sequence[Any]]]  # by suite, see `data.records.Dataset.segments`


@dataclass(frozen=True)
class Questions:
    """What the models are asked about one split; the same for every model.

    contents: SHA-256 of each image file, empty where it is not known. scenes: for each image the number of its scene;
    images of one scene (twins that differ in one thing) are no independent evidence. None: each image is one. objects: how
    many each image shows, None where nobody counted. choices, labels, masks: None where the split has none.
    """

    image_ids: list[str]
    paths: list[Path]
    sizes: np.ndarray  # int64 [I, 2], width and height in pixels of the original image
    long: Captions
    short: Captions
    regions: Regions
    contents: list[str] = field(default_factory=list)
    scenes: np.ndarray | None = None  # int64 [I]
    objects: np.ndarray | None = None  # int64 [I]
    choices: Choices | None = None
    labels: Labels | None = None
    masks: Masks | None = None

    @cached_property
    def files(self) -> list[ImageFile]:
        """The image files, as a store of features knows them."""
        sizes = [(width, height) for width, height in self.sizes.tolist()]
        return [ImageFile(*one) for one in zip(self.paths, sizes, self.contents or map(str, self.paths), strict=True)]

    @cached_property
    def sentences(self) -> list[list[str]]:
        """The sentences of each long caption, at least one of each."""
        return [[sentence.text for sentence in split_sentences(text)] or [text] for text in self.long.texts]

    @cached_property
    def groups(self) -> np.ndarray:
        """What is drawn together by the bootstrap: int64 [I], the scene of each image."""
        return np.arange(len(self.paths)) if self.scenes is None else self.scenes


class PatchHits(NamedTuple):
    """Where a model finds the sentences of `Questions.regions`."""

    first_hits: np.ndarray  # int64 [S], rank of the best patch whose centre is in the box; N + 1 if there is none
    patches_inside: np.ndarray  # int64 [S], patches whose centre is in the box


@dataclass(frozen=True)
class Answers:
    """What one model made of the questions; features are unit float32 on the CPU."""

    image_features: Tensor  # [I, D]
    text_features: Tensor  # [U, D]
    text_lengths: np.ndarray  # int64 [U], token ids with BOS and EOS before any truncation
    text_rows: dict[str, int]  # distinct text -> row
    first_hits: np.ndarray  # int64 [S], see PatchHits
    patches_inside: np.ndarray  # int64 [S]
    patches: int  # N
    context_length: int
    seconds: float  # that the model was at work

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        """The rows of `texts` in `text_features` and `text_lengths`: int64 [T]."""
        return np.array([self.text_rows[text] for text in texts], dtype=np.int64)


def questions(dataset: Dataset, split: str, pairs: pd.DataFrame | None = None) -> Questions:
    """Collects captions and boxes of a split.

    An image without a long caption is a candidate in long-caption retrieval but asks nothing; so with short ones. The
    boxes are the data set's own truth, or else those of the best FLISM pair of each image (`pairs`), or there are none.

    Raises DataError if the split has no image, and for choices, labels and masks that cannot be asked.
    """
    records = dataset.split(split).reset_index(drop=True)
    if records.empty:
        raise DataError(f"data set {dataset.name!r} has no image in the split {split!r}, which evaluate.split asks for")
    row_of = {image_id: row for row, image_id in enumerate(records.image_id)}
    long_rows = [row for row, caption in enumerate(records.long_caption) if caption]
    short = [(text, row) for row, captions in enumerate(records.captions) for text in captions if text]

    source: Literal["truth", "flism", "none"] = "none"
    boxes: pd.DataFrame | None = None
    if dataset.truth is not None:
        source, boxes = "truth", dataset.truth[dataset.truth.image_id.isin(row_of)].copy()
        captions = boxes.image_id.map(records.set_index("image_id").long_caption)
        spans = zip(captions, boxes.char_start, boxes.char_end, strict=True)
        boxes["sentence"] = [caption[start:end] for caption, start, end in spans]
    elif pairs is not None:
        source, boxes = "flism", pairs[pairs.image_id.isin(row_of) & (pairs["rank"] == 1)].copy()
    if boxes is None or boxes.empty:
        regions = Regions([], np.zeros(0, np.int64), np.zeros((0, 4)), "none")
    else:
        boxes["row"] = boxes.image_id.map(row_of)
        boxes = boxes.sort_values(["row", "sentence_index"], kind="stable")
        corners = boxes[["x1", "y1", "x2", "y2"]].to_numpy(np.float64)
        regions = Regions(boxes.sentence.tolist(), boxes.row.to_numpy(np.int64), corners, source)

    return Questions(
        image_ids=records.image_id.tolist(),
        paths=[dataset.path(path) for path in records.image_path],
        sizes=records[["width", "height"]].to_numpy(np.int64),
        long=Captions([records.long_caption[row] for row in long_rows], np.array(long_rows, dtype=np.int64)),
        short=Captions([text for text, _ in short], np.array([row for _, row in short], dtype=np.int64)),
        regions=regions,
        contents=records.content_hash.tolist(),
        scenes=_scenes(dataset, records),
        objects=_objects(dataset, records),
        choices=_choices(dataset, records),
        labels=_labels(dataset, records),
        masks=_masks(dataset, records),
    )


def answer(clip: Clip, asked: Questions, batch_size: int, device: torch.device, name: str = "evaluate") -> Answers:
    """Embeds everything that `asked` holds, in memory and in float32.

    Args:
        clip: moved to `device` and set to evaluation; it sees the images through its own view.
        batch_size: images, and texts, encoded at once; the results do not depend on it.
        name: of the progress lines.

    Raises:
        DataError: an image that cannot be read.
    """
    store = FeatureStore(None, clip, device, batch_size)
    texts = list(dict.fromkeys([*asked.long.texts, *asked.short.texts, *asked.regions.sentences]))
    text_features, text_lengths = store.texts(texts, name=name)
    embed_images([store], asked.files, [(row, None) for row in range(len(asked.files))], held(asked), name)
    return Answers(
        image_features=store.images(asked.files),
        text_features=text_features,
        text_lengths=text_lengths,
        text_rows={text: row for row, text in enumerate(texts)},
        **patch_hits(store, asked)._asdict(),
        patches=store.patch_count,
        context_length=store.context_length,
        seconds=store.seconds,
    )


def held(asked: Questions) -> list[tuple[int, str]]:
    """The sentences that are held against the patches of their images: (row of the image, text)."""
    return list(zip(asked.regions.images.tolist(), asked.regions.sentences, strict=True))


def patch_hits(store: FeatureStore, asked: Questions) -> PatchHits:
    """Where the model finds the sentences that have a box."""
    if not asked.regions.sentences:
        return PatchHits(np.zeros(0, np.int64), np.zeros(0, np.int64))
    inside = centres_inside(input_boxes(store.clip, asked), store.clip.image_size, store.clip.patch_size)  # [S, N]
    hits = first_hits(store.similarities(asked.files, held(asked)), inside)
    return PatchHits(hits.numpy(), inside.sum(1).numpy())


class PatchMap(NamedTuple):
    """One sentence over one image, as the model sees it."""

    image: Image.Image  # the model's input as a picture
    similarity: np.ndarray  # float [rows, columns], cosine of the sentence with each patch
    box: tuple[float, float, float, float]  # xyxy in input pixels


def patch_maps(store: FeatureStore, asked: Questions, regions: Sequence[int]) -> list[PatchMap]:
    """The similarity maps of a few sentences, rows of `asked.regions`, for a picture."""
    side = store.clip.image_size // store.clip.patch_size
    sentences = held(asked)
    similarities = store.similarities(asked.files, [sentences[index] for index in regions])
    boxes = input_boxes(store.clip, asked, regions)
    maps = []
    for index, similarity, box in zip(regions, similarities.numpy(), boxes.tolist(), strict=True):
        image = open_image(asked.paths[asked.regions.images[index]])
        maps.append(PatchMap(store.clip.view(*image.size).pixels(image), similarity.reshape(side, side), tuple(box)))
    return maps


def input_boxes(clip: Clip, asked: Questions, which: Sequence[int] | None = None) -> Tensor:
    """The boxes of some sentences, or of all, in pixels of the model's input: [s, 4]."""
    chosen = range(len(asked.regions.sentences)) if which is None else which
    found = [
        clip.view(*asked.files[asked.regions.images[row]].size).boxes(asked.regions.boxes[row : row + 1])[0] for row in chosen
    ]
    return torch.tensor(np.array(found).reshape(-1, 4), dtype=torch.float32)


def _scenes(dataset: Dataset, records: pd.DataFrame) -> np.ndarray | None:
    """The scene of each image, where the source draws some of them more than once."""
    if dataset.source not in STYLES:
        return None
    return pd.factorize(records.image_id.map(scene_of))[0].astype(np.int64)


def _objects(dataset: Dataset, records: pd.DataFrame) -> np.ndarray | None:
    """The number of objects in each image, where the source knows them."""
    if dataset.objects is None:
        return None
    counts = dataset.objects.image_id.value_counts()
    return records.image_id.map(counts).fillna(0).to_numpy(np.int64)


def _choices(dataset: Dataset, records: pd.DataFrame) -> Choices | None:
    """The choices about the images of the split."""
    mine = _asked(dataset, "choices", dataset.choices, records)
    if mine is None:
        return None
    foils = [list(found) for found in mine.foils]
    for image_id, suite, found in zip(mine.image_id, mine.suite, foils, strict=True):
        if not found:
            raise DataError(f"data set {dataset.name!r}, choices of {suite!r}, image_id {image_id!r}: no foil, expected one")
    return Choices(_crops(mine, records), _words(mine.suite), _words(mine.group), mine.caption.tolist(), foils)


def _labels(dataset: Dataset, records: pd.DataFrame) -> Labels | None:
    """The labels of the images of the split, and the classes of their suites."""
    mine = _asked(dataset, "labels", dataset.labels, records)
    if mine is None:
        return None
    nothing: Mapping[str, list[str]] = {"names": [], "templates": []}
    classes = {suite: dataset.classes.get(suite, nothing) for suite in mine.suite.unique()}
    for suite, found in classes.items():
        where = f"data set {dataset.name!r}, classes of {suite!r}"
        names = _checked_names(found, where)
        unknown = mine[(mine.suite == suite) & ~mine.label.isin(names)]
        if len(unknown):
            first = unknown.iloc[0]
            raise DataError(
                f"{where}: the label {first.label!r} of image_id {first.image_id!r} is none of its {len(names)} names"
            )
    return Labels(_crops(mine, records), _words(mine.suite), _words(mine.label), classes)


def _masks(dataset: Dataset, records: pd.DataFrame) -> Masks | None:
    """The masks of the images of the split, and the classes of their suites."""
    mine = _asked(dataset, "masks", dataset.masks, records)
    if mine is None:
        return None
    nothing: Mapping[str, list[Any]] = {"names": [], "templates": [], "values": [], "ignored": []}
    segments = {suite: dataset.segments.get(suite, nothing) for suite in mine.suite.unique()}
    for suite, found in segments.items():
        where = f"data set {dataset.name!r}, segments of {suite!r}"
        names, numbers = _checked_names(found, where), [*found["values"], *found["ignored"]]
        fit = len(names) == len(found["values"]) and len(set(numbers)) == len(numbers)
        if not fit or not all(isinstance(number, int) and 0 <= number < MOST for number in numbers):
            raise DataError(
                f"{where}: {len(names)} names, values {list(found['values'])[:5]}, ignored {list(found['ignored'])[:5]}: "
                "expected a number from 0 on for each name, and no number twice"
            )
    twice = mine[mine.duplicated(["image_id", "suite"])]
    if len(twice):
        first = twice.iloc[0]
        raise DataError(f"data set {dataset.name!r}: image_id {first.image_id!r} has two masks of the suite {first.suite!r}")
    rows = mine.image_id.map(pd.Series(records.index, index=records.image_id)).to_numpy(np.int64)
    paths = [dataset.path(path) for path in mine.mask_path]
    return Masks(rows, _words(mine.suite), paths, mine.content_hash.tolist(), segments)


def _checked_names(found: Mapping[str, Sequence[str]], where: str) -> Sequence[str]:
    """The names of a suite. Raises DataError for one that stands twice, and for templates that take no name."""
    names, templates = found["names"], found["templates"]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{where}: {repeated[0]!r} stands twice among the names; give the two classes different names")
    if not templates or any("{}" not in template for template in templates):
        raise DataError(f"{where}: templates {list(templates)}: expected one at least, each with {{}} for the name")
    return names


def _asked(dataset: Dataset, name: str, table: pd.DataFrame | None, records: pd.DataFrame) -> pd.DataFrame | None:
    """The rows of a table about the images of the split, None where there are none. Raises DataError for an image that is in
    no split."""
    if table is None:
        return None
    lost = table[~table.image_id.isin(dataset.records.image_id)]
    if len(lost):
        raise DataError(f"data set {dataset.name!r}, {name}: image_id {lost.iloc[0].image_id!r} is none of its records")
    mine = table[table.image_id.isin(records.image_id)]
    return mine if len(mine) else None


def _crops(mine: pd.DataFrame, records: pd.DataFrame) -> list[Crop]:
    """What each row shows: the row of its image, and the whole pixels that its box touches."""
    rows = mine.image_id.map(pd.Series(records.index, index=records.image_id)).to_numpy(np.int64)
    width, height = records.width.to_numpy(np.int64)[rows], records.height.to_numpy(np.int64)[rows]
    boxes = touched(mine[["x1", "y1", "x2", "y2"]].to_numpy(np.float64), width, height)  # [C, 4]
    whole = (boxes == np.stack([0 * width, 0 * height, width, height], 1)).all(1)
    return [
        (row, None if everything else (x1, y1, x2, y2))
        for row, everything, (x1, y1, x2, y2) in zip(rows.tolist(), whole.tolist(), boxes.tolist(), strict=True)
    ]


def _words(column: pd.Series) -> np.ndarray:
    return column.to_numpy(dtype=object)
