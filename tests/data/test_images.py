"""Opening of photographs and other files, and the geometry that pixels and boxes share."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fast_goal.data.images import CLIP_MEAN, CLIP_STD, View, crop, image_size, open_image
from fast_goal.environment import prepare
from fast_goal.errors import DataError

RED = (220, 30, 30)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


class TestOpenImage:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "gif", "tiff"])
    def test_formats_become_rgb(self, tmp_path, suffix):
        path = saved(Image.new("RGB", (30, 20), RED), tmp_path / f"a.{suffix}")
        image = open_image(path)
        assert (image.mode, image.size) == ("RGB", (30, 20))
        assert np.abs(np.asarray(image).astype(int) - RED).max() < 12
        assert image_size(path) == (30, 20)

    def test_grayscale(self, tmp_path):
        image = open_image(saved(Image.new("L", (9, 7), 100), tmp_path / "a.png"))
        assert image.mode == "RGB" and image.getpixel((3, 3)) == (100, 100, 100)

    def test_one_bit(self, tmp_path):
        assert open_image(saved(Image.new("1", (9, 7), 1), tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (129, 1), (257 * 77, 77), (40000, 156), (65535, 255)])
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path, value, expected):
        array = np.full((5, 6), value, dtype=np.uint16)
        image = open_image(saved(Image.fromarray(array), tmp_path / "a.png"))
        assert image.getpixel((2, 2)) == (expected,) * 3

    def test_cmyk_jpeg(self, tmp_path):
        path = saved(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
        pixel = open_image(path).getpixel((16, 16))
        assert pixel[0] > 200 and max(pixel[1:]) < 60

    def test_transparency_lies_over_white(self, tmp_path):
        rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        rgba.putpixel((0, 0), (255, 0, 0, 255))
        rgba.putpixel((1, 0), (0, 0, 0, 51))
        image = open_image(saved(rgba, tmp_path / "rgba.png"))
        assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (204, 204, 204), (255, 255, 255)]

        grey = open_image(saved(Image.new("LA", (4, 4), (10, 0)), tmp_path / "la.png"))
        assert grey.getpixel((0, 0)) == (255, 255, 255)

        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 255, 255, 0, 0])
        palette.putpixel((0, 0), 0)
        image = open_image(saved(palette, tmp_path / "p.png", transparency=1))
        assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((0, 0, 255), (255, 255, 255))

    def test_first_picture_of_an_animation(self, tmp_path):
        first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), (0, 0, 255))
        path = tmp_path / "a.gif"
        first.save(path, save_all=True, append_images=[second])
        assert open_image(path).getpixel((1, 1))[0] > 200

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
    def test_exif_rotation(self, tmp_path, orientation, suffix):
        """Upright: a red mark in the left top corner of a 40 x 24 picture. Stored: turned as the EXIF standard says."""
        upright = np.full((24, 40, 3), 255, dtype=np.uint8)
        upright[:8, :16] = RED
        # the standard names where the stored row 0 and column 0 lie: (top, left), (top, right), ...
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: upright.transpose(1, 0, 2)[::-1],  # row 0 is the right side, so the picture has to be turned clockwise
            7: upright.transpose(1, 0, 2)[::-1, ::-1],
            8: upright.transpose(1, 0, 2)[:, ::-1],
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"quality": 95} if suffix in ("jpg", "webp") else {}
        path = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / f"a.{suffix}", exif=exif, **options)
        image = open_image(path)
        assert image.size == image_size(path) == (40, 24)
        pixels = np.asarray(image).astype(int)
        assert np.abs(pixels[1:6, 1:14] - RED).max() < 40
        assert pixels[12:, 20:].min() > 215
        cut = np.asarray(crop(image, (0, 0, 16, 8))).astype(int)
        assert cut.shape == (8, 16, 3) and np.abs(cut[1:6, 1:14] - RED).max() < 40

    def test_broken_exif_is_ignored(self, tmp_path):
        path = saved(Image.new("RGB", (8, 6), RED), tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
        assert open_image(path).size == image_size(path) == (8, 6)

    def test_unknown_orientation_is_ignored(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 99
        path = saved(Image.new("RGB", (8, 6), RED), tmp_path / "a.jpg", exif=exif)
        assert open_image(path).size == image_size(path) == (8, 6)


class TestUnusableFiles:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff"])
    @pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
    def test_truncated(self, tmp_path, suffix, kept):
        data = saved(photo(200, 160), tmp_path / f"whole.{suffix}").read_bytes()
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(DataError, match=r"cut\."):
            open_image(path)

    def test_missing(self, tmp_path):
        for function in (open_image, image_size):
            with pytest.raises(DataError, match=r"gone\.jpg.*does not exist"):
                function(tmp_path / "gone.jpg")

    def test_folder(self, tmp_path):
        with pytest.raises(DataError):
            open_image(tmp_path)

    def test_zero_bytes(self, tmp_path):
        path = tmp_path / "a.jpg"
        path.touch()
        for function in (open_image, image_size):
            with pytest.raises(DataError, match=r"a\.jpg.*empty"):
                function(path)

    @pytest.mark.parametrize(
        "content", [b"not an image, a text", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
    )
    def test_not_an_image(self, tmp_path, content):
        path = tmp_path / "a.jpg"
        path.write_bytes(content)
        for function in (open_image, image_size):
            with pytest.raises(DataError, match=r"a\.jpg.*not an image"):
                function(path)

    def test_decompression_bomb(self, tmp_path, monkeypatch):
        path = saved(Image.new("1", (300, 300)), tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        for function in (open_image, image_size):
            with pytest.raises(DataError, match=r"a\.png.*large"):
                function(path)

    def test_floating_point_pixels(self, tmp_path):
        path = saved(Image.fromarray(np.ones((4, 4), dtype=np.float32)), tmp_path / "a.tiff")
        with pytest.raises(DataError, match="floating-point"):
            open_image(path)

    def test_random_damage_is_an_image_or_a_data_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)  # damaged sizes must not fill the memory
        generator = random.Random(0)
        for suffix in ("jpg", "png", "webp", "gif", "tiff", "bmp"):
            data = saved(photo(40, 30), tmp_path / f"a.{suffix}").read_bytes()
            for _ in range(40):
                broken = bytearray(data)
                for _ in range(generator.randint(1, 12)):
                    broken[generator.randrange(len(broken) if generator.random() < 0.3 else 64)] = generator.randrange(256)
                path = tmp_path / f"b.{suffix}"
                path.write_bytes(broken)
                try:
                    assert open_image(path).mode == "RGB"
                except DataError as error:
                    assert f"b.{suffix}" in str(error)


SIZES = [
    (224, 224),
    (225, 224),
    (224, 225),
    (300, 200),
    (200, 300),
    (97, 1003),
    (1003, 97),
    (31, 33),
    (640, 427),
    (5, 3),
    (1, 1),
    (333, 500),
]


class TestView:
    @pytest.mark.parametrize("size", [224, 96, 33])
    @pytest.mark.parametrize(("mode", "theirs"), [("crop", "shortest"), ("squash", "squash"), ("pad", "longest")])
    def test_pixels_equal_open_clip(self, size, mode, theirs):
        prepare()
        from open_clip import image_transform

        reference = image_transform(size, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode=theirs)
        for number, (width, height) in enumerate(SIZES):
            image = photo(width, height, number)
            tensor = View(width, height, size, mode).apply(image)
            assert tensor.shape == (3, size, size) and tensor.dtype == torch.float32
            assert (tensor - reference(image)).abs().max() <= 1e-5, (width, height)

    def test_own_mean_and_std(self):
        image = Image.new("RGB", (8, 8), (51, 102, 255))
        tensor = View(8, 8, 8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0)).apply(image)
        assert torch.allclose(tensor[:, 0, 0], torch.tensor([-0.6, -0.4, 0.5]), atol=1e-6)

    @pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
    @pytest.mark.parametrize(
        ("width", "height"), [(300, 200), (200, 300), (101, 97), (640, 427), (90, 400), (400, 90), (50, 50)]
    )
    def test_box_follows_the_drawn_rectangle(self, mode, width, height):
        """Draws a rectangle, applies the view, finds the coloured pixels: the box of the view must enclose exactly those."""
        generator = random.Random(width * height)
        view = View(width, height, 96, mode)
        for _ in range(12):
            x1, y1 = generator.randrange(width - 20), generator.randrange(height - 20)
            x2, y2 = generator.randrange(x1 + 12, width + 1), generator.randrange(y1 + 12, height + 1)
            array = np.zeros((height, width, 3), dtype=np.uint8)
            array[y1:y2, x1:x2] = 255
            seen = np.asarray(view.pixels(Image.fromarray(array)))[..., 0] > 127
            box = view.box((x1, y1, x2, y2))
            assert view.boxes(np.array([[x1, y1, x2, y2]] * 2)).tolist() == [list(box)] * 2
            if not seen.any():
                assert min(box[2] - box[0], box[3] - box[1]) <= 1.0
                continue
            rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert np.allclose(box, found, atol=0.75), (box, found)

    def test_crop_geometry_by_hand(self):
        view = View(400, 200, 100)  # resized to 200 x 100, 50 cut off on the left
        assert view.box((100, 0, 300, 200)) == (0, 0, 100, 100)
        assert view.box((150, 20, 200, 60)) == (25, 10, 50, 30)
        assert view.box((0, 0, 120, 200)) == (0, 0, 10, 100)
        assert view.box((0, 0, 100, 200)) == (0, 0, 0, 0)
        assert view.box((-50, -50, 1000, 1000)) == (0, 0, 100, 100)

    def test_squash_and_pad_geometry_by_hand(self):
        assert View(400, 200, 100, "squash").box((100, 50, 200, 100)) == (25, 25, 50, 50)
        assert View(400, 200, 100, "pad").box((0, 0, 400, 200)) == (0, 25, 100, 75)
        assert View(200, 400, 100, "pad").box((-20, 100, 100, 999)) == (25, 25, 50, 100)

    def test_rounding_is_torchvisions(self):
        view = View(333, 500, 224)
        assert view.resized == (224, int(224 * 500 / 333)) and view.offset == (0, 56)
        assert View(225, 224, 224).offset == (0, 0)  # (225 - 224) / 2 rounds to the even 0
        assert View(227, 224, 224).offset == (2, 0)  # 1.5 rounds to the even 2

    def test_degenerate_boxes(self):
        view = View(100, 100, 50)
        boxes = np.array([[10, 10, 10, 20], [30, 30, 20, 40], [np.nan, 0, 10, 10], [200, 200, 300, 300]])
        assert (view.boxes(boxes) == 0).all()
        assert view.boxes(np.zeros((0, 4))).shape == (0, 4)

    def test_strips_need_no_huge_picture(self):
        for width, height in ((3, 30_000), (30_000, 3)):
            image = photo(width, height)
            assert View(width, height, 64).apply(image).shape == (3, 64, 64)
        # where both ways are possible they agree to one grey level
        image = photo(40, 40 * 17)
        view = View(40, 680, 32)
        whole = image.resize(view.resized, Image.Resampling.BICUBIC)
        left, top = view.offset
        expected = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
        assert np.abs(np.asarray(view.pixels(image)).astype(int) - expected).max() <= 1

    def test_refuses(self):
        with pytest.raises(ValueError, match="mode"):
            View(10, 10, 5, "stretch")
        with pytest.raises(ValueError, match="at least 1"):
            View(0, 10, 5)
        with pytest.raises(ValueError, match="30 x 20"):
            View(30, 20, 5).apply(photo(20, 30))


class TestCrop:
    def test_rounds_outwards_and_clips(self):
        image = photo(20, 10)
        array = np.asarray(image)
        assert np.array_equal(np.asarray(crop(image, (2.3, 1.9, 5.1, 4.0))), array[1:4, 2:6])
        assert np.array_equal(np.asarray(crop(image, (-5, -5, 50, 50))), array)

    def test_at_least_one_pixel(self):
        image = photo(20, 10)
        for box in ((5, 5, 5, 5), (25, 12, 30, 15), (-9, -9, -3, -3), (19.9, 9.9, 20, 10)):
            assert crop(image, box).size == (1, 1)


def test_image_size_does_not_decode(tmp_path, monkeypatch):
    stream = io.BytesIO()
    photo(50, 40).save(stream, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(stream.getvalue()[:200])  # the header and a little more
    assert image_size(path) == (50, 40)
