"""The picture sheet of FLISM: some local pairs as images with the chosen box and the sentence it was matched with."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd

from fast_goal.data.images import open_image
from fast_goal.data.records import Dataset
from fast_goal.files import atomic_path

COLUMNS = 4
THUMBNAIL = 480  # pixels of the long side; the sheet shows an image at about 400
# Okabe and Ito's palette, told apart in all common kinds of colour blindness; line styles say the same again
STYLES = {"detector": ("#D55E00", "solid"), "quadrant": ("#0072B2", "dashed"), "centre": ("#009E73", "dotted")}


def sheet(dataset: Dataset, pairs: pd.DataFrame, path: Path | str, count: int = 12) -> Path:
    """Draws `count` best pairs, spread evenly over the table so that none is picked for its looks, as PNG at `path`.

    Each image carries the chosen box (colour and line style by kind), and above it the kind, the similarity and the
    wrapped sentence. Returns the path. Raises ValueError if there is no pair.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    best = pairs[pairs["rank"] == 1]
    if best.empty or count < 1:
        raise ValueError(f"{len(best)} best pairs and count = {count}: nothing to draw")
    chosen = best.iloc[np.unique(np.linspace(0, len(best) - 1, min(count, len(best))).round().astype(int))]
    image_paths = dataset.records.set_index("image_id")["image_path"]
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 4.6 * rows), dpi=100, layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, pair in zip(axes, chosen.itertuples(), strict=False):
        image = open_image(dataset.path(image_paths[pair.image_id]))
        scale = min(1.0, THUMBNAIL / max(image.size))
        shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale)))) if scale < 1 else image
        # the extent is in pixels of the original, as the box is
        axis.imshow(
            np.asarray(shown),
            extent=(0, image.width, image.height, 0),
            interpolation="nearest" if scale == 1 else "antialiased",
        )
        colour, line = STYLES[pair.kind]
        corner, width, height = (pair.x1, pair.y1), pair.x2 - pair.x1, pair.y2 - pair.y1
        # a white line below the coloured one keeps it visible on any picture
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=5, clip_on=False))
        axis.add_patch(
            Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=2.5, linestyle=line, clip_on=False)
        )
        sentence = "\n".join(textwrap.wrap(pair.sentence, 46, max_lines=4, placeholder=" …"))
        # a sentence may hold a dollar sign, which is no formula
        axis.set_title(
            f"{pair.kind}  {pair.similarity:.3f}\n{sentence}", fontsize=10, loc="left", color="black", parse_math=False
        )
    path = Path(path)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return path
