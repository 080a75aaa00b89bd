"""Tells people what a retraining came to: through a webhook, or through a notification block of Prefect.

FAST_GOAL_WEBHOOK_URL is an address that takes JSON by POST: {"event", "text", "flow_run", "details"}; Slack and others
show `text`. FAST_GOAL_NOTIFICATION_BLOCK is the name of a saved block, such as `slack-webhook/team`. A failure is logged and
stops nothing; addresses are secrets and are never shown whole.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
from running import Logger  # first: it sets Prefect's switches

from prefect.blocks import notifications  # isort: skip  also makes the types of blocks known
from prefect.blocks.core import Block  # isort: skip

WEBHOOK_VARIABLE = "FAST_GOAL_WEBHOOK_URL"
BLOCK_VARIABLE = "FAST_GOAL_NOTIFICATION_BLOCK"
SECONDS = 10.0  # for a notification, whatever the other side does


def notify(event: str, text: str, flow_run: str, details: Mapping[str, Any], logger: Logger, seconds: float = SECONDS) -> None:
    """Sends it on every way that is set. `event`: promoted, rejected, failed or drift. Raises nothing."""
    if url := os.environ.get(WEBHOOK_VARIABLE):
        body = {"event": event, "text": text, "flow_run": flow_run, "details": dict(details)}
        _within(seconds, f"the webhook at {_shown(url)} ({WEBHOOK_VARIABLE})", lambda: _post(url, body, seconds), logger)
    if name := os.environ.get(BLOCK_VARIABLE):
        subject = f"FAST-GOAL: {event}"
        _within(seconds, f"the block {name!r} ({BLOCK_VARIABLE})", lambda: _through_block(name, text, subject), logger)


def _post(url: str, body: Mapping[str, Any], seconds: float) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # its INFO lines hold the whole address
    answer = httpx.post(url, json=body, timeout=seconds)
    if not answer.is_success:
        raise _Refused(f"it answers {answer.status_code}")


def _through_block(name: str, text: str, subject: str) -> None:
    block = Block.load(name)
    if not isinstance(block, notifications.NotificationBlock):
        raise _Refused(f"it is a {type(block).__name__}, which sends no notifications")
    with block.raise_on_failure():
        block.notify(text, subject)


class _Refused(Exception):
    """Its message is fit to be shown."""


def _within(seconds: float, where: str, send: Callable[[], None], logger: Logger) -> None:
    """In a thread, since a server that sends a byte now and then outlasts the time limits of a library."""
    failures: list[str] = []

    def attempt() -> None:
        try:
            send()
        # Any error, and of most only the kind: their messages may hold the address.
        except Exception as error:
            failures.append(str(error) if isinstance(error, _Refused) else type(error).__name__)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(attempt,), daemon=True, name="notification")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        failures.append(f"no answer within {seconds:g} s")
    if failures:
        logger.warning("Nobody was notified through %s: %s.", where, failures[0])


def _shown(url: str) -> str:
    """The address without its path and query, where webhooks have their secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}/…"
