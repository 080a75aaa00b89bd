"""Captions of a class for zero-shot classification: the published templates by name, {} for the class, and ImageNet's names.

`openai_imagenet` (80) and `simple_imagenet` (7 of them) are open_clip's copies of OpenAI's; the others are those that OpenAI
published for each data set (github.com/openai/CLIP, data/prompts.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fast_goal.config import Split, number
from fast_goal.errors import ConfigError

_ARTICLES = ("a", "the")


def _with_articles(*patterns: str) -> list[str]:
    """Each pattern with `a` and with `the` in place of <the>."""
    return [pattern.replace("<the>", article) for article in _ARTICLES for pattern in patterns]


_CIFAR = _with_articles(
    "a photo of <the> {}.",
    "a blurry photo of <the> {}.",
    "a black and white photo of <the> {}.",
    "a low contrast photo of <the> {}.",
    "a high contrast photo of <the> {}.",
    "a bad photo of <the> {}.",
    "a good photo of <the> {}.",
    "a photo of <the> small {}.",
    "a photo of <the> big {}.",
)
TEMPLATES: dict[str, list[str]] = {
    "plain": ["a photo of a {}."],
    "aircraft": _with_articles("a photo of <the> {}, a type of aircraft."),
    "caltech101": _with_articles(
        "a photo of <the> {}.",
        "a painting of <the> {}.",
        "<the> plastic {}.",
        "a sculpture of <the> {}.",
        "a sketch of <the> {}.",
        "a tattoo of <the> {}.",
        "<the> toy {}.",
        "a rendition of <the> {}.",
        "<the> embroidered {}.",
        "<the> cartoon {}.",
        "<the> {} in a video game.",
        "<the> plushie {}.",
        "<the> origami {}.",
        "art of <the> {}.",
        "graffiti of <the> {}.",
        "a drawing of <the> {}.",
        "a doodle of <the> {}.",
    ),
    "cars": [
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ],
    "cifar": _CIFAR,
    "dtd": _with_articles(
        "a photo of <the> {} texture.",
        "a photo of <the> {} pattern.",
        "a photo of <the> {} thing.",
        "a photo of <the> {} object.",
    ),
    "flowers": ["a photo of a {}, a type of flower."],
    "food": ["a photo of {}, a type of food."],
    "pets": ["a photo of a {}, a type of pet."],
    "sun397": _with_articles("a photo of <the> {}."),
}
IMAGENET_TEMPLATES = ("openai_imagenet", "simple_imagenet")
# The published list has `missile` and `sunglasses` twice. Of two classes with one name no image could be told apart, so that
# one of each pair, by its place, has WordNet's word for it.
_IMAGENET_NAMES = {744: "projectile", 836: "sunglass"}


@dataclass(frozen=True)
class PromptedConfig:
    """What the sources of classes have in common. templates: a name of TEMPLATES, or a list. split: of all that is taken.
    images: so many of them, drawn by `seed`; null: all."""

    templates: Any
    split: Split
    images: int | None = number(1)
    seed: int = number(0)

    def __post_init__(self) -> None:
        check_templates(self.templates)


def check_templates(value: Any) -> None:
    """Raises ConfigError for what is neither a name of templates nor a list of texts with one {} each."""
    known = sorted([*TEMPLATES, *IMAGENET_TEMPLATES])
    if isinstance(value, str):
        if value not in known:
            raise ConfigError(f"templates = {value!r}: expected a list of texts, or one of {', '.join(known)}")
        return
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(
            f"templates = {value!r}: expected a list of texts with {{}} for the class, or one of {', '.join(known)}"
        )
    for template in value:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError(f"templates: {template!r}: expected a text with one {{}} for the class")


def templates(value: Any) -> list[str]:
    """The templates of that name, or the list itself. Raises ConfigError as `check_templates`."""
    check_templates(value)
    if not isinstance(value, str):
        return list(value)
    if value in TEMPLATES:
        return list(TEMPLATES[value])
    metadata = _open_clip()
    made = metadata.OPENAI_IMAGENET_TEMPLATES if value == "openai_imagenet" else metadata.SIMPLE_IMAGENET_TEMPLATES
    return [template("{}") for template in made]


def imagenet_names() -> list[str]:
    """The names of the 1,000 classes in the order of their WordNet numbers, as OpenAI chose them; no name stands twice."""
    return [_IMAGENET_NAMES.get(place, name) for place, name in enumerate(_open_clip().IMAGENET_CLASSNAMES)]


def readable(name: str) -> str:
    """A folder's or file's name of a class as one would write it: a blank for `_`, and for `/` between small letters, as in
    SUN397's `apse/indoor`. The aeroplane `F/A-18` keeps its own."""
    return " ".join(re.sub(r"(?<=[a-z])/(?=[a-z])", " ", name.replace("_", " ")).split())


def _open_clip() -> Any:
    from fast_goal.environment import prepare

    prepare()
    from open_clip import zero_shot_metadata

    return zero_shot_metadata
