"""Typed configuration: `params.yaml` in, dataclasses out.

The values live in the Hydra groups under `conf/`; `fast-goal configure` composes them into `params.yaml`, and every
stage reads only that file, through `load_params`. The dataclasses therefore have no defaults: a key that is missing,
unknown or out of range is an error that names the key in full (`finetune.learning_rate`).

No Hydra here: this module also serves a GPU machine that has only torch and open_clip.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from fast_goal.errors import ConfigError

PARAMS_FILE = Path("params.yaml")
T = TypeVar("T")
Split = Literal["pretrain", "train", "val", "test"]


def number(low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A numeric field, or a list of numbers: `low` and `high` are inclusive bounds, `above` an exclusive lower one."""
    return dataclasses.field(metadata={"low": low, "high": high, "above": above})


@dataclasses.dataclass(frozen=True)
class DownloadConfig:
    """Which data sets to fetch or generate. Each entry of `datasets` is checked by its source's own dataclass."""

    train_dataset: str
    watch: str  # what DVC watches for changes of the raw data: the folder of a `folder` source, the generator of `scenes`
    datasets: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        if self.train_dataset not in self.datasets:
            raise ConfigError(
                f"download.train_dataset = {self.train_dataset!r} is not one of download.datasets: {sorted(self.datasets)}"
            )


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """A small CLIP trained from scratch on short captions, for where no pretrained weights can be had."""

    split: Split
    image_size: int = number(32)
    patch_size: int = number(4)
    embed_dim: int = number(8)
    vision_width: int = number(8)
    vision_layers: int = number(1)
    text_width: int = number(8)
    text_layers: int = number(1)
    head_width: int = number(4)
    steps: int = number(1)
    batch_size: int = number(2)
    learning_rate: float = number(above=0)
    weight_decay: float = number(0)
    warmup_steps: int = number(0)


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """The region detector.

    kind: `trained` (from an ultralytics architecture file, on the true boxes of the training data set), `ultralytics`
    (weights by name or path), `none`.
    """

    kind: Literal["trained", "ultralytics", "none"]
    weights: str  # architecture (yolo11n.yaml) for `trained`, else weights by name (yolo11n.pt) or by path
    trust_pickle: bool  # allow a local .pt, which ultralytics unpickles without restriction
    split: Split
    image_size: int = number(32)
    images: int = number(1)
    epochs: int = number(1)
    batch_size: int = number(1)


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The weights to start from. `model` and `pretrained` are open_clip's words; a model may be a `local-dir:` or `hf-hub:`."""

    kind: Literal["pretrained", "scratch"]
    model: str
    pretrained: str | None
    scratch: ScratchConfig
    detector: DetectorConfig
    context_length: int = number(77)
    keep_positions: int = number(1, 75)  # of CLIP's 77; two at least are left to stretch


@dataclasses.dataclass(frozen=True)
class FlismConfig:
    """Region and sentence matching (METHOD section 2, Tables VII and VIII)."""

    splits: list[Split]
    regions: Literal["both", "detector", "spatial"]
    top_k: int = number(1)
    confidence: float = number(0, 1)
    iou: float = number(0, 1)
    max_detections: int = number(1)
    min_area: float = number(0, 1)  # fraction of the image
    batch_size: int = number(1)
    shard_size: int = number(1)


