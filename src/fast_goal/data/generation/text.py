"""A language model of the Hub or of a local folder: text in, text out, for many questions at once.

Any model that AutoModelForCausalLM knows. With a chat template a question is one turn of a user; without one the model
goes on where the question ends. `local.py` says how it is loaded and run.

Above a temperature of 0 each question has a seed of its own and is answered as it would be alone, whatever else is in its
batch, but for the rounding that `local.py` speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fast_goal.data.generation import Result
from fast_goal.data.generation.local import LocalModel
from fast_goal.errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Question:
    """temperature: 0 for always the likeliest token; only above it does the seed matter."""

    text: str
    seed: int = 0
    temperature: float = 0.0


class TextModel(LocalModel):
    """`TextModel(name, where, revision=..., precision=..., batch_size=..., max_new_tokens=...)`, see LocalModel."""

    kind = "a text generation model"
    thing = "text"

    def __init__(self, name: str, where: str, **options: Any):
        super().__init__(name, where, **options)
        self._top_k, self._top_p = self._limits

    def answer(self, questions: Sequence[Question]) -> list[Result]:
        """The answers in their order."""
        return self._in_parts(questions)

    def _read(self, options: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = self._from_pretrained(AutoTokenizer.from_pretrained, options)
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise ModelError(
                f"{self._where}.model = {self._name!r}: its tokenizer has no token that ends a text; take another model"
            )
        return tokenizer, AutoModelForCausalLM.from_pretrained

    def _generation_config(self) -> Any:
        # which tokens may be drawn from is the model's own advice; the drawing is done by `Draws`
        own = self._model.generation_config
        self._limits = (own.top_k or 0, own.top_p if own.top_p is not None else 1.0) if own.do_sample else (0, 1.0)
        return super()._generation_config()

    def _inputs(self, questions: Sequence[Question]) -> tuple[Any, dict[str, Any]]:
        texts, options = [question.text for question in questions], {}
        if self._tokenizer.chat_template:
            turns = [{"role": "user", "content": text} for text in texts]
            texts = [self._templated(self._tokenizer, turn, "instructions") for turn in turns]
            options = self._begun(texts[0])
        inputs = self._tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False, **options)
        inputs = inputs.to(self._device)
        if not any(question.temperature for question in questions):
            return inputs, {}
        from transformers import LogitsProcessorList

        return inputs, {"logits_processor": LogitsProcessorList([Draws(questions, self._device, self._top_k, self._top_p)])}


class Draws:
    """Turns scores so that the largest of a row is a draw from the row's distribution: Gumbel noise from the row's own seed
    is added to the logarithms of the probabilities. A row with a temperature of 0 stays as it is.

    top_k: only the so many likeliest tokens may be drawn, 0 for all; top_p: only the likeliest that make up this share.
    """

    def __init__(self, questions: Sequence[Question], device: torch.device | str, top_k: int = 0, top_p: float = 1.0):
        import torch

        self._generators = [torch.Generator(device).manual_seed(question.seed) for question in questions]
        temperatures = [[question.temperature] for question in questions]
        self._temperatures = torch.tensor(temperatures, dtype=torch.float32, device=device)
        self._top_k, self._top_p = top_k, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] of the next token, float32."""
        import torch

        drawn = self._temperatures > 0
        scores = scores.float() / torch.where(drawn, self._temperatures, 1.0)
        allowed = scores
        if 0 < self._top_k < scores.shape[1]:
            allowed = allowed.masked_fill(scores < scores.topk(self._top_k).values[:, -1:], -torch.inf)
        if self._top_p < 1:
            ordered, order = allowed.sort(descending=True)
            shares = ordered.softmax(-1)
            beyond = shares.cumsum(-1) - shares >= self._top_p  # the likeliest is never beyond
            allowed = allowed.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
        noise = torch.stack(
            [torch.empty_like(row).exponential_(generator=draws) for row, draws in zip(scores, self._generators, strict=True)]
        )
        return torch.where(drawn, allowed - noise.log(), scores)
