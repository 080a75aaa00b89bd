"""The advice on memory, on tiny models: what it reads, what it says, and that what it says holds."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from small_training import params, write_project
from typer.testing import CliRunner

from fast_goal import cli
from fast_goal.config import Params, build, load_params, to_dict
from fast_goal.configure import compose
from fast_goal.data.records import NEGATIVES, write_table
from fast_goal.errors import ConfigError, ModelError
from fast_goal.model.clip import build_scratch
from fast_goal.stages import advice

MEGABYTE = 10**6
PLENTY = 10**12


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def settings(*overrides: str) -> Params:
    return params("finetune.processes=1", "finetune.batch_size=512", *overrides)


def needed(text: str, settings: str) -> float:
    """GB of the configured batch with these settings, from the table."""
    line = next(line for line in text.splitlines() if re.match(rf"{settings}( \(|  )", line))
    return float(re.search(r"MB +([\d.]+) GB", line)[1])


def write_params(settings: Params) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(to_dict(settings)))


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("24g", 24 * 10**9), ("1.5TiB", 3 * 2**39), ("40000MB", 4 * 10**10)],
)
def test_sizes(text, size):
    assert advice.memory_size(text) == size


@pytest.mark.parametrize("text", ["24", "much", "-3GB", "24 GBit", "", "0GB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match=r"--memory .*24GiB"):
        advice.memory_size(text)


def test_nothing_is_changed_where_all_fits():
    text = advice.advise(settings(), PLENTY)
    assert "change nothing. A batch of 512 fits as set" in text and "Set in params.yaml" not in text
    assert "bf16 (as set)" in text and "fp32" not in text
    assert "long captions of 248 tokens, the context, as there is no data yet" in text
    assert "section `base`, as there is no model yet" in text


def test_a_quicker_setting_that_fits_too_is_named():
    text = advice.advise(settings("finetune.checkpointing=true", "finetune.accumulate=2"), PLENTY)
    assert "bf16 would fit too, and take 40% less time" in text
    assert "finetune.checkpointing=false finetune.accumulate=1" in text


def test_bf16_comes_first():
    slow = settings("finetune.precision=fp32")
    whole = needed(advice.advise(slow, PLENTY), "fp32")
    half = needed(advice.advise(slow, PLENTY), "bf16")
    assert half < whole
    text = advice.advise(slow, int((whole + half) / 2 * 1e9))
    assert "Advice: bf16. A batch of 512 then fits" in text
    assert "Set in params.yaml: finetune.precision=bf16\n" in text


def test_the_advised_setting_fits_and_composes():
    large = ("finetune.batch_size=4096",)
    table = advice.advise(settings(*large), PLENTY)
    memory = int((needed(table, "bf16, checkpointing") + 0.1) * 1e9)
    assert memory < needed(table, "bf16") * 1e9
    text = advice.advise(settings(*large), memory)
    assert "bf16, checkpointing (advised)" in text and "Set in params.yaml: finetune.checkpointing=true" in text
    (command,) = re.findall(r"fast-goal configure (.*) \(and", text)
    assert build(Params, compose(command.split()), "params.yaml").finetune.checkpointing
    again = advice.advise(settings(*large, "finetune.checkpointing=true"), memory)
    assert "change nothing" in again


def test_a_batch_that_never_fits_is_made_smaller():
    big = settings("finetune.batch_size=1000000")
    text = advice.advise(big, 1000 * MEGABYTE)
    (size,) = map(int, re.findall(r"The largest that does is (\d+)", text))
    assert 0 < size < 1_000_000 and f"finetune.batch_size={size}" in text
    assert "not a single sample fits" in advice.advise(settings(), 500 * MEGABYTE)


def test_data_and_model_are_looked_at_where_they_are():
    write_project()
    build_scratch(params().base.scratch, context_length=120).save("models/base/clip", {"step": "base"})
    text = advice.advise(settings(), PLENTY)
    assert "A training step of scratch (models/base/clip)" in text
    # start, This is picture number 8. A yellow box is at the left. end; and the sentence alone
    assert "long captions of up to 16 tokens; local pairs per image: 1, sentences of up to 10 tokens" in text


def test_an_objective_without_local_pairs():
    assert "local pairs" not in advice.advise(settings("objective=global"), PLENTY)


def test_sub_captions():
    text = advice.advise(settings("objective=flair"), PLENTY)
    assert "sub-captions per caption: 8, of 77 tokens (a guess)" in text and "local pairs" not in text
    captions = ["One. Two words. Three words more. And four.", "A dog. A cat. A horse.", ""]
    # start, end, and of the longest caption the two longest sentences: four and three tokens with their stops
    assert advice._longest_part(captions, 2, 77) == 2 + 4 + 3
    assert advice._longest_part(captions, 2, 6) == 6 and advice._longest_part(captions, 9, 77) == 2 + 2 + 3 + 4 + 3


def test_hard_negatives_and_the_teacher():
    some = settings("objective=degla", "negatives=rules", "negatives.per_caption=3")
    text = advice.advise(some, PLENTY)
    assert "hard negatives per caption: 3, of 248 tokens (a guess)" in text and "AdamW's two averages, the teacher. per" in text
    assert needed(text, "bf16") > needed(advice.advise(settings("objective=global"), PLENTY), "bf16")
    write_project()
    rows = [
        {"image_id": f"train-{number}", "caption": "One.", "negative": "A blue box is there.", "type": "reshuffle", "seed": 0}
        for number in (0, 1, 1)
    ]
    write_table(Path("data/negatives/scenes.parquet"), [row | {"generator": "test"} for row in rows], NEGATIVES)
    assert "hard negatives per caption: 2, of up to 8 tokens" in advice.advise(some, PLENTY)
    short = settings("objective=global", "finetune.captions=short")
    assert "Samples: short captions of up to 7 tokens. " in advice.advise(short, PLENTY)


def test_the_first_stage():
    with pytest.raises(ConfigError, match=r"intermediate\.dataset is null"):
        advice.advise(settings(), PLENTY, intermediate=True)
    two = settings("intermediate.dataset=scenes", "intermediate.training.batch_size=77", "intermediate.training.processes=1")
    text = advice.advise(two, PLENTY, intermediate=True)
    assert "`intermediate.training`" in text and "Batch: 77." in text


def test_a_pretrained_model_needs_no_weights():
    build_scratch(params().base.scratch, context_length=120).save("elsewhere", {})
    Path("elsewhere/open_clip_model.safetensors").unlink()
    chosen = ("base.kind=pretrained", "base.model=local-dir:elsewhere")
    text = advice.advise(settings(*chosen), PLENTY)
    assert "A training step of local-dir:elsewhere (section `base`" in text and "long captions of 248 tokens" in text
    with pytest.raises(ModelError, match=r"base\.context_length = 77: the model has 120"):
        advice.advise(settings(*chosen, "base.context_length=77"), PLENTY)
    with pytest.raises(ModelError, match="ViT-B/16: its configuration cannot be had"):
        advice.advise(settings("base.kind=pretrained", "base.model=ViT-B/16"), PLENTY)


def test_the_command(monkeypatch):
    ran = []
    monkeypatch.setattr("fast_goal.stages.run", ran.append)
    monkeypatch.setenv("FAST_GOAL_DEVICE", "cpu")
    write_params(settings())
    assert load_params() == settings()
    runner = CliRunner()
    shown = runner.invoke(cli.app, ["finetune", "advise", "--memory", "1TB"])
    assert shown.exit_code == 0 and "Advice: change nothing" in shown.output and not ran
    without = runner.invoke(cli.app, ["finetune", "advise"])
    assert isinstance(without.exception, ConfigError) and "--memory is required" in str(without.exception)
    assert runner.invoke(cli.app, ["finetune"]).exit_code == 0 and ran == ["finetune"]
    assert "advise" in runner.invoke(cli.app, ["finetune", "--help"]).output


@pytest.mark.gpu
def test_the_memory_is_that_of_the_gpu(monkeypatch):
    monkeypatch.delenv("FAST_GOAL_DEVICE")
    write_params(settings())
    total = torch.cuda.get_device_properties(0).total_memory
    assert f"on a GPU with {total / 1e9:.1f} GB" in advice.run(None)
