"""The registered model: texts and images in, embeddings or their similarities out.

    model = mlflow.pyfunc.load_model("models:/fast-goal@candidate")
    model.predict(pandas.DataFrame({"text": ["A red kite over a field."]}))["embedding"]

MLflow finds this module in the copy of the package that is stored with the model, and calls `_load_pyfunc` with the
model's folder (open_clip's files: JSON and safetensors; nothing is unpickled). What has to be installed stands in the
model's requirements.txt; fast-goal itself need not be.

A model with text-conditioned pooling (FLAIR) compares them in three modes; how is said at `Embedder.answer`.

Letters: `I` image rows and `T` text rows of a request, `N` patches, `D` embedding width, `S` side of the model's input in
pixels.
"""

from __future__ import annotations

import functools
import logging
import numbers
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fast_goal.environment import device, prepare
from fast_goal.errors import DataError
from fast_goal.evaluation.headline import MODES
from fast_goal.tracking.contents import IMAGE_KINDS, Access, check_pixels, read_content, shown

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from fast_goal.model.clip import Clip
    from fast_goal.model.conditioned import ConditionedScorer

COLUMNS = ("text", *IMAGE_KINDS)
OUTPUTS = ("embedding", "scores")
TOP_K = 128  # that `rerank` compares again
PARAMS = ("output", "mode", "top_k")
BATCH_SIZE = 64
ROWS_NAMED = 10  # bad rows named in one error
READERS = 8  # images of one request that are read at once: files and URLs make threads wait
DECODERS = threading.BoundedSemaphore(4)  # images decoded at once in this process: a large one takes half a gigabyte
MAX_URLS = 64  # of one request: each may take as long as `downloads.SECONDS`
MAX_TEXT = 10_000  # characters, some eight times what a model reads
MAX_WORD = 500  # characters without a blank: the tokenizer's time grows with the square of a word's length
# Control characters that Python takes for blanks: the tokenizer deletes them, and so joins what they separate.
_WORD = re.compile(rf"[\S\x0b\x1c-\x1f]{{{MAX_WORD + 1}}}")
_log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """The rows of a request, by their number."""

    texts: dict[int, str]
    images: dict[int, np.ndarray]  # uint8 [S, S, 3], as the model sees them


class Asked(NamedTuple):
    """The parameters of a request. top_k: of `mode` = `rerank`."""

    output: str
    mode: str
    top_k: int


class _Texts(NamedTuple):
    """As the model reads them."""

    features: np.ndarray  # [T, D], unit vectors
    queries: Tensor  # [T, D], not normalised: what asks the pooling
    warnings: list[str]


def _load_pyfunc(data_path: str) -> Embedder:
    """What MLflow calls: `data_path` is the model's folder, or the folder that holds it."""
    return load(Path(data_path))


def load(folder: Path, access: Access | None = None) -> Embedder:
    """The model in a folder, on the device of this machine. Raises ModelError for a folder that holds none."""
    prepare()
    from fast_goal.model.clip import Clip

    return Embedder(Clip.load(folder).to(device()).eval(), access)


