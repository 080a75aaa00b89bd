"""What the pictures of the report show: examples drawn at random, not chosen, and what both models make of them.

Letters: `I` images, `T` captions, `E` examples, `N` patches, `W` width of the vision tower, `D` embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fast_goal.data.images import normalised, open_image
from fast_goal.evaluation.comparison import CLIP_CONTEXT, MODELS, Study
from fast_goal.evaluation.embedding import patch_hits, patch_maps
from fast_goal.evaluation.pictures import Components, Localisation, Mistake, Plane, Point, Retrieval
from fast_goal.evaluation.slices import sliced_recall, slices
from fast_goal.model.inference import arithmetic

SEED = 0  # fixed: the examples are drawn, not chosen
SHOWN = 5  # images per query in the retrieval picture
POINTS = 6  # at most, of the curves by length
LEAST = 25  # captions behind a point of them, a guess: with fewer the interval says nothing
PAIRS = 60  # in the embedding map, a guess at how many lines can be told apart


def retrievals(study: Study, count: int) -> list[Retrieval]:
    """Queries and what each model puts first; from the captions that exceed CLIP's own context, if there are enough."""
    paths, owners = study.asked.paths, study.asked.long.images
    long = np.flatnonzero(study.lengths(study.whole) > CLIP_CONTEXT)
    found = []
    for query in _drawn(long if len(long) >= count else np.arange(len(owners)), count):
        own, top = int(owners[query]), {model: _first_images(study, model, query, SHOWN) for model in study.stores}
        found.append(
            Retrieval(
                caption=study.asked.long.texts[query],
                image=paths[own],
                top={model: [paths[row] for row in rows] for model, rows in top.items()},
                hits={model: [row == own for row in rows] for model, rows in top.items()},
                ranks=_caption_ranks(study, query),
            )
        )
    return found


def mistakes(study: Study, count: int) -> list[Mistake]:
    """Queries for which the fine-tuned model puts a wrong image first."""
    asked = study.asked
    caption_of = dict(zip(asked.long.images.tolist(), asked.long.texts, strict=True))
    wrong = np.flatnonzero(study.ranks("finetuned", study.whole)["best"].text_to_image.numpy() > 1)
    found = []
    for query in _drawn(wrong, count):
        confused = _first_images(study, "finetuned", query, 1)[0]
        found.append(
            Mistake(
                caption=asked.long.texts[query],
                image=asked.paths[int(asked.long.images[query])],
                confused=asked.paths[confused],
                confused_caption=caption_of.get(confused, ""),
                ranks=_caption_ranks(study, query),
            )
        )
    return found


def localisations(study: Study, count: int) -> list[Localisation]:
    """Sentences of different images, whose box every model can see."""
    regions = study.asked.regions
    found = {model: patch_hits(store, study.asked) for model, store in study.stores.items()}
    visible = np.flatnonzero(np.all([hits.patches_inside > 0 for hits in found.values()], axis=0))
    drawn = np.random.default_rng(SEED).permutation(visible)
    _, first = np.unique(regions.images[drawn], return_index=True)
    chosen = drawn[np.sort(first)][:count].tolist()
    maps = {model: patch_maps(store, study.asked, chosen) for model, store in study.stores.items()}
    return [
        Localisation(
            sentence=regions.sentences[row],
            maps={model: maps[model][index] for model in maps},
            hits={model: bool(found[model].first_hits[row] == 1) for model in maps},
        )
        for index, row in enumerate(chosen)
    ]


