"""A server with OpenAI's chat interface that sees images (vLLM, llama.cpp, SGLang, Ollama or a paid one): kind `server`.

The image is sent as a JPEG in a data URL, a key from the environment variable FAST_GOAL_CAPTION_API_KEY; see
`data.generation.server` for what is tried again.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from fast_goal.data.captioning import Answer, CaptionerConfig, Failure, captioner, model_view
from fast_goal.data.captioning.editing import refuses
from fast_goal.data.generation.server import ChatClient

KEY_VARIABLE = "FAST_GOAL_CAPTION_API_KEY"
QUALITY = 92  # of the JPEG that is sent


def _settings(config: CaptionerConfig) -> dict[str, Any]:
    return {"quality": QUALITY}  # not the address: the same model may move


@captioner("server", _settings)
class ServerCaptioner:
    """Raises ConfigError for an address that cannot be used, before anything is sent."""

    batch_size = 1

    def __init__(self, config: CaptionerConfig, prompt: str, where: str):
        self._config, self._prompt, server = config, prompt, config.server
        self.parallel = server.concurrency
        self._client = ChatClient(
            server.url,
            config.model,
            KEY_VARIABLE,
            f"{where}.captioner",
            parallel=server.concurrency,
            timeout=server.timeout,
            attempts=server.attempts,
            retry_wait=server.retry_wait,
        )

    def caption(self, images: Sequence[Image.Image]) -> list[Answer | Failure]:
        """See Captioner."""
        return [self._client.ask(self._request(image), _unusable) for image in images]

    def notes(self) -> list[str]:
        return self._client.notes()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _request(self, image: Image.Image) -> dict[str, Any]:
        stream = io.BytesIO()
        model_view(image, self._config.max_side).save(stream, "JPEG", quality=QUALITY)
        url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self._prompt}]
        return {
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self._config.max_new_tokens,
            "temperature": self._config.temperature,
        }


def _unusable(answer: Answer) -> str:
    """Why the image is asked about again."""
    if answer.finish == "refused" or refuses(answer.text):
        return "refused"
    return "" if answer.text.strip() else "empty answer"
