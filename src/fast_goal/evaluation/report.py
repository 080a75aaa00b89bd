"""The evaluation report: Markdown, and one HTML file that holds its pictures and needs nothing else.

Every sentence about a result is made from the numbers, so that the report says `no difference shown` by itself.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fast_goal.evaluation.comparison import MODELS
from fast_goal.evaluation.pictures import DIRECTION_LABELS, LABELS
from fast_goal.evaluation.retrieval import DIRECTIONS
from fast_goal.evaluation.tasks import Section
from fast_goal.files import write_text

SMALL = 200  # a guess: below so many queries the intervals are too wide to tell models of like quality apart
MANY_TIES = 1.0  # percent of the queries; a guess
SHOWN = 2  # of the ks, in the sections of the tasks beside long and short retrieval
OWN_SECTIONS = ("long", "short", "localisation")


@dataclass(frozen=True)
class Facts:
    """How the numbers came about."""

    experiment: str
    command: str
    commit: str  # short, with "+changes" where the working tree differed
    params_digest: str
    base_kind: str  # pretrained, scratch
    base_name: str
    scratch_split: str  # whose short captions a scratch base was trained on
    objective: Mapping[str, Any]
    first_stage: Mapping[str, Any]  # data set, epochs and objective of the first stage of the training; empty: there was none
    views: Mapping[str, str]  # model -> how it sees images: crop, squash, pad
    split: str
    tasks: Mapping[str, Section]  # what was asked for, by name
    precision: str  # of the embeddings
    device: str
    bootstrap_samples: int
    seconds: Mapping[str, float]  # step -> wall time


@dataclass(frozen=True)
class Picture:
    """A picture beside the report. `text` says what is seen, for those who cannot see it too."""

    file: str
    text: str
    dataset: str = ""  # "" for the training


def write_report(folder: Path, metrics: Mapping[str, Mapping[str, Any]], facts: Facts, pictures: Sequence[Picture]) -> None:
    """Writes report.md and report.html into `folder`, where the pictures are; `metrics` maps data sets to those of
    `tasks.measure`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"number": _number, "signed": _signed, "time": _time, "p": _p}
    templates = resources.files("fast_goal.evaluation")
    text = environment.from_string((templates / "report.md.jinja").read_text(encoding="utf-8")).render(
        facts=facts,
        headlines=headlines(metrics),
        datasets=[_dataset(name, values, pictures, facts) for name, values in metrics.items()],
        training_pictures=[picture for picture in pictures if not picture.dataset],
        notes=notes(metrics, facts),
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    write_text(folder / "report.md", text)
    page = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    write_text(folder / "report.html", page.render(title=html.escape(f"Report: {facts.experiment}"), body=_html(text, folder)))


def headlines(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The result in a sentence or two per data set."""
    lines = []
    for name, values in metrics.items():
        if "long" in values:
            found = values["long"]
            change = _change(found, "text_to_image", _first(found))
            lines.append(
                f"`{name}`, {found['captions']:,} long captions, {found['images']:,} images: "
                f"text-to-image {_first(found)} {change}."
            )
        if "localisation" in values:
            found = values["localisation"]
            key = next(iter(found["chance"]))
            what = "in the sentence's true box" if found["boxes"] == "truth" else "in the box that FLISM itself chose"
            lines.append(
                f"`{name}`, {found['sentences']:,} sentences: {_best_patches(key)} lies {what} for "
                f"{found['base'][key]:.1f} → {found['finetuned'][key]:.1f} % of them "
                f"({_difference_words(found['difference'][key])}; random patches: {found['chance'][key]:.1f} %)."
            )
    return lines


def verdict(difference: Mapping[str, float]) -> str:
    """What the interval of a difference allows to say."""
    if difference["low"] > 0:
        return "higher"
    if difference["high"] < 0:
        return "lower"
    return "no difference shown"


def notes(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[str]:
    """What a reader must know so as not to read too much into the numbers."""
    lines = [
        f"The intervals are 95 % bootstrap percentile intervals over the test images ({facts.bootstrap_samples:,} resamples; "
        "the captions of an image stay together; both models on the same resamples). They say how far the choice of test "
        "images matters. They do not say how far another training seed would: this is one training run. p: the share of all "
        "ways to swap the two models image by image that gives at least as large a difference; of many such numbers some are "
        "small by chance.",
        "Tie rule: a candidate with exactly the score of the right one does not count against the query.",
    ]
    if facts.base_kind == "scratch":
        lines.append(_scratch_note(metrics, facts))
    for name, values in metrics.items():
        for kind in ("long", "short"):
            if kind in values:
                lines += [f"`{name}`, {kind} captions: {line}" for line in _retrieval_notes(values[kind], kind)]
        if "localisation" in values:
            lines += [f"`{name}`, localisation: {line}" for line in _localisation_notes(values["localisation"])]
        if values["independent"] < values["images"]:
            lines.append(
                f"`{name}`: the {values['images']:,} images show {values['independent']:,} scenes; those of one, which differ "
                "in little, are resampled and swapped together."
            )
        for task, reason in values["skipped"].items():
            words = task.replace("_", " ")
            lines.append(f"`{name}`: no {words}, for want of {reason} in the split `{facts.split}`.")
    return lines


def _scratch_note(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> str:
    weak = [
        f"{found['base']['text_to_image'][_first(found)]:.1f} % {_first(found)} text-to-image on the {kind} captions of "
        f"`{name}` (chance {found['chance']['text_to_image'][_first(found)]:.1f} %)"
        for name, values in metrics.items()
        for kind in ("long", "short")
        if kind in values
        for found in [values[kind]]
    ]
    return (
        "**The base is weak.** It is no published CLIP but a small one, trained here from scratch on nothing but the short "
        f"captions of the split `{facts.scratch_split}`; it reaches {'; '.join(weak) or 'no measured recall'}. The absolute "
        "numbers do not compare with published ones, and a gain over this base does not predict the gain over a pretrained one."
    )


def _retrieval_notes(found: Mapping[str, Any], kind: str) -> list[str]:
    lines = []
    key = _first(found)
    unclear = [DIRECTION_LABELS[d] for d in DIRECTIONS if verdict(found["difference"][d][key]) == "no difference shown"]
    if unclear:
        lines.append(f"no difference shown in {key} {' and '.join(unclear)}: the interval includes 0.")
    worse = [DIRECTION_LABELS[d] for d in DIRECTIONS if verdict(found["difference"][d][key]) == "lower"]
    if worse:
        forgot = "; what the base knew of short captions was partly forgotten" if kind == "short" else ""
        lines.append(f"the fine-tuned model is worse in {key} {' and '.join(worse)}{forgot}.")
    for count, models in _by_value(found["truncated"]).items():
        if count:
            context = found["context_length"][models[0]]
            lines.append(
                f"{count:,} of {found['captions']:,} captions exceed the {context} tokens of {_who(models)}, which sees only "
                "their beginning."
            )
    tied = {model: max(found[model][direction]["tied"] for direction in DIRECTIONS) for model in MODELS}
    if max(tied.values()) > MANY_TIES:
        lines.append(
            f"up to {max(tied.values()):.1f} % of the queries have a wrong candidate tied with the right one (equal captions, "
            "or embeddings that collapsed); by the tie rule their recall is an upper bound."
        )
    if found["captions"] < SMALL:
        lines.append(f"only {found['captions']:,} captions: the intervals are wide.")
    return lines


def _by_value(values: Mapping[str, int]) -> dict[int, list[str]]:
    """The models that share a value, so that it is said once."""
    return {value: [model for model in MODELS if values[model] == value] for value in values.values()}


def _who(models: Sequence[str]) -> str:
    return "either model" if len(models) > 1 else f"the {LABELS[models[0]]} model"


def _localisation_notes(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if found["boxes"] != "truth":
        lines.append(
            "agreement with FLISM's own pairs, not ground truth: the base chose these boxes for these sentences itself."
        )
    for count, models in _by_value(found["without_centre"]).items():
        if count:
            lines.append(
                f"{count:,} of {found['sentences']:,} boxes are too small, or too far out of the view of {_who(models)}, to "
                "hold the centre of a patch; they are misses, and chance is 0 there."
            )
    key = next(iter(found["chance"]))
    chances = {"base": found["chance_of_base"][key], "finetuned": found["chance"][key]}
    if chances["base"] != chances["finetuned"]:
        lines.append(
            "the two models see the images through different views, so that chance differs too: "
            f"{chances['base']:.1f} % for the base, {chances['finetuned']:.1f} % (shown) for the fine-tuned model at {key}."
        )
    if min(chances.values()) > 0:
        times = {model: found[model][key] / chances[model] for model in MODELS}
        lines.append(
            f"{key} is {times['base']:.1f} times chance for the base, {times['finetuned']:.1f} times for the fine-tuned model."
        )
    if verdict(found["difference"][key]) == "no difference shown":
        lines.append(f"no difference shown in {key}: the interval includes 0.")
    return lines


def _dataset(name: str, values: Mapping[str, Any], pictures: Sequence[Picture], facts: Facts) -> dict[str, Any]:
    """What the template shows of one data set."""
    return {
        "name": name,
        "retrieval": [
            {"kind": kind, "found": values[kind], "rows": _retrieval_rows(values[kind])}
            for kind in ("long", "short")
            if kind in values
        ],
        "localisation": values.get("localisation"),
        "localisation_rows": _rows(values["localisation"], "") if "localisation" in values else [],
        "tasks": [
            {**section._asdict(), "rows": _task_rows(values[task])}
            for task, section in facts.tasks.items()
            if task in values and task not in OWN_SECTIONS
        ],
        "seconds": values["seconds"],
        "pictures": [picture for picture in pictures if picture.dataset == name],
    }


def _task_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a task's table; `queries` names the variant where there are several."""
    variants = {"": found} if "difference" in found else found
    rows = []
    for name, block in variants.items():
        some = []
        for direction in DIRECTIONS:
            some += _rows(_direction(block, direction), DIRECTION_LABELS[direction])[:SHOWN]
        if "drop" in block:
            some += [{**row, "metric": f"drop of {row['metric']}"} for row in _rows(block["drop"], "both, mean")]
        rows += [{**row, "queries": name} for row in some]
    return rows


def _retrieval_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for direction in DIRECTIONS for row in _rows(_direction(found, direction), DIRECTION_LABELS[direction])]


def _direction(found: Mapping[str, Any], direction: str) -> dict[str, Any]:
    return {part: found[part][direction] for part in (*MODELS, "difference", "chance") if part in found}


def _rows(found: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "metric": key,
            "base": found["base"][key],
            "finetuned": found["finetuned"][key],
            "chance": found.get("chance", {}).get(key),
            "difference": difference,
            "verdict": verdict(difference),
        }
        for key, difference in found["difference"].items()
    ]


