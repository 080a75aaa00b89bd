"""The pictures of the data card: lengths, places of the boxes, examples, near-duplicates.

Each is a PNG and the same for the same data. The colours are Paul Tol's, which the colour-blind tell apart.

Letters: P pairs, G cells of the grid along a side.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fast_goal.data.caption_checks import CaptionLengths, sample_rows
from fast_goal.data.images import open_image
from fast_goal.data.quality import BOX, KINDS, Subject
from fast_goal.data.records import Dataset
from fast_goal.errors import DataError
from fast_goal.files import atomic_path

BLUE, RED, GREEN, GREY = "#4477aa", "#cc6677", "#117733", "#555555"
GRID = 64
EXAMPLES = 4
CLOSEST = 8  # near-duplicates shown
LINE = 88  # characters of a caption in a line
LONGEST = 14  # lines of a caption


def draw_lengths(lengths: CaptionLengths, name: str, path: Path) -> None:
    """The histograms of the long captions' lengths in words and in tokens, with the text contexts."""
    figure = _figure(10, 3.4)
    words, tokens = figure.subplots(1, 2)
    words.hist(lengths.words, bins=_bins(int(lengths.words.max())), color=BLUE)
    mean = float(lengths.words.mean())
    words.axvline(mean, color=RED, linestyle="--", label=f"mean {mean:.0f}")
    words.set(title=f"words of {len(lengths.words):,} captions", xlabel="words", ylabel="captions")
    longest = max(int(lengths.tokens.max()), lengths.contexts[0])
    tokens.hist(lengths.tokens, bins=_bins(longest), color=BLUE)
    for context, colour, line in zip(lengths.contexts, (RED, GREEN), ("--", "-."), strict=False):
        if context <= longest:
            share = np.mean(lengths.tokens > context)
            tokens.axvline(context, color=colour, linestyle=line, label=f"{share:.1%} are longer than {context}")
    tokens.set(title=f"tokens of {len(lengths.tokens):,} captions", xlabel="tokens, with start and end", ylabel="captions")
    for axes in (words, tokens):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
        axes.legend(framealpha=1, edgecolor="none", loc="upper right")
    figure.suptitle(f"{name}: length of the long captions")
    _save(figure, path)


def box_density(pairs: pd.DataFrame, records: pd.DataFrame) -> np.ndarray:
    """For each cell of a grid laid over the images, the fraction of the pairs whose box covers its centre: [G, G]."""
    sizes = records.drop_duplicates("image_id").set_index("image_id")
    sides = [pairs["image_id"].map(sizes[side]).to_numpy(dtype=float) for side in ("width", "height")]
    x1, y1, x2, y2 = (pairs[column].to_numpy(dtype=float) / sides[number % 2] for number, column in enumerate(BOX))
    left, top, right, bottom = (
        np.clip(np.nan_to_num(np.ceil(value * GRID - 0.5)), 0, GRID).astype(int) for value in (x1, y1, x2, y2)
    )
    steps = np.zeros((GRID + 1, GRID + 1))
    for rows, columns, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(steps, (rows, columns), sign)
    return steps.cumsum(axis=0).cumsum(axis=1)[:GRID, :GRID] / max(len(pairs), 1)


