"""The picture sheets of FLISM: the local pairs of a finished run (`sheet`), and all regions of some images (`region_sheet`).

Both draw from the tables REGIONS, PAIRS and SKIPPED. Boxes are in pixels of the original images.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.errors import DataError
from fast_goal.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

COLUMNS = 4
TILE = (4.2, 4.6)  # inches of an image with its title
DPI = 100
THUMBNAIL = 480  # pixels of the long side; the sheet shows an image at about 400
# Okabe and Ito's palette, told apart in all common kinds of colour blindness; line styles say the same again
STYLES = {"detector": ("#D55E00", "solid"), "quadrant": ("#0072B2", "dashed"), "centre": ("#009E73", "dotted")}
THIN, THICK, LABEL = 1.2, 3.0, 7.5  # line widths and the size of a detection's label, in points


def sheet(dataset: Dataset, pairs: pd.DataFrame, path: Path | str, count: int = 12) -> Path:
    """Draws `count` best pairs, spread evenly over the table so that none is picked for its looks, as PNG at `path`.

    Each image carries the chosen box (colour and line style by kind), and above it the kind, the similarity and the
    wrapped sentence. Returns the path. Raises ValueError if there is no pair.
    """
    best = pairs[pairs["rank"] == 1]
    if best.empty or count < 1:
        raise ValueError(f"{len(best)} best pairs and count = {count}: nothing to draw")
    chosen = best.iloc[spread(len(best), count)]
    image_paths = dataset.records.set_index("image_id")["image_path"]
    figure, axes = _grid(len(chosen))
    for axis, pair in zip(axes, chosen.itertuples(), strict=False):
        _show(axis, open_image(dataset.path(image_paths[pair.image_id])))
        _box(axis, pair, THICK)
        _title(axis, _headline(pair), pair.sentence)
    return _save(figure, path)


def region_sheet(
    dataset: Dataset,
    records: pd.DataFrame,
    regions: pd.DataFrame,
    pairs: pd.DataFrame,
    skipped: pd.DataFrame,
    path: Path | str,
    caption: str = "",
) -> Path:
    """Draws every image of `records` with all its regions, as PNG at `path`.

    Regions are thin (colour and line style by kind), detections with label and score; the region of the best pair is
    thick, and the title has its kind, the similarity and the sentence. An image that was skipped has the reason instead.
    `caption` stands above, a legend below. Returns the path. Raises ValueError if there is no record.
    """
    from matplotlib.lines import Line2D

    if records.empty:
        raise ValueError("no record: nothing to draw")
    of_image = dict(tuple(regions.groupby("image_id", sort=False)))
    best = {pair.image_id: pair for pair in pairs[pairs["rank"] == 1].itertuples()}
    problems = dict(zip(skipped["sample"], zip(skipped["reason"], skipped["detail"], strict=True), strict=True))
    figure, axes = _grid(len(records))
    for axis, record in zip(axes, records.itertuples(), strict=False):
        try:
            _show(axis, open_image(dataset.path(record)))
        except DataError:  # it is among the skipped ones, with the reason
            axis.set(xlim=(0, record.width), ylim=(record.height, 0), aspect="equal")
        winner = best.get(record.image_id)
        if winner is None:
            reason, detail = problems.get(record.image_id, ("no pair", ""))
            _title(axis, f"skipped: {reason}", f"{record.image_id}: {detail}")
            continue
        _regions(axis, of_image[record.image_id], winner, (record.width, record.height))
        _title(axis, _headline(winner), winner.sentence)
    handles = [Line2D([], [], color=colour, linestyle=line, linewidth=2) for colour, line in STYLES.values()]
    handles.append(Line2D([], [], color="black", linewidth=2 * THICK))
    figure.legend(
        handles,
        [*STYLES, "thick: the region that won"],
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=11,
    )
    if caption:
        width = round(COLUMNS * TILE[0] * 11)  # characters in a line
        figure.suptitle(textwrap.fill(caption, width), x=0.005, ha="left", fontsize=12, parse_math=False)
    return _save(figure, path)


def spread(length: int, count: int) -> np.ndarray:
    """The positions of `count` items spread evenly over `length` of them, ends included; all, where there are fewer."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(TILE[0] * COLUMNS, TILE[1] * rows), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for axis in axes:
        axis.set_axis_off()
        axis.set_anchor("NW")
    return figure, axes


