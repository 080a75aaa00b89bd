"""Exports, read with the libraries they are for and compared with the model itself."""

import html
import json
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image

from fast_goal.data.captions import tokenize
from fast_goal.environment import prepare
from fast_goal.errors import ModelError
from fast_goal.model import export as module
from fast_goal.model.clip import Clip
from fast_goal.model.export import FORMATS, export

prepare()
import open_clip  # noqa: E402  after prepare, which makes torchvision importable

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

TEXTS = [
    "a red circle",
    "",
    "It's 1 DOG's 25th\n\n birthday; they'd say: naïve café, 東京 🎈!?",
    "one two three " * 100,  # 302 tokens
    "x" * 400,
]
# activation, context length, image size, patch size, resize mode
GELU = (False, 77, 32, 8, "shortest")
QUICK = (True, 248, 45, 15, "shortest")
SQUASH = (True, 77, 32, 16, "squash")


def make(quick_gelu: bool, context: int, size: int, patch: int, resize_mode: str = "shortest", **text: object) -> Clip:
    config = {
        "embed_dim": 12,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": size, "patch_size": patch, "width": 24, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": context, "vocab_size": 49408, "width": 16, "layers": 3, "heads": 4, **text},
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = open_clip.CLIP(**config)
        for value in model.parameters():  # no bias stays 0, no scale 1, so that none can be mixed up unseen
            value.data += 0.2 * torch.randn_like(value)
    preprocess = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "resize_mode": resize_mode}
    return Clip(model, config, preprocess, "tiny").eval()


def pictures(size: int) -> list[Image.Image]:
    """Of sizes whose centre crop leaves no half pixel."""
    random = np.random.default_rng(1)
    sizes = [(3 * size, 3 * size + 12), (3 * size + 24, 3 * size), (size, size), (2 * size + 4, 2 * size)]
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def features(clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        pixels = torch.stack([clip.view(*image.size).apply(image) for image in pictures(clip.image_size)])
        return clip.encode_image(pixels), clip.encode_text(tokenize(TEXTS, clip.context_length)[0])


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", [GELU, QUICK, SQUASH], ids=["gelu77", "quick248", "squash"])
def test_hugging_face_embeds_the_same(tmp_path: Path, kind: tuple):
    clip = make(*kind)
    differences = export(clip, tmp_path / "hf", "huggingface")
    assert max(differences.values()) <= 1e-4
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert type(model).__name__ == "CLIPModel"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    texts = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert texts["input_ids"].shape[1] == tokenizer.model_max_length == clip.context_length
    with torch.no_grad():
        found = model(**texts, **processor(pictures(clip.image_size), return_tensors="pt"))
    image, text = features(clip)
    close(found.image_embeds, image)
    close(found.text_embeds, text)
    close(found.logits_per_image, clip.logit_scale.detach() * image @ text.T, atol=1e-3)
    # so that the agreement is worth something
    assert (image @ image.T).fill_diagonal_(0).max() < 0.999
    assert (text @ text.T).fill_diagonal_(0).max() < 0.999


@pytest.mark.parametrize("context", [77, 248])
def test_the_tokenizer_gives_open_clips_ids(tmp_path: Path, context: int):
    export(make(False, context, 32, 16), tmp_path / "hf", "huggingface")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "hf")
    expected, lengths = tokenize(TEXTS, context)
    for text, row, length in zip(TEXTS, expected.tolist(), lengths.tolist(), strict=True):
        assert tokenizer(text, truncation=True)["input_ids"] == row[: min(length, context)]
    # what export.json tells the reader to do with other texts
    for text in ("a “red” dog’s ball…", "Tom &amp;amp; Jerry <3", "ﬁne ＡＢＣ", "schÃ¶n"):
        mended = html.unescape(html.unescape(ftfy.fix_text(text)))
        (row,), (length,) = (each.tolist() for each in tokenize([text], context))
        assert tokenizer(mended)["input_ids"] == row[:length]
        assert tokenizer(text)["input_ids"] != row[:length]