def _first(found: Mapping[str, Any]) -> str:
    """The key of the smallest k asked for that comes first, R@1 as a rule."""
    return next(iter(found["chance"]["text_to_image"]))


def _change(found: Mapping[str, Any], direction: str, key: str) -> str:
    base, tuned = found["base"][direction][key], found["finetuned"][direction][key]
    return f"{base:.1f} → {tuned:.1f} % ({_difference_words(found['difference'][direction][key])})"


def _difference_words(difference: Mapping[str, float]) -> str:
    words = f"{_signed(difference['value'])}, 95 % interval {_signed(difference['low'])} to {_signed(difference['high'])}"
    return words if verdict(difference) != "no difference shown" else f"{words}: no difference shown"


def _best_patches(key: str) -> str:
    count = key.removeprefix("hit@")
    return "the most similar patch" if count == "1" else f"one of the {count} most similar patches"


def _number(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}".replace("-", "−")


def _signed(value: float) -> str:
    rounded = round(value, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _html(text: str, folder: Path) -> str:
    """The body of the page, with tables that scroll by themselves on a narrow screen and pictures in the page."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")

    def embed(match: re.Match[str]) -> str:
        path = folder / match[1]
        return f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"' if path.is_file() else match[0]

    return re.sub(r'src="([^":/]+\.png)"', embed, body)