def components(study: Study, count: int) -> dict[str, Components]:
    """The first three principal components of the patches of `count` images after the last block, by model.

    They are those of all the images' patches together, so that equal colours mean like patches within a model. A sign is
    chosen by the base's map of the same component: a component may be turned round without being another one.
    """
    chosen = _drawn(np.arange(len(study.asked.paths)), count)
    found: dict[str, Components] = {}
    for model in MODELS:
        store = study.stores[model]
        images = [open_image(study.asked.paths[row]) for row in chosen]
        shown = [store.clip.view(*image.size).pixels(image) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in shown]))
        clip = store.clip.to(store.device).eval()
        with arithmetic(store.precision, store.device):
            encoded = clip(images=normalised(pixels.to(store.device), clip.mean, clip.std))
        tokens = encoded.image_tokens.double().cpu().numpy()  # [E, N, W]
        values, share = principal(tokens.reshape(-1, tokens.shape[-1]), 3)  # [E N, 3]
        side = clip.image_size // clip.patch_size
        maps = values.reshape(len(chosen), side, side, -1)
        if found and (other := found["base"].maps).shape == maps.shape:
            turned = (maps * other).sum((0, 1, 2)) < 0
            maps = np.where(turned, -maps, maps)
        found[model] = Components(shown, maps, share)
    return found


def planes(study: Study) -> dict[str, Plane]:
    """Images and their long captions in the plane of their first two principal components, by model."""
    chosen = _drawn(np.arange(len(study.asked.long.texts)), PAIRS)
    rows, found = study.asked.long.images[chosen], {}
    for model in MODELS:
        images = study.image_features[model][rows].double()  # [E, D]
        texts = study.features(model, study.whole)[chosen].double()
        cosines = (images @ texts.T).numpy()
        other = rows[:, None] != rows[None, :]
        points, share = principal(torch.cat([images, texts]).numpy(), 2)
        found[model] = Plane(
            points[: len(chosen)],
            points[len(chosen) :],
            share,
            float(np.diag(cosines).mean()),
            float(cosines[other].mean()) if other.any() else None,
        )
    return found


def recall_by_length(study: Study) -> dict[str, list[Point]]:
    """Text-to-image R@1 of long captions by their tokens, by model: about as many captions behind each point.

    Empty where there are too few captions for two points, or all are of one length.
    """
    lengths = study.lengths(study.whole)
    parts = min(POINTS, len(lengths) // LEAST)
    edges = np.unique(np.quantile(lengths, np.arange(1, parts) / parts).astype(int)) if parts > 1 else np.zeros(0, int)
    edges = edges[edges < lengths.max(initial=0)]
    if not len(edges):
        return {}
    groups = study.asked.groups[study.whole.images]
    means = {name: float(lengths[mine].mean()) for name, mine in slices(lengths, edges.tolist()).items()}
    found = {}
    for model in MODELS:
        ranks = study.ranks(model, study.whole)["best"].text_to_image.numpy()
        recall = sliced_recall(ranks, lengths, edges.tolist(), [1], samples=study.config.bootstrap_samples, groups=groups)
        found[model] = [Point(means[name], values["queries"], **values["R@1"]) for name, values in recall.items()]
    return found


def principal(values: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The first principal components of values [n, W]: float [n, count], and their share of the variance.

    Components that do not exist are 0. Of the two signs the one that makes the largest weight positive.
    """
    centred = values - values.mean(0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    kept = min(count, len(sizes))
    signs = np.sign(right[np.arange(kept), np.abs(right[:kept]).argmax(1)])
    points = np.zeros((len(values), count))
    points[:, :kept] = left[:, :kept] * sizes[:kept] * signs
    total = float((sizes**2).sum())
    return points, float((sizes[:kept] ** 2).sum()) / total if total else 0.0


def _drawn(candidates: Sequence[int] | np.ndarray, count: int) -> list[int]:
    return np.sort(np.random.default_rng(SEED).permutation(candidates)[:count]).tolist()


def _first_images(study: Study, model: str, query: int, count: int) -> list[int]:
    """The rows of the images that a long caption finds first, best first."""
    text = study.features(model, study.whole)[query].double()
    scores = (study.image_features[model].double() @ text).float()
    return scores.sort(descending=True, stable=True).indices[:count].tolist()


def _caption_ranks(study: Study, query: int) -> dict[str, int]:
    return {model: int(study.ranks(model, study.whole)["best"].text_to_image[query]) for model in study.stores}
