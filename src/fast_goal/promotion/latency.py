"""How long a model takes for one text and for one image, beside another model on the same machine at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fast_goal.data.captions import tokenize, trim
from fast_goal.data.images import open_image
from fast_goal.model.clip import Clip
from fast_goal.model.inference import arithmetic

WARM_UP = 3  # calls of each model that are not counted
SECONDS = 2.0  # a guess: for a kind of input, long enough for a median that holds still
PATIENCE = 10  # times as long, a guess, while the candidate seems too slow: what is slow by itself stays so
LEAST, MOST = 15, 4000  # rounds; a large model on a CPU gets the least


class Times(NamedTuple):
    """For one input: the median milliseconds of each model, and the candidate's fastest time as a multiple of the champion's.

    The fastest, because whatever else the machine does only adds to a time: on a busy one the medians of a model and its
    copy were seen 1.27 times apart.
    """

    candidate: float
    champion: float
    ratio: float


def latency(
    candidate: Clip,
    champion: Clip,
    text: str,
    image: Path,
    device: torch.device,
    precision: str,
    bound: float | None = None,
) -> dict[str, Times]:
    """How long both models take for one input, by kind.

    text: from its characters to its embedding in memory. image: from the file on disk to the same. The models take turns,
    and every other round the other one begins, so that a machine that is busy for a while is so for both of them. bound: of
    the ratio; while it is above, the measurement goes on, as more rounds can only bring both models closer to what they need.
    """
    for clip in (candidate, champion):
        clip.to(device).eval()

    def embed_text(clip: Clip) -> None:
        tokens, _ = tokenize([text], clip.context_length)
        clip.encode_text(trim(tokens).to(device)).float().cpu()  # the copy waits for a GPU to finish

    def embed_image(clip: Clip) -> None:
        opened = open_image(image)
        clip.encode_image(clip.view(*opened.size).apply(opened)[None].to(device)).float().cpu()

    with arithmetic(precision, device):
        return {
            kind: _times(candidate, champion, embed, bound) for kind, embed in (("text", embed_text), ("image", embed_image))
        }


def _times(candidate: Clip, champion: Clip, embed: Callable[[Clip], None], bound: float | None = None) -> Times:
    clips = (candidate, champion)
    for _ in range(WARM_UP):
        for clip in clips:
            embed(clip)
    times: tuple[list[float], list[float]] = ([], [])
    begin, order = time.perf_counter(), [0, 1]
    for done in range(MOST):
        seconds = time.perf_counter() - begin
        slow = done and bound is not None and min(times[0]) > bound * min(times[1])
        if done >= LEAST and seconds > (PATIENCE * SECONDS if slow else SECONDS):
            break
        for model in order:
            start = time.perf_counter()
            embed(clips[model])
            times[model].append(1000 * (time.perf_counter() - start))
        order.reverse()
    return Times(statistics.median(times[0]), statistics.median(times[1]), min(times[0]) / min(times[1]))
