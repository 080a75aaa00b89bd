import errno
import math
import os
import signal

import numpy as np
import pytest
import torch
from killing import killed_after
from PIL import Image

from fast_goal.data.captions import tokenize
from fast_goal.data.images import View
from fast_goal.errors import DataError, FastGoalError
from fast_goal.training import pretraining
from fast_goal.training.pretraining import CaptionSamples, train_scratch

CPU = torch.device("cpu")


def train(clip, dataset, config, path, **more):
    return train_scratch(
        clip, dataset, config, **({"seed": 1, "device": CPU, "state_path": path / "base.pt", "state_key": "key"} | more)
    )


def test_loss_falls_on_a_dozen_images(make_scenes, tiny_clip, make_scratch_config, tmp_path):
    dataset, _ = make_scenes()
    records = []
    config = make_scratch_config(steps=100, batch_size=12)
    clip = tiny_clip(77)
    summary = train(clip, dataset, config, tmp_path, on_step=lambda step, record: records.append(record))
    assert [record["step"] for record in records] == [25, 50, 75, 100]
    assert summary["loss"] == records[-1]["loss"] < 0.6 * math.log(12)
    assert summary["accuracy"] > 0.6 and summary["images"] == 12 and summary["batch_size"] == 12
    assert not clip.training


def test_logit_scale_is_clamped(make_scenes, tiny_clip, make_scratch_config, tmp_path):
    dataset, _ = make_scenes()
    clip = tiny_clip(77)
    with torch.no_grad():
        clip.model.logit_scale.fill_(7.0)
    train(clip, dataset, make_scratch_config(steps=2, learning_rate=1e-6), tmp_path)
    assert clip.logit_scale.item() == pytest.approx(100, abs=1e-3)


def test_an_epoch_visits_every_image_once_with_one_of_its_captions(make_scenes, tiny_clip):
    dataset, _ = make_scenes()
    samples = CaptionSamples(dataset, "pretrain", tiny_clip(77))
    drawn = []
    for epoch in range(20):
        order, captions = samples.visits(0, epoch)
        assert sorted(order.tolist()) == list(range(12))
        assert all(caption in (2 * image, 2 * image + 1) for image, caption in enumerate(captions.tolist()))
        drawn.append(captions.tolist())
    assert {caption for captions in drawn for caption in captions} == set(range(24))
    again = samples.visits(0, 3)
    assert again[1].tolist() == drawn[3] and samples.visits(1, 3)[1].tolist() != drawn[3]


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_samples_are_the_images_and_captions(make_scenes, tiny_clip, cache_bytes):
    dataset, _ = make_scenes()
    clip = tiny_clip(77)
    samples = CaptionSamples(dataset, "pretrain", clip, cache_bytes)
    rows = torch.tensor([4, 0])
    pixels = samples.images(rows)
    assert pixels.dtype == torch.uint8
    for row, index in enumerate(rows):
        with Image.open(dataset.path(f"images/{index}.png")) as image:
            expected = np.array(View(image.width, image.height, 32).pixels(image))
        assert torch.equal(pixels[row], torch.from_numpy(expected).permute(2, 0, 1))
    tokens = samples.tokens(torch.tensor([9, 0]))
    texts = ["one purple rectangle", "a red box"]
    assert torch.equal(tokens, tokenize(texts, 77)[0][:, : tokens.shape[1]]) and tokens.shape[1] == 6  # purple is two tokens


def test_pixels_are_normalised_as_the_model_expects(make_scenes, tiny_clip, make_scratch_config, tmp_path, monkeypatch):
    dataset, _ = make_scenes(count=2)
    seen = []

    def spy(clip, images, *rest):
        seen.append(images)
        return step(clip, images, *rest)

    step = pretraining._train_step
    monkeypatch.setattr(pretraining, "_train_step", spy)
    train(tiny_clip(77), dataset, make_scratch_config(steps=1), tmp_path)
    expected = []
    for index in range(2):
        with Image.open(dataset.path(f"images/{index}.png")) as image:
            expected.append(View(image.width, image.height, 32).apply(image))
    order = CaptionSamples(dataset, "pretrain", tiny_clip(77)).visits(1, 0)[0]
    torch.testing.assert_close(seen[0], torch.stack(expected)[order])


