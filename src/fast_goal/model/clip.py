"""CLIP as the rest of the project sees it, and the only module that uses open_clip (except for its tokenizer).

A model on disk is a folder that `open_clip.create_model_and_transforms("local-dir:<folder>")` loads: its
`open_clip_config.json`, the weights as safetensors, and our `fast_goal.json`; and, of a model with text-conditioned pooling
(FLAIR), which open_clip does not know, `pooling.safetensors`.

Letters: B batch, S image side in pixels, N patches, L tokens, W tower width, D embedding width.
"""

from __future__ import annotations

import copy
import difflib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast_goal.config import BaseConfig, ScratchConfig
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, ModelError
from fast_goal.files import atomic_folder, read_json, write_json
from fast_goal.model.pooling import PoolingHead
from fast_goal.model.positions import Stretch, stretch_positions

if TYPE_CHECKING:
    from fast_goal.data.images import View

CONFIG_FILE, WEIGHTS_FILE, INFO_FILE = "open_clip_config.json", "open_clip_model.safetensors", "fast_goal.json"
POOLING_FILE = "pooling.safetensors"
VOCABULARY = 49408  # CLIP's byte pairs; the tokenizer of data/captions.py knows no other
LAST = ("ln_post", "proj", "ln_final", "text_projection", "logit_scale")  # parameters that follow the last block
LOCAL = "local-dir:"
SCHEMAS = ("hf-hub:", LOCAL)  # of models that bring their weights along
RESIZE_MODES = {"shortest": "crop", "squash": "squash", "longest": "pad"}  # open_clip's words -> View's


class Encoded(NamedTuple):
    """One pass of the towers. A tower that was not asked for leaves None.

    The tokens are those after the last block, before the final layer norm: what TSL pools.
    """

    image_features: Tensor | None  # [B, D], L2-normalised
    image_tokens: Tensor | None  # [B, N, W], row-major patches, without the class token
    text_features: Tensor | None  # [B, D], L2-normalised
    text_tokens: Tensor | None  # [B, L, W]
    text_queries: Tensor | None  # [B, D], the text features before L2: what asks the pooling


