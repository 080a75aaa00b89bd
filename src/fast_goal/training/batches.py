"""The batches of fine-tuning: global images with long captions, local crops with sentences, each image decoded once.

Letters: B samples of a batch, P of them with a local pair, S input size, L and L' token positions after trimming.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator

import pandas as pd
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from fast_goal.data.captions import token_span, tokenize, trim
from fast_goal.data.images import crop, open_image
from fast_goal.data.records import Dataset
from fast_goal.environment import prepare
from fast_goal.errors import DataError
from fast_goal.model.clip import Clip

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch. Row i of the local fields belongs to the sample `local_rows[i]` of the global ones.

    images [B+P, 3, S, S]: the global images, then the local crops. long_tokens [B, L], sentence_tokens [P, L'].
    local_rows [P]. boxes [P, 4]: the local box in pixels of the global input, zeros when nothing of it is visible.
    spans [P, 2]: the sentence's positions in its row of long_tokens, last exclusive, (0, 0) when none is visible.
    """

    images: torch.Tensor
    long_tokens: torch.Tensor
    sentence_tokens: torch.Tensor
    local_rows: torch.Tensor
    boxes: torch.Tensor
    spans: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not wait."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the torch DataLoader calls this."""
        return Batch(**{name: value.pin_memory() for name, value in vars(self).items()})


