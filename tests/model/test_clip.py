"""The CLIP wrapper against open_clip itself, on a model of a few thousand weights."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fast_goal.config import ScratchConfig
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, ModelError
from fast_goal.model.clip import Clip, build_scratch, load_pretrained
from fast_goal.model.positions import stretch_positions

prepare()
import open_clip  # noqa: E402  after prepare, which makes torchvision importable

TINY = {
    "split": "train",
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 12,
    "vision_width": 16,
    "vision_layers": 2,
    "text_width": 24,
    "text_layers": 2,
    "head_width": 8,
    "steps": 1,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "warmup_steps": 0,
}
TEXTS = [
    "a red circle",
    "a large blue square with stripes stands to the left of a small green star",
    " ".join(["very"] * 90) + " long",
]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return build_scratch(ScratchConfig(**TINY), seed=3).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return open_clip.SimpleTokenizer(context_length=77)(TEXTS)


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_sizes(clip):
    assert (clip.image_size, clip.patch_size, clip.context_length, clip.embed_dim) == (32, 8, 77, 12)
    assert clip.name == "scratch"
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN and clip.std == open_clip.OPENAI_DATASET_STD
    assert clip.logit_scale.shape == () and clip.logit_scale.item() == pytest.approx(1 / 0.07)


def test_features_are_open_clips(clip, images, tokens):
    encoded = clip(images, tokens)
    assert encoded.image_tokens.shape == (3, 16, 16) and encoded.text_tokens.shape == (3, 77, 24)
    close(encoded.image_features, clip.model.encode_image(images, normalize=True))
    close(encoded.text_features, clip.model.encode_text(tokens, normalize=True))
    close(clip.encode_image(images), encoded.image_features)
    close(clip.encode_text(tokens), encoded.text_features)


def test_one_tower_alone(clip, images, tokens):
    assert clip(images=images).text_features is None and clip(images=images).text_tokens is None
    assert clip(tokens=tokens).image_features is None and clip(tokens=tokens).image_tokens is None


def test_class_token_through_project_image_is_the_image(clip, images):
    inner = clip.model.visual.forward_intermediates(images, indices=1, output_fmt="NLC", output_extra_tokens=True)
    close(clip.project_image(inner["image_intermediates_prefix"][-1][:, 0]), clip(images=images).image_features)


def test_end_token_through_project_text_is_the_text(clip, tokens):
    encoded = clip(tokens=tokens)
    end = [row.tolist().index(49407) for row in tokens]
    close(clip.project_text(encoded.text_tokens[[0, 1, 2], end]), encoded.text_features)


def test_tokens_are_those_before_the_final_norms(clip, images, tokens):
    seen = {}
    hooks = [
        clip.model.visual.transformer.resblocks[-1].register_forward_hook(lambda *a: seen.update(image=a[2])),
        clip.model.transformer.resblocks[-1].register_forward_hook(lambda *a: seen.update(text=a[2])),
    ]
    encoded = clip(images, tokens)
    for hook in hooks:
        hook.remove()
    assert torch.equal(encoded.image_tokens, seen["image"][:, 1:])
    assert torch.equal(encoded.text_tokens, seen["text"])


def test_projecting_many_tokens_at_once(clip, images):
    patches = clip(images=images).image_tokens
    projected = clip.project_image(patches)
    assert projected.shape == (3, 16, 12)
    close(projected[1, 5], clip.project_image(patches[1, 5]))
    close(projected.norm(dim=-1), torch.ones(3, 16))


def test_trimmed_text_is_exact(clip, tokens):
    full, trimmed = clip(tokens=tokens[:2]), clip(tokens=tokens[:2, :20])
    close(trimmed.text_features, full.text_features)
    close(trimmed.text_tokens, full.text_tokens[:, :20])


def test_results_do_not_depend_on_the_batch(clip, images, tokens):
    together = clip(images, tokens)
    for row in range(3):
        alone = clip(images[row : row + 1], tokens[row : row + 1])
        for found, expected in zip(alone, together, strict=True):
            close(found[0], expected[row], atol=1e-5)


def test_text_beyond_the_context_is_refused(clip):
    with pytest.raises(ModelError, match=r"text of 78 tokens.*77"):
        clip(tokens=torch.zeros(1, 78, dtype=torch.long))


def test_every_weight_gets_a_gradient(images, tokens):
    clip = build_scratch(ScratchConfig(**TINY))
    assert all(weight.requires_grad for weight in clip.parameters())
    encoded = clip(images, tokens)
    logits = clip.logit_scale * encoded.image_features @ encoded.text_features.T
    (logits.diag().sum() + clip.project_image(encoded.image_tokens.mean(1))[0, 0]).backward()
    missing = [name for name, weight in clip.named_parameters() if weight.grad is None]
    assert not missing and all(weight.grad.isfinite().all() for weight in clip.parameters())


def test_unit_features_under_autocast(clip, images, tokens):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = clip(images, tokens)
    for features in (encoded.image_features, encoded.text_features):
        assert features.dtype == torch.float32
        close(features.norm(dim=-1), torch.ones(3))
    close(encoded.image_features, clip.encode_image(images), atol=0.05)


def test_scratch_is_the_same_for_the_same_seed():
    before = torch.random.get_rng_state()
    one, two, other = (build_scratch(ScratchConfig(**TINY), seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.visual.conv1.weight"], other["model.visual.conv1.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("change", [{"patch_size": 9}, {"vision_width": 20}, {"text_width": 20}])
def test_scratch_sizes_have_to_fit(change):
    with pytest.raises(ConfigError, match=r"base.scratch.* is not a multiple of"):
        build_scratch(ScratchConfig(**(TINY | change)))


def test_stretched(clip, images, tokens):
    stretched = clip.stretched(248)
    assert stretched.context_length == 248 and clip.context_length == 77
    assert stretched.config["text_cfg"]["context_length"] == 248 and clip.config["text_cfg"]["context_length"] == 77
    positions = stretch_positions(clip.model.positional_embedding, 248)
    assert torch.equal(stretched.model.positional_embedding, positions)
    mask = stretched.model.attn_mask
    assert mask.shape == (248, 248)
    assert torch.equal(mask == 0, torch.ones(248, 248).tril().bool()) and (mask[mask != 0] == -torch.inf).all()
    close(stretched.encode_image(images), clip.encode_image(images))
    close(stretched.encode_text(tokens[:2, :20]), clip.encode_text(tokens[:2, :20]))  # within the rows that were kept
    long = open_clip.SimpleTokenizer(context_length=248)(TEXTS)
    close(stretched.encode_text(long), stretched.model.encode_text(long, normalize=True))
    with torch.no_grad():  # a copy: training one leaves the other alone
        stretched.model.visual.proj.zero_()
    assert clip.model.visual.proj.any()


def test_a_stretched_model_is_stretched_again_but_never_shortened(clip, tmp_path):
    """One of 248 positions, as Long-CLIP's are."""
    clip.stretched(248).save(tmp_path / "long", {})
    longer = load_pretrained(f"local-dir:{tmp_path / 'long'}", None, 512, 246)
    assert longer.stretch.describe() == {"from": 248, "to": 512, "kept": 246, "ratio": 133.0, "extrapolated": 132}
    assert torch.equal(longer.model.positional_embedding[:246], clip.stretched(248).model.positional_embedding[:246])
    same = load_pretrained(f"local-dir:{tmp_path / 'long'}", None, 248)
    assert same.stretch.describe() == {"from": 248, "to": 248, "kept": 248, "ratio": 1.0, "extrapolated": 0}
    for length, keep, message in ((120, 20, "base.context_length = 120: the model has 248"), (512, 247, "expected 0 to 246")):
        with pytest.raises(ModelError, match=message):
            load_pretrained(f"local-dir:{tmp_path / 'long'}", None, length, keep)