class Clip(nn.Module):
    """An open_clip `CLIP` with a vision transformer and CLIP's tokenizer.

    `config` is open_clip's model configuration of exactly this model, context length and activation included;
    `preprocess` its preprocessing (mean, std, resize_mode); `name` says where the weights came from. `pooling`: the head of
    text-conditioned pooling, None where it was not trained with one. Raises ModelError for a model whose patch tokens cannot be
    projected as the class token is, or that reads text differently.
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], preprocess: dict[str, Any], name: str):
        super().__init__()
        _check_supported(model, config, preprocess, name)
        self.model = model
        self.config = config
        self.name = name
        self.image_size: int = model.visual.image_size[0]
        self.patch_size: int = model.visual.patch_size[0]
        self.context_length: int = model.context_length
        self.embed_dim: int = model.visual.output_dim
        self.mean, self.std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self.view_mode = RESIZE_MODES[preprocess.get("resize_mode", "shortest")]
        self.stretch = Stretch(self.context_length, self.context_length, 0)  # by which its text positions were made here
        self.pooling: PoolingHead | None = None

    @property
    def logit_scale(self) -> Tensor:
        """The factor of the cosines, exponentiated; a scalar with a gradient."""
        return self.model.logit_scale.exp().reshape(())

    def forward(self, images: Tensor | None = None, tokens: Tensor | None = None) -> Encoded:
        """images [B, 3, S, S], normalised as `view` does; tokens [B, L] with L at most the context length.

        Attention over text is causal and padding follows the end-of-text token, so tokens trimmed to the longest caption
        of the batch give the same result as untrimmed ones.
        """
        image_features = image_tokens = text_features = text_tokens = text_queries = None
        if images is not None:
            visual = self.model.visual.forward_intermediates(images, indices=1, output_fmt="NLC")
            image_features, image_tokens = _unit(visual["image_features"]), visual["image_intermediates"][-1]
        if tokens is not None:
            text_tokens = self._text_tokens(tokens)
            end = tokens.argmax(dim=-1)  # end-of-text has the highest id
            text_queries = self._projected_text(text_tokens[torch.arange(len(tokens), device=tokens.device), end])
            text_features = _unit(text_queries)
        return Encoded(image_features, image_tokens, text_features, text_tokens, text_queries)

    def _text_tokens(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context_length:
            raise ModelError(f"text of {length} tokens: {self.name} reads {self.context_length}; truncate it when tokenizing")
        model, dtype = self.model, self.model.transformer.get_cast_dtype()
        # open_clip's own text pass insists on the full length
        hidden = model.token_embedding(tokens).to(dtype) + model.positional_embedding[:length].to(dtype)
        return model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])

    def project_image(self, pooled: Tensor) -> Tensor:
        """Tokens or means of tokens [..., W] -> [..., D]: post layer norm, visual projection, L2.

        What CLIP does to its class token (FAST-GOAL equation 11).
        """
        return _unit(self.project_patches(pooled))

    def project_patches(self, tokens: Tensor) -> Tensor:
        """As `project_image`, without L2: the patches that the pooling looks at (FLAIR, section 3.1)."""
        return self.model.visual.ln_post(tokens) @ self.model.visual.proj

    def project_text(self, pooled: Tensor) -> Tensor:
        """Tokens or means of tokens [..., W] -> [..., D]: final layer norm, text projection, L2 (FAST-GOAL equation 12)."""
        return _unit(self._projected_text(pooled))

    def _projected_text(self, pooled: Tensor) -> Tensor:
        return self.model.ln_final(pooled) @ self.model.text_projection

    def add_pooling(self, heads: int, seed: int = 0) -> None:
        """Gives the model a fresh head of text-conditioned pooling; the same seed gives the same one. Raises ConfigError."""
        if self.embed_dim % heads:
            raise ConfigError(
                f"objective.heads = {heads} does not divide {self.embed_dim}, the width of the embeddings of {self.name}. "
                f"Set it to {math.gcd(8, self.embed_dim)}, or another divisor"
            )
        head, device = PoolingHead(self.embed_dim, heads, seed), self.model.logit_scale.device
        # of fake tensors (training/memory.py) an attention cannot be moved, not even to where it is
        self.pooling = (head if device == head.logit_scale.device else head.to(device)).train(self.training)

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, D], L2-normalised."""
        return self(images=images).image_features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, D], L2-normalised."""
        return self(tokens=tokens).text_features

    def view(self, width: int, height: int) -> View:
        """How an image of width x height pixels becomes this model's input."""
        from fast_goal.data.images import View

        return View(width, height, size=self.image_size, mode=self.view_mode, mean=self.mean, std=self.std)

    def depths(self) -> dict[str, tuple[str, int]]:
        """Of every parameter by name: its tower (`image`, `text`, `pooling`, or `both` for the logit scale), and how many
        blocks lie from it to its tower's end: 0 after the last block, 1 in it, one more than all blocks in the embeddings."""
        found = {}
        for name, _ in self.named_parameters():
            if name.startswith("pooling."):
                found[name] = "pooling", 0
                continue
            own = name.removeprefix("model.")
            tower = "both" if own == "logit_scale" else "image" if own.startswith("visual.") else "text"
            blocks = len((self.model.visual if tower == "image" else self.model).transformer.resblocks)
            parts = own.split(".")
            if "resblocks" in parts:
                depth = blocks - int(parts[parts.index("resblocks") + 1])
            else:
                depth = 0 if any(part in LAST for part in parts) else blocks + 1
            found[name] = tower, depth
        return found

    def checkpointed(self, on: bool = True) -> None:
        """Whether the backward pass computes the activations of each block again instead of keeping them."""
        self.model.set_grad_checkpointing(on)

    def stretched(self, context_length: int, keep: int = 20) -> Clip:
        """A copy of this model that reads texts of `context_length` tokens (see `stretch_positions`)."""
        weights = self.model.state_dict()
        weights["positional_embedding"] = stretch_positions(weights["positional_embedding"], context_length, keep)
        config = copy.deepcopy(self.config)
        config["text_cfg"]["context_length"] = context_length
        model = _build(config, seed=0)
        model.load_state_dict(weights)
        model.to(self.model.logit_scale.device).train(self.training)
        made = Clip(model, config, self._preprocess(), self.name)
        made.stretch = Stretch(self.context_length, context_length, keep)
        made.pooling = copy.deepcopy(self.pooling)
        return made

    def save(self, folder: Path | str, info: dict[str, Any]) -> None:
        """Writes the model and `info` (method, data, commit, metrics) as a folder; an older one of that name is replaced.

        The new folder is complete before it takes the name. `info` goes to fast_goal.json, with the key `name` added.
        """
        from safetensors.torch import save_file

        with atomic_folder(folder) as temporary:
            write_json(temporary / CONFIG_FILE, {"model_cfg": self.config, "preprocess_cfg": self._preprocess()})
            write_json(temporary / INFO_FILE, {**info, "name": self.name})
            weights = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
            save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            # safetensors lets only the owner read; whoever may read the configuration may read the weights
            mode = (temporary / CONFIG_FILE).stat().st_mode
            (temporary / WEIGHTS_FILE).chmod(mode)
            if self.pooling is not None:
                weights = {name: value.detach().cpu().contiguous() for name, value in self.pooling.state_dict().items()}
                metadata = {"format": "pt", "heads": str(self.pooling.pooling.heads)}
                save_file(weights, temporary / POOLING_FILE, metadata=metadata)
                (temporary / POOLING_FILE).chmod(mode)

    @classmethod
    def load(cls, folder: Path | str) -> Clip:
        """Reads a folder that `save`, or open_clip, wrote. Raises ModelError, which names the folder."""
        way_out = f"Write {folder} anew by running the step that makes it."
        clip = _create(f"local-dir:{folder}", None, _saved_name(Path(folder)), way_out)
        clip.pooling = _saved_pooling(Path(folder), clip.embed_dim, way_out)
        return clip

    def _preprocess(self) -> dict[str, Any]:
        resize_mode = next(mode for mode, view_mode in RESIZE_MODES.items() if view_mode == self.view_mode)
        return {"mean": list(self.mean), "std": list(self.std), "interpolation": "bicubic", "resize_mode": resize_mode}


