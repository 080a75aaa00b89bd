"""The way over the GPU, on the CPU: with Pillow in the place of the GPU's decoder all else is the same code."""

import functools
import io

import numpy as np
import pytest
import torch
from photographs import dataset, photograph, photographs, views
from PIL import Image

from fast_goal.data.images import plain_jpeg
from fast_goal.errors import ConfigError, DataError
from fast_goal.training import gpu_decoding
from fast_goal.training import loader as loader_module
from fast_goal.training.batches import PairDataset
from fast_goal.training.gpu_decoding import GpuDecoder, check_gpu, encoded
from fast_goal.training.loader import Loader, ahead

CPU = torch.device("cpu")
ON_GPU = ["large.jpg", "odd.jpg", "small.jpg", "grey.jpg"]


def pillow(files, device):
    """Decodes as torchvision.io.decode_jpeg does, whose compiled part may be missing."""
    pictures = [Image.open(io.BytesIO(file.numpy().tobytes())).convert("RGB") for file in files]
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device) for picture in pictures]


def refusing(files, device):
    raise RuntimeError("image not supported\nfor some reason")


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("at_once", [1, 10**6, 10**9])  # bytes: one file, some, all of them
def test_views_are_nearly_those_of_the_cpu(tmp_path, monkeypatch, mode, at_once):
    monkeypatch.setattr(gpu_decoding, "AT_ONCE", at_once)
    paths = photographs(tmp_path)
    made = views(paths, mode=mode)
    order = np.array([6, 0, 7, 2, 1, 5, 3, 4])
    pairs = np.array([6, 0, 2, 1, 5, 3, 4])
    handed = encoded(made, order)
    on_gpu = [paths[index].name in ON_GPU for index in order]
    assert handed.on_gpu.tolist() == on_gpu
    found, expected = GpuDecoder(made, CPU, pillow)(handed), made.batch(order, pairs)
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    difference = (found.int() - expected.int()).abs().float()
    rows = dict(enumerate([*order, *pairs]))
    for row, index in rows.items():
        if on_gpu[order.tolist().index(index)]:
            assert difference[row].mean() < 0.5 and difference[row].max() <= 3, paths[index]
        else:
            assert difference[row].max() == 0, paths[index]


def test_which_files_are_plain(tmp_path):
    paths = photographs(tmp_path)
    plain = {path.name: plain_jpeg(path, path.read_bytes()) for path in paths}
    assert {name for name, size in plain.items() if size} == {*ON_GPU, "strip.jpg"}
    assert plain["odd.jpg"] == (333, 401)
    content = paths[0].read_bytes()
    assert plain_jpeg(paths[0], content[:-100]) is None
    assert plain_jpeg(paths[0], content + b"\0\0") == (640, 480)
    adobe = io.BytesIO()
    photograph(0, 64, 64).save(adobe, "JPEG", keep_rgb=True)
    assert plain_jpeg(paths[0], adobe.getvalue()) is None


def test_what_the_gpu_refuses_is_decoded_on_the_cpu(tmp_path, caplog):
    made = views(photographs(tmp_path))
    order, pairs = np.arange(4), np.arange(4)
    decoder = GpuDecoder(made, CPU, refusing)
    for _ in range(2):
        assert torch.equal(decoder(encoded(made, order)), made.batch(order, pairs))
    assert caplog.text.count("image not supported") == 1 and "for some reason" not in caplog.text

    def exhausted(files, device):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        GpuDecoder(made, CPU, exhausted)(encoded(made, order))


def test_the_others_stay_on_the_gpu(tmp_path, monkeypatch):
    made = views(photographs(tmp_path))
    order, pairs = np.arange(4), np.arange(4)
    expected = made.batch(order, pairs)
    odd = (tmp_path / "odd.jpg").stat().st_size

    def choosy(files, device):
        return refusing(files, device) if odd in map(len, files) else pillow(files, device)

    handed, on_cpu, of = encoded(made, order), [], made.of
    monkeypatch.setattr(made, "of", lambda index, content: on_cpu.append(index) or of(index, content))
    found = GpuDecoder(made, CPU, choosy)(handed)
    assert on_cpu == [1] and (found.int() - expected.int()).abs().max() <= 3


