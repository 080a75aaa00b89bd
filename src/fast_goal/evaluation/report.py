"""The evaluation report: Markdown, and one HTML file that holds its pictures and needs nothing else.

Every sentence about a result is made from the numbers, so that the report says `no difference shown` by itself.
`fast-goal report` writes it again without measuring.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from fast_goal.errors import DataError
from fast_goal.evaluation import published
from fast_goal.evaluation.bootstrap import holm
from fast_goal.evaluation.comparison import MODELS
from fast_goal.evaluation.pictures import DIRECTION_LABELS, LABELS
from fast_goal.evaluation.published import Recipe
from fast_goal.evaluation.retrieval import DIRECTIONS
from fast_goal.evaluation.tasks import Section
from fast_goal.files import read_json, write_json, write_text

SMALL = 200  # a guess: below so many queries the intervals are too wide to tell models of like quality apart
MANY_TIES = 1.0  # percent of the queries; a guess
LEVEL = 0.05  # of all comparisons together
DROP = "both ways, mean"
WIDE = 1100  # pixels from which a picture scrolls on a narrow screen instead of shrinking; a guess
CONTENTS = "[contents]"  # where the list of contents goes


@dataclass(frozen=True)
class Facts:
    """How the numbers came about."""

    experiment: str
    command: str
    commit: str  # short, with "+changes" where the working tree differed
    params: Mapping[str, Any]  # the whole of params.yaml
    params_digest: str
    base_kind: str  # pretrained, scratch
    base_name: str
    backbone: str
    scratch_split: str  # whose short captions a scratch base was trained on
    recipes: Mapping[str, Recipe]  # model -> how it came about, to find the paper's numbers by
    objective: Mapping[str, Any]
    epochs: int
    batch_size: int
    first_stage: Mapping[str, Any]  # data set, epochs and objective of the first stage of the training; empty: there was none
    views: Mapping[str, str]  # model -> how it sees images: crop, squash, pad
    split: str
    datasets: Sequence[Mapping[str, Any]]  # name, use, source, digest, splits (name -> images)
    skipped: Sequence[Mapping[str, Any]]  # dataset, step, reason, count
    tasks: Mapping[str, Section]  # what was asked for, by name
    precision: str  # of the embeddings
    device: str
    bootstrap_samples: int
    seconds: Mapping[str, float]  # step -> wall time

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """Facts as `dataclasses.asdict` and JSON leave them."""
        recipes = {
            model: Recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in recipe.items()})
            for model, recipe in values["recipes"].items()
        }
        return cls(
            **{**values, "recipes": recipes, "tasks": {name: Section(*words) for name, words in values["tasks"].items()}}
        )


@dataclass(frozen=True)
class Picture:
    """A picture beside the report. `text` says what is seen, for those who cannot see it too."""

    file: str
    title: str
    text: str
    dataset: str = ""  # "" for the training


class Comparison(NamedTuple):
    """The fine-tuned model against the base in one number."""

    dataset: str
    title: str  # of the task, with the variant where there are several
    way: str  # direction, "" where there is none
    metric: str
    base: float
    finetuned: float
    difference: Mapping[str, float]
    drop: bool  # of R@1 by altered queries: less is better
    corrected: float  # p-value after Holm's correction over all comparisons

    @property
    def reads_as(self) -> str:
        """What the test and its correction allow to say."""
        if self.corrected < LEVEL:
            return "higher" if self.difference["value"] > 0 else "lower"
        return "only before correction" if self.difference["p"] < LEVEL else "no difference shown"


def write_report(folder: Path, metrics: Mapping[str, Mapping[str, Any]], facts: Facts, pictures: Sequence[Picture]) -> None:
    """Writes report.md, report.html and report.json into `folder`, where the pictures are; `metrics` maps data sets to those
    of `tasks.measure`."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"number": _number, "signed": _signed, "time": _time, "p": _p, "yaml": _yaml, "cell": _cell}
    templates = resources.files("fast_goal.evaluation")
    found = comparisons(metrics, facts)
    text = environment.from_string((templates / "report.md.jinja").read_text(encoding="utf-8")).render(
        facts=facts,
        headlines=headlines(metrics),
        significance=significance(found),
        datasets=[_dataset(name, values, pictures, facts, found) for name, values in metrics.items()],
        training_pictures=[picture for picture in pictures if not picture.dataset],
        left_out=left_out(metrics, facts),
        notes=notes(metrics, facts),
        contents=CONTENTS,
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = text.replace(
        CONTENTS, "\n".join(f"{'  ' * (level - 2)}* [{words}](#{name})" for level, words, name in _headings(text))
    )
    write_text(folder / "report.md", text)
    page = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    write_text(folder / "report.html", page.render(title=html.escape(f"Report: {facts.experiment}"), body=_html(text, folder)))
    write_json(
        folder / "report.json",
        {"facts": dataclasses.asdict(facts), "pictures": [dataclasses.asdict(picture) for picture in pictures]},
    )


def rewrite_report(folder: Path) -> Path:
    """Writes the report of `folder` again from its metrics.json, report.json and pictures; returns the folder.

    Raises DataError where there are none, or they are of another version.
    """
    try:
        metrics, known = read_json(folder / "metrics.json"), read_json(folder / "report.json")
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist. The step `evaluate` writes it: fast-goal evaluate") from None
    try:
        facts, pictures = Facts.from_json(known["facts"]), [Picture(**picture) for picture in known["pictures"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / 'report.json'} is of another version ({error}): run fast-goal evaluate") from None
    measured = {name: values for name, values in metrics.items() if isinstance(values, Mapping)}
    write_report(folder, measured, facts, [picture for picture in pictures if (folder / picture.file).is_file()])
    return folder


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


def comparisons(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[Comparison]:
    """The first metric of every task, variant and direction (R@1 as a rule), and every drop, of all data sets.

    A variant that repeats the numbers of the long captions is left out.
    """
    found: list[Comparison] = []
    for name, values in metrics.items():
        for task, section in facts.tasks.items():
            variants = values.get(task, {})
            for variant, block in ({"": variants} if "difference" in variants else variants).items():
                if task != "long" and block == values.get("long"):
                    continue
                title = f"{section.title} ({variant})" if variant else section.title
                for way, numbers in _ways(block):
                    key = next(iter(numbers["difference"]))
                    pair = [numbers[model][key] for model in MODELS]
                    difference = numbers["difference"][key]
                    found.append(Comparison(name, title, way, key, *pair, difference, way == DROP, 1.0))
    corrected = holm([comparison.difference["p"] for comparison in found])
    return [comparison._replace(corrected=p) for comparison, p in zip(found, corrected, strict=True)]


def significance(found: Sequence[Comparison]) -> list[str]:
    """What is significant and what is not, in sentences."""
    lines = []
    kinds = (
        ("The fine-tuned model is better", False, "higher"),
        ("The fine-tuned model is worse", False, "lower"),
        ("Altered queries cost the fine-tuned model more R@1 than the base", True, "higher"),
        ("Altered queries cost the fine-tuned model less R@1 than the base", True, "lower"),
        ("Significant only without the correction, so nothing to rely on", None, "only before correction"),
        ("No difference shown", None, "no difference shown"),
    )
    several = len({comparison.dataset for comparison in found}) > 1
    for words, drop, verdict_words in kinds:
        mine = [c for c in found if c.reads_as == verdict_words and drop in (None, c.drop)]
        if not mine:
            continue
        said: dict[str, list[str]] = {}
        for one in mine:
            place = f"{one.title} (`{one.dataset}`)" if several else one.title
            way = "drop" if one.drop else one.way
            said.setdefault(place, []).append(f"{way} {_signed(one.difference['value'])}".strip())
        listed = "; ".join(f"{place}: {', '.join(ways)}" for place, ways in said.items())
        lines.append(f"**{words}** ({len(mine)} of {len(found)}). {listed}.")
    return lines


def beside_the_paper(name: str, values: Mapping[str, Any], facts: Facts) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of our numbers and the paper's, and why the others have none: a line per reason."""
    rows: list[dict[str, Any]] = []
    reasons: dict[str, dict[str, list[str]]] = {}
    for task in (task for task in published.TASKS if task in values):
        block = values[task]
        for model in MODELS:
            count, first = len(rows), ""
            for way, numbers in _ways(block):
                for metric, ours in numbers[model].items():
                    if way == DROP or not metric.startswith(("R@", "hit@")):
                        continue
                    paper = published.beside(
                        name,
                        facts.backbone,
                        facts.recipes[model],
                        "sentence_to_patch"
                        if task == "localisation"
                        else next(d for d in DIRECTIONS if DIRECTION_LABELS[d] == way),
                        metric,
                        images=block["images"],
                        task=task,
                        captions=block.get("captions"),
                    )
                    first = first or paper.words
                    if paper.value is not None:
                        label = facts.tasks[task].title if task in facts.tasks else published.TASKS[task]
                        row = {"title": label, "model": LABELS[model], "way": way, "metric": metric, "ours": ours}
                        rows.append({**row, **paper._asdict(), "difference": ours - paper.value})
            if len(rows) == count:
                reasons.setdefault(first.removeprefix("no number in the paper: "), {}).setdefault(LABELS[model], []).append(
                    task
                )
    lines = []
    for reason, models in reasons.items():
        told = {", ".join(task.replace("_", " ") for task in tasks): [] for tasks in models.values()}
        for model, tasks in models.items():
            told[", ".join(task.replace("_", " ") for task in tasks)].append(model)
        who = "; ".join(f"{' and '.join(models)}: {tasks}" for tasks, models in told.items())
        lines.append(f"No number of the paper ({who}): {reason}.")
    return rows, lines


def left_out(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[str]:
    """The tasks that were not run, and why, in sentences."""
    lines = []
    for name, values in metrics.items():
        for task, reason in values["skipped"].items():
            words = task.replace("_", " ")
            lines.append(f"`{name}`: no {words}, for want of {reason} in the split `{facts.split}`.")
    return lines


def notes(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[str]:
    """What a reader must know so as not to read too much into the numbers."""
    lines = [
        f"The intervals are 95 % bootstrap percentile intervals over the test images ({facts.bootstrap_samples:,} resamples; "
        "the captions of an image stay together; both models on the same resamples). They say how far the choice of test "
        "images matters. They do not say how far another training seed would: this is one training run. p: the share of all "
        "ways to swap the two models image by image that gives at least as large a difference; of many such numbers some are "
        "small by chance. Holm's correction is over the comparisons of *What is significant* alone; the tables of single "
        "tasks, with other k and slices, are not corrected.",
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


def _dataset(
    name: str, values: Mapping[str, Any], pictures: Sequence[Picture], facts: Facts, found: Sequence[Comparison]
) -> dict[str, Any]:
    """What the template shows of one data set."""
    paper, apart = beside_the_paper(name, values, facts)
    mine = [comparison for comparison in found if comparison.dataset == name]
    return {
        "name": name,
        "comparisons": [comparison for comparison in mine if not comparison.drop],
        "drops": [comparison for comparison in mine if comparison.drop],
        "about": [section for task, section in facts.tasks.items() if task in values],
        "retrieval": [
            {"kind": kind, "found": values[kind], "rows": _retrieval_rows(values[kind])}
            for kind in ("long", "short")
            if kind in values
        ],
        "localisation": values.get("localisation"),
        "localisation_rows": _rows(values["localisation"], "") if "localisation" in values else [],
        "paper": paper,
        "apart": apart,
        "seconds": values["seconds"],
        "pictures": [picture for picture in pictures if picture.dataset == name],
    }


def _ways(block: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a task's metrics that compare the models: both directions, or the one thing measured, and the drop."""
    if set(DIRECTIONS) <= set(block["difference"]):
        for direction in DIRECTIONS:
            yield DIRECTION_LABELS[direction], _direction(block, direction)
    else:
        yield "", block
    if "drop" in block:
        yield DROP, block["drop"]


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
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _cell(text: Any) -> str:
    """Text as it may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _yaml(values: Any) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()


def _headings(text: str) -> list[tuple[int, str, str]]:
    """Level, words and anchor of each heading below the first level, but for the contents' own."""
    anchors = _Anchors()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found = [(len(marks), words, anchors(words)) for marks, words in re.findall(r"^(#{1,4}) (.+)$", prose, flags=re.M)]
    found = [heading for heading in found if heading[0] in (2, 3)]
    return [heading for heading in found if heading[2] != "contents"]


class _Anchors:
    """Names for headings, as the usual viewers of Markdown make them: no two alike."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}

    def __call__(self, words: str) -> str:
        name = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = self._used[name] = self._used.get(name, -1) + 1
        return f"{name}-{count}" if count else name


def _html(text: str, folder: Path) -> str:
    """The body of the page, with tables that scroll by themselves on a narrow screen and pictures in the page."""
    from markdown_it import MarkdownIt
    from PIL import Image

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")
    anchors = _Anchors()

    def name(match: re.Match[str]) -> str:
        words = html.unescape(re.sub(r"<[^>]+>", "", match[2]))
        return f'<h{match[1]} id="{html.escape(anchors(words))}">{match[2]}</h{match[1]}>'

    def embed(match: re.Match[str]) -> str:
        path = folder / match[1]
        if not path.is_file():
            return match[0]
        with Image.open(path) as image:
            kind = 'class="wide" ' if image.width > WIDE else ""
        return f'{kind}src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"'

    body = re.sub(r"<h([1-4])>(.*?)</h\1>", name, body)
    return re.sub(r'src="([^":/]+\.png)"', embed, body)