def load_pretrained(model: str, pretrained: str | None, context_length: int, keep_positions: int = 20) -> Clip:
    """The weights to start from, with the text context stretched to `context_length`.

    model: an open_clip name with a tag of its weights, or a file of them, as `pretrained`; or `hf-hub:owner/name`, or
    `local-dir:folder`, where `pretrained` is not used. Raises ModelError if the weights cannot be had or do not fit.
    """
    way_out = (
        "Check base.model and base.pretrained, and the connection if the weights have to be downloaded; "
        "base.kind=scratch trains a small model here instead."
    )
    schema = model.startswith(SCHEMAS)
    if not schema and not pretrained:
        raise ModelError(f"base.pretrained is null for base.model = {model!r}: its weights would be random. {way_out}")
    name = _source(model, pretrained)
    clip = _create(model, None if schema else pretrained, name, way_out)
    if model.startswith(LOCAL):
        clip.pooling = _saved_pooling(Path(model.removeprefix(LOCAL)), clip.embed_dim, way_out)
    return clip.stretched(context_length, keep_positions)


def _source(model: str, pretrained: str | None) -> str:
    """Where weights come from, in words."""
    return model if model.startswith(SCHEMAS) else f"{model}/{pretrained}"


def build_scratch(config: ScratchConfig, context_length: int = 77, seed: int = 0) -> Clip:
    """A small untrained CLIP; the same seed gives the same weights. Raises ConfigError if the sizes do not fit together."""
    for part, whole in (("patch_size", "image_size"), ("head_width", "vision_width"), ("head_width", "text_width")):
        if getattr(config, whole) % getattr(config, part):
            raise ConfigError(
                f"base.scratch.{whole} = {getattr(config, whole)} is not a multiple of "
                f"base.scratch.{part} = {getattr(config, part)}"
            )
    model_config = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": config.head_width,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": VOCABULARY,
            "width": config.text_width,
            "layers": config.text_layers,
            "heads": config.text_width // config.head_width,
        },
    }
    return _untrained(model_config, "scratch", seed)


def structure(base: BaseConfig) -> Clip:
    """The CLIP that `base` asks for, with random weights: for what depends on its sizes alone.

    Under torch's FakeTensorMode nothing is allocated. Raises ModelError for a model that open_clip does not know, whose
    configuration cannot be had or whose text positions cannot be stretched so, ConfigError for sizes that do not fit together.
    """
    if base.kind == "scratch":
        return build_scratch(base.scratch, base.context_length)
    prepare()
    try:
        config = _model_config(base.model, base.pretrained)
    except Exception as error:  # as in `_create`
        raise ModelError(f"{base.model}: its configuration cannot be had: {type(error).__name__}: {error}") from error
    Stretch(config["text_cfg"].get("context_length", 77), base.context_length, base.keep_positions)  # may refuse
    config["text_cfg"]["context_length"] = base.context_length
    return _untrained(config, _source(base.model, base.pretrained))


def saved_structure(folder: Path | str) -> Clip:
    """The CLIP of a folder, as `structure`: no weights are read, those of its pooling neither."""
    clip = _untrained(read_json(Path(folder) / CONFIG_FILE)["model_cfg"], _saved_name(Path(folder)))
    way_out = f"Write {folder} anew by running the step that makes it."
    clip.pooling = _saved_pooling(Path(folder), clip.embed_dim, way_out, weights=False)
    return clip