def _save(figure: Figure, path: Path | str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return path


def _show(axis: Axes, image: Image.Image) -> None:
    scale = min(1.0, THUMBNAIL / max(image.size))
    shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale)))) if scale < 1 else image
    # the extent is in pixels of the original, as the boxes are
    axis.imshow(
        np.asarray(shown), extent=(0, image.width, image.height, 0), interpolation="nearest" if scale == 1 else "antialiased"
    )


def _regions(axis: Axes, regions: pd.DataFrame, winner: Any, size: tuple[int, int]) -> None:
    """All regions of one image, the winner last and thick, then the labels of the detections."""
    for region in regions.itertuples():
        if region.region_index != winner.region_index:
            _box(axis, region, THIN)
    _box(axis, winner, THICK)
    scale = THUMBNAIL / 1.2 / max(size)  # pixels of the sheet per pixel of the image, about
    taken: list[tuple[float, float, float, float]] = []
    detections = regions[regions["kind"] == "detector"]
    # the winner's label first: it gets the better place
    for region in detections.sort_values("region_index", key=lambda index: index != winner.region_index).itertuples():
        text = f"{region.label[:24]} {region.score:.2f}".strip()
        width, height = 0.62 * LABEL * len(text) * DPI / 72 / scale, 1.7 * LABEL * DPI / 72 / scale
        x, y = _place(region, width, height, size, taken)
        taken.append((x, y, x + width, y + height))
        axis.text(
            x + 0.2 * height,
            y + height / 2,
            text,
            va="center",
            fontsize=LABEL,
            color="white",
            fontweight="bold" if region.region_index == winner.region_index else "normal",
            bbox={"facecolor": STYLES["detector"][0], "edgecolor": "none", "pad": 1, "alpha": 0.85},
            parse_math=False,
        )


def _place(
    box: Any, width: float, height: float, size: tuple[int, int], taken: Sequence[tuple[float, ...]]
) -> tuple[float, float]:
    """A corner of the box where a label of this size meets no earlier one; the first corner where there is none."""
    corners = [(x, y) for y in (box.y1, box.y2 - height, box.y1 + height) for x in (box.x1, box.x2 - width)]
    corners = [(min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))) for x, y in corners]
    for x, y in corners:
        if not any(x < right and left < x + width and y < bottom and top < y + height for left, top, right, bottom in taken):
            return x, y
    return corners[0]


def _box(axis: Axes, box: Any, line_width: float) -> None:
    from matplotlib.patches import Rectangle

    colour, line = STYLES[box.kind]
    corner, width, height = (box.x1, box.y1), box.x2 - box.x1, box.y2 - box.y1
    thin = line_width == THIN
    # below the coloured line, a white one keeps it visible on any picture, and a faint one its colour where it has gaps
    lines = [("white", 2 * line_width, "solid", 0.5 if thin else 1), (colour, line_width, line, 1)]
    if not thin:
        lines.insert(1, (colour, line_width, "solid", 0.35))
    for edge, wide, style, alpha in lines:
        axis.add_patch(
            Rectangle(
                corner,
                width,
                height,
                fill=False,
                edgecolor=edge,
                linewidth=wide,
                linestyle=style,
                alpha=alpha,
                clip_on=False,
            )
        )


def _headline(pair: Any) -> str:
    return f"{pair.kind}  {pair.similarity:.3f}"


def _title(axis: Axes, headline: str, text: str) -> None:
    wrapped = "\n".join(textwrap.wrap(text, 46, max_lines=4, placeholder=" …"))
    # a sentence may hold a dollar sign, which is no formula
    axis.set_title(f"{headline}\n{wrapped}", fontsize=10, loc="left", color="black", parse_math=False)
