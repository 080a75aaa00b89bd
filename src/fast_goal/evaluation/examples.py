"""What the pictures of the report show: examples drawn at random, not chosen, and what both models make of them.

Letters: `I` images, `T` captions, `E` examples, `N` patches, `W` width of the vision tower, `D` embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from fast_goal.data.images import normalised, open_image
from fast_goal.data.masks import Numbers
from fast_goal.evaluation.attention import attention
from fast_goal.evaluation.classes import class_features
from fast_goal.evaluation.comparison import CLIP_CONTEXT, MODELS, Study
from fast_goal.evaluation.embedding import patch_hits, patch_maps
from fast_goal.evaluation.patch_pictures import Attention, Box, Look, Segmented
from fast_goal.evaluation.pictures import SMALL_WORDS, Components, Localisation, Mistake, Plane, Point, Retrieval, plain_words
from fast_goal.evaluation.segmentation import class_maps, read_truth
from fast_goal.evaluation.slices import sliced_recall, slices
from fast_goal.model.inference import arithmetic

SEED = 0  # fixed: the examples are drawn, not chosen
SHOWN = 5  # images per query in the retrieval picture
POINTS = 6  # at most, of the curves by length
LEAST = 25  # captions behind a point of them, a guess: with fewer the interval says nothing
PAIRS = 60  # in the embedding map, a guess at how many lines can be told apart
WORDS = 4  # of a text that ask alone, beside the phrase of the rarest one


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
    chosen = _regions(study, count)
    maps = {model: patch_maps(store, study.asked, chosen) for model, store in study.stores.items()}
    return [
        Localisation(
            sentence=regions.sentences[row],
            maps={model: maps[model][index] for model in maps},
            hits={model: bool(found[model].first_hits[row] == 1) for model in maps},
        )
        for index, row in enumerate(chosen)
    ]


def attentions(study: Study, count: int) -> list[Attention]:
    """Texts of different images, where they look by the pooling of the fine-tuned model, and the cosines of both models.

    The texts are sentences whose box every model can see; where none has a box, sentences of the long captions; where there are
    none, short captions. Beside each text ask alone: its WORDS rarest words in the data set's captions, and the phrase of the
    rarest (the words next to it, up to one that says nothing). They ask as they stand, in no prompt.
    """
    asked, store = study.asked, study.stores["finetuned"]
    captions, said = asked.long, asked.sentences
    if not captions.texts:
        captions, said = asked.short, [[text] for text in asked.short.texts]
    pairs: list[tuple[int, str, np.ndarray | None]] = [
        (int(asked.regions.images[row]), asked.regions.sentences[row], asked.regions.boxes[row])
        for row in _regions(study, count)
    ]
    if not pairs:
        generator = np.random.default_rng(SEED)
        for row in _drawn(np.arange(len(captions.texts)), count):
            pairs.append((int(captions.images[row]), str(generator.choice(said[row])), None))
    counts = Counter(word for text in captions.texts for word in set(plain_words(text)))
    alone = [_alone(text, counts) for _, text, _ in pairs]
    store.tokens([asked.files[row] for row, _, _ in pairs])  # all at once
    store.add_texts([(text, None) for words in alone for text in words])
    return [
        Attention(
            text=text,
            attention=_attention(study, row, [text], box)[0],
            similarity={model: _similarity(study, model, row, text, box) for model in MODELS},
            words=dict(zip(words, _attention(study, row, words, box), strict=True)),
        )
        for (row, text, box), words in zip(pairs, alone, strict=True)
    ]


def segmentations(study: Study, suite: str, count: int) -> list[Segmented]:
    """Images with the true classes of their pixels, and those that each model finds."""
    masks, files = study.asked.masks, study.asked.files
    assert masks is not None
    classes = masks.segments[suite]
    chosen = _drawn(np.flatnonzero(masks.suites == suite), count)
    shown = [files[masks.images[row]] for row in chosen]
    maps = {model: list(class_maps(study.stores[model], shown, class_features(study, model, classes))) for model in MODELS}
    numbers = Numbers.of(classes)
    return [
        Segmented(
            image=open_image(file.path),
            truth=read_truth(masks.paths[row], masks.contents[row], numbers, file.size),
            found={model: maps[model][place] for model in MODELS},
        )
        for place, (row, file) in enumerate(zip(chosen, shown, strict=True))
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


def _regions(study: Study, count: int) -> list[int]:
    """Rows of sentences of different images, whose box every model can see."""
    hits = [patch_hits(store, study.asked) for store in study.stores.values()]
    visible = np.flatnonzero(np.all([each.patches_inside > 0 for each in hits], axis=0))
    drawn = np.random.default_rng(SEED).permutation(visible)
    _, first = np.unique(study.asked.regions.images[drawn], return_index=True)
    return drawn[np.sort(first)][:count].tolist()


def _attention(study: Study, row: int, texts: Sequence[str], box: np.ndarray | None) -> list[Look]:
    """Where each text looks in an image by the pooling of the fine-tuned model."""
    weights = attention(study.stores["finetuned"], [study.asked.files[row]], [(0, text) for text in texts])
    return [_look(study, "finetuned", row, grid, box) for grid in weights.numpy()]


def _similarity(study: Study, model: str, row: int, text: str, box: np.ndarray | None) -> Look:
    """The cosine of each patch of an image with a text."""
    grid = study.stores[model].similarities([study.asked.files[row]], [(0, text)])[0].numpy()
    return _look(study, model, row, grid, box)


def _look(study: Study, model: str, row: int, grid: np.ndarray, box: np.ndarray | None) -> Look:
    """grid [N]; box: in pixels of the original image."""
    clip, image = study.stores[model].clip, open_image(study.asked.paths[row])
    view, side = clip.view(*image.size), clip.image_size // clip.patch_size
    shown: Box | None = None if box is None else tuple(view.boxes(box[None])[0].tolist())
    return Look(view.pixels(image), grid.reshape(side, side), shown)


def _alone(text: str, counts: Counter[str]) -> list[str]:
    """The phrase of the rarest word of a text, and its WORDS rarest words in their order. counts: captions that have each."""
    phrases: list[list[str]] = [[]]
    for word, plain in zip(text.split(), plain_words(text), strict=True):
        if plain and plain not in SMALL_WORDS:
            phrases[-1].append(plain)
        if not plain or plain in SMALL_WORDS or not word[-1].isalnum():  # a comma parts what stands beside it
            phrases.append([])
    words = list(dict.fromkeys(word for phrase in phrases for word in phrase))
    rarest = sorted(words, key=lambda word: counts[word])[:WORDS]
    phrase = next((" ".join(phrase) for phrase in phrases if rarest and rarest[0] in phrase), "")
    return list(dict.fromkeys([phrase, *(word for word in words if word in rarest)] if phrase else []))


def _drawn(candidates: Sequence[int] | np.ndarray, count: int) -> list[int]:
    return np.sort(np.random.default_rng(SEED).permutation(candidates)[:count]).tolist()


def _first_images(study: Study, model: str, query: int, count: int) -> list[int]:
    """The rows of the images that a long caption finds first, best first."""
    text = study.features(model, study.whole)[query].double()
    scores = (study.image_features[model].double() @ text).float()
    return scores.sort(descending=True, stable=True).indices[:count].tolist()


def _caption_ranks(study: Study, query: int) -> dict[str, int]:
    return {model: int(study.ranks(model, study.whole)["best"].text_to_image[query]) for model in study.stores}
