"""A CLIP in the formats of others: Hugging Face's CLIP and ONNX. `fast-goal export --format onnx --output FOLDER`.

An export is checked before its folder takes its name: it is read back with the library that will read it, and its
embeddings of a few pictures and texts must equal those of the model. Needs the extra `export`; nothing else imports the
libraries of these formats for models.

Letters: B batch, S image side in pixels, N patches, L tokens, Q texts asked of each image, W tower width, D embedding width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fast_goal.environment import prepare
from fast_goal.errors import ModelError
from fast_goal.files import atomic_folder, read_json, write_json
from fast_goal.model.clip import VOCABULARY, Clip
from fast_goal.model.pooling import PoolingHead, TextConditionedPooling

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("huggingface", "onnx")
TOLERANCE = 1e-4  # largest difference allowed in any entry of two L2-normalised embeddings
OPSET = 17  # of ONNX: the first with LayerNormalization; onnxruntime reads it since 1.12
EXPORT_FILE = "export.json"
START, END = VOCABULARY - 2, VOCABULARY - 1  # ids of the start and end tokens
LARGE = 1_900_000_000  # bytes of weights; an ONNX file, being one protobuf message, ends at 2 GiB


def export(clip: Clip, folder: Path | str, format: str) -> dict[str, float]:
    """Writes `clip` to `folder` in one of FORMATS and returns the largest differences found, keys `image` and `text`, and in
    onnx `pooling` of a model that has one.

    huggingface: config.json and model.safetensors for `CLIPModel`, preprocessor_config.json for `CLIPImageProcessor`, and
    the files of `CLIPTokenizer`, cut off at the model's context length. onnx: image.onnx, pixel_values float32
    [B, 3, S, S] -> image_features [B, D], and text.onnx, input_ids int64 [B, L] -> text_features [B, D], with any B and
    any L up to the context length, features L2-normalised; the same tokenizer files. export.json states preprocessing,
    versions and the differences. An earlier export in `folder` is replaced.

    Of a model with text-conditioned pooling, image.onnx also gives patches [B, N, D] and text.onnx queries [B, D], neither of
    them normalised, and pooling.onnx takes both, patches [B, N, D] and queries [B or 1, Q, D] -> pooled_features [B, Q, D],
    L2-normalised: their products with text_features are the conditioned scores. Hugging Face's CLIP has no such part: its
    export embeds as the model does without a text, and export.json says so.

    Raises ModelError, and leaves no new file, if the extra is not installed, `folder` holds anything but an export, the
    model has a part that the format lacks, or an embedding differs by more than TOLERANCE.
    """
    if format not in FORMATS:
        raise ModelError(f"export format {format!r}: choose one of {', '.join(FORMATS)}")
    folder = Path(folder)
    if folder.exists() and not _replaceable(folder):
        raise ModelError(f"{folder} exists and is no earlier export (it has no {EXPORT_FILE}): choose another output folder")
    _needs("transformers", *(("onnx", "onnxruntime") if format == "onnx" else ()))
    clip = copy.deepcopy(clip).cpu().float().eval()
    with atomic_folder(folder) as temporary:
        facts = (_write_huggingface if format == "huggingface" else _write_onnx)(clip, temporary)
        samples = _samples(clip)
        with torch.no_grad():
            expected = _embeddings(clip, samples)
            found = (_read_huggingface if format == "huggingface" else _read_onnx)(temporary, samples)
        differences = _compare(clip.name, expected, found)
        write_json(temporary / EXPORT_FILE, {**_describe(clip, format), **facts, "largest_difference": differences})
    return differences


class _Samples(NamedTuple):
    """What both sides embed."""

    images: list[Image]
    pixels: Tensor  # [3, 3, S, S], through the model's own view
    texts: list[str]
    tokens: Tensor  # [T, context length], the model's own


def _samples(clip: Clip) -> _Samples:
    from PIL import Image

    from fast_goal.data.captions import tokenize

    random, side = np.random.default_rng(0), clip.image_size
    images = []
    # Transformers rounds half a pixel of a crop down, open_clip to even: these sizes leave no half pixel.
    for size in ((2 * side, 2 * side + 8), (2 * side + 8, 2 * side), (side, side)):
        noise = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        images.append(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    texts = [
        "a",
        "A photograph of two dogs that don't run;  the 1st one's collar is red (no. 27)\nand worn.",
        "Über dem Café – 東京 – steht ein Ballon 🎈!",
        "a red circle left of a green star, " * clip.context_length,
        "",
    ]
    pixels = torch.stack([clip.view(*image.size).apply(image) for image in images])
    return _Samples(images, pixels, texts, tokenize(texts, clip.context_length)[0])


def _embeddings(clip: Clip, samples: _Samples) -> dict[str, Tensor]:
    """The model's own, by tower, and of its pooling every image as every text sees it."""
    encoded = clip(images=samples.pixels, tokens=samples.tokens)
    found = {"image": encoded.image_features, "text": encoded.text_features}
    if clip.pooling is not None:
        queries = encoded.text_queries.expand(len(samples.pixels), -1, -1)
        pooled = clip.pooling.pooling(clip.project_patches(encoded.image_tokens), queries)
        found["pooling"] = nn.functional.normalize(pooled, dim=-1)
    return found


