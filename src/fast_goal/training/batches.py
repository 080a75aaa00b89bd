"""The batches of fine-tuning: global images with long captions, local crops with sentences, each image decoded once.

Letters: B samples of a batch, P local pairs of them (an image may have none or several), S input size, L and L' token
positions after trimming.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pandas as pd
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from fast_goal.data.captions import tokenize, trim
from fast_goal.data.images import crop, open_image
from fast_goal.data.records import Dataset
from fast_goal.environment import prepare
from fast_goal.errors import DataError, FastGoalError
from fast_goal.model.clip import Clip
from fast_goal.training.alignment import ALIGNMENTS, Alignment
from fast_goal.training.distributed import Group

POOL = 50  # batches that are sorted by length together, a guess: more leave less to chance and trim no better
ENDED = ("exited unexpectedly", "killed by signal")  # torch's words for a dead worker
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch. Row i of the local fields belongs to the sample `local_rows[i]` of the global ones, which is ascending.

    images [B+P, 3, S, S]: the global images, then the local crops. long_tokens [B, L], sentence_tokens [P, L'].
    local_rows [P]. boxes [P, 4]: the local box in pixels of the global input, zeros when nothing of it is visible.
    spans [P, 2]: the sentence's positions in its row of long_tokens, last exclusive, (0, 0) when none is visible.
    regions [P, 4]: the local box in pixels of its original image.
    local_weights [P]: those of an image's pairs add up to 1. rank_pairs: how many local pairs each of the processes that
    share a batch has in its share.
    """

    images: torch.Tensor
    long_tokens: torch.Tensor
    sentence_tokens: torch.Tensor
    local_rows: torch.Tensor
    boxes: torch.Tensor
    spans: torch.Tensor
    regions: torch.Tensor
    local_weights: torch.Tensor
    rank_pairs: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not wait."""
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the torch DataLoader calls this."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def __len__(self) -> int:
        return len(self.long_tokens)

    def split(self, parts: int) -> list[Batch]:
        """The samples in `parts` batches of about equal size, texts trimmed anew; fewer parts than asked for where there are
        fewer samples. To be called where the batch is on the CPU: trimming looks at the tokens."""
        count = len(self)
        if parts <= 1 or count <= 1:
            return [self]
        bounds = torch.linspace(0, count, min(parts, count) + 1).round().long()
        edges = torch.searchsorted(self.local_rows, bounds)  # local_rows is ascending
        made = []
        for (first, last), (low, high) in zip(pairwise(bounds.tolist()), pairwise(edges.tolist()), strict=True):
            sentences = self.sentence_tokens[low:high]
            made.append(
                Batch(
                    images=torch.cat([self.images[first:last], self.images[count + low : count + high]]),
                    long_tokens=trim(self.long_tokens[first:last]),
                    sentence_tokens=trim(sentences) if len(sentences) else sentences,
                    local_rows=self.local_rows[low:high] - first,
                    boxes=self.boxes[low:high],
                    spans=self.spans[low:high],
                    regions=self.regions[low:high],
                    local_weights=self.local_weights[low:high],
                    rank_pairs=self.rank_pairs,
                )
            )
        return made


class PairDataset(TorchDataset):
    """The samples of one split, through the view of `clip`; `samples[indices]` is a Batch.

    With a `group` of several processes it is the batch that they share, and each gets its part of it, in the order of the
    ranks. Texts are tokenised and boxes and spans computed once, here; images are decoded when a batch is made. A sample
    without a local pair contributes its global image and caption only; with `local` False no sample has one, with `best`
    False a sample has all of its pairs; `alignment`: see training/alignment.py. `counts` says how many samples, or pairs,
    are affected by what.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        pairs: pd.DataFrame | None,
        clip: Clip,
        local: bool = True,
        best: bool = True,
        group: Group | None = None,
        alignment: str = "exact",
    ):
        self._group = group or Group()
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
        self.image_ids = described["image_id"].tolist()
        # the same picture under two ids counts as one
        self.groups: list[int] = pd.factorize(described["content_hash" if "content_hash" in described else "image_id"])[
            0
        ].tolist()
        self._view = clip.view(1, 1)
        self._sizes = list(zip(described["width"].tolist(), described["height"].tolist(), strict=True))
        long_tokens, lengths = tokenize(described["long_caption"].tolist(), clip.context_length)
        self._long_tokens = trim(long_tokens).int()
        self.lengths: list[int] = lengths.clamp(max=clip.context_length).tolist()  # tokens of each long caption
        self.counts = {
            "samples": len(described),
            "without_long_caption": len(records) - len(described),
            "truncated_captions": int((lengths > clip.context_length).sum()),
        }
        # the pairs of sample i are the rows first[i] to first[i + 1] of the tables of local pairs
        self._first = torch.zeros(len(described) + 1, dtype=torch.int64)
        self._weights = torch.zeros(0)
        self._boxes, self._spans = torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)
        self._regions = torch.zeros(0, 4)
        self._sentence_tokens = torch.zeros(0, 1, dtype=torch.int32)
        if local:
            chosen = pairs[pairs["rank"] == 1] if best else pairs
            self._add_pairs(described, chosen, dataset.name, clip.context_length, ALIGNMENTS[alignment])
        for name, count in self.counts.items():
            if count and name in _REASONS:
                whole = self.counts["pairs"] if name in _OF_PAIRS else len(described)
                what = "pairs" if name in _OF_PAIRS else "samples"
                _log.warning("%s, split %s: %d of %d %s %s.", dataset.name, split, count, whole, what, _REASONS[name])

    def _add_pairs(
        self, described: pd.DataFrame, pairs: pd.DataFrame, name: str, context_length: int, alignment: Alignment
    ) -> None:
        sample = {image_id: row for row, image_id in enumerate(described["image_id"])}
        own = pairs[pairs["image_id"].isin(sample)]
        own = own.assign(sample=own["image_id"].map(sample)).sort_values(["sample", "rank"], kind="stable")
        count = torch.bincount(torch.tensor(own["sample"].to_numpy(dtype="int64")), minlength=len(described))
        self._first[1:] = count.cumsum(0)
        self._crops = own[["x1", "y1", "x2", "y2"]].to_numpy(dtype=float)
        weights = own["weight"] / own.groupby("sample")["weight"].transform("sum")  # a best pair alone has all the weight
        self._weights = torch.tensor(weights.to_numpy(), dtype=torch.float32)
        captions = described["long_caption"].tolist()
        boxes, spans = [], []
        for box, pair in zip(self._crops, own.itertuples(), strict=True):
            caption = captions[pair.sample]
            if caption[pair.char_start : pair.char_end] != pair.sentence:
                raise DataError(
                    f"pairs of {name!r}: image {pair.image_id!r} has the sentence {pair.sentence!r}, but its long "
                    f"caption reads {caption[pair.char_start : pair.char_end]!r} there. Run `fast-goal flism` again."
                )
            width, height = self._sizes[pair.sample]
            boxes.append(alignment.box(dataclasses.replace(self._view, width=width, height=height), box))
            spans.append(alignment.span(caption, pair.char_start, pair.char_end, context_length))
        self._regions = torch.tensor(self._crops, dtype=torch.float32).reshape(-1, 4)
        self._boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        self._spans = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
        sentences, lengths = tokenize(own["sentence"].tolist(), context_length)
        self._sentence_tokens = trim(sentences).int()
        self.counts |= {
            "pairs": len(own),
            "without_pair": int((count == 0).sum()),
            "without_visible_box": int((self._boxes[:, 2:] <= self._boxes[:, :2]).any(dim=1).sum()),
            "without_visible_span": int((self._spans[:, 1] <= self._spans[:, 0]).sum()),
            "truncated_sentences": int((lengths > context_length).sum()),
        }

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: list[int]) -> Batch:
        """The batch of these samples. Raises DataError, which names the image that cannot be used."""
        share = len(indices) // self._group.world
        shares = [indices[number * share : (number + 1) * share] for number in range(self._group.world)]
        rank_pairs = tuple(sum(int(self._first[index + 1] - self._first[index]) for index in own) for own in shares)
        indices = shares[self._group.rank]
        chosen = torch.tensor(indices)
        ranges = [torch.arange(int(self._first[index]), int(self._first[index + 1])) for index in indices]
        pairs = torch.cat(ranges)  # [P]
        local_rows = torch.arange(len(indices)).repeat_interleave(torch.tensor([len(rows) for rows in ranges]))
        images, crops = [], []
        for index, rows in zip(indices, ranges, strict=True):
            image = open_image(self._paths[index])
            width, height = self._sizes[index]
            if image.size != (width, height):
                raise DataError(
                    f"{self._paths[index]} is {image.width} x {image.height} pixels, but the records say {width} x {height}: "
                    f"the file was changed. Run `fast-goal download` again."
                )
            images.append(dataclasses.replace(self._view, width=width, height=height).apply(image))
            for row in rows.tolist():
                part = crop(image, self._crops[row])
                crops.append(dataclasses.replace(self._view, width=part.width, height=part.height).apply(part))
        return Batch(
            images=torch.stack(images + crops),
            long_tokens=self._text(self._long_tokens, chosen),
            sentence_tokens=self._text(self._sentence_tokens, pairs),
            local_rows=local_rows,
            boxes=self._boxes[pairs],
            spans=self._spans[pairs],
            regions=self._regions[pairs],
            local_weights=self._weights[pairs],
            rank_pairs=rank_pairs,
        )

    @staticmethod
    def _text(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return trim(tokens[rows].long()) if len(rows) else tokens[:0].long()


_REASONS = {
    "without_long_caption": "have no long caption and are left out",
    "truncated_captions": "have a long caption beyond the text context, cut off",
    "without_pair": "have no local pair and contribute the global terms only",
    "without_visible_box": "have a box outside the view and contribute no image-TSL term",
    "without_visible_span": "have a sentence beyond the text context and contribute no text-TSL term",
    "truncated_sentences": "have a sentence longer than the text context, cut off",
}
_OF_PAIRS = ("without_visible_box", "without_visible_span", "truncated_sentences")


class EpochBatches(Sampler[list[int]]):
    """The indices of every batch: a shuffle that depends on (seed, epoch) alone, from any step of the epoch on.

    The last, smaller batch is dropped, because the contrastive loss depends on the batch size. With fewer samples than
    one batch, every batch holds them all. `groups` [samples]: samples of the same group, such as two captions of one image,
    do not meet in a batch, where each would be a false negative of the other. `lengths` [samples]: the batches are made of
    samples of similar length, as near as a random pool of them has, and come in random order.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        seed: int,
        groups: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ):
        self._samples, self.batch_size, self._seed = samples, min(batch_size, samples), seed
        self.steps = samples // self.batch_size
        self._epoch, self._start = 0, 0
        self._groups = groups if groups is not None and len(set(groups)) < samples else None
        self._lengths = lengths
        if self.batch_size < batch_size:
            _log.warning("Only %d samples for a batch of %d: every batch holds them all.", samples, batch_size)

    def start(self, epoch: int, step: int = 0) -> None:
        """Chooses the epoch and its first step for the next iteration."""
        self._epoch, self._start = epoch, step

    def __len__(self) -> int:
        return self.steps - self._start

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self._epoch)
        for step in range(self._start, self.steps):
            yield order[step * self.batch_size : (step + 1) * self.batch_size]

    def at(self, epoch: int, step: int) -> list[int]:
        """The indices of one batch."""
        return self._order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, epoch: int) -> list[int]:
        generator = epoch_generator(self._seed, epoch)
        order = torch.randperm(self._samples, generator=generator).tolist()
        if self._lengths is not None:
            order = self._by_length(order)
        if self._groups is not None:
            order = spread(order, self._groups, self.batch_size)
        if self._lengths is None:
            return order
        size = self.batch_size
        return [
            index
            for batch in torch.randperm(self.steps, generator=generator).tolist()
            for index in order[batch * size : (batch + 1) * size]
        ]

    def _by_length(self, order: list[int]) -> list[int]:
        """What fills whole batches, sorted by length within each of several pools; what is dropped stays random."""
        whole = order[: self.steps * self.batch_size]
        pool = max(min(POOL, self.steps // 4), 1) * self.batch_size
        made: list[int] = []
        for number, first in enumerate(range(0, len(whole), pool)):
            # up and down in turn: where pools meet, and `spread` moves samples on, the lengths are similar
            made += sorted(whole[first : first + pool], key=self._lengths.__getitem__, reverse=number % 2 == 1)
        return made


def spread(order: Sequence[int], groups: Sequence[int], batch_size: int) -> list[int]:
    """The same samples in an order in which no batch holds two of one group, as near to `order` as that allows.

    A sample that would meet another of its group waits for the next batch; what has none to wait for changes places with a
    sample of an earlier one. Where a group has more samples than there are batches, what is left meets after all.
    """
    made: list[int] = []
    waiting: deque[int] = deque()
    rest = iter(order)
    while len(made) < len(order):
        batch: list[int] = []
        inside: set[int] = set()
        again: deque[int] = deque()
        while len(batch) < batch_size:
            if waiting:
                sample = waiting.popleft()
            elif (sample := next(rest, -1)) < 0:
                break
            if groups[sample] in inside:
                again.append(sample)
            else:
                inside.add(groups[sample])
                batch.append(sample)
        waiting.extendleft(reversed(again))
        while len(batch) < batch_size and waiting:  # nobody else is left
            batch.append(waiting.popleft())
        made += batch
    _part(made, groups, batch_size)
    return made


def _part(order: list[int], groups: Sequence[int], batch_size: int) -> None:
    """Where two of a group are in one batch, exchanges one with a sample of the nearest earlier batch that allows it."""
    batches = range(0, len(order), batch_size)
    inside = [Counter(groups[sample] for sample in order[first : first + batch_size]) for first in batches]
    for number, first in enumerate(batches):
        for place in range(first, min(first + batch_size, len(order))):
            own = groups[order[place]]
            if inside[number][own] < 2:
                continue
            for earlier in range(number - 1, -1, -1):
                if inside[earlier][own]:
                    continue
                start = earlier * batch_size
                free = (at for at in range(start, start + batch_size) if not inside[number][groups[order[at]]])
                if (other := next(free, None)) is not None:
                    theirs = groups[order[other]]
                    order[place], order[other] = order[other], order[place]
                    inside[number].update({theirs: 1, own: -1})
                    inside[earlier].update({own: 1, theirs: -1})
                    break


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator of its own for each (seed, epoch), so that what is drawn in an epoch needs no history."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class Loader:
    """Batches of a PairDataset, made by `workers` processes (0: in this one) in the order of EpochBatches."""

    def __init__(
        self,
        samples: PairDataset,
        batch_size: int,
        seed: int,
        workers: int = 0,
        pin_memory: bool = False,
        length_groups: bool = False,
    ):
        self._samples = samples
        self._order = EpochBatches(len(samples), batch_size, seed, samples.groups, samples.lengths if length_groups else None)
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

    def image_ids(self, step: int) -> list[str]:
        """Of which images the batch of a step, counted from 0 over all epochs, is made."""
        epoch, within = divmod(step, self.steps)
        return [self._samples.image_ids[index] for index in self._order.at(epoch, within)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on.

        Raises DataError, which names the image that cannot be used, and FastGoalError where a worker process was killed.
        """
        if start >= self.steps:
            return
        self._order.start(epoch, start)
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, EOFError, ConnectionError) as error:  # the last two: while it handed a batch over
                if isinstance(error, RuntimeError) and not any(words in str(error) for words in ENDED):
                    raise
                reason = str(error) or type(error).__name__
                raise FastGoalError(
                    f"A process that decodes images ended ({reason}), as when the system kills it for lack of memory: lower "
                    "finetune.workers or finetune.batch_size, and run the step again."
                ) from None
            if batch is None:
                return
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
