"""The generator `llm` with a tiny random language model in its true format, and the drawing of tokens."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
import tiny_text

from fast_goal.config import NEGATIVE_TYPES, NegativesConfig, build
from fast_goal.configure import CONF
from fast_goal.data.generation import Answer, Failure
from fast_goal.data.generation.text import Draws, Question, TextModel
from fast_goal.errors import ModelError
from fast_goal.negatives.llm import LanguageModel

SECTION = yaml.safe_load((CONF / "negatives/none.yaml").read_text()) | {"generator": "llm"}
OPTIONS = {"revision": None, "precision": "auto", "batch_size": 4, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_text.save(tmp_path_factory.mktemp("tiny_text"))


@pytest.fixture
def model(loaded):
    """The shared model as it was loaded."""
    loaded.batch_size, loaded._halved = 4, 0
    return loaded


@pytest.fixture(scope="module")
def loaded(tiny) -> TextModel:
    return TextModel(str(tiny), "negatives.llm", **OPTIONS)


def config(name: object, **values: object) -> NegativesConfig:
    llm = SECTION["llm"] | {"model": str(name), "max_new_tokens": 24} | values
    return build(NegativesConfig, SECTION | {"per_caption": 3, "llm": llm}, "negatives")


def questions(temperature: float = 0.0) -> list[Question]:
    return [Question(f"{'What? ' * (3 * place % 7)}Caption {place}", place, temperature) for place in range(9)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_says_what_each_question_alone_says(model, temperature):
    ones = questions(temperature)
    together = model.answer(ones)
    assert together == [model.answer([one])[0] for one in ones]
    assert together[::-1] == model.answer(ones[::-1])
    assert len({answer.text for answer in together}) > 4, "the question must matter, or this test shows nothing"


def test_the_seed_and_the_temperature_matter(model):
    texts = [model.answer([Question("Go on.", seed, 2.0)])[0].text for seed in range(6)]
    assert len(set(texts)) > 2
    assert len({model.answer([Question("Go on.", seed, 0.0)])[0].text for seed in range(3)}) == 1
    mixed = [Question("Go on.", 1, 2.0), Question("Go on.", 1, 0.0)]
    assert model.answer(mixed) == [model.answer([one])[0] for one in mixed]


def test_the_answer_is_what_the_model_says_by_hand(model, tiny):
    """The oracle: one question, no padding, transformers' own functions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, plain = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny).eval()
    for one in questions()[:3]:
        inputs = tokenizer(f"[INST] {one.text} [/INST]", return_tensors="pt", return_token_type_ids=False)
        out = plain.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ended = out[-1] == tokenizer.eos_token_id
        assert model.answer([one]) == [
            Answer(tokenizer.decode(out, skip_special_tokens=True), "stop" if ended else "length", str(tiny))
        ]


def test_draws_are_as_frequent_as_the_model_says():
    """Against probabilities by hand: softmax of the scores over the temperature, of the tokens that are allowed."""
    count, scores = 4000, torch.tensor([2.0, 1.0, 0.5, -1.0, -torch.inf, 1.5])
    rows = [Question("", seed, 0.8) for seed in range(count)]
    weights = torch.tensor([2.0, 1.0, 0.5, -1.0, -1e9, 1.5]).div(0.8).exp()
    for top_k, top_p, allowed in [
        (0, 1.0, [0, 1, 2, 3, 5]),
        (3, 1.0, [0, 1, 5]),
        (0, 0.6, [0, 5]),  # the likeliest has 0.5, so the next one is needed
        (0, 0.4, [0]),
        (9, 1.0, [0, 1, 2, 3, 5]),
        (3, 0.85, [0, 1, 5]),
    ]:
        drawn = Draws(rows, "cpu", top_k, top_p)(None, scores.expand(count, -1)).argmax(-1)
        expected = torch.zeros(6).index_put((torch.tensor(allowed),), weights[allowed])
        expected = expected / expected.sum()
        found = torch.bincount(drawn, minlength=6) / count
        assert (found - expected).abs().max() < 0.03 and set(drawn.tolist()) == set(allowed)


def test_draws_follow_from_the_seed_of_the_row_alone():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [Question("", 7, 1.0), Question("", 8, 0.0), Question("", 9, 2.0)]
    together = Draws(rows, "cpu")
    alone = [Draws([row], "cpu") for row in rows]
    for _ in range(3):
        found = together(None, scores)
        for place, draws in enumerate(alone):
            assert torch.equal(found[place : place + 1], draws(None, scores[place : place + 1]))
        assert torch.equal(found[1], scores[1]), "at a temperature of 0 nothing is drawn"


