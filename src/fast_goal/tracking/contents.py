"""The bytes of an image that a row of a request gives or names, and what a model may read for its caller.

A caller may be anybody who reaches the server. So a file is read only below one folder, a URL only from hosts that the operator
of the server allows (see `downloads`), and both are refused by default, also outside of a server.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_goal.errors import ConfigError, DataError
from fast_goal.tracking.downloads import MAX_BYTES, UrlPolicy, download

if TYPE_CHECKING:
    from PIL import Image

ROOT_VARIABLE, URLS_VARIABLE, ROWS_VARIABLE = "FAST_GOAL_IMAGE_ROOT", "FAST_GOAL_ALLOW_URLS", "FAST_GOAL_MAX_ROWS"
IMAGE_KINDS = ("image", "image_path", "image_url")
MAX_PIXELS = 64_000_000  # of one image; the largest cameras that people carry have about so many
SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Access:
    """What a model reads for its caller. image_root: the folder that `image_path` is below. urls: the hosts that `image_url`
    may name. max_rows: of one request. None: no paths, no URLs, any number of rows."""

    image_root: Path | None = None
    urls: UrlPolicy | None = None
    max_rows: int | None = None

    @classmethod
    def from_environment(cls) -> Access:
        """FAST_GOAL_IMAGE_ROOT, FAST_GOAL_ALLOW_URLS and FAST_GOAL_MAX_ROWS. Raises ConfigError."""
        root, rows = os.environ.get(ROOT_VARIABLE, ""), os.environ.get(ROWS_VARIABLE, "")
        if rows and not (rows.isascii() and rows.isdigit() and int(rows) > 0):
            raise ConfigError(f"{ROWS_VARIABLE} = {rows!r} is not a number of rows")
        urls = UrlPolicy.parse(os.environ.get(URLS_VARIABLE, ""))
        return cls(Path(root) if root else None, urls, int(rows) if rows else None)


def read_content(kind: str, value: Any, access: Access) -> bytes:
    """The bytes of an image file: `kind` is one of IMAGE_KINDS. Raises DataError with the reason."""
    if kind == "image":
        return _given(value)
    if not isinstance(value, str):
        raise DataError(f"{kind} is a {type(value).__name__}; expected a text")
    try:
        if kind == "image_path":
            return _file(value, access.image_root)
        if access.urls is None:
            raise DataError(f"URLs are not fetched here. The operator may allow hosts with {URLS_VARIABLE}.")
        return download(value, access.urls)
    except DataError as error:
        raise DataError(f"{kind} = {shown(value)}: {error}") from None


def check_pixels(content: bytes) -> None:
    """Raises DataError for a picture with more than MAX_PIXELS, before any of them is decoded. What is no image passes."""
    import io

    from fast_goal.data.images import FORMATS

    image = _header(io.BytesIO(content), FORMATS)
    if image is not None and image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"the image has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded. Scale it down."
        )


def shown(value: str) -> str:
    """The beginning of a value, for a message."""
    return repr(value if len(value) <= SHOWN else value[:SHOWN] + "…")


def _header(stream: Any, formats: tuple[str, ...]) -> Image.Image | None:
    from PIL import Image

    try:
        return Image.open(stream, formats=formats)
    except Exception:  # whatever is wrong with the file, decoding it says so better
        return None


def _given(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            return base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            raise DataError(f"image = {shown(value)} is not base64; expected the bytes of an image file, not a path") from None
    if not isinstance(value, bytes | bytearray):
        raise DataError(f"image is a {type(value).__name__}; expected the bytes of an image file, or their base64 text")
    return bytes(value)


def _file(name: str, root: Path | None) -> bytes:
    """The bytes of a file below `root`. Symbolic links may lead anywhere below it, and nowhere else."""
    if root is None:
        raise DataError(f"files are not read here. The operator may name a folder with {ROOT_VARIABLE}.")
    try:
        base = root.resolve(strict=True)
        parts = (base / name).resolve().relative_to(base).parts
    except (OSError, ValueError, RuntimeError):  # not below it; a zero byte; a circle of links
        raise DataError("not below the folder of images that may be read") from None
    try:
        descriptor = _open_below(base, parts)
    except (OSError, IndexError):
        raise DataError("there is no such file that can be read") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a file")
        if status.st_size > MAX_BYTES:
            raise DataError(f"the file is larger than {MAX_BYTES:,} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return stream.read(MAX_BYTES)
    finally:
        os.close(descriptor)


def _open_below(base: Path, parts: tuple[str, ...]) -> int:
    """Opens a resolved path folder by folder, following no link: one that was put there after the check leads nowhere."""
    folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: a named pipe would wait for a writer
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
