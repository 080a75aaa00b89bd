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
from fast_goal.evaluation.headline import MODELS, MODES, SUITES, suites_of
from fast_goal.evaluation.pictures import DIRECTION_LABELS, LABELS
from fast_goal.evaluation.published import Recipe
from fast_goal.evaluation.remarks import CASES, LEVEL, first_k, leaves_out_zero, notes, verdict
from fast_goal.evaluation.retrieval import DIRECTIONS
from fast_goal.evaluation.tasks import Section
from fast_goal.files import read_json, write_json, write_text

DROP = "both ways, mean"
WIDE = 1100  # pixels from which a picture scrolls on a narrow screen instead of shrinking; a guess
ANSWERED = {"composition": "the true caption is told from all its foils in", "zero_shot": "the right class is found in"}
MEAN = {"accuracy": "", "macro": ", the mean of the groups"}
MODE_KS = 3  # k of the modes that are listed
MOST_CLASSES = 60  # of a segmentation that are listed, a guess at what is read
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
    scratch_split: str  # whose short captions a scratch base was trained on; empty: on none, its weights are as they were drawn
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
    environment.filters |= {
        "number": _number,
        "signed": _signed,
        "time": _time,
        "cost": _cost,
        "p": _p,
        "yaml": _yaml,
        "cell": _cell,
    }
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
        most_classes=MOST_CLASSES,
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
            change = _change(found, "text_to_image", first_k(found))
            lines.append(
                f"`{name}`, {found['captions']:,} long captions, {found['images']:,} images: "
                f"text-to-image {first_k(found)} {change}."
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
        for kind, found in values.get("conditioned", {}).items():
            key = next(iter(found["global"]["text_to_image"]))
            change = found["difference"]["conditioned"]["text_to_image"][key]
            ways = " → ".join(f"{found[mode]['text_to_image'][key]:.1f}" for mode in ("global", "conditioned"))
            lines.append(
                f"`{name}`, {_asked(kind)}, the fine-tuned model asked by its plain and by its text-conditioned embeddings: "
                f"text-to-image {key} {ways} % ({_difference_words(change)})."
            )
        for suite, found in values.get("segmentation", {}).items():
            lines.append(
                f"`{name}`, {suite}, the {found['names']} classes of the pixels of {found['images']:,} images: mIoU "
                f"{found['base']['mIoU']:.1f} → {found['finetuned']['mIoU']:.1f} % "
                f"({_difference_words(found['difference']['mIoU'])}; chance: {found['chance']['mIoU']:.1f} %)."
            )
        for task, suite, found in suites_of(values):
            key = next(iter(found["difference"]))
            lines.append(
                f"`{name}`, {suite}, {found['cases']:,} {CASES[task]}: {ANSWERED[task]} {found['base'][key]:.1f} → "
                f"{found['finetuned'][key]:.1f} %{MEAN[key]} ({_difference_words(found['difference'][key])}; chance: "
                f"{found['chance'][key]:.1f} %)."
            )
    return lines


def comparisons(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[Comparison]:
    """The first metric of every task, variant and direction (R@1 as a rule), and every drop, of all data sets.

    A variant that repeats the numbers of the long captions is left out.
    """
    found: list[Comparison] = []
    for name, values in metrics.items():
        for task, section in facts.tasks.items():
            variants = values.get(task, {}) if task != "conditioned" else {}  # one model, in several modes
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
    for task, suite, block in _blocks(values):
        label = facts.tasks[task].title if task in facts.tasks else published.TASKS[task]
        for model in (model for model in MODELS if model in block):
            count, first = len(rows), ""
            for way, direction, cases, numbers in _numbers(task, block, model):
                for metric, ours in numbers.items():
                    paper = published.beside(
                        suite or name,
                        facts.backbone,
                        facts.recipes[model],
                        direction,
                        metric,
                        images=cases,
                        task=task,
                        captions=block.get("captions"),
                    )
                    first = first or paper.words
                    if paper.value is not None:
                        row = {"title": f"{label} ({suite})" if suite else label, "model": LABELS[model], "way": way}
                        row |= {"metric": metric, "ours": ours, "place": published.place(paper)}
                        rows.append({**row, **paper._asdict(), "difference": ours - paper.value})
            if len(rows) == count:
                # without the suite's name, so that those that the paper does not have are told in one line
                paper_words = first.replace("the paper", "DeGLA's paper", 1).removesuffix(f", not {suite}") if suite else first
                words = task.replace("_", " ") + (f" of `{suite}`" if suite else "")
                reasons.setdefault(paper_words.removeprefix("no number in "), {}).setdefault(LABELS[model], []).append(words)
    lines = []
    for reason, models in reasons.items():
        told: dict[str, list[str]] = {}
        for model, tasks in models.items():
            told.setdefault(", ".join(tasks), []).append(model)
        who = "; ".join(f"{' and '.join(models)}: {tasks}" for tasks, models in told.items())
        paper_name, _, why = reason.partition(": ")
        lines.append(f"No number of {paper_name} ({who}): {why}.")
    return rows, lines


def left_out(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[str]:
    """The tasks that were not run, and why, in sentences."""
    lines = []
    for name, values in metrics.items():
        for task, reason in values["skipped"].items():
            lines.append(f"`{name}`, split `{facts.split}`: no `{task}`, for want of {reason}.")
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
        "suites": [
            {"task": task, "suite": suite, "title": _title(task, facts), "found": block, "rows": _suite_rows(block, task)}
            for task, suite, block in suites_of(values)
        ],
        "modes": [
            {"kind": kind, "asked": _asked(kind), "found": block, "rows": _mode_rows(block)}
            for kind, block in values.get("conditioned", {}).items()
        ],
        "segmentation": [
            {
                "suite": suite,
                "title": _title("segmentation", facts),
                "found": block,
                "rows": _rows(block, ""),
                "classes": _class_rows(block),
            }
            for suite, block in values.get("segmentation", {}).items()
        ],
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


def _blocks(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """The task, the suite ("" where it has none) and the metrics of what was run and a paper may have a number for."""
    apart = (*SUITES, "conditioned")
    yield from ((task, "", values[task]) for task in published.TASKS if task in values and task not in apart)
    yield from suites_of(values)
    if "short" in values.get("conditioned", {}):  # of which alone there are published numbers
        found = values["conditioned"]["short"]
        yield "conditioned", "", {**found, "finetuned": found["conditioned"], "difference": found["difference"]["conditioned"]}


def _numbers(task: str, block: Mapping[str, Any], model: str) -> Iterator[tuple[str, str, int, Mapping[str, float]]]:
    """What a paper may have a number for: the way in words and as `published.beside` takes it, images or cases, and the
    model's metrics."""
    if task in SUITES:
        mine, cases = block[model], block["cases"]
        yield "", published.WHOLE, cases, {key: mine[key] for key in block["difference"] if key not in ("groups", "families")}
        for group, found in mine["groups"].items():
            yield group, group, found["cases"], {"accuracy": found["accuracy"]}
        for family, value in mine["families"].items():
            yield family, family, cases, {"accuracy": value}
        return
    for way, numbers in _ways(block):
        if way != DROP:
            direction = next((name for name in DIRECTIONS if DIRECTION_LABELS[name] == way), "sentence_to_patch")
            kept = {key: value for key, value in numbers[model].items() if key.startswith(("R@", "hit@"))}
            yield way, direction, block["images"], kept


def _title(task: str, facts: Facts) -> str:
    return facts.tasks[task].title if task in facts.tasks else published.TASKS.get(task, task.replace("_", " ")).capitalize()


def _suite_rows(found: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """The groups, the families, and the suite as a whole."""
    what = "classes" if task == "zero_shot" else "groups"
    change, rows = found["difference"], []

    def add(label: str, numbers: Mapping[str, Any], counts: Mapping[str, Mapping[str, Any]]) -> None:
        ties = {model: counts[model]["ties"] for model in counts}
        row = {"label": label, "cases": counts["base"]["cases"] if counts else None, "ties": ties}
        rows.append({**row, **numbers, "verdict": verdict(numbers["difference"])})

    def numbers_of(*path: str) -> dict[str, Any]:
        return {part: _below(found[part], path) for part in (*MODELS, "difference", "chance")}

    if len(change["groups"]) > 1:
        for group in change["groups"]:
            counts = {model: found[model]["groups"][group] for model in MODELS}
            add(group, numbers_of("groups", group, "accuracy"), counts)
    for family in change["families"]:
        add(f"mean of {family}", numbers_of("families", family), {})
    if "macro" in change:
        add(f"mean of the {what}", numbers_of("macro"), {})
    whole = {model: {"cases": found["cases"], "ties": found[model]["ties"]} for model in MODELS}
    add("all", numbers_of("accuracy"), whole)
    for key in (key for key in change if key.startswith("accuracy@")):
        add(f"all, among the first {key.partition('@')[2]}", numbers_of(key), {})
    return rows


def _asked(kind: str) -> str:
    """What a task of retrieval asks with, in words."""
    return {"long": "long captions", "short": "short captions", "sentences": "single sentences"}.get(
        kind, kind.replace("_", " ")
    )


def _mode_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The recall of each mode, and what the others differ by from `global`, at the first MODE_KS k of both directions."""
    return [
        {
            "label": DIRECTION_LABELS[direction],
            "metric": key,
            **{mode: found[mode][direction][key] for mode in MODES},
            "changes": [found["difference"][mode][direction][key] for mode in MODES[1:]],
        }
        for direction in DIRECTIONS
        for key in list(found["difference"]["conditioned"][direction])[:MODE_KS]
    ]


def _class_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The IoU of each class by both models; of many classes those in which the models differ most. A class that a model neither
    has to find nor finds has none."""
    classes = {model: found[model]["classes"] for model in MODELS}
    rows = [
        {"label": name, **{model: classes[model].get(name) for model in MODELS}}
        for name in dict.fromkeys(name for model in MODELS for name in classes[model])
    ]
    if len(rows) > MOST_CLASSES:
        change = {row["label"]: abs((row["finetuned"] or 0.0) - (row["base"] or 0.0)) for row in rows}
        most = set(sorted(change, key=lambda label: -change[label])[:MOST_CLASSES])
        rows = [row for row in rows if row["label"] in most]
    return rows


def _below(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values[key]
    return values


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


def _change(found: Mapping[str, Any], direction: str, key: str) -> str:
    base, tuned = found["base"][direction][key], found["finetuned"][direction][key]
    return f"{base:.1f} → {tuned:.1f} % ({_difference_words(found['difference'][direction][key])})"


def _difference_words(difference: Mapping[str, float]) -> str:
    words = f"{_signed(difference['value'])}, 95 % interval {_signed(difference['low'])} to {_signed(difference['high'])}"
    if verdict(difference) != "no difference shown":
        return words
    # else a reader would take the interval's word for it
    tested = f", p {_p(difference['p'])}" if leaves_out_zero(difference) else ""
    return f"{words}{tested}: no difference shown"


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


def _cost(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


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
