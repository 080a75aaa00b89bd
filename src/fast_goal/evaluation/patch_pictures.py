"""The pictures of what a text finds in an image, patch by patch: text-conditioned pooling, its attention, and segmentation.

Drawn as those of `pictures` are. A map of attention begins at 0 (dark) and ends at its own largest weight (light), so that maps
show where a text looks, and the words beneath them how much.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fast_goal.data.masks import IGNORED
from fast_goal.evaluation.comparison import MODELS
from fast_goal.evaluation.headline import MODES
from fast_goal.evaluation.pictures import (
    BLUE,
    DIRECTION_LABELS,
    GREEN,
    LABELS,
    ORANGE,
    figure_of,
    k_axis,
    save,
    shorten,
    styled,
)
from fast_goal.evaluation.retrieval import DIRECTIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Tol's "muted" colours, which people with any colour vision can tell apart; the names stand on the areas all the same
CLASS_COLOURS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
GROUND = 0.8  # the grey of what has no class
LINES: dict[str, dict[str, Any]] = {
    "global": {"color": ORANGE, "linestyle": "--", "marker": "s"},
    "conditioned": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "rerank": {"color": GREEN, "linestyle": "-.", "marker": "^"},
}
NAMED = 0.02  # share of a picture that a class must have to be named there, a guess

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Look:
    """Where one text looks in one image, or which patches are like it."""

    image: Image.Image  # the model's input as a picture
    grid: np.ndarray  # float [rows, columns]: weights of the pooling, or cosines
    box: Box | None  # of what the text speaks of, xyxy in input pixels

    @property
    def best(self) -> tuple[float, float]:
        """The centre of the patch with the largest number, x and y in input pixels."""
        row, column = np.unravel_index(self.grid.argmax(), self.grid.shape)
        width, height = self.image.size
        return (column + 0.5) * width / self.grid.shape[1], (row + 0.5) * height / self.grid.shape[0]

    @property
    def hit(self) -> bool | None:
        """Whether that centre lies in the box, None without a box."""
        if self.box is None:
            return None
        (x, y), (left, top, right, bottom) = self.best, self.box
        return bool(left <= x < right and top <= y < bottom)


@dataclass(frozen=True)
class Attention:
    """A text, what it takes from the patches of the image it speaks of, and which of them are like it to each model."""

    text: str
    attention: Look
    similarity: dict[str, Look]  # model -> its cosines
    words: dict[str, Look]  # word or phrase of the text -> where it looks when it asks alone


@dataclass(frozen=True)
class Segmented:
    """An image and what each model makes of its pixels. Class numbers int [H, W], IGNORED where no class is told."""

    image: Image.Image
    truth: np.ndarray
    found: dict[str, np.ndarray]  # by model


@styled
def draw_modes(asked: Mapping[str, Mapping[str, Any]], ks: Sequence[int], name: str, path: Path) -> None:
    """Draws recall@k of the fine-tuned model in each mode, a row for each kind of query and a panel for each direction.

    asked: as the task `conditioned` measures them, by kind.
    """
    figure, axes = figure_of(len(asked), 2, (9, 0.6 + 3.1 * len(asked)), sharey=True)
    for row, (kind, found) in zip(axes, asked.items(), strict=True):
        for panel, direction in zip(row, DIRECTIONS, strict=True):
            for mode in MODES:
                panel.plot(range(len(ks)), [found[mode][direction][f"R@{k}"] for k in ks], label=mode, **LINES[mode])
            k_axis(panel, ks, f"{kind}, {DIRECTION_LABELS[direction]}", "Recall at k (%)" if panel is row[0] else "")
    axes[0, 0].legend(frameon=False, loc="best")
    figure.suptitle(f"The fine-tuned model asked in its three modes ({name})", fontsize=13)
    save(figure, path)


@styled
def draw_attention(examples: Sequence[Attention], path: Path) -> None:
    """Draws for each text the image with the box, the attention of the pooling, and the cosines of both models' patches."""
    figure, axes = figure_of(len(examples), 5, (13.2, 2.85 * len(examples) + 0.3), widths=[0.9, 1, 1, 1, 1])
    for row, example in zip(axes, examples, strict=True):
        _write(row[0], example.text, 24, 30)
        _show(row[1], example.attention.image, example.attention.box)
        row[1].set_title("the image" if example.attention.box is None else "what it speaks of", fontsize=11)
        _draw_attention(row[2], example.attention, "attention of the pooling")
        for panel, model in zip(row[3:], reversed(MODELS), strict=True):
            look = example.similarity[model]
            _draw_look(panel, look, look.grid.min())
            panel.set_title(f"{LABELS[model]}: cosine of patches", fontsize=11)
            panel.set_xlabel(f"{look.grid.min():.2f} (dark) to {look.grid.max():.2f} (light)", fontsize=9)
    figure.suptitle("Where a text looks, and which patches are like it", fontsize=13)
    save(figure, path)