class Embedder:
    """Embeds rows of texts and images into one space. Threads may share it: they read at once and compute in turn.

    access: what is read for the caller. None: what the environment says (see `Access.from_environment`).
    """

    def __init__(self, clip: Clip, access: Access | None = None):
        self.clip, self._access = clip, access
        self._lock = threading.Lock()

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """One embedding per row, or the similarities of the images with the texts; what was cut off is warned of in the log.

        See `answer` for the rows, the parameters, the result and the errors.
        """
        made, warnings = self.answer(model_input, params)
        for warning in warnings:
            _log.warning(warning)
        return made

    def answer(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> tuple[pd.DataFrame, list[str]]:
        """The result for the rows of `model_input`, and warnings about them.

        Each row has exactly one of these: `text`; `image`, the bytes of an image file (as bytes, or as base64 text);
        `image_path`, a file below the folder that is allowed; `image_url`, on a host that is allowed. Texts beyond the
        model's context length are cut off, which is a warning.

        Output `embedding` (the default): a row for each row, in their order and with their index; the column `embedding` has
        lists of D floats of unit length. Output `scores`: a row for each image, with the columns `row` (its number among the
        rows, from 0), `text_rows` (the numbers of the texts, T integers, the same in each row) and `scores` (T floats, one for
        each text, or None).

        Scores are by `mode`. `global` (the default): the cosine of the two embeddings. `conditioned`: the cosine of the text
        with the image as the text pools its patches. `rerank`: as `conditioned`, for the `top_k` (128) best texts of each image
        and the `top_k` best images of each text by `global`; None for all other pairs, which come behind these.

        Raises DataError for parameters that there are not, `mode` of a model without text-conditioned pooling included, and for
        rows that cannot be used, which it names; then nothing is embedded.
        """
        import pandas as pd

        asked = self._asked(params)
        rows = self._read(model_input)
        if asked.output == "scores" and not (rows.texts and rows.images):
            raise DataError(
                f"output = 'scores' compares images with texts: at least one of each is needed, "
                f"got {len(rows.images)} images and {len(rows.texts)} texts"
            )
        texts = self._embed_texts(list(rows.texts.values()))
        if asked.output == "scores":
            text_rows = list(rows.texts)
            scores = self._scores(list(rows.images.values()), texts, asked)
            made = {"row": list(rows.images), "text_rows": [text_rows for _ in scores], "scores": scores}
            return pd.DataFrame(made, index=model_input.index[made["row"]]), texts.warnings
        images = [row for features, _ in self._embed_images(list(rows.images.values())) for row in features.tolist()]
        embeddings = dict(zip(rows.texts, texts.features.tolist(), strict=True)) | dict(zip(rows.images, images, strict=True))
        made = {"embedding": [embeddings[row] for row in range(len(model_input))]}
        return pd.DataFrame(made, index=model_input.index), texts.warnings

    @property
    def modes(self) -> list[str]:
        """Those of MODES that this model has: all but the first need a text-conditioned pooling."""
        return list(MODES if self.clip.pooling is not None else MODES[:1])

    def _asked(self, params: Mapping[str, Any] | None) -> Asked:
        """The parameters, checked."""
        params = params or {}
        output, mode, top_k = params.get("output", OUTPUTS[0]), params.get("mode", MODES[0]), params.get("top_k", TOP_K)
        for name, value, known in (("output", output, OUTPUTS), ("mode", mode, MODES)):
            if value not in known:
                raise DataError(f"params.{name} = {shown(str(value))}: expected {', '.join(known[:-1])} or {known[-1]}")
        if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or top_k < 1:
            raise DataError(f"params.top_k = {shown(str(top_k))}: expected a whole number, at least 1")
        if mode != MODES[0] and output != "scores":
            raise DataError(
                f"params.mode = {mode!r} compares images with texts: set output = 'scores' with it. An image has no embedding "
                "of its own then"
            )
        if mode not in self.modes:
            raise DataError(
                f"params.mode = {mode!r}: this model has no text-conditioned pooling, which objective=flair trains. "
                "Its only mode is 'global'"
            )
        return Asked(output, mode, int(top_k))

    def _read(self, model_input: pd.DataFrame) -> Rows:
        access = self._access or Access.from_environment()
        check_shape([str(name) for name in model_input.columns], len(model_input), access)
        texts: dict[int, str] = {}
        images: dict[int, tuple[str, Any]] = {}
        bad: dict[int, str] = {}
        urls = 0
        for row, values in enumerate(model_input.to_dict("records")):
            try:
                name, value = _content(values)
                if name == "text":
                    texts[row] = checked_text(value)
                    continue
                urls += name == "image_url"
                if urls > MAX_URLS and name == "image_url":
                    raise DataError(f"too many URLs: at most {MAX_URLS} in one request")
                images[row] = name, value
            except DataError as error:
                bad[row] = str(error)

        def pixels(row: int) -> np.ndarray | None:
            try:
                return self._pixels(*images[row], access)
            except DataError as error:
                bad[row] = str(error)
                return None

        read = dict(zip(images, _in_threads(pixels, list(images)), strict=True))
        if bad:
            named = [f"row {row}: {bad[row]}" for row in sorted(bad)]
            more = f"\n... and {len(named) - ROWS_NAMED} more" if len(named) > ROWS_NAMED else ""
            raise DataError("\n".join(named[:ROWS_NAMED]) + more)
        return Rows(texts, read)

    def _pixels(self, kind: str, value: Any, access: Access) -> np.ndarray:
        """An image as the model sees it: uint8 [S, S, 3]. Raises DataError, naming what was given and the reason."""
        from fast_goal.data.images import open_image

        content = read_content(kind, value, access)
        with DECODERS:
            try:
                check_pixels(content)
                image = open_image("image", content)
            except DataError as error:
                reason = str(error).removeprefix("image: ")
                raise DataError(reason if kind == "image" else f"{kind} = {shown(value)}: {reason}") from None
            return np.asarray(self.clip.view(*image.size).pixels(image))

    def _embed_texts(self, texts: Sequence[str]) -> _Texts:
        """The texts as the model reads them, and a warning where some were cut off."""
        import torch

        from fast_goal.data.captions import tokenize, trim

        features, queries = [np.empty((0, self.clip.embed_dim), np.float32)], [torch.empty(0, self.clip.embed_dim)]
        cut = 0
        for start in range(0, len(texts), BATCH_SIZE):
            tokens, lengths = tokenize(texts[start : start + BATCH_SIZE], self.clip.context_length)
            cut += int((lengths > self.clip.context_length).sum())
            with self._lock, torch.inference_mode():
                encoded = self.clip(tokens=trim(tokens).to(self._device))
                features.append(encoded.text_features.float().cpu().numpy())
                queries.append(encoded.text_queries.float().cpu())
        made = np.concatenate(features), torch.cat(queries)
        if not cut:
            return _Texts(*made, [])
        share = 100 * cut / len(texts)
        warning = (
            f"{cut} of {len(texts)} texts ({share:.1f} %) are longer than the model's {self.clip.context_length} tokens and "
            "were cut off."
        )
        return _Texts(*made, [warning])

    def _embed_images(self, images: Sequence[np.ndarray], patches: bool = False) -> Iterator[tuple[np.ndarray, Tensor | None]]:
        """In batches, the images' unit vectors [B, D] and, where asked for, projected patches [B, N, D]."""
        import torch

        from fast_goal.data.images import normalised

        for start in range(0, len(images), BATCH_SIZE):
            pixels = torch.from_numpy(np.stack(images[start : start + BATCH_SIZE])).permute(0, 3, 1, 2).contiguous()
            with self._lock, torch.inference_mode():
                encoded = self.clip(images=normalised(pixels.to(self._device), self.clip.mean, self.clip.std))
                projected = self.clip.project_patches(encoded.image_tokens).float() if patches else None
                features = encoded.image_features.float().cpu().numpy()
            yield features, projected

    def _scores(self, images: Sequence[np.ndarray], texts: _Texts, asked: Asked) -> list[list[float | None]]:
        """Of each image, T numbers: see `answer`."""
        if asked.mode == "conditioned":
            found = [self._conditioned(patches, texts.queries) for _, patches in self._embed_images(images, patches=True)]
            return np.concatenate(found).tolist()
        parts = list(self._embed_images(images, patches=asked.mode == "rerank"))
        cosines = np.concatenate([features for features, _ in parts]).astype(np.float64) @ texts.features.T.astype(np.float64)
        if asked.mode == "global":
            return cosines.tolist()
        chosen = _among_first(cosines, asked.top_k, axis=0) | _among_first(cosines, asked.top_k, axis=1)
        rows: list[list[float | None]] = []
        for (_, patches), which in zip(parts, np.split(chosen, range(BATCH_SIZE, len(chosen), BATCH_SIZE)), strict=True):
            scores = np.full(which.shape, None, dtype=object)
            scores[which] = self._conditioned(patches, texts.queries, which).tolist()
            rows += scores.tolist()
        return rows

    def _conditioned(self, patches: Tensor, queries: Tensor, which: np.ndarray | None = None) -> np.ndarray:
        """The conditioned scores of images, patches [B, N, D], with all texts, [B, T]; or of those pairs alone that `which`
        [B, T] names, in its order."""
        import torch

        with self._lock, torch.inference_mode():  # the scorer is not made for several at once
            images, texts = self._scorer.images(patches), self._scorer.texts(queries)
            if which is None:
                return self._scorer.scores(images, texts).cpu().numpy()
            return self._scorer.pairs(images, texts, *torch.from_numpy(np.stack(which.nonzero()))).cpu().numpy()

    @functools.cached_property
    def _scorer(self) -> ConditionedScorer:
        from fast_goal.model.conditioned import ConditionedScorer

        assert self.clip.pooling is not None
        return ConditionedScorer(self.clip.pooling.pooling)

    @property
    def _device(self) -> Any:
        return next(self.clip.parameters()).device


def check_shape(columns: Sequence[str], rows: int, access: Access) -> None:
    """Raises DataError for columns that mean nothing here, and for more rows than are allowed."""
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown or not columns:
        named = ", ".join(map(shown, unknown[:ROWS_NAMED]))
        raise DataError(f"unknown columns [{named}]: expected {' or '.join(f'`{name}`' for name in COLUMNS)}")
    if access.max_rows is not None and rows > access.max_rows:
        raise DataError(
            f"row {access.max_rows}: too many rows: {rows} in one request, where at most {access.max_rows} are allowed. "
            "Send them in several requests."
        )


def checked_text(text: Any) -> str:
    """The text. Raises DataError for what is no text, or one that would keep the tokenizer busy for minutes."""
    if not isinstance(text, str):
        raise DataError(f"text = {shown(str(text))} is not a text")
    if len(text) > MAX_TEXT:
        raise DataError(f"text = {shown(text)} has {len(text):,} characters; at most {MAX_TEXT:,} are read")
    if _WORD.search(text):
        raise DataError(f"text = {shown(text)} has a word of more than {MAX_WORD:,} characters")
    return text


def _in_threads(read: Callable[[int], np.ndarray | None], rows: list[int]) -> list[Any]:
    if len(rows) < 2:
        return [read(row) for row in rows]
    with ThreadPoolExecutor(min(READERS, len(rows))) as pool:
        return list(pool.map(read, rows))


def _among_first(scores: np.ndarray, count: int, axis: int) -> np.ndarray:
    """Which scores are among the `count` highest along the axis; of equal ones the first."""
    first = np.argsort(-scores, axis=axis, kind="stable").take(range(min(count, scores.shape[axis])), axis)
    which = np.zeros(scores.shape, bool)
    np.put_along_axis(which, first, True, axis)
    return which


def _content(values: dict[str, Any]) -> tuple[str, Any]:
    """The column that has the row's content, and the content. Raises DataError unless there is exactly one."""
    given = {name: values[name] for name in COLUMNS if name in values and not _is_missing(values[name])}
    if len(given) != 1:
        raise DataError(f"has {' and '.join(given) or 'neither text nor image'}; expected exactly one of {', '.join(COLUMNS)}")
    [content] = given.items()
    return content


def _is_missing(value: Any) -> bool:
    """None, NaN, pandas' NA, and the blank cell of a table."""
    import pandas as pd

    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, bytes | bytearray):
        return not value
    return pd.api.types.is_scalar(value) and bool(pd.isna(value))