def test_resume_is_bit_identical(make_scenes, tiny_clip, make_scratch_config, tmp_path, monkeypatch):
    dataset, _ = make_scenes()
    config = make_scratch_config(steps=30)
    monkeypatch.setattr(pretraining, "SAVE_EVERY", 7)
    whole, whole_records = tiny_clip(77), []
    (tmp_path / "whole").mkdir()
    train(whole, dataset, config, tmp_path / "whole", on_step=lambda step, record: whole_records.append((step, record["loss"])))
    with killed_after(pretraining, 28):
        train(tiny_clip(77), dataset, config, tmp_path)
    continued, records = tiny_clip(77, seed=3), []
    summary = train(continued, dataset, config, tmp_path, on_step=lambda step, record: records.append((step, record["loss"])))
    assert summary["resumed_at_step"] == 28 and records == whole_records
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_a_termination_leaves_a_state_that_is_continued(make_scenes, tiny_clip, make_scratch_config, tmp_path):
    dataset, _ = make_scenes()
    config = make_scratch_config(steps=60)
    (tmp_path / "whole").mkdir()
    whole = tiny_clip(77)
    train(whole, dataset, config, tmp_path / "whole")

    def stop(step, record):
        if step == 25:  # the first record
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(tiny_clip(77), dataset, config, tmp_path, on_step=stop)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    continued = tiny_clip(77, seed=3)
    assert train(continued, dataset, config, tmp_path)["resumed_at_step"] == 25
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


def test_a_large_model_is_saved_more_rarely(make_scenes, tiny_clip, make_scratch_config, tmp_path, monkeypatch):
    dataset, _ = make_scenes()
    saved = []
    monkeypatch.setattr(pretraining, "SAVE_EVERY", 3)
    monkeypatch.setattr(pretraining, "save_state", lambda *arguments: saved.append(arguments[4]["step"]))
    train(tiny_clip(77), dataset, make_scratch_config(steps=13), tmp_path)
    clip = tiny_clip(77)
    monkeypatch.setattr(pretraining, "LARGE", sum(parameter.numel() for parameter in clip.parameters()) // 2)
    train(clip, dataset, make_scratch_config(steps=13), tmp_path)
    assert saved == [3, 6, 9, 12, 13, 6, 12, 13]


def test_pixels_of_a_large_split_are_kept_in_a_file(make_scenes, tiny_clip, make_scratch_config, tmp_path, monkeypatch):
    dataset, _ = make_scenes()
    config = make_scratch_config(steps=7)
    (tmp_path / "memory").mkdir()
    whole = tiny_clip(77)
    train(whole, dataset, config, tmp_path / "memory")
    init = CaptionSamples.__init__
    monkeypatch.setattr(CaptionSamples, "__init__", lambda *given, folder: init(*given, cache_bytes=0, folder=folder))
    decoded, decode = [], CaptionSamples._decode
    monkeypatch.setattr(CaptionSamples, "_decode", lambda samples, row: decoded.append(row) or decode(samples, row))
    for expected in ([*range(12)], []):  # a second run decodes nothing
        clip = tiny_clip(77)
        (tmp_path / f"file{len(expected)}").mkdir()
        train(clip, dataset, config, tmp_path / f"file{len(expected)}", pixels_folder=tmp_path / "pixels")
        assert sorted(decoded) == expected
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in clip.state_dict().items())
        decoded.clear()
    (file,) = (tmp_path / "pixels").iterdir()
    spoilt = bytearray(file.read_bytes())
    spoilt[-100] ^= 255  # of the last image
    file.write_bytes(spoilt)
    samples = CaptionSamples(dataset, "pretrain", clip, folder=tmp_path / "pixels")
    fresh = decode(samples, 11)
    assert torch.equal(samples.images(torch.tensor([3, 11]))[1], fresh) and decoded == [11]


