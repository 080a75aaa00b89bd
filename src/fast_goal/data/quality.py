"""What is wrong with a data set, as columns beside its tables: the facts that the expectations then judge.

A column named after a problem holds None where all is well and a readable sentence where not, so that a report can
print the cell as it is. Every table starts with `row`, the row's number in its parquet file.

Boxes are float pixels of the original image, x2 and y2 exclusive.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fast_goal.data.caption_checks import count_words, quote, sample_rows, texts_of
from fast_goal.data.images import open_image
from fast_goal.data.records import UNNAMED, Dataset
from fast_goal.errors import DataError
from fast_goal.progress import Progress

TRAINING_SPLITS = ("pretrain", "train")  # whose pixels a model has seen before it is measured
LONG_SPLITS = ("train", "val", "test")  # whose images need a long caption
SHORT_SPLIT = "train"  # whose images need a short caption where that is trained on; elsewhere one without asks nothing
KINDS = ("detector", "quadrant", "centre")
BOX = ["x1", "y1", "x2", "y2"]
TOLERANCE = 1e-3  # pixels: boxes pass through float32
MEAN_TOLERANCE = 0.05  # fraction: publications round, and count words differently
ODD_AREA = 6.0  # robust standard deviations; a guess: photographs of mixed origin stay within 4


@dataclass(frozen=True)
class Subject:
    """A data set with what FLISM made of it.

    regions and pairs are None where FLISM does not run on the data set; `skipped` joins the samples that the download
    and FLISM left out; `flism_splits` are the splits FLISM was asked for; `trained_captions` the captions that are trained on,
    long or short: none where the data set is only for evaluation.
    """

    dataset: Dataset
    regions: pd.DataFrame | None
    pairs: pd.DataFrame | None
    skipped: pd.DataFrame
    flism_splits: tuple[str, ...] = ()
    trained_captions: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.dataset.name

    @property
    def has_long_captions(self) -> bool:
        """Whether any image has a long caption."""
        return bool(self.dataset.records["long_caption"].fillna("").str.strip().ne("").any())

    @property
    def needs_long_captions(self) -> bool:
        """Whether its long captions have to be sound: they are trained on, or only evaluated on."""
        return "long" in self.trained_captions or (not self.trained_captions and self.has_long_captions)

    @property
    def skipped_share(self) -> float:
        """Fraction of all samples that some step left out; a sample with several bad rows counts once.

        What the download says of a sample that it kept, such as a caption given twice, is no loss; nor is a file in the
        folder that the table of captions does not name.
        """
        known = set(self.dataset.records["image_id"])
        kept = (self.skipped["step"] == "download") & self.skipped["sample"].isin(known) | (self.skipped["reason"] == UNNAMED)
        lost = set(self.skipped.loc[~kept, "sample"])
        return len(lost) / max(len(known | lost), 1)


def inspect_images(dataset: Dataset, most: int | None = None, seed: int = 0, workers: int | None = None) -> pd.DataFrame:
    """Looks up every file, and decodes the images in full, in threads; of more than `most` images a random sample of
    `most` (None: all).

    Returns, in the order of the records, the columns `missing_file`, `undecodable` and `wrong_size` (the file's size
    after EXIF rotation against `width` and `height`), at most one of them filled, and `decoded`: whether it was tried.
    """
    records = dataset.records
    paths, widths, heights = records["image_path"].tolist(), records["width"].tolist(), records["height"].tolist()
    columns = {name: np.full(len(records), None, dtype=object) for name in ("missing_file", "undecodable", "wrong_size")}
    for row, path in enumerate(paths):
        try:
            entry = dataset.path(path).stat()
        except OSError:
            columns["missing_file"][row] = f"no file {path}"
            continue
        if not stat.S_ISREG(entry.st_mode):
            columns["missing_file"][row] = f"no file {path}"
        elif entry.st_size == 0:
            columns["undecodable"][row] = "the file is empty (0 bytes)"
    chosen = sample_rows(len(records), len(records) if most is None else most, seed)
    decoded = np.zeros(len(records), dtype=bool)
    decoded[chosen] = True

    def decode(row: int) -> tuple[int, str | None, str | None]:
        file = dataset.path(paths[row])
        try:
            size = open_image(file).size
        except DataError as error:
            return row, str(error).removeprefix(f"{file}: "), None
        if size != (widths[row], heights[row]):
            return row, None, f"the file has {size[0]} x {size[1]} pixels, the table {widths[row]} x {heights[row]}"
        return row, None, None

    there = [row for row in chosen.tolist() if columns["missing_file"][row] is None]
    with (
        Progress(f"validate {dataset.name}", len(there), "images") as progress,
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
    ):
        for row, undecodable, wrong_size in pool.map(decode, there):
            columns["undecodable"][row], columns["wrong_size"][row] = undecodable, wrong_size
            progress.update()
    texts = {name: pd.Series(column, dtype=object) for name, column in columns.items()}
    return pd.DataFrame({**texts, "decoded": decoded})


def outlier_columns(records: pd.DataFrame, max_aspect: float, image_size: int | None) -> pd.DataFrame:
    """The images of unusual size or shape, a column of problems each: `small_image` (than the model's input, `image_size`
    pixels; not there where that is None), `long_shape` and `odd_area`.

    An area is odd beyond `ODD_AREA` robust standard deviations of the logarithm of the areas, which are the median
    distance from the median times 1.4826; where most images have one size nothing is odd.
    """
    width, height = (records[side].to_numpy(dtype=float) for side in ("width", "height"))
    columns = {}
    if image_size is not None:
        small = np.minimum(width, height) < image_size
        columns["small_image"] = _describe(
            small, lambda i: f"{width[i]:g} x {height[i]:g} pixels, enlarged to {image_size} for the model"
        )
    shape = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
    columns["long_shape"] = _describe(
        shape > max_aspect, lambda i: f"{width[i]:g} x {height[i]:g} pixels: one side is {shape[i]:.1f} times the other"
    )
    area = np.log(np.maximum(width * height, 1))
    middle = np.median(area) if len(area) else 0.0
    spread = 1.4826 * np.median(np.abs(area - middle)) if len(area) else 0.0
    score = (area - middle) / spread if spread > 0 else np.zeros(len(area))
    columns["odd_area"] = _describe(
        np.abs(score) > ODD_AREA,
        lambda i: f"{width[i]:g} x {height[i]:g} pixels, {np.exp(area[i] - middle):.3g} times the median area",
    )
    return pd.DataFrame(columns)


def fact_columns(subject: Subject, top_k: int) -> pd.DataFrame:
    """What is published of every image against the tables: `wrong_captions` (short captions) and `wrong_pairs`, of the
    images that FLISM was asked for. Only the columns for which something is published. `top_k`: the pairs FLISM keeps of
    an image, which may be more than the publication's."""
    facts, records = subject.dataset.facts or {}, subject.dataset.records
    columns = {}
    if (captions := facts.get("captions")) is not None:
        found = records["captions"].map(len).to_numpy()
        columns["wrong_captions"] = _describe(
            found != captions, lambda i: f"{found[i]} short captions, published are {captions}"
        )
    if (pairs := facts.get("pairs")) is not None and subject.pairs is not None:
        count = records["image_id"].map(subject.pairs["image_id"].value_counts()).fillna(0).to_numpy(dtype=int)
        left_out = subject.skipped.loc[subject.skipped["step"] == "flism", "sample"]
        asked = records["split"].isin(subject.flism_splits).to_numpy() & ~_is_in(records["image_id"], left_out)
        wrong = asked & ((count < pairs) | (count > max(pairs, top_k)))
        columns["wrong_pairs"] = _describe(wrong, lambda i: f"{count[i]} local pairs, published are {pairs}")
    return pd.DataFrame(columns, index=pd.RangeIndex(len(records)))


