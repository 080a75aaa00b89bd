"""The web application of `fast-goal serve`: MLflow's scoring protocol, and what is known of the model.

    POST /invocations    rows in, embeddings or scores out; the JSON forms of `mlflow models serve`
    GET  /metadata       name, version, aliases, digest, sizes, modes
    GET  /health, /ping  200 as soon as anything answers: the port opens when the model is loaded and has embedded
    GET  /version        of MLflow, as its own server says it

MLflow's server answers a wrong request with a stack trace and the request's own data. This one says the reason and no more:
`{"error_code": ..., "message": ...}`, without paths of the server. A request is read as it comes in and refused as soon as it
is too large. Requests are decoded by threads side by side and computed one after the other: a model that already uses all
cores gains nothing from two at once, and a row's result never depends on what others ask for at the same time.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fast_goal.errors import ConfigError, DataError, ModelError
from fast_goal.tracking.contents import Access
from fast_goal.tracking.located import Located
from fast_goal.tracking.pyfunc import PARAMS, Embedder, check_shape

if TYPE_CHECKING:
    import pandas as pd
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

FORMS = ("dataframe_records", "dataframe_split", "instances", "inputs")
ADMITTED = 32  # requests that are read, wait or are computed at once; further ones are told to come again
BODY_SECONDS = 60  # to send a request
DRAINED = 4  # times the limit: so much of a body that is too large is read, for a client that listens only when it has sent all
GRACE_SECONDS = 5  # for requests that are under way when the server is told to end
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """max_bytes: of a request. threads: requests that are decoded at once."""

    max_bytes: int = 32 * 1024 * 1024
    threads: int = 4


class Refusal(Exception):
    """A request that gets no result."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def application(embedder: Embedder, located: Located, access: Access, limits: Limits, hosts: list[str]) -> Starlette:
    """The application. `hosts`: the names under which it may be asked for, `*` for any."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    pool = ThreadPoolExecutor(limits.threads, "request")
    described = metadata(embedder, located, access, limits)
    admitted = 0

    async def invocations(request: Request) -> Response:
        nonlocal admitted
        if admitted >= ADMITTED:
            raise Refusal(503, "RESOURCE_EXHAUSTED", "Too many requests at once; come again in a second.")
        admitted += 1
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise Refusal(415, "BAD_REQUEST", "Content-Type: expected application/json.")
            body = await _body(request, limits.max_bytes)
            made = await asyncio.get_running_loop().run_in_executor(pool, invoke, embedder, access, body)
            return Response(made, media_type="application/json")
        finally:
            admitted -= 1

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ready"})

    async def version(request: Request) -> Response:
        return PlainTextResponse(importlib.metadata.version("mlflow"))

    async def about(request: Request) -> Response:
        return JSONResponse(described)

    async def refused(request: Request, error: Any) -> Response:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"error_code": error.code, "message": str(error)}, error.status, headers)

    async def unknown(request: Request, error: Any) -> Response:
        known = "POST /invocations, GET /metadata, /health, /ping, /version"
        code = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "BAD_REQUEST")
        message = f"{request.method} {request.url.path[:80]}: {error.detail}. There is: {known}"
        return JSONResponse({"error_code": code, "message": message}, error.status_code, error.headers)

    async def failed(request: Request, error: Exception) -> Response:  # what went wrong is in the server's log
        return JSONResponse({"error_code": "INTERNAL_ERROR", "message": "The server failed; its log says why."}, 500)

    return Starlette(
        routes=[
            Route("/invocations", invocations, methods=["POST"]),
            Route("/health", health),
            Route("/ping", health),
            Route("/version", version),
            Route("/metadata", about),
        ],
        # a page in a browser cannot reach a server on loopback under a name of its own
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={Refusal: refused, HTTPException: unknown, Exception: failed},
    )


def invoke(embedder: Embedder, access: Access, body: bytes) -> bytes:
    """The answer to the body of a request, as JSON. Raises Refusal with the reason."""
    try:
        frame, params = parse(body, access)
        made, warnings = embedder.answer(frame, params)
    except DataError as error:
        raise Refusal(400, "BAD_REQUEST", str(error)) from None
    for warning in warnings:
        _log.warning(warning)
    answer = {"predictions": made.to_dict("records"), **({"warnings": warnings} if warnings else {})}
    return json.dumps(answer, allow_nan=False).encode()


def parse(body: bytes, access: Access) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """The rows and parameters of a request in one of MLflow's JSON forms. Raises DataError.

    Rows and columns are counted before a table is made of them: a few bytes can ask for a very large one.
    """
    import pandas as pd

    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and numbers of thousands of digits
        reason = f"{error.msg} (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"the request is not JSON{': ' * bool(reason)}{reason}") from None
    forms = [form for form in FORMS if form in request] if isinstance(request, dict) else []
    if len(forms) != 1 or set(request) - {*FORMS, "params"}:
        found = f"the fields {sorted(map(str, request))[:10]}" if isinstance(request, dict) else type(request).__name__
        raise DataError(f"expected a JSON object with one of {', '.join(FORMS)}, and `params` if needed; found {found}")
    params = request.get("params")
    if params is not None and (not isinstance(params, dict) or set(params) - {*PARAMS}):
        raise DataError(f"params: expected an object with some of {', '.join(PARAMS)} and nothing else")
    columns, rows = _table(forms[0], request[forms[0]])
    check_shape(columns, len(rows), access)
    if not rows:
        raise DataError("the request has no rows")
    return pd.DataFrame(rows, columns=columns, dtype=object), params


def _table(form: str, given: Any) -> tuple[list[str], list[Any]]:
    """Columns and rows of one of FORMS. Raises DataError."""
    if form in ("dataframe_records", "instances"):
        if not isinstance(given, list) or not all(isinstance(row, dict) for row in given):
            raise DataError(f'{form}: expected a list of objects, such as [{{"text": "a red kite"}}]')
        columns = list(dict.fromkeys(name for row in given for name in row))
        return columns or ["text"] * (not given), given
    if form == "inputs":
        columns = list(given) if isinstance(given, dict) else []
        if not columns or not all(isinstance(values, list) for values in given.values()):
            raise DataError('inputs: expected an object of lists, such as {"text": ["a red kite"]}')
        if len({len(values) for values in given.values()}) > 1:
            raise DataError("inputs: the lists have different lengths")
        return columns, [dict(zip(columns, row, strict=True)) for row in zip(*given.values(), strict=True)]
    columns, rows = (given.get("columns"), given.get("data")) if isinstance(given, dict) else (None, None)
    sound = isinstance(columns, list) and isinstance(rows, list) and all(isinstance(name, str) for name in columns)
    if (
        not sound
        or len(set(columns)) != len(columns)
        or not all(isinstance(row, list) and len(row) == len(columns) for row in rows)
    ):
        raise DataError(
            'dataframe_split: expected columns and rows of the same length, such as {"columns": ["text"], "data": [["a kite"]]}'
        )
    return columns, rows


def metadata(embedder: Embedder, located: Located, access: Access, limits: Limits) -> dict[str, Any]:
    """What GET /metadata says. No path of this machine is in it."""
    clip = embedder.clip
    return {
        "model": located.name,
        "uri": located.uri,
        "version": located.version,
        "aliases": located.aliases,
        "digest": located.digest,
        "git_commit": located.git_commit,
        "licence": located.licence,
        "tags": dict(located.tags),
        "context_length": clip.context_length,
        "embedding_width": clip.embed_dim,
        "image_size": clip.image_size,
        "view": clip.view_mode,
        "modes": embedder.modes,
        "limits": {
            "rows": access.max_rows,
            "bytes": limits.max_bytes,
            "image_path": access.image_root is not None,
            "image_url": access.urls is not None,
        },
        "fast_goal": importlib.metadata.version("fast-goal"),
    }


def check_embeds(embedder: Embedder, uri: str) -> None:
    """Embeds an example, and compares what is in it, so that the first request is no slower than others. Raises ModelError for
    a model that cannot."""
    import numpy as np

    from fast_goal.tracking.registry import input_example

    lengths = np.linalg.norm(np.array(embedder.answer(input_example())[0]["embedding"].tolist()), axis=1)
    if not np.allclose(lengths, 1, atol=1e-3):
        raise ModelError(f"{uri} gives embeddings of length {lengths.tolist()} instead of 1: its weights are damaged")
    for mode in embedder.modes[1:]:
        scores = embedder.answer(input_example(), {"output": "scores", "mode": mode})[0]["scores"].tolist()
        if not np.isfinite(scores).all():
            raise ModelError(f"{uri} gives the scores {scores} in the mode {mode}: its weights are damaged")


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet. Raises ConfigError if the address cannot be had."""
    try:
        [family, *_, address] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened on: {error.strerror or error}. Choose another port, or 0 for any."
        ) from None
    return made


