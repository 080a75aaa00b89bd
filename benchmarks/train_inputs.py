"""Data sets, models, batches and settings of `benchmarks/train_step.py`. All are made here; nothing is downloaded.

Speed depends on shapes, not on what weights or pixels are: weights are random. B is a batch, S a model's input size.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import flism_inputs
import numpy as np
import pandas as pd
import torch
from train_reference import Samples

from fast_goal.config import FinetuneConfig, build
from fast_goal.configure import compose
from fast_goal.data.records import PAIRS, Dataset
from fast_goal.model.clip import Clip, build_scratch
from fast_goal.objectives import Objective, make_objective
from fast_goal.training.batches import Batch, PairDataset
from fast_goal.training.schedule import make_optimizer, parameter_groups

JPEG = (1024, 768)
SENTENCE_TOKENS = 30  # about what a sentence of DOCCI has
FULL = 12  # sentences of a generated caption of more than 248 tokens; its sentences have 29 each
SPREAD = (4.6, 0.34)  # median sentences of a caption and the deviation of their logarithm: DOCCI's 133 tokens, and its spread


def model(name: str) -> Clip:
    """A CLIP of 248 tokens with random weights: `demo`, `tiny`, or the name of one of open_clip's."""
    config = flism_inputs.demo_base_config().scratch
    if name == "tiny":
        text = {"text_width": 32, "text_layers": 1, "head_width": 16}
        return build_scratch(replace(config, **flism_inputs.TINY_CLIP, **text), 248)
    return build_scratch(config).stretched(248) if name == "demo" else flism_inputs.vit(name)


def settings(**changes: Any) -> FinetuneConfig:
    """The section `finetune` of the paper's settings, with changes."""
    return replace(build(FinetuneConfig, compose([])["finetune"], "finetune"), **changes)


def objective(name: str = "fast_goal") -> Objective:
    """A group of the section `objective`: `fast_goal`, `global_local`."""
    return make_objective(compose([f"objective={name}"])["objective"])


def optimizer(clip: Clip) -> torch.optim.Optimizer:
    """The training's optimiser with a learning rate of 0: an update is computed in full, and every repeat sees the same
    weights."""
    return make_optimizer(parameter_groups(clip), 0.0, settings().weight_decay)


def scenes(folder: Path, count: int) -> tuple[Dataset, pd.DataFrame]:
    """The demo's scenes, captions of about 82 tokens, and for each image the true box of a sentence; made once."""
    dataset = flism_inputs.scenes(folder, count, detector=False)
    captions = dataset.split("train").set_index("image_id")["long_caption"]
    truth = dataset.truth[dataset.truth["image_id"].isin(captions.index)]
    spans = zip(truth["image_id"], truth["char_start"], truth["char_end"], strict=True)
    truth = truth.assign(sentence=[captions[image_id][start:end] for image_id, start, end in spans])
    once = [captions[row.image_id].count(row.sentence) == 1 for row in truth.itertuples()]  # what a search finds is it
    return dataset, _pairs(truth[once].drop_duplicates("image_id"))


def captioned(folder: Path, count: int, kind: str) -> tuple[Dataset, pd.DataFrame]:
    """`count` generated images with captions of `kind`, and one pair of box and sentence each; made once.

    full: specks with captions of more than 248 tokens. spread: specks with captions as long as DOCCI's. jpegs: drawn
    photographs of 1,024 x 768 pixels with captions of more than 248 tokens.
    """
    sentences = [FULL] * count
    if kind == "spread":
        choose = np.random.default_rng(0)
        median, deviation = SPREAD
        sentences = np.maximum(1, choose.lognormal(np.log(median), deviation, count).round()).astype(int).tolist()
    size = JPEG if kind == "jpegs" else flism_inputs.SMALL
    draw = partial(flism_inputs.draw_photograph, size=JPEG) if kind == "jpegs" else flism_inputs.draw_speck
    dataset = flism_inputs.generated(f"{kind}{count}", folder, count, size, sentences, draw)
    return dataset, _pairs(pd.DataFrame([_pair(record) for record in dataset.records.itertuples()]))