def test_no_room_for_the_pixels(make_scenes, tiny_clip, tmp_path, monkeypatch):
    dataset, _ = make_scenes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"no room for 12 decoded images, 0\.0 GB \(No space left"):
        CaptionSamples(dataset, "pretrain", tiny_clip(77), 0, tmp_path / "pixels")


def test_half_precision_computes_nearly_the_same(make_scenes, tiny_clip, make_scratch_config, tmp_path, monkeypatch):
    dataset, _ = make_scenes()
    losses = []
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(pretraining, "autocast_dtype", lambda *arguments, dtype=dtype: dtype)
        (tmp_path / str(dtype)).mkdir()
        clip = tiny_clip(77)
        summary = train(clip, dataset, make_scratch_config(steps=2), tmp_path / str(dtype))
        assert all(parameter.dtype == torch.float32 for parameter in clip.parameters())
        losses.append(summary["loss"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.gpu
def test_on_a_gpu_the_pixels_lie_there_and_a_state_is_continued(make_scenes, tiny_clip, make_scratch_config, tmp_path):
    dataset, _ = make_scenes()
    gpu = torch.device("cuda")
    samples = CaptionSamples(dataset, "pretrain", tiny_clip(77), 0, tmp_path / "pixels")
    samples.move(gpu)
    rows = torch.tensor([4, 0])
    expected = CaptionSamples(dataset, "pretrain", tiny_clip(77)).images(rows)
    assert samples.images(rows).device.type == "cuda" and torch.equal(samples.images(rows).cpu(), expected)
    with killed_after(pretraining, 20), pytest.MonkeyPatch.context() as patched:
        patched.setattr(pretraining, "SAVE_EVERY", 10)
        train(tiny_clip(77), dataset, make_scratch_config(steps=30), tmp_path, device=gpu)
    summary = train(tiny_clip(77), dataset, make_scratch_config(steps=30), tmp_path, device=gpu)
    assert summary["resumed_at_step"] == 20 and math.isfinite(summary["loss"])


def test_images_without_captions_are_left_out_and_counted(make_scenes, tiny_clip, make_scratch_config, tmp_path, caplog):
    dataset, _ = make_scenes(count=5)
    captions = dataset.records["captions"].tolist()
    captions[6], captions[8] = [], ["", "  ", "only this"]
    dataset.records["captions"] = captions
    summary = train(tiny_clip(77), dataset, make_scratch_config(steps=1), tmp_path)
    assert summary["images"] == 4 and summary["without_caption"] == 1
    assert "1 of 5 images have no short caption" in caplog.text


def test_fewer_images_than_a_batch(make_scenes, tiny_clip, make_scratch_config, tmp_path, caplog):
    dataset, _ = make_scenes(count=3)
    assert train(tiny_clip(77), dataset, make_scratch_config(steps=2, batch_size=96), tmp_path)["batch_size"] == 3
    assert "Only 3 images for a batch of 96" in caplog.text


def test_split_without_captions_names_the_way_out(make_scenes, tiny_clip, make_scratch_config, tmp_path):
    dataset, _ = make_scenes()
    with pytest.raises(DataError, match=r"'val'.*base\.scratch\.split"):
        train(tiny_clip(77), dataset, make_scratch_config(split="val"), tmp_path)


def test_unreadable_image_is_named(make_scenes, tiny_clip, make_scratch_config, tmp_path):
    dataset, _ = make_scenes()
    dataset.path("images/3.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"3\.png"):
        train(tiny_clip(77), dataset, make_scratch_config(), tmp_path)


def test_loss_that_is_not_finite_stops(make_scenes, tiny_clip, make_scratch_config, tmp_path):
    dataset, _ = make_scenes()
    clip = tiny_clip(77)
    with torch.no_grad():
        clip.model.text_projection[0, 0] = float("inf")
    with pytest.raises(FastGoalError, match=r"not finite at step 1: .*base\.scratch\.learning_rate"):
        train(clip, dataset, make_scratch_config(), tmp_path)