def facts_table(dataset: Dataset, words: np.ndarray) -> pd.DataFrame:
    """What is published about the data set as a whole against what was found.

    Columns: `row`, `fact`, `published`, `found`, and the problems `wrong_count` and `wrong_mean` (of the words of the long
    captions, by more than `MEAN_TOLERANCE`). Samples are counted before anything is left out, under the publication's own
    names; where the source does not count them, the records of our splits are. `all` is their sum. `words`: of each long
    caption.
    """
    facts, records = dataset.facts or {}, dataset.records
    found = dict(dataset.published) or records["split"].value_counts().to_dict()
    found.setdefault("all", sum(found.values()))
    rows: list[dict[str, object]] = []
    for name, published in facts.get("counts", {}).items():
        here = int(found.get(name, 0))
        problem = f"{here:,} samples, published are {published:,}" if here != published else None
        rows.append({"fact": f"samples of {name}", "published": published, "found": here, "wrong_count": problem})
    if (published := facts.get("mean_words")) is not None:
        mean = float(words[words > 0].mean()) if (words > 0).any() else 0.0
        off = abs(mean - published) > MEAN_TOLERANCE * published
        problem = f"{mean:.1f} words, published are {published:g}" if off else None
        rows.append({"fact": "mean words of the long captions", "published": published, "found": round(mean, 1)})
        rows[-1]["wrong_mean"] = problem
    table = pd.DataFrame(rows, columns=["fact", "published", "found", "wrong_count", "wrong_mean"])
    table[["wrong_count", "wrong_mean"]] = (
        table[["wrong_count", "wrong_mean"]].astype(object).where(lambda cell: cell.notna(), None)
    )
    table.insert(0, "row", np.arange(len(table)))
    return table


