"""A training step as the authors' earlier code computes it, with the correct geometry and spans, and every improvement on it.

It encodes images and texts twice, once for the pooled features and once for the tokens; pads captions and sentences to the
whole context; looks up patches and spans sample by sample, with a wait for the device at every number and four
tokenizations each; and updates with torch's default AdamW. Its anomaly detection and debug prints are left out. Here both
its mistakes (boxes squashed where the image is cropped, spans one token too far) are mended, so that its loss is ours.

Letters: B samples, each with one local pair; L token positions; N patches; W tower width; D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_goal.data.captions import tokenize
from fast_goal.data.images import normalised
from fast_goal.model.clip import Clip
from fast_goal.model.tokens import masked_mean, patch_mask, span_mask
from fast_goal.training.batches import Batch

SHORT_CONTEXT = 77  # positions of CLIP's own text context


@dataclass(frozen=True)
class Formulation:
    """What a step does and does not do. sentence_length, long_length: positions that texts are padded to; None: trimmed."""

    encodes: int = 2
    long_length: int | None = 248
    sentence_length: int | None = 248
    loops: bool = True
    fused: bool = False


def ladder(context_length: int) -> dict[str, Formulation]:
    """From the published formulation to one that does all that ours does, an improvement at a time."""
    steps = {"published": Formulation(long_length=context_length, sentence_length=context_length)}

    def further(name: str, **change: object) -> None:
        steps[name] = replace(list(steps.values())[-1], **change)

    further(f"sentences padded to {SHORT_CONTEXT}", sentence_length=SHORT_CONTEXT)
    further("each input encoded once", encodes=1)
    further("texts trimmed", long_length=None, sentence_length=None)
    further("patches and spans in one go", loops=False)
    further("fused AdamW", fused=True)
    return steps


@dataclass(frozen=True)
class Samples:
    """What the step is given: a Batch on the device, and the texts and image sizes that a published step looks into.

    Image i has exactly one pair, of which something is visible: row i of the local fields. sizes [B, 2]: width and height
    of the original images, on the device.
    """

    batch: Batch
    captions: list[str]
    sentences: list[str]
    sizes: Tensor


class SlowStep:
    """One update of `clip` by a formulation; the objective is L_global + 0.5 L_local + L_TSL.

    `tokenizer(text)` gives the ids of a text without start and end. `dtype` is that of autocast, None for none. After the
    call the gradients are still there.
    """

    def __init__(
        self,
        clip: Clip,
        formulation: Formulation,
        samples: Samples,
        tokenizer: Callable[[str], list[int]],
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
    ):
        self.clip, self.formulation, self.samples = clip, formulation, samples
        self.tokenizer, self.optimizer, self.dtype = tokenizer, optimizer, dtype
        batch = samples.batch
        # their data loader normalises and pads
        self._images = normalised(batch.images, clip.mean, clip.std)  # [2B, 3, S, S]
        self._long = _padded(samples.captions, clip, formulation.long_length, batch.caption_tokens)
        self._short = _padded(samples.sentences, clip, formulation.sentence_length, batch.sentence_tokens)

    def __call__(self) -> dict[str, Tensor]:
        """Every term without its weight, and their weighted sum `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        terms = self.terms()
        terms["loss"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in terms.items()}

    def terms(self) -> dict[str, Tensor]:
        """The terms and `loss`, with their graph."""
        clip, count = self.clip, len(self.samples.captions)
        with torch.autocast(self._images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            visual = clip(images=self._images)
            texts, text_tokens = self._texts()
            image_tokens = visual.image_tokens
            if self.formulation.encodes == 2:
                image_tokens = clip(images=self._images).image_tokens
                _, text_tokens = self._texts()
            pool = self._looped if self.formulation.loops else self._pooled
            pooled_image, pooled_text = pool(image_tokens[:count], text_tokens[:count])
            region, sentence = clip.project_image(pooled_image), clip.project_text(pooled_text)
        image, text = visual.image_features.float(), texts.float()  # each [2B, D], global then local
        scale = clip.logit_scale.float()
        terms = {
            "global": _contrast(image[:count], text[:count], scale),
            "local": _contrast(image[count:], text[count:], scale),
            "tsl_image": (1 - (region.float() * image[count:]).sum(-1)).square().mean(),
            "tsl_text": (1 - (sentence.float() * text[count:]).sum(-1)).square().mean(),
        }
        return {**terms, "loss": terms["global"] + 0.5 * terms["local"] + terms["tsl_image"] + terms["tsl_text"]}

    def _texts(self) -> tuple[Tensor, Tensor]:
        """Features [2B, D] of captions and sentences, and the captions' tokens [B or more, L, W]."""
        if self._long.shape[1] == self._short.shape[1]:
            both = self.clip(tokens=torch.cat([self._long, self._short]))
            return both.text_features, both.text_tokens
        long, short = self.clip(tokens=self._long), self.clip(tokens=self._short)
        return torch.cat([long.text_features, short.text_features]), long.text_tokens

    def _pooled(self, image_tokens: Tensor, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
        batch = self.samples.batch
        in_box = patch_mask(batch.boxes, self.clip.image_size, self.clip.patch_size)
        in_span = span_mask(batch.spans, text_tokens.shape[1])
        return masked_mean(image_tokens, in_box), masked_mean(text_tokens, in_span)

    def _looped(self, image_tokens: Tensor, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The means over boxes and spans [B, W], sample by sample."""
        clip, samples = self.clip, self.samples
        patch, grid = clip.patch_size, clip.image_size // clip.patch_size
        regions, spans = [], []
        for row, (caption, sentence) in enumerate(zip(samples.captions, samples.sentences, strict=True)):
            width, height = (int(samples.sizes[row, side].item()) for side in range(2))
            corners = tuple(samples.batch.regions[row, side].item() for side in range(4))
            x1, y1, x2, y2 = clip.view(width, height).box(corners)
            covered = [
                line * grid + column
                for line in range(int(y1 // patch), math.ceil(y2 / patch))
                for column in range(int(x1 // patch), math.ceil(x2 / patch))
            ]
            regions.append(image_tokens[row, torch.tensor(covered, device=image_tokens.device)].mean(0))
            start = caption.index(sentence)
            before, own = len(self.tokenizer(caption[:start])), len(self.tokenizer(sentence))
            whole, up_to = len(self.tokenizer(caption)), len(self.tokenizer(caption[: start + len(sentence)]))
            last = min(before + own, up_to, whole, clip.context_length - 2)
            spans.append(text_tokens[row, 1 + before : 1 + last].mean(0))
        return torch.stack(regions), torch.stack(spans)


def _contrast(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    logits = scale * left @ right.T  # [B, B]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _padded(texts: list[str], clip: Clip, length: int | None, trimmed: Tensor) -> Tensor:
    if length is None:
        return trimmed
    return tokenize(texts, min(length, clip.context_length))[0].to(trimmed.device)
