import dataclasses
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import fast_goal
from fast_goal.config import FinetuneConfig, build
from fast_goal.data import images as images_module
from fast_goal.data.captions import tokenize
from fast_goal.data.images import View, normalised
from fast_goal.errors import ConfigError, DataError, FastGoalError
from fast_goal.objectives import Plain
from fast_goal.training import loader as loader_module
from fast_goal.training import views as views_module
from fast_goal.training.batches import PairDataset, pair_dataset
from fast_goal.training.distributed import Group
from fast_goal.training.loader import Loader
from fast_goal.training.order import EpochBatches, spread


def same(a, b) -> bool:
    return all(
        torch.equal(value, vars(b)[name]) if isinstance(value, torch.Tensor) else value == vars(b)[name]
        for name, value in vars(a).items()
    )


def test_batch_holds_what_the_tables_say(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    clip = tiny_clip()
    samples = PairDataset(dataset, "train", pairs, clip)
    batch = samples[[5, 0, 3]]
    assert batch.images.shape == (6, 3, 32, 32) and batch.images.dtype == torch.uint8
    images = normalised(batch.images, clip.mean, clip.std)
    assert batch.local_rows.tolist() == [0, 1, 2]
    for row, index in enumerate([5, 0, 3]):
        record, pair = dataset.split("train").iloc[index], pairs.iloc[index]
        with Image.open(dataset.path(record.image_path)) as image:
            view = View(image.width, image.height, 32)
            assert torch.equal(images[row], view.apply(image))
            # the crop's edges are whole pixels, except the lower one: 25.5 is rounded outwards
            part = image.crop((int(pair.x1), 5, int(pair.x2), 26))
            assert torch.equal(images[3 + row], View(part.width, part.height, 32).apply(part))
        assert batch.boxes[row].tolist() == pytest.approx(view.box((pair.x1, pair.y1, pair.x2, pair.y2)), abs=1e-5)
        first, last = batch.spans[row].tolist()
        # the sentence's own tokens, without start and end, are those of its span
        alone, lengths = tokenize([pair.sentence], 40)
        assert batch.caption_tokens[row, first:last].tolist() == alone[0, 1 : int(lengths[0]) - 1].tolist()
        assert batch.sentence_tokens[row, : int(lengths[0])].tolist() == alone[0, : int(lengths[0])].tolist()


def settings(**changes):
    path = Path(fast_goal.__file__).parent / "conf/finetune/default.yaml"
    return build(FinetuneConfig, yaml.safe_load(path.read_text()) | changes, "finetune")


def test_the_settings_reach_the_samples(make_scenes, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset, pairs = make_scenes()
    second = pairs.assign(rank=2, x1=0.0, weight=0.5)
    pairs = pd.concat([pairs.assign(weight=0.5), second])
    needs = SimpleNamespace(needs_local=True, needs_pooled=True, needs_negatives=False, needs_captions=True)
    needs.alignment, needs.sub_captions = "goal", None
    cpu = torch.device("cpu")

    def made(objective=needs, **changes):
        return pair_dataset(dataset, "train", pairs, tiny_clip(), objective, settings(**changes), Group(1, 2), cpu)

    batch = made()[[4, 2, 1, 0]]
    assert len(batch) == 2 and batch.rank_pairs == (2, 2)
    assert same(batch, PairDataset(dataset, "train", pairs, tiny_clip(), alignment="goal", group=Group(1, 2))[[4, 2, 1, 0]])
    assert same(made(pixel_cache=True)[[4, 2, 1, 0]], batch) and len(list(Path(".fast_goal/pixels").glob("*.views"))) == 2
    assert made(pairs="all")[[4, 2, 1, 0]].rank_pairs == (4, 4)
    plain = Plain()
    assert made(plain).counts.keys().isdisjoint({"pairs", "negatives"})
    assert made(scaled_decoding=True).views.scaled and not made().views.scaled
    with pytest.raises(ConfigError, match=r"finetune\.decode = 'gpu' needs a CUDA device"):
        made(decode="gpu")
    with pytest.raises(DataError, match=r"no \.tar file below elsewhere"):
        made(shards="elsewhere")


def test_each_image_is_decoded_once(make_scenes, tiny_clip, monkeypatch):
    dataset, pairs = make_scenes()
    opened = []

    def counting(path, *arguments):
        opened.append(path.name)
        return images_module.open_image(path, *arguments)

    monkeypatch.setattr(views_module, "open_image", counting)
    PairDataset(dataset, "train", pairs, tiny_clip())[[1, 2, 7]]
    assert opened == ["1.png", "2.png", "7.png"]


def test_texts_are_trimmed_per_batch(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    dataset.records.loc[dataset.records["image_id"] == "image3", "long_caption"] += " And" * 12 + "."
    samples = PairDataset(dataset, "train", pairs, tiny_clip())
    short, long = samples[[0, 1]].caption_tokens, samples[[0, 3]].caption_tokens
    assert long.shape[1] >= short.shape[1] + 10
    assert torch.equal(long[0, : short.shape[1]], short[0])
    assert samples[[0, 1]].sentence_tokens.shape[1] < short.shape[1]


def test_samples_without_a_pair_are_global_only(make_scenes, tiny_clip, caplog):
    dataset, pairs = make_scenes()
    with caplog.at_level(logging.WARNING):
        samples = PairDataset(dataset, "train", pairs[pairs.image_id.isin(["image2", "image5"])], tiny_clip())
    assert samples.counts["without_pair"] == 10 and "10 of 12 samples have no local pair" in caplog.text
    batch = samples[[1, 5, 3, 2]]
    assert len(batch.images) == 6 and batch.local_rows.tolist() == [1, 3]
    assert len(batch.boxes) == len(batch.spans) == len(batch.sentence_tokens) == 2
    nobody = samples[[0, 1]]
    assert len(nobody.images) == 2
    assert [len(nobody.local_rows), len(nobody.boxes), len(nobody.spans), len(nobody.sentence_tokens)] == [0, 0, 0, 0]


def test_no_crops_where_the_objective_has_no_local_term(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    for table in (pairs, None):
        batch = PairDataset(dataset, "train", table, tiny_clip(), local=False)[[0, 1]]
        assert len(batch.images) == 2 and len(batch.local_rows) == 0


def test_pairs_table_missing(make_scenes, tiny_clip):
    dataset, _ = make_scenes()
    with pytest.raises(DataError, match="fast-goal flism"):
        PairDataset(dataset, "train", None, tiny_clip())


def test_the_best_of_several_pairs_is_used(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    worse = pairs.assign(rank=2, x1=0.0, y1=0.0, x2=4.0, y2=4.0)
    samples = PairDataset(dataset, "train", pd.concat([worse, pairs]), tiny_clip())
    assert same(samples[[0, 4]], PairDataset(dataset, "train", pairs, tiny_clip())[[0, 4]])


def test_counts_of_what_is_not_visible(make_scenes, tiny_clip, caplog):
    dataset, pairs = make_scenes()
    dataset.records.loc[dataset.records["image_id"] == "image1", "long_caption"] = ""
    pairs.loc[4, ["x1", "x2"]] = [0.0, 2.0]  # left of the centre crop
    samples = PairDataset(dataset, "train", pairs, tiny_clip(context_length=12))
    assert samples.counts == {
        "samples": 11,
        "without_long_caption": 1,
        "truncated_captions": 11,
        "pairs": 11,
        "without_pair": 0,
        "without_visible_box": 1,
        "without_visible_span": samples.counts["without_visible_span"],
        "truncated_sentences": 0,
    }
    batch = samples[[3]]  # image4: image1 is left out
    assert batch.boxes.tolist() == [[0, 0, 0, 0]]
    assert "1 of 12 images have no long caption" in caplog.text
    hidden = PairDataset(dataset, "train", pairs, tiny_clip(context_length=8))
    assert hidden.counts["without_visible_span"] == 11 and hidden[[0]].spans.tolist() == [[0, 0]]


def test_stale_pairs_are_refused(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    pairs.loc[6, "char_start"] += 1
    with pytest.raises(DataError, match=r"image6.*Run `fast-goal flism` again"):
        PairDataset(dataset, "train", pairs, tiny_clip())


def test_split_without_long_captions(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    with pytest.raises(DataError, match="'val'"):
        PairDataset(dataset, "val", pairs, tiny_clip())


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_without_a_traceback(make_scenes, tiny_clip, workers):
    dataset, pairs = make_scenes()
    dataset.path("images/7.png").write_bytes(b"")
    loader = Loader(PairDataset(dataset, "train", pairs, tiny_clip()), 12, seed=0, workers=workers)
    with pytest.raises(DataError, match=r"7\.png") as caught:
        list(loader.epoch(0))
    assert "Traceback" not in str(caught.value)
    running = multiprocessing.active_children()
    assert len(running) == workers
    loader.close()  # the error, still held here, holds the batches; this process would wait for the workers at its end
    assert not any(worker.is_alive() for worker in running)


def test_image_of_another_size_than_recorded(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    Image.fromarray(np.zeros((9, 11, 3), np.uint8)).save(dataset.path("images/2.png"))
    loader = Loader(PairDataset(dataset, "train", pairs, tiny_clip()), 12, seed=0)
    with pytest.raises(DataError, match=r"2\.png is 11 x 9 pixels, but the records say 62 x 40"):
        next(loader.epoch(0))


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, start=0):
        sampler = EpochBatches(10, 3, seed)
        sampler.start(epoch, start)
        found = list(sampler)
        assert len(found) == len(sampler)
        return found

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1) != order(1, 0)
    assert order(0, 3, start=2) == order(0, 3)[2:]
    assert order(0, 3, start=3) == []
    visited = [index for batch in order(0, 0) for index in batch]
    assert len(visited) == len(set(visited)) == 9  # the incomplete batch is dropped


def test_fewer_samples_than_a_batch_make_one_smaller_batch(caplog):
    sampler = EpochBatches(5, 64, 0)
    assert sampler.steps == 1 and sorted(next(iter(sampler))) == [0, 1, 2, 3, 4]
    assert "Only 5 samples for a batch of 64" in caplog.text


def test_workers_make_the_same_batches(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    samples = PairDataset(dataset, "train", pairs[:-1], tiny_clip())
    state = torch.get_rng_state()
    alone, together = Loader(samples, 4, seed=3), Loader(samples, 4, seed=3, workers=2)
    for epoch, start in [(0, 1), (1, 0)]:
        first, second = list(alone.epoch(epoch, start)), list(together.epoch(epoch, start))
        assert len(first) == len(second) == 3 - start
        assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_view_mode_reaches_images_and_boxes(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    clip = tiny_clip()
    clip.view_mode = "squash"
    squashed = PairDataset(dataset, "train", pairs, clip)[[0]]
    with Image.open(dataset.path("images/0.png")) as image:
        view = View(60, 40, 32, mode="squash")
        assert torch.equal(normalised(squashed.images[0], clip.mean, clip.std), view.apply(image))
    assert squashed.boxes[0].tolist() == pytest.approx(view.box((8, 5, 30, 25.5)), abs=1e-5)


def test_batch_moves_whole(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    batch = PairDataset(dataset, "train", pairs, tiny_clip())[[0, 1]]
    moved = batch.to(torch.device("meta"))
    assert {
        name for name, value in vars(moved).items() if isinstance(value, torch.Tensor) and value.device.type != "meta"
    } == set()
    assert sum(isinstance(value, torch.Tensor) for value in vars(moved).values()) == 11


def test_a_worker_ends_with_the_training_it_works_for():
    trainer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    code = f"from fast_goal.training.distributed import end_with; end_with({trainer.pid}, every=0.1)"
    worker = subprocess.Popen([sys.executable, "-c", code])
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(timeout=6)  # still there, imports included
    trainer.kill()
    trainer.wait()
    assert worker.wait(timeout=30) == 1


@pytest.mark.parametrize(("samples", "groups", "batch"), [(12, 6, 4), (30, 11, 5), (9, 9, 3), (20, 5, 4)])
def test_no_two_of_a_group_in_a_batch(samples, groups, batch):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        of = (torch.arange(samples) % groups).tolist()
        order = torch.randperm(samples, generator=generator).tolist()
        made = spread(order, of, batch)
        assert sorted(made) == list(range(samples))
        for part in range(0, samples - batch + 1, batch):
            assert len({of[i] for i in made[part : part + batch]}) == batch, (seed, made)
        if groups == samples:
            assert made == order


def test_more_of_a_group_than_batches_meet_at_the_end():
    assert spread([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2], 2) == [0, 4, 1, 5, 2, 3]


def test_more_copies_than_batches_are_reported(caplog):
    groups = [0, 0, 0, 1, 2, 3]
    EpochBatches(6, 2, 0, groups)
    assert caplog.text == ""
    EpochBatches(6, 3, 0, groups)
    assert "One picture has 3 samples, and an epoch 2 batches" in caplog.text


def test_copies_of_a_picture_do_not_meet(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    records = dataset.records.assign(content_hash=[f"{index % 4}" for index in range(len(dataset.records))])
    samples = PairDataset(dataclasses.replace(dataset, records=records), "train", pairs, tiny_clip())
    loader = Loader(samples, 4, seed=0)
    for step in range(3):
        ids = loader.image_ids(step)
        assert len({int(name.removeprefix("image")) % 4 for name in ids}) == 4


def test_the_last_two_of_a_group_are_parted():
    assert spread([0, 1, 2, 3], [0, 1, 2, 2], 2) in ([0, 3, 2, 1], [2, 1, 0, 3], [3, 1, 2, 0], [0, 2, 1, 3])
    assert sorted(spread([0, 1, 2, 3], [0, 0, 0, 1], 2)) == [0, 1, 2, 3]  # cannot be


def test_batches_of_similar_length():
    lengths = torch.randint(10, 248, (403,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [index // 2 for index in range(403)]
    for seed in range(5):
        chance, sampler = EpochBatches(403, 4, seed, groups), EpochBatches(403, 4, seed, groups, lengths)
        made = [sampler.at(0, step) for step in range(sampler.steps)]
        orders = [sampler, chance]
        longest = [sum(max(lengths[index] for index in order.at(0, step)) for step in range(100)) for order in orders]
        assert longest[0] < 0.8 * longest[1]
        assert longest[0] < 1.1 * sum(lengths) / 4 + 248  # close to no padding at all
        assert all(len({groups[index] for index in batch}) == 4 for batch in made)
        assert len({index for batch in made for index in batch}) == 400
        tops = [max(lengths[index] for index in batch) for batch in made]
        assert tops != sorted(tops) and tops[:50] != sorted(tops[:50])  # in random order
        sampler.start(0, 7)
        assert list(sampler) == made[7:]
        assert made != [sampler.at(1, step) for step in range(sampler.steps)]


def test_lengths_are_those_of_the_captions(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    dataset.records.loc[dataset.records["image_id"] == "image3", "long_caption"] += " And" * 60 + "."
    samples = PairDataset(dataset, "train", pairs, tiny_clip())
    assert samples.lengths[3] == 40 and all(length < 40 for length in samples.lengths[:3])
    loader = Loader(samples, 3, seed=0, length_groups=True)
    assert sorted(len(batch) for batch in loader.epoch(0)) == [3, 3, 3, 3]


def test_a_killed_worker_is_reported(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    loader = Loader(PairDataset(dataset, "train", pairs, tiny_clip()), 1, seed=0, workers=1)
    with pytest.raises(FastGoalError, match=r"ended .*finetune\.workers"):
        for _ in loader.epoch(0):
            for worker in loader._loader._iterator._workers:
                worker.kill()


def test_a_worker_killed_as_it_writes_is_reported(monkeypatch):
    """The read of what it did not finish never ends: here of a pipe that stays open and into which nobody writes."""
    monkeypatch.setattr(loader_module, "LOOK", 0.2)
    reading, writing = os.pipe()
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()

    class Batches:
        _workers = (worker,)

        def __next__(self) -> bytes:
            return os.read(reading, 1)

    following = loader_module._Following(Batches())
    os.write(writing, b"1")
    assert following() == b"1"
    worker.kill()
    with pytest.raises(RuntimeError, match="exited unexpectedly as it handed a batch over"):
        following()
    os.write(writing, b"2")  # lets the thread go
    worker.join()


def test_what_reads_ahead_ends_with_the_epoch():
    before = threading.active_count()
    following = loader_module._Following(TwoBatches())
    assert [following(), following(), following()] == [1, 2, None]
    del following
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


class TwoBatches:
    """Two batches of no worker."""

    _workers = ()

    def __init__(self):
        self._left = iter([1, 2])

    def __next__(self) -> int:
        return next(self._left)


@pytest.mark.gpu
def test_the_parts_of_a_pinned_batch_are_pinned(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    batch = PairDataset(dataset, "train", pairs, tiny_clip())[[0, 1, 2]]
    assert not any(part.images.is_pinned() for part in batch.split(2))
    for part in batch.pin_memory().split(2):
        assert all(value.is_pinned() for value in vars(part).values() if isinstance(value, torch.Tensor))