def _compare(name: str, expected: dict[str, Tensor], found: dict[str, list[Tensor]]) -> dict[str, float]:
    """The largest difference by tower; `found` may hold several results that should all equal the expected one."""
    differences = {
        tower: max(float((expected[tower] - result).abs().max()) for result in results) for tower, results in found.items()
    }
    for tower, difference in differences.items():
        if not difference <= TOLERANCE:  # also NaN
            raise ModelError(
                f"{name} was not exported: an embedding ({tower}) read back from the export differs by {difference:.1e}, more "
                f"than {TOLERANCE:.0e}. Please report this with the versions of torch, transformers and onnxruntime."
            )
    return differences


def _describe(clip: Clip, format: str) -> dict[str, Any]:
    return {
        "format": format,
        "model": clip.name,
        "image": {"size": clip.image_size, "mode": clip.view_mode, "mean": list(clip.mean), "std": list(clip.std)},
        "context_length": clip.context_length,
        "texts": "html.unescape(html.unescape(ftfy.fix_text(text))) before the tokenizer, which does not mend text",
        "logit_scale": float(clip.logit_scale.detach()),
        "embed_dim": clip.embed_dim,
        "tolerance": TOLERANCE,
        **({} if clip.pooling is None else {"pooling": _describe_pooling(clip.pooling, format)}),
    }


def _describe_pooling(head: PoolingHead, format: str) -> dict[str, Any]:
    facts = {
        "heads": head.pooling.heads,
        "logit_scale": float(head.logit_scale.detach().exp()),
        "logit_bias": float(head.logit_bias.detach()),
    }
    if format == "huggingface":
        return {**facts, "exported": False, "note": "CLIPModel has no text-conditioned pooling: it embeds without it"}
    return {**facts, "exported": True}


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    marker = folder / EXPORT_FILE
    return marker.is_file() and read_json(marker).get("format") in FORMATS


def _needs(*libraries: str) -> None:
    import importlib

    prepare()
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ModelError(f'the export needs {library} ({error}): pip install "fast-goal[export]"') from None


class _Tower(NamedTuple):
    """The sizes of one tower, and what the weights do not tell."""

    width: int
    layers: int
    heads: int
    hidden: int  # of the MLP
    activation: str  # Hugging Face's name
    epsilon: float  # of the layer norms