def records_table(
    subject: Subject, images: pd.DataFrame, trained_on: Sequence[Dataset], words: np.ndarray | None = None
) -> pd.DataFrame:
    """The records with their problems; `images` comes from `inspect_images`, `trained_on` are the training data sets, `words`
    counts those of each long caption, where that was done already.

    Ids are compared with the training images only within one data set: two data sets may both number from 1. The
    bytes of the files are compared in any case. `has_pair` is 'yes' or 'no', None for an image FLISM was not asked for.
    """
    records = subject.dataset.records
    table = pd.DataFrame({"row": np.arange(len(records))})
    for column in ("image_id", "image_path", "split"):
        table[column] = records[column].to_numpy()
    table = table.join(images)
    words = count_words(texts_of(records)) if words is None else words
    needs_long = records["split"].isin(LONG_SPLITS).to_numpy() & subject.has_long_captions
    table["no_long_caption"] = _text(needs_long & (words == 0), "the long caption is empty")
    if "short" in subject.trained_captions:
        mute = np.fromiter((not any(text.strip() for text in texts) for texts in records["captions"]), bool, len(records))
        needs_short = (records["split"] == SHORT_SPLIT).to_numpy()
        table["no_short_caption"] = _text(needs_short & mute, "there is no short caption")
    table["long_words"] = np.where(words > 0, words, np.nan)

    own = [data for data in trained_on if data.name == subject.name]
    held_out = (records["split"] == "test").to_numpy() | (not own)
    validation = (records["split"] == "val").to_numpy() & bool(own)
    table["id_in_training"] = _leaks(records, own, "image_id", held_out)
    table["bytes_in_training"] = _leaks(records, trained_on, "content_hash", held_out)
    table["validation_in_training"] = _leaks(records, trained_on, "content_hash", validation)

    asked = records["split"].isin(subject.flism_splits).to_numpy()
    if subject.regions is not None and subject.pairs is not None:
        left_out = _is_in(records["image_id"], subject.skipped["sample"])
        bare = asked & ~left_out & ~_is_in(records["image_id"], subject.regions["image_id"])
        table["no_regions"] = _text(bare, "the regions table has no row for it")
        paired = _is_in(records["image_id"], subject.pairs["image_id"])
        table["has_pair"] = pd.Series(np.where(asked, np.where(paired, "yes", "no"), None), dtype=object)
    table["skipped_share"] = subject.skipped_share
    return table


def regions_table(subject: Subject) -> pd.DataFrame:
    """The regions with their problems."""
    regions, records = subject.regions, subject.dataset.records
    table = _numbered(regions, ["image_id", "region_index", *BOX, "kind", "score"])
    table["incomplete"] = _incomplete(regions, ["image_id", "region_index", *BOX, "kind", "score"])
    table["unknown_image"] = _unknown(regions, records)
    sizes = records.drop_duplicates("image_id").set_index("image_id")
    width, height = (regions["image_id"].map(sizes[side]).to_numpy(dtype=float) for side in ("width", "height"))
    x1, y1, x2, y2 = (regions[column].to_numpy(dtype=float) for column in BOX)
    outside = (x1 < -TOLERANCE) | (y1 < -TOLERANCE) | (x2 > width + TOLERANCE) | (y2 > height + TOLERANCE)
    table["outside"] = _describe(
        outside, lambda i: f"box ({x1[i]:g}, {y1[i]:g}, {x2[i]:g}, {y2[i]:g}) in an image of {width[i]:g} x {height[i]:g}"
    )
    table["no_area"] = _describe((x2 <= x1) | (y2 <= y1), lambda i: f"box ({x1[i]:g}, {y1[i]:g}, {x2[i]:g}, {y2[i]:g})")
    return table


def pairs_table(subject: Subject) -> pd.DataFrame:
    """The pairs with their problems."""
    pairs, records = subject.pairs, subject.dataset.records
    columns = ["image_id", "rank", "sentence_index", "sentence", "char_start", "char_end", "region_index", *BOX, "similarity"]
    table = _numbered(pairs, ["image_id", "rank", "sentence", "similarity"])
    table["incomplete"] = _incomplete(pairs, columns)
    table["unknown_image"] = _unknown(pairs, records)
    table["not_the_span"] = _not_the_span(pairs, records)

    best = (pairs["rank"] == 1).groupby(pairs["image_id"]).transform("sum").to_numpy()
    table["not_one_best"] = _describe(best != 1, lambda i: f"the image has {best[i]} pairs of rank 1")

    rank = pairs["rank"].to_numpy()
    alike = pairs.groupby(["image_id", "rank"])["rank"].transform("size").to_numpy()
    present = pd.MultiIndex.from_arrays([pairs["image_id"], pairs["rank"]])
    before = pd.MultiIndex.from_arrays([pairs["image_id"], pairs["rank"] - 1]).isin(present)
    table["rank_gap"] = _describe(
        (rank != 1) & ((alike != 1) | ~before),
        lambda i: f"rank {rank[i]} " + (f"occurs {alike[i]} times" if alike[i] != 1 else f"without a rank {rank[i] - 1}"),
    )
    table["not_the_region"] = _not_the_region(pairs, subject.regions)
    return table