@dataclasses.dataclass(frozen=True)
class ValidateConfig:
    """Expectations whose bounds depend on the data set; the others have none to set."""

    expected_counts: dict[Split, int]  # split -> images; an absent split is not checked
    max_skipped: float = number(0, 1)  # fraction of all samples
    min_mean_words: float = number(0)
    max_mean_words: float = number(0)
    min_pairs: float = number(0, 1)  # fraction of the images of the FLISM splits that have a pair


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The training loop; the loss is the section `objective`."""

    view: Literal["crop", "squash", "pad"]
    precision: Literal["auto", "fp32", "bf16"]
    gradient_clip: float | None
    epochs: int = number(1)
    batch_size: int = number(2)
    learning_rate: float = number(above=0)
    weight_decay: float = number(0)
    warmup_steps: int = number(0)
    workers: int = number(0)
    log_every: int = number(1)  # steps
    save_every: int = number(1)  # steps between resume states

    def __post_init__(self) -> None:
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise ConfigError(f"finetune.gradient_clip = {self.gradient_clip}: expected null or a number above 0")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Retrieval, localisation and the report."""

    datasets: list[str]
    split: Split
    ks: list[int] = number(1)
    patch_ks: list[int] = number(1)
    batch_size: int = number(1)
    bootstrap_samples: int = number(1)
    pictures: int = number(0)  # queries shown in the retrieval picture


@dataclasses.dataclass(frozen=True)
class RegisterConfig:
    """The MLflow model registry."""

    model_name: str
    alias: str


@dataclasses.dataclass(frozen=True)
class Params:
    """The whole of params.yaml. `objective` is checked by the objective's own dataclass."""

    experiment: str
    download: DownloadConfig
    base: BaseConfig
    flism: FlismConfig
    validate: ValidateConfig
    objective: dict[str, Any]
    finetune: FinetuneConfig
    evaluate: EvaluateConfig
    register: RegisterConfig
    seed: int = number(0)


def load_params(path: Path | str = PARAMS_FILE) -> Params:
    """Reads and checks params.yaml. Raises ConfigError, which names the file and the key."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist here ({Path.cwd()}). Change to the project's folder, or write it: `fast-goal configure`."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    params = build(Params, values, str(path))
    check_together(params)
    return params


def check_together(params: Params) -> None:
    """Raises ConfigError where sections contradict each other; else a late step would find it, after hours of work."""
    datasets = sorted(params.download.datasets)
    if unknown := [name for name in params.evaluate.datasets if name not in datasets]:
        raise ConfigError(f"evaluate.datasets = {unknown}: not among download.datasets: {datasets}")
    if params.flism.regions == "detector" and params.base.detector.kind == "none":
        raise ConfigError("flism.regions = 'detector' needs a detector: set base.detector.kind, or flism.regions=spatial")


def build(cls: type[T], values: Any, where: str) -> T:
    """Makes the dataclass `cls` from a mapping, rejecting unknown, missing and out-of-range keys.

    `where` is the prefix of the key in error messages: a dotted key (`download.datasets.scenes`), or a file name for
    the root.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {values!r}")
    prefix = "" if where.endswith((".yaml", ".yml")) else f"{where}."
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else f" Known here: {', '.join(sorted(fields))}."
            raise ConfigError(f"unknown key {prefix}{key} = {values[key]!r}.{hint}")
    made = {}
    for name, field in fields.items():
        key = f"{prefix}{name}"
        if name not in values:
            raise ConfigError(f"missing key {key}. `fast-goal configure` writes a complete params.yaml.")
        value = _convert(hints[name], values[name], key)
        _check_range(value, field.metadata, key)
        made[name] = value
    return cls(**made)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain mapping of a config dataclass, for logging and hashing."""
    return dataclasses.asdict(config)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{key} = {value!r}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(argument for argument in arguments if argument is not type(None)), value, key)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} = {value!r}: expected a list")
        return [_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} = {value!r}: expected a mapping of keys to values")
        return {
            _convert(arguments[0], str(name), key): _convert(arguments[1], item, f"{key}.{name}")
            for name, item in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-6 as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key} = {value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _check_range(value: Any, bounds: Mapping[str, Any], key: str) -> None:
    if not bounds or value is None:
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_range(item, bounds, f"{key}[{index}]")
        return
    low, high, above = bounds.get("low"), bounds.get("high"), bounds.get("above")
    # `not (a <= b)` also refuses NaN
    if low is not None and not value >= low:
        raise ConfigError(f"{key} = {value}: expected at least {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{key} = {value}: expected at most {high}")
    if above is not None and not value > above:
        raise ConfigError(f"{key} = {value}: expected more than {above}")