def _tower(clip: Clip, transformer: nn.Module, last_norm: nn.Module) -> _Tower:
    block = transformer.resblocks[0]
    activation = block.mlp.gelu
    if type(activation).__name__ == "QuickGELU":
        name = "quick_gelu"
    elif isinstance(activation, nn.GELU) and activation.approximate == "none":
        name = "gelu"
    else:
        raise ModelError(f"{clip.name} cannot be exported: its activation is {activation}, neither GELU nor QuickGELU")
    heads, hidden = block.attn.num_heads, block.mlp.c_fc.out_features
    return _Tower(last_norm.normalized_shape[0], len(transformer.resblocks), heads, hidden, name, last_norm.eps)


def _towers(clip: Clip) -> tuple[_Tower, _Tower]:
    """(image, text)."""
    model = clip.model
    return (
        _tower(clip, model.visual.transformer, model.visual.ln_post),
        _tower(clip, model.transformer, model.ln_final),
    )


def _weights(clip: Clip) -> dict[str, Tensor]:
    """All weights under Hugging Face's names, matrices as [out, in]. Raises ModelError for one that has no such name."""
    rest = dict(clip.model.state_dict())
    weights = {}

    def move(old: str, new: str, suffixes: tuple[str, ...] = ("",), transposed: bool = False) -> None:
        for suffix in suffixes:
            value = rest.pop(old + suffix)
            weights[new + suffix] = (value.T if transposed else value).contiguous()

    affine = (".weight", ".bias")
    try:
        for tower, old, new in zip(_towers(clip), ("visual.", ""), ("vision_model.", "text_model."), strict=True):
            move(f"{old}positional_embedding", f"{new}embeddings.position_embedding.weight")
            for layer in range(tower.layers):
                source, target = f"{old}transformer.resblocks.{layer}.", f"{new}encoder.layers.{layer}."
                for suffix in affine:
                    parts = rest.pop(f"{source}attn.in_proj_{suffix[1:]}").chunk(3)
                    for part, value in zip("qkv", parts, strict=True):
                        weights[f"{target}self_attn.{part}_proj{suffix}"] = value.contiguous()
                move(f"{source}attn.out_proj", f"{target}self_attn.out_proj", affine)
                move(f"{source}ln_1", f"{target}layer_norm1", affine)
                move(f"{source}ln_2", f"{target}layer_norm2", affine)
                move(f"{source}mlp.c_fc", f"{target}mlp.fc1", affine)
                move(f"{source}mlp.c_proj", f"{target}mlp.fc2", affine)
        move("visual.class_embedding", "vision_model.embeddings.class_embedding")
        move("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
        move("visual.ln_pre", "vision_model.pre_layrnorm", affine)  # their spelling
        move("visual.ln_post", "vision_model.post_layernorm", affine)
        move("visual.proj", "visual_projection.weight", transposed=True)
        move("token_embedding.weight", "text_model.embeddings.token_embedding.weight")
        move("ln_final", "text_model.final_layer_norm", affine)
        move("text_projection", "text_projection.weight", transposed=True)
    except KeyError as error:
        raise ModelError(f"{clip.name} cannot be exported: it lacks {error}, which CLIP has in these formats") from None
    weights["logit_scale"] = rest.pop("logit_scale").reshape(())
    if rest:
        raise ModelError(f"{clip.name} cannot be exported: these formats have no place for {', '.join(sorted(rest)[:5])}")
    return weights


def _write_huggingface(clip: Clip, folder: Path) -> dict[str, Any]:
    if clip.view_mode == "pad":
        raise ModelError(
            f"{clip.name} cannot be exported to huggingface: it pads images to a square (resize_mode: longest), which "
            "CLIPImageProcessor cannot do. Export to onnx, whose input is the preprocessed image."
        )
    transformers = _transformers()
    side = {"height": clip.image_size, "width": clip.image_size}
    crop = clip.view_mode == "crop"
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": clip.image_size} if crop else side,
        do_center_crop=crop,
        crop_size=side,
        image_mean=list(clip.mean),
        image_std=list(clip.std),
    )
    processor.save_pretrained(folder)
    _write_tokenizer(clip, folder)

    def sizes(tower: _Tower) -> dict[str, Any]:
        return {
            "hidden_size": tower.width,
            "intermediate_size": tower.hidden,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "hidden_act": tower.activation,
            "layer_norm_eps": tower.epsilon,
            "projection_dim": clip.embed_dim,
        }

    vision, text = (sizes(tower) for tower in _towers(clip))
    vision |= {"image_size": clip.image_size, "patch_size": clip.patch_size}
    text |= {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": clip.context_length,
        "bos_token_id": START,
        # with its own id, not 2, the model pools the first end token; with 2, the highest id
        "eos_token_id": END,
        "pad_token_id": END,
    }
    weights = _weights(clip)
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=clip.embed_dim,
        logit_scale_init_value=float(weights["logit_scale"]),
    )
    with torch.random.fork_rng(devices=[]):  # making a model does not disturb the caller's random numbers
        model = transformers.CLIPModel(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    # safetensors lets only the owner read; whoever may read the configuration may read the weights
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    return {"transformers": transformers.__version__}


def _write_tokenizer(clip: Clip, folder: Path) -> None:
    """CLIP's byte pairs as open_clip brings them. What ftfy and html.unescape do in open_clip, `CLIPTokenizer` does not:
    it ignores a normalizer of our own in tokenizer.json. export.json says so."""
    from open_clip.tokenizer import SimpleTokenizer

    transformers, own = _transformers(), SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = transformers.CLIPTokenizer(
        vocab={**{piece: index for piece, index in own.encoder.items() if index < START}, start: START, end: END},
        merges=list(own.bpe_ranks),
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=clip.context_length,
    )
    tokenizer.save_pretrained(folder)


def _tokens_of(folder: Path, samples: _Samples) -> Any:
    tokenizer = _transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer(samples.texts, padding=True, truncation=True, return_tensors="pt")


def _read_huggingface(folder: Path, samples: _Samples) -> dict[str, list[Tensor]]:
    transformers = _transformers()
    model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    # Pillow's resizing, as in the model's own view; torchvision's differs from it by a grey level here and there
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    pixels = processor(samples.images, return_tensors="pt")["pixel_values"]
    outputs = model(pixel_values=pixels, **_tokens_of(folder, samples))
    return {"image": [outputs.image_embeds], "text": [outputs.text_embeds]}


def _transformers() -> Any:
    prepare()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _write_onnx(clip: Clip, folder: Path) -> dict[str, Any]:
    import onnx
    import onnxruntime

    _write_tokenizer(clip, folder)
    weights, (vision, text) = _weights(clip), _towers(clip)
    _image_graph(clip, vision, weights).save(folder / "image.onnx")
    _text_graph(clip, text, weights).save(folder / "text.onnx")
    if clip.pooling is not None:
        _pooling_graph(clip, clip.pooling.pooling).save(folder / "pooling.onnx")
    return {"opset": OPSET, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def _read_onnx(folder: Path, samples: _Samples) -> dict[str, list[Tensor]]:
    """Each tower twice: all at once, and one by one, texts then only as long as they are."""
    image, text = _session(folder / "image.onnx"), _session(folder / "text.onnx")
    tokens = _tokens_of(folder, samples)
    lengths = tokens["attention_mask"].sum(dim=1).tolist()
    ids = tokens["input_ids"]
    images = [image(samples.pixels), _joined([image(one[None]) for one in samples.pixels])]
    texts = [
        text(samples.tokens),
        text(ids),
        _joined([text(row[None, :length]) for row, length in zip(ids, lengths, strict=True)]),
    ]
    found = {"image": [one["image_features"] for one in images], "text": [one["text_features"] for one in texts]}
    if (folder / "pooling.onnx").is_file():
        pooling = _session(folder / "pooling.onnx")
        patches, queries = images[0]["patches"], texts[0]["queries"]
        apart = [pooling(row[None], query[None, None])["pooled_features"] for row in patches for query in queries]
        found["pooling"] = [
            pooling(patches, queries[None])["pooled_features"],  # all texts of each image
            torch.cat(apart).reshape(len(patches), len(queries), -1),
        ]
    return found


def _session(path: Path) -> Any:
    """The file as a function from its inputs, in their order, to its outputs by name, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    takes, gives = ([one.name for one in many] for many in (session.get_inputs(), session.get_outputs()))

    def run(*tensors: Tensor) -> dict[str, Tensor]:
        found = session.run(gives, {name: tensor.numpy() for name, tensor in zip(takes, tensors, strict=True)})
        return {name: torch.from_numpy(value) for name, value in zip(gives, found, strict=True)}

    return run


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _Graph:
    """An ONNX graph under construction; `node` and `constant` return the names of their results.

    Written out by hand: the towers are a dozen operators, and torch's exporter fixes the batch size or the text length
    of a model whose code asks for it.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.sources: list[Any] = []
        self.results: list[Any] = []

    def source(self, name: str, shape: list[str | int], integers: bool = False) -> str:
        """An input of the graph: float32, or int64. A size that is a word is free."""
        from onnx import TensorProto, helper

        kind = TensorProto.INT64 if integers else TensorProto.FLOAT
        self.sources.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def result(self, operator: str, hidden: str, name: str, shape: list[str | int], **attributes: Any) -> None:
        """An output of the graph, by its name: what the operator makes of `hidden`."""
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node(operator, [hidden], [name], name=name, **attributes))
        self.results.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def unit(self, hidden: str, name: str, shape: list[str | int]) -> None:
        """The L2-normalised output `name`."""
        self.result("LpNormalization", hidden, name, shape, axis=-1, p=2)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        output = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Tensor | list[int] | float) -> str:
        from onnx import numpy_helper

        if name not in self.initializers:
            if isinstance(value, Tensor):
                array = value.detach().contiguous().numpy()
            else:
                array = np.array(value, dtype=np.float32 if isinstance(value, float) else np.int64)
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def span(self, first: int, end: int, axis: int) -> tuple[str, str, str]:
        """What `Slice` takes beside the tensor: from `first` to before `end` along the axis."""
        return (
            self.constant(f"index_{first}", [first]),
            self.constant(f"index_{end}", [end]),
            self.constant(f"axis_{axis}", [axis]),
        )

    def linear(self, hidden: str, weights: dict[str, Tensor], name: str) -> str:
        """hidden [..., in] -> [..., out]"""
        product = self.node("MatMul", hidden, self.constant(f"{name}.weight.T", weights[f"{name}.weight"].T))
        bias = f"{name}.bias"
        return self.node("Add", product, self.constant(bias, weights[bias])) if bias in weights else product

    def norm(self, hidden: str, weights: dict[str, Tensor], name: str, epsilon: float) -> str:
        scale, bias = (self.constant(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.node("LayerNormalization", hidden, scale, bias, axis=-1, epsilon=epsilon)

    def activation(self, hidden: str, name: str) -> str:
        if name == "quick_gelu":  # x sigmoid(1.702 x)
            gate = self.node("Sigmoid", self.node("Mul", hidden, self.constant("quick", 1.702)))
            return self.node("Mul", hidden, gate)
        # x / 2 (1 + erf(x / sqrt 2))
        error = self.node("Erf", self.node("Mul", hidden, self.constant("half_root", 0.5**0.5)))
        doubled = self.node("Mul", hidden, self.node("Add", error, self.constant("one", 1.0)))
        return self.node("Mul", doubled, self.constant("half", 0.5))

    def blocks(self, hidden: str, tower: _Tower, weights: dict[str, Tensor], name: str, mask: str | None = None) -> str:
        """hidden [B, L, W] -> [B, L, W] through the tower's residual blocks; mask [L, L] is added to the attention."""
        width = tower.width // tower.heads
        split = self.constant("split", [0, 0, tower.heads, width])  # 0 keeps the size, whatever it is
        joined = self.constant("joined", [0, 0, tower.width])
        for layer in range(tower.layers):
            block = f"{name}.encoder.layers.{layer}"
            normed = self.norm(hidden, weights, f"{block}.layer_norm1", tower.epsilon)
            query, key, value = (
                self.node("Reshape", self.linear(normed, weights, f"{block}.self_attn.{part}_proj"), split) for part in "qkv"
            )  # [B, L, heads, width]
            query = self.node("Mul", query, self.constant("scale", width**-0.5))
            query = self.node("Transpose", query, perm=[0, 2, 1, 3])
            key = self.node("Transpose", key, perm=[0, 2, 3, 1])
            value = self.node("Transpose", value, perm=[0, 2, 1, 3])
            scores = self.node("MatMul", query, key)  # [B, heads, L, L]
            scores = self.node("Add", scores, mask) if mask else scores
            mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), value)
            mixed = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
            hidden = self.node("Add", hidden, self.linear(mixed, weights, f"{block}.self_attn.out_proj"))
            normed = self.norm(hidden, weights, f"{block}.layer_norm2", tower.epsilon)
            inner = self.activation(self.linear(normed, weights, f"{block}.mlp.fc1"), tower.activation)
            hidden = self.node("Add", hidden, self.linear(inner, weights, f"{block}.mlp.fc2"))
        return hidden

    def save(self, path: Path) -> None:
        import onnx
        from onnx import helper

        weights = list(self.initializers.values())
        graph = helper.make_graph(self.nodes, path.stem, self.sources, self.results, weights)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model_gen_version(graph, opset_imports=[opset], producer_name="fast-goal")
        large = sum(len(value.raw_data) for value in weights) > LARGE
        onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)
        onnx.checker.check_model(path, full_check=True)


