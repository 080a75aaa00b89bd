"""A store of features that are made up, and slow obvious measures of them."""

import random
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fast_goal.config import EvaluateConfig
from fast_goal.evaluation.comparison import Study
from fast_goal.evaluation.embedding import Captions, Questions, Regions

WIDTH = 6


class FakeStore:
    """Every text has a vector of its own, drawn by its first words; a word is a token. Images have those of `vectors`."""

    def __init__(self, vectors, seed=0, context_length=100, lengths=None):
        self.vectors, self.seed, self.context_length, self.given = vectors, seed, context_length, lengths or {}
        self.seconds, self.folder, self.patch_count = 0.0, None, 4
        self.clip = SimpleNamespace(pooling=None)

    def vector(self, text, tokens=None):
        words = text.split()[: min(tokens or self.context_length, self.context_length) - 2]
        return unit(np.random.default_rng([self.seed, zlib.crc32(" ".join(words).encode())]).normal(size=WIDTH))

    def texts(self, texts, tokens=None, name=""):
        vectors = [self.vector(text, tokens) for text in texts]
        return torch.tensor(np.array(vectors), dtype=torch.float32), self.lengths(texts)

    def lengths(self, texts):
        return np.array([self.given.get(text, len(text.split()) + 2) for text in texts], dtype=np.int64)

    def images(self, files, boxes=None):
        if boxes is None:
            return torch.tensor(np.array([self.vectors[int(file.content)] for file in files]), dtype=torch.float32)
        vectors = [
            self.vector(f"{file.content} {box}") if box else self.vectors[int(file.content)]
            for file, box in zip(files, boxes, strict=True)
        ]
        return torch.tensor(np.array(vectors), dtype=torch.float32)

    def add_texts(self, wanted, name=""):
        pass

    def lacks(self, file, box, sentences, patches=False):
        return False


def unit(vector):
    return vector / np.linalg.norm(vector)


def settings(**changes) -> EvaluateConfig:
    values = {
        "datasets": ["made up"],
        "split": "test",
        "tasks": [],
        "precision": "fp32",
        "ks": [1, 2, 5],
        "patch_ks": [1, 3],
        "truncation": [5, 8],
        "dropped": 0.5,
        "conditioned_on": ["long", "short"],
        "rerank": 3,
        "score_block": 4,
        "seed": 0,
        "batch_size": 4,
        "bootstrap_samples": 50,
        "pictures": 0,
    }
    return EvaluateConfig(**(values | changes))


def questions(long, short=(), regions=(), scenes=None, objects=None, choices=None, labels=None) -> Questions:
    """long: a caption for each image, "" for none. short: a list of captions for each image. regions: (image, sentence)."""
    captioned = [row for row, text in enumerate(long) if text]
    pairs = [(text, row) for row, texts in enumerate(short) for text in texts]
    count = len(long)
    return Questions(
        image_ids=[f"image {row}" for row in range(count)],
        paths=[Path(f"{row}.png") for row in range(count)],
        sizes=np.full((count, 2), 64),
        long=Captions([long[row] for row in captioned], np.array(captioned, np.int64)),
        short=Captions([text for text, _ in pairs], np.array([row for _, row in pairs], np.int64)),
        regions=Regions(
            [text for _, text in regions],
            np.array([row for row, _ in regions], np.int64),
            np.tile([1.0, 2.0, 30.0, 40.0], (len(regions), 1)),
            "truth" if len(regions) else "none",
        ),
        contents=[str(row) for row in range(count)],
        scenes=scenes,
        objects=objects,
        choices=choices,
        labels=labels,
    )


def study(asked, seed=0, **changes) -> Study:
    """Two models whose image vectors lean towards those of their long captions, the fine-tuned one's more."""
    draw = np.random.default_rng(seed)
    stores = {}
    for number, (model, pull) in enumerate((("base", 0.6), ("finetuned", 1.2))):
        store = FakeStore([], seed=number)
        noise = draw.normal(size=(len(asked.paths), WIDTH)) / WIDTH**0.5
        store.vectors = [unit(vector) for vector in noise]
        for row, text in zip(asked.long.images, asked.long.texts, strict=True):
            store.vectors[row] = unit(noise[row] + pull * store.vector(text))
        stores[model] = store
    return Study(asked, stores, settings(**changes))


def caption(draw: random.Random, words: int = 3) -> str:
    """Three to seven sentences that no other caption has."""
    sentences = []
    for _ in range(draw.randint(3, 7)):
        sentences.append(" ".join(["A", *(f"w{draw.randrange(10**6)}" for _ in range(draw.randint(1, words)))]) + ".")
    return " ".join(sentences)


def slow_recall(images, queries, owners, k):
    """R@k in percent, both ways, by loops; a tie counts for the query."""
    scores = [[float(np.float32(np.dot(image, query))) for query in queries] for image in images]
    forward = [sum(scores[i][t] > scores[owner][t] for i in range(len(images))) + 1 for t, owner in enumerate(owners)]
    backward = []
    for i in sorted(set(owners)):
        best = max(scores[i][t] for t, owner in enumerate(owners) if owner == i)
        backward.append(sum(score > best for score in scores[i]) + 1)
    return [100 * sum(rank <= k for rank in ranks) / len(ranks) for ranks in (forward, backward)]
