"""Typed configuration: `params.yaml` in, dataclasses out.

The values live in the Hydra groups under `conf/`; `fast-goal configure` composes them into `params.yaml`, and every
stage reads only that file, through `load_params`. The dataclasses therefore have no defaults: a key that is missing,
unknown or out of range is an error that names the key in full (`finetune.learning_rate`). A dataclass that checks more in
`__post_init__` raises a ConfigError that begins with the name of its field; `build` puts the section before it.

No Hydra here: this module also serves a GPU machine that has only torch and open_clip.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from fast_goal.errors import ConfigError

PARAMS_FILE = Path("params.yaml")
SCRATCH_POSITIONS = 77  # text positions of a CLIP trained from scratch, before they are stretched
T = TypeVar("T")
Split = Literal["pretrain", "train", "val", "test"]
NegativeType = Literal["reshuffle", "swap_nouns", "swap_adjectives", "replace_adjectives", "replace_nouns"]
NEGATIVE_TYPES: tuple[str, ...] = typing.get_args(NegativeType)


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
                f"train_dataset = {self.train_dataset!r} is not one of download.datasets: {sorted(self.datasets)}"
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
    steps: int = number(0)  # 0: as it is drawn, to be trained by `finetune` alone
    batch_size: int = number(2)
    learning_rate: float = number(above=0)
    weight_decay: float = number(0)
    warmup_steps: int = number(0)


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """The region detector; its kinds are the files of `flism/detectors/`.

    kind: `trained` (from an ultralytics architecture file, on the true boxes of the training data set), `ultralytics`
    (weights by name or path), `yolos` (through transformers; the paper's is hustvl/yolos-base), `table` (boxes from a
    file, or the data set's own objects), `none`.
    """

    kind: Literal["trained", "ultralytics", "yolos", "table", "none"]
    # architecture (yolo11n.yaml) for `trained`; weights by name or path for `ultralytics` and `yolos`; for `table` the path
    # of a CSV or parquet file, or `objects`
    weights: str
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
    keep_positions: int = number(0)  # of the model's own positions, CLIP's 77; two at least are left to stretch


@dataclasses.dataclass(frozen=True)
class MatcherConfig:
    """The CLIP that matches regions and sentences; model null: the base. The words are those of `base`."""

    model: str | None
    pretrained: str | None


@dataclasses.dataclass(frozen=True)
class FlismConfig:
    """Region and sentence matching (METHOD section 2, Tables VII and VIII)."""

    splits: list[Split]  # none: nothing is matched
    regions: Literal["both", "detector", "spatial"]
    matcher: MatcherConfig
    choice: Literal["best", "random", "truth"]  # of a pair's region
    pair_weights: Literal["uniform", "similarity"]
    classes: list[str] | None  # of detections; null: all
    merge_iou: float | None  # from which two boxes are one region; null: all are kept, as in the paper
    scaled_decoding: bool
    precision: Literal["fp32", "tf32", "bf16"]
    engine: Literal["local", "ray"]
    processes: int = number(0)  # 0: one for each GPU, else in this process
    top_k: int = number(1)
    confidence: float = number(0, 1)
    iou: float = number(0, 1)
    max_detections: int = number(1)
    min_area: float = number(0, 1)  # fraction of the image
    batch_size: int = number(1)
    shard_size: int = number(1)

    def __post_init__(self) -> None:
        if self.merge_iou is not None and not 0 < self.merge_iou <= 1:
            raise ConfigError(f"merge_iou = {self.merge_iou}: expected null or a number above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class ValidateConfig:
    """Expectations whose bounds depend on the data set, and how much of a large one is looked at."""

    expected_counts: dict[Split, int]  # split -> images; an absent split is not checked
    language: str | None  # of the long captions; null: not checked
    max_skipped: float = number(0, 1)  # fraction of all samples
    min_mean_words: float = number(0)
    max_mean_words: float = number(0)
    min_pairs: float = number(0, 1)  # fraction of the images of the FLISM splits that have a pair
    max_cut_off: float = number(0, 1)  # fraction of the long captions that the text encoder does not read to the end
    max_aspect: float = number(1)  # longer side / shorter side
    near_duplicate_bits: int = number(0, 10)  # of 64 in which the perceptual hashes of near-duplicates may differ
    max_decoded: int = number(0)  # images decoded in full, for each data set
    caption_sample: int = number(1)  # long captions whose tokens and language are looked at, for each data set
    quality_pairs: int = number(0)  # image-caption pairs whose cosine is measured, for each data set
    seed: int = number(0)


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """The training data set with its local pairs in a layout that others can read; see data/publication.py.

    layout: `table` (parquet without the images), `parquet` (with the images' bytes), `webdataset` (tar shards).
    """

    layout: Literal["table", "parquet", "webdataset"]
    licence: str  # of images and captions, for the card
    shard_size: int = number(1)  # images per file


@dataclasses.dataclass(frozen=True)
class LocalModelConfig:
    """A language model that runs here, through transformers."""

    revision: str | None  # branch, tag or commit; null: the repository's main branch
    precision: Literal["auto", "fp32", "bf16"]  # auto: bf16 on a GPU that has it, fp16 on another GPU, else fp32
    batch_size: int = number(1)


@dataclasses.dataclass(frozen=True)
class ModelServerConfig:
    """A language model behind OpenAI's chat interface. A key is read from the environment, never from here."""

    url: str  # what stands before /chat/completions
    concurrency: int = number(1, 256)  # requests under way at once
    timeout: float = number(above=0)  # seconds for one answer
    retry_wait: float = number(0)  # seconds before the second attempt; doubled for each further one


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """For the generator `llm`; of the two sections below only that of `kind` is used.

    model: name on the Hub, a local folder, or the server's word for it.
    """

    kind: Literal["transformers", "server"]
    model: str
    transformers: LocalModelConfig
    server: ModelServerConfig
    max_new_tokens: int = number(1)
    temperature: float = number(0)  # 0: always the likeliest token
    attempts: int = number(1)  # at an answer that can be used


@dataclasses.dataclass(frozen=True)
class NegativesConfig:
    """Hard negative captions of the training split; see negatives/.

    generator: `none` (there are none), `rules` (parts of speech, works offline), `llm`. captions: of which texts.
    max_similarity: the cosine of the base's text embeddings from which a negative is taken for a paraphrase, and left out.
    """

    generator: Literal["none", "rules", "llm"]
    captions: Literal["long", "short"]
    types: list[NegativeType]
    max_similarity: float | None
    llm: LanguageModelConfig
    per_caption: int = number(1)
    min_share: float = number(0, 1)  # of the captions that have to have one
    seed: int = number(0)

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError(f"types = []: expected some of {', '.join(NEGATIVE_TYPES)}")
        if self.max_similarity is not None and not 0 < self.max_similarity <= 1:
            raise ConfigError(f"max_similarity = {self.max_similarity}: expected null or a number above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The training loop; the loss is the section `objective`."""

    view: Literal["crop", "squash", "pad"]
    captions: Literal["long", "short"]  # what describes a whole image; short: each short caption is a sample of its own
    pairs: Literal["best", "all"]
    precision: Literal["auto", "fp32", "bf16"]
    gradient_clip: float | None
    max_logit_scale: float | None
    decayed: Literal["all", "matrices"]  # the parameters that weight decay acts on
    freeze: list[Literal["image", "text"]]  # towers that stay as they are
    result: Literal["last", "best"]  # which epoch's weights: the last, or the best on the validation split
    patience: int | None  # epochs without a better one after which the training ends; null: all are run
    ema: float | None  # decay per step of the average of the weights that becomes the result; null: the last weights
    checkpointing: bool
    compile: bool
    length_groups: bool  # batches of captions of similar length
    decode: Literal["cpu", "gpu"]  # where JPEG files are decoded and resized
    scaled_decoding: bool
    pixel_cache: bool  # keeps the views of images and crops on disk from their first decoding on
    shards: str | None  # folder of tar shards that hold the images; null: the data set's files
    diverged: float | None  # how many times its first value the loss may reach before the training stops; null: not checked
    epochs: int = number(1)
    batch_size: int = number(2)
    accumulate: int = number(1)  # parts that a batch goes through the model in
    learning_rate: float = number(above=0)
    layer_decay: float = number(above=0, high=1)  # of the learning rate, per block below the last
    head_rate: float = number(above=0)  # factor of the learning rate of the text-conditioned pooling
    weight_decay: float = number(0)
    betas: list[float] = number(0)  # AdamW's: of the average of the gradients, and of that of their squares
    adam_epsilon: float = number(above=0)  # what AdamW adds to the root of the latter
    warmup_steps: int = number(0)
    processes: int = number(0)  # 0: one for each GPU, else one
    workers: int = number(0)  # of each process
    log_every: int = number(1)  # steps
    save_every: int = number(1)  # steps between resume states
    keep_states: int = number(1)  # the last so many of them

    def __post_init__(self) -> None:
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise ConfigError(f"gradient_clip = {self.gradient_clip}: expected null or a number above 0")
        if self.max_logit_scale is not None and self.max_logit_scale < 1:
            raise ConfigError(f"max_logit_scale = {self.max_logit_scale}: expected null or at least 1")
        if len(self.betas) != 2 or not all(beta < 1 for beta in self.betas):
            raise ConfigError(f"betas = {self.betas}: expected two numbers from 0 to below 1")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"patience = {self.patience}: expected null or at least 1")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"ema = {self.ema}: expected null or a number from 0 to below 1")
        if self.diverged is not None and self.diverged <= 1:
            raise ConfigError(f"diverged = {self.diverged}: expected null or a number above 1")
        if self.decode == "gpu" and (self.pixel_cache or self.scaled_decoding):
            raise ConfigError(
                "decode = 'gpu' goes with neither pixel_cache nor scaled_decoding: set it to cpu, or both to false"
            )
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate = {self.accumulate}: a batch of batch_size = {self.batch_size} has no more parts")


@dataclasses.dataclass(frozen=True)
class IntermediateConfig:
    """A first stage of fine-tuning, before `finetune`: on another data set (Table V, two stages: GLIT100k, then the target),
    or with another objective (Table XIV).

    `objective` and `training` are for this stage what the sections `objective` and `finetune` are for the second one.
    """

    dataset: str | None  # one of download.datasets; null: there is no first stage
    records: str  # what DVC watches: the data set's records and pairs tables; without a first stage any two files
    pairs: str
    objective: dict[str, Any]
    training: FinetuneConfig


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Retrieval, localisation and the report. The tasks are the files of `evaluation/tasks/`."""

    datasets: list[str]
    split: Split
    tasks: list[
        Literal[
            "long",
            "short",
            "localisation",
            "sentence_average",
            "truncation",
            "robustness",
            "sentences",
            "shuffled",
            "dropped",
            "joint",
            "composition",
            "zero_shot",
            "segmentation",
            "conditioned",
        ]
    ]
    precision: Literal["fp32", "bf16"]
    ks: list[int] = number(1)
    patch_ks: list[int] = number(1)
    truncation: list[int] = number(3)  # tokens, start and end included
    dropped: float = number(above=0, high=1)  # fraction of the sentences
    # what a text-conditioned pooling is asked with: tasks whose queries are single texts
    conditioned_on: list[Literal["long", "short", "sentences", "truncation", "robustness", "shuffled", "dropped"]]
    rerank: int = number(1)  # candidates of a query that the pooling puts in order again
    score_block: int = number(1)  # images whose patches are in memory to be scored
    seed: int = number(0)  # of the tasks that draw lots
    batch_size: int = number(1)
    bootstrap_samples: int = number(1)
    pictures: int = number(0)  # examples in each picture of examples; 0: none of these pictures


@dataclasses.dataclass(frozen=True)
class RegisterConfig:
    """The MLflow model registry."""

    model_name: str
    alias: str


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """When a candidate replaces the champion. Percent points of R@1 (mean of both directions); latency of one input."""

    margin: float = number(0)
    significance: float | None = number(0, 1)
    short_tolerance: float = number(0)
    latency_ratio: float | None = number(above=0)
    latency_ms: float | None = number(above=0)


@dataclasses.dataclass(frozen=True)
class DriftConfig:
    """What new data and models are compared with, and how sharply."""

    TESTS: ClassVar[int] = 12  # six of all rows, six of the new ones: the p-values are corrected for as many

    samples: int = number(10)
    permutations: int = number(99)
    significance: float = number(above=0, high=1)
    probe: int = number(8)

    def __post_init__(self) -> None:
        needed = math.ceil(self.TESTS / self.significance)
        if self.permutations < needed:
            raise ConfigError(
                f"permutations = {self.permutations}: no p-value of {self.TESTS} tests could fall below significance = "
                f"{self.significance}; expected at least {needed}"
            )


@dataclasses.dataclass(frozen=True)
class Params:
    """The whole of params.yaml. `objective` is checked by the objective's own dataclass."""

    experiment: str
    download: DownloadConfig
    base: BaseConfig
    flism: FlismConfig
    validate: ValidateConfig
    publish: PublishConfig
    negatives: NegativesConfig
    intermediate: IntermediateConfig
    objective: dict[str, Any]
    finetune: FinetuneConfig
    evaluate: EvaluateConfig
    register: RegisterConfig
    gate: GateConfig
    drift: DriftConfig
    seed: int = number(0)

    @property
    def training_datasets(self) -> list[str]:
        """The data sets that are trained on: that of `finetune`, then that of the first stage where it is another one."""
        names = (self.download.train_dataset, self.intermediate.dataset)
        return list(dict.fromkeys(name for name in names if name is not None))


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
    if params.intermediate.dataset is not None and params.intermediate.dataset not in datasets:
        raise ConfigError(f"intermediate.dataset = {params.intermediate.dataset!r}: not among download.datasets: {datasets}")
    if params.base.kind == "scratch" and params.base.keep_positions > SCRATCH_POSITIONS - 2:
        raise ConfigError(f"base.keep_positions = {params.base.keep_positions}: expected at most {SCRATCH_POSITIONS - 2}")
    if params.flism.regions == "detector" and params.base.detector.kind == "none":
        raise ConfigError("flism.regions = 'detector' needs a detector: set base.detector.kind, or flism.regions=spatial")
    _check_in_image_negatives("objective", params.objective, "finetune", params.finetune, params.flism.top_k)
    if params.intermediate.dataset is not None:
        first = params.intermediate
        _check_in_image_negatives(
            "intermediate.objective", first.objective, "intermediate.training", first.training, params.flism.top_k
        )


def parts_of(objective: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The objectives that an objective is the sum of (`weighted`), those of weight 0 left out, as params.yaml describes them.

    Whether it is described rightly is not looked at: what is no mapping has no parts.
    """
    parts = objective.get("parts")
    return {
        str(name): part["objective"]
        for name, part in (parts.items() if isinstance(parts, Mapping) else ())
        if isinstance(part, Mapping) and part.get("weight") and isinstance(part.get("objective"), Mapping)
    }


def _check_in_image_negatives(
    name: str, objective: Mapping[str, Any], section: str, training: FinetuneConfig, top_k: int
) -> None:
    """Raises ConfigError where no image has two pairs that could be negatives of each other."""
    for part, described in parts_of(objective).items():
        _check_in_image_negatives(f"{name}.parts.{part}.objective", described, section, training, top_k)
    if objective.get("in_image_negatives") is None:
        return
    wrong = [f"{section}.pairs = 'best'"] if training.pairs == "best" else []
    wrong += ["flism.top_k = 1"] if top_k == 1 else []
    if wrong:
        raise ConfigError(
            f"{name}.in_image_negatives = {objective['in_image_negatives']} needs several pairs of an image, but "
            f"{' and '.join(wrong)}: set {section}.pairs=all and flism.top_k=3, or {name}.in_image_negatives=null"
        )


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
    try:
        return cls(**made)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


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
        items = [_convert(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
        if typing.get_origin(arguments[0]) is Literal and len(set(items)) < len(items):
            twice = next(item for item in items if items.count(item) > 1)
            raise ConfigError(f"{key} = {items!r}: names {twice!r} twice")
        return items
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
