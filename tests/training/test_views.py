import numpy as np
import pytest
import torch
from photographs import photograph, photographs, views
from PIL import Image

from fast_goal.data.images import CLIP_MEAN, CLIP_STD, View, crop, image_size, normalised, open_image
from fast_goal.errors import DataError
from fast_goal.training.views import Files, Views

IN_FULL = ("drawn.png", "rotated.jpg")  # the second has odd sides


def one(path, boxes, size=32, **options):
    """Views of one image."""
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return Views(Files([path]), np.array([image_size(path)]), View(1, 1, size), np.array([0, len(boxes)]), boxes, **options)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_a_batch_is_what_the_view_shows(tmp_path, mode):
    paths = photographs(tmp_path)
    made = views(paths, mode=mode)
    batch = made.batch(np.array([5, 0, 7]), np.array([5, 0]))  # the last image has no pair
    expected = []
    for path in (paths[5], paths[0], paths[7]):
        image = open_image(path)
        expected.append(View(*image.size, 32, mode).apply(image))
    for index in (5, 0):
        part = crop(open_image(paths[index]), made.crops[index])
        expected.append(View(*part.size, 32, mode).apply(part))
    assert batch.dtype == torch.uint8
    assert torch.equal(normalised(batch, CLIP_MEAN, CLIP_STD), torch.stack(expected))


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_scaled_decoding_shows_nearly_the_same(tmp_path, mode):
    paths = photographs(tmp_path)
    full, scaled = views(paths, mode=mode), views(paths, mode=mode, scaled=True)
    indices, pairs = np.arange(len(paths)), np.arange(len(paths) - 1)
    difference = (full.batch(indices, pairs).int() - scaled.batch(indices, pairs).int()).abs().float()
    of_sample = np.append(indices, pairs)
    for row, index in enumerate(of_sample.tolist()):
        name = paths[index].name
        if scaled.scale(index) == 1 or name in IN_FULL:
            assert difference[row].max() == 0, name
        else:
            assert difference[row].mean() < 2 and difference[row].max() > 0, name
    assert [scaled.scale(index) for index in (0, 2)] == [8, 1]


def test_no_view_is_enlarged_because_of_the_scale(tmp_path):
    path = tmp_path / "large.jpg"
    photograph(0, 900, 700).save(path)
    for box, expected in [
        ((0, 0, 900, 700), 8),
        ((100.5, 100.5, 360.5, 360.5), 8),  # 261 pixels: 32.6 at 1/8
        ((100, 100, 355, 400), 4),  # 255 pixels
        ((100, 100, 200, 170), 2),
        ((100, 100, 163, 200), 1),
        ((100, 100, 110, 110), 1),  # is enlarged anyway
    ]:
        made = one(path, [box], scaled=True)
        assert made.scale(0) == expected, box
        if expected > 1:
            opened = open_image(path, scale=expected)
            assert opened.size == (-(-900 // expected), -(-700 // expected))
            for part in made.boxes(0).tolist():
                resized = made.view(part).resized
                assert (part[2] - part[0]) / expected >= resized[0] and (part[3] - part[1]) / expected >= resized[1]


def test_a_scaled_crop_shows_its_region_only_and_in_place(tmp_path):
    pixels = np.zeros((640, 960, 3), np.uint8)
    pixels[203:517, 311:733] = 255  # white, black around it
    Image.fromarray(pixels).save(tmp_path / "box.jpg", quality=95)
    made = one(tmp_path / "box.jpg", [(311, 203, 733, 517), (311 - 211, 203, 311 + 211, 517)], scaled=True)
    assert made.scale(0) == 8
    _, inside, half = made.batch(np.array([0]), np.array([0, 1])).float()
    # but for the border, where a scaled pixel covers some of both
    assert inside[:, 2:-2, 2:-2].min() > 245 and inside.mean() > 240
    assert half[:, 2:-2, :14].max() < 15 and half[:, 2:-2, 18:].min() > 240


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_of_a_rotated_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(4, 512, 320).save(tmp_path / "rotated.jpg", exif=exif)
    whole = (0, 0, 999, 999)
    found, expected = (
        one(tmp_path / "rotated.jpg", [whole], scaled=scaled).batch(np.array([0]), np.array([0])) for scaled in (True, False)
    )
    difference = (found.int() - expected.int()).abs().float()
    assert 0 < difference.mean() < 1


def test_scaled_decoding_of_a_changed_image(tmp_path):
    paths = photographs(tmp_path)
    made = views(paths, scaled=True)
    photograph(9, 700, 480).save(paths[0])
    with pytest.raises(DataError, match=r"large\.jpg is 88 x 60 pixels at 1/8, but the records say 640 x 480"):
        made.batch(np.array([0]), np.array([0]))


def test_a_file_that_is_gone(tmp_path):
    paths = photographs(tmp_path)
    made = views(paths)
    paths[1].unlink()
    with pytest.raises(DataError, match=r"odd\.jpg: the image file does not exist"):
        made.batch(np.array([1]), np.array([1]))