def draw_boxes(subject: Subject, path: Path) -> None:
    """Where the boxes of the local pairs lie, all together and by kind, each image stretched to a square."""
    pairs, records = subject.pairs, subject.dataset.records
    kinds = [kind for kind in KINDS if (pairs["kind"] == kind).any()]
    parts = [("all kinds", pairs), *((kind, pairs[pairs["kind"] == kind]) for kind in kinds)]
    figure = _figure(2.9 * len(parts), 3)
    for axes, (title, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        density = box_density(part, records)
        picture = axes.imshow(density, cmap="cividis", vmin=0, vmax=max(1e-9, density.max()), extent=(0, 1, 1, 0))
        axes.set_title(f"{title}: {len(part):,} pairs", fontsize=10)
        axes.set_xticks([0, 0.5, 1], ["left", "", "right"])
        axes.set_yticks([0, 0.5, 1], ["top", "", "bottom"])
        bar = figure.colorbar(picture, ax=axes, shrink=0.75, format=lambda value, _: f"{value:.0%}")
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(f"{subject.name}: share of the local pairs whose box covers the place")
    _save(figure, path)


def draw_examples(subject: Subject, seed: int, path: Path) -> bool:
    """Some images with their captions and the box and sentence of their best local pair. False where none can be read."""
    dataset, pairs = subject.dataset, subject.pairs
    records = dataset.records[dataset.records["long_caption"].fillna("").str.strip().ne("")]
    if pairs is not None and len(pairs):
        best = pairs[pairs["rank"] == 1].drop_duplicates("image_id").set_index("image_id")
        records = records[records["image_id"].isin(best.index)]
    shown = []
    for place in sample_rows(len(records), 3 * EXAMPLES, seed):  # some may be unreadable
        record = records.iloc[place]
        try:
            shown.append((record, _thumbnail(dataset, record["image_path"], 480)))
        except DataError:
            continue
        if len(shown) == EXAMPLES:
            break
    if not shown:
        return False
    figure = _figure(11, 2.9 * len(shown))
    for (left, right), (record, image) in zip(_rows(figure, len(shown)), shown, strict=True):
        _show(left, image)
        caption = textwrap.wrap(record["long_caption"], LINE)
        lines = [*caption[:LONGEST], *(["…"] if len(caption) > LONGEST else [])]
        right.text(0, 1, f"{record['image_id']} ({record['split']})", va="top", fontsize=9, color=GREY)
        right.text(0, 0.91, "\n".join(lines), va="top", fontsize=9, linespacing=1.3, parse_math=False)
        if pairs is None or not len(pairs):
            continue
        pair = best.loc[record["image_id"]]
        factor = image.shape[1] / record["width"]
        x1, y1, x2, y2 = (float(pair[column]) * factor for column in BOX)
        left.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="white", linewidth=4)
        left.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=RED, linewidth=2)
        words = textwrap.wrap(f"{pair['kind']}, {pair['similarity']:.2f}: {pair['sentence']}", LINE)[:3]
        right.text(0, 0, "\n".join(words), va="bottom", fontsize=9, color="#882255", parse_math=False)
    figure.suptitle(
        f"{subject.name}: examples, drawn at random, with their best local pair" if pairs is not None else subject.name
    )
    _save(figure, path)
    return True


def draw_near_duplicates(dataset: Dataset, near: pd.DataFrame, origins: Mapping[str, Dataset], path: Path) -> bool:
    """The closest near-duplicates side by side, those across splits first. False where none can be read."""
    near = near.assign(across=near["where"] == "training", pair=_unordered(near))
    near = near.sort_values(["across", "distance", "row"], ascending=[False, True, True]).drop_duplicates(["where", "pair"])
    shown = []
    for link in near.head(3 * CLOSEST).itertuples():
        other = origins[link.origin] if link.across else dataset
        try:
            images = [
                _thumbnail(data, data.records["image_path"].iloc[row], 240)
                for data, row in ((dataset, link.row), (other, link.other))
            ]
        except DataError:
            continue
        titles = [
            "{} ({})".format(*data.records[["image_id", "split"]].iloc[row])
            for data, row in ((dataset, link.row), (other, link.other))
        ]
        shown.append((images, titles, f"{link.distance} of 64 bits differ", link.across))
        if len(shown) == CLOSEST:
            break
    if not shown:
        return False
    rows = (len(shown) + 1) // 2
    figure = _figure(11, 2.3 * rows + 0.4)
    grid = figure.subplots(rows, 4, squeeze=False).reshape(-1, 2)
    for axes in grid.flat:
        axes.set_axis_off()
    for (left, right), (images, titles, distance, across) in zip(grid, shown, strict=False):
        for axes, image, title in zip((left, right), images, titles, strict=True):
            _show(axes, image)
            axes.set_title(textwrap.shorten(title, 34, placeholder="…"), fontsize=8)
        words = f"{distance}, {'across splits' if across else 'in one split'}"
        left.text(0, -0.04, words, transform=left.transAxes, va="top", fontsize=8, color=RED if across else GREY)
    figure.suptitle(f"{dataset.name}: the closest near-duplicates")
    _save(figure, path)
    return True


def _unordered(near: pd.DataFrame) -> list[tuple[int, int]]:
    """The pair of rows in any order, within a split; across data sets the order is kept."""
    rows = zip(near["row"], near["other"], near["where"], strict=True)
    return [(row, other) if where == "training" else (min(row, other), max(row, other)) for row, other, where in rows]


def _bins(longest: int) -> np.ndarray:
    return np.linspace(0, longest + 1, min(50, longest + 1) + 1)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _rows(figure: Any, count: int) -> Sequence[Sequence[Any]]:
    grid = figure.subplots(count, 2, squeeze=False, width_ratios=[1, 1.75])
    for axes in grid.flat:
        axes.set_axis_off()
    return grid


def _show(axes: Any, image: np.ndarray) -> None:
    axes.imshow(image)
    axes.set(xlim=(0, image.shape[1]), ylim=(image.shape[0], 0))


def _thumbnail(dataset: Dataset, image_path: str, side: int) -> np.ndarray:
    image = open_image(dataset.path(image_path))
    image.thumbnail((side, side))
    return np.asarray(image)


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
