"""`hf://datasets/<owner>/<name>[@<revision>]/<path>`: what the Hugging Face hub says about a file, so that it can be fetched.

huggingface_hub 2 starts an interrupted download over; so it resolves the address (commit, size, checksum, access), and
`data.transfer` brings the bytes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from fast_goal.data.origins import Missing, Unreachable
from fast_goal.environment import prepare
from fast_goal.errors import ConfigError, DataError


class NoAccess(DataError):
    """The hub wants a login or an accepted licence; `page` is where."""

    def __init__(self, message: str, page: str):
        super().__init__(message)
        self.page = page


@dataclass(frozen=True)
class HubFile:
    """Where a file lies, at a fixed commit. `headers` hold the token; `cached`: huggingface_hub has the file already."""

    url: str
    headers: dict[str, str] = field(repr=False)
    size: int | None
    sha256: str | None
    cached: Path | None = None


def resolve(address: str) -> HubFile:
    """Asks the hub of HF_ENDPOINT with the token HF_TOKEN, or with HF_HUB_OFFLINE=1 only huggingface_hub's own cache.

    Raises ConfigError for an address that is none, Missing, NoAccess, Unreachable.
    """
    prepare()  # or the library asks the hub for more than the file
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HfUriError,
        HTTPError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import parse_hf_uri

    try:
        place = parse_hf_uri(address)
    except HfUriError as error:
        raise ConfigError(f"url = {address!r}: {error}") from None
    if place.type == "bucket" or not place.path_in_repo:
        raise ConfigError(f"url = {address!r}: expected hf://datasets/<owner>/<name>[@<revision>]/<path of a file>")
    where = {"repo_id": place.id, "filename": place.path_in_repo, "repo_type": place.type, "revision": place.revision}
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    token = os.environ.get("HF_TOKEN", "")
    if offline():
        cached = try_to_load_from_cache(**where)
        if isinstance(cached, str):
            return HubFile(address, {}, Path(cached).stat().st_size, None, Path(cached))
        raise Unreachable(f"{address} is not in huggingface_hub's cache, and HF_HUB_OFFLINE forbids to ask for it")
    folder = {"dataset": "datasets/", "space": "spaces/", "kernel": "kernels/"}.get(place.type, "")
    page = f"{endpoint or 'https://huggingface.co'}/{folder}{place.id}"
    try:
        facts = get_hf_file_metadata(hf_hub_url(**where, endpoint=endpoint), token=token or False, retry_on_errors=True)
    except OfflineModeIsEnabled as error:  # the library reads the variable when it is imported
        raise Unreachable(f"{address}: {error}") from None
    except GatedRepoError:
        raise NoAccess(f"{address}: its owner gives access after the licence was accepted", page) from None
    except RepositoryNotFoundError:
        if token:
            raise Missing(f"{address}: {page} does not exist, or HF_TOKEN does not open it") from None
        raise NoAccess(f"{address}: {page} does not exist, or needs a login", page) from None
    except RevisionNotFoundError:
        raise Missing(f"{address}: {page} has no revision {place.revision!r}") from None
    except RemoteEntryNotFoundError:
        raise Missing(f"{address}: {page} has no file {place.path_in_repo!r}") from None
    except HfHubHTTPError as error:
        raise Unreachable(f"{address}: the hub answers {error.response.status_code}") from None
    except HTTPError as error:
        raise Unreachable(f"{address}: the hub cannot be reached ({error or type(error).__name__})") from None
    fixed = hf_hub_url(**{**where, "revision": facts.commit_hash or place.revision}, endpoint=endpoint)
    checksum = facts.etag if facts.etag and re.fullmatch(r"[0-9a-f]{64}", facts.etag) else None  # so it is for large files
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return HubFile(fixed, headers, facts.size, checksum)


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
