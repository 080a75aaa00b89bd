"""Serves a model over HTTP until it is told to end.

fast-goal serve --model models:/fast-goal@champion --port 5002
"""

from __future__ import annotations

import ipaddress
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from fast_goal.environment import prepare
from fast_goal.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What the command line says. allow_urls: as FAST_GOAL_ALLOW_URLS."""

    model: str
    host: str
    port: int
    image_root: Path | None
    allow_urls: str
    max_rows: int
    max_megabytes: int
    threads: int


def run(options: Options) -> None:
    """Loads the model, listens, and ends the process when it is told to.

    Raises ConfigError, ModelError or FastGoalError for what stands against it.
    """
    prepare()
    from fast_goal.tracking import serving
    from fast_goal.tracking.contents import Access
    from fast_goal.tracking.downloads import UrlPolicy
    from fast_goal.tracking.located import locate
    from fast_goal.tracking.pyfunc import load

    if options.image_root is not None and not options.image_root.is_dir():
        raise ConfigError(f"--image-root {options.image_root} is not a folder")
    access = Access(options.image_root, UrlPolicy.parse(options.allow_urls), options.max_rows)
    limits = serving.Limits(options.max_megabytes * 1024 * 1024, options.threads)
    with serving.bound(options.host, options.port) as listening:  # taken ports are found before the model is loaded
        located = locate(options.model)
        embedder = load(located.folder, access)
        serving.check_embeds(embedder, options.model)
        private = is_loopback(options.host)
        hosts = ["localhost", "127.0.0.1", "::1", "[::1]", options.host] if private else ["*"]
        app = serving.application(embedder, located, access, limits, hosts)
        if not private:
            _say(
                f"WARNING: {options.host} can be reached from other machines, and there is no authentication and no TLS: "
                "whoever reaches the port may use the model. Put a proxy with both in front of it."
            )
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listening.getsockname()[1]}"
        version = f", version {located.version}" if located.version is not None else ""
        serving.run(app, listening, lambda: _say(f"{located.name}{version} at {address}/invocations; Ctrl-C ends it"))
    _say("ended")
    sys.stdout.flush()
    # Python would wait for threads that compute for requests which were given up, and then take torch apart for seconds
    os._exit(0)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _say(text: str) -> None:
    print(f"fast-goal serve: {text}", file=sys.stderr, flush=True)
