"""What fits into a GPU's memory (`fast-goal finetune advise`): no step of its own, and it writes nothing."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fast_goal.config import FinetuneConfig, Params, load_params
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fast_goal.model.clip import Clip
    from fast_goal.objectives import Objective
    from fast_goal.training.memory import Inputs, Plan, StepMemory

BASE, FLISM, TABLES = Path("models/base/clip"), Path("data/flism"), Path("data/negatives")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)
ASSUMED_SENTENCE = 77  # tokens, where there are no pairs to look at: CLIP's own context, a guess
LONGEST_TEXTS = 200  # in bytes, of which the one with the most tokens is looked for
PARTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # values of accumulate that are tried
PARTS_SHOWN = 8


class Training(NamedTuple):
    """A section of params.yaml that describes a training."""

    section: str
    config: FinetuneConfig
    objective: dict[str, Any]
    dataset: str


def run(memory: str | None, intermediate: bool = False) -> str:
    """The advice for params.yaml in the current folder, as text. `memory`: of one GPU (24GB, 24GiB); None: of this machine's.

    Raises ConfigError where that is no size, where None is given and there is no GPU, or where there is no first stage.
    """
    prepare()
    params = load_params()
    if memory is not None:
        return advise(params, memory_size(memory), intermediate)
    import torch

    from fast_goal.environment import device

    own = device()
    if own.type != "cuda":
        raise ConfigError("--memory is required: there is no GPU here. Give that of the GPU to train on, such as 24GiB.")
    return advise(params, torch.cuda.get_device_properties(own).total_memory, intermediate, own)


def memory_size(text: str) -> int:
    """Bytes of `24GB` (10**9 each), `24GiB` (2**30), `24000 MB`. Raises ConfigError for anything else."""
    found = SIZE.fullmatch(text)
    size = float(found[1]) * UNITS[found[2].upper()] if found else 0
    if size < UNITS["M"]:
        raise ConfigError(f"--memory {text}: expected a size with its unit, such as 24GB (10**9 bytes) or 24GiB (2**30 bytes)")
    return int(size)


def advise(params: Params, memory: int, intermediate: bool = False, gpu: torch.device | None = None) -> str:
    """As `run`, with the parameters and the bytes given. `gpu`: the one to train on, if it is here."""
    from fast_goal.objectives import make_objective
    from fast_goal.training.distributed import processes
    from fast_goal.training.memory import Plan, StepMemory

    training = _training(params, intermediate)
    config, objective = training.config, make_objective(training.objective)
    bf16, may_bf16 = _precisions(config, gpu)
    clip, origin = _structure(params)
    world = processes(config.processes)
    inputs, seen = _inputs(training, params, clip, objective)
    now = Plan(bf16, config.checkpointing, config.accumulate)
    steps = StepMemory(clip, objective, config, inputs, world)
    plans = _plans(now, may_bf16, config.batch_size // world)
    compared = _Compared(steps, plans, config.batch_size, memory)
    shared = f" shared by {world} processes, a GPU each" if world > 1 else ""
    lines = [
        f"A training step of {clip.name} ({origin}) with the section `{training.section}` on a GPU with {memory / 1e9:.1f} GB.",
        f"Samples: {seen}. Batch: {config.batch_size}{shared}.",
        "",
        *_table(compared),
        "",
        *_legend(config, objective),
        "",
        *_bought(compared),
        *_advice(compared, training.section, params.experiment),
    ]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Compared:
    """The plans, that of now first and the others by what a step costs, and what they need."""

    steps: StepMemory
    plans: list[Plan]
    batch_size: int
    memory: int

    @property
    def now(self) -> Plan:
        return self.plans[0]

    def spare(self, plan: Plan) -> int:
        """Bytes left over with the batch of now; less than none where it does not fit."""
        return self.memory - self.steps.need(plan, self.batch_size).total

    def largest(self, plan: Plan) -> int:
        """The largest batch."""
        return self.steps.largest(plan, self.memory)

    @cached_property
    def advised(self) -> Plan | None:
        """Nothing else than now if the batch fits, else what costs least time; None where nothing helps."""
        return next((plan for plan in self.plans if self.spare(plan) >= 0), None)

    @cached_property
    def quickest(self) -> Plan | None:
        """What costs least time of all that fits."""
        return min((plan for plan in self.plans if self.spare(plan) >= 0), key=lambda plan: plan.time, default=None)


def _training(params: Params, intermediate: bool) -> Training:
    if not intermediate:
        return Training("finetune", params.finetune, params.objective, params.download.train_dataset)
    first = params.intermediate
    if first.dataset is None:
        raise ConfigError("intermediate.dataset is null: there is no first stage to advise on. Leave out --intermediate.")
    return Training("intermediate.training", first.training, first.objective, first.dataset)


def _precisions(config: FinetuneConfig, gpu: torch.device | None) -> tuple[bool, bool]:
    """Whether the training is in bf16, and whether it could be; a GPU that is not here is taken to have it."""
    if gpu is None:
        return config.precision != "fp32", True
    from fast_goal.training.loop import autocast_dtype

    return autocast_dtype(config.precision, gpu) is not None, autocast_dtype("auto", gpu) is not None


def _structure(params: Params) -> tuple[Clip, str]:
    """The model to train, without its weights, and where its sizes were read."""
    from fast_goal.model.clip import CONFIG_FILE, saved_structure, structure
    from fast_goal.training.memory import fake

    if (BASE / CONFIG_FILE).is_file():
        return fake(saved_structure, BASE), str(BASE)
    return fake(structure, params.base), "section `base`, as there is no model yet"


def _inputs(training: Training, params: Params, clip: Clip, objective: Objective) -> tuple[Inputs, str]:
    """What the samples are made of, by the data set's longest texts where there is one, and that in words."""
    from fast_goal.data.records import RECORDS, RECORDS_FOLDER, captions_of, read_table
    from fast_goal.training.memory import Inputs

    context, table = clip.context_length, RECORDS_FOLDER / f"{training.dataset}.parquet"
    kind = training.config.captions
    if table.is_file():
        records = read_table(table, RECORDS)
        own = records[records["split"] == "train"]
        caption = _longest(itertools.chain.from_iterable(captions_of(own, kind)), context)
        seen = f"{kind} captions of up to {caption} tokens"
    else:
        caption, seen = context, f"{kind} captions of {context} tokens, the context, as there is no data yet"
    inputs = Inputs(caption, 0, 0)
    if objective.needs_local:
        tokens, pairs, said = _local(training, params, context)
        inputs = inputs._replace(sentence_tokens=tokens, pairs=pairs)
        seen += f"; local pairs per image: {pairs}, sentences of {said}"
    if objective.needs_negatives:
        tokens, negatives, said = _hard(training, params, context, caption)
        inputs = inputs._replace(negative_tokens=tokens, negatives=negatives)
        seen += f"; hard negatives per caption: {negatives}, of {said}"
    if (drawn := objective.sub_captions) is not None:
        tokens = min(ASSUMED_SENTENCE, context)
        said = f"{tokens} tokens (a guess)"
        if table.is_file():
            tokens = _longest_part(itertools.chain.from_iterable(captions_of(own, "long")), drawn.most_sentences, context)
            said = f"up to {tokens} tokens"
        inputs = inputs._replace(sub_tokens=tokens, sub_captions=drawn.count)
        seen += f"; sub-captions per caption: {drawn.count}, of {said}"
    return inputs, seen