def test_save_and_load(clip, images, tokens, tmp_path):
    stretched = clip.stretched(120)
    stretched.save(tmp_path / "model", {"method": "fast_goal", "metrics": {"loss": 1.5}})
    loaded = Clip.load(tmp_path / "model").eval()
    assert (loaded.name, loaded.context_length) == ("scratch", 120)
    assert loaded.state_dict().keys() == stretched.state_dict().keys()
    assert all(torch.equal(weight, stretched.state_dict()[name]) for name, weight in loaded.state_dict().items())
    info = json.loads((tmp_path / "model/fast_goal.json").read_text())
    assert info == {"method": "fast_goal", "metrics": {"loss": 1.5}, "name": "scratch"}
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(files) == 3 and len(set(files.values())) == 1


def test_save_replaces_the_older_folder_whole(clip, tmp_path):
    clip.save(tmp_path / "model", {"run": 1})
    (tmp_path / "model/left_over").touch()
    for killed in (".model.1.tmp", ".model.1.old"):  # halves of a save that was killed
        (tmp_path / killed).mkdir()
        (tmp_path / killed / "open_clip_model.safetensors").touch()
    clip.save(tmp_path / "model", {"run": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model/left_over").exists()
    assert json.loads((tmp_path / "model/fast_goal.json").read_text())["run"] == 2


def test_failed_save_leaves_the_older_folder(clip, tmp_path):
    clip.save(tmp_path / "model", {"run": 1})
    with pytest.raises(ValueError):
        clip.save(tmp_path / "model", {"run": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert json.loads((tmp_path / "model/fast_goal.json").read_text())["run"] == 1


def test_open_clip_loads_the_folder(clip, images, tmp_path):
    stretched = clip.stretched(248).eval()
    stretched.save(tmp_path / "model", {})
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    model.eval()
    long = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")(TEXTS)
    assert long.shape[1] == 248
    close(model.encode_image(images, normalize=True), stretched.encode_image(images))
    close(model.encode_text(long, normalize=True), stretched.encode_text(long))
    random = np.random.default_rng(0)
    for height, width in ((40, 70), (70, 40), (32, 32), (20, 27)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        close(stretched.view(width, height).apply(image), preprocess(image), atol=1e-5)


def test_view_mode_is_saved_as_open_clips_resize_mode(tmp_path):
    clip = build_scratch(ScratchConfig(**TINY))
    assert clip.view(40, 30).mode == "crop"
    clip.view_mode = "squash"
    clip.save(tmp_path / "model", {})
    assert json.loads((tmp_path / "model/open_clip_config.json").read_text())["preprocess_cfg"]["resize_mode"] == "squash"
    loaded = Clip.load(tmp_path / "model")
    assert loaded.view(40, 30).mode == "squash" and loaded.stretched(100).view_mode == "squash"


def write_local(folder, config: dict, preprocess: dict | None = None, weights: dict | None = None) -> str:
    """A folder as open_clip itself would publish it; random weights unless given."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}}))
    if weights is None:
        custom = config.get("custom_text", False)
        arguments = {key: value for key, value in copy.deepcopy(config).items() if key != "custom_text"}
        weights = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_load_pretrained_from_a_folder(clip, images, tokens, tmp_path):
    mean = (0.1, 0.2, 0.3)
    model = write_local(tmp_path / "base", clip.config, {"mean": mean}, clip.model.state_dict())
    loaded = load_pretrained(model, "ignored", 100, keep_positions=30).eval()
    assert loaded.context_length == 100 and loaded.mean == mean and loaded.name == model
    close(loaded.encode_image(images), clip.encode_image(images))
    close(loaded.encode_text(tokens[:2, :25]), clip.encode_text(tokens[:2, :25]))
    assert torch.equal(loaded.model.positional_embedding[:30], clip.model.positional_embedding[:30])


def test_quick_gelu_of_a_folder_survives(clip, images, tmp_path):
    model = write_local(tmp_path / "base", clip.config | {"quick_gelu": True}, weights=clip.model.state_dict())
    loaded = load_pretrained(model, None, 100).eval()
    assert not torch.allclose(loaded.encode_image(images), clip.encode_image(images), atol=1e-4)
    loaded.save(tmp_path / "saved", {})
    assert json.loads((tmp_path / "saved/open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is True
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")
    activations = [module for module in again.modules() if isinstance(module, open_clip.transformer.QuickGELU)]
    assert len(activations) == 4 and not any(isinstance(module, nn.GELU) for module in again.modules())
    close(again.eval().encode_image(images, normalize=True), loaded.encode_image(images))


@pytest.mark.parametrize("of_model", [False, True])
@pytest.mark.parametrize("of_weights", [False, True])
def test_named_weights_get_the_activation_they_were_trained_with(clip, images, tmp_path, monkeypatch, of_model, of_weights):
    """`ViT-B-16` with `openai` is the case at hand: open_clip builds it with GELU and only warns."""
    write_local(tmp_path / "base", clip.config, weights=clip.model.state_dict())
    tag = {"file": str(tmp_path / "base/open_clip_model.safetensors"), "quick_gelu": of_weights}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", clip.config | {"quick_gelu": of_model})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"fake": tag})
    loaded = load_pretrained("tiny", "fake", 100).eval()
    assert loaded.name == "tiny/fake" and loaded.config["quick_gelu"] is of_weights
    quick = any(isinstance(module, open_clip.transformer.QuickGELU) for module in loaded.modules())
    assert quick is of_weights
    assert torch.allclose(loaded.encode_image(images), clip.encode_image(images), atol=1e-5) is not of_weights


def test_weights_that_cannot_be_had(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(ModelError, match=r"ViT-B-16/openai cannot be loaded: .*no route to host\n.*base.kind=scratch"):
        load_pretrained("ViT-B-16", "openai", 248)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-16", None, "base.pretrained is null"),
        ("ViT-B/16", "openai", "closest names are ViT-B-16"),
        ("ViT-B-16", "no_such_tag", "no_such_tag"),
        ("local-dir:/no/such/folder", None, "/no/such/folder"),
    ],
)
def test_wrong_names(model, pretrained, message):
    with pytest.raises(ModelError, match=message):
        load_pretrained(model, pretrained, 248)


def test_broken_folders(clip, tmp_path):
    with pytest.raises(ModelError, match="nothing"):
        Clip.load(tmp_path / "nothing")
    clip.save(tmp_path / "model", {})
    weights = tmp_path / "model/open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"scratch cannot be loaded.*\n.*model anew"):
        Clip.load(tmp_path / "model")
    weights.unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        Clip.load(tmp_path / "model")


class Malicious:
    def __reduce__(self):
        import os

        return os.mkdir, ("executed",)


def test_no_pickled_code_is_run(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip.save("model", {})
    (tmp_path / "model/open_clip_model.safetensors").unlink()
    torch.save({"state_dict": Malicious()}, "model/open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Clip.load("model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("vision", "text", "top", "message"),
    [
        ({"pool_type": "avg"}, {}, {}, "does not pool by the class token"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, {}, {}, "does not pool by the class token"),
        ({"patch_dropout": 0.5}, {}, {}, "drops patches"),
        ({"layers": [1, 1, 1, 1]}, {}, {}, "ModifiedResNet, not a vision transformer"),
        ({"image_size": [32, 48]}, {}, {}, "not square"),
        ({}, {"pool_type": "last"}, {}, "does not pool by the end-of-text"),
        ({}, {"no_causal_mask": True}, {"custom_text": True}, "CustomTextCLIP, not a CLIP"),
        ({}, {"proj_bias": True}, {}, "not a plain matrix"),
        ({}, {"vocab_size": 1000}, {}, "tokenizer is not CLIP's"),
        ({}, {"tokenizer_kwargs": {"clean": "canonicalize"}}, {}, "tokenizer is not CLIP's"),
        ({}, {}, {"init_logit_bias": -10}, "its loss has a bias"),
    ],
)
def test_unsuitable_models(clip, tmp_path, vision, text, top, message):
    config = copy.deepcopy(clip.config) | top
    config["vision_cfg"] |= vision
    config["text_cfg"] |= text
    with pytest.raises(ModelError, match=message):
        load_pretrained(write_local(tmp_path / "base", config), None, 100)


def test_other_interpolation_is_refused(clip, tmp_path):
    model = write_local(tmp_path / "base", clip.config, {"interpolation": "bilinear"}, clip.model.state_dict())
    with pytest.raises(ModelError, match="does not resize bicubically"):
        load_pretrained(model, None, 100)


def test_a_pooling_is_saved_and_brought_along(tmp_path):
    made = build_scratch(ScratchConfig(**TINY), seed=3)
    made.add_pooling(2, seed=5)
    made.save(tmp_path / "pooled", {})
    started = load_pretrained(f"local-dir:{tmp_path / 'pooled'}", None, 100)
    for again in (Clip.load(tmp_path / "pooled"), started):
        assert again.pooling.pooling.heads == 2
        for name, value in made.pooling.state_dict().items():
            assert torch.equal(again.pooling.state_dict()[name], value), name
    (tmp_path / "pooled" / "pooling.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match=r"pooling\.safetensors cannot be loaded"):
        Clip.load(tmp_path / "pooled")


def test_heads_that_do_not_divide_the_width():
    made = build_scratch(ScratchConfig(**TINY), seed=3)
    with pytest.raises(ConfigError, match="heads = 5"):
        made.add_pooling(5)
