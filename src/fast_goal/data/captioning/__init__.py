"""Image-to-text models that write the captions of a folder of images: a registry with one file per kind.

    captioner = load_captioner(config, prompt, where)
    captioner.caption([image, image])  ->  [Answer("A dog sits on ...", "stop"), Failure("timeout", "...")]

A captioner hands over what the model said, word for word; `editing.py` makes captions of it, `asking.py` works through
a folder and keeps every answer. What captioners share with other models that write is in `data.generation`. A new kind is a
new file here with `@captioner(kind)`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

from fast_goal.config import number
from fast_goal.data.generation import Answer, Failure
from fast_goal.errors import ConfigError
from fast_goal.files import digest


@dataclass(frozen=True)
class LocalConfig:
    """For kind `transformers`."""

    revision: str | None  # branch, tag or commit; null: the repository's main branch
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 on a GPU that has it, fp16 on another GPU, else fp32
    batch_size: int = number(1)  # images at once; halved where they do not fit
    min_new_tokens: int = number(0)


@dataclass(frozen=True)
class ServerConfig:
    """For kind `server`. A key is read from the environment (`server.KEY_VARIABLE`), never from here."""

    url: str  # what stands before /chat/completions
    concurrency: int = number(1, 256)  # requests under way at once
    timeout: float = number(above=0)  # seconds for one answer
    attempts: int = number(1)  # for one image
    retry_wait: float = number(0)  # seconds before the second attempt; doubled for each further one


@dataclass(frozen=True)
class CaptionerConfig:
    """The model and how it is asked; only the section of the chosen `kind` is used."""

    kind: str
    model: str  # name on the Hub, a local folder, or the server's word for it
    transformers: LocalConfig
    server: ServerConfig
    max_new_tokens: int = number(1)
    temperature: float = number(0)  # 0: always the likeliest token
    max_side: int = number(16)  # pixels; larger images are made smaller for the model

    def __post_init__(self) -> None:
        _kind(self.kind)
        if self.transformers.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"transformers.min_new_tokens = {self.transformers.min_new_tokens} is more than "
                f"max_new_tokens = {self.max_new_tokens}"
            )


class Captioner(Protocol):
    """What `asking.py` needs. `parallel` calls of `caption` with `batch_size` images each may run at once."""

    batch_size: int
    parallel: int

    def caption(self, images: Sequence[Image.Image]) -> list[Answer | Failure]:
        """The answers for RGB images, in their order. Raises ModelError where no image could be answered: weights that
        are missing, a server that cannot be reached."""
        ...

    def notes(self) -> list[str]:
        """Sentences for the log on what happened on the way."""
        ...

    def close(self) -> None:
        """Frees memory and connections."""
        ...


@dataclass(frozen=True)
class Kind:
    """load: makes the captioner; slow, so it is called only if there is something to ask. settings: what an answer
    depends on beside model, prompt, max_new_tokens, temperature and max_side."""

    load: Callable[[CaptionerConfig, str, str], Captioner]
    settings: Callable[[CaptionerConfig], dict[str, Any]]


_KINDS: dict[str, Kind] = {}


def captioner(kind: str, settings: Callable[[CaptionerConfig], dict[str, Any]]) -> Callable[[Any], Any]:
    """Registers a class under the word that stands in `captioner.kind`; it is made with (config, prompt, where)."""

    def register(load: Any) -> Any:
        _KINDS[kind] = Kind(load, settings)
        return load

    return register


def captioner_key(config: CaptionerConfig, prompt: str) -> str:
    """A digest of all that an answer depends on, but the image: answers with the same key may be used again."""
    return digest(
        {
            "kind": config.kind,
            "model": config.model,
            "prompt": prompt,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "max_side": config.max_side,
            **_kind(config.kind).settings(config),
        }
    )


def load_captioner(config: CaptionerConfig, prompt: str, where: str) -> Captioner:
    """`where` is the full name of the section that holds `captioner`, for messages. Raises ModelError
    for a model that cannot be had."""
    return _kind(config.kind).load(config, prompt, where)


def model_view(image: Image.Image, max_side: int) -> Image.Image:
    """The image as the model gets it: no side above `max_side`, none below 1, proportions kept."""
    if max(image.size) <= max_side:
        return image
    scale = max_side / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _kind(kind: str) -> Kind:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if kind not in _KINDS:
        raise ConfigError(f"kind = {kind!r}: expected one of {', '.join(sorted(_KINDS))}")
    return _KINDS[kind]