def run(app: Starlette, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answers requests until SIGTERM or SIGINT; what is under way then has GRACE_SECONDS. `ready` is called at the start.

    A request that took longer is still computed by its thread when this returns: nothing can stop it but the process's end.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=GRACE_SECONDS, server_header=False)
    if threading.current_thread() is threading.main_thread():
        # uvicorn ends by these signals, and sends them again when it has ended: then they have had their effect
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[listening])


async def _body(request: Request, limit: int) -> bytes:
    """The body of a request. Raises Refusal for one that is too large or does not come."""
    from starlette.requests import ClientDisconnect

    declared = request.headers.get("content-length", "")
    refusal = Refusal(413, "REQUEST_TOO_LARGE", f"The request is larger than {limit:,} bytes; send fewer rows at a time.")
    if declared.isdecimal() and int(declared) > DRAINED * limit:
        raise refusal
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > DRAINED * limit:
                    break
                if size <= limit:
                    parts.append(part)
                else:
                    parts.clear()
    except TimeoutError:
        raise Refusal(408, "REQUEST_TIMEOUT", f"The request did not arrive within {BODY_SECONDS} s.") from None
    except ClientDisconnect:  # nobody reads the answer; without it the log would have a stack trace
        raise Refusal(400, "BAD_REQUEST", "The request ended before all of it was sent.") from None
    if size > limit:
        raise refusal
    return b"".join(parts)
