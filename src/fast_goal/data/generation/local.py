"""A model that writes, of the Hub or of a local folder, run here through transformers.

Only safetensors are read, and code that comes with a model is never run. `HF_HUB_OFFLINE=1` is respected.

The questions of a batch do not see each other: shorter ones are padded on the left and masked. What may differ from one
question at a time is the rounding of matrix products of another size, in bf16 more than in fp32; where two words are all
but equally likely it can turn the choice.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.data.generation import Answer, Failure, Result
from fast_goal.data.hub import offline
from fast_goal.environment import device as chosen_device
from fast_goal.environment import prepare
from fast_goal.errors import ModelError
from fast_goal.files import digest

if TYPE_CHECKING:
    import torch

_EDGE = 1 << 20  # bytes at each end of a large file that stand for all of it in a folder's digest


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


def local_settings(model: str, revision: str | None, precision: str) -> dict[str, Any]:
    """What the answers of a model that runs here depend on, beside its name and what is asked."""
    settings = {"revision": revision, "precision": precision}
    return settings | ({"weights": folder_digest(Path(model))} if Path(model).is_dir() else {})


class LocalModel:
    """Loads a model and what turns questions into tokens on the device of `fast_goal.environment.device`; a subclass says how
    questions become inputs. `where` is the section that holds `model` and `transformers`, for messages.

    Raises ModelError, with the way out.
    """

    parallel = 1
    kind = ""  # of model, for messages
    thing = "question"  # what is asked about, for messages
    make_room = ".max_new_tokens"  # what takes less memory when it is lowered
    shorten = ""  # the other key than max_new_tokens that makes room in the context, if there is one

    def __init__(
        self,
        name: str,
        where: str,
        *,
        revision: str | None,
        precision: str,
        batch_size: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        min_new_tokens: int = 0,
    ):
        self._name, self._where, self._revision, self._precision = name, where, revision, precision
        self._max_new_tokens, self._min_new_tokens, self._temperature = max_new_tokens, min_new_tokens, temperature
        prepare()  # the image processors import torchvision
        self._device = chosen_device()
        self._processor, self._model = self._load()
        self.batch_size = batch_size
        self._halved = 0
        commit = getattr(self._model.config, "_commit_hash", None)
        self.name = f"{name}@{commit}" if commit else name
        self._model.generation_config = self._generation_config()  # one given to generate() would be mixed with it

    def notes(self) -> list[str]:
        """Sentences for the log on what happened on the way."""
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

    @property
    def _tokenizer(self) -> Any:
        return self._processor

    def _read(self, options: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
        """What makes the inputs, loaded with `_from_pretrained` and these options, and what loads the model."""
        raise NotImplementedError

    def _inputs(self, questions: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """Tokens of the questions, padded, on the device, and further arguments of generate()."""
        raise NotImplementedError

    def _in_parts(self, questions: Sequence[Any]) -> list[Result]:
        """The answers. A batch that does not fit in memory is halved, and so are all that follow; of a batch that the model
        refuses for another reason each question is tried by itself."""
        import torch

        results: list[Result] = []
        position = 0
        while position < len(questions):
            part = questions[position : position + self.batch_size]
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
        """Halves the batch after one of `size` questions did not fit."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            raise ModelError(
                f"{self._where}.model = {self._name!r}: not even one {self.thing} fits in the memory of {self._device} "
                f"({reason}). Lower {self._where}{self.make_room}, take a smaller model, or serve it elsewhere "
                f"({self._where}.kind=server)."
            )
        self.batch_size, self._halved = max(1, size // 2), self._halved + 1

    def _one_by_one(self, questions: Sequence[Any], error: Exception) -> list[Result]:
        """So that a question the model cannot take is the only one lost."""
        if len(questions) == 1:
            return [Failure("model failed", f"{type(error).__name__}: {error}"[:300])]
        return [result for question in questions for result in self._in_parts([question])]

    def _generate(self, questions: Sequence[Any]) -> list[Result]:
        """One answer for each question, all at once."""
        import torch

        inputs, options = self._inputs(questions)
        length = inputs["input_ids"].shape[1]
        self._check_length(length)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **options)[:, length:].cpu()
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
        if context and length + self._max_new_tokens > context:
            raise ModelError(
                f"{self._name}: {self.thing} and prompt take {length:,} tokens and the answer up to "
                f"{self._max_new_tokens:,}, more than its context of {context:,}. "
                + (f"Shorten {self.shorten} or lower" if self.shorten else "Lower")
                + f" {self._where}.max_new_tokens."
            )

    def _templated(self, processor: Any, message: dict[str, Any], for_what: str) -> str:
        """One turn of a user in the words of the model's chat template."""
        try:
            return processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs: anything may come out of one
            raise ModelError(
                f"{self._name}: its chat template cannot be used ({_first_line(error)}). Take a model that was "
                f"trained to follow {for_what}."
            ) from None

    def _begun(self, conversation: str) -> dict[str, Any]:
        """The option for the tokenizer that keeps it from writing the first token where the template has put it there."""
        begin = self._tokenizer.bos_token
        return {"add_special_tokens": False} if begin and conversation.startswith(begin) else {}

    def _generation_config(self) -> Any:
        """The model's own, with our length and choice of words."""
        generation = copy.deepcopy(self._model.generation_config)
        sampling = self._temperature > 0
        generation.update(
            do_sample=sampling,
            temperature=self._temperature if sampling else None,
            max_new_tokens=self._max_new_tokens,
            max_length=None,
        )
        if self._min_new_tokens:
            generation.update(min_new_tokens=self._min_new_tokens)
        if not sampling:
            generation.update(top_p=None, top_k=None)
        if generation.pad_token_id is None:
            generation.update(pad_token_id=self._tokenizer.pad_token_id)
        if generation.eos_token_id is None:
            generation.update(eos_token_id=self._tokenizer.eos_token_id)
        return generation

    def _load(self) -> tuple[Any, Any]:
        import torch

        options: dict[str, Any] = {"revision": self._revision or "main", "trust_remote_code": False}
        if offline():  # the library reads the variable when it is imported, and would ask for minutes
            options["local_files_only"] = True
        try:
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            processor, load = self._read(options)
        except ImportError as error:
            raise ModelError(
                f"{self._where}.kind = 'transformers' needs the package transformers ({error}): "
                "pip install 'fast-goal[transformers]', or take the kind `server`"
            ) from None
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.padding_side = "left"  # the answers begin where the rows end
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = self._from_pretrained(
            load, {**options, "use_safetensors": True, "dtype": _dtype(self._precision, self._device)}
        )
        try:
            model = model.to(self._device).eval()
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self._where}.model = {self._name!r} does not fit in the memory of {self._device} "
                f"({str(error).partition('. ')[0]}). Take a smaller model, or serve it elsewhere ({self._where}.kind=server)."
            ) from None
        torch.manual_seed(0)  # for a temperature above 0
        return processor, model

    def _from_pretrained(self, load: Callable[..., Any], options: dict[str, Any]) -> Any:
        import torch

        try:
            return load(self._name, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the hub's client and the many model classes have errors of a dozen unrelated classes
            raise ModelError(
                f"{self._where}.model = {self._name!r}, revision {options['revision']}, cannot be loaded: "
                f"{_first_line(error)}\nIt must be {self.kind} with safetensors and without code of its own. Where there is no "
                f"network: download it where there is one (`hf download {self._name}`), copy the folder and name its path "
                f"here, or set HF_HOME to a copied cache; or let a server do it ({self._where}.kind=server)."
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
