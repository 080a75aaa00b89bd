"""The batches of fine-tuning: global images with captions, local crops with sentences, each image decoded once; hard negatives
and sub-captions. A sample is a caption with its image: the long one, or each of the short ones, which then share the image's
local pairs.

Letters: B samples of a batch, P local pairs of them (an image may have none or several), N hard negatives of their captions
(any number, also none), K sub-captions of a caption, S input size, L, L', L'' and L* token positions after trimming.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset as TorchDataset

from fast_goal.config import FinetuneConfig
from fast_goal.data.captions import tokenize, trim
from fast_goal.data.records import Dataset, captions_of
from fast_goal.data.shards import ShardImages
from fast_goal.data.sub_captions import CHOICES, TEXTS, Sentences, choices, draw, drawing
from fast_goal.errors import ConfigError, DataError
from fast_goal.model.clip import Clip
from fast_goal.objectives import Objective, SubCaptions, check_captions
from fast_goal.training.alignment import ALIGNMENTS, Alignment
from fast_goal.training.distributed import Group
from fast_goal.training.gpu_decoding import Encoded, check_gpu, encoded
from fast_goal.training.pixels import CachedViews
from fast_goal.training.views import Files, Views

PIXELS, SHARDS = Path(".fast_goal/pixels"), Path(".fast_goal/shards")
SENTENCES = Path(".fast_goal/embeddings")  # where FLISM keeps their bounds
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch. Row i of the local fields belongs to the sample `local_rows[i]` of the global ones, which is ascending; so do
    the rows of the negatives to `negative_rows[i]`.

    images uint8 [B+P, 3, S, S]: the global images, then the local crops; `batch_features` normalises them. caption_tokens
    [B, L], sentence_tokens [P, L'].
    local_rows [P]. boxes [P, 4]: the local box in pixels of the global input, zeros when nothing of it is visible.
    spans [P, 2]: the sentence's positions in its row of caption_tokens, last exclusive, (0, 0) when none is visible.
    regions [P, 4]: the local box in pixels of its original image.
    local_weights [P]: those of an image's pairs add up to 1. rank_pairs: how many local pairs each of the processes that
    share a batch has in its share.
    negative_tokens [N, L'']. negative_rows [N]. negative_slots [N]: the number of a negative among those of its caption, from
    0, below `negative_count`, the most that any caption of the data set has. rank_negatives: as rank_pairs.
    sub_tokens [B*K, L*]: the K sub-captions of each sample in turn. sub_choices int64 [B, all samples of the batch, of all
    processes]: which sub-caption of each of them the sample is asked. None where the objective looks at none.
    """

    images: torch.Tensor
    caption_tokens: torch.Tensor
    sentence_tokens: torch.Tensor
    local_rows: torch.Tensor
    boxes: torch.Tensor
    spans: torch.Tensor
    regions: torch.Tensor
    local_weights: torch.Tensor
    rank_pairs: tuple[int, ...]
    negative_tokens: torch.Tensor
    negative_rows: torch.Tensor
    negative_slots: torch.Tensor
    negative_count: int
    rank_negatives: tuple[int, ...]
    sub_tokens: torch.Tensor | None = None
    sub_choices: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not wait."""
        return self._mapped(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the torch DataLoader calls this."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def __len__(self) -> int:
        return len(self.caption_tokens)

    def split(self, parts: int) -> list[Batch]:
        """The samples in `parts` batches of about equal size, texts trimmed anew; fewer parts than asked for where there are
        fewer samples. To be called where the batch is on the CPU: trimming looks at the tokens."""
        count = len(self)
        if parts <= 1 or count <= 1:
            return [self]
        bounds = torch.linspace(0, count, min(parts, count) + 1).round().long()
        # both rows are ascending
        edges = [torch.searchsorted(rows, bounds).tolist() for rows in (self.local_rows, self.negative_rows)]
        made = []
        for (first, last), (low, high), (start, end) in zip(*map(pairwise, (bounds.tolist(), *edges)), strict=True):
            drawn = {}
            if self.sub_tokens is not None:
                tokens = self.sub_tokens.unflatten(0, (count, -1))[first:last].flatten(0, 1)
                drawn = {"sub_tokens": trim(tokens), "sub_choices": self.sub_choices[first:last]}
            made.append(
                Batch(
                    images=torch.cat([self.images[first:last], self.images[count + low : count + high]]),
                    caption_tokens=trim(self.caption_tokens[first:last]),
                    sentence_tokens=_trimmed(self.sentence_tokens[low:high]),
                    local_rows=self.local_rows[low:high] - first,
                    boxes=self.boxes[low:high],
                    spans=self.spans[low:high],
                    regions=self.regions[low:high],
                    local_weights=self.local_weights[low:high],
                    rank_pairs=self.rank_pairs,
                    negative_tokens=_trimmed(self.negative_tokens[start:end]),
                    negative_rows=self.negative_rows[start:end] - first,
                    negative_slots=self.negative_slots[start:end],
                    negative_count=self.negative_count,
                    rank_negatives=self.rank_negatives,
                    **drawn,
                )
            )
        # from other memory the copy to the device would wait for what the device still has to do
        return [part.pin_memory() for part in made] if self.images.is_pinned() else made


class PairDataset(TorchDataset):
    """The samples of one split, through the view of `clip`; `samples[indices]` is a Batch, that of the first epoch where the
    epoch matters (see `batch`).

    With a `group` of several processes it is the batch that they share, and each gets its part of it, in the order of the
    ranks. Texts are tokenised and boxes and spans computed once, here; images are decoded when a batch is made. A sample
    without a local pair contributes its global image and caption only; with `local` False no sample has one, with `best`
    False a sample has all of its pairs; `alignment`: see training/alignment.py. `counts` says how many samples, pairs or
    negatives are affected by what.

    captions: `long`, or `short`, where a sentence has no span: it is not looked for in a short caption. negatives: rows of
    data.records.NEGATIVES, found by image and caption; a negative that the model would read as it reads the caption (the text
    context ends before the two differ) is left out. negative_count: the most that a caption has. sub_captions: what is drawn
    from each caption; `sentences`: the folder that keeps the bounds of their sentences.
    scaled: see training/views.py. shards: a folder of tar files to read the images from. pixel_cache: the folder that keeps
    the views. gpu: where JPEG files are decoded; instead of a Batch there is then (one without images, Encoded).
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        pairs: pd.DataFrame | None,
        clip: Clip,
        local: bool = True,
        best: bool = True,
        group: Group | None = None,
        alignment: str = "exact",
        scaled: bool = False,
        shards: Path | None = None,
        pixel_cache: Path | None = None,
        gpu: torch.device | None = None,
        captions: str = "long",
        negatives: pd.DataFrame | None = None,
        sub_captions: SubCaptions | None = None,
        sentences: Path | None = None,
        whole: bool = True,
    ):
        self._group, self.gpu = group or Group(), gpu
        records = dataset.split(split)
        rows, texts = _captions(records, captions)
        if not texts:
            raise DataError(
                f"Data set {dataset.name!r} has no image with a {captions} caption in the split {split!r}: nothing to train on."
            )
        if local and pairs is None:
            raise DataError(
                f"The objective needs local pairs, but data set {dataset.name!r} has no pairs table: run `fast-goal flism`."
            )
        described, self._image = np.unique(rows, return_inverse=True)  # the image of each sample, among those described
        images = records.iloc[described]
        # Only what a batch needs: the workers get a copy.
        self.image_ids: list[str] = images["image_id"].to_numpy()[self._image].tolist()  # of each sample
        hashes = images["content_hash"].tolist() if "content_hash" in images else None
        # the same picture under two ids counts as one
        groups = pd.factorize(images["image_id" if hashes is None else "content_hash"])[0]
        self.groups: list[int] = groups[self._image].tolist()
        self._view = clip.view(1, 1)
        sizes = images[["width", "height"]].to_numpy(dtype=np.int64)
        caption_tokens, lengths = tokenize(texts, clip.context_length)
        self._caption_tokens = trim(caption_tokens).int()
        self.lengths: list[int] = lengths.clamp(max=clip.context_length).tolist()  # tokens of each caption
        self.counts = {
            "samples": len(texts),
            f"without_{captions}_caption": len(records) - len(images),
            "truncated_captions": int((lengths > clip.context_length).sum()) if whole else 0,
        }
        # the pairs of image i are the rows first[i] to first[i + 1] of the tables of local pairs
        self._first = np.zeros(len(images) + 1, dtype=np.int64)
        self._weights = torch.zeros(0)
        self._boxes, self._spans = torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)
        crops, self._regions = np.zeros((0, 4)), torch.zeros(0, 4)
        self._sentence_tokens = torch.zeros(0, 1, dtype=torch.int32)
        if local:
            chosen = pairs[pairs["rank"] == 1] if best else pairs
            crops = self._add_pairs(images, chosen, dataset.name, clip, ALIGNMENTS[alignment], in_captions=captions == "long")
        # the negatives of sample i are the rows negative_first[i] to negative_first[i + 1]
        self._negative_first = np.zeros(len(texts) + 1, dtype=np.int64)
        self._negative_tokens = torch.zeros(0, 1, dtype=torch.int32)
        if negatives is not None:
            self._add_negatives(texts, negatives, clip.context_length)
            if not self.counts["negatives"]:
                raise DataError(
                    f"Of the {len(negatives)} hard negatives of data set {dataset.name!r} none can be used with the {captions} "
                    f"captions of the split {split!r}: run `dvc repro negatives` with negatives.captions={captions}."
                )
        self.negative_count = int(np.diff(self._negative_first).max())
        self._sub_captions, self._sentences, self._context_length = sub_captions, None, clip.context_length
        if sub_captions is not None:
            self._sentences = Sentences(texts, sentences, keep=self._group.main)
            found = self._sentences.counts
            self.counts |= {"sentences": int(found.sum()), "with_one_sentence": int((found == 1).sum())}
            self.counts["truncated_sub_captions"] = self._truncated_sub_captions(lengths.numpy())
        wholes = {"samples": len(texts), "images": len(records), **self.counts}
        for name, count in self.counts.items():
            if count and name in _REASONS:
                what, reason = _REASONS[name]
                told = dataset.name, split, count, wholes[what], what.replace("_", " "), reason
                _log.warning("%s, split %s: %d of %d %s %s.", *told)
        paths = images["image_path"].tolist()
        if shards is not None:
            source = ShardImages(shards, images["image_id"].tolist(), paths, hashes, SHARDS)
        else:  # absolute, because the workers may start in another folder
            source = Files([dataset.path(path).absolute() for path in paths])
        self.views = Views(source, sizes, self._view, self._first, crops, hashes, scaled)
        self._pixels = self.views if pixel_cache is None else CachedViews(self.views, pixel_cache.absolute(), self._group.main)

    def _add_pairs(
        self,
        images: pd.DataFrame,
        pairs: pd.DataFrame,
        name: str,
        clip: Clip,
        alignment: Alignment,
        in_captions: bool,
    ) -> np.ndarray:
        """Returns the regions, float64 [M, 4]. in_captions: whether the sentences are those of the captions."""
        context_length = clip.context_length
        image = {image_id: row for row, image_id in enumerate(images["image_id"])}
        own = pairs[pairs["image_id"].isin(image)]
        own = own.assign(image=own["image_id"].map(image)).sort_values(["image", "rank"], kind="stable")
        count = np.bincount(own["image"].to_numpy(dtype=np.int64), minlength=len(images))
        self._first[1:] = count.cumsum()
        crops = own[["x1", "y1", "x2", "y2"]].to_numpy(dtype=float)
        weights = own["weight"] / own.groupby("image")["weight"].transform("sum")  # a best pair alone has all the weight
        self._weights = torch.tensor(weights.to_numpy(), dtype=torch.float32)
        captions = images["long_caption"].tolist()
        sizes = list(zip(images["width"].tolist(), images["height"].tolist(), strict=True))
        boxes, spans = [], []
        for box, pair in zip(crops, own.itertuples(), strict=True):
            caption = captions[pair.image]
            if caption[pair.char_start : pair.char_end] != pair.sentence:
                raise DataError(
                    f"pairs of {name!r}: image {pair.image_id!r} has the sentence {pair.sentence!r}, but its long "
                    f"caption reads {caption[pair.char_start : pair.char_end]!r} there. Run `fast-goal flism` again."
                )
            width, height = sizes[pair.image]
            boxes.append(alignment.box(dataclasses.replace(self._view, width=width, height=height), box, clip.patch_size))
            if in_captions:
                spans.append(alignment.span(caption, pair.char_start, pair.char_end, context_length))
        self._regions = torch.tensor(crops, dtype=torch.float32).reshape(-1, 4)
        self._boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        self._spans = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2) if in_captions else torch.zeros(len(own), 2).long()
        sentences, lengths = tokenize(own["sentence"].tolist(), context_length)
        self._sentence_tokens = trim(sentences).int()
        visible = {"without_visible_span": int((self._spans[:, 1] <= self._spans[:, 0]).sum())} if in_captions else {}
        self.counts |= {
            "pairs": len(own),
            "without_pair": int((count[self._image] == 0).sum()),
            "without_visible_box": int((self._boxes[:, 2:] <= self._boxes[:, :2]).any(dim=1).sum()),
            **visible,
            "truncated_sentences": int((lengths > context_length).sum()),
        }
        return crops

    def _add_negatives(self, texts: list[str], negatives: pd.DataFrame, context_length: int) -> None:
        samples = pd.DataFrame({"image_id": self.image_ids, "caption": texts, "sample": np.arange(len(texts))})
        table = negatives[["image_id", "caption", "negative"]].assign(row=np.arange(len(negatives)))
        found = samples.merge(table, on=["image_id", "caption"]).sort_values(["sample", "row"], kind="stable")
        owners = found["sample"].to_numpy(dtype=np.int64, copy=True)  # torch wants to be able to write
        tokens, lengths = tokenize(found["negative"].tolist(), context_length)
        captions = self._caption_tokens[torch.from_numpy(owners)]
        width = captions.shape[1]  # beyond it the captions have padding alone
        differs = (tokens[:, :width] != captions).any(dim=1) | (tokens[:, width:] != 0).any(dim=1)
        owners = owners[differs.numpy()]
        self._negative_first[1:] = np.bincount(owners, minlength=len(texts)).cumsum()
        self._negative_tokens = _trimmed(tokens[differs]).int()
        self.counts |= {
            "negatives": len(owners),
            "listed_negatives": len(negatives),
            "negatives_of_no_caption": len(negatives) - found["row"].nunique(),
            "negatives_like_their_caption": int((~differs).sum()),
            "truncated_negatives": int((lengths[differs] > context_length).sum()),
            "without_negative": int((np.diff(self._negative_first) == 0).sum()),
        }

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, indices: list[int]) -> Batch | tuple[Batch, Encoded]:
        return self.batch(indices)

    def batch(self, indices: list[int], seed: int = 0, epoch: int = 0) -> Batch | tuple[Batch, Encoded]:
        """The batch of these samples, with what is drawn for each of them by (seed, epoch, its index) alone. Raises DataError,
        which names the image that cannot be used."""
        shares = np.array(indices).reshape(self._group.world, -1)
        own = shares[self._group.rank]
        images = self._image[own]
        local_rows, _, pairs = _owned(self._first, images)  # [P]
        negative_rows, slots, negatives = _owned(self._negative_first, own)  # [N]
        chosen = torch.from_numpy(pairs)
        batch = Batch(
            images=self.views.empty(0) if self.gpu is not None else self._pixels.batch(images, pairs),
            caption_tokens=_trimmed(self._caption_tokens[torch.from_numpy(own)].long()),
            sentence_tokens=_trimmed(self._sentence_tokens[chosen].long()),
            local_rows=torch.from_numpy(local_rows),
            boxes=self._boxes[chosen],
            spans=self._spans[chosen],
            regions=self._regions[chosen],
            local_weights=self._weights[chosen],
            rank_pairs=_counted(self._first, self._image[shares]),
            negative_tokens=_trimmed(self._negative_tokens[torch.from_numpy(negatives)].long()),
            negative_rows=torch.from_numpy(negative_rows),
            negative_slots=torch.from_numpy(slots),
            negative_count=self.negative_count,
            rank_negatives=_counted(self._negative_first, shares),
            **self._drawn(own, len(indices), seed, epoch),
        )
        return batch if self.gpu is None else (batch, encoded(self.views, images))

    def _truncated_sub_captions(self, lengths: np.ndarray) -> int:
        """Samples whose longest sub-caption is longer than the text context. lengths: tokens of the whole captions [n]."""
        most, context = self._sub_captions.most_sentences, self._context_length
        rows = np.flatnonzero(lengths > context).tolist()
        tokens = tokenize([text for row in rows for text in self._sentences[row]], context)[1].numpy() - 2  # no start, no end
        ends = np.cumsum([0, *(self._sentences.counts[row] for row in rows)])
        longest = (np.sort(tokens[start:end])[-most:].sum() for start, end in pairwise(ends.tolist()))
        return sum(int(length + 2 > context) for length in longest)

    def _drawn(self, own: np.ndarray, images: int, seed: int, epoch: int) -> dict[str, torch.Tensor]:
        """The sub-captions of the samples `own`, and which of those of all `images` of the batch each is asked."""
        if self._sub_captions is None:
            return {}
        settings, texts, chosen = self._sub_captions, [], []
        for index in own.tolist():
            random = drawing(seed, epoch, index, TEXTS)
            texts += draw(self._sentences[index], settings.count, settings.most_sentences, settings.consecutive, random)
            chosen.append(choices(settings.count, images, drawing(seed, epoch, index, CHOICES)))
        tokens, _ = tokenize(texts, self._context_length)
        return {"sub_tokens": trim(tokens), "sub_choices": torch.from_numpy(np.stack(chosen))}