def test_negatives_come_of_it(tiny, tmp_path):
    captions = [tiny_text.CAPTION, tiny_text.CAPTION + " It is old."]
    made = LanguageModel(config(tiny), tmp_path).make(captions)
    good = {text: kind for kind, text in tiny_text.NEGATIVES[:6]}
    assert made.candidates[0], made
    for candidate in made.candidates[0]:
        assert good[candidate.text] == candidate.type and candidate.type in NEGATIVE_TYPES
    assert LanguageModel(config(tiny), tmp_path).name == f"llm: {tiny.name}", "no place of this machine in the table"
    again = LanguageModel(config(tiny), tmp_path).make(captions)
    assert again.candidates == made.candidates and "0 questions asked now" in again.notes[0]
    alone = LanguageModel(config(tiny), tmp_path / "other").make(captions[1:])
    assert alone.candidates == made.candidates[1:]


def test_memory_that_does_not_suffice_halves_the_batch(model, monkeypatch):
    expected, sizes, generate = model.answer(questions(1.0)), [], model._model.generate

    def limited(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return generate(**inputs)

    monkeypatch.setattr(model._model, "generate", limited)
    assert model.answer(questions(1.0)) == expected
    assert sizes == [4, 2, 2, 2, 2, 1] and "halved 1 times, to 2" in model.notes()[0]
    monkeypatch.setattr(model._model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(ModelError, match=r"not even one text fits .*Lower negatives\.llm\.max_new_tokens"):
        model.answer(questions())


def test_a_question_the_model_cannot_take_is_the_only_one_lost(model, monkeypatch):
    expected, inputs = model.answer(questions()), model._inputs

    def choosy(ones):
        if any(one.seed == 2 for one in ones):
            raise ValueError("not this one")
        return inputs(ones)

    monkeypatch.setattr(model, "_inputs", choosy)
    found = model.answer(questions())
    assert found[2] == Failure("model failed", "ValueError: not this one")
    assert found[:2] + found[3:] == expected[:2] + expected[3:]


def test_a_question_beyond_the_context_is_named(model):
    with pytest.raises(ModelError, match=r"text and prompt take 50,\d+ tokens.*context of 8,192\. Lower negatives\.llm\.max"):
        model.answer([Question("word " * 10_000)])


def test_a_model_without_a_chat_template_goes_on_from_the_question(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer("Go on:", return_tensors="pt", return_token_type_ids=False)
    out = plain.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    [found] = TextModel(str(folder), "negatives.llm", **OPTIONS).answer([Question("Go on:")])
    assert found.text == tokenizer.decode(out, skip_special_tokens=True)


def test_the_first_token_stands_there_once_whoever_writes_it(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    values = json.loads((folder / "tokenizer.json").read_text())
    begin = next(token["id"] for token in values["added_tokens"] if token["content"] == "<s>")
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}}
    values["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    for text in (template, "{{ bos_token }}" + template):
        (folder / "chat_template.jinja").write_text(text)
        inputs, _ = TextModel(str(folder), "negatives.llm", **OPTIONS)._inputs([Question("Go on:")])
        assert (inputs["input_ids"] == begin).sum() == 1 and inputs["input_ids"][0, 0] == begin


def test_what_cannot_be_loaded_says_the_way_out(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelError, match=r"(?s)llm\.model = 'no/such-model', revision v2.*hf download no/such-model.*kind=server"
    ):
        TextModel("no/such-model", "negatives.llm", **OPTIONS | {"revision": "v2"})
    # weights that would have to be unpickled are not read, and code that comes with a model is not run
    pickled = shutil.copytree(tiny, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        TextModel(str(pickled), "negatives.llm", **OPTIONS)
    own = shutil.copytree(tiny, tmp_path / "own")
    values = json.loads((own / "config.json").read_text()) | {"model_type": "not_known_here"}
    values["auto_map"] = {name: "own.Own" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (own / "config.json").write_text(json.dumps(values))
    (own / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Own: pass\n")
    with pytest.raises(ModelError):
        TextModel(str(own), "negatives.llm", **OPTIONS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.gpu
def test_on_a_gpu_in_bf16(tiny, monkeypatch):
    monkeypatch.setenv("FAST_GOAL_DEVICE", "cuda")
    model = TextModel(str(tiny), "negatives.llm", **OPTIONS)
    assert model._model.dtype == torch.bfloat16 and model._model.device.type == "cuda"
    answers = model.answer(questions(1.0))
    assert all(isinstance(answer, Answer) and answer.text for answer in answers) and answers == model.answer(questions(1.0))