def _local(training: Training, params: Params, context: int) -> tuple[int, int, str]:
    """Tokens of a sentence, local pairs of an image, and the tokens in words."""
    from fast_goal.data.records import PAIRS, read_table

    path, all_pairs = FLISM / training.dataset / "pairs.parquet", training.config.pairs == "all"
    if not path.is_file():
        tokens = min(ASSUMED_SENTENCE, context)
        return tokens, params.flism.top_k if all_pairs else 1, f"{tokens} tokens (a guess)"
    found = read_table(path, PAIRS)
    found = found if all_pairs else found[found["rank"] == 1]
    tokens = _longest(found["sentence"], context)
    return tokens, math.ceil(len(found) / max(found["image_id"].nunique(), 1)), f"up to {tokens} tokens"


def _hard(training: Training, params: Params, context: int, caption: int) -> tuple[int, int, str]:
    """Tokens of a hard negative, hard negatives of a caption, and the tokens in words. `caption`: tokens of the longest."""
    from fast_goal.data.records import NEGATIVES, read_table

    path = TABLES / f"{training.dataset}.parquet"
    if not path.is_file():
        return caption, params.negatives.per_caption, f"{caption} tokens (a guess)"
    found = read_table(path, NEGATIVES)
    tokens, captions = _longest(found["negative"], context), len(found[["image_id", "caption"]].drop_duplicates())
    return tokens, math.ceil(len(found) / max(captions, 1)), f"up to {tokens} tokens"