def _pair(record: Any) -> dict[str, Any]:
    """A box that reaches into the middle of the image, with sides of 20 to 60 percent of its, and one of the first
    sentences, which are within any context."""
    choose = random.Random(record.image_id)
    caption = record.long_caption
    pieces = caption.removesuffix(".").split(". ")
    number = choose.randrange(min(len(pieces), 5))
    start = sum(len(piece) + 2 for piece in pieces[:number])
    width, height = (round(side * choose.uniform(0.2, 0.6)) for side in (record.width, record.height))
    x1 = choose.randint(record.width // 4 - width // 2, record.width * 3 // 4 - width // 2)
    x1, y1 = max(0, min(x1, record.width - width)), choose.randint(0, record.height - height)
    end = start + len(pieces[number]) + 1
    box = {"x1": float(x1), "y1": float(y1), "x2": float(x1 + width), "y2": float(y1 + height)}
    place = {"sentence_index": number, "char_start": start, "char_end": end, "sentence": caption[start:end]}
    return {"image_id": record.image_id, **place, **box}


def _pairs(rows: pd.DataFrame) -> pd.DataFrame:
    """A table of pairs, one for each image."""
    rows = rows.assign(rank=1, region_index=0, kind="detector", similarity=0.3, weight=1.0)
    return rows[PAIRS.names].reset_index(drop=True)


def samples(dataset: Dataset, pairs: pd.DataFrame, clip: Clip, count: int, device: torch.device) -> Samples:
    """The first `count` images that have a pair, as a batch on the device and with what a published step looks into."""
    every = PairDataset(dataset, "train", pairs, clip)
    records = dataset.split("train").set_index("image_id")
    sentences = pairs.set_index("image_id")["sentence"]
    chosen = [index for index, image_id in enumerate(every.image_ids) if image_id in sentences.index][:count]
    ids = [every.image_ids[index] for index in chosen]
    batch = every[chosen]
    assert batch.local_rows.tolist() == list(range(count)), "not one pair for every image"
    assert (batch.boxes[:, 2] > batch.boxes[:, 0]).all(), "a box that is not visible"
    assert (batch.spans[:, 1] > batch.spans[:, 0]).all(), "a sentence that is not visible"
    sizes = torch.tensor(records.loc[ids, ["width", "height"]].to_numpy())
    captions = records.loc[ids, "long_caption"].tolist()
    return Samples(batch.to(device), captions, sentences.loc[ids].tolist(), sizes.to(device))


def synthetic(clip: Clip, count: int, device: torch.device) -> Batch:
    """B samples made on the device: a global and a local image, a caption that fills the context, a sentence of 30 tokens."""
    generator = torch.Generator(device).manual_seed(0)
    whole = partial(torch.randint, generator=generator, device=device)
    size = clip.image_size

    def texts(length: int) -> torch.Tensor:
        tokens = whole(1, 49_000, (count, length))
        tokens[:, 0], tokens[:, -1] = 49_406, 49_407
        return tokens

    corner = whole(0, size // 2, (count, 2)).float()
    boxes = torch.cat([corner, corner + whole(size // 5, size // 2, (count, 2))], dim=1)
    first = whole(1, clip.context_length - SENTENCE_TOKENS, (count, 1))
    return Batch(
        images=whole(0, 256, (2 * count, 3, size, size), dtype=torch.uint8),
        caption_tokens=texts(clip.context_length),
        sentence_tokens=texts(SENTENCE_TOKENS),
        local_rows=torch.arange(count, device=device),
        boxes=boxes,
        spans=torch.cat([first, first + SENTENCE_TOKENS - 2], dim=1),
        regions=boxes,
        local_weights=torch.ones(count, device=device),
        rank_pairs=(count,),
        negative_tokens=texts(SENTENCE_TOKENS)[:0],
        negative_rows=torch.arange(0, device=device),
        negative_slots=torch.arange(0, device=device),
        negative_count=0,
        rank_negatives=(0,),
    )


@cache
def tokenizer() -> Any:
    """CLIP's tokenizer, which does not remember texts."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
