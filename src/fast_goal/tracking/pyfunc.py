"""The registered model: texts and images in, embeddings out.

    model = mlflow.pyfunc.load_model("models:/fast-goal@candidate")
    model.predict(pandas.DataFrame({"text": ["A red kite over a field."]}))["embedding"]

MLflow finds this module in the copy of the package that is stored with the model, and calls `_load_pyfunc` with the
model's folder (open_clip's files: JSON and safetensors; nothing is unpickled). What has to be installed stands in the
model's requirements.txt; fast-goal itself need not be.
"""

from __future__ import annotations

import base64
import binascii
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.environment import device, prepare
from fast_goal.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from fast_goal.model.clip import Clip

COLUMNS = ("text", "image")
BATCH_SIZE = 64
ROWS_NAMED = 10  # bad rows named in one error
_log = logging.getLogger(__name__)


def _load_pyfunc(data_path: str) -> Embedder:
    """What MLflow calls: `data_path` is the model's folder, or the folder that holds it."""
    prepare()
    from fast_goal.model.clip import Clip

    return Embedder(Clip.load(Path(data_path)).to(device()).eval())


class Embedder:
    """Embeds rows of texts and images into one space."""

    def __init__(self, clip: Clip):
        self.clip = clip

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One embedding per row, in the order and with the index of `model_input`.

        `model_input` has the columns `text`, `image` or both, and each row has exactly one of them: a text, or the bytes
        of an image file (as bytes, or as base64 text). Texts beyond the model's context length are cut off, and a warning
        in the log counts them. Returns the column `embedding`: lists of D floats of unit length. Raises DataError naming
        the rows that cannot be used; then nothing is embedded. `params` is MLflow's and has no meaning here.
        """
        import pandas as pd

        unknown = [str(name) for name in model_input.columns if name not in COLUMNS]
        if unknown or not len(model_input.columns):
            raise DataError(f"unknown columns {unknown}: expected `text`, `image` or both, got {list(model_input.columns)}")
        texts: dict[int, str] = {}
        images: dict[int, Image.Image] = {}
        bad: list[str] = []
        for row, values in enumerate(model_input.to_dict("records")):
            try:
                content = _read(values)
            except DataError as error:
                bad.append(f"row {row}: {error}")
                continue
            if isinstance(content, str):
                texts[row] = content
            else:
                images[row] = content
        if bad:
            more = f"\n... and {len(bad) - ROWS_NAMED} more" if len(bad) > ROWS_NAMED else ""
            raise DataError("\n".join(bad[:ROWS_NAMED]) + more)
        embeddings: dict[int, list[float]] = {}
        embeddings.update(zip(texts, self.embed_texts(list(texts.values())), strict=True))
        embeddings.update(zip(images, self.embed_images(list(images.values())), strict=True))
        return pd.DataFrame({"embedding": [embeddings[row] for row in range(len(model_input))]}, index=model_input.index)

    def embed_texts(self, texts: Sequence[str]) -> list[list[float]]:
        """Unit vectors of D floats."""
        import torch

        from fast_goal.data.captions import tokenize, trim

        made: list[list[float]] = []
        cut = 0
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH_SIZE):
                tokens, lengths = tokenize(texts[start : start + BATCH_SIZE], self.clip.context_length)
                cut += int((lengths > self.clip.context_length).sum())
                made += self.clip.encode_text(trim(tokens).to(self._device)).float().cpu().tolist()
        if cut:
            _log.warning(
                "%d of %d texts (%.1f %%) are longer than the model's %d tokens and were cut off.",
                cut,
                len(texts),
                100 * cut / len(texts),
                self.clip.context_length,
            )
        return made

    def embed_images(self, images: Sequence[Image.Image]) -> list[list[float]]:
        """Unit vectors of D floats."""
        import torch

        made: list[list[float]] = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH_SIZE):
                batch = [self.clip.view(*image.size).apply(image) for image in images[start : start + BATCH_SIZE]]
                made += self.clip.encode_image(torch.stack(batch).to(self._device)).float().cpu().tolist()
        return made

    @property
    def _device(self) -> Any:
        return next(self.clip.parameters()).device


def _read(values: dict[str, Any]) -> str | Image.Image:
    """The text or the decoded image of one row. Raises DataError with the reason."""
    given = {name: value for name, value in values.items() if not _is_missing(value)}
    if len(given) != 1:
        raise DataError(f"has {' and '.join(given) or 'neither text nor image'}; expected exactly one of the two")
    [(name, value)] = given.items()
    if name == "text":
        if not isinstance(value, str):
            raise DataError(f"text = {value!r} is not a text")
        return value
    return _decode(value)


def _is_missing(value: Any) -> bool:
    """None, NaN, pandas' NA, and the blank cell of a table."""
    import pandas as pd

    if isinstance(value, str):
        return not value.strip()
    return value == b"" if isinstance(value, bytes | bytearray) else pd.api.types.is_scalar(value) and bool(pd.isna(value))


def _decode(value: Any) -> Image.Image:
    from fast_goal.data.images import open_image

    if isinstance(value, str):
        try:
            value = base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            shown = value if len(value) <= 40 else value[:40] + "…"
            raise DataError(f"image = {shown!r} is not base64; expected the bytes of an image file, not a path") from None
    if not isinstance(value, bytes | bytearray):
        raise DataError(f"image is a {type(value).__name__}; expected the bytes of an image file, or their base64 text")
    with tempfile.NamedTemporaryFile(prefix="fast-goal-") as file:  # `open_image` takes paths
        file.write(value)
        file.flush()
        try:
            return open_image(file.name)
        except DataError as error:
            raise DataError(str(error).removeprefix(f"{file.name}: ")) from None