def _longest(texts: Iterable[str], context_length: int) -> int:
    """Tokens of the longest of the texts, at most the context."""
    from fast_goal.data.captions import tokenize

    longest = heapq.nlargest(LONGEST_TEXTS, texts, key=lambda text: len(text.encode()))
    return min(int(tokenize(longest, context_length)[1].max()), context_length) if longest else context_length


def _longest_part(captions: Iterable[str], sentences: int, context_length: int) -> int:
    """Tokens of the longest so many sentences of one of the longest captions, at most the context."""
    from fast_goal.data.captions import split_sentences

    parts = []
    for caption in heapq.nlargest(LONGEST_TEXTS, captions, key=lambda text: len(text.encode())):
        found = (sentence.text for sentence in split_sentences(caption))
        parts.append(" ".join(heapq.nlargest(sentences, found, key=lambda text: len(text.encode()))))
    return _longest(parts, context_length)


def _plans(now: Plan, may_bf16: bool, samples: int) -> list[Plan]:
    """The settings to compare: those of now first, then by what a step costs. `samples`: of a process."""
    from fast_goal.training.memory import SMALLEST_PART, Plan

    parts = {now.accumulate, *(count for count in PARTS if count == 1 or samples // count >= SMALLEST_PART)}
    precisions = {now.bf16, now.bf16 or may_bf16}
    found = {Plan(*settings) for settings in itertools.product(precisions, (False, True), parts)} - {now}
    # of equal time, checkpointing first: it leaves a batch whole
    return [now, *sorted(found, key=lambda plan: (plan.time, not plan.checkpointing, plan.accumulate))]


def _table(compared: _Compared) -> list[str]:
    steps, now, batch_size = compared.steps, compared.now, compared.batch_size
    rows = [("settings", "fixed", "per sample", f"batch {batch_size}", "largest batch", "time")]
    for plan in compared.plans:
        if plan.accumulate > PARTS_SHOWN and plan not in (now, compared.advised):
            continue
        need = steps.need(plan, batch_size)
        mark = " (as set)" if plan == now else " (advised)" if plan == compared.advised else ""
        rows.append(
            (
                _words(plan) + mark,
                f"{need.fixed / 1e9:.2f} GB",
                f"{steps.per_sample(plan) / 1e6:.2f} MB",
                f"{need.total / 1e9:.1f} GB{' ' if compared.spare(plan) >= 0 else '!'}",
                str(compared.largest(plan)),
                f"{plan.time / now.time:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _legend(config: FinetuneConfig, objective: Objective) -> list[str]:
    from fast_goal.training.memory import CONTEXT, FRAGMENTED

    others = "" if config.ema is None else ", their moving average"
    others += "" if objective.teacher_decay is None else ", the teacher"
    return [
        f"fixed: weights, gradients, AdamW's two averages{others}. per sample: of the part of a batch that goes through",
        f"the model at once. batch: all that the GPU must have, with {CONTEXT / 1e9:.1f} GB for the CUDA context and",
        f"{FRAGMENTED:.0%} for fragmentation, both guesses; ! is more than there is. time: of a step against now,",
        "reasoned, not measured: checkpointing and accumulation cost a second forward pass each, a third of a",
        "step; bf16 at least halves a step on tensor cores (a guess).",
    ]


def _bought(compared: _Compared) -> list[str]:
    """The largest batch with each setting alone, the best first."""
    now = compared.now
    alone = {
        "precision bf16": dataclasses.replace(now, bf16=True),
        "checkpointing": dataclasses.replace(now, checkpointing=True),
        f"accumulate {2 * now.accumulate}": dataclasses.replace(now, accumulate=2 * now.accumulate),
    }
    found = {name: compared.largest(plan) for name, plan in alone.items() if plan != now and plan in compared.plans}
    if not found:
        return []
    ranked = sorted(found.items(), key=lambda item: -item[1])
    return [
        f"Largest batch as set: {compared.largest(now)}; with one more setting: "
        + ", ".join(f"{most} with {name}" for name, most in ranked)
        + ".",
        "",
    ]


def _advice(compared: _Compared, section: str, experiment: str) -> list[str]:
    """What to set, in a sentence, and how."""
    now, best, quickest = compared.now, compared.advised, compared.quickest
    batch = f"A batch of {compared.batch_size}"
    if best is None:
        most, plan = max((compared.largest(plan), plan) for plan in compared.plans)
        if not most:
            return [
                f"Advice: not a single sample fits, whatever the settings. A smaller model, or {section}.freeze, needs less."
            ]
        return [
            f"Advice: no setting makes a batch of {compared.batch_size} fit. The largest that does is {most}, with "
            f"{_words(plan)}: fewer negatives, another result.",
            *_how([*_assignments(section, now, plan), f"{section}.batch_size={most}"], experiment),
        ]
    spare = f"with {compared.spare(best) / 1e9:.1f} GB to spare"
    if best != now:
        return [f"Advice: {_words(best)}. {batch} then fits, {spare}.", *_how(_assignments(section, now, best), experiment)]
    advice = f"Advice: change nothing. {batch} fits as set, {spare}."
    if quickest is None or quickest.time >= now.time:
        return [advice]
    return [
        f"{advice} {_words(quickest)} would fit too, and take {1 - quickest.time / now.time:.0%} less time.",
        *_how(_assignments(section, now, quickest), experiment),
    ]


def _words(plan: Plan) -> str:
    parts = ["bf16" if plan.bf16 else "fp32"]
    parts += ["checkpointing"] if plan.checkpointing else []
    parts += [f"accumulate {plan.accumulate}"] if plan.accumulate > 1 else []
    return ", ".join(parts)


def _assignments(section: str, now: Plan, plan: Plan) -> list[str]:
    """The settings that lead from one plan to the other, as `fast-goal configure` takes them."""
    values = {
        "precision": ("bf16" if plan.bf16 else "fp32", plan.bf16 != now.bf16),
        "checkpointing": (str(plan.checkpointing).lower(), plan.checkpointing != now.checkpointing),
        "accumulate": (plan.accumulate, plan.accumulate != now.accumulate),
    }
    return [f"{section}.{name}={value}" for name, (value, changed) in values.items() if changed]


def _how(values: list[str], experiment: str) -> list[str]:
    """Where to set them. `configure` composes the file anew, so that what else it was given has to be repeated."""
    return [
        f"Set in params.yaml: {', '.join(values)}",
        f"or: fast-goal configure experiment={experiment} {' '.join(values)} (and what else it was given)",
    ]
