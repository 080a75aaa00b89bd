"""One step of fine-tuning: from a batch to an update of the weights.

Every input that the objective looks at is encoded once: the global images and the local crops in one batch; the captions,
the sentences, the hard negatives and the sub-captions in one pass each, trimmed separately; and, where there is a teacher,
once more by it. With accumulation a batch goes through the towers in parts, and the loss is still that of the whole batch: the
features of all parts first, without a graph; the loss and its gradient with respect to them; then each part again, with a
graph, into which its share of that gradient is fed (Gao et al. 2021, "Scaling deep contrastive learning batch size under
memory limited setup"). It costs a second forward pass, but none of the teacher.

A text-conditioned pooling is a part of the loss: its parameters get their gradient as the loss's is computed.

Letters: B samples of a batch, P local pairs of them, N hard negatives of their captions, K sub-captions of each, M patches
of an image, D embedding width.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch.nn.parallel import DistributedDataParallel

from fast_goal.data.images import normalised
from fast_goal.errors import ConfigError
from fast_goal.model.clip import Clip
from fast_goal.model.tokens import masked_mean, patch_mask, span_mask
from fast_goal.objectives import Features, Objective, given
from fast_goal.training.batches import Batch
from fast_goal.training.distributed import Group, gathered, mean_gradients

_log = logging.getLogger(__name__)

# the features that may have gradients, of each tower; the first that is there at all has rows in every batch
TOWERS = {
    "image": ("image_global", "patches", "image_local", "region"),
    "text": ("text_global", "sub_queries", "text_local", "sentence", "text_negatives"),
    "both": ("scale",),
}
ENCODED = (*TOWERS["image"], *TOWERS["text"])
POOLED = ("region", "sentence")  # of them, from tokens
DRAWN = ("patches", "sub_queries")  # of them, where sub-captions are drawn
TEACHER = ("teacher_image", "teacher_text", "teacher_negatives")


class Encoder(torch.nn.Module):
    """`batch_features` as a module, which DistributedDataParallel can wrap."""

    def __init__(
        self,
        clip: Clip,
        dtype: torch.dtype | None = None,
        pooled: bool = True,
        negatives: bool = False,
        captions: bool = True,
    ):
        super().__init__()
        self.clip, self.dtype, self.pooled, self.negatives, self.captions = clip, dtype, pooled, negatives, captions

    def forward(self, batch: Batch) -> Features:
        """The features of the batch."""
        return batch_features(self.clip, batch, self.dtype, self.pooled, self.negatives, self.captions)


def fit_pooling(clip: Clip, objective: Objective, seed: int = 0) -> None:
    """Gives a model the text-conditioned pooling that the objective looks at: a fresh one, unless it has one already.

    Raises ConfigError where that one has other heads, or so many do not divide the embedding width.
    """
    if objective.heads is None:
        if clip.pooling is not None:
            _log.warning(
                "%s has a text-conditioned pooling, and the objective does not train it: it stays as it is while the towers "
                "change, and the modes conditioned and rerank get worse.",
                clip.name,
            )
        return
    if clip.pooling is None:
        clip.add_pooling(objective.heads, seed)
    elif clip.pooling.pooling.heads != objective.heads:
        raise ConfigError(
            f"objective: heads = {objective.heads}, but the pooling that {clip.name} begins with has "
            f"{clip.pooling.pooling.heads}. Set heads to that, or begin with weights without a pooling."
        )


class TrainStep:
    """One update of `clip`, called with the parts of a batch (`Batch.split`) on the device.

    `group`: the processes that share the batch; each calls its own step with its own share, and all get the same update.
    `max_logit_scale` holds the logit scale below it. `teacher` is there where the objective looks at one; whoever calls changes
    it after the step. A tower, the logit scale, or the pooling, that the objective does not look at stays as it is: it gets no
    gradient, and no weight decay acts on it. `clip` has the pooling that the objective looks at (`fit_pooling`).
    """

    def __init__(
        self,
        clip: Clip,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
        gradient_clip: float | None = None,
        max_logit_scale: float | None = None,
        group: Group | None = None,
        teacher: Clip | None = None,
    ):
        self.clip, self.objective, self.optimizer, self.teacher = clip, objective, optimizer, teacher
        self.gradient_clip, self.max_logit_scale = gradient_clip, max_logit_scale
        self.group = group or Group()
        self._head = None if objective.heads is None else clip.pooling
        looked_at = objective.needs_pooled, objective.needs_negatives, objective.needs_captions
        self._plain = self._encode = Encoder(clip, dtype, *looked_at)
        if self.group.world > 1:
            # no pass through the towers leads to the pooling
            ignored = [name for name, _ in self._plain.named_parameters() if name.startswith("clip.pooling.")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._plain, ignored)
            # the buffers are constants; torch 2.13 gave the option another name
            known = inspect.signature(DistributedDataParallel).parameters
            option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self._encode = DistributedDataParallel(self._plain, gradient_as_bucket_view=True, **{option: False})
        self._towers: dict[str, list[torch.nn.Parameter]] = {}
        depths = clip.depths()
        for name, parameter in clip.named_parameters():
            self._towers.setdefault(depths[name][0], []).append(parameter)

    def __call__(self, parts: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Returns the objective's scalars and the logit scale, on the device and detached."""
        self.optimizer.zero_grad(set_to_none=True)
        taught = self._taught(parts)  # before the activations of the others take their memory
        whole = self._encode(parts[0]) if len(parts) == 1 else self._without_graph(parts)
        leaves = dataclasses.replace(
            whole,
            **{name: value.detach().requires_grad_() for name, value in given(whole, (*ENCODED, "scale")).items()},
            **taught,
            pooling=self._head,
        )
        terms = self.objective(gathered(leaves, parts[0].rank_pairs, self.group, parts[0].rank_negatives))
        # DistributedDataParallel takes the mean over the processes; the gradient is the sum of what they contribute
        (terms["loss"] * self.group.world).backward()
        if self._head is not None:
            mean_gradients(self._head.parameters(), self.group)
        self._feed(parts, leaves, whole if len(parts) == 1 else None)
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.clip.parameters(), self.gradient_clip)
        self.optimizer.step()
        if self.max_logit_scale is not None:
            with torch.no_grad():
                self.clip.model.logit_scale.clamp_(max=math.log(self.max_logit_scale))
        if self._head is not None:
            self._head.clamp()
        return {name: value.detach() for name, value in terms.items()} | {"logit_scale": leaves.scale.detach()}

    def _taught(self, parts: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """What the teacher makes of all parts; nothing where there is none."""
        if self.teacher is None:
            return {}
        found = [teacher_features(self.teacher, part, self._plain.dtype, self._plain.negatives) for part in parts]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _without_graph(self, parts: Sequence[Batch]) -> Features:
        """The features of all parts as those of one batch."""
        with torch.no_grad():
            found = [self._plain(part) for part in parts]
        names = (*ENCODED, "region_weight", "sentence_weight", "local_weight", "local_boxes", "negative_slots", "sub_choices")
        joined = {name: torch.cat([getattr(part, name) for part in found]) for name in given(found[0], names)}
        firsts = list(accumulate((len(part) for part in parts[:-1]), initial=0))
        for name in given(found[0], ("local_rows", "negative_rows")):
            joined[name] = torch.cat([getattr(part, name) + first for part, first in zip(found, firsts, strict=True)])
        return dataclasses.replace(found[0], **joined)

    def _feed(self, parts: Sequence[Batch], leaves: Features, encoded: Features | None) -> None:
        """Sends the gradient of the features through the towers. `encoded`: the features with their graph, where one part is
        the whole batch; else each part is encoded again."""
        looked_at = {
            tower: [name for name, value in given(leaves, names).items() if value.grad is not None]
            for tower, names in TOWERS.items()
        }
        if not any(looked_at[tower] and self._towers[tower][0].requires_grad for tower in ("image", "text")):
            raise ConfigError("The setting `freeze` leaves nothing to train: the objective looks at frozen towers alone.")
        shares: dict[str, Sequence[torch.Tensor]] = {}
        for name in (name for names in looked_at.values() for name in names if name != "scale"):
            shares[name] = getattr(leaves, name).grad.split([_rows(part, name) for part in parts])
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last or self.group.world == 1 else self._encode.no_sync():
                found = encoded or self._encode(part)
                gradients = {name: share[number] for name, share in shares.items() if len(share[number])}
                if last:
                    if leaves.scale.grad is not None:
                        gradients["scale"] = leaves.scale.grad
                    for tower, names in TOWERS.items():
                        # no local pair, or no negative, in any part; and DistributedDataParallel waits for every parameter
                        missing = looked_at[tower] and self._towers[tower][0].grad is None
                        if (missing or self.group.world > 1) and gradients.keys().isdisjoint(names):
                            name, value = next(iter(given(found, names).items()))
                            gradients[name] = torch.zeros_like(value)
                # not of a frozen tower
                gradients = {name: value for name, value in gradients.items() if getattr(found, name).requires_grad}
                if gradients:
                    torch.autograd.backward([getattr(found, name) for name in gradients], list(gradients.values()))
        for tower, names in looked_at.items():
            if not names:
                for parameter in self._towers[tower]:
                    parameter.grad = None


def _rows(part: Batch, name: str) -> int:
    """How many rows a feature has in a part."""
    if name.endswith("_global") or name in DRAWN:
        return len(part)
    return len(part.negative_rows if name == "text_negatives" else part.local_rows)


@torch.no_grad()
def teacher_features(teacher: Clip, batch: Batch, dtype: torch.dtype | None, negatives: bool) -> dict[str, torch.Tensor]:
    """The features of the batch that an objective may ask of a teacher, in float32 and without a graph, by their names in
    Features: those of the whole images, of the captions and, with `negatives`, of the hard negatives."""
    with torch.autocast(batch.images.device.type, dtype=dtype, enabled=dtype is not None):
        encoded = teacher(images=normalised(batch.images[: len(batch)], teacher.mean, teacher.std), tokens=batch.caption_tokens)
        found = [encoded.image_features, encoded.text_features]
        if negatives:
            found.append(_text_features(teacher, batch.negative_tokens, encoded.text_features))
    return {name: value.float() for name, value in zip(TEACHER, found, strict=False)}


def _text_features(clip: Clip, tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """tokens [T, L] -> [T, D], also of no text; `others` are features of the same width and type."""
    return clip(tokens=tokens).text_features if len(tokens) else others[:0]


def batch_features(
    clip: Clip,
    batch: Batch,
    dtype: torch.dtype | None = None,
    pooled: bool = True,
    negatives: bool = False,
    captions: bool = True,
) -> Features:
    """What the objective compares, in float32: each image and each text goes through its tower once.

    `region` [P, D] is the mean of the global image's patch tokens over the box, `sentence` [P, D] the mean of the
    caption's tokens over the sentence's span, both through CLIP's own norm and projection. A box or span of which nothing
    is visible has the weight 0. With `pooled` False there are none of these four; without `negatives` none of the hard
    negatives. With sub-captions in the batch there are `sub_queries` [B, K, D] and `patches` [B, M, D]. The whole captions are
    left out where neither `captions` nor `pooled` asks for them, and there are sub-captions. `dtype` is that of autocast, None
    for none.
    """
    rows = batch.local_rows
    count = len(batch)
    hard: dict[str, torch.Tensor] = {}
    tokens: dict[str, torch.Tensor] = {}
    drawn: dict[str, torch.Tensor] = {}
    captions = captions or pooled or batch.sub_tokens is None
    with torch.autocast(batch.images.device.type, dtype=dtype, enabled=dtype is not None):
        images = normalised(batch.images, clip.mean, clip.std)
        encoded = clip(images=images, tokens=batch.caption_tokens if captions else None)
        others = encoded.text_features if captions else encoded.image_features
        local_text = _text_features(clip, batch.sentence_tokens, others)
        if batch.sub_tokens is not None:
            drawn["patches"] = clip.project_patches(encoded.image_tokens[:count]).float()
            drawn["sub_queries"] = clip(tokens=batch.sub_tokens).text_queries.unflatten(0, (count, -1)).float()
            drawn["sub_choices"] = batch.sub_choices
        if negatives:
            hard["text_negatives"] = _text_features(clip, batch.negative_tokens, others).float()
            hard |= {"negative_rows": batch.negative_rows, "negative_slots": batch.negative_slots}
        if pooled and len(rows):
            in_box = patch_mask(batch.boxes, clip.image_size, clip.patch_size)
            in_span = span_mask(batch.spans, batch.caption_tokens.shape[1])
            tokens = {
                "region": clip.project_image(masked_mean(encoded.image_tokens[rows], in_box)),
                "sentence": clip.project_text(masked_mean(encoded.text_tokens[rows], in_span)),
                "region_weight": in_box.any(dim=1),
                "sentence_weight": in_span.any(dim=1),
            }
        elif pooled:
            tokens = {"region": local_text, "sentence": local_text, "region_weight": rows, "sentence_weight": rows}
    return Features(
        image_global=encoded.image_features[:count].float(),
        text_global=encoded.text_features.float() if captions else None,
        image_local=encoded.image_features[count:].float(),
        text_local=local_text.float(),
        **{name: value.float() for name, value in tokens.items()},
        local_rows=rows,
        local_weight=batch.local_weights,
        local_boxes=batch.regions,
        **hard,
        negative_count=batch.negative_count,
        **drawn,
        scale=clip.logit_scale.float(),
    )
