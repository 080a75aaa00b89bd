"""drift.md: what a run found, in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fast_goal.evaluation.pictures import DIRECTION_LABELS
from fast_goal.monitoring.data import ROWS, STATISTICS, WHAT

PICTURES = {  # file -> title
    "drift_over_time.png": "Data drift over time",
    "probe_over_time.png": "Models over time",
    "map.png": "Embeddings of the base model",
    "lengths.png": "Length of the captions",
    "detections.png": "What the detector finds",
}


def verdict(found: Mapping[str, Any]) -> str:
    """One line: whether the data drifted, and what of them."""
    if not found["tests"]:
        return "Data: nothing could be compared."
    moved: dict[str, list[str]] = {}
    for test in found["tests"]:
        if test["drifted"]:
            moved.setdefault(test["rows"], []).append(WHAT[test["what"]])
    if moved:
        count = sum(map(len, moved.values()))
        words = "; ".join(f"{ROWS[kind]}: {', '.join(names)}" for kind, names in moved.items())
        return f"Data: drifted in {count} of {len(found['tests'])} tests ({words})."
    return f"Data: no drift shown by {len(found['tests'])} tests."


def markdown(found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report. found: drift.json. pictures: the files that were drawn, of PICTURES."""
    data, reference = found["data"], found["reference"]
    parts = [
        f"# Drift: {found['dataset']}, {found['time']}",
        f"**{verdict(found)}**",
        *(f"* {note}" for note in found["notes"]),
        "## What is compared",
        f"Reference: {reference['text']}",
        f"Present: data set {found['dataset']} (digest {found['digest']}), {data['images']:,} training images, of which "
        f"{data['new_images']:,} are new and {data['new_captions']:,} long captions are; {data['gone_images']:,} images of the "
        "reference are gone.",
        "## Tests",
        *_tests(found),
        "## Models on the probe set",
        *_probe(found["probe"]),
    ]
    parts += [f"## {PICTURES[file]}\n\n![{PICTURES[file]}]({file})" for file in pictures]
    return "\n\n".join(parts).replace("\n\n* ", "\n* ") + "\n"


def _tests(found: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {WHAT[test['what']]} | {ROWS[test['rows']]} | {STATISTICS[test['what']]} | {test['statistic']:.4f} | "
        f"{max(test['bound'], 0):.4f} | {test['p']:.4f} | {test['p_adjusted']:.4f} | "
        f"{'**drifted**' if test['drifted'] else 'no'} | {test['present']:,} / {test['reference']:,} |"
        for test in found["tests"]
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in found["left_out"]:
        reasons.setdefault((one["rows"], one["reason"]), []).append(WHAT[one["what"]])
    left_out = [f"* Not compared, {ROWS[kind]}: {', '.join(names)}: {why}." for (kind, why), names in reasons.items()]
    if not rows:
        return left_out
    head = "| what | rows | effect size | value | by chance up to | p | p, adjusted | drift | present / reference |"
    table = "\n".join([head, "|---|---|---|---:|---:|---:|---:|---|---:|", *rows])
    legend = (
        "An effect of 0 means alike, of 1 nothing in common; with many rows a small one is significant, too. p: how often "
        "chance alone gives as large an effect (permutation test). Adjusted: for the number of tests (Holm); drift is called "
        f"below {found['significance']:g}."
    )
    return [table, legend, *left_out]


def _probe(probe: Mapping[str, Any]) -> list[str]:
    states = [
        f"{probe[state]:,} {word}"
        for state, word in (("missing", "have vanished"), ("changed", "were changed"))
        if probe[state]
    ]
    lines = [
        f"{probe['pairs']:,} images of {probe['dataset']} with their long captions"
        + (f"; of {probe['drawn']:,} that were drawn, {' and '.join(states)}." if states else ", always the same.")
    ]
    if not probe["models"]:
        return [*lines, "Too few are left to measure anything."]
    against = probe["against"]
    head = (
        "| model | version | R@1, text to image | R@1, image to text | cosine of a pair | of others | scale | "
        f"same first as {against} | CKA with {against}, images | captions |"
    )
    rows = [head, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for model, values in probe["models"].items():
        recall = [f"{values['R@1'][way]:.1f} %" for way in DIRECTION_LABELS]
        agreement = sum(values["agreement"].values()) / 2
        rows.append(
            f"| {model} | {values.get('version', '')} | {' | '.join(recall)} | {values['cosine']:.3f} | "
            f"{values['other_cosine']:.3f} | {values['scale']:.1f} | {agreement:.1f} % | {values['cka']['images']:.3f} | "
            f"{values['cka']['captions']:.3f} |"
        )
    legend = (
        "Same first: of how many captions and images both models find the same first, right or wrong. CKA: how alike they see "
        "similarities, 1 for equal."
    )
    return [*lines, "\n".join(rows), legend]