def _image_graph(clip: Clip, tower: _Tower, weights: dict[str, Tensor]) -> _Graph:
    graph, name = _Graph(), "vision_model.embeddings"
    side, patch = clip.image_size, clip.patch_size
    graph.source("pixel_values", ["batch", 3, side, side])
    kernel = graph.constant("patch_embedding", weights[f"{name}.patch_embedding.weight"])
    grid = graph.node("Conv", "pixel_values", kernel, kernel_shape=[patch, patch], strides=[patch, patch])
    flat = graph.node("Reshape", grid, graph.constant("flat", [0, 0, -1]))  # [B, W, N]
    patches = graph.node("Transpose", flat, perm=[0, 2, 1])
    batch = graph.node("Shape", "pixel_values", start=0, end=1)
    shape = graph.node("Concat", batch, graph.constant("one_token", [1, tower.width]), axis=0)
    first = graph.node("Expand", graph.constant("class_embedding", weights[f"{name}.class_embedding"]), shape)
    hidden = graph.node("Concat", first, patches, axis=1)  # [B, 1 + N, W]
    hidden = graph.node("Add", hidden, graph.constant("positions", weights[f"{name}.position_embedding.weight"]))
    hidden = graph.norm(hidden, weights, "vision_model.pre_layrnorm", tower.epsilon)
    hidden = graph.blocks(hidden, tower, weights, "vision_model")

    def projected(rows: str) -> str:
        normed = graph.norm(rows, weights, "vision_model.post_layernorm", tower.epsilon)
        return graph.linear(normed, weights, "visual_projection")

    pooled = graph.node("Gather", hidden, graph.constant("first", torch.tensor(0)), axis=1)  # [B, W]
    graph.unit(projected(pooled), "image_features", ["batch", clip.embed_dim])
    if clip.pooling is not None:
        count = (side // patch) ** 2
        rows = graph.node("Slice", hidden, *graph.span(1, count + 1, axis=1))  # [B, N, W]
        graph.result("Identity", projected(rows), "patches", ["batch", count, clip.embed_dim])
    return graph


def _text_graph(clip: Clip, tower: _Tower, weights: dict[str, Tensor]) -> _Graph:
    graph, name = _Graph(), "text_model.embeddings"
    graph.source("input_ids", ["batch", "length"], integers=True)
    length = graph.node("Shape", "input_ids", start=1, end=2)  # [1]

    def visible(table: str, axes: list[int]) -> str:
        """The table cut to `length` along the axes."""
        for axis in axes:
            table = graph.node("Slice", table, graph.constant("zero", [0]), length, graph.constant(f"axis_{axis}", [axis]))
        return table

    ids = graph.constant("token_embedding", weights[f"{name}.token_embedding.weight"])
    positions = graph.constant("positions", weights[f"{name}.position_embedding.weight"])
    hidden = graph.node("Add", graph.node("Gather", ids, "input_ids"), visible(positions, [0]))  # [B, L, W]
    causal = torch.full((clip.context_length, clip.context_length), float("-inf")).triu(1)
    mask = visible(graph.constant("causal", causal), [0, 1])
    hidden = graph.blocks(hidden, tower, weights, "text_model", mask)
    end = graph.node("ArgMax", "input_ids", axis=1, keepdims=1)  # [B, 1]: the first end token has the highest id
    pooled = graph.node("GatherND", hidden, end, batch_dims=1)  # [B, W]
    pooled = graph.norm(pooled, weights, "text_model.final_layer_norm", tower.epsilon)
    projected, shape = graph.linear(pooled, weights, "text_projection"), ["batch", clip.embed_dim]
    graph.unit(projected, "text_features", shape)
    if clip.pooling is not None:
        graph.result("Identity", projected, "queries", shape)
    return graph


def _pooling_graph(clip: Clip, pooling: TextConditionedPooling) -> _Graph:
    graph, width, heads = _Graph(), clip.embed_dim, pooling.heads
    weights = dict(pooling.state_dict())
    for suffix in ("weight", "bias"):
        parts = weights.pop(f"attention.in_proj_{suffix}").chunk(3)
        weights |= {f"{name}.{suffix}": part for name, part in zip(("query", "key", "value"), parts, strict=True)}
    patches = graph.source("patches", ["batch", "patches", width])
    queries = graph.source("queries", ["batch or 1", "texts", width])
    split = graph.constant("split", [0, 0, heads, width // heads])

    def projected(rows: str, name: str, perm: list[int]) -> str:
        norm = getattr(pooling, f"norm_{name}")
        normed = graph.norm(rows, weights, f"norm_{name}", norm.eps)
        return graph.node("Transpose", graph.node("Reshape", graph.linear(normed, weights, name), split), perm=perm)

    query = projected(queries, "query", [0, 2, 1, 3])  # [B or 1, heads, Q, D / heads]
    query = graph.node("Mul", query, graph.constant("scale", (width // heads) ** -0.5))
    key, value = projected(patches, "key", [0, 2, 3, 1]), projected(patches, "value", [0, 2, 1, 3])
    scores = graph.node("MatMul", query, key)  # [B, heads, Q, N]
    # the logit of the key of zeros is 0, and so is what its value adds
    scores = graph.node("Pad", scores, graph.constant("zero_logit", [0, 0, 0, 0, 0, 0, 0, 1]))
    shares = graph.node("Softmax", scores, axis=-1)
    shares = graph.node("Slice", shares, *graph.span(0, -1, axis=3))
    taken = graph.node("Transpose", graph.node("MatMul", shares, value), perm=[0, 2, 1, 3])
    taken = graph.node("Reshape", taken, graph.constant("joined", [0, 0, width]))
    graph.unit(graph.linear(taken, weights, "attention.out_proj"), "pooled_features", ["batch", "texts", width])
    return graph
