"""The numbers of FAST-GOAL's tables (arXiv 2605.26615), of DeGLA's (arXiv 2504.16801) and of FLAIR's README (arXiv
2412.03561), and which of them a measurement of ours may stand beside.

published_results.csv has a row per number, those of DeGLA and FLAIR under these words and what was measured. `beside` finds
the one that a number of ours compares with: same data set, test images, captions, backbone, task, and a model that came about
the same way (`Recipe`). Where there is none, it says why. The data set's split, learning rate and view are not compared: the
papers do not state them all.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

from fast_goal.config import Params, parts_of
from fast_goal.evaluation.headline import SUITES

DEGLA, FLAIR = "DeGLA", "FLAIR"
WHOLE = "all"  # the way of a number that speaks of a suite as a whole
FILE = "published_results.csv"
COLUMNS = ("table", "dataset", "method", "backbone", "direction", "metric", "value")
NAMES = {
    "docci": "DOCCI",
    "dci": "DCI",
    "mscoco": "MSCOCO",
    "flickr30k": "Flickr30k",
    "glit100k": "GLIT100k",
    "urban1k": "Urban1k",
    "sharegpt4v": "ShareGPT4V",
    "sugarcrepe": "SugarCrepe",
    "vg_relation": "VG-Relation",
    "vg_attribution": "VG-Attribution",
    "coco_order": "COCO-Order",
    "flickr_order": "Flickr30k-Order",
    "valse": "VALSE",
    "imagenet": "ImageNet",
}
IMAGES = {"DOCCI": 5000, "DCI": 7602, "MSCOCO": 5000, "Flickr30k": 1000}  # of the test
CAPTIONS_PER_IMAGE = {"DOCCI": 1, "DCI": 1, "MSCOCO": 5, "Flickr30k": 5}
# Of DeGLA's suites, by group where it tells the groups apart: as the suites' own papers have them, which DeGLA does not repeat.
CASES = {
    "SugarCrepe": {
        **{"replace_obj": 1652, "replace_att": 788, "replace_rel": 1406},
        **{"swap_obj": 245, "swap_att": 666, "add_obj": 2062, "add_att": 692},
    },
    "VG-Relation": {WHOLE: 23_937},
    "VG-Attribution": {WHOLE: 28_748},
    "COCO-Order": {WHOLE: 25_010},
    "Flickr30k-Order": {WHOLE: 5000},
    "VALSE": {
        **{"existence": 505, "plurals": 851, "counting_hard": 868, "counting_small_quant": 988, "counting_adversarial": 691},
        **{"relations": 535, "action_replacement": 648, "actant_swap": 949},
        **{"coreference_standard": 708, "coreference_hard": 104, "foil_it": 943},
    },
    "ImageNet": {WHOLE: 50_000},
}
NEARLY = 0.01  # of the cases that may be wanting, or too many, in a comparison that is not refused; a guess
DRAWN = 2000  # images of DCI that Table V keeps for the test
TASKS = {
    "long": "retrieval with long captions",
    "short": "retrieval with short captions",
    "sentence_average": "retrieval with averaged sentences",
    "robustness": "retrieval with a false sentence",
    "localisation": "patch localisation",
    "conditioned": "text-conditioned retrieval with short captions",
    "composition": "true and false captions",
    "zero_shot": "zero-shot classification",
}
# of the tables; the others are retrieval
OWN_TASKS = {"XV": "sentence_average", "XVI": "localisation", "XVII": "robustness", FLAIR: "conditioned"}
FLAIR_EPOCHS = 32
FULL = "global+local+TSL"
NEGATIVES = f"{FULL} with in-image negatives"
TERMS = {
    ("global",): "global",
    ("local",): "local",
    ("global", "local"): "global+local",
    ("global", "local", "tsl_image", "tsl_text"): FULL,
}
WEIGHTS = {"global": 1.0, "local": 0.5, "tsl_image": 1.0, "tsl_text": 1.0}  # the paper's, of the terms it uses together
DETECTOR = "hustvl/yolos-base"
DEGLA_SETTINGS = {  # of the objective `degla`
    "weights": {"global": 1.0, "igc": 0.1, "tgc": 0.1, "distillation": 0.005},
    "tgc_scale": 10.0,
    "distillation": "sum",
    "teacher_decay": 0.9996,
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A number of a paper, in percent unless `metric` says otherwise. An empty string: the table has no such column."""

    table: str  # its Roman number; DEGLA or FLAIR for theirs
    title: str
    dataset: str
    method: str
    backbone: str
    direction: str
    metric: str
    value: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model came about. The fields but the first stay empty for weights that are measured as they were published.

    In the paper's recipes None is what it does not tell, and agrees with everything.
    """

    weights: str = "CLIP"  # what it starts from; CLIP is OpenAI's, other published models stand under their names
    trained_on: tuple[str, ...] = ()  # data sets, as in params.yaml, of one stage after the other
    objective: str = ""
    regions: str = ""  # that FLISM chooses from; "" where the objective has no local term
    pairs: str | None = ""  # local pairs of an image
    batch_sizes: tuple[int, ...] | None = ()
    epochs: tuple[int, ...] | None = ()
    detector: str = ""  # another one than the paper's is remarked on, and no reason against a comparison


class Beside(NamedTuple):
    """The paper's number beside one of ours. None where there is none; `words` then says why, else what to bear in mind."""

    value: float | None
    table: str
    method: str
    words: str


