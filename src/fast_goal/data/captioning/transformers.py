"""An image-to-text model of the Hub or of a local folder, run here through transformers: kind `transformers`.

Any model that AutoModelForImageTextToText knows and whose processor has a chat template: LLaVA-NeXT, Qwen-VL, Idefics
and others. Only safetensors are read, and code that comes with a model is never run. `HF_HUB_OFFLINE=1` is respected.

The images of a batch do not see each other: shorter prompts are padded on the left and masked. What may differ from one
image at a time is the rounding of matrix products of another size, in bf16 more than in fp32; where two words are all but
equally likely it can turn the choice.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fast_goal.data.captioning import Answer, CaptionerConfig, Failure, captioner, model_view
from fast_goal.environment import device as chosen_device
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, ModelError
from fast_goal.files import digest

if TYPE_CHECKING:
    import torch

_EDGE = 1 << 20  # bytes at each end of a large file that stand for all of it in a folder's digest


def _settings(config: CaptionerConfig) -> dict[str, Any]:
    local = config.transformers
    settings = {"revision": local.revision, "precision": local.precision, "min_new_tokens": local.min_new_tokens}
    return settings | ({"weights": folder_digest(Path(config.model))} if Path(config.model).is_dir() else {})


def folder_digest(folder: Path) -> str:
    """Changes with any file of a model's folder; of files above 2 MiB only size, beginning and end are read."""
    parts = []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        with path.open("rb") as stream:
            hasher = hashlib.sha256(stream.read(_EDGE))
            stream.seek(max(_EDGE, size - _EDGE))
            hasher.update(stream.read(_EDGE))
        parts.append([path.name, size, hasher.hexdigest()])
    return digest(parts)