@styled
def draw_words(examples: Sequence[Attention], path: Path) -> None:
    """Draws for each text where it looks as a whole, and where its words look when they ask alone."""
    most = max(len(example.words) for example in examples)
    size = (1.95 * (most + 2.1), 2.75 * len(examples) + 0.3)
    figure, axes = figure_of(len(examples), most + 2, size, widths=[1.1, *[1] * (most + 1)])
    for row, example in zip(axes, examples, strict=True):
        _write(row[0], example.text, 20, 24)
        _draw_attention(row[1], example.attention, "all of it")
        for panel in row[2:]:
            panel.axis("off")
        for panel, (word, look) in zip(row[2:], example.words.items(), strict=False):
            panel.axis("on")
            shown = textwrap.shorten(word, 40, placeholder=" …")
            _draw_attention(panel, look, textwrap.fill(f"“{shown}”", 22))
    figure.suptitle("Where a text looks, and where its words look when they ask alone", fontsize=13)
    save(figure, path)


@styled
def draw_segmentation(examples: Sequence[Segmented], names: Sequence[str], title: str, path: Path) -> None:
    """Draws for each image the true classes of its pixels and those that each model finds, named where they are large.

    A class has one colour within a row; with more classes in an image than CLASS_COLOURS, the smallest share some. Where all
    names are those of colours, they are drawn in these.
    """
    figure, axes = figure_of(len(examples), 2 + len(MODELS), (11, 2.9 * len(examples) + 0.4))
    for row, example in zip(axes, examples, strict=True):
        row[0].imshow(np.asarray(example.image))
        row[0].set_title("image", fontsize=11)
        scored = example.truth != IGNORED
        colours = _colours(example, names)
        _draw_classes(row[1], example.truth, names, colours)
        row[1].set_title("truth", fontsize=11)
        for panel, model in zip(row[2:], MODELS, strict=True):
            found = example.found[model]
            # what does not count stays pale: a model has to name a class there too, and nobody asks whether it is right
            _draw_classes(panel, found, names, colours, scored)
            seen = scored & (found != IGNORED)
            right = f"{100 * (found == example.truth)[seen].mean():.0f} % right" if seen.any() else "nothing of it is seen"
            panel.set_title(f"{LABELS[model]}: {right}", fontsize=11)
        for panel in row:
            _bare(panel)
    figure.suptitle(title, fontsize=13)
    save(figure, path)


def _draw_attention(panel: Axes, look: Look, title: str) -> None:
    _draw_look(panel, look, 0.0)
    panel.set_title(title, fontsize=11)
    told = f"at most {_percent(look.grid.max())} on a patch\n{_percent(1 - look.grid.sum())} nowhere"
    panel.set_xlabel(told, fontsize=9)


