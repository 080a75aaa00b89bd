"""Model drift: what successive models make of one small set of images and captions that never changes.

The first run draws the probe set from the split that `evaluate` uses and writes models/drift/probe.parquet; it stays until
somebody deletes that file. An image that has vanished or was changed is left out and counted, and `digest` then tells the
smaller set from the whole.

Letters: `I` pairs of an image and its long caption, `D` embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fast_goal.data.records import Dataset, write_table
from fast_goal.errors import DataError
from fast_goal.evaluation.features import FeatureStore, ImageFile, embed_images
from fast_goal.evaluation.retrieval import recall_at_k
from fast_goal.files import digest
from fast_goal.model.inference import model_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST = 2  # pairs, with which a rank means anything at all
PROBE = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            "dataset": pa.string(),
            "image_id": pa.string(),
            "image_path": pa.string(),  # relative to the project, or absolute where it lies elsewhere
            "width": pa.int64(),
            "height": pa.int64(),
            "content_hash": pa.string(),  # SHA-256 of the image file
            "long_caption": pa.string(),
        }.items()
    ],
    metadata={"table": "probe", "step": "drift"},
)


@dataclass(frozen=True)
class Probe:
    """The pairs of the probe set that are still as they were."""

    dataset: str
    files: list[ImageFile]
    captions: list[str]
    drawn: int
    missing: int
    changed: int

    @property
    def digest(self) -> str:
        """Differs where the measured pairs do."""
        return digest([[file.content for file in self.files], self.captions])


def open_probe(path: Path, dataset: Dataset, split: str, count: int) -> tuple[Probe, bool]:
    """The probe set in `path`, and whether it was drawn now: then with `count` pairs at most, smallest hash first, no image
    and no caption twice.

    Raises DataError for a file that cannot be read, and where the split has too few images with a long caption.
    """
    is_new = not path.exists()
    if is_new:
        write_table(path, _draw(dataset, split, count), PROBE)
    try:
        table = pq.read_table(path).select(PROBE.names).cast(PROBE).to_pandas()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Delete it: the next `fast-goal drift` draws another probe set, whose figures do "
            "not compare with the earlier ones."
        ) from None
    rows = list(table.itertuples(index=False))
    states = [_state(Path(row.image_path), row.content_hash) for row in rows]
    sound = [row for row, state in zip(rows, states, strict=True) if state == "sound"]
    files = [ImageFile(Path(row.image_path), (row.width, row.height), row.content_hash) for row in sound]
    counts = {state: states.count(state) for state in ("missing", "changed")}
    name = rows[0].dataset if rows else dataset.name
    return Probe(name, files, [row.long_caption for row in sound], len(rows), **counts), is_new


def measure(stores: Mapping[str, FeatureStore], probe: Probe, against: str) -> dict[str, dict[str, Any]]:
    """What each model makes of the probe set; empty where it has fewer than two pairs left.

    stores: by the name of the model. against: the name of the one that the others are compared with.

    Returns for each model: `R@1` in percent of both directions; `cosine`, the mean of the matching pairs, and `other_cosine`
    of all others; `scale`, CLIP's factor of the cosines; `agreement`, the percentage of captions, and of images, for which it
    finds the same first as `against`; `cka`, how alike the two models see the similarities among images and among captions,
    1 for equal ones; `digest` of its weights.
    """
    if len(probe.files) < LEAST:
        return {}
    features = _features(stores, probe)
    own, found = torch.arange(len(probe.files)), {}
    first = _first(*features[against])
    for model, (images, texts) in features.items():
        recall = recall_at_k(images, texts, own, [1])
        cosines = images.double() @ texts.double().T
        mine = _first(images, texts)
        found[model] = {
            "R@1": {direction: values[1] for direction, values in recall.items()},
            "cosine": cosines.diagonal().mean().item(),
            "other_cosine": ((cosines.sum() - cosines.trace()) / (cosines.numel() - len(own))).item(),
            "scale": stores[model].clip.logit_scale.item(),
            "agreement": {way: 100 * (mine[way] == first[way]).double().mean().item() for way in mine},
            "cka": {
                "images": linear_cka(images, features[against][0]),
                "captions": linear_cka(texts, features[against][1]),
            },
            "digest": model_digest(stores[model].clip)[:16],
        }
    return found


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019) of two models' features [I, D] and [I, E] of the same inputs.

    1 where one is the other turned, mirrored or scaled; near 0 where their similarities have nothing in common. Widths may
    differ. NaN does not occur: features that are all equal have the alignment 0 with any others.
    """
    x, y = (values.double() - values.double().mean(0) for values in (first, second))
    shared = (x.T @ y).square().sum()
    own = (x.T @ x).square().sum().sqrt() * (y.T @ y).square().sum().sqrt()
    return float(shared / own) if own > 0 else 0.0


def _draw(dataset: Dataset, split: str, count: int) -> pd.DataFrame:
    rows = dataset.split(split)
    rows = rows[rows.long_caption != ""].drop_duplicates("content_hash").drop_duplicates("long_caption")
    if len(rows) < LEAST:
        raise DataError(
            f"data set {dataset.name!r} has {len(rows)} images with a long caption in the split {split!r}: the probe set of "
            f"`fast-goal drift` needs {LEAST} at least, of evaluate.datasets[0] and evaluate.split"
        )
    rows = rows.sort_values("content_hash", kind="stable").head(count)
    paths = [dataset.path(path).as_posix() for path in rows.image_path]
    return rows.assign(dataset=dataset.name, image_path=paths)[PROBE.names]


def _state(path: Path, content: str) -> str:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"
    return "sound" if found == content else "changed"


def _features(stores: Mapping[str, FeatureStore], probe: Probe) -> dict[str, tuple[Tensor, Tensor]]:
    """[I, D] of images and of captions, by model."""
    everyone: Sequence[FeatureStore] = list(stores.values())
    embed_images(everyone, probe.files, [(row, None) for row in range(len(probe.files))], name="drift")
    return {model: (store.images(probe.files), store.texts(probe.captions, name="drift")[0]) for model, store in stores.items()}


def _first(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """What is found first, by caption and by image: int64 [I] each."""
    cosines = texts.double() @ images.double().T
    return {"text_to_image": cosines.argmax(1), "image_to_text": cosines.argmax(0)}