class PairDataset(TorchDataset):
    """The samples of one split, through the view of `clip`; `samples[indices]` is a Batch.

    Texts are tokenised and boxes and spans computed once, here; images are decoded when a batch is made. A sample without
    a local pair contributes its global image and caption only; with `local` False no sample has one. `counts` says how
    many samples are affected by what.
    """

    def __init__(self, dataset: Dataset, split: str, pairs: pd.DataFrame | None, clip: Clip, local: bool = True):
        records = dataset.split(split)
        described = records[records["long_caption"].str.strip() != ""]
        if described.empty:
            raise DataError(
                f"Data set {dataset.name!r} has no image with a long caption in the split {split!r}: nothing to train on."
            )
        if local and pairs is None:
            raise DataError(
                f"The objective needs local pairs, but data set {dataset.name!r} has no pairs table: run `fast-goal flism`."
            )
        # Only what a batch needs: the workers get a copy. Absolute, because they may start in another folder.
        self._paths = [dataset.path(path).absolute() for path in described["image_path"]]
        self._view = clip.view(1, 1)
        self._sizes = list(zip(described["width"].tolist(), described["height"].tolist(), strict=True))
        long_tokens, lengths = tokenize(described["long_caption"].tolist(), clip.context_length)
        self._long_tokens = trim(long_tokens).int()
        self.counts = {
            "samples": len(described),
            "without_long_caption": len(records) - len(described),
            "truncated_captions": int((lengths > clip.context_length).sum()),
        }
        # of each sample, its row in the tables of local pairs; -1 without one
        self._local_row = torch.full((len(described),), -1)
        self._boxes, self._spans = torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)
        self._sentence_tokens = torch.zeros(0, 1, dtype=torch.int32)
        if local:
            self._add_pairs(described, pairs, dataset.name, clip.context_length)
        for name, count in self.counts.items():
            if count and name in _REASONS:
                _log.warning("%s, split %s: %d of %d samples %s.", dataset.name, split, count, len(described), _REASONS[name])

    def _add_pairs(self, described: pd.DataFrame, pairs: pd.DataFrame, name: str, context_length: int) -> None:
        best = pairs.sort_values("rank", kind="stable").drop_duplicates("image_id").set_index("image_id")
        known = [row for row, image_id in enumerate(described["image_id"]) if image_id in best.index]
        best = best.loc[described["image_id"].iloc[known]]
        captions = described["long_caption"].iloc[known].tolist()
        self._local_row[known] = torch.arange(len(known))
        self._crops = best[["x1", "y1", "x2", "y2"]].to_numpy(dtype=float)
        boxes, spans = [], []
        for row, box, caption, pair in zip(known, self._crops, captions, best.itertuples(), strict=True):
            if caption[pair.char_start : pair.char_end] != pair.sentence:
                raise DataError(
                    f"pairs of {name!r}: image {pair.Index!r} has the sentence {pair.sentence!r}, but its long "
                    f"caption reads {caption[pair.char_start : pair.char_end]!r} there. Run `fast-goal flism` again."
                )
            width, height = self._sizes[row]
            boxes.append(dataclasses.replace(self._view, width=width, height=height).box(box))
            spans.append(token_span(caption, pair.char_start, pair.char_end, context_length))
        self._boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        self._spans = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
        sentences, lengths = tokenize(best["sentence"].tolist(), context_length)
        self._sentence_tokens = trim(sentences).int()
        self.counts |= {
            "pairs": len(known),
            "without_pair": len(described) - len(known),
            "without_visible_box": int((self._boxes[:, 2:] <= self._boxes[:, :2]).any(dim=1).sum()),
            "without_visible_span": int((self._spans[:, 1] <= self._spans[:, 0]).sum()),
            "truncated_sentences": int((lengths > context_length).sum()),
        }

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: list[int]) -> Batch:
        """The batch of these samples. Raises DataError, which names the image that cannot be used."""
        chosen = torch.tensor(indices)
        local_rows = (self._local_row[chosen] >= 0).nonzero().flatten()
        pairs = self._local_row[chosen[local_rows]]
        images, crops = [], []
        for index in indices:
            image = open_image(self._paths[index])
            width, height = self._sizes[index]
            if image.size != (width, height):
                raise DataError(
                    f"{self._paths[index]} is {image.width} x {image.height} pixels, but the records say {width} x {height}: "
                    f"the file was changed. Run `fast-goal download` again."
                )
            images.append(dataclasses.replace(self._view, width=width, height=height).apply(image))
            if self._local_row[index] >= 0:
                part = crop(image, self._crops[self._local_row[index]])
                crops.append(dataclasses.replace(self._view, width=part.width, height=part.height).apply(part))
        return Batch(
            images=torch.stack(images + crops),
            long_tokens=self._text(self._long_tokens, chosen),
            sentence_tokens=self._text(self._sentence_tokens, pairs),
            local_rows=local_rows,
            boxes=self._boxes[pairs],
            spans=self._spans[pairs],
        )

    @staticmethod
    def _text(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return trim(tokens[rows].long()) if len(rows) else tokens[:0].long()


_REASONS = {
    "without_long_caption": "have no long caption and are left out",
    "truncated_captions": "have a long caption beyond the text context, cut off",
    "without_pair": "have no local pair and contribute the global terms only",
    "without_visible_box": "have a local box outside the view and contribute no image-TSL term",
    "without_visible_span": "have a sentence beyond the text context and contribute no text-TSL term",
    "truncated_sentences": "have a sentence longer than the text context, cut off",
}


class EpochBatches(Sampler[list[int]]):
    """The indices of every batch: a shuffle that depends on (seed, epoch) alone, from any step of the epoch on.

    The last, smaller batch is dropped, because the contrastive loss depends on the batch size. With fewer samples than
    one batch, every batch holds them all.
    """

    def __init__(self, samples: int, batch_size: int, seed: int):
        self._samples, self.batch_size, self._seed = samples, min(batch_size, samples), seed
        self.steps = samples // self.batch_size
        self._epoch, self._start = 0, 0
        if self.batch_size < batch_size:
            _log.warning("Only %d samples for a batch of %d: every batch holds them all.", samples, batch_size)

    def start(self, epoch: int, step: int = 0) -> None:
        """Chooses the epoch and its first step for the next iteration."""
        self._epoch, self._start = epoch, step

    def __len__(self) -> int:
        return self.steps - self._start

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self._samples, generator=epoch_generator(self._seed, self._epoch)).tolist()
        for step in range(self._start, self.steps):
            yield order[step * self.batch_size : (step + 1) * self.batch_size]


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own for each (seed, epoch), so that what is drawn in an epoch needs no history."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class Loader:
    """Batches of a PairDataset, made by `workers` processes (0: in this one) in the order of EpochBatches."""

    def __init__(self, samples: PairDataset, batch_size: int, seed: int, workers: int = 0, pin_memory: bool = False):
        self._order = EpochBatches(len(samples), batch_size, seed)
        self.steps, self.batch_size = self._order.steps, self._order.batch_size
        context = None
        if workers:
            # Not fork: the parent has threads, and on a GPU a CUDA context. The server imports once for all workers.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        self._loader = DataLoader(
            _Guarded(samples),
            sampler=self._order,
            batch_size=None,  # the sampler yields whole batches
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            persistent_workers=workers > 0,
            multiprocessing_context=context,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else the loader draws from the global one
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on. Raises DataError, which names the image that cannot be used."""
        self._order.start(epoch, start)
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Guarded(TorchDataset):
    """Returns the error of an unreadable image instead of raising it: the DataLoader would wrap it in a traceback."""

    def __init__(self, samples: PairDataset):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, indices: list[int]) -> Batch | DataError:
        try:
            return self._samples[indices]
        except DataError as error:
            return error


def _unchanged(batch: Batch | DataError) -> Batch | DataError:
    return batch


def _start_worker(trainer: int, worker: int) -> None:
    """`trainer` is the process the worker decodes for. The torch watchdog looks at the fork server, which outlives it."""
    prepare()
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: int, every: float = 5.0) -> None:
    """Ends this process once `trainer` is gone, so that a `kill -9` of the training leaves no workers behind."""
    while True:
        time.sleep(every)
        try:
            os.kill(trainer, 0)
        except ProcessLookupError:
            os._exit(1)
