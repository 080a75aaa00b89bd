"""A server with OpenAI's chat interface: vLLM, llama.cpp, SGLang, Ollama or a paid one.

A key is read from an environment variable, is sent to the configured server only, and stands in no message. What may pass
is tried again, with growing pauses or as the server's Retry-After says; what concerns one question alone costs that
question; what concerns all of them stops the run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from fast_goal.data.generation import Answer, Failure, Result
from fast_goal.errors import ConfigError, ModelError

LONGEST_WAIT = 300.0  # seconds between two attempts, whatever the server asks for
LARGEST = 16 << 20  # bytes of an answer; what is longer is none
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Again(Exception):
    """An attempt that may be repeated. fatal: if it still fails at the end, the other questions will too."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0, fatal: bool = False, answer: Answer | None = None):
        super().__init__(detail)
        self.reason, self.detail, self.wait, self.fatal, self.answer = reason, detail, wait, fatal, answer


class ChatClient:
    """Asks `model`; several threads may ask at once. `where` is the section that holds `model` and `server`, for messages;
    `timeout` is the time in seconds for one answer, `retry_wait` that before the second attempt.

    Raises ConfigError for an address that cannot be used, before anything is sent.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str,
        where: str,
        *,
        parallel: int,
        timeout: float,
        attempts: int,
        retry_wait: float,
    ):
        import httpx

        self._url, self._model, self._variable, self._where = url, model, key_variable, where
        self._timeout, self._attempts, self._retry_wait = timeout, attempts, retry_wait
        key = os.environ.get(key_variable, "").strip()
        host = _host(url, key, key_variable, where)
        self._secret = key
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=min(10.0, timeout)),
            limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            trust_env=host not in _LOOPBACK,  # a proxy cannot reach this machine's own addresses
        )

    def notes(self) -> list[str]:
        """What was asked again, and how often."""
        return [f"asked again: {reason}, {count} times" for reason, count in self._counts.most_common()]

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def ask(self, content: dict[str, Any], unusable: Callable[[Answer], str] = lambda answer: "") -> Result:
        """The answer to messages and options. `unusable` gives a reason to ask again, or ""; what the last attempt brings
        is returned all the same. Raises ModelError for what every other question would meet too."""
        import tenacity

        growing = tenacity.wait_random_exponential(multiplier=self._retry_wait, max=LONGEST_WAIT)

        def wait(state: tenacity.RetryCallState) -> float:
            again = state.outcome.exception() if state.outcome else None
            asked_for = again.wait if isinstance(again, _Again) else 0.0
            return max(asked_for, growing(state))

        def count(state: tenacity.RetryCallState) -> None:
            again = state.outcome.exception() if state.outcome else None
            if isinstance(again, _Again):
                with self._lock:
                    self._counts[again.reason] += 1

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=wait,
            before_sleep=count,
            reraise=True,
        )
        try:
            return attempts(self._ask, {"model": self._model, **content}, unusable)
        except _Again as again:
            if again.answer is not None:  # that is what this model says
                return again.answer
            if again.fatal:
                raise ModelError(
                    f"{self._where}.server.url = {self._url!r}: {again.detail}, {self._attempts} attempts. The answers so "
                    "far are kept: start or correct the server and run again."
                ) from None
            return Failure(again.reason, f"{again.detail} ({self._attempts} attempts)")

    def _ask(self, content: dict[str, Any], unusable: Callable[[Answer], str]) -> Result:
        """One attempt. Raises _Again, and ModelError for what another attempt and another question would meet too."""
        status, headers, body = self._post(content)
        if status in _RETRIED:
            detail = f"status {status}: {self._hidden(body)}"
            raise _Again(f"status {status}", detail, wait=_retry_after(headers), fatal=status == 429)
        if status in (401, 403):
            how = "is refused" if self._secret else "is missing"
            raise ModelError(
                f"{self._where}.server.url = {self._url!r} answers {status}: the key in the environment variable "
                f"{self._variable} {how}"
            )
        if status == 404 or 300 <= status < 400:
            raise ModelError(
                f"{self._where}.server.url = {self._url!r} answers {status} to /chat/completions with the model "
                f"{self._model!r}: {self._hidden(body)}. Correct .server.url (it often ends in /v1) or .model."
            )
        if status != 200:
            return Failure("refused by the server", f"status {status}: {self._hidden(body)}")
        answer = self._read(body)
        if reason := unusable(answer):
            raise _Again(reason, answer.text[:200], answer=answer)
        return answer

    def _post(self, content: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Status, headers and body. httpx's own time limit begins anew with every byte: the clock is looked at here."""
        import httpx

        url, body = f"{self._url.rstrip('/')}/chat/completions", bytearray()
        deadline = time.monotonic() + self._timeout
        try:
            with self._client.stream("POST", url, json=content) as response:
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > deadline:
                        raise _Again("timeout", f"no whole answer within {self._timeout:g} s")
                    if len(body) > LARGEST:
                        raise _Again("unreadable answer", f"more than {LARGEST >> 20} MiB")
                return response.status_code, response.headers, bytes(body)
        except httpx.TimeoutException as error:
            fatal = isinstance(error, httpx.ConnectTimeout)
            raise _Again("timeout", f"no answer within {self._timeout:g} s", fatal=fatal) from None
        except httpx.ConnectError as error:
            raise _Again("no connection", f"no connection ({self._hidden(error)})", fatal=True) from None
        except httpx.RequestError as error:
            # or it cannot be decoded; perhaps the server died of this question; if so, the next one will tell
            raise _Again("connection lost", f"the connection was lost ({self._hidden(error)})") from None

    def _read(self, body: bytes) -> Answer:
        """The answer in a response of status 200."""
        try:
            values = json.loads(body)
            choice = values["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Again("unreadable answer", f"not a chat completion: {self._hidden(body)}") from None
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
        if text is not None and not isinstance(text, str):
            raise _Again("unreadable answer", f"the content is {type(text).__name__}")
        model = values.get("model")
        model = model if isinstance(model, str) and model else self._model
        if refusal or finish == "content_filter":
            return Answer(str(refusal or text or ""), "refused", model)
        return Answer(text or "", "length" if finish == "length" else "stop", model)

    def _hidden(self, text: object) -> str:
        """The beginning of a server's words on one line, without the key, which some servers repeat."""
        line = " ".join((text.decode(errors="replace") if isinstance(text, bytes) else str(text)).split())
        return (line.replace(self._secret, "***") if self._secret else line)[:200] or "without a word"


def _host(url: str, key: str, variable: str, where: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        usable = parts.scheme in ("http", "https") and bool(host.encode("idna")) and parts.port != 0
    except ValueError:  # half an IPv6 address, a port that is none, an empty label
        usable = False
    if not usable:
        raise ConfigError(f"{where}.server.url = {url!r}: expected http://HOST:PORT/v1 or https://HOST/v1")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the environment variable {variable} holds a line break or a letter beyond ASCII: copy the key again"
        )
    if parts.username or parts.password:
        raise ConfigError(f"{where}.server.url holds a name or password; a key belongs in the environment: {variable}")
    if key and parts.scheme == "http" and host not in _LOOPBACK:
        raise ConfigError(
            f"{where}.server.url = {url!r}: the key of {variable} would cross the network in clear. Use https, a tunnel "
            "to a loopback port, or unset the variable if the server needs none."
        )
    return host


def _retry_after(headers: Any) -> float:
    """Seconds that the header Retry-After asks for, a number or a date; 0 without one."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # TypeError: a date without a time zone
            seconds = 0.0
    return min(max(0.0, seconds), LONGEST_WAIT) if seconds == seconds else 0.0
