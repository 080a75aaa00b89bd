"""What is kept of a training set so that later ones can be held against it, when it is gone itself.

    models/drift/references/<digest of the data set>.npz

Which images and captions there were, by the hashes of their content; and of a sample the embeddings by the base model, the
captions' lengths and what the detector found. The sample is drawn by content, the smallest hashes first: the same data
draw the same sample, and what two data sets share is drawn from both.

Letters: `I` images, `T` captions, `Q` images that FLISM has seen, `D` embedding width, `L` labels of the detector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fast_goal.data.captions import split_sentences
from fast_goal.errors import DataError
from fast_goal.evaluation.features import ImageFile, embed_images
from fast_goal.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd

    from fast_goal.data.records import Dataset
    from fast_goal.evaluation.features import FeatureStore

VERSION = 1  # of the file
KEY = 16  # bytes of a hash


@dataclass(frozen=True)
class Sample:
    """Images and captions with what is compared of them, each in the order of its keys, uint8 [., 16]."""

    image_keys: np.ndarray  # [I, 16]
    image_features: np.ndarray  # float32 [I, D]
    caption_keys: np.ndarray  # [T, 16]
    caption_features: np.ndarray  # float32 [T, D]
    tokens: np.ndarray  # int64 [T], of the whole caption, start and end included
    sentences: np.ndarray  # int64 [T]
    region_keys: np.ndarray  # [Q, 16]
    labels: np.ndarray  # str [L], sorted
    detections: np.ndarray  # int64 [Q, L], how many of each label the detector found


@dataclass(frozen=True)
class Facts:
    """Where a snapshot comes from. Embeddings compare only where `base` is equal, detections where `detector` is."""

    dataset: str
    digest: str
    time: str
    base: str
    detector: str  # "" where there is none
    samples: int  # asked for


@dataclass(frozen=True)
class Snapshot:
    """A training set as it is remembered."""

    facts: Facts
    images: np.ndarray  # uint8 [all images, 16], sorted
    captions: np.ndarray  # uint8 [all long captions, 16], sorted
    sample: Sample

    def equals(self, other: Snapshot) -> bool:
        """Whether both say the same."""
        mine, theirs = ({**vars(one.sample), "images": one.images, "captions": one.captions} for one in (self, other))
        return self.facts == other.facts and all(np.array_equal(values, theirs[name]) for name, values in mine.items())

    def save(self, path: Path) -> None:
        """Writes it, atomically."""
        facts = json.dumps({"version": VERSION, **asdict(self.facts)})
        arrays = {**vars(self.sample), "images": self.images, "captions": self.captions, "facts": np.array(facts)}
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)


def load_snapshot(path: Path) -> Snapshot:
    """Reads what `Snapshot.save` wrote. Raises DataError for a file that is damaged or of another version."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        facts = json.loads(str(arrays.pop("facts")))
        if (version := facts.pop("version")) != VERSION:
            raise ValueError(f"its version is {version}, expected {VERSION}")
        images, captions = arrays.pop("images"), arrays.pop("captions")
        return Snapshot(Facts(**facts), images, captions, Sample(**arrays))
    # a damaged zip archive fails in many ways
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as a snapshot of a training set ({error}). Delete it: the next `fast-goal drift` on that "
            "data set writes it again."
        ) from None


class Present:
    """A training set that is here: the records of the split `train`, from which samples are drawn.

    store: of the base model. regions: FLISM's table, None where there is none or no detector.
    """

    def __init__(self, dataset: Dataset, store: FeatureStore, regions: pd.DataFrame | None):
        self._dataset, self._store = dataset, store
        self.records = dataset.split("train")
        self._images = _by_key(self.records.content_hash)
        self._captions = _by_key([text for text in self.records.long_caption if text])
        self._seen = set() if regions is None else set(regions.image_id)
        found = None if regions is None else regions[regions.kind == "detector"]
        self._found = {} if found is None else found.groupby("image_id").label.apply(list).to_dict()

    @property
    def images(self) -> np.ndarray:
        """The keys of all images, each once: uint8 [., 16], sorted."""
        return _array(list(self._images))

    @property
    def captions(self) -> np.ndarray:
        """The keys of all long captions, each once: uint8 [., 16], sorted."""
        return _array(list(self._captions))

    def sample(self, count: int, known: Snapshot | None = None) -> Sample:
        """A sample of `count` images and captions at most; only of what is not in `known`, if that is given.

        Raises DataError for an image that cannot be read or was changed.
        """
        old = [set(), set()] if known is None else [_keys(known.images), _keys(known.captions)]
        images = [(key, row) for key, (row, _) in self._images.items() if key not in old[0]][:count]
        captions = [(key, text) for key, (_, text) in self._captions.items() if key not in old[1]][:count]
        texts = [text for _, text in captions]
        features, tokens = self._store.texts(texts, name="drift")
        rows = self.records.iloc[[row for _, row in images]]
        files = self._files(rows)
        embed_images([self._store], files, [(row, None) for row in range(len(files))], name="drift")
        labels, counts, seen = self._detections(rows.image_id.tolist())
        return Sample(
            image_keys=_array([key for key, _ in images]),
            image_features=self._store.images(files).numpy(),
            caption_keys=_array([key for key, _ in captions]),
            caption_features=features.numpy(),
            tokens=tokens,
            sentences=np.array([len(split_sentences(text)) for text in texts], np.int64),
            region_keys=_array([key for (key, _), known_there in zip(images, seen, strict=True) if known_there]),
            labels=labels,
            detections=counts,
        )

    def _files(self, rows: pd.DataFrame) -> list[ImageFile]:
        return [
            ImageFile(self._dataset.path(row), (int(row.width), int(row.height)), row.content_hash)
            for row in rows.itertuples(index=False)
        ]

    def _detections(self, image_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[bool]]:
        """The labels [L], their counts [Q, L], and of each image whether FLISM has seen it."""
        seen = [image_id in self._seen for image_id in image_ids]
        found = [self._found.get(image_id, []) for image_id, there in zip(image_ids, seen, strict=True) if there]
        labels = sorted({label for one in found for label in one})
        place = {label: index for index, label in enumerate(labels)}
        counts = np.zeros((len(found), len(labels)), np.int64)
        for row, one in enumerate(found):
            np.add.at(counts[row], [place[label] for label in one], 1)
        return np.array(labels, dtype=str), counts, seen


def unknown(keys: np.ndarray, known: np.ndarray) -> int:
    """How many of the keys are not among the known ones."""
    return len(_keys(keys) - _keys(known))


def _by_key(contents: Sequence[str]) -> dict[bytes, tuple[int, str]]:
    """Key -> (row, content) of the first of each content, in the order of the keys."""
    found: dict[bytes, tuple[int, str]] = {}
    for row, content in enumerate(contents):
        # surrogatepass: a caption may hold half a character pair, which is no UTF-8
        found.setdefault(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:KEY], (row, content))
    return dict(sorted(found.items()))


def _array(keys: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY)


def _keys(keys: np.ndarray) -> set[bytes]:
    return {key.tobytes() for key in keys}
