"""The pictures of a drift report.

Colours are Okabe and Ito's; what a colour says, a mark or a dash pattern says too. matplotlib is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fast_goal.evaluation.examples import principal
from fast_goal.evaluation.pictures import BLUE, DIRECTION_LABELS, GREEN, GREY, STYLE, VERMILLION
from fast_goal.files import atomic_path
from fast_goal.monitoring.data import WHAT, Rows, aligned
from fast_goal.monitoring.history import TIME
from fast_goal.monitoring.snapshot import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 600  # points of each sample on a map, a guess at what can still be told apart
LABELS_SHOWN = 12
Samples = Mapping[str, Sample]  # reference, all, new
NAMES = {"reference": "reference", "all": "present", "new": "new"}
MARKS: dict[str, dict[str, Any]] = {
    "reference": {"color": GREY, "marker": "o"},
    "all": {"color": BLUE, "marker": "s"},
    "new": {"color": VERMILLION, "marker": "^"},
}
# the present ones are mostly those of the reference: a dot in a halo; a halo alone is an image that is gone
POINTS: dict[str, dict[str, Any]] = {
    "reference": {"color": "#C4C4C4", "marker": "o", "s": 70, "linewidth": 0},
    "all": {"color": BLUE, "marker": "o", "s": 12, "linewidth": 0},
    "new": {"color": VERMILLION, "marker": "^", "s": 34, "edgecolor": "black", "linewidth": 0.4},
}
HATCHES = {"reference": "", "all": "//", "new": "xx"}
DASHES = {"reference": "-", "all": "--", "new": "-."}
LINES: dict[str, dict[str, Any]] = {
    "champion": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "candidate": {"color": VERMILLION, "linestyle": "--", "marker": "^"},
    "previous": {"color": GREEN, "linestyle": "-.", "marker": "D"},
    "base": {"color": GREY, "linestyle": ":", "marker": "s"},
}


def draw_map(samples: Samples, path: Path) -> bool:
    """Draws the base's embeddings of images and captions on the plane of their first two principal components; False, and no
    picture, without any."""
    if not any(len(sample.image_features) and len(sample.caption_features) for sample in samples.values()):
        return False
    figure, axes = _figure(1, 2, (11, 5.2))
    for panel, kind in zip(axes[0], ("image", "caption"), strict=True):
        parts = {name: getattr(sample, f"{kind}_features")[:SHOWN] for name, sample in samples.items()}
        parts = {name: values for name, values in parts.items() if len(values)}
        points, share = principal(np.concatenate(list(parts.values())), 2)
        starts = np.cumsum([len(values) for values in parts.values()])[:-1]
        for name, own in zip(parts, np.split(points, starts), strict=True):
            panel.scatter(*own.T, label=f"{NAMES[name]} ({len(own):,})", **POINTS[name])
        panel.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second principal component")
        panel.set_title(f"{kind}s: {100 * share:.0f} % of the variance")
        panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, handletextpad=0.2)
    figure.suptitle("Where the base model places them", fontsize=13)
    _save(figure, path)
    return True


def draw_lengths(samples: Samples, path: Path) -> bool:
    """Draws histograms of the captions' tokens and sentences; False, and no picture, without captions."""
    samples = {name: sample for name, sample in samples.items() if len(sample.tokens)}
    if not samples:
        return False
    figure, axes = _figure(1, 2, (11, 4))
    for panel, what in zip(axes[0], ("tokens", "sentences"), strict=True):
        _histograms(panel, {name: getattr(sample, what) for name, sample in samples.items()})
        panel.set(title=WHAT[what], xlabel=what)
    axes[0, 0].set_ylabel("captions (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Length of the long captions", fontsize=13)
    _save(figure, path)
    return True


