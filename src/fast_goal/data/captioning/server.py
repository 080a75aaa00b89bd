"""A server with OpenAI's chat interface (vLLM, llama.cpp, SGLang, Ollama or a paid one): kind `server`.

The image is sent as a JPEG in a data URL. A key is read from the environment variable FAST_GOAL_CAPTION_API_KEY, is sent to
the configured server only, and stands in no message. What may pass is tried again, with growing pauses or as the server's
Retry-After says; what concerns one image alone costs that image; what concerns all of them stops the run.
"""

from __future__ import annotations

import base64
import io
import os
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from fast_goal.data.captioning import Answer, CaptionerConfig, Failure, captioner, model_view
from fast_goal.data.captioning.editing import refuses
from fast_goal.errors import ConfigError, ModelError

KEY_VARIABLE = "FAST_GOAL_CAPTION_API_KEY"
QUALITY = 92  # of the JPEG that is sent
LONGEST_WAIT = 300.0  # seconds between two attempts, whatever the server asks for
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Again(Exception):
    """An attempt that may be repeated. fatal: if it still fails at the end, the other images will too."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0, fatal: bool = False, answer: Answer | None = None):
        super().__init__(detail)
        self.reason, self.detail, self.wait, self.fatal, self.answer = reason, detail, wait, fatal, answer


def _settings(config: CaptionerConfig) -> dict[str, Any]:
    return {"quality": QUALITY}  # not the address: the same model may move


@captioner("server", _settings)
class ServerCaptioner:
    """Raises ConfigError for an address that cannot be used, before anything is sent."""

    batch_size = 1

    def __init__(self, config: CaptionerConfig, prompt: str, where: str):
        import httpx

        self._config, self._prompt, self._where = config, prompt, f"{where}.captioner"
        self.parallel = config.server.concurrency
        key = os.environ.get(KEY_VARIABLE, "").strip()
        host = _host(config.server.url, key, self._where)
        self._secret = key
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.server.timeout, connect=min(10.0, config.server.timeout)),
            limits=httpx.Limits(max_connections=self.parallel, max_keepalive_connections=self.parallel),
            trust_env=host not in _LOOPBACK,  # a proxy cannot reach this machine's own addresses
        )

    def caption(self, images: Sequence[Image.Image]) -> list[Answer | Failure]:
        """See Captioner."""
        return [self._one(image) for image in images]

    def notes(self) -> list[str]:
        return [f"asked again: {reason}, {count} times" for reason, count in self._counts.most_common()]

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _one(self, image: Image.Image) -> Answer | Failure:
        import tenacity

        content = self._request(image)
        server = self._config.server
        growing = tenacity.wait_random_exponential(multiplier=server.retry_wait, max=LONGEST_WAIT)

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
            stop=tenacity.stop_after_attempt(server.attempts),
            wait=wait,
            before_sleep=count,
            reraise=True,
        )
        try:
            return attempts(self._ask, content)
        except _Again as again:
            if again.answer is not None:  # empty or refused: that is what this model says
                return again.answer
            if again.fatal:
                raise ModelError(
                    f"{self._where}.server.url = {server.url!r}: {again.detail}, {server.attempts} attempts. The answers so "
                    "far are kept: start or correct the server and run again."
                ) from None
            return Failure(again.reason, f"{again.detail} ({server.attempts} attempts)")

    def _request(self, image: Image.Image) -> dict[str, Any]:
        stream = io.BytesIO()
        model_view(image, self._config.max_side).save(stream, "JPEG", quality=QUALITY)
        url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self._prompt}]
        return {
            "model": self._config.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self._config.max_new_tokens,
            "temperature": self._config.temperature,
        }

    def _ask(self, content: dict[str, Any]) -> Answer | Failure:
        """One attempt. Raises _Again, and ModelError for what another attempt and another image would meet too."""
        import httpx

        try:
            response = self._client.post(f"{self._config.server.url.rstrip('/')}/chat/completions", json=content)
        except httpx.TimeoutException as error:
            fatal = isinstance(error, httpx.ConnectTimeout)
            raise _Again("timeout", f"no answer within {self._config.server.timeout:g} s", fatal=fatal) from None
        except httpx.ConnectError as error:
            raise _Again("no connection", f"no connection ({self._hidden(error)})", fatal=True) from None
        except (
            httpx.RequestError
        ) as error:  # or it cannot be decoded; perhaps the server died of this image; if so, the next one will tell
            raise _Again("connection lost", f"the connection was lost ({self._hidden(error)})") from None
        status = response.status_code
        if status in _RETRIED:
            detail = f"status {status}: {self._hidden(response.text)}"
            raise _Again(f"status {status}", detail, wait=_retry_after(response.headers), fatal=status == 429)
        if status in (401, 403):
            how = "is refused" if self._secret else "is missing"
            raise ModelError(
                f"{self._where}.server.url = {self._config.server.url!r} answers {status}: the key in the environment variable "
                f"{KEY_VARIABLE} {how}"
            )
        if status == 404 or 300 <= status < 400:
            raise ModelError(
                f"{self._where}.server.url = {self._config.server.url!r} answers {status} to /chat/completions with the model "
                f"{self._config.model!r}: {self._hidden(response.text)}. Correct .server.url (it often ends in /v1) or .model."
            )
        if status != 200:
            return Failure("refused by the server", f"status {status}: {self._hidden(response.text)}")
        return self._read(response)

    def _read(self, response: Any) -> Answer:
        """The answer in a response of status 200."""
        try:
            values = response.json()
            choice = values["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Again("unreadable answer", f"not a chat completion: {self._hidden(response.text)}") from None
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
        if text is not None and not isinstance(text, str):
            raise _Again("unreadable answer", f"the content is {type(text).__name__}")
        model = values.get("model")
        model = model if isinstance(model, str) and model else self._config.model
        if refusal or finish == "content_filter":
            refused = Answer(str(refusal or text or ""), "refused", model)
            raise _Again("refused", refused.text[:200], answer=refused)
        answer = Answer(text or "", "length" if finish == "length" else "stop", model)
        if not answer.text.strip():
            raise _Again("empty answer", "the model said nothing", answer=answer)
        if refuses(answer.text):
            raise _Again("refused", answer.text[:200], answer=answer)
        return answer

    def _hidden(self, text: object) -> str:
        """The beginning of a server's words on one line, without the key, which some servers repeat."""
        line = " ".join(str(text).split())
        return (line.replace(self._secret, "***") if self._secret else line)[:200] or "without a word"


def _host(url: str, key: str, where: str) -> str:
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
            f"the environment variable {KEY_VARIABLE} holds a line break or a letter beyond ASCII: copy the key again"
        )
    if parts.username or parts.password:
        raise ConfigError(f"{where}.server.url holds a name or password; a key belongs in the environment: {KEY_VARIABLE}")
    if key and parts.scheme == "http" and host not in _LOOPBACK:
        raise ConfigError(
            f"{where}.server.url = {url!r}: the key of {KEY_VARIABLE} would cross the network in clear. Use https, a tunnel "
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
