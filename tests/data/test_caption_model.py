"""The captioner `transformers` with a tiny random LLaVA-NeXT in its true format."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_llava
import torch
import yaml
from PIL import Image

from fast_goal.config import build
from fast_goal.configure import CONF
from fast_goal.data.captioning import Answer, CaptionerConfig, Failure, captioner_key, load_captioner, model_view
from fast_goal.errors import ConfigError, ModelError

WHERE = "download.datasets.glit"
SECTION = yaml.safe_load((CONF / "dataset/captioned.yaml").read_text())["download"]["datasets"]["glit"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_llava.save(tmp_path_factory.mktemp("tiny_llava"))


def config(model: object, local: dict | None = None, **values: object) -> CaptionerConfig:
    section = SECTION["captioner"] | {"model": str(model), "max_new_tokens": 24} | values
    section["transformers"] = section["transformers"] | {"batch_size": 4} | (local or {})
    return build(CaptionerConfig, section, f"{WHERE}.captioner")


def images(count: int = 9) -> list[Image.Image]:
    """Noise of different sizes, so that the prompts of a batch differ in length."""
    generator = np.random.default_rng(0)
    sizes = [(30, 40), (200, 50), (64, 64), (50, 300), (1, 1), (1, 900), (900, 1), (2, 3), (31, 33)]
    return [Image.fromarray(generator.integers(0, 256, (*sizes[i % 9], 3), dtype=np.uint8)) for i in range(count)]


@pytest.fixture(scope="module")
def captioner(tiny):
    return load_captioner(config(tiny), "Describe the image.", WHERE)


def test_a_batch_says_what_each_image_alone_says(captioner):
    pictures = images()
    together = captioner.caption(pictures)
    alone = [captioner.caption([picture])[0] for picture in pictures]
    assert together == alone
    assert len({answer.text for answer in together}) >= 6, "the picture must matter, or this test shows nothing"
    assert all(answer.finish == "stop" for answer in together)
    assert captioner.caption(pictures[::-1]) == alone[::-1]


def test_the_answer_is_what_the_model_says_by_hand(captioner, tiny):
    """The oracle: one image, no padding, the processor's and the model's own functions."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

    processor = LlavaNextProcessor.from_pretrained(tiny)
    model = LlavaNextForConditionalGeneration.from_pretrained(tiny).eval()
    for picture in images(3):
        text = "[INST] <image>\nDescribe the image. [/INST]"
        inputs = processor(text=text, images=picture, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(out, skip_special_tokens=True)
        assert captioner.caption([picture])[0].text == expected
        assert all(sentence.strip() in str(tiny_llava.SENTENCES) for sentence in expected.split(". "))


def test_a_cut_answer_is_marked(tiny):
    answers = load_captioner(config(tiny, max_new_tokens=6), "Describe the image.", WHERE).caption(images())
    full = load_captioner(config(tiny), "Describe the image.", WHERE).caption(images())
    assert {answer.finish for answer in answers} == {"stop", "length"}
    for answer, whole in zip(answers, full, strict=True):
        assert whole.text.startswith(answer.text)
        assert (answer.finish == "stop") == (answer.text == whole.text)


def test_the_prompt_and_the_settings_reach_the_model(tiny, captioner):
    pictures = images(4)
    usual = captioner.caption(pictures)
    assert load_captioner(config(tiny), "Name three colours, nothing else.", WHERE).caption(pictures) != usual
    sampled = load_captioner(config(tiny, temperature=50.0), "Describe the image.", WHERE).caption(pictures)
    assert sampled != usual
    longer = load_captioner(config(tiny, {"min_new_tokens": 12}), "Describe the image.", WHERE).caption(pictures)
    assert all(answer.text.count(".") >= 11 for answer in longer)


def test_memory_that_does_not_suffice_halves_the_batch(tiny, monkeypatch):
    captioner = load_captioner(config(tiny, {"batch_size": 8}), "Describe the image.", WHERE)
    expected = captioner.caption(images())
    sizes, generate = [], captioner._model.generate

    def limited(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return generate(**inputs)

    monkeypatch.setattr(captioner._model, "generate", limited)
    assert captioner.caption(images()) == expected
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    assert captioner.batch_size == 2 and "halved 2 times, to 2" in captioner.notes()[0]
    monkeypatch.setattr(captioner._model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(ModelError, match=r"not even one image.*glit\.captioner\.max_side"):
        captioner.caption(images(1))


def test_an_image_the_model_cannot_take_is_the_only_one_lost(tiny, monkeypatch):
    captioner = load_captioner(config(tiny), "Describe the image.", WHERE)
    pictures = images(4)
    expected = captioner.caption(pictures)
    processor = captioner._processor

    class Choosy:
        tokenizer, batch_decode = processor.tokenizer, processor.batch_decode

        def __call__(self, images, **rest):
            if any(image.size == pictures[2].size for [image] in images):
                raise ValueError("this size is not for me")
            return processor(images=images, **rest)

    monkeypatch.setattr(captioner, "_processor", Choosy())
    found = captioner.caption(pictures)
    assert found[2] == Failure("model failed", "ValueError: this size is not for me")
    assert found[:2] + found[3:] == expected[:2] + expected[3:]


def test_a_prompt_beyond_the_context_is_named(tiny):
    captioner = load_captioner(config(tiny), "word " * 10_000, WHERE)
    with pytest.raises(ModelError, match=r"50,\d+ tokens.*context of 4,096.*glit\.prompt"):
        captioner.caption(images(1))


def test_an_empty_prompt_stops_at_once(tiny):
    with pytest.raises(ConfigError, match=r"glit\.prompt is empty"):
        load_captioner(config(tiny), " \n", WHERE)


def test_weights_that_are_not_there_say_the_way_out(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"(?s)captioner\.model = 'no/such-model'.*hf download no/such-model.*kind=server"):
        load_captioner(config("no/such-model"), "Describe.", WHERE)
    with pytest.raises(ModelError, match=r"captioner\.model"):
        load_captioner(config(tmp_path), "Describe.", WHERE)
    # weights that would have to be unpickled are not read
    shutil.copytree(tiny, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_captioner(config(tmp_path / "pickled"), "Describe.", WHERE)


def test_a_model_without_a_chat_template_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="chat template"):
        load_captioner(config(folder), "Describe.", WHERE)


def test_the_first_token_stands_there_once_whoever_writes_it(captioner, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    values = json.loads((folder / "tokenizer.json").read_text())
    begin = captioner._processor.tokenizer.bos_token_id
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}}
    values["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    for text in (template, "{{ bos_token }}" + template):
        (folder / "chat_template.jinja").write_text(text)
        captioner = load_captioner(config(folder), "Describe.", WHERE)
        seen, generate = [], captioner._model.generate
        captioner._model.generate = lambda **inputs: seen.append(inputs["input_ids"]) or generate(**inputs)  # noqa: B023
        captioner.caption(images(1))
        assert (seen[0][0] == begin).sum() == 1 and seen[0][0, 0] == begin


def test_code_that_comes_with_a_model_is_not_run(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["model_type"] = "not_known_here"
    values["auto_map"] = {name: "own.Own" for name in ("AutoConfig", "AutoModelForImageTextToText")}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Own: pass\n")
    with pytest.raises(ModelError):
        load_captioner(config(folder), "Describe.", WHERE)
    assert not (tmp_path / "ran").exists()


def test_the_key_changes_with_whatever_changes_the_answer(tiny, tmp_path):
    base = config(tiny)
    key = captioner_key(base, "Describe.")
    same = [dataclasses.replace(base, transformers=dataclasses.replace(base.transformers, batch_size=1))]
    same.append(dataclasses.replace(base, server=dataclasses.replace(base.server, url="http://localhost:1/v1")))
    assert {captioner_key(other, "Describe.") for other in same} == {key}
    other = [config(tiny, max_new_tokens=25), config(tiny, temperature=0.5), config(tiny, max_side=64)]
    other += [config(tiny, {"revision": "v1"}), config(tiny, {"min_new_tokens": 1}), config("another")]
    other.append(config("another", kind="server"))
    retrained = tiny_llava.save(tmp_path / "retrained", seed=1)
    other.append(config(retrained))
    keys = [captioner_key(one, "Describe.") for one in other] + [captioner_key(base, "Describe it.")]
    assert len({key, *keys}) == len(keys) + 1
    moved = shutil.copytree(tiny, tmp_path / "moved")
    weights = captioner_key(dataclasses.replace(config(moved), model=str(tiny)), "Describe.")
    assert weights == key


def test_an_unknown_kind_names_the_known_ones(tiny):
    with pytest.raises(ConfigError, match=r"captioner\.kind = 'magic'.*server, transformers"):
        load_captioner(config(tiny, kind="magic"), "Describe.", WHERE)


@pytest.mark.parametrize("size, expected", [((2000, 1000), (100, 50)), ((100, 40), (100, 40)), ((1, 5000), (1, 100))])
def test_large_images_are_made_smaller_for_the_model(size, expected):
    assert model_view(Image.new("RGB", size), 100).size == expected


@pytest.mark.gpu
def test_on_a_gpu_in_bf16(tiny, monkeypatch):
    monkeypatch.setenv("FAST_GOAL_DEVICE", "cuda")
    captioner = load_captioner(config(tiny), "Describe the image.", WHERE)
    assert captioner._model.dtype == torch.bfloat16 and captioner._model.device.type == "cuda"
    answers = captioner.caption(images())
    assert all(isinstance(answer, Answer) and answer.text for answer in answers)