def _saved_name(folder: Path) -> str:
    info = folder / INFO_FILE
    return read_json(info).get("name", folder.name) if info.exists() else folder.name


def _saved_pooling(folder: Path, width: int, way_out: str, weights: bool = True) -> PoolingHead | None:
    """The head of text-conditioned pooling in a model's folder, None where there is none."""
    from safetensors import SafetensorError, safe_open

    path = folder / POOLING_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            head = PoolingHead(width, int((stored.metadata() or {})["heads"]))
            if weights:
                head.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError, KeyError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be loaded: {type(error).__name__}: {error}\n{way_out}") from error
    return head


def _untrained(config: dict[str, Any], name: str, seed: int = 0) -> Clip:
    from fast_goal.data.images import CLIP_MEAN, CLIP_STD

    return Clip(_build(config, seed), config, {"mean": CLIP_MEAN, "std": CLIP_STD}, name)


def _build(config: dict[str, Any], seed: int) -> nn.Module:
    prepare()
    from open_clip import CLIP

    with torch.random.fork_rng(devices=[]):  # making a model does not disturb the caller's random numbers
        torch.manual_seed(seed)
        return CLIP(**copy.deepcopy(config))


def _create(model: str, pretrained: str | None, name: str, way_out: str) -> Clip:
    prepare()
    import open_clip

    try:
        config = _model_config(model, pretrained)
        quick_gelu = config.get("quick_gelu", False)
        with torch.random.fork_rng(devices=[]):
            created = open_clip.create_model(
                model,
                pretrained,
                require_pretrained=True,
                force_quick_gelu=quick_gelu,
                quick_gelu=quick_gelu,
                weights_only=True,
            )
    except Exception as error:  # the hub's client, the parsers and torch have errors of a dozen unrelated classes
        raise ModelError(f"{name} cannot be loaded: {type(error).__name__}: {error}\n{way_out}") from error
    return Clip(created, config, created.visual.preprocess_cfg, name)


def _model_config(model: str, pretrained: str | None) -> dict[str, Any]:
    """open_clip's model configuration, with the activation that the weights were trained with: open_clip would only warn of
    another one. Raises ValueError for an unknown name."""
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        close = difflib.get_close_matches(model, open_clip.list_models(), n=3)
        raise ValueError(f"open_clip knows no model {model!r}; the closest names are {', '.join(close)}")
    if tag := open_clip.get_pretrained_cfg(model, pretrained) if pretrained else None:
        config["quick_gelu"] = bool(tag.get("quick_gelu", False))
    config.pop("custom_text", None)  # an argument of open_clip's factory, not of the model
    return config


def _unit(features: Tensor) -> Tensor:
    # under autocast the projection is half precision, in which a unit vector is not one
    half = features.dtype in (torch.float16, torch.bfloat16)
    return F.normalize(features.float() if half else features, dim=-1)


def _check_supported(model: nn.Module, config: dict[str, Any], preprocess: dict[str, Any], name: str) -> None:
    from open_clip.model import CLIP
    from open_clip.transformer import VisionTransformer

    text, visual = config["text_cfg"], model.visual
    refusals = {
        f"it is a {type(model).__name__}, not a CLIP with the text tower built in": type(model) is not CLIP,
        f"its vision tower is a {type(visual).__name__}, not a vision transformer": type(visual) is not VisionTransformer,
    }
    if not any(refusals.values()):
        refusals |= {
            "its vision tower does not pool by the class token": visual.attn_pool is not None or visual.pool_type != "tok",
            "its vision tower drops patches": not isinstance(visual.patch_dropout, nn.Identity),
            "its images or patches are not square": len({*visual.image_size}) > 1 or len({*visual.patch_size}) > 1,
            "its text tower does not pool by the end-of-text token": model.text_pool_type != "argmax",
            "its text attention is not causal": model.attn_mask is None,
            "its text projection is not a plain matrix": not isinstance(model.text_projection, nn.Parameter),
            "its tokenizer is not CLIP's": bool(text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs"))
            or model.vocab_size != VOCABULARY,
            "its loss has a bias": model.logit_bias is not None,
            "it does not resize bicubically": preprocess.get("interpolation", "bicubic") != "bicubic"
            or preprocess.get("resize_mode", "shortest") not in RESIZE_MODES,
        }
    for reason, applies in refusals.items():
        if applies:
            raise ModelError(
                f"{name} cannot be fine-tuned here: {reason}. Choose an open_clip model such as ViT-B-16 with its weights "
                "openai, laion2b_s34b_b88k or datacomp_xl_s13b_b90k."
            )
