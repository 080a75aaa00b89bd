import hashlib
import json

import pytest
from file_server import FileServer

from fast_goal.data import fetch as module
from fast_goal.data.fetch import ManualStep, Remote, fetch
from fast_goal.data.origins import Missing, Policy, Unreachable
from fast_goal.errors import ConfigError, DataError

DATA = bytes(range(256)) * 10_000
SHA = hashlib.sha256(DATA).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = "datasets/owner/name/resolve"


@pytest.fixture
def hub(monkeypatch):
    """The hub as its API is: HEAD of /resolve/<revision>/<path> tells commit, size and checksum and redirects to storage."""
    monkeypatch.setattr(module, "POLICY", Policy(attempts=3, first_wait=0.01, read_timeout=2.0))
    for name in ("FAST_GOAL_MIRROR", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with FileServer({}) as server, FileServer({"signed/blob": DATA}) as storage:
        facts = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{SHA}"', "X-Linked-Size": str(len(DATA))}
        for revision in ("main", COMMIT):
            server.fault(f"{HUB}/{revision}/data/a.tar", times=None, redirect=storage.url("signed/blob"), headers=facts)
        monkeypatch.setenv("HF_ENDPOINT", server.base)
        server.storage = storage
        yield server


def test_hub_files_are_checked_and_continued(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.storage.fault("signed/blob", close_after=1_000_000)
    path = fetch(Remote("hf://datasets/owner/name/data/a.tar", None, None, None), tmp_path)
    assert path == tmp_path / "a.tar"
    assert path.read_bytes() == DATA
    mark = (tmp_path / "a.tar.fetched.json").read_text()
    assert json.loads(mark)["checked"] is True  # the hub publishes the checksum of large files
    assert "hf_secret" not in mark
    assert [request.start for request in hub.storage.requests] == [0, 1_000_000]
    asked = [request for request in hub.requests if request.path.startswith(HUB)]
    assert {request.path for request in asked if request.method == "GET"} == {f"{HUB}/{COMMIT}/data/a.tar"}
    assert {request.headers.get("authorization") for request in asked} == {"Bearer hf_secret"}
    assert {request.headers.get("authorization") for request in hub.storage.requests} == {None}


def test_hub_file_with_a_wrong_checksum(hub, tmp_path):
    hub.storage.files["signed/blob"] = DATA[::-1]
    with pytest.raises(DataError, match=f"published is {SHA}"):
        fetch(Remote("hf://datasets/owner/name/data/a.tar", None, None, None), tmp_path)


def test_hub_refusals(hub, tmp_path, monkeypatch):
    hub.fault(f"{HUB}/main/gated", times=None, status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(ManualStep, match=r"1\. Log in and accept the terms on .*/datasets/owner/name\n[\s\S]*HF_TOKEN"):
        fetch(Remote("hf://datasets/owner/name/gated", None, None, None), tmp_path)
    hub.fault(f"{HUB}/main/none", times=None, status=404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
    with pytest.raises(Missing, match="has no file 'none'"):
        fetch(Remote("hf://datasets/owner/name/none", None, None, None), tmp_path)
    hub.fault(f"{HUB}/v9/none", times=None, status=404, headers={"X-Error-Code": "RevisionNotFound"})
    with pytest.raises(Missing, match="has no revision 'v9'"):
        fetch(Remote("hf://datasets/owner/name@v9/none", None, None, None), tmp_path)
    hub.fault("datasets/owner/other/resolve/main/a", times=None, status=401, headers={"X-Error-Code": "RepoNotFound"})
    with pytest.raises(ManualStep, match="does not exist, or needs a login"):
        fetch(Remote("hf://datasets/owner/other/a", None, None, None), tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(Missing, match="HF_TOKEN does not open it") as error:
        fetch(Remote("hf://datasets/owner/other/a", None, None, None), tmp_path)
    assert "hf_secret" not in str(error.value)
    for address in ("hf://datasets/owner/name", "hf://nonsense"):
        with pytest.raises(ConfigError, match="hf://"):
            fetch(Remote(address, None, None, None), tmp_path)


def test_offline_asks_nobody(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE forbids"):
        fetch(Remote("hf://datasets/owner/name/data/a.tar", None, None, None), tmp_path)
    assert hub.requests == []


def test_offline_takes_what_the_library_has_cached(hub, tmp_path, monkeypatch):
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "datasets--owner--name"
    (repository / "snapshots" / COMMIT / "data").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT / "data" / "a.tar").write_bytes(DATA)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(Remote("hf://datasets/owner/name/data/a.tar", None, None, None), tmp_path / "out").read_bytes() == DATA
    assert hub.requests == []