@pytest.mark.parametrize("kind", [GELU, QUICK, (False, 77, 32, 8, "longest")], ids=["gelu77", "quick248", "pad"])
def test_onnx_embeds_the_same(tmp_path: Path, kind: tuple):
    clip = make(*kind)
    export(clip, tmp_path / "onnx", "onnx")
    expected_image, expected_text = features(clip)
    sessions = {}
    for tower in ("image", "text"):
        path = tmp_path / "onnx" / f"{tower}.onnx"
        assert [(each.domain, each.version) for each in onnx.load(path).opset_import] == [("", 17)]
        sessions[tower] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    pixels = torch.stack([clip.view(*image.size).apply(image) for image in pictures(clip.image_size)]).numpy()
    for rows in (slice(0, 4), slice(1, 2), slice(0, 3)):
        (found,) = sessions["image"].run(["image_features"], {"pixel_values": pixels[rows]})
        close(torch.from_numpy(found), expected_image[rows])

    tokens, lengths = tokenize(TEXTS, clip.context_length)
    for rows in (slice(0, 5), slice(0, 1), slice(0, 3)):
        longest = min(int(lengths[rows].max()), clip.context_length)
        for length in {longest, clip.context_length}:
            (found,) = sessions["text"].run(["text_features"], {"input_ids": tokens[rows, :length].numpy()})
            close(torch.from_numpy(found), expected_text[rows])
    too_long = np.ones((1, clip.context_length + 1), dtype=np.int64)
    with pytest.raises(Exception, match=r"(?i)broadcast|dimension"):
        sessions["text"].run(None, {"input_ids": too_long})


def pooled(*kind: object) -> Clip:
    """With text-conditioned pooling of which no weight or bias stays what it is made with."""
    clip = make(*kind)
    clip.add_pooling(3, seed=4)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        for value in clip.pooling.parameters():
            value.data += 0.3 * torch.randn_like(value)
    return clip.eval()


@pytest.mark.parametrize("kind", [GELU, QUICK], ids=["gelu77", "quick248"])
def test_onnx_scores_images_as_texts_see_them_the_same(tmp_path: Path, kind: tuple):
    clip = pooled(*kind)
    differences = export(clip, tmp_path / "onnx", "onnx")
    assert set(differences) == {"image", "text", "pooling"} and max(differences.values()) <= 1e-4
    pixels = torch.stack([clip.view(*image.size).apply(image) for image in pictures(clip.image_size)])
    tokens = tokenize(TEXTS, clip.context_length)[0]
    image, text, pooling = (
        onnxruntime.InferenceSession(tmp_path / "onnx" / f"{part}.onnx") for part in ("image", "text", "pooling")
    )
    features, patches = image.run(["image_features", "patches"], {"pixel_values": pixels.numpy()})
    units, queries = text.run(["text_features", "queries"], {"input_ids": tokens.numpy()})
    with torch.no_grad():
        encoded = clip(images=pixels, tokens=tokens)
        close(torch.from_numpy(features), encoded.image_features)
        close(torch.from_numpy(units), encoded.text_features)
        close(torch.from_numpy(queries), encoded.text_queries, atol=1e-3)
        close(torch.from_numpy(patches), clip.project_patches(encoded.image_tokens), atol=1e-3)
        # one image with one text, by torch's own attention
        head, wanted = clip.pooling.pooling, torch.zeros(len(pixels), len(TEXTS))
        for i, one in enumerate(clip.project_patches(encoded.image_tokens)):
            for j, query in enumerate(encoded.text_queries):
                rows = head.norm_query(query)[None, None], head.norm_key(one)[None], head.norm_value(one)[None]
                seen = head.attention(*rows, need_weights=True)[0][0, 0]
                wanted[i, j] = torch.cosine_similarity(seen, query, dim=0)
    (all_texts,) = pooling.run(["pooled_features"], {"patches": patches, "queries": queries[None]})
    close(torch.from_numpy(np.einsum("btd,td->bt", all_texts, units)), wanted)
    own = np.stack([queries[[1, 2]], queries[[0, 3]]])  # other texts for each image
    (some,) = pooling.run(["pooled_features"], {"patches": patches[:2], "queries": own})
    np.testing.assert_allclose(some, np.stack([all_texts[0, [1, 2]], all_texts[1, [0, 3]]]), atol=1e-5)
    assert wanted.std(dim=1).min() > 0.01  # so that the agreement is worth something


