"""What a reader of the report must know so as not to read too much into the numbers, in sentences made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fast_goal.evaluation.headline import MODELS, MODES, suites_of
from fast_goal.evaluation.pictures import DIRECTION_LABELS, LABELS
from fast_goal.evaluation.retrieval import DIRECTIONS

if TYPE_CHECKING:
    from fast_goal.evaluation.report import Facts

SMALL = 200  # a guess: below so many queries the intervals are too wide to tell models of like quality apart
MANY_TIES = 1.0  # percent of the queries; a guess
LEVEL = 0.05  # of a test; in the report of all comparisons together
CASES = {"composition": "choices", "zero_shot": "images to classify"}
MEASURES = {"accuracy": "accuracy", "macro": "the mean of the groups"}


def notes(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[str]:
    """What a reader must know so as not to read too much into the numbers."""
    lines = [
        f"The intervals are 95 % bootstrap percentile intervals over the test images ({facts.bootstrap_samples:,} resamples; "
        "the captions of an image stay together; both models on the same resamples). They say how far the choice of test "
        "images matters. They do not say how far another training seed would: this is one training run. p: the share of all "
        "ways to swap the two models image by image that gives at least as large a difference; of many such numbers some are "
        "small by chance. Holm's correction is over the comparisons of *What is significant* alone; the tables of single "
        "tasks, with other k and slices, are not corrected.",
        "Tie rule: a candidate with exactly the score of the right one does not count against the query of a retrieval; where "
        "one of several captions or classes is chosen, it makes the answer wrong.",
    ]
    if facts.base_kind == "scratch":
        lines.append(_scratch_note(metrics, facts))
    for name, values in metrics.items():
        for kind in ("long", "short"):
            if kind in values:
                lines += [f"`{name}`, {kind} captions: {line}" for line in _retrieval_notes(values[kind], kind)]
        if "localisation" in values:
            lines += [f"`{name}`, localisation: {line}" for line in _localisation_notes(values["localisation"])]
        for kind, found in values.get("conditioned", {}).items():
            lines += [f"`{name}`, asked by the text, {kind}: {line}" for line in _mode_notes(found)]
        for suite, found in values.get("segmentation", {}).items():
            lines += [f"`{name}`, classes of pixels, {suite}: {line}" for line in _segmentation_notes(found)]
        for task, suite, found in suites_of(values):
            lines += [f"`{name}`, {task.replace('_', ' ')} of {suite}: {line}" for line in _suite_notes(found, task)]
        if values["independent"] < values["images"]:
            lines.append(
                f"`{name}`: the {values['images']:,} images show {values['independent']:,} scenes; those of one, which differ "
                "in little, are resampled and swapped together."
            )
    return lines


def verdict(difference: Mapping[str, float]) -> str:
    """What the interval of a difference and its test allow to say, where both say it."""
    if difference["p"] < LEVEL:
        if difference["low"] > 0:
            return "higher"
        if difference["high"] < 0:
            return "lower"
    return "no difference shown"


def leaves_out_zero(difference: Mapping[str, float]) -> bool:
    """Whether the interval by itself would show a difference."""
    return difference["low"] > 0 or difference["high"] < 0


def first_k(found: Mapping[str, Any]) -> str:
    """The key of the smallest k asked for that comes first, R@1 as a rule."""
    return next(iter(found["chance"]["text_to_image"]))


def _why_not(difference: Mapping[str, float]) -> str:
    """Why no difference is shown."""
    if leaves_out_zero(difference):
        return f"the interval leaves out 0, but p is {difference['p']:.2f}"
    return "the interval includes 0"


def _scratch_note(metrics: Mapping[str, Mapping[str, Any]], facts: Facts) -> str:
    weak = [
        f"{found['base']['text_to_image'][first_k(found)]:.1f} % {first_k(found)} text-to-image on the {kind} captions of "
        f"`{name}` (chance {found['chance']['text_to_image'][first_k(found)]:.1f} %)"
        for name, values in metrics.items()
        for kind in ("long", "short")
        if kind in values
        for found in [values[kind]]
    ]
    made = f"trained here from scratch on nothing but the short captions of the split `{facts.scratch_split}`"
    if not facts.scratch_split:
        made = "with weights as they were drawn"
    return (
        f"**The base is weak.** It is no published CLIP but a small one, {made}; it reaches "
        f"{'; '.join(weak) or 'no measured recall'}. The absolute "
        "numbers do not compare with published ones, and a gain over this base does not predict the gain over a pretrained one."
    )


def _retrieval_notes(found: Mapping[str, Any], kind: str) -> list[str]:
    lines = []
    key = first_k(found)
    unclear: dict[str, list[str]] = {}
    for direction in DIRECTIONS:
        change = found["difference"][direction][key]
        if verdict(change) == "no difference shown":
            unclear.setdefault(_why_not(change), []).append(DIRECTION_LABELS[direction])
    lines += [f"no difference shown in {key} {' and '.join(ways)}: {why}." for why, ways in unclear.items()]
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
        lines.append(f"no difference shown in {key}: {_why_not(found['difference'][key])}.")
    return lines


def _suite_notes(found: Mapping[str, Any], task: str) -> list[str]:
    lines, cases = [], found["cases"]
    key = next(iter(found["difference"]))
    seen = verdict(found["difference"][key])
    if seen == "no difference shown":
        lines.append(f"no difference shown in {MEASURES[key]}: {_why_not(found['difference'][key])}.")
    if seen == "lower":
        forgot = "; what the base knew was partly forgotten" if task == "zero_shot" else ""
        lines.append(f"the fine-tuned model is worse in {MEASURES[key]}{forgot}.")
    ties = {model: 100 * found[model]["ties"] / cases for model in MODELS}
    if max(ties.values()) > MANY_TIES:
        shares = " and ".join(f"{share:.1f} % of the answers of the {LABELS[model]} model" for model, share in ties.items())
        lines.append(
            f"{shares} are wrong for nothing but a tie (texts that are alike as far as the model reads, or embeddings that "
            "collapsed)."
        )
    for count, models in _by_value(found.get("truncated", {})).items():
        if count:
            context = found["context_length"][models[0]]
            lines.append(
                f"{count:,} of {cases:,} choices have a text of more than the {context} tokens of {_who(models)}, which sees "
                "only its beginning."
            )
    if cases < SMALL:
        lines.append(f"only {cases:,} {CASES[task]}: the intervals are wide.")
    return lines


def _mode_notes(found: Mapping[str, Any]) -> list[str]:
    said: dict[tuple[str, str], list[str]] = {}  # verdict and direction -> modes
    for mode in MODES[1:]:
        for direction in DIRECTIONS:
            key, change = next(iter(found["difference"][mode][direction].items()))
            said.setdefault((verdict(change), f"{key} {DIRECTION_LABELS[direction]}"), []).append(mode)
    merged: dict[tuple[str, str], list[str]] = {}
    for (words, way), modes in said.items():
        merged.setdefault((words, " and ".join(modes)), []).append(way)
    lines = [
        f"{modes}: {words} {'than' if words == 'lower' else 'from'} global in {' and '.join(ways)}."
        for (words, modes), ways in merged.items()
        if words != "higher"
    ]
    tied = {mode: max(found[mode][direction]["tied"] for direction in DIRECTIONS) for mode in MODES}
    if max(tied.values()) > tied["global"] + MANY_TIES:
        shares = ", ".join(f"{mode} {share:.1f} %" for mode, share in tied.items())
        lines.append(f"queries with a wrong candidate tied with the right one: {shares}; their recall is an upper bound.")
    if found["captions"] < SMALL:
        lines.append(f"only {found['captions']:,} queries: the intervals are wide.")
    return lines


def _segmentation_notes(found: Mapping[str, Any]) -> list[str]:
    lines, change = [], found["difference"]["mIoU"]
    if verdict(change) == "no difference shown":
        lines.append(f"no difference shown in mIoU: {_why_not(change)}.")
    if verdict(change) == "lower":
        lines.append("the fine-tuned model is worse in mIoU.")
    for count, models in _by_value(found["outside"]).items():
        if count:
            share = 100 * count / found["pixels"]
            lines.append(f"{share:.1f} % of the pixels that count lie out of the view of {_who(models)} and are not scored.")
    if min(found[model]["mIoU"] for model in MODELS) < found["chance"]["mIoU"]:
        lines.append(
            "mIoU lies below that of random classes where a model puts most pixels into few classes: the others then hardly "
            "have any of their pixels."
        )
    if found["independent"] < SMALL:
        lines.append(f"only {found['independent']:,} independent images: the interval is wide.")
    return lines


def _by_value(values: Mapping[str, int]) -> dict[int, list[str]]:
    """The models that share a value, so that it is said once."""
    return {value: [model for model in MODELS if values[model] == value] for value in values.values()}


def _who(models: Sequence[str]) -> str:
    return "either model" if len(models) > 1 else f"the {LABELS[models[0]]} model"