def _draw_look(panel: Axes, look: Look, low: float) -> None:
    """A map over the image in grey, with a mark on the patch of the largest number."""
    from matplotlib.patheffects import withStroke

    _show(panel, look.image.convert("L").convert("RGB"), look.box)  # the colours belong to the map
    width, height = look.image.size
    extent = (0, width, height, 0)
    high = max(float(look.grid.max()), low + 1e-9)
    panel.imshow(look.grid, cmap="viridis", alpha=0.6, extent=extent, interpolation="nearest", vmin=low, vmax=high)
    mark = {None: "○", True: "✓", False: "✗"}[look.hit]
    effects = [withStroke(linewidth=3, foreground="black")]
    panel.text(*look.best, mark, ha="center", va="center", fontsize=17, color="white", path_effects=effects)


def _show(panel: Axes, image: Image.Image, box: Box | None) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    width, height = image.size
    panel.imshow(np.asarray(image), extent=(0, width, height, 0))
    _bare(panel)
    if box is not None:
        left, top, right, bottom = box
        frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=2, linestyle="--")
        frame.set_path_effects([withStroke(linewidth=3, foreground="black")])
        panel.add_patch(frame)


def _bare(panel: Axes) -> None:
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    panel.spines[:].set_visible(False)


def _draw_classes(
    panel: Axes, classes: np.ndarray, names: Sequence[str], colours: np.ndarray, scored: np.ndarray | None = None
) -> None:
    """Each class in its colour, of [classes, 3], and with its name, paler where `scored` is False."""
    from matplotlib.patheffects import withStroke

    told = classes != IGNORED
    scored = told if scored is None else scored & told
    painted = np.where(~told[..., None], GROUND, colours[classes])
    panel.imshow(np.where(scored[..., None], painted, 0.25 * painted + 0.75 * GROUND))
    effects: list[Any] = [withStroke(linewidth=2.5, foreground="black")]
    for number in np.unique(classes[scored]):
        mine = (classes == number) & scored
        if mine.mean() >= NAMED:
            name = textwrap.shorten(names[number], 16, placeholder=" …")
            panel.text(*_inmost(mine), name, ha="center", va="center", fontsize=9, color="white", path_effects=effects)


def _colours(example: Segmented, names: Sequence[str]) -> np.ndarray:
    """RGB [classes, 3]: those of the truth are told apart first, then what the models find, the largest first."""
    from matplotlib.colors import is_color_like, to_rgb

    if all(is_color_like(name) for name in names):
        return np.array([to_rgb(name) for name in names])
    maps = [np.where(example.truth != IGNORED, found, IGNORED) for found in example.found.values()]
    order = dict.fromkeys([*_by_size(example.truth).tolist(), *_by_size(np.stack(maps)).tolist(), *range(len(names))])
    palette = [to_rgb(colour) for colour in CLASS_COLOURS]
    places = {number: place for place, number in enumerate(order)}
    return np.array([palette[places[number] % len(palette)] for number in range(len(names))])


def _by_size(classes: np.ndarray) -> np.ndarray:
    """The classes in a map or several, the largest first."""
    numbers, counts = np.unique(classes[classes != IGNORED], return_counts=True)
    return numbers[np.argsort(-counts, kind="stable")]


def _inmost(mine: np.ndarray) -> tuple[int, int]:
    """A pixel of an area, x and y, that is as far from its edge as any: what is left when the area is peeled."""
    step = max(1, max(mine.shape) // 256)
    inner = np.pad(mine[::step, ::step], 1)
    if not inner.any():
        inner, step = np.pad(mine, 1), 1
    while inner.any():
        left = inner
        inner = left & np.roll(left, 1, 0) & np.roll(left, -1, 0) & np.roll(left, 1, 1) & np.roll(left, -1, 1)
    rows, columns = np.nonzero(left)
    middle = len(rows) // 2
    return int(columns[middle] - 1) * step, int(rows[middle] - 1) * step


def _write(panel: Axes, text: str, columns: int, words: int) -> None:
    shown, omitted = shorten(text, words)
    note = f"\n[{omitted} more words]" if omitted else ""
    panel.axis("off")
    panel.text(0, 0.95, textwrap.fill(shown, columns) + note, va="top", transform=panel.transAxes)


def _percent(share: float) -> str:
    return f"{100 * max(share, 0.0):.0f} %"
