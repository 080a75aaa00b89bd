"""Near-duplicates against a comparison of every hash with every other."""

import numpy as np
import pandas as pd
import pytest

from fast_goal.data import near_duplicates as module
from fast_goal.data.near_duplicates import close_pairs, near_duplicates
from fast_goal.data.records import Dataset

GENERATOR = np.random.default_rng(3)


def hashes(count, families, flips):
    """Random hashes, many of them a few flipped bits away from another one."""
    numbers = GENERATOR.integers(2**64, size=count, dtype=np.uint64)
    for row in range(families, count):
        numbers[row] = numbers[row % families]
        for bit in GENERATOR.integers(64, size=GENERATOR.integers(0, flips + 1)):
            numbers[row] ^= np.uint64(1) << np.uint64(bit)
    return numbers


def apart(one, other):
    return bin(int(one) ^ int(other)).count("1")


def dataset(name, numbers, splits):
    ids = [f"{name}{row}" for row in range(len(numbers))]
    records = pd.DataFrame({"image_id": ids, "split": splits})
    table = pd.DataFrame({"image_id": ids, "perceptual_hash": [f"{int(number):016x}" for number in numbers]})
    return Dataset(name, None, records, hashes=table.iloc[::-1])  # in any order


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 7, 10])
@pytest.mark.parametrize("at_once", [5, 4_000_000])
def test_close_pairs(bits, at_once, monkeypatch):
    monkeypatch.setattr(module, "COMPARED_AT_ONCE", at_once)
    numbers = np.unique(hashes(120, 40, 12))
    expected = {
        (a, b): apart(numbers[a], numbers[b])
        for a in range(len(numbers))
        for b in range(a + 1, len(numbers))
        if apart(numbers[a], numbers[b]) <= bits
    }
    found = {}
    for first, second, distance in close_pairs(numbers, bits):
        for a, b, d in zip(first.tolist(), second.tolist(), distance.tolist(), strict=True):
            found[min(a, b), max(a, b)] = d
    assert found == expected
    assert bits < 3 or found


@pytest.mark.parametrize("together", [1, 2, 3, 4, 5])
def test_any_number_of_blocks_finds_the_same(together, monkeypatch):
    numbers = np.unique(hashes(80, 20, 6))
    expected = {(a, b) for a in range(len(numbers)) for b in range(a) if apart(numbers[a], numbers[b]) <= 4}
    monkeypatch.setattr(module, "_together", lambda count, bits: together)
    found = {(max(pair), min(pair)) for a, b, _ in close_pairs(numbers, 4) for pair in zip(a.tolist(), b.tolist(), strict=True)}
    assert found == expected


@pytest.mark.parametrize("other_set", [False, True])
def test_the_nearest_of_each_image(other_set):
    numbers = hashes(200, 60, 6)
    splits = np.array(["pretrain", "train", "val", "test"])[GENERATOR.integers(4, size=200)]
    data = dataset("photos", numbers, splits)
    training = dataset("large", hashes(100, 30, 6), ["train", "test"] * 50) if other_set else data
    if other_set:
        copied = numbers[:100:2]
        table = [f"{int(number) ^ 1:016x}" for number in copied]
        training.hashes.loc[training.hashes.index[:50], "perceptual_hash"] = table
    seen = [int(training.hashes.set_index("image_id")["perceptual_hash"][name], 16) for name in training.records["image_id"]]
    expected = {}
    for row in range(200):
        candidates = [
            (apart(numbers[row], number), other)
            for other, number in enumerate(seen)
            if training.records["split"][other] in ("pretrain", "train")
        ]
        if (other_set or splits[row] in ("val", "test")) and min(candidates)[0] <= 4:
            expected["training", row] = min(candidates)[0]
        twins = [apart(numbers[row], numbers[other]) for other in range(200) if other != row and splits[other] == splits[row]]
        if min(twins) <= 4:
            expected["split", row] = min(twins)
    found = near_duplicates(data, training, 4)
    assert {(link.where, link.row): link.distance for link in found.itertuples()} == expected
    for link in found.itertuples():
        other = seen[link.other] if link.where == "training" else numbers[link.other]
        assert apart(numbers[link.row], other) == link.distance
        assert link.where == "training" or (link.row != link.other and splits[link.row] == splits[link.other])


def test_of_a_data_set_that_is_trained_on_only_what_is_held_out_is_compared():
    first = dataset("large", np.array([5, 5, 0xFFFF00000000], dtype=np.uint64), ["train", "test", "train"])
    data = dataset("photos", np.array([5, 7, 0xFFFF00000001], dtype=np.uint64), ["train", "test", "val"])

    def found(**options: bool) -> list[tuple[int, int, int]]:
        links = near_duplicates(data, first, 4, **options)
        return links.loc[links["where"] == "training", ["row", "other", "distance"]].to_records(index=False).tolist()

    assert found() == [(0, 0, 0), (1, 0, 1), (2, 2, 1)]
    assert found(learned=True) == [(1, 0, 1), (2, 2, 1)]


def test_images_without_a_hash_are_left_out():
    data = dataset("photos", np.array([5, 5, 5], dtype=np.uint64), ["train", "train", "test"])
    data = Dataset("photos", None, data.records, hashes=data.hashes[data.hashes["image_id"] != "photos1"])
    found = near_duplicates(data, data, 4)
    assert found.to_dict("records") == [{"row": 2, "where": "training", "other": 0, "distance": 0}]


def test_without_hashes_there_is_an_error():
    data = Dataset("photos", None, pd.DataFrame({"image_id": ["a"], "split": ["train"]}))
    with pytest.raises(ValueError, match="perceptual hashes"):
        near_duplicates(data, data, 4)
