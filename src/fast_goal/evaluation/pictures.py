"""The pictures of the evaluation report.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; every meaning that a colour
carries is also carried by a mark, a dash pattern or a word. matplotlib is imported where it is used.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from PIL import Image

from fast_goal.data.images import open_image
from fast_goal.evaluation.comparison import MODELS
from fast_goal.evaluation.embedding import PatchMap
from fast_goal.evaluation.retrieval import DIRECTIONS
from fast_goal.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6B6B6B"
LABELS = {"base": "base", "finetuned": "fine-tuned", "chance": "chance"}
LINES: dict[str, dict[str, Any]] = {
    "base": {"color": ORANGE, "linestyle": "--", "marker": "s"},
    "finetuned": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "chance": {"color": GREY, "linestyle": ":", "marker": ""},
}
DIRECTION_LABELS = {"text_to_image": "text to image", "image_to_text": "image to text"}
SERIES = (BLUE, VERMILLION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
THUMBNAIL = 320  # pixels of the longer side; sharper than the picture shows them
NOT_TERMS = {"step", "epoch", "learning_rate", "samples_per_second", "logit_scale"}
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # a caption may hold dollar signs
}


@dataclass(frozen=True)
class Retrieval:
    """One query of the retrieval picture: what each model put first."""

    caption: str
    image: Path  # the one described
    top: dict[str, list[Path]]  # model -> images, best first
    hits: dict[str, list[bool]]  # model -> whether each is the one described
    ranks: dict[str, int]  # model -> rank of the one described


@dataclass(frozen=True)
class Localisation:
    """One sentence of the localisation picture."""

    sentence: str
    maps: dict[str, PatchMap]  # model -> its map
    hits: dict[str, bool]  # model -> whether its most similar patch has its centre in the box


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draws with STYLE, and leaves matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def styled(*arguments: P.args, **options: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return styled


@_styled
def draw_losses(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws the training loss and its unweighted terms over the steps; False, and no picture, if there are none."""
    rows = [row for row in history if "loss" in row]
    terms = [name for name in (rows[0] if rows else {}) if name not in NOT_TERMS and isinstance(rows[0][name], int | float)]
    if not rows:
        return False
    terms.sort(key=lambda name: name != "loss")
    figure, axes = _figure(1, 1, (8, 4.2))
    for index, name in enumerate(terms):
        steps = [(row["step"], row[name]) for row in rows if name in row]
        axes[0, 0].plot(
            *zip(*steps, strict=True),
            label="weighted sum" if name == "loss" else name,
            color=SERIES[index % len(SERIES)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=2.4 if name == "loss" else 1.6,
            marker="." if len(rows) < 3 else "",
        )
    axes[0, 0].set(title="Training loss: the sum and its unweighted terms", xlabel="step", ylabel="loss", ylim=(0, None))
    axes[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)
    return True


@_styled
def draw_validation(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws what was measured after each epoch of training; False, and no picture, if nothing was."""
    rows = [row for row in history if "loss" not in row]
    names = [name for name in (rows[0] if rows else {}) if name not in NOT_TERMS]
    if not names:
        return False
    figure, axes = _figure(1, 1, (8, 3.8))
    for index, name in enumerate(names):
        axes[0, 0].plot(
            [row["epoch"] for row in rows if name in row],
            [row[name] for row in rows if name in row],
            label=name.removeprefix("val_").replace("_", " "),
            color=SERIES[index % len(SERIES)],
            linestyle=DASHES[index % len(DASHES)],
            marker="o",
        )
    axes[0, 0].set(title="Validation split after each epoch", xlabel="epoch", ylabel="%")
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)
    return True


@_styled
def draw_recall(metrics: Mapping[str, Any], ks: Sequence[int], name: str, path: Path) -> bool:
    """Draws recall@k of both models and of chance, a panel per caption kind and direction."""
    kinds = [kind for kind in ("long", "short") if kind in metrics]
    if not kinds:
        return False
    figure, axes = _figure(len(kinds), 2, (9, 0.6 + 3.1 * len(kinds)), sharey=True)
    for row, kind in enumerate(kinds):
        for column, direction in enumerate(DIRECTIONS):
            panel = axes[row, column]
            for model in ("finetuned", "base", "chance"):
                values = [metrics[kind][model][direction][f"R@{k}"] for k in ks]
                panel.plot(range(len(ks)), values, label=LABELS[model], **LINES[model])
            _k_axis(panel, ks, f"{kind} captions, {DIRECTION_LABELS[direction]}", "Recall at k (%)" if column == 0 else "")
    axes[0, 0].legend(frameon=False, loc="best")
    figure.suptitle(f"How often the right one is among the first k ({name})", fontsize=13)
    _save(figure, path)
    return True


@_styled
def draw_hits(metrics: Mapping[str, Any], ks: Sequence[int], name: str, path: Path) -> None:
    """Draws the share of sentences with one of the k most similar patches in their box."""
    figure, axes = _figure(1, 1, (6.5, 3.8))
    for model in ("finetuned", "base", "chance"):
        axes[0, 0].plot(range(len(ks)), [metrics[model][f"hit@{k}"] for k in ks], label=LABELS[model], **LINES[model])
    _k_axis(axes[0, 0], ks, f"One of the k best patches lies in the sentence's box ({name})", "Sentences (%)")
    axes[0, 0].set_xlabel("k (patches)")
    axes[0, 0].legend(frameon=False, loc="best")
    _save(figure, path)


@_styled
def draw_retrievals(queries: Sequence[Retrieval], path: Path) -> None:
    """Draws for each query its caption, the image described, and the first images of both models.

    The right image has a thick blue frame and a tick, a wrong one a thin frame and a cross.
    """
    count = max(len(images) for query in queries for images in query.top.values())
    figure, axes = _figure(
        3 * len(queries),
        count + 3,
        (1.5 * (count + 3.9), 3.75 * len(queries) + 0.4),
        widths=[2.3, 1, 0.6, *[1] * count],
        heights=[1, 1, 0.12] * len(queries),  # a gap after each query
    )
    for panel in axes.flat:
        panel.axis("off")
    for index, query in enumerate(queries):
        first = 3 * index
        text, omitted = shorten(query.caption, 62)
        note = f"\n[{omitted} more words]" if omitted else ""
        axes[first, 0].text(0, 1, textwrap.fill(text, 36) + note, va="top", fontsize=9.5, transform=axes[first, 0].transAxes)
        axes[first, 1].imshow(_square(query.image))
        axes[first, 1].set_title("described", fontsize=10)
        for row, model in zip((first, first + 1), MODELS, strict=True):
            label = f"{LABELS[model]}:\nrank {query.ranks[model]:,}"
            axes[row, 2].text(1, 0.5, label, ha="right", va="center", transform=axes[row, 2].transAxes)
            for place, (image, hit) in enumerate(zip(query.top[model], query.hits[model], strict=True)):
                panel, colour = axes[row, 3 + place], BLUE if hit else GREY
                panel.axis("on")
                panel.imshow(_square(image))
                panel.set(xticks=[], yticks=[])
                panel.grid(False)
                title = f"{place + 1} ✓ right" if hit else f"{place + 1} ✗"
                panel.set_title(title, fontsize=10, color=colour, fontweight="bold" if hit else "normal")
                for spine in panel.spines.values():
                    spine.set(visible=True, color=colour, linewidth=4 if hit else 0.8)
    figure.suptitle("The images each model finds first for a long caption", fontsize=13)
    _save(figure, path)


@_styled
def draw_localisations(examples: Sequence[Localisation], path: Path) -> None:
    """Draws for each sentence the image with its box, and each model's patch similarities over it.

    Each map is coloured from its own lowest to its own highest similarity. The most similar patch bears a tick where its
    centre lies in the box, else a cross.
    """
    import numpy as np
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    figure, axes = _figure(len(examples), 4, (10.5, 2.75 * len(examples)), widths=[0.85, 1, 1, 1])
    outline = [withStroke(linewidth=3, foreground="black")]
    for row, example in enumerate(examples):
        text, omitted = shorten(example.sentence, 30)
        note = f"\n[{omitted} more words]" if omitted else ""
        axes[row, 0].axis("off")
        axes[row, 0].text(0, 0.95, textwrap.fill(text, 24) + note, va="top", transform=axes[row, 0].transAxes)
        for column, model in enumerate(("", *MODELS), start=1):
            panel, view = axes[row, column], example.maps[model or MODELS[0]]
            width, height = view.image.size
            shown = view.image.convert("L").convert("RGB") if model else view.image  # the colours belong to the map
            panel.imshow(np.asarray(shown), extent=(0, width, height, 0))
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            panel.spines[:].set_visible(False)
            left, top, right, bottom = view.box
            box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linewidth=2, linestyle="--")
            box.set_path_effects(outline)
            panel.add_patch(box)
            if not model:
                panel.set_title("the sentence's box", fontsize=11)
                continue
            grid = view.similarity
            panel.imshow(grid, cmap="viridis", alpha=0.6, extent=(0, width, height, 0), interpolation="nearest")
            best_row, best_column = np.unravel_index(grid.argmax(), grid.shape)
            centre = ((best_column + 0.5) * width / grid.shape[1], (best_row + 0.5) * height / grid.shape[0])
            mark = "✓" if example.hits[model] else "✗"
            panel.text(*centre, mark, ha="center", va="center", fontsize=17, color="white", path_effects=outline)
            word = "inside" if example.hits[model] else "outside"
            panel.set_title(f"{LABELS[model]}: best patch {word}", fontsize=11)
            panel.set_xlabel(f"cosine {grid.min():.2f} (dark) to {grid.max():.2f} (light)", fontsize=9)
    figure.suptitle("Where the patches are most like the sentence", fontsize=13)
    _save(figure, path)


def shorten(text: str, words: int) -> tuple[str, int]:
    """The first `words` words, and how many more there are."""
    parts = text.split()
    return (" ".join(parts), 0) if len(parts) <= words else (" ".join(parts[:words]) + " …", len(parts) - words)


def _k_axis(panel: Axes, ks: Sequence[int], title: str, ylabel: str) -> None:
    panel.set_xticks(range(len(ks)), [str(k) for k in ks])
    panel.set(title=title, xlabel="k", ylabel=ylabel, ylim=(0, 102))


def _square(path: Path) -> Image.Image:
    """The whole image on a square ground, so that rows of pictures stand in line."""
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    ground = Image.new("RGB", (max(image.size), max(image.size)), "#EFEFEF")
    ground.paste(image, ((ground.width - image.width) // 2, (ground.height - image.height) // 2))
    return ground


def _figure(
    rows: int,
    columns: int,
    size: tuple[float, float],
    widths: Sequence[float] | None = None,
    heights: Sequence[float] | None = None,
    sharey: bool = False,
) -> tuple[Figure, Any]:
    """A figure of its own, without pyplot: nothing global to leak, and no display needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey, width_ratios=widths, height_ratios=heights)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
