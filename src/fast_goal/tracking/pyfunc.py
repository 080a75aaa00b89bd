"""The registered model: texts and images in, embeddings or their similarities out.

    model = mlflow.pyfunc.load_model("models:/fast-goal@candidate")
    model.predict(pandas.DataFrame({"text": ["A red kite over a field."]}))["embedding"]

MLflow finds this module in the copy of the package that is stored with the model, and calls `_load_pyfunc` with the
model's folder (open_clip's files: JSON and safetensors; nothing is unpickled). What has to be installed stands in the
model's requirements.txt; fast-goal itself need not be.

Letters: `I` image rows and `T` text rows of a request, `D` embedding width, `S` side of the model's input in pixels.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fast_goal.environment import device, prepare
from fast_goal.errors import DataError
from fast_goal.tracking.contents import IMAGE_KINDS, Access, check_pixels, read_content, shown

if TYPE_CHECKING:
    import pandas as pd

    from fast_goal.model.clip import Clip

COLUMNS = ("text", *IMAGE_KINDS)
OUTPUTS = ("embedding", "scores")
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

        See `answer` for the rows, the result and the errors. `params`: `output`, either `embedding` or `scores`.
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

        Output `embedding`: a row for each row, in their order and with their index; the column `embedding` has lists of D
        floats of unit length. Output `scores`: a row for each image, with the columns `row` (its number among the rows, from
        0), `text_rows` (the numbers of the texts, T integers, the same in each row) and `scores` (T floats: the cosine of the
        image with each of the texts).

        Raises DataError naming the rows that cannot be used; then nothing is embedded.
        """
        import pandas as pd

        output = _output(params)
        rows = self._read(model_input)
        if output == "scores" and not (rows.texts and rows.images):
            raise DataError(
                f"output = 'scores' compares images with texts: at least one of each is needed, "
                f"got {len(rows.images)} images and {len(rows.texts)} texts"
            )
        texts, warnings = self._embed_texts(list(rows.texts.values()))
        images = self._embed_images(list(rows.images.values()))
        if output == "scores":
            cosines = np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T  # [I, T]
            text_rows = list(rows.texts)
            made = {"row": list(rows.images), "text_rows": [text_rows for _ in images], "scores": cosines.tolist()}
            return pd.DataFrame(made, index=model_input.index[made["row"]]), warnings
        embeddings = dict(zip(rows.texts, texts, strict=True)) | dict(zip(rows.images, images, strict=True))
        made = {"embedding": [embeddings[row] for row in range(len(model_input))]}
        return pd.DataFrame(made, index=model_input.index), warnings

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

    def _embed_texts(self, texts: Sequence[str]) -> tuple[list[list[float]], list[str]]:
        """Unit vectors of D floats, and a warning where texts were cut off."""
        import torch

        from fast_goal.data.captions import tokenize, trim

        made: list[list[float]] = []
        cut = 0
        for start in range(0, len(texts), BATCH_SIZE):
            tokens, lengths = tokenize(texts[start : start + BATCH_SIZE], self.clip.context_length)
            cut += int((lengths > self.clip.context_length).sum())
            with self._lock, torch.inference_mode():
                made += self.clip.encode_text(trim(tokens).to(self._device)).float().cpu().tolist()
        if not cut:
            return made, []
        share = 100 * cut / len(texts)
        return made, [
            f"{cut} of {len(texts)} texts ({share:.1f} %) are longer than the model's {self.clip.context_length} tokens and "
            "were cut off."
        ]

    def _embed_images(self, images: Sequence[np.ndarray]) -> list[list[float]]:
        """Unit vectors of D floats."""
        import torch

        from fast_goal.data.images import normalised

        made: list[list[float]] = []
        for start in range(0, len(images), BATCH_SIZE):
            pixels = torch.from_numpy(np.stack(images[start : start + BATCH_SIZE])).permute(0, 3, 1, 2).contiguous()
            with self._lock, torch.inference_mode():
                batch = normalised(pixels.to(self._device), self.clip.mean, self.clip.std)
                made += self.clip.encode_image(batch).float().cpu().tolist()
        return made

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


def _output(params: Mapping[str, Any] | None) -> str:
    output = (params or {}).get("output", OUTPUTS[0])
    if output not in OUTPUTS:
        raise DataError(f"params.output = {shown(str(output))}: expected {' or '.join(OUTPUTS)}")
    return output


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
