"""Near-duplicates: pictures whose 64-bit perceptual hashes differ in at most a few bits, found exactly among millions.

Two hashes that differ in at most `bits` bits are equal in at least k of any bits + k blocks of them (pigeonhole). So for
each choice of k blocks the hashes are sorted by the bits of those blocks, and only those with the same bits are compared.

Letters: H distinct hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np
import pandas as pd

from fast_goal.data.quality import TRAINING_SPLITS
from fast_goal.data.records import Dataset

COMPARED_AT_ONCE = 4_000_000  # pairs; some 200 MB
FAR = np.uint64(64)


def hash_numbers(dataset: Dataset) -> pd.Series:
    """The perceptual hashes as uint64, indexed by the row in the records; images without one are not there."""
    hashes = dataset.hashes.drop_duplicates("image_id").set_index("image_id")["perceptual_hash"]
    texts = dataset.records["image_id"].map(hashes).reset_index(drop=True)
    texts = texts[texts.fillna("").str.fullmatch("[0-9a-fA-F]{16}")]
    numbers = np.frombuffer(bytes.fromhex("".join(texts)), dtype=">u8").astype(np.uint64)
    return pd.Series(numbers, index=texts.index)


def close_pairs(hashes: np.ndarray, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs of distinct hashes uint64 [H] that differ in at most `bits` bits, in portions of any size.

    Yields first, second (positions, int64) and the number of differing bits; a pair may come more than once.
    """
    if bits == 0 or len(hashes) < 2:
        return
    together = _together(len(hashes), bits)
    edges = np.linspace(0, 64, bits + together + 1).astype(int)
    blocks = [((1 << int(high)) - 1) ^ ((1 << int(low)) - 1) for low, high in pairwise(edges)]
    for chosen in combinations(blocks, together):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        ends = np.searchsorted(ordered, ordered, side="right")
        partners = ends - np.arange(len(ordered)) - 1  # those after it with the same key
        for first, count in _portions(partners):
            left = np.repeat(np.arange(first, first + len(count)), count)
            right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
            one, other = order[left], order[right]
            distance = np.bitwise_count(hashes[one] ^ hashes[other])
            near = distance <= bits
            yield one[near], other[near], distance[near]


def near_duplicates(dataset: Dataset, training: Dataset, bits: int, learned: bool | None = None) -> pd.DataFrame:
    """The nearest near-duplicates of each image that has any. `bits`: how many may differ. `learned`: whether the data set is
    itself trained on; None: where it is `training`.

    Columns: `row` (of the records), `where` (`training`: a held-out image, near a training image of `training`; `split`:
    near another image of its own split), `other` (the row of the nearest, in `training` or in the data set itself) and
    `distance` (bits). Held out is a test or validation image; of a data set that is not trained on every image.

    Raises ValueError for a data set without hashes.
    """
    if dataset.hashes is None or training.hashes is None:
        raise ValueError("near-duplicates need the perceptual hashes of both data sets")
    own = hash_numbers(dataset)
    splits = dataset.records["split"].to_numpy()[own.index]
    same = dataset.name == training.name
    seen = own if same else hash_numbers(training)
    trained = np.isin((dataset if same else training).records["split"].to_numpy()[seen.index], TRAINING_SPLITS)
    learned = same if learned is None else learned
    held_out = ~np.isin(splits, TRAINING_SPLITS) if learned else np.ones(len(own), dtype=bool)

    distinct, codes = np.unique(np.concatenate([own.to_numpy(), seen.to_numpy()[trained]]), return_inverse=True)
    own_codes, seen_codes = codes[: len(own)], codes[len(own) :]
    in_training = _holders(seen_codes, seen.index.to_numpy()[trained], len(distinct))[0]
    groups = {split: splits == split for split in np.unique(splits)}
    in_split = {split: _holders(own_codes[mask], own.index.to_numpy()[mask], len(distinct)) for split, mask in groups.items()}
    asked = np.zeros(len(distinct), dtype=bool)
    asked[own_codes[held_out]] = True

    # The nearest for each distinct hash, as distance * 2^56 + position: the minimum is the nearest, then the first.
    to_training = np.where(in_training >= 0, np.arange(len(distinct), dtype=np.uint64), FAR << np.uint64(56))
    to_split = {split: np.full(len(distinct), FAR << np.uint64(56)) for split in groups}
    for one, other, distance in close_pairs(distinct, bits):
        for left, right in ((one, other), (other, one)):
            found = (distance.astype(np.uint64) << np.uint64(56)) | right.astype(np.uint64)
            use = asked[left] & (in_training[right] >= 0)
            np.minimum.at(to_training, left[use], found[use])
            for split, (first, _) in in_split.items():
                use = (first[left] >= 0) & (first[right] >= 0)
                np.minimum.at(to_split[split], left[use], found[use])

    parts = [_links("training", own.index.to_numpy()[held_out], to_training[own_codes[held_out]], in_training)]
    for split, mask in groups.items():
        rows, code = own.index.to_numpy()[mask], own_codes[mask]
        first, second = in_split[split]
        twin = np.where(first[code] == rows, second[code], first[code])  # another image with the very same hash
        nearest = np.where(twin >= 0, np.uint64(0), to_split[split][code])
        links = _links("split", rows, nearest, first)
        links["other"] = np.where(links["distance"] == 0, pd.Series(twin, index=rows)[links["row"]], links["other"])
        parts.append(links)
    return pd.concat(parts, ignore_index=True).sort_values(["where", "row"], ignore_index=True)


def _together(count: int, bits: int) -> int:
    """How many blocks to take together so that the sorts and the comparisons cost least, for hashes without pattern."""

    def cost(together: int) -> float:
        same_key = count / 2.0 ** (64 * together / (bits + together))
        return comb(bits + together, together) * (count * 30 + count * same_key)

    return min(range(1, 6), key=cost)


def _portions(partners: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts the counts into stretches of at most COMPARED_AT_ONCE pairs (one count may have more): start and counts."""
    total = np.cumsum(partners)
    first = 0
    while first < len(partners) and total[-1] > (done := total[first - 1] if first else 0):
        last = max(int(np.searchsorted(total, done + COMPARED_AT_ONCE, side="right")), first + 1)
        yield first, partners[first:last]
        first = last


def _holders(codes: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `count` hashes the first and the second row that has it, -1 where there is none: int64 [H] each."""
    order = np.lexsort((rows, codes))
    codes, rows = codes[order], rows[order]
    first, second = np.full(count, -1), np.full(count, -1)
    new = np.r_[True, codes[1:] != codes[:-1]] if len(codes) else np.zeros(0, dtype=bool)
    first[codes[new]] = rows[new]
    after = np.flatnonzero(new) + 1
    after = after[after < len(codes)]
    after = after[~new[after]]
    second[codes[after]] = rows[after]
    return first, second


def _links(where: str, rows: np.ndarray, nearest: np.ndarray, holder: np.ndarray) -> pd.DataFrame:
    distance = nearest >> np.uint64(56)
    near = distance < FAR
    position = (nearest[near] & np.uint64((1 << 56) - 1)).astype(np.int64)
    return pd.DataFrame(
        {"row": rows[near], "where": where, "other": holder[position], "distance": distance[near].astype(np.int64)}
    )
