"""A contact sheet of scenes with their captions, to look at: `python -m fast_goal.data.sources.scenes PATH`."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fast_goal.data.sources.scenes.samples import Sample, make_samples
from fast_goal.files import atomic_path

IMAGE_SIZE = 192
MODEL_SIZE = 96  # what the demo's model sees
WIDTH, HEIGHT = 420, 430  # of one sample on the sheet


def write_sheet(path: Path | str, seed: int = 0, columns: int = 4, source: str = "scenes") -> None:
    """Writes a PNG: four test scenes with twins, four training scenes and eight of the split pretrain.

    Each is shown at 192 pixels and, beside that, as the model sees it, at 96, followed by its captions.
    """
    samples = [sample for index in range(4) for sample in make_samples(seed, "test", index, IMAGE_SIZE, source)]
    for split, count in (("train", 4), ("pretrain", 8)):
        samples += [sample for index in range(count) for sample in make_samples(seed, split, index, IMAGE_SIZE, source)]
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for place, sample in enumerate(samples):
        sheet.paste(_cell(sample), (place % columns * WIDTH, place // columns * HEIGHT))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def _cell(sample: Sample) -> Image.Image:
    cell = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    image = Image.open(io.BytesIO(sample.png))
    cell.paste(image, (8, 8))
    cell.paste(image.resize((MODEL_SIZE, MODEL_SIZE), Image.Resampling.BICUBIC), (16 + IMAGE_SIZE, 8))
    record = sample.record
    pen.text((16 + IMAGE_SIZE, 16 + MODEL_SIZE), record["image_id"], fill="black", font=font)
    texts = [f"short: {caption}" for caption in record["captions"]]
    texts += [record["long_caption"]] if record["long_caption"] else []
    lines = [line for text in texts for line in [*textwrap.wrap(text, 62), ""]]
    pen.multiline_text((8, 16 + IMAGE_SIZE), "\n".join(lines), fill="black", font=font, spacing=2)
    return cell