def draw_detections(samples: Samples, path: Path) -> bool:
    """Draws how many objects the detector finds in an image, and the shares of the labels; False, and no picture, where it
    found nothing."""
    samples = {name: sample for name, sample in samples.items() if len(sample.region_keys)}
    if not any(sample.detections.sum() for sample in samples.values()):
        return False
    labels, counts = _label_counts(samples)
    order = np.argsort(-np.max([values / max(values.sum(), 1) for values in counts.values()], axis=0), kind="stable")
    order, omitted = order[:LABELS_SHOWN], len(labels) - LABELS_SHOWN
    figure, axes = _figure(1, 2, (11, max(4, 1.4 + 0.42 * len(order))))
    _histograms(axes[0, 0], {name: sample.detections.sum(1) for name, sample in samples.items()})
    axes[0, 0].set(title=WHAT["detections"], xlabel="detections", ylabel="images (%)")
    height = 0.8 / len(counts)
    for index, (name, values) in enumerate(counts.items()):
        shares = 100 * values[order] / max(values.sum(), 1)
        places = np.arange(len(order)) + (index - (len(counts) - 1) / 2) * height
        style = {"color": MARKS[name]["color"], "hatch": HATCHES[name], "edgecolor": "white", "label": NAMES[name]}
        axes[0, 1].barh(places, shares, height, **style)
    title = "classes of the detections" + (f" (without {omitted} rarer ones)" if omitted > 0 else "")
    axes[0, 1].set_yticks(range(len(order)), [labels[place] for place in order])
    axes[0, 1].invert_yaxis()
    axes[0, 1].grid(False, axis="y")
    axes[0, 1].set(title=title, xlabel="share of the detections (%)")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("What the detector finds", fontsize=13)
    _save(figure, path)
    return True


