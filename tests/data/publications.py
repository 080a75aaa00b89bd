"""Small copies of published data sets for the tests of their sources: archives in the true layouts on a local server."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from file_server import FileServer
from PIL import Image

import fast_goal
from fast_goal.data import fetch
from fast_goal.data.origins import Policy
from fast_goal.data.records import HASHES, OBJECTS, RECORDS, SKIPPED, write_table
from fast_goal.data.sources import Facts, Loaded, source_config, source_facts

CONF = Path(fast_goal.__file__).parent / "conf/dataset"


def jpeg(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A photograph of its own for each seed; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(stream, "JPEG")
    return stream.getvalue()


def tar(files: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    """The same bytes at any time of day, as `zipped`: a server's file may not change between two runs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0) if mode == "w:gz" else stream.getvalue()


def zipped(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def remote(server: FileServer, name: str, **values: Any) -> dict[str, Any]:
    return {"url": server.url(name), "file": None, "sha256": None, "size": None, **values}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def shipped(name: str) -> dict[str, Any]:
    """The section that conf/dataset/<name>.yaml adds."""
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["download"]["datasets"][name]


def facts(name: str) -> Facts:
    found = source_facts(shipped(name), f"download.datasets.{name}")
    assert found is not None
    return found


def load(name: str, section: Mapping[str, Any]) -> Loaded:
    """Runs a source as the step `download` does, and holds what it returns against the tables' schemas."""
    function, config = source_config(section, f"download.datasets.{name}")
    folder = Path("data/datasets", name)
    loaded = function(config, name, folder)
    assert loaded.root == folder
    tables = {"records": (loaded.rows, RECORDS), "skipped": (loaded.skipped, SKIPPED), "hashes": (loaded.hashes, HASHES)}
    if loaded.objects is not None:
        tables["objects"] = (loaded.objects, OBJECTS)
    for table, (rows, schema) in tables.items():
        write_table(Path("tables", f"{table}.parquet"), rows, schema)
    for row in loaded.rows:
        content = (folder / row["image_path"]).read_bytes()
        assert row["content_hash"] == sha256(content)
        assert (row["width"], row["height"]) == Image.open(io.BytesIO(content)).size
    assert [row["image_id"] for row in loaded.hashes] == [row["image_id"] for row in loaded.rows]
    return loaded


def reasons(loaded: Loaded) -> list[tuple[str, int, str]]:
    return [(row["sample"], row["row"], row["reason"]) for row in loaded.skipped]


def captions(loaded: Loaded) -> dict[str, str]:
    return {row["image_id"]: row["long_caption"] for row in loaded.rows}


def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder to be in; downloads give up at once instead of waiting for a better day."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FAST_GOAL_DOWNLOADS", raising=False)
    monkeypatch.delenv("FAST_GOAL_MIRROR", raising=False)
    monkeypatch.setattr(fetch, "POLICY", Policy(attempts=1, first_wait=0.01, longest_wait=0.01))
    return tmp_path


def lines(*entries: Any) -> bytes:
    """JSON lines; bytes stand as they are."""
    return b"".join((entry if isinstance(entry, bytes) else json.dumps(entry).encode()) + b"\n" for entry in entries)
