"""An image-to-text model of the Hub or of a local folder, run here through transformers: kind `transformers`.

Any model that AutoModelForImageTextToText knows and whose processor has a chat template: LLaVA-NeXT, Qwen-VL, Idefics
and others. `data.generation.local` says how it is loaded and run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from fast_goal.data.captioning import Answer, CaptionerConfig, Failure, captioner, model_view
from fast_goal.data.generation.local import LocalModel, local_settings
from fast_goal.errors import ConfigError, ModelError


def _settings(config: CaptionerConfig) -> dict[str, Any]:
    local = config.transformers
    return {**local_settings(config.model, local.revision, local.precision), "min_new_tokens": local.min_new_tokens}


@captioner("transformers", _settings)
class LocalCaptioner(LocalModel):
    """Loads the model on the device of `fast_goal.environment.device`. Raises ModelError, with the way out."""

    kind = "an image-text-to-text model"
    thing = "image"
    make_room = ".max_side or .max_new_tokens"

    def __init__(self, config: CaptionerConfig, prompt: str, where: str):
        self._max_side, self.shorten = config.max_side, f"{where}.prompt"
        if not prompt.strip():
            raise ConfigError(f"{where}.prompt is empty: the model would not know what to do")
        local = config.transformers
        super().__init__(
            config.model,
            f"{where}.captioner",
            revision=local.revision,
            precision=local.precision,
            batch_size=local.batch_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            min_new_tokens=local.min_new_tokens,
        )
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        self._conversation = self._templated(self._processor, message, "instructions about an image")

    def caption(self, images: Sequence[Image.Image]) -> list[Answer | Failure]:
        """See Captioner."""
        return self._in_parts([model_view(image, self._max_side) for image in images])

    @property
    def _tokenizer(self) -> Any:
        return self._processor.tokenizer

    def _read(self, options: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = self._from_pretrained(functools.partial(AutoProcessor.from_pretrained, padding_side="left"), options)
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise ModelError(
                f"{self._where}.model = {self._name!r}: its processor does not take images and text; take an "
                "image-text-to-text model"
            )
        return processor, AutoModelForImageTextToText.from_pretrained

    def _inputs(self, images: Sequence[Image.Image]) -> tuple[Any, dict[str, Any]]:
        # a list for each prompt: some processors take the images in no other way
        options = {"images": [[image] for image in images], "padding": True, "return_tensors": "pt"}
        texts = [self._conversation] * len(images)
        inputs = self._processor(text=texts, **options, **self._begun(self._conversation))
        return inputs.to(self._device, dtype=self._model.dtype), {}  # whole numbers keep their type