def draw_drift_over_time(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws every effect size over the runs, with the band that chance alone stays in; a run that drifted has a larger mark
    with a black edge. False, and no picture, without tests."""
    shown = [what for what in WHAT if any(test["what"] == what for line in history for test in line["tests"])]
    if not shown:
        return False
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = _figure(rows, columns, (4.3 * columns, 3.0 * rows + 0.7))
    for panel in axes.flat[len(shown) :]:
        panel.axis("off")
    for panel, what in zip(axes.flat, shown, strict=False):
        for rows_of in ("all", "new"):
            tests = [
                (_time(line), test)
                for line in history
                for test in line["tests"]
                if (test["what"], test["rows"]) == (what, rows_of)
            ]
            if tests:
                _series(panel, tests, rows_of)
        for before, line in pairwise(history):
            if before.get("reference") != line.get("reference"):
                panel.axvline(_time(line), color="black", linestyle=(0, (1, 3)), linewidth=1, label="another reference")
        panel.set_title(WHAT[what])
        _from_zero(panel)
        _time_axis(panel, history)
    _legend(figure, axes)
    title = "How far the data lie from the reference (0: alike, 1: nothing in common)"
    figure.suptitle(f"{title}\na larger mark with a black edge: drift; shaded: what chance alone does", fontsize=13)
    _save(figure, path)
    return True


def draw_probe_over_time(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws R@1 on the probe set over the runs, with a line where a version became champion. False, and no picture, where
    nothing was measured."""
    lines = [line for line in history if line["probe"].get("models")]
    if not lines:
        return False
    figure, axes = _figure(1, 2, (11, 4.2), sharey=True)
    for panel, way in zip(axes[0], DIRECTION_LABELS, strict=True):
        for order, (model, style) in enumerate(LINES.items()):
            measured = [(_time(line), line["probe"]["models"][model]) for line in lines if model in line["probe"]["models"]]
            if not measured:
                continue
            times, values = zip(*measured, strict=True)
            panel.plot(times, [value["R@1"][way] for value in values], label=model, zorder=9 - order, **style)
        _mark_changes(panel, lines)
        panel.set_title(DIRECTION_LABELS[way])
        panel.margins(y=0.15)
        _time_axis(panel, lines)
    _from_zero(axes[0, 0])
    axes[0, 0].set_ylabel("R@1 (%)")
    _legend(figure, axes)
    figure.suptitle("Long captions of the frozen probe set; v: the version that became champion", fontsize=13)
    _save(figure, path)
    return True


def _series(panel: Axes, tests: Sequence[tuple[datetime, Mapping[str, Any]]], rows: Rows) -> None:
    colour, marker = MARKS[rows]["color"], MARKS[rows]["marker"]
    times = [time for time, _ in tests]
    values = [max(0.0, test["statistic"]) for _, test in tests]
    bounds = [max(0.0, test["bound"]) for _, test in tests]
    label = {"all": "all present rows", "new": "new rows only"}[rows]
    panel.plot(times, values, color=colour, linestyle=DASHES[rows], marker=marker, markersize=5, label=label)
    panel.plot(times, bounds, color=colour, linestyle=":", linewidth=1.4, marker="_", label=f"chance, {label}")
    panel.fill_between(times, 0, bounds, color=colour, alpha=0.12, linewidth=0)
    drifted = [(time, value) for time, value, (_, test) in zip(times, values, tests, strict=True) if test["drifted"]]
    if drifted:
        panel.scatter(
            *zip(*drifted, strict=True), color=colour, edgecolor="black", linewidth=1.3, marker=marker, s=80, zorder=3
        )


def _mark_changes(panel: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """A dotted line wherever the champion is another one than in the run before, with its version at the top; a solid one where
    the probe set is another one, so that what stands on either side does not compare."""
    before, probe = None, lines[0]["probe"].get("digest")
    for line in lines:
        version = line["probe"]["models"].get("champion", {}).get("version")
        if version is not None and version != before:
            panel.axvline(_time(line), color="black", linestyle=(0, (1, 3)), linewidth=1)
            place = (_time(line), 1)
            panel.annotate(f" v{version}", place, xycoords=("data", "axes fraction"), va="top", fontsize=10, color=BLUE)
        if line["probe"].get("digest") != probe:
            panel.axvline(_time(line), color="black", linewidth=1, label="another probe set")
        before, probe = version, line["probe"].get("digest")


def _histograms(panel: Axes, values: Mapping[str, np.ndarray]) -> None:
    together = np.concatenate(list(values.values()))
    low, high = int(together.min()), int(together.max())
    width = max(1, -(-(high - low + 1) // 30))  # whole numbers: a bin holds the same number of them everywhere
    edges = np.arange(low, high + width + 1, width) - 0.5
    for name, numbers in values.items():
        weights = np.full(len(numbers), 100 / len(numbers))
        options = {"histtype": "stepfilled", "alpha": 0.3} if name == "reference" else {"histtype": "step", "linewidth": 2}
        style = {"color": MARKS[name]["color"], "linestyle": DASHES[name], "label": f"{NAMES[name]} ({len(numbers):,})"}
        panel.hist(numbers, edges, weights=weights, **options, **style)
    panel.set_ylim(0, None)


def _label_counts(samples: Samples) -> tuple[list[str], dict[str, np.ndarray]]:
    """All labels, and of each sample how often it has each: int64 [L]."""
    labels = sorted({label for sample in samples.values() for label in sample.labels.tolist()})
    every = Sample(*[np.zeros((0, 0))] * 7, np.array(labels), np.zeros((0, len(labels)), np.int64))
    return labels, {name: aligned(every, sample)[2].sum(0) for name, sample in samples.items()}


def _legend(figure: Figure, axes: np.ndarray) -> None:
    """One legend for all panels, with each label once."""
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)


def _from_zero(panel: Axes) -> None:
    """An axis that begins at 0, with room for the marks there."""
    top = panel.get_ylim()[1]
    panel.set_ylim(-0.04 * top, 1.04 * top)


def _time(line: Mapping[str, Any]) -> datetime:
    return datetime.strptime(line["time"], TIME).replace(tzinfo=UTC)


def _time_axis(panel: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """Dates, or where there is one run only its date in the middle."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    times = sorted({_time(line) for line in lines})
    if len(times) > 1:
        room = (times[-1] - times[0]) / 20
        panel.set_xlim(times[0] - room, times[-1] + room)
    else:
        panel.set_xticks(times, [times[0].strftime("%Y-%m-%d %H:%M")])
        return
    locator = AutoDateLocator(minticks=2, maxticks=5)
    panel.xaxis.set_major_locator(locator)
    panel.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _figure(rows: int, columns: int, size: tuple[float, float], sharey: bool = False) -> tuple[Figure, Any]:
    """A figure of its own, without pyplot: nothing global to leak, and no display needed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "axes.axisbelow": True}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE), atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
