"""Texts of any length, end to end: everything that reads text follows the context of the model, and counts what it cuts off.

The oracle is open_clip: its own tokenizer, and its own text pass over the whole context.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.data import expectations
from fast_goal.data.captions import split_sentences, token_span, tokenize
from fast_goal.data.records import PAIRS, REGIONS, SKIPPED, load_dataset, read_table, write_dataset, write_table
from fast_goal.environment import prepare
from fast_goal.evaluation.embedding import answer, questions
from fast_goal.flism.engine import extract
from fast_goal.model.clip import Clip
from fast_goal.model.export import export
from fast_goal.objectives import make_objective
from fast_goal.stages import base, flism, validate
from fast_goal.tracking import NullTracker
from fast_goal.tracking.pyfunc import Embedder
from fast_goal.training.batches import PairDataset
from fast_goal.training.schedule import make_optimizer
from fast_goal.training.step import TrainStep

prepare()
import open_clip  # noqa: E402  after prepare, which makes torchvision importable

CONTEXTS = [77, 120, 248, 400, 512]
RATIOS = {77: 1, 120: 100 / 57, 248: 4, 400: 380 / 57, 512: 492 / 57}
EXTRAPOLATED = {77: 0, 120: 1, 248: 3, 400: 6, 512: 8}  # rows read off beyond row 76
REPEATS = [1, 8, 14, 22, 40, 60, 90]  # of a sentence: captions of some 20 to 640 tokens
SMALL = {
    "base.detector.kind": "none",
    "base.scratch.split": "train",
    **{f"base.scratch.{name}": size for name, size in tiny.CLIP.items()},
    "base.scratch.steps": 1,
    "base.scratch.batch_size": 4,
    "flism.regions": "spatial",
    "validate.max_cut_off": 0.0,
}


def settings(context: int) -> Params:
    values = {**SMALL, "base.context_length": context}
    return build(Params, compose([f"{key}={value}" for key, value in values.items()]), "params.yaml")


def captions() -> list[str]:
    """The last one is a single sentence."""
    made = [f"This is number {count}." + " A red box stands at the left." * count for count in REPEATS]
    return [*made, "A wall of" + " red and blue" * 200 + " stones."]


@functools.cache
def counter() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=2000)


def length(text: str) -> int:
    """Tokens, start and end included, by open_clip's tokenizer."""
    return int((counter()(text) != 0).sum())


def write_project() -> None:
    root = Path("data/datasets/scenes")
    root.mkdir(parents=True)
    rows, pairs = [], []
    for number, caption in enumerate(captions()):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        last = split_sentences(caption)[-1]
        rows.append(
            {
                "image_id": str(number),
                "image_path": f"{number}.png",
                "width": 48,
                "height": 40,
                "split": "train",
                "long_caption": caption,
                "captions": ["A red box.", f"Box {number}."],
                "source": "scenes",
                "content_hash": hashlib.sha256((root / f"{number}.png").read_bytes()).hexdigest(),
            }
        )
        place = {"char_start": last.start, "char_end": last.end, "x1": 4.0, "y1": 4.0, "x2": 30.0, "y2": 30.0}
        pairs.append(
            {
                "image_id": str(number),
                "rank": 1,
                "sentence_index": 0,
                "sentence": last.text,
                "region_index": 0,
                "kind": "quadrant",
                "similarity": 0.3,
                "weight": 1.0,
                **place,
            }
        )
    write_dataset("scenes", root, rows, [], source="scenes")
    write_table("data/flism/scenes/pairs.parquet", pairs, PAIRS)
    region = {"region_index": 0, "x1": 4.0, "y1": 4.0, "x2": 30.0, "y2": 30.0, "kind": "quadrant", "label": "", "score": 1.0}
    write_table("data/flism/scenes/regions.parquet", [{"image_id": row["image_id"], **region} for row in rows], REGIONS)
    write_table("data/flism/scenes/skipped.parquet", [], SKIPPED)


@pytest.fixture(scope="module", params=CONTEXTS)
def made(request, tmp_path_factory) -> tuple[int, Path]:
    """A project after the step `base`, and its context."""
    folder = tmp_path_factory.mktemp(f"context{request.param}")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        write_project()
        base.main(settings(request.param), NullTracker())
    return request.param, folder


@pytest.fixture
def context(made, monkeypatch) -> int:
    monkeypatch.chdir(made[1])
    return made[0]


def open_clips(texts: list[str]) -> torch.Tensor:
    """What open_clip itself makes of the texts: its model and tokenizer of the base's folder. [B, D], unit length."""
    model, _, _ = open_clip.create_model_and_transforms("local-dir:models/base/clip")
    tokenizer = open_clip.get_tokenizer("local-dir:models/base/clip")
    with torch.no_grad():
        return model.eval().encode_text(tokenizer(texts), normalize=True)


def test_the_base_states_its_context_and_how_it_was_stretched(context):
    config = json.loads(Path("models/base/clip/open_clip_config.json").read_text())["model_cfg"]
    assert config["text_cfg"]["context_length"] == context
    assert open_clip.get_tokenizer("local-dir:models/base/clip").context_length == context
    positions = json.loads(Path("models/base/metrics.json").read_text())["positions"]
    kept = 77 if context == 77 else 20
    expected = {"from": 77, "to": context, "kept": kept, "ratio": RATIOS[context], "extrapolated": EXTRAPOLATED[context]}
    assert positions == pytest.approx(expected)
    assert json.loads(Path("models/base/clip/fast_goal.json").read_text())["metrics"]["positions"] == positions