def _not_the_span(pairs: pd.DataFrame, records: pd.DataFrame) -> pd.Series:
    captions = dict(zip(records["image_id"], records["long_caption"].fillna(""), strict=True))
    problems: list[str | None] = []
    columns = (pairs[name].tolist() for name in ("image_id", "sentence", "char_start", "char_end"))
    for image_id, sentence, start, end in zip(*columns, strict=True):
        caption = captions.get(image_id)
        if caption is None or pd.isna(start) or pd.isna(end):  # told by `unknown_image` and `incomplete`
            problems.append(None)
            continue
        span = caption[int(start) : int(end)] if 0 <= start < end else ""
        problem = f"the caption's characters {start} to {end} are {quote(span)}, the sentence is {quote(sentence)}"
        problems.append(None if span and span == sentence else problem)
    return pd.Series(problems, dtype=object)


def _not_the_region(pairs: pd.DataFrame, regions: pd.DataFrame) -> pd.Series:
    key = ["image_id", "region_index"]
    wanted = pairs[key].merge(regions.drop_duplicates(key)[[*key, *BOX, "kind"]], on=key, how="left")
    boxes, expected = pairs[BOX].to_numpy(dtype=float), wanted[BOX].to_numpy(dtype=float)
    absent = wanted["kind"].isna().to_numpy()
    moved = (np.abs(boxes - expected) > TOLERANCE).any(axis=1)
    other_kind = (pairs["kind"].to_numpy() != wanted["kind"].to_numpy()) & ~absent
    index = pairs["region_index"].to_numpy()

    def problem(i: int) -> str:
        if absent[i]:
            return f"the image has no region {index[i]}"
        box, true = (", ".join(f"{value:g}" for value in values[i]) for values in (boxes, expected))
        return f"{pairs['kind'].iloc[i]} box ({box}), but region {index[i]} is {wanted['kind'].iloc[i]} ({true})"

    return _describe(absent | moved | other_kind, problem)


def _leaks(records: pd.DataFrame, trained_on: Sequence[Dataset], key: str, asked: np.ndarray) -> pd.Series:
    """For the rows `asked`: the first training image with the same `key`; an empty key is equal to nothing."""
    first: dict[str, tuple[Dataset, int]] = {}
    for data in reversed(trained_on):
        keys = data.records.loc[data.records["split"].isin(TRAINING_SPLITS), key].fillna("")
        first.update(zip(reversed(keys.tolist()), ((data, row) for row in reversed(keys.index)), strict=True))
    first.pop("", None)
    found = [first.get(value) for value in records[key].tolist()]

    def problem(i: int) -> str:
        data, place = found[i]
        row = data.records.loc[place]
        return f"the same {key} as image {row['image_id']!r} of split {row['split']} of {data.name} (row {place})"

    return _describe(asked & np.array([one is not None for one in found], dtype=bool), problem)


def _is_in(values: pd.Series, known: pd.Series) -> np.ndarray:
    """Which of the values are known; for texts faster than `isin`."""
    texts = set(known.tolist())
    return np.fromiter((value in texts for value in values.tolist()), dtype=bool, count=len(values))


def _numbered(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    table = frame[columns].reset_index(drop=True)
    table.insert(0, "row", np.arange(len(frame)))
    return table


def _incomplete(frame: pd.DataFrame, columns: list[str]) -> pd.Series:
    empty = frame[columns].isna().to_numpy()
    return _describe(empty.any(axis=1), lambda i: "no value in " + ", ".join(np.array(columns)[empty[i]]))


def _unknown(frame: pd.DataFrame, records: pd.DataFrame) -> pd.Series:
    return _text(~_is_in(frame["image_id"], records["image_id"]), "no such image in the records")


def _text(wrong: np.ndarray, problem: str) -> pd.Series:
    return _describe(wrong, lambda _: problem)


def _describe(wrong: np.ndarray, problem: Callable[[int], str]) -> pd.Series:
    column = np.full(len(wrong), None, dtype=object)
    for index in np.flatnonzero(wrong):
        column[index] = problem(index)
    return pd.Series(column, dtype=object)
