"""A project after `finetune`, in a folder of its own: coloured squares, two tiny untrained models, FLISM pairs."""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from fast_goal.config import Params, ScratchConfig, build
from fast_goal.configure import compose
from fast_goal.data.records import PAIRS, write_dataset, write_table
from fast_goal.files import write_json
from fast_goal.model.clip import Clip, build_scratch

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 210, 50),
    "white": (245, 245, 245),
}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
SIDE = 96  # pixels


def tiny_clip(seed: int, context_length: int = 248) -> Clip:
    sizes = {"image_size": 64, "patch_size": 16, "embed_dim": 16, "vision_width": 32, "vision_layers": 1, "text_width": 32}
    rest = {"text_layers": 1, "head_width": 16, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.0}
    config = build(ScratchConfig, {"split": "train", **sizes, **rest, "warmup_steps": 0}, "scratch")
    return build_scratch(config, context_length, seed)


def write_scenes(
    name: str,
    count: int = 12,
    truth: bool = True,
    folder: Path = Path("data/records"),
    choices: bool = False,
    masks: bool = False,
) -> None:
    """Images of two squares; the caption of every third one is longer than 77 tokens, every fourth has no short caption.

    choices: of captions with the colours or the places swapped, and the colours of the squares as classes. masks: of the
    colours.
    """
    generator = np.random.default_rng(0)
    root = Path("data/datasets") / name
    root.mkdir(parents=True)
    rows, boxes, asked, labels, segmented = [], [], [], [], []
    for index in range(count):
        colours = generator.permutation(list(COLOURS))[:2].tolist()
        places = generator.permutation(list(PLACES))[:2].tolist()
        pixels = np.full((SIDE, SIDE, 3), 120, np.uint8)
        numbers = np.full((SIDE, SIDE), 255, np.uint8)
        caption, image_id = "Two squares on grey.", f"{name}-{index:03d}"
        for sentence, (colour, place) in enumerate(zip(colours, places, strict=True), start=1):
            x, y = (PLACES[place][0] * 48 + 8, PLACES[place][1] * 48 + 8)
            pixels[y : y + 32, x : x + 32] = COLOURS[colour]
            numbers[y : y + 32, x : x + 32] = list(COLOURS).index(colour)
            text = f"A {colour} square is in the {place} corner" + (", far from the others" * 8 if index % 3 == 0 else "") + "."
            start = len(caption) + 1
            caption = f"{caption} {text}"
            box = {"x1": float(x), "y1": float(y), "x2": x + 32.0, "y2": y + 32.0}
            labels.append({"image_id": image_id, **box, "suite": "scenes_colours", "label": colour})
            boxes.append(
                {"image_id": image_id, "sentence_index": sentence, "char_start": start, "char_end": len(caption), **box}
            )
        whole = {"image_id": image_id, "x1": 0.0, "y1": 0.0, "x2": float(SIDE), "y2": float(SIDE), "suite": "scenes_sentences"}
        said = "A {} square {}, a {} square {}."
        own = said.format(colours[0], places[0], colours[1], places[1])
        colours_swapped = said.format(colours[1], places[0], colours[0], places[1])
        asked.append({**whole, "group": "swap_colours", "caption": own, "foils": [colours_swapped]})
        asked.append({**whole, "group": "tie", "caption": own, "foils": [colours_swapped, own]})
        Image.fromarray(pixels).save(root / f"{index}.png")
        if masks:
            path = root / f"mask-{index}.png"
            Image.fromarray(numbers).save(path)
            found = {"mask_path": path.name, "content_hash": hashlib.sha256(path.read_bytes()).hexdigest()}
            segmented.append({"image_id": image_id, "suite": "square_colours", **found})
        rows.append(
            {
                "image_id": image_id,
                "image_path": f"{index}.png",
                "width": SIDE,
                "height": SIDE,
                "split": "test",
                "long_caption": caption,
                "captions": [] if index % 4 == 3 else [f"A {colour} square." for colour in colours],
                "source": "squares",
                "content_hash": hashlib.sha256((root / f"{index}.png").read_bytes()).hexdigest(),
            }
        )
    known = [{**box, "label": "square"} for box in boxes] if truth else None
    classes = {"scenes_colours": {"names": list(COLOURS), "templates": ["A {} square.", "Something {}."]}}
    more = {"choices": asked, "labels": labels, "classes": classes} if choices else {}
    if masks:
        segments = {**classes["scenes_colours"], "values": list(range(len(COLOURS))), "ignored": [255]}
        more |= {"masks": segmented, "segments": {"square_colours": segments}}
    write_dataset(name, root, rows, [], truth=known, source="squares", folder=folder, **more)
    captions = {row["image_id"]: row["long_caption"] for row in rows}
    pairs = [
        {
            **box,
            "rank": box["sentence_index"],
            "sentence": captions[box["image_id"]][box["char_start"] : box["char_end"]],
            "region_index": 0,
            "kind": "detector",
            "similarity": 0.3,
            "weight": 1.0,
        }
        for box in boxes
    ]
    write_table(Path("data/flism") / name / "pairs.parquet", pairs, PAIRS)


def write_models(view: str = "crop", heads: int | None = None) -> None:
    """Writes both models; `view` is how the fine-tuned one sees images, `heads` those of its pooling, None: it has none."""
    tiny_clip(0).save(Path("models/base/clip"), {"step": "base"})
    tuned = tiny_clip(1)
    tuned.view_mode = view
    if heads is not None:
        tuned.add_pooling(heads)
    tuned.save(Path("models/finetune"), {"step": "finetune"})
    history = [
        {"step": step, "epoch": 1 + step // 6, "loss": 5 / step, "global": 3 / step, "tsl_image": 1 / step}
        for step in range(1, 11)
    ]
    history += [{"step": 5 * epoch, "epoch": epoch, "val_text_to_image_R@1": 20.0 * epoch} for epoch in (1, 2)]
    Path("models/finetune/history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    write_json("models/finetune/metrics.json", {"seconds": 75.2})
    write_json("data/flism/metrics.json", {"seconds": 3.0})


def params(*overrides: str) -> Params:
    small = [
        "evaluate.batch_size=5",
        "evaluate.bootstrap_samples=50",
        "evaluate.pictures=2",
        "evaluate.ks=[1,5,50]",
        "evaluate.patch_ks=[1,5]",
    ]
    return build(Params, compose([*small, *overrides]), "params.yaml")
