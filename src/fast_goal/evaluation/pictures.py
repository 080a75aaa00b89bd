"""The pictures of the evaluation report.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; every meaning that a colour
carries is also carried by a mark, a dash pattern or a word. matplotlib is imported where it is used.
"""

from __future__ import annotations

import difflib
import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from fast_goal.data.captions import split_sentences
from fast_goal.data.images import open_image
from fast_goal.evaluation.comparison import CLIP_CONTEXT, MODELS
from fast_goal.evaluation.embedding import PatchMap
from fast_goal.evaluation.retrieval import DIRECTIONS
from fast_goal.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6B6B6B"
LABELS = {"base": "base", "finetuned": "fine-tuned", "chance": "chance", "attention": "attention of the pooling"}
LINES: dict[str, dict[str, Any]] = {
    "base": {"color": ORANGE, "linestyle": "--", "marker": "s"},
    "finetuned": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "attention": {"color": GREEN, "linestyle": "-.", "marker": "^"},
    "chance": {"color": GREY, "linestyle": ":", "marker": ""},
}
DIRECTION_LABELS = {"text_to_image": "text to image", "image_to_text": "image to text"}
SERIES = (BLUE, VERMILLION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
THUMBNAIL = 320  # pixels of the longer side; sharper than the picture shows them
MARKED_WORDS = 110  # of a caption whose differences are marked; a guess at what fits beside its image
MONOSPACE = 0.602  # width of a character of DejaVu Sans Mono, in font sizes
# not marked where captions differ: they say nothing about the image; a guess, and of English only
SMALL_WORDS = {
    *("a", "an", "the", "this", "that", "it", "its", "you", "which", "there", "here"),
    *("is", "are", "was", "were", "be", "been", "can", "has", "have", "see", "seen"),
    *("and", "as", "at", "by", "in", "of", "on", "to"),
}
MOST_GROUPS = 24  # of a suite that a picture shows; a guess at what can be read
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


@dataclass(frozen=True)
class Mistake:
    """A query for which the fine-tuned model puts a wrong image first."""

    caption: str
    image: Path  # the one described
    confused: Path  # the one found first
    confused_caption: str  # "" where it has none
    ranks: dict[str, int]  # model -> rank of the one described


@dataclass(frozen=True)
class Components:
    """The first three principal components of the patches of some images, as one model sees them."""

    images: list[Image.Image]  # the model's inputs as pictures, E of them
    maps: np.ndarray  # float [E, rows, columns, 3]
    share: float  # of the variance, between 0 and 1


@dataclass(frozen=True)
class Plane:
    """Images and their captions on a plane, as one model embeds them."""

    images: np.ndarray  # float [E, 2]
    texts: np.ndarray  # float [E, 2]
    share: float  # of the variance, between 0 and 1
    own: float  # mean cosine of an image with its caption
    other: float | None  # and with those of other images, None where there are none


class Point(NamedTuple):
    """Recall of captions of like length, in percent with its 95 % interval."""

    tokens: float  # mean
    captions: int
    value: float
    low: float
    high: float


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draws with STYLE, and leaves matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def drawn(*arguments: P.args, **options: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return drawn


@styled
def draw_losses(history: Sequence[Mapping[str, Any]], path: Path, stage: str = "") -> bool:
    """Draws the training loss and its unweighted terms over the steps; False, and no picture, if there are none."""
    rows = [row for row in history if "loss" in row]
    terms = [name for name in (rows[0] if rows else {}) if name not in NOT_TERMS and isinstance(rows[0][name], int | float)]
    if not rows:
        return False
    terms.sort(key=lambda name: name != "loss")
    figure, axes = figure_of(1, 1, (8, 4.2))
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
    axes[0, 0].set(
        title=f"Training loss{stage}: the sum and its unweighted terms", xlabel="step", ylabel="loss", ylim=(0, None)
    )
    axes[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    return True


@styled
def draw_validation(history: Sequence[Mapping[str, Any]], path: Path, stage: str = "") -> bool:
    """Draws what was measured after each epoch of training; False, and no picture, if nothing was."""
    rows = [row for row in history if "loss" not in row]
    names = [name for name in (rows[0] if rows else {}) if name not in NOT_TERMS]
    if not names:
        return False
    figure, axes = figure_of(1, 1, (8, 3.8))
    for index, name in enumerate(names):
        axes[0, 0].plot(
            [row["epoch"] for row in rows if name in row],
            [row[name] for row in rows if name in row],
            label=name.removeprefix("val_").replace("_", " "),
            color=SERIES[index % len(SERIES)],
            linestyle=DASHES[index % len(DASHES)],
            marker="o",
        )
    axes[0, 0].set(title=f"Validation split after each epoch{stage}", xlabel="epoch", ylabel="%")
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    return True


@styled
def draw_recall(metrics: Mapping[str, Any], ks: Sequence[int], name: str, path: Path) -> bool:
    """Draws recall@k of both models and of chance, a panel per caption kind and direction."""
    kinds = [kind for kind in ("long", "short") if kind in metrics]
    if not kinds:
        return False
    figure, axes = figure_of(len(kinds), 2, (9, 0.6 + 3.1 * len(kinds)), sharey=True)
    for row, kind in enumerate(kinds):
        for column, direction in enumerate(DIRECTIONS):
            panel = axes[row, column]
            for model in ("finetuned", "base", "chance"):
                values = [metrics[kind][model][direction][f"R@{k}"] for k in ks]
                panel.plot(range(len(ks)), values, label=LABELS[model], **LINES[model])
            k_axis(panel, ks, f"{kind} captions, {DIRECTION_LABELS[direction]}", "Recall at k (%)" if column == 0 else "")
    axes[0, 0].legend(frameon=False, loc="best")
    figure.suptitle(f"How often the right one is among the first k ({name})", fontsize=13)
    save(figure, path)
    return True


@styled
def draw_hits(metrics: Mapping[str, Any], ks: Sequence[int], name: str, path: Path) -> None:
    """Draws the share of sentences with one of the k most similar patches in their box."""
    figure, axes = figure_of(1, 1, (6.5, 3.8))
    for model in ("attention", "finetuned", "base", "chance"):
        if model not in metrics:
            continue
        axes[0, 0].plot(range(len(ks)), [metrics[model][f"hit@{k}"] for k in ks], label=LABELS[model], **LINES[model])
    k_axis(axes[0, 0], ks, f"One of the k best patches lies in the sentence's box ({name})", "Sentences (%)")
    axes[0, 0].set_xlabel("k (patches)")
    axes[0, 0].legend(frameon=False, loc="best")
    save(figure, path)


@styled
def draw_suites(suites: Mapping[str, Mapping[str, Any]], name: str, path: Path) -> None:
    """Draws the accuracy of both models in each group of each suite, a panel per suite with a bar per model.

    suites: as a task measures them. A suite of more than MOST_GROUPS groups is drawn with those of most cases. A suite whose
    groups are not listed, or that is one group, has the bars of the whole.
    """
    shown = {suite: _bars(found) for suite, found in suites.items()}
    heights = [len(bars) + 1.2 for bars in shown.values()]
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of a number that stands on the line of chance
    figure, axes = figure_of(len(shown), 1, (9, 0.9 + 0.42 * sum(heights)), heights=heights)
    for panel, (suite, bars) in zip(axes[:, 0], shown.items(), strict=True):
        places = np.arange(len(bars))
        for model, shift, style in (
            ("base", -0.2, {"color": ORANGE, "hatch": "//", "edgecolor": "white"}),
            ("finetuned", 0.2, {"color": BLUE}),
        ):
            values = [bar[model] for bar in bars]
            panel.barh(places + shift, values, 0.38, label=LABELS[model], **style)
            for place, value in zip(places, values, strict=True):
                panel.text(value + 0.8, place + shift, f"{value:.1f}", va="center", fontsize=8, bbox=ground, zorder=4)
        chances = [bar["chance"] for bar in bars]
        panel.vlines(chances, places - 0.48, places + 0.48, color="black", linestyle=":", linewidth=2, label=LABELS["chance"])
        panel.set_yticks(places, [textwrap.shorten(f"{bar['label']} ({bar['cases']:,})", 44, placeholder=" …") for bar in bars])
        panel.set(xlim=(0, 108), ylim=(len(bars) - 0.4, -0.6))
        panel.grid(False, axis="y")
        groups = len(suites[suite]["difference"]["groups"])
        some = f": {len(bars)} of {groups} groups, those of most cases" if len(bars) < groups else ""
        panel.set_title(f"{suite}{some}")
    axes[-1, 0].set_xlabel("accuracy (%); in brackets, the number of cases")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3)
    figure.suptitle(f"Right answers by group ({name})", fontsize=13)
    save(figure, path)


def _bars(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a suite shows, in order: label, cases, and the accuracy of both models and of chance."""
    parts = ("base", "finetuned", "chance")
    groups = list(found["difference"]["groups"])
    if len(groups) < 2:
        return [{"label": "all", "cases": found["cases"], **{part: found[part]["accuracy"] for part in parts}}]
    cases = {group: found["base"]["groups"][group]["cases"] for group in groups}
    most = set(sorted(groups, key=lambda group: -cases[group])[:MOST_GROUPS])
    return [
        {"label": group, "cases": cases[group], **{part: found[part]["groups"][group]["accuracy"] for part in parts}}
        for group in groups
        if group in most
    ]


@styled
def draw_retrievals(queries: Sequence[Retrieval], path: Path) -> None:
    """Draws for each query its caption, the image described, and the first images of both models.

    The right image has a thick blue frame and a tick, a wrong one a thin frame and a cross.
    """
    count = max(len(images) for query in queries for images in query.top.values())
    figure, axes = figure_of(
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
    save(figure, path)


@styled
def draw_localisations(examples: Sequence[Localisation], path: Path) -> None:
    """Draws for each sentence the image with its box, and each model's patch similarities over it.

    Each map is coloured from its own lowest to its own highest similarity. The most similar patch bears a tick where its
    centre lies in the box, else a cross.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    figure, axes = figure_of(len(examples), 4, (10.5, 2.75 * len(examples)), widths=[0.85, 1, 1, 1])
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
    save(figure, path)


@styled
def draw_mistakes(examples: Sequence[Mistake], path: Path) -> None:
    """Draws for each query its caption and image, and beside them the image found first and its caption.

    Bold, coloured and underlined are the words in which a sentence differs from the most similar one of the other caption.
    """
    figure, axes = figure_of(len(examples), 4, (15, 3.0 * len(examples) + 0.4), widths=[2.1, 1, 1, 2.1])
    for row, example in zip(axes, examples, strict=True):
        for panel in row:
            panel.axis("off")
        _marked_text(row[0], differing(example.caption, example.confused_caption), BLUE)
        if example.confused_caption:
            _marked_text(row[3], differing(example.confused_caption, example.caption), VERMILLION)
        else:
            row[3].text(0, 0.5, "(an image without a long caption)", transform=row[3].transAxes)
        row[1].imshow(_square(example.image))
        ranks = ", ".join(f"{LABELS[model]} {example.ranks[model]:,}" for model in MODELS)
        row[1].set_title(f"described; its rank:\n{ranks}", fontsize=10, color=BLUE)
        row[2].imshow(_square(example.confused))
        row[2].set_title("✗ found first by\nthe fine-tuned model", fontsize=10, color=VERMILLION)
    figure.suptitle("Queries whose image is not found first: the query and its image, then the confused image and its caption")
    save(figure, path)


@styled
def draw_components(found: Mapping[str, Components], path: Path) -> None:
    """Draws a column for each image: as the model sees it, and its patches coloured by their principal components.

    The three components are red, green and blue, each from its 2nd to its 98th percentile over all the patches.
    """
    same = all(len(each.images) == len(found["base"].images) for each in found.values()) and all(
        image.tobytes() == other.tobytes() for image, other in zip(found["base"].images, found["finetuned"].images, strict=True)
    )
    rows: list[tuple[str, str, Sequence[Any]]] = []
    for model in MODELS:
        maps = found[model].maps
        if model == "base" or not same:
            label = "the models' input" if same else f"input, {LABELS[model]}"
            rows.append((label, "", found[model].images))
        low, high = np.percentile(maps, [2, 98], axis=(0, 1, 2))
        colours = ((maps - low) / np.where(high > low, high - low, 1)).clip(0, 1)
        rows.append((LABELS[model], f"{100 * found[model].share:.0f} % of the\nvariance", colours))
    count = len(found["base"].images)
    figure, axes = figure_of(len(rows), count + 1, (1.9 * (count + 0.7), 1.95 * len(rows) + 0.4), widths=[0.7, *[1] * count])
    for line, (label, note, images) in zip(axes, rows, strict=True):
        line[0].axis("off")
        line[0].text(1, 0.5, f"{label}\n{note}".strip(), ha="right", va="center", transform=line[0].transAxes)
        for panel, image in zip(line[1:], images, strict=True):
            panel.imshow(image, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.grid(False)
            panel.spines[:].set_visible(False)
    figure.suptitle("Patches after the last block: their first three principal components as red, green and blue", fontsize=13)
    save(figure, path)


@styled
def draw_planes(found: Mapping[str, Plane], name: str, path: Path) -> None:
    """Draws images and captions of both models as points of a plane, those that belong together joined by a line."""
    figure, axes = figure_of(1, len(found), (5.2 * len(found), 5.2))
    for panel, (model, plane) in zip(axes[0], found.items(), strict=True):
        for image, text in zip(plane.images, plane.texts, strict=True):
            panel.plot(*zip(image, text, strict=True), color=GREY, linewidth=0.7, alpha=0.6, zorder=1)
        panel.scatter(*plane.images.T, color=ORANGE, edgecolor="black", linewidth=0.4, marker="s", s=34, label="image")
        panel.scatter(*plane.texts.T, color=BLUE, edgecolor="black", linewidth=0.4, marker="o", s=34, label="long caption")
        cosines = f"mean cosine of a pair {plane.own:.2f}"
        if plane.other is not None:
            cosines += f", of others {plane.other:.2f}"
        panel.set_title(f"{LABELS[model]}: {100 * plane.share:.0f} % of the variance\n{cosines}")
        panel.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second principal component")
        panel.set_aspect("equal", adjustable="datalim")
    axes[0, 0].legend(frameon=False, loc="best")
    figure.suptitle(f"Images and their long captions, joined by a line ({name})", fontsize=13)
    save(figure, path)


@styled
def draw_lengths(found: Mapping[str, Sequence[Point]], name: str, path: Path) -> bool:
    """Draws R@1 over the length of the caption with its intervals; False, and no picture, if there is nothing to draw."""
    if not found:
        return False
    figure, axes = figure_of(1, 1, (8, 4))
    panel = axes[0, 0]
    for shift, model in zip((0.35, -0.35), ("finetuned", "base"), strict=True):  # of the bars, which would hide each other
        points = found[model]
        values = [point.value for point in points]
        errors = [[point.value - point.low for point in points], [point.high - point.value for point in points]]
        panel.errorbar(
            [point.tokens + shift for point in points], values, errors, label=LABELS[model], capsize=3, **LINES[model]
        )
    points = found["base"]
    if points[0].tokens < CLIP_CONTEXT < points[-1].tokens:
        panel.axvline(CLIP_CONTEXT, color=GREY, linestyle=":")
        panel.annotate(
            " CLIP's own context",
            (CLIP_CONTEXT, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=9,
            color=GREY,
        )
    counts = sorted({point.captions for point in points})
    several = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    panel.set(
        title=f"R@1, text to image, by the length of the caption ({name})",
        xlabel=f"tokens of the caption (mean of the {several} captions behind each point)",
        ylabel="R@1 (%), 95 % interval",
        ylim=(0, None),
    )
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
    return True


def differing(text: str, other: str) -> list[tuple[str, bool]]:
    """The words of a text, and whether each differs from the most similar sentence of the other text: whether it has no
    counterpart there, in order. Case, punctuation and SMALL_WORDS do not count."""
    theirs = [
        [plain for plain in plain_words(sentence.text) if plain not in SMALL_WORDS] for sentence in split_sentences(other)
    ]
    found = []
    for sentence in split_sentences(text):
        words, plain = sentence.text.split(), plain_words(sentence.text)
        places = [place for place, word in enumerate(plain) if word and word not in SMALL_WORDS]
        mine = [plain[place] for place in places]
        matchers = [difflib.SequenceMatcher(None, mine, words_of_theirs, autojunk=False) for words_of_theirs in theirs]
        differs = set(places)
        if matchers:
            for block in max(matchers, key=difflib.SequenceMatcher.ratio).get_matching_blocks():
                differs -= set(places[block.a : block.a + block.size])
        found += [(word, place in differs) for place, word in enumerate(words)]
    return found


def plain_words(text: str) -> list[str]:
    """The words of a text without case and punctuation; one of nothing else is ""."""
    return [word.casefold().strip(".,;:!?\"'()") for word in text.split()]


def _marked_text(panel: Axes, words: Sequence[tuple[str, bool]], colour: str, columns: int = 54) -> None:
    """Writes words, each with whether it is marked, from the top left of the panel in lines of `columns` characters."""
    size, height = 10.0, 14.0  # points
    shown = list(words[:MARKED_WORDS])
    if omitted := len(words) - len(shown):
        shown += [(word, False) for word in f"[{omitted} more words]".split()]
    options: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "family": "monospace",
        "fontsize": size,
    }
    runs: list[tuple[int, int, str, bool]] = []  # line, column, words that look alike
    column, line = 0, 0
    for full, differs in shown:
        word = full if len(full) <= columns else f"{full[: columns - 1]}…"
        if column and column + 1 + len(word) > columns:
            column, line = 0, line + 1
        if column and runs[-1][3] == differs:
            runs[-1] = (*runs[-1][:2], f"{runs[-1][2]} {word}", differs)
        else:
            runs.append((line, column + bool(column), word, differs))
        column += bool(column) + len(word)
    for line, column, text, differs in runs:
        x, y = column * MONOSPACE * size, -(line + 1) * height
        style = {"color": colour, "fontweight": "bold"} if differs else {"color": "black"}
        panel.annotate(text, (0, 1), (x, y), **options, **style)
        if differs:
            panel.annotate("▁" * len(text), (0, 1), (x, y - 2.5), **options, color=colour)


def shorten(text: str, words: int) -> tuple[str, int]:
    """The first `words` words, and how many more there are."""
    parts = text.split()
    return (" ".join(parts), 0) if len(parts) <= words else (" ".join(parts[:words]) + " …", len(parts) - words)


def k_axis(panel: Axes, ks: Sequence[int], title: str, ylabel: str) -> None:
    """The axes of a panel with percentages over k."""
    panel.set_xticks(range(len(ks)), [str(k) for k in ks])
    panel.set(title=title, xlabel="k", ylabel=ylabel, ylim=(0, 102))


def _square(path: Path) -> Image.Image:
    """The whole image on a square ground, so that rows of pictures stand in line."""
    image = open_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    ground = Image.new("RGB", (max(image.size), max(image.size)), "#EFEFEF")
    ground.paste(image, ((ground.width - image.width) // 2, (ground.height - image.height) // 2))
    return ground


def figure_of(
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


def save(figure: Figure, path: Path) -> None:
    """Writes the picture; a file of that name is replaced when it is complete."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