@captioner("transformers", _settings)
class LocalCaptioner:
    """Loads the model on the device of `fast_goal.environment.device`. Raises ModelError, with the way out."""

    parallel = 1

    def __init__(self, config: CaptionerConfig, prompt: str, where: str):
        self._config, self._prompt, self._where = config, prompt, f"{where}.captioner"
        if not prompt.strip():
            raise ConfigError(f"{where}.prompt is empty: the model would not know what to do")
        prepare()  # the image processors import torchvision
        self._device = chosen_device()
        self._processor, self._model = self._load()
        self.batch_size = config.transformers.batch_size
        self._halved = 0
        commit = getattr(self._model.config, "_commit_hash", None)
        self.name = f"{config.model}@{commit}" if commit else config.model
        self._conversation = self._with_chat_template()
        self._model.generation_config = self._generation_config()  # one given to generate() would be mixed with it

    def caption(self, images: Sequence[Image.Image]) -> list[Answer | Failure]:
        """See Captioner. A batch that does not fit in memory is halved, and so are all that follow; of a batch that the
        model refuses for another reason each half is tried by itself."""
        views = [model_view(image, self._config.max_side) for image in images]
        return self._in_parts(views)

    def notes(self) -> list[str]:
        if not self._halved:
            return []
        return [
            f"out of memory: the batch was halved {self._halved} times, to {self.batch_size}; "
            f"set {self._where}.transformers.batch_size to it"
        ]

    def close(self) -> None:
        """Frees the model's memory."""
        import torch

        self._model = self._processor = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _in_parts(self, images: Sequence[Image.Image]) -> list[Answer | Failure]:
        import torch

        results: list[Answer | Failure] = []
        position = 0
        while position < len(images):
            part = images[position : position + self.batch_size]
            try:
                results += self._generate(part)
            except (torch.OutOfMemoryError, MemoryError) as error:
                reason = str(error).partition(". ")[0]
            except (ValueError, IndexError, RuntimeError, ZeroDivisionError, TypeError) as error:
                if _out_of_memory(error):
                    reason = str(error).partition("\n")[0]
                else:
                    results += self._one_by_one(part, error)
                    position += len(part)
                    continue
            else:
                position += len(part)
                continue
            # behind the except clause, whose exception keeps the failed batch's tensors alive
            self._make_room(len(part), reason)
        return results

    def _make_room(self, size: int, reason: str) -> None:
        """Halves the batch after one of `size` images did not fit."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise ModelError(
                f"{self._where}.model = {self._config.model!r}: not even one image fits in the memory of {self._device} "
                f"({reason}). Lower {self._where}.max_side or .max_new_tokens, take a smaller model, or serve it elsewhere "
                f"({self._where}.kind=server)."
            )
        self.batch_size, self._halved = max(1, size // 2), self._halved + 1

    def _one_by_one(self, images: Sequence[Image.Image], error: Exception) -> list[Answer | Failure]:
        """So that an image the model cannot take is the only one lost."""
        if len(images) == 1:
            return [Failure("model failed", f"{type(error).__name__}: {error}"[:300])]
        return [result for image in images for result in self._in_parts([image])]

    def _generate(self, images: Sequence[Image.Image]) -> list[Answer | Failure]:
        """One answer for each image, all at once."""
        import torch

        # a list for each prompt: some processors take the images in no other way
        options = {"images": [[image] for image in images], "padding": True, "return_tensors": "pt"}
        begin = self._processor.tokenizer.bos_token
        if begin and self._conversation.startswith(begin):
            options["add_special_tokens"] = False  # the template has put it there
        inputs = self._processor(text=[self._conversation] * len(images), **options)
        length = inputs["input_ids"].shape[1]
        self._check_length(length)
        inputs = inputs.to(self._device, dtype=self._model.dtype)  # whole numbers keep their type
        with torch.inference_mode():
            tokens = self._model.generate(**inputs)[:, length:].cpu()
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [
            Answer(text, "stop" if self._ended(row) else "length", self.name) for text, row in zip(texts, tokens, strict=True)
        ]

    def _ended(self, tokens: torch.Tensor) -> bool:
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return any(int(token) in ends for token in tokens)

    def _check_length(self, length: int) -> None:
        """Raises ModelError where question and answer exceed the model's context, beyond which it talks nonsense."""
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if context and length + self._config.max_new_tokens > context:
            raise ModelError(
                f"{self._config.model}: image and prompt take {length:,} tokens and the answer up to "
                f"{self._config.max_new_tokens:,}, more than its context of {context:,}. Shorten "
                f"{self._where.removesuffix('.captioner')}.prompt or lower {self._where}.max_new_tokens."
            )

    def _with_chat_template(self) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self._prompt}]}
        try:
            return self._processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs: anything may come out of one
            raise ModelError(
                f"{self._config.model}: its chat template cannot be used ({_first_line(error)}). Take a model that was "
                "trained to follow instructions about an image."
            ) from None

    def _generation_config(self) -> Any:
        """The model's own, with our length and choice of words."""
        generation = copy.deepcopy(self._model.generation_config)
        sampling = self._config.temperature > 0
        generation.update(
            do_sample=sampling,
            temperature=self._config.temperature if sampling else None,
            max_new_tokens=self._config.max_new_tokens,
            max_length=None,
        )
        if self._config.transformers.min_new_tokens:
            generation.update(min_new_tokens=self._config.transformers.min_new_tokens)
        if not sampling:
            generation.update(top_p=None, top_k=None)
        if generation.pad_token_id is None:
            generation.update(pad_token_id=self._processor.tokenizer.pad_token_id)
        if generation.eos_token_id is None:
            generation.update(eos_token_id=self._processor.tokenizer.eos_token_id)
        return generation

    def _load(self) -> tuple[Any, Any]:
        import torch

        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
            from transformers.utils import logging
        except ImportError as error:
            raise ModelError(
                f"{self._where}.kind = 'transformers' needs the package transformers ({error}): "
                "pip install 'fast-goal[transformers]', or take the kind `server`"
            ) from None

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        name, revision = self._config.model, self._config.transformers.revision
        options = {"revision": revision or "main", "trust_remote_code": False}
        processor = self._from_pretrained(functools.partial(AutoProcessor.from_pretrained, padding_side="left"), options)
        if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
            raise ModelError(
                f"{self._where}.model = {name!r}: its processor does not take images and text; take an image-text-to-text model"
            )
        processor.tokenizer.padding_side = "left"  # the answers begin where the rows end
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        model = self._from_pretrained(
            AutoModelForImageTextToText.from_pretrained,
            {**options, "use_safetensors": True, "dtype": _dtype(self._config.transformers.precision, self._device)},
        )
        try:
            model = model.to(self._device).eval()
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self._where}.model = {name!r} does not fit in the memory of {self._device} "
                f"({str(error).partition('. ')[0]}). Take a smaller model, or serve it elsewhere ({self._where}.kind=server)."
            ) from None
        torch.manual_seed(0)  # for a temperature above 0
        return processor, model

    def _from_pretrained(self, load: Callable[..., Any], options: dict[str, Any]) -> Any:
        import torch

        name = self._config.model
        try:
            return load(name, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the hub's client and the many model classes have errors of a dozen unrelated classes
            raise ModelError(
                f"{self._where}.model = {name!r}, revision {options['revision']}, cannot be loaded: {_first_line(error)}\n"
                "It must be an image-text-to-text model with safetensors and without code of its own. Where there is no "
                f"network: download it where there is one (`hf download {name}`), copy the folder and name its path here, or "
                f"set HF_HOME to a copied cache; or let a server do it ({self._where}.kind=server)."
            ) from None


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    import torch

    if precision == "bf16":
        return torch.bfloat16
    if precision == "fp32" or device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _out_of_memory(error: Exception) -> bool:
    """The CPU's allocator and some of CUDA's libraries raise a plain RuntimeError."""
    text = str(error).lower()
    return "can't allocate memory" in text or "out of memory" in text or "cublas_status_alloc_failed" in text


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