class _Setting(NamedTuple):
    task: str
    images: int  # or cases, of a suite
    captions: int | None  # of all images; None: not told
    recipe: Recipe


FAST_GOAL = Recipe("CLIP", ("glit100k",), FULL, "both", "single best pair", (256,), (10,), DETECTOR)
Candidates = list[tuple[Published, _Setting]]
Step = tuple[Callable[[Published, _Setting], bool], Callable[[Candidates], str]]  # what has to agree, and why none does


@lru_cache(maxsize=1)
def results() -> tuple[Published, ...]:
    """Every number of the paper's tables, in the order of the file."""
    text = (resources.files("fast_goal.evaluation") / FILE).read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    if tuple(rows.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{FILE}: expected the columns {', '.join(COLUMNS)}, got {rows.fieldnames}")
    found = []
    for row in rows:
        table, _, title = row.pop("table").partition(" ")
        found.append(Published(table, title, **{**row, "value": float(row["value"])}))
    return tuple(found)


def beside(
    dataset: str,
    backbone: str,
    model: Recipe | str,
    direction: str,
    metric: str,
    *,
    images: int,
    task: str = "long",
    captions: int | None = None,
    table: str | None = None,
) -> Beside:
    """The paper's number for a measurement, or why it has none.

    Args:
        dataset: its name in params.yaml, or the paper's.
        backbone: as open_clip (`ViT-B-16`) or the paper (`ViT-B/16`) writes it.
        model: how it came about (`recipe_of`), or the paper's name for it, where that is known (the row of an ablation).
        direction: text_to_image, image_to_text, or sentence_to_patch for patch localisation; the group or family of a suite, or
            WHOLE.
        metric: `R@k`, or `hit@k` for patch localisation; `accuracy` or `macro` of a suite.
        images: of the test, or cases of the suite (of the group), and captions: of the test, None where they are no queries.
        task: one of TASKS; any other has no number.
        table: the only one to look at.
    """
    name, own = _paper_name(dataset), re.sub(r"^(ViT-\w)-(\d+)(-quickgelu)?$", r"\1/\2", backbone)
    metric = metric.replace("hit@", "Top-")
    suite = task in SUITES
    direction = direction.casefold().replace("-", "_") if suite else direction
    left = [pair for pair in _comparable() if (pair[1].task in SUITES) == suite]
    things = "cases" if task == "composition" else "images"
    steps: list[Step] = [
        (lambda row, _: row.dataset == name, lambda had: f"it measures {_list(r.dataset for r, _ in had)}, not {name}"),
        (lambda row, _: table in (None, row.table), lambda _: f"Table {table} has none of {name}"),
        (lambda _, s: s.task == task, lambda had: f"on {name} it measures {_tasks(had)}, not {TASKS.get(task, task)}"),
        (
            lambda row, _: row.backbone == own,
            lambda had: f"its models there are {_list(r.backbone for r, _ in had)}, not {own}",
        ),
        (
            lambda _, s: abs(s.images - images) <= (NEARLY * s.images if suite else 0),
            lambda had: f"its test has {_list(f'{s.images:,}' for _, s in had)} {things} of {name}, ours {images:,}",
        ),
        (
            lambda _, s: None in (captions, s.captions) or s.captions == captions,
            lambda had: f"its test has {_list(f'{s.captions:,}' for _, s in had)} captions of {name}, ours {captions or 0:,}",
        ),
        *_model_steps(model),
        (lambda row, _: row.direction == direction, lambda had: f"it gives {_list(r.direction for r, _ in had)} alone there"),
        (lambda row, _: row.metric == metric, lambda had: f"it gives {_list(r.metric for r, _ in had)} there, not {metric}"),
    ]
    for fits, words in steps:
        kept = [pair for pair in left if fits(*pair)]
        if not kept:
            return Beside(None, "", "", f"no number in the paper: {words(left)}")
        left = kept
    found, setting = left[0]
    words = _remarks(left, setting, model)
    if setting.images != images:
        words.append(f"its test has, as far as we know, {setting.images:,} {things}, ours {images:,}")
    return Beside(found.value, found.table, found.method, "; ".join(words))


def place(found: Beside) -> str:
    """Where a number was published, in words."""
    if found.table == FLAIR:
        return f"FLAIR's README, {found.method}"
    return f"DeGLA's paper, {found.method}" if found.table == DEGLA else f"Table {found.table}, {found.method}"


def recipe_of(params: Params, model: str) -> Recipe:
    """How the model `base` or `finetuned` of a run came about."""
    base = params.base
    if base.kind == "scratch":
        weights = "a CLIP trained from scratch"
    else:
        weights = "CLIP" if base.pretrained == "openai" else f"{base.model} {base.pretrained or ''}".strip()
    if model == "base":
        return Recipe(weights)
    stages = [(params.download.train_dataset, params.objective, params.finetune)]
    if params.intermediate.dataset is not None:
        stages.insert(0, (params.intermediate.dataset, params.intermediate.objective, params.intermediate.training))
    objectives = list(dict.fromkeys(_objective(objective) for _, objective, _ in stages))
    recipe = Recipe(
        weights,
        tuple(dataset for dataset, _, _ in stages),
        ", then ".join(objectives),
        batch_sizes=tuple(training.batch_size for _, _, training in stages),
        epochs=tuple(training.epochs for _, _, training in stages),
    )
    if not any(_has_local(objective) for _, objective, _ in stages):
        return recipe
    flism = params.flism
    weighting = {"uniform": "uniform", "similarity": "similarity-weighted"}[flism.pair_weights]
    several = any(training.pairs == "all" for _, _, training in stages) and flism.top_k > 1
    return dataclasses.replace(
        recipe,
        regions=flism.regions,
        pairs=f"{flism.choice} regions"
        if flism.choice != "best"
        else f"top-{flism.top_k} {weighting}"
        if several
        else FAST_GOAL.pairs,
        detector="" if flism.regions == "spatial" else base.detector.weights,
    )


def _objective(values: dict[str, Any]) -> str:
    """An objective of params.yaml in the paper's words, where it has some."""
    weights = values.get("weights", {})
    terms = TERMS.get(tuple(term for term in WEIGHTS if weights.get(term)))
    if values["name"] == "degla":
        return _degla(values)
    if parts := parts_of(values):
        weighted = ((values["parts"][name]["weight"], _objective(part)) for name, part in parts.items())
        return " + ".join(words if weight == 1 else f"{weight:g} {words}" for weight, words in weighted)
    if values["name"] != "fast_goal" or terms is None:
        return str(values["name"])
    if values["alignment"] != "exact":
        return f"{terms} with the alignment of {values['alignment']}"
    used = {term: weight for term, weight in weights.items() if weight}
    if len(used) > 1 and used != {term: WEIGHTS[term] for term in used}:
        return f"{terms} with other weights"
    return terms if values["in_image_negatives"] is None else f"{terms} with in-image negatives"


def _degla(values: dict[str, Any]) -> str:
    if [term for term, weight in values["weights"].items() if weight] == ["global"]:
        return "global with hard negative captions"
    changed = [key.replace("_", " ") for key, value in DEGLA_SETTINGS.items() if values.get(key) != value]
    return f"degla with other {_list(changed)}" if changed else "degla"


def _has_local(objective: dict[str, Any]) -> bool:
    if parts := parts_of(objective):
        return any(map(_has_local, parts.values()))
    return objective["name"] not in ("degla", "flair") and _objective(objective) != "global"


@lru_cache(maxsize=1)
def _comparable() -> Candidates:
    """The numbers of models on test sets, with what they were measured on and how the models came about."""
    found = []
    for row in results():
        if row.table == DEGLA and row.direction:
            cases = CASES[row.dataset]
            task = "zero_shot" if row.dataset == "ImageNet" else "composition"
            found.append((row, _Setting(task, cases.get(row.direction, sum(cases.values())), None, _recipe(row))))
        if row.dataset not in IMAGES or not row.direction:
            continue
        per_image = CAPTIONS_PER_IMAGE[row.dataset]
        task = OWN_TASKS.get(row.table, "long" if per_image == 1 else "short")
        images = DRAWN if (row.table, row.dataset) == ("V", "DCI") else IMAGES[row.dataset]
        captions = None if task == "localisation" else images * per_image
        found.append((row, _Setting(task, images, captions, _recipe(row))))
    return found


def _recipe(row: Published) -> Recipe:
    own = row.dataset.casefold()
    match row.table, row.method:
        case ("FLAIR", method):  # the batches are not the same in its README and its scripts
            data = method.split()[-1].casefold()
            return Recipe("a CLIP trained from scratch", (data,), "flair", batch_sizes=None, epochs=(FLAIR_EPOCHS,))
        case (_, "DeGLA"):
            return Recipe("CLIP", ("mscoco",), "degla", batch_sizes=(256,), epochs=(5,))
        case (_, "FAST-GOAL") if row.backbone == "ViT-L/14":
            return dataclasses.replace(FAST_GOAL, batch_sizes=None, epochs=None)
        case (_, "FAST-GOAL") | ("VII", "detector + spatial"):
            return FAST_GOAL
        case ("V", "FAST-GOAL one stage (target only)"):
            return dataclasses.replace(FAST_GOAL, trained_on=(own,), batch_sizes=(64,))
        case ("V", "FAST-GOAL two stages (GLIT100k, then target)"):
            return dataclasses.replace(FAST_GOAL, trained_on=("glit100k", own), batch_sizes=(256, 64), epochs=(10, 10))
        case ("VI", "global"):
            return Recipe("CLIP", ("docci",), "global", batch_sizes=(64,), epochs=(10,))
        case ("VI", terms):
            return dataclasses.replace(FAST_GOAL, trained_on=("docci",), objective=terms, batch_sizes=(64,))
        case ("VII", "detector only"):
            return dataclasses.replace(FAST_GOAL, regions="detector")
        case ("VIII", pairs):
            return dataclasses.replace(FAST_GOAL, pairs=pairs)
        case ("XIV", _):
            stages = {"trained_on": ("glit100k", "glit100k"), "batch_sizes": None, "epochs": None}
            return dataclasses.replace(FAST_GOAL, objective=f"{FULL}, then {NEGATIVES}", pairs=None, **stages)
        case ("XV", "CLIP sentence-avg"):
            return Recipe("CLIP")
    return Recipe(row.method)


def _model_steps(model: Recipe | str) -> list[Step]:
    """What of the model has to agree, one thing after the other."""
    if isinstance(model, str):
        return [(lambda row, _: row.method == model, lambda had: f"its models there are {_list(r.method for r, _ in had)}")]
    ours = dataclasses.replace(model, trained_on=tuple(name.casefold() for name in model.trained_on))

    def step(field: str, sentence: str, words: Callable[[Any], str]) -> Step:
        own = getattr(ours, field)
        return (
            lambda _, setting: getattr(setting.recipe, field) in (None, own),
            lambda had: sentence.format(words(own), _list((words(getattr(s.recipe, field)) for _, s in had), "or")),
        )

    def order(values: tuple[Any, ...]) -> str:
        return " then ".join(map(str, values)) or "nothing more"

    return [
        step("weights", "this model starts from {}, its models there from {}", str),
        step(
            "trained_on",
            "this model was trained on {}, its models there on {}",
            lambda names: order(tuple(map(_paper_name, names))),
        ),
        step("objective", "the objective here is {}, there {}", lambda words: words or "none"),
        step("regions", "the regions here are {}, there {}", lambda words: words or "none"),
        step("pairs", "the local pairs here are {}, there {}", lambda words: words or "none"),
        step("batch_sizes", "this model was trained with batches of {}, its models there of {}", order),
        step("epochs", "this model was trained for {} epochs, its models there for {}", order),
    ]


def _remarks(left: Candidates, setting: _Setting, model: Recipe | str) -> list[str]:
    """What a reader of the comparison must know, though it does not forbid it."""
    found = left[0][0]
    words = [
        f"Table {row.table} gives {row.value:g} for what is, as far as we know, the same setting"
        for row, _ in left[1:]
        if row.value != found.value
    ]
    if isinstance(model, Recipe) and model.detector and model.detector != setting.recipe.detector:
        words.append(f"regions of the detector {model.detector}, the paper's are of YOLOS-base")
    if setting.images == DRAWN:
        words.append(f"the {DRAWN:,} images were drawn anew and are others than the paper's")
    if setting.task == "robustness":
        words.append("the false sentences are others than the paper's")
    if setting.task == "localisation":
        words.append("which boxes and sentences the paper took is not known to us")
    if setting.recipe.objective == "degla":
        words.append("the hard negative captions of the training are others than the paper's")
    if setting.task == "conditioned":
        words.append(
            "as FLAIR's code scores unless told otherwise; whether on these images or on the 1,014 that it takes unless told "
            "otherwise is not known to us"
        )
    if setting.task == "zero_shot":
        words.append("the paper's prompts are not known to us")
    return words


def _paper_name(dataset: str) -> str:
    return NAMES.get(dataset.casefold(), dataset)


def _tasks(had: Candidates) -> str:
    return _list(TASKS[setting.task] for _, setting in had)


def _list(words: Iterable[str], last: str = "and") -> str:
    """Each word once: `a`, `a and b`, `a, b and c`."""
    once = list(dict.fromkeys(words))
    return once[0] if len(once) == 1 else f"{', '.join(once[:-1])} {last} {once[-1]}"
