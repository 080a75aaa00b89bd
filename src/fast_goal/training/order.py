"""Which samples each batch of an epoch is made of: a function of (seed, epoch) alone, so that a resume needs no history."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50  # batches that are sorted by length together, a guess: more leave less to chance and trim no better
_log = logging.getLogger(__name__)


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
        most = max(Counter(self._groups).values()) if self._groups is not None else 0
        if most > self.steps:
            message = "One picture has %d samples, and an epoch %d batches: some of them meet in a batch, as false negatives."
            _log.warning(message, most, self.steps)

    @property
    def epoch(self) -> int:
        """The one that was chosen."""
        return self._epoch

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