def _captions(records: pd.DataFrame, which: str) -> tuple[list[int], list[str]]:
    """The captions, and of each the row of its image."""
    found = [(row, text) for row, texts in enumerate(captions_of(records, which)) for text in texts]
    return [row for row, _ in found], [text for _, text in found]


def _owned(first: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows first[owner] to first[owner + 1] of each of the owners in turn, with the owner's place and the row's number
    among those of its owner: places, numbers, rows."""
    count = first[owners + 1] - first[owners]
    places = np.repeat(np.arange(len(owners)), count)
    numbers = np.arange(len(places)) - (np.cumsum(count) - count)[places]
    return places, numbers, first[owners][places] + numbers


def _counted(first: np.ndarray, shares: np.ndarray) -> tuple[int, ...]:
    """How many rows the owners of each share have."""
    return tuple((first[shares + 1] - first[shares]).sum(axis=1).tolist())


def _trimmed(tokens: torch.Tensor) -> torch.Tensor:
    return trim(tokens) if len(tokens) else tokens[:, :1]


_REASONS = {  # of what kind, and what is wrong with them
    "without_long_caption": ("images", "have no long caption and are left out"),
    "without_short_caption": ("images", "have no short caption and are left out"),
    "truncated_captions": ("samples", "have a caption beyond the text context, cut off"),
    "without_pair": ("samples", "have no local pair and contribute the global terms only"),
    "without_visible_box": ("pairs", "have a box outside the view and contribute no image-TSL term"),
    "without_visible_span": ("pairs", "have a sentence beyond the text context and contribute no text-TSL term"),
    "truncated_sentences": ("pairs", "have a sentence longer than the text context, cut off"),
    "negatives_of_no_caption": ("listed_negatives", "belong to no caption that is trained on and are left out"),
    "negatives_like_their_caption": ("listed_negatives", "are to the model the same text as their caption and are left out"),
    "truncated_negatives": ("negatives", "are longer than the text context, cut off"),
    "without_negative": ("samples", "have no hard negative caption"),
    "truncated_sub_captions": ("samples", "have sub-captions that can be longer than the text context, cut off"),
    "with_one_sentence": ("samples", "have a caption of one sentence: all of its sub-captions are the same"),
}


def pair_dataset(
    dataset: Dataset,
    split: str,
    pairs: pd.DataFrame | None,
    clip: Clip,
    objective: Objective,
    config: FinetuneConfig,
    group: Group,
    device: torch.device,
    section: str = "finetune",
    negatives: pd.DataFrame | None = None,
) -> PairDataset:
    """The samples as the settings `section` say; `negatives` are looked at where the objective needs them.

    Raises DataError, and ConfigError where a GPU is to decode and cannot, for captions that the objective cannot use, or
    without the hard negatives that it needs.
    """
    if config.decode == "gpu":
        check_gpu(device, section)
    check_captions(objective, config.captions, section)
    if objective.needs_negatives and (negatives is None or negatives.empty):
        raise ConfigError(
            f"The objective needs hard negative captions, and data set {dataset.name!r} has none: set negatives.generator "
            "(fast-goal configure ... negatives=rules) and run `dvc repro negatives`."
        )
    return PairDataset(
        dataset,
        split,
        pairs,
        clip,
        local=objective.needs_local,
        best=config.pairs == "best",
        group=group,
        alignment=objective.alignment,
        scaled=config.scaled_decoding,
        shards=None if config.shards is None else Path(config.shards),
        pixel_cache=PIXELS if config.pixel_cache else None,
        gpu=device if config.decode == "gpu" else None,
        captions=config.captions,
        negatives=negatives if objective.needs_negatives else None,
        sub_captions=objective.sub_captions,
        sentences=SENTENCES,
        whole=objective.needs_captions,
    )