def test_a_saved_model_is_open_clips(context, tmp_path):
    clip = Clip.load("models/base/clip").eval()
    assert clip.context_length == context and clip.model.positional_embedding.shape == (context, 16)
    clip.save(tmp_path / "copy", {})
    again = Clip.load(tmp_path / "copy").eval()
    tokens, lengths = tokenize(captions(), context)
    assert lengths.tolist() == [length(text) for text in captions()]
    with torch.no_grad():
        torch.testing.assert_close(again.encode_text(tokens), open_clips(captions()), rtol=0, atol=1e-6)


def test_spans_end_where_the_context_does(context):
    for caption in captions():
        for sentence in split_sentences(caption):
            first = length(caption[: sentence.start]) - 1  # the end token does not count
            last = min(first + length(sentence.text) - 2, context - 1)
            expected = (first, last) if first < last else (0, 0)
            assert token_span(caption, sentence.start, sentence.end, context) == expected


def test_training_counts_what_it_cuts_off_and_learns_the_positions_it_sees(context):
    dataset, clip = load_dataset("scenes"), Clip.load("models/base/clip").train()
    pairs = read_table("data/flism/scenes/pairs.parquet", PAIRS)
    samples = PairDataset(dataset, "train", pairs, clip)
    texts = dataset.split("train")["long_caption"].tolist()
    used = pairs[pairs["image_id"].isin(dataset.split("train")["image_id"])]
    starts = [length(caption[: pair.char_start]) - 1 for caption, pair in zip(texts, used.itertuples(), strict=True)]
    assert samples.counts["truncated_captions"] == sum(length(text) > context for text in texts)
    assert samples.counts["truncated_sentences"] == sum(length(text) > context for text in used["sentence"])
    assert samples.counts["without_visible_span"] == sum(start >= context - 1 for start in starts)

    before = clip.model.positional_embedding.detach().clone()
    optimizer = make_optimizer(clip.parameters(), 1e-3, weight_decay=0.0)
    values = TrainStep(clip, make_objective(settings(context).objective), optimizer)([samples[list(range(len(samples)))]])
    assert torch.isfinite(values["loss"])
    changed = (clip.model.positional_embedding.detach() != before).any(dim=1)  # [L]
    assert changed.nonzero().max() == min(max(map(length, texts)), context) - 1


def test_flism_counts_sentences_that_are_too_long(context):
    params = settings(context)
    dataset = load_dataset("scenes")
    clip, detector = flism.load_models(params, dataset, torch.device("cpu"))
    result = extract(dataset, clip, detector, params.flism, Path("cache"), records=dataset.split("train"))
    sentences = [sentence.text for text in dataset.split("train")["long_caption"] for sentence in split_sentences(text)]
    cut = sum(length(text) > context for text in sentences)
    assert cut == (1 if context < 600 else 0)
    assert result.metrics["truncated_sentences"] == cut
    assert result.metrics["truncated_share"] == pytest.approx(cut / len(sentences))


def test_validation_names_the_context_and_the_share_beyond_it(context):
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(expectations, "stop_on_failure", lambda outcomes, *_: found.update(outcomes=outcomes))
        validate.main(settings(context), NullTracker())
    share = np.mean([length(text) > context for text in captions()])
    (outcome,) = [each for each in found["outcomes"] if f"than the {context} tokens" in each.rule.title]
    assert outcome.passed == (share == 0)
    assert outcome.failing == sum(length(text) > context for text in captions())
    note = f"{share:.1%} have more than {context} tokens"
    assert note in Path("data/validation/data_card.md").read_text()
    assert note in Path("data/validation/summary.md").read_text()


def test_evaluation_embeds_and_measures_lengths(context):
    asked = questions(load_dataset("scenes"), "train")
    clip = Clip.load("models/base/clip")
    found = answer(clip, asked, 3, torch.device("cpu"))
    texts = asked.long.texts
    assert found.text_lengths[found.rows(texts)].tolist() == [length(text) for text in texts]
    torch.testing.assert_close(found.text_features[found.rows(texts)], open_clips(texts), rtol=0, atol=1e-6)
    assert found.context_length == context


def test_the_served_model_reads_as_far_and_says_what_it_cut(context, caplog):
    rows = Embedder(Clip.load("models/base/clip").eval()).predict(pd.DataFrame({"text": captions()}))
    torch.testing.assert_close(torch.tensor(rows["embedding"].tolist()), open_clips(captions()), rtol=0, atol=1e-6)
    cut = sum(length(text) > context for text in captions())
    assert f"{cut} of {len(captions())} texts" in caplog.text and f"the model's {context} tokens" in caplog.text


def test_exports_read_as_far(context, tmp_path):
    transformers = pytest.importorskip("transformers")
    runtime = pytest.importorskip("onnxruntime")
    clip = Clip.load("models/base/clip")
    for format in ("huggingface", "onnx"):
        export(clip, tmp_path / format, format)
    config = json.loads((tmp_path / "huggingface/config.json").read_text())
    assert config["text_config"]["max_position_embeddings"] == context
    assert transformers.CLIPTokenizer.from_pretrained(tmp_path / "huggingface").model_max_length == context
    session = runtime.InferenceSession(tmp_path / "onnx/text.onnx", providers=["CPUExecutionProvider"])
    tokens, expected = tokenize(captions(), context)[0], open_clips(captions())
    (whole,) = session.run(None, {"input_ids": tokens.numpy()})
    torch.testing.assert_close(torch.from_numpy(whole), expected, rtol=0, atol=1e-4)
    (short,) = session.run(None, {"input_ids": tokens[:1, : length(captions()[0])].numpy()})
    torch.testing.assert_close(torch.from_numpy(short), expected[:1], rtol=0, atol=1e-4)
