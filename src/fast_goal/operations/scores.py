"""Holds the texts of a table against a folder of images: the best images of each text, in one parquet file.

    fast-goal embed my_photos --against captions.csv --column caption --output scores.parquet
    fast-goal embed my_photos --against captions.csv --mode rerank --top-k 20 --output scores.parquet

The modes are those of a registered model: `global`, the cosine of the embeddings; `conditioned`, the cosine of the text with
the image as the text pools its patches, which needs a model with text-conditioned pooling; `rerank`, the best images by
`global` in the order of `conditioned`. Features go to the store as those of operations/embed.py. Texts and images are compared
block by block: neither all patches nor all scores are ever in memory.

Letters: `I` images and `T` texts of a block, `K` best images of a text, `N` patches, `D` embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fast_goal.errors import DataError
from fast_goal.evaluation.headline import MODES
from fast_goal.files import atomic_path, digest, file_digest
from fast_goal.operations import embed
from fast_goal.progress import Progress
from fast_goal.tracking.pyfunc import TOP_K

if TYPE_CHECKING:
    from torch import Tensor

    from fast_goal.evaluation.features import FeatureStore, ImageFile
    from fast_goal.model.conditioned import ConditionedScorer

TEXTS, IMAGES = 1024, 1024  # of a block, a guess: so many scores are sorted at once
NUMBERS = 1 << 25  # of the patches of a block of images, which may be fewer for it; a guess


class Best(NamedTuple):
    """Of each text its best images, best first; of equal ones the first in the order of the images."""

    scores: Tensor  # float32 [T, K]
    images: Tensor  # int64 [T, K]


def run(
    folder: Path,
    table: Path,
    output: Path,
    model: str,
    mode: str = MODES[0],
    top_k: int = TOP_K,
    batch_size: int = 64,
    column: str = "text",
) -> str:
    """Writes `output`, a row for each text and each of its `top_k` best images, and OUTPUT.skipped.parquet; returns a line on
    what was done.

    Nothing is computed where `output` is already that of these sources, model and settings. Raises DataError for sources with
    nothing to compare and for a mode that the model does not have, ModelError for a model that is not there.
    """
    embed.check_output(output)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder: --against compares a folder of images with the texts of a table, in this order"
        )
    images, texts = embed.find_images(folder), embed.find_texts(table, column)
    opened = embed.open_model(model)
    check_mode(mode, model, opened.clip.pooling is not None)
    from fast_goal.model import conditioned, pooling

    code = [file_digest(Path(module.__file__)) for module in (conditioned, pooling)]
    key = digest(["scores", code, images.digest, texts.digest, opened.key, opened.located.digest, mode, top_k])
    if embed.is_made(output, key):
        return f"{output} is that of these images and texts and this model already: nothing to do"
    store = opened.store(batch_size)
    kept, files = embed.embed_images(store, images, patches=mode != "global")
    notes = embed.embed_texts(store, texts.items)
    skipped = [*images.skipped, *texts.skipped]
    file = embed.write_skipped(output, skipped)
    if not kept:
        raise DataError(f"{folder}: none of the {len(images.skipped)} images can be embedded; {file} has the reasons")
    about = {
        embed.KEY: key,
        **opened.described(),
        "fast_goal.source": str(folder),
        "fast_goal.against": str(table),
        "fast_goal.mode": mode,
        "fast_goal.top_k": str(top_k),
        "fast_goal.skipped": str(len(skipped)),
        **notes,
    }
    paths = [images.columns["path"][row] for row in kept]
    _write(output, texts.columns, paths, search(store, files, texts.items, mode, top_k), about)
    told = (
        f"{output}: {len(texts.items)} texts, of each the best {min(top_k, len(kept))} of {len(kept)} images by {mode} scores"
    )
    return f"{told}{embed.skipped_note(skipped, file)}{embed.cut_note(notes, len(texts.items))}"


def check_mode(mode: str, model: str, pooled: bool) -> None:
    """Raises DataError for a mode that there is not, or not for this model."""
    if mode not in MODES:
        raise DataError(f"--mode {mode}: expected {', '.join(MODES[:-1])} or {MODES[-1]}")
    if mode != MODES[0] and not pooled:
        raise DataError(
            f"--mode {mode}: {model} has no text-conditioned pooling, which objective=flair trains; use --mode global"
        )


def search(store: FeatureStore, files: list[ImageFile], texts: list[str], mode: str, top_k: int) -> Iterator[Best]:
    """The best images of the texts, TEXTS at a time. What is asked for is in the store."""
    pairs = len(texts) * (len(files) + (min(top_k, len(files)) if mode == "rerank" else 0))
    with Progress(f"scores: {mode}", pairs, "pairs") as progress:
        for start in range(0, len(texts), TEXTS):
            asked = texts[start : start + TEXTS]
            blocks = _conditioned if mode == "conditioned" else _global
            best: Best | None = None
            for first, scores in blocks(store, files, asked):
                best = _merged(best, first, scores, top_k)
                progress.update(scores.numel())
            assert best is not None
            if mode == "rerank":
                best = _again(store, files, asked, best)
                progress.update(best.images.numel())
            yield best


def _global(store: FeatureStore, files: list[ImageFile], texts: list[str]) -> Iterator[tuple[int, Tensor]]:
    """The cosines [T, I] of the texts with some images at a time, and the row of the first of these."""
    asked = store.texts(texts)[0].to(store.device).double()  # rounded to float32 then, they hardly depend on the block
    for first in range(0, len(files), IMAGES):
        images = store.images(files[first : first + IMAGES]).to(store.device).double()
        yield first, (asked @ images.T).float()


def _conditioned(store: FeatureStore, files: list[ImageFile], texts: list[str]) -> Iterator[tuple[int, Tensor]]:
    """As `_global`, the cosines of the texts with the images as they pool them."""
    scorer = _scorer(store)
    asked, step = scorer.texts(store.queries(texts)), _step(store)
    for first in range(0, len(files), step):
        yield first, scorer.scores(scorer.images(store.tokens(files[first : first + step])), asked).T


def _again(store: FeatureStore, files: list[ImageFile], texts: list[str], best: Best) -> Best:
    """The same images of each text in the order of their conditioned scores; equal ones stay as they were."""
    import torch

    scorer = _scorer(store)
    asked = scorer.texts(store.queries(texts))
    scores = torch.empty_like(best.scores)
    for some in best.images.unique().split(_step(store)):  # ascending
        asking, slots = torch.isin(best.images, some).nonzero(as_tuple=True)
        rows = torch.searchsorted(some, best.images[asking, slots])
        images = scorer.images(store.tokens([files[row] for row in some.tolist()]))
        scores[asking, slots] = scorer.pairs(images, asked, rows, asking)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Best(scores, best.images.gather(1, order))


def _scorer(store: FeatureStore) -> ConditionedScorer:

    from fast_goal.model.conditioned import ConditionedScorer

    pooling = store.clip.to(store.device).eval().pooling
    assert pooling is not None
    return ConditionedScorer(pooling.pooling)


def _step(store: FeatureStore) -> int:
    """Images whose patches are in memory at once."""
    return min(IMAGES, max(1, NUMBERS // (store.patch_count * store.clip.embed_dim)))


def _merged(best: Best | None, first: int, scores: Tensor, top_k: int) -> Best:
    """The best of those so far and of further images, scores [T, I], of which the first has the row `first`."""
    import torch

    images = torch.arange(first, first + scores.shape[1], device=scores.device).expand(scores.shape)
    if best is not None:
        scores, images = torch.cat([best.scores, scores], dim=1), torch.cat([best.images, images], dim=1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Best(scores[:, :top_k], images.gather(1, order[:, :top_k]))


def _write(
    output: Path, columns: Mapping[str, list[str]], paths: list[str], found: Iterator[Best], about: dict[str, str]
) -> None:
    """The table: for each text, as often as it has images, its columns, and `rank` from 1, `path` and `score`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [pa.field(name, pa.string()) for name in columns]
    fields += [pa.field("rank", pa.int32()), pa.field("path", pa.string()), pa.field("score", pa.float32())]
    schema = pa.schema(fields, metadata=about)
    known = pa.array(paths, pa.string())
    with atomic_path(output) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        done = 0
        for best in found:
            count, each = best.images.shape
            rows = pa.array(np.repeat(np.arange(count), each))
            words = [pa.array(values[done : done + count], pa.string()).take(rows) for values in columns.values()]
            ranks = pa.array(np.tile(np.arange(1, each + 1, dtype=np.int32), count))
            images = known.take(pa.array(best.images.flatten().cpu().numpy()))
            scores = pa.array(best.scores.flatten().cpu().numpy())
            writer.write_table(pa.table([*words, ranks, images, scores], schema=schema))
            done += count