def test_the_export_of_a_pooling_is_checked_and_told_of(tmp_path: Path, monkeypatch):
    clip = pooled(*GELU)
    export(clip, tmp_path / "hf", "huggingface")
    facts = json.loads((tmp_path / "hf" / "export.json").read_text())
    assert facts["pooling"]["exported"] is False and "embeds without it" in facts["pooling"]["note"]
    export(clip, tmp_path / "onnx", "onnx")
    facts = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert facts["pooling"]["heads"] == 3 and facts["pooling"]["exported"] is True
    assert facts["pooling"]["logit_scale"] == pytest.approx(float(clip.pooling.logit_scale.exp()))
    assert facts["pooling"]["logit_bias"] == pytest.approx(float(clip.pooling.logit_bias))

    def without_zeros(*arguments):
        graph = pooling_graph(*arguments)
        graph.initializers["zero_logit"] = onnx.numpy_helper.from_array(np.zeros(8, np.int64), "zero_logit")
        graph.initializers["index_-1"] = onnx.numpy_helper.from_array(np.array([2**31]), "index_-1")
        return graph

    pooling_graph = module._pooling_graph
    monkeypatch.setattr(module, "_pooling_graph", without_zeros)
    with pytest.raises(ModelError, match=r"embedding \(pooling\) .* differs by"):
        export(clip, tmp_path / "out", "onnx")


def test_the_export_says_what_its_reader_must_know(tmp_path: Path):
    export(make(*QUICK), tmp_path / "onnx", "onnx")
    facts = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert (facts["format"], facts["opset"], facts["context_length"]) == ("onnx", 17, 248)
    assert facts["image"] == {"size": 45, "mode": "crop", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    assert facts["tolerance"] == 1e-4
    assert set(facts["largest_difference"]) == {"image", "text"}
    assert sorted(path.name for path in (tmp_path / "onnx").glob("*.onnx*")) == ["image.onnx", "text.onnx"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_difference_stops_the_export_and_leaves_nothing(tmp_path: Path, monkeypatch, format: str):
    clip = make(*GELU)
    monkeypatch.setattr(module, "_tower", _with_the_other_activation(module._tower))
    with pytest.raises(ModelError, match="differs by"):
        export(clip, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def _with_the_other_activation(tower):
    return lambda *arguments: tower(*arguments)._replace(activation="quick_gelu")


def test_a_failed_export_keeps_the_earlier_one(tmp_path: Path, monkeypatch):
    export(make(*GELU), tmp_path / "out", "onnx")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(module, "TOLERANCE", float("nan"))
    with pytest.raises(ModelError):
        export(make(*GELU), tmp_path / "out", "onnx")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_an_earlier_export_is_replaced(tmp_path: Path):
    clip = make(*GELU)
    export(clip, tmp_path / "out", "onnx")
    export(clip, tmp_path / "out", "huggingface")
    assert not list((tmp_path / "out").glob("*.onnx"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ModelError, match=r"mine exists and is no earlier export"):
        export(clip, tmp_path / "mine", "onnx")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_a_format_cannot_say_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"pads images to a square .* Export to onnx"):
        export(make(False, 77, 32, 8, "longest"), tmp_path / "out", "huggingface")
    with pytest.raises(ModelError, match=r"no place for transformer\.resblocks\.0\.ls_1\.gamma"):
        export(make(*GELU, ls_init_value=0.1), tmp_path / "out", "huggingface")
    with pytest.raises(ModelError, match=r"activation is GELU\(approximate='tanh'\)"):
        export(make(*GELU, act_kwargs={"approximate": "tanh"}), tmp_path / "out", "onnx")
    with pytest.raises(ModelError, match="choose one of huggingface, onnx"):
        export(make(*GELU), tmp_path / "out", "tflite")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r'pip install "fast-goal\[export\]"'):
        export(make(*GELU), tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path):
    from typer.testing import CliRunner

    from fast_goal.cli import app

    make(*QUICK).save(tmp_path / "model", {})
    arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["export", "--format", "onnx", *arguments])
    assert result.exit_code == 0, result.output
    assert "largest difference" in result.output
    assert (tmp_path / "out" / "text.onnx").exists()
    missing = CliRunner().invoke(app, ["export", "--format", "onnx", "--model", str(tmp_path / "no"), "--output", "x"])
    assert isinstance(missing.exception, ModelError)