def test_a_damaged_or_changed_image_is_named(tmp_path):
    paths = photographs(tmp_path)
    made = views(paths)
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"large\.jpg: the image is truncated"):
        encoded(made, np.array([0]))
    photograph(0, 64, 48).save(paths[1])
    with pytest.raises(DataError, match=r"odd\.jpg is 64 x 48 pixels, but the records say 333 x 401"):
        encoded(made, np.array([1]))


@pytest.fixture
def small_gpu(monkeypatch):
    monkeypatch.setattr(loader_module, "GpuDecoder", functools.partial(GpuDecoder, decode=pillow))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_the_gpu(tmp_path, tiny_clip, small_gpu, workers):
    photos, pairs = dataset(tmp_path)
    pairs = pairs.drop(1)
    plain = Loader(PairDataset(photos, "train", pairs, tiny_clip()), 4, seed=2)
    samples = PairDataset(photos, "train", pairs, tiny_clip(), gpu=CPU)
    loader = Loader(samples, 4, seed=2, workers=workers)
    for epoch, start in [(0, 0), (1, 1)]:
        found, expected = list(loader.epoch(epoch, start)), list(plain.epoch(epoch, start))
        assert len(found) == len(expected) == 2 - start
        for one, other in zip(found, expected, strict=True):
            assert (one.images.int() - other.images.int()).abs().max() <= 3
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.local_rows, other.local_rows)
            parts = one.split(2)
            assert torch.equal(torch.cat([part.boxes for part in parts]), one.boxes)
            assert sum(len(part.images) for part in parts) == len(one.images)


def test_a_damaged_image_ends_the_training(tmp_path, tiny_clip, small_gpu):
    photos, pairs = dataset(tmp_path)
    samples = PairDataset(photos, "train", pairs, tiny_clip(), gpu=CPU)
    photos.path("images/odd.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"odd\.jpg: the file is empty"):
        list(Loader(samples, 8, seed=0).epoch(0))


def test_a_device_that_cannot_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"intermediate\.training\.decode = 'gpu' needs a CUDA device.*'cpu'"):
        check_gpu(CPU, "intermediate.training")
    monkeypatch.setattr(gpu_decoding, "torchvision_decode", refusing)
    with pytest.raises(ConfigError, match=r"finetune\.decode = 'gpu': .*\(image not supported\)"):
        check_gpu(torch.device("cuda"), "finetune")


def test_results_come_in_order_one_ahead():
    begun = []

    def function(number):
        begun.append(number)
        if number == 3:
            raise DataError("three")
        return -number

    found = ahead(iter(range(5)), function)
    assert next(found) == 0
    assert [next(found), next(found)] == [-1, -2] and set(begun) >= {0, 1, 2}
    with pytest.raises(DataError, match="three"):
        next(found)
    assert list(ahead([], function)) == [] and list(ahead([7], function)) == [-7]


@pytest.mark.gpu
def test_the_gpu_decodes_nearly_as_the_cpu(tmp_path, tiny_clip):
    gpu = torch.device("cuda", torch.cuda.current_device())
    check_gpu(gpu, "finetune")
    photos, pairs = dataset(tmp_path)
    plain = Loader(PairDataset(photos, "train", pairs, tiny_clip()), 4, seed=2)
    loader = Loader(PairDataset(photos, "train", pairs, tiny_clip(), gpu=gpu), 4, seed=2, workers=1, pin_memory=True)
    for found, expected in zip(loader.epoch(0), plain.epoch(0), strict=True):
        assert found.images.device == gpu and not found.boxes.is_cuda
        difference = (found.to(gpu).images.cpu().int() - expected.images.int()).abs().float()
        assert difference.mean() < 2 and difference.mean(dim=(1, 2, 3)).max() < 6  # colours are upsampled in another way
