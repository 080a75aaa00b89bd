"""The data card: what a data set is, in Markdown and one picture, for people who will use it.

It holds no date and no path of this machine: the same data give the same card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fast_goal.data import captions
from fast_goal.data.quality import Subject
from fast_goal.data.records import SPLITS
from fast_goal.files import atomic_path

CONTEXTS = (77, 248)  # CLIP's own text context and the stretched one
SENTENCE_SAMPLE = 2000  # captions whose sentences are counted: the splitter takes milliseconds for each
TOKENIZE_AT_ONCE = 1024
EXAMPLES = 3  # skipped samples named for each reason
NOT_STATED = "not stated by the source"
LICENCES = {"scenes": "drawn by this project's own generator; the project's licence applies"}
EXPLANATIONS = {
    "scenes": "Procedurally drawn scenes with long and short captions and true boxes.",
    "folder": "A folder of images with a table of captions.",
}


@dataclass(frozen=True)
class CaptionLengths:
    """Lengths of the long captions. tokens: BPE ids with both ends, untruncated; sentences: of a sample of the captions."""

    words: np.ndarray
    tokens: np.ndarray
    sentences: np.ndarray


def caption_lengths(records: pd.DataFrame) -> CaptionLengths:
    """Measures the long captions that are not empty."""
    texts = [text for text in records["long_caption"].fillna("") if text.strip()]
    tokens = [
        np.asarray(captions.tokenize(texts[first : first + TOKENIZE_AT_ONCE], max(CONTEXTS))[1])
        for first in range(0, len(texts), TOKENIZE_AT_ONCE)
    ]
    sample = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), SENTENCE_SAMPLE)).astype(int)) if texts else []
    return CaptionLengths(
        words=np.array([len(text.split()) for text in texts], dtype=int),
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, dtype=int),
        sentences=np.array([len(captions.split_sentences(texts[index])) for index in sample], dtype=int),
    )


def describe(subject: Subject, lengths: CaptionLengths, picture: str | None) -> str:
    """The card of one data set; `picture` is the file name of the histogram beside it, None without long captions."""
    records, source = subject.dataset.records, subject.dataset.source
    about = {
        "Source": source,
        "Licence": LICENCES.get(source, NOT_STATED),
        "Digest of the records": f"`{subject.dataset.digest}`",
    }
    parts = [
        f"## {subject.name}",
        EXPLANATIONS.get(source, ""),
        "\n".join(f"* {fact}: {value}" for fact, value in about.items()),
        "### Images",
        _table(["split", "images", "with a long caption", "short captions"], _split_rows(records)),
        _table(["pixels", *_QUANTILE_NAMES], [[side, *_quantiles(records[side].to_numpy())] for side in ("width", "height")]),
        "### Long captions",
        _captions(lengths, picture),
    ]
    if subject.regions is not None and subject.pairs is not None:
        parts += ["### Regions and pairs", _regions(subject), _pairs(subject)]
    parts += ["### Skipped samples", _skipped(subject)]
    return "\n\n".join(part for part in parts if part)


def draw_tokens(lengths: CaptionLengths, name: str, path: Path) -> None:
    """Draws the histogram of the captions' lengths in tokens, with the two contexts, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = int(lengths.tokens.max())
    axes.hist(lengths.tokens, bins=np.linspace(0, max(longest, CONTEXTS[0]) + 1, 50), color="#4477aa")
    for context, colour in zip(CONTEXTS, ("#cc6677", "#228833"), strict=True):
        if context <= max(longest, CONTEXTS[0]):
            label = f"context {context}: {np.mean(lengths.tokens > context):.0%} of the captions are longer"
            axes.axvline(context, color=colour, linestyle="--", label=label)
    axes.set(title=f"{name}: length of the long captions", xlabel="tokens, with start and end", ylabel="captions")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


_QUANTILE_NAMES = ["mean", "min", "5 %", "median", "95 %", "max"]


def _quantiles(values: np.ndarray, form: str = ".4g") -> list[str]:
    if len(values) == 0:
        return ["–"] * len(_QUANTILE_NAMES)
    low, early, middle, late, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return [format(float(value), form) for value in (np.mean(values), low, early, middle, late, high)]


def _split_rows(records: pd.DataFrame) -> list[list[str]]:
    names = sorted(records["split"].unique(), key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    rows = []
    for name, part in [*((name, records[records["split"] == name]) for name in names), ("all", records)]:
        long = int(part["long_caption"].fillna("").str.strip().ne("").sum())
        short = int(part["captions"].map(len).sum())
        rows.append([name, f"{len(part):,}", f"{long:,}", f"{short:,}"])
    return rows


def _captions(lengths: CaptionLengths, picture: str | None) -> str:
    if len(lengths.words) == 0:
        return "None."
    rows = [[unit, *_quantiles(getattr(lengths, unit))] for unit in ("words", "sentences", "tokens")]
    beyond = "; ".join(f"{np.mean(lengths.tokens > context):.1%} have more than {context} tokens" for context in CONTEXTS)
    sampled = "" if len(lengths.sentences) == len(lengths.words) else f" Sentences: of {len(lengths.sentences):,} captions."
    text = f"{_table(['per caption', *_QUANTILE_NAMES], rows)}\n\nOf {len(lengths.words):,} captions {beyond}.{sampled}"
    return text if picture is None else f"{text}\n\n![Length of the long captions in tokens]({picture})"


def _regions(subject: Subject) -> str:
    counts = subject.regions.groupby("image_id").size().to_numpy()
    rows = [["regions per image", *_quantiles(counts)]]
    if len(subject.pairs):
        rows.append(["similarity of the pairs", *_quantiles(subject.pairs["similarity"].to_numpy(), ".3f")])
    return _table(["", *_QUANTILE_NAMES], rows)


def _pairs(subject: Subject) -> str:
    pairs, total = subject.pairs, max(len(subject.pairs), 1)
    rows = [
        [kind, f"{(subject.regions['kind'] == kind).sum():,}", f"{count:,}", f"{count / total:.1%}"]
        for kind in sorted(set(subject.regions["kind"]) | set(pairs["kind"]))
        for count in [int((pairs["kind"] == kind).sum())]
    ]
    asked = int(subject.dataset.records["split"].isin(subject.flism_splits).sum())
    paired = pairs["image_id"].nunique()
    share = f"{paired:,} of the {asked:,} images FLISM was asked for ({', '.join(subject.flism_splits)}) have a pair."
    return f"{_table(['kind', 'regions', 'pairs', 'share of the pairs'], rows)}\n\n{share}"


def _skipped(subject: Subject) -> str:
    skipped = subject.skipped
    if len(skipped) == 0:
        return "None."
    rows = []
    for (step, reason), part in sorted(skipped.groupby(["step", "reason"]), key=lambda item: (-len(item[1]), item[0])):
        first = part.head(EXAMPLES)
        examples = (_example(subject, sample, row) for sample, row in zip(first["sample"], first["row"], strict=True))
        rows.append([step, reason, f"{len(part):,}", "; ".join(examples)])
    share = f"{subject.skipped_share:.2%} of all samples."
    return f"{_table(['step', 'reason', 'rows', 'examples'], rows)}\n\n{share}"


def _example(subject: Subject, sample: str, row: int) -> str:
    path = Path(sample)
    if path.is_absolute():
        root = subject.dataset.root.resolve()
        sample = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return f"{sample} (row {row})" if row >= 0 else sample


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
