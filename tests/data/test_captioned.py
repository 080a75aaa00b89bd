"""The source `captioned`: a folder of images, a model that writes the captions, and what is kept of its answers."""

import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import chat_server
import numpy as np
import pytest
import tiny_llava
import yaml
from chat_server import chat
from PIL import Image

from fast_goal.configure import CONF, check, compose
from fast_goal.data import generation
from fast_goal.data.captioning import Answer, asking
from fast_goal.data.captions import split_sentences
from fast_goal.data.generation.store import AnswerStore
from fast_goal.data.records import RECORDS, SKIPPED, load_dataset, load_skipped, write_table
from fast_goal.data.sources import source_config
from fast_goal.errors import DataError, ModelError
from fast_goal.stages.download import main
from fast_goal.tracking import NullTracker

SECTION = yaml.safe_load((CONF / "dataset/captioned.yaml").read_text())["download"]["datasets"]["glit"]
COLOURS = [(red, green, blue) for red in (50, 200) for green in (50, 200) for blue in (50, 200)]


@pytest.fixture
def server():
    with chat_server.running() as running:
        yield running


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(path: str, index: int, size: tuple[int, int] = (40, 30), **options: object) -> Path:
    where = Path("photos", path)
    where.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[index % 8]).save(where, **options)
    return where


def section(url: str, **values: object) -> dict:
    server = SECTION["captioner"]["server"] | {"url": url, "retry_wait": 0.001, "attempts": 2, "timeout": 10, "concurrency": 2}
    captioner = SECTION["captioner"] | {"kind": "server", "model": "vlm", "server": server}
    return SECTION | {"root": "photos", "captioner": captioner} | values


def load(values: dict):
    function, config = source_config(values, "download.datasets.glit")
    loaded = function(config, "glit", Path("data/datasets/glit"))
    write_table("records.parquet", loaded.rows, RECORDS)  # rows and skipped must fit their tables
    write_table("skipped.parquet", loaded.skipped, SKIPPED)
    return loaded


def lines() -> dict[str, dict]:
    text = Path("data/datasets/glit/captions.jsonl").read_text()
    return {line["image"]: line for line in map(json.loads, text.splitlines())}


def reasons(loaded) -> dict[str, str]:
    return {row["sample"]: row["reason"] for row in loaded.skipped}


def test_a_folder_of_odd_images(project, server):
    photo("a.jpg", 0, quality=95)
    photo("deep/er/b.png", 1, size=(1, 1))
    photo("deep/c.png", 2)
    photo("deep/c.jpg", 3, quality=95)
    Image.new("L", (20, 20), 100).save("photos/grey.png")
    Image.new("RGBA", (20, 20), (200, 50, 50, 0)).save("photos/clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo("turned.jpg", 4, size=(60, 20), exif=exif, quality=95)
    photo(".hidden/x.png", 5), photo(".x.png", 5)
    Path("photos/broken.jpg").write_bytes(b"no image")
    Path("photos/notes.txt").write_text("no image")
    Path(os.fsdecode(b"photos/\xff.png")).write_bytes(Path("photos/grey.png").read_bytes())

    loaded = load(section(server.url))
    rows = {row["image_id"]: row for row in loaded.rows}
    assert set(rows) == {"a", "deep/er/b", "deep/c.png", "deep/c.jpg", "grey", "clear", "turned"}
    assert rows["a"] == {
        "image_id": "a",
        "image_path": "a.jpg",
        "width": 40,
        "height": 30,
        "split": rows["a"]["split"],
        "long_caption": "The picture is 40 wide. Its colour is 50, 50, 50.",
        "captions": [],
        "source": "captioned",
        "content_hash": hashlib.sha256(Path("photos/a.jpg").read_bytes()).hexdigest(),
    }
    assert rows["turned"]["width"] == 20 and rows["turned"]["long_caption"].startswith("The picture is 20 wide.")
    assert "255, 255, 255" in rows["clear"]["long_caption"], "transparency is laid over white"
    assert "100, 100, 100" in rows["grey"]["long_caption"]
    assert reasons(loaded) == {"broken": "unreadable image", "\ufffd.png": "file name is not UTF-8"}
    assert [row["image_id"] for row in loaded.hashes] == [row["image_id"] for row in loaded.rows]
    assert loaded.root == Path("photos") and len(server.requests) == 7


def test_captions_file_shows_answer_and_caption_and_suits_the_source_folder(project, server):
    for index in range(5):
        photo(f"{index}.png", index)
    answers = {
        (50, 50, 50): chat("A dark wall.\n\nNothing else."),
        (50, 50, 200): chat("A blue wall. Behind it, a", "length"),
        (50, 200, 50): chat("I'm sorry, I can't help with that."),
        (50, 200, 200): chat(""),
    }
    server.answer = lambda request: answers.get(request["colour"]) or chat("A wall.")
    loaded = load(section(server.url))
    assert {row["image_id"]: row["long_caption"] for row in loaded.rows} == {
        "0": "A dark wall. Nothing else.",
        "1": "A blue wall.",
        "4": "A wall.",
    }
    assert reasons(loaded) == {"2": "refused", "3": "empty answer"}
    found = lines()
    assert found["1.png"] | {"prompt_digest": ""} == {
        "image": "1.png",
        "caption": "A blue wall.",
        "skipped": "",
        "rules": ["unfinished last sentence dropped"],
        "raw": "A blue wall. Behind it, a",
        "finish": "length",
        "model": "fake-vlm-1",
        "prompt_digest": "",
    }
    assert found["2.png"]["skipped"] == "refused" and found["2.png"]["raw"].startswith("I'm sorry")
    notes = "\n".join(loaded.notes)
    assert "unfinished last sentence dropped: 1 captions" in notes and "line breaks and blanks joined: 1 captions" in notes

    columns = {"image": "image", "caption": None, "long_caption": "caption", "id": None, "split": None}
    folder = {
        "source": "folder",
        "root": "photos",
        "images": ".",
        "captions": str(project / "data/datasets/glit/captions.jsonl"),
    }
    function, config = source_config(
        folder | {"columns": columns, "seed": 0, "fractions": SECTION["fractions"]}, "download.datasets.again"
    )
    again = function(config, "again", Path("data/datasets/again"))
    keep = ("image_id", "long_caption", "split", "content_hash")
    assert [[row[key] for key in keep] for row in again.rows] == [[row[key] for key in keep] for row in loaded.rows]


def test_only_what_is_new_is_asked(project, server):
    for index in range(6):
        photo(f"{index}.png", index)
    photo("copy.png", 0)
    values = section(server.url)
    first = load(values)
    assert len(server.requests) == 6 and len(first.rows) == 7, "a copy is not asked about twice"
    assert load(values).rows == first.rows and len(server.requests) == 6
    photo("new.png", 6)
    Path("photos/0.png").rename("photos/moved.png")
    second = load(values)
    assert len(server.requests) == 7 and len(second.rows) == 8
    load(section(server.url, seed=3))
    assert len(server.requests) == 7, "the splits do not concern the model"
    load(section(server.url, prompt="Say it otherwise."))
    assert len(server.requests) == 14
    assert "0 asked now, 7 known before" in load(values).notes[0]


def test_nothing_is_loaded_when_everything_is_known(project, server, monkeypatch):
    photo("a.png", 0)
    load(section(server.url))
    monkeypatch.setattr(asking, "load_captioner", lambda *_: pytest.fail("the model was loaded"))
    load(section(server.url))


def test_copies_stay_in_one_split(project, server):
    for index in range(8):
        photo(f"{index}.png", index)
        photo(f"copies/{index}.png", index)
    rows = load(section(server.url, fractions={"train": 0.4, "val": 0.3, "test": 0.3})).rows
    split = {row["image_id"]: row["split"] for row in rows}
    assert all(split[str(index)] == split[f"copies/{index}"] for index in range(8)) and len(set(split.values())) > 1


def _load_in_folder(folder: str, url: str) -> None:
    os.chdir(folder)
    load(section(url))


def test_a_killed_run_goes_on_where_it_stopped(project, server):
    for index in range(30):
        photo(f"{index}.png", index, size=(20 + index, 20))
    server.delay = 0.05
    process = multiprocessing.get_context("spawn").Process(target=_load_in_folder, args=(str(project), server.url))
    process.start()
    deadline = time.monotonic() + 60
    while len(server.requests) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time.sleep(0.1)  # what was under way when it died
    asked = len(server.requests)
    [store] = Path(".fast_goal/captions").glob("*.sqlite")
    with sqlite3.connect(store) as connection:
        kept = connection.execute("SELECT count(*) FROM answers").fetchone()[0]
    assert 10 <= asked < 30 and asked - 5 <= kept <= asked
    server.delay = 0.0
    loaded = load(section(server.url))
    assert len(loaded.rows) == 30 and len(server.requests) == asked + 30 - kept
    assert {row["long_caption"].split(".")[0] for row in loaded.rows} == {f"The picture is {20 + i} wide" for i in range(30)}


def test_a_damaged_store_is_named(tmp_path):
    """Its first pages, which are read when it is opened, are whole."""
    with AnswerStore("key", {}, tmp_path) as store:
        store.put({f"{number:064x}": Answer("words " * 50, "stop", "m") for number in range(500)})
    content = bytearray((tmp_path / "key.sqlite").read_bytes())
    content[16384:131072] = b"\xff" * (131072 - 16384)
    (tmp_path / "key.sqlite").write_bytes(content)
    with (
        AnswerStore("key", {}, tmp_path) as store,
        pytest.raises(DataError, match=r"key\.sqlite.*malformed.*move the file away"),
    ):
        store.get([f"{number:064x}" for number in range(500)])


def test_requests_run_side_by_side_up_to_the_limit(project, server):
    for index in range(12):
        photo(f"{index}.png", index, size=(20 + index, 20))
    server.delay = 0.05
    load(section(server.url))
    assert server.most_busy == 2


def test_a_failed_image_is_skipped_and_asked_again_next_time(project, server):
    photo("a.png", 0), photo("b.png", 1)
    server.answer = lambda request: (500, {}, b"") if request["colour"] == (50, 50, 200) else chat("A wall.")
    loaded = load(section(server.url))
    assert reasons(loaded) == {"b": "status 500"} and lines()["b.png"]["skipped"] == "status 500"
    server.answer = lambda request: chat("A wall.")
    before = len(server.requests)
    assert len(load(section(server.url)).rows) == 2 and len(server.requests) == before + 1


def test_a_model_that_always_fails_stops_the_run(project, server, monkeypatch):
    monkeypatch.setattr(generation.asking, "FAILURES_IN_A_ROW", 5)
    for index in range(40):
        photo(f"{index:02d}.png", index, size=(20 + index, 20))
    server.answer = lambda request: chat("A wall.") if request["size"][0] < 23 else (400, {}, b"no vision")
    with pytest.raises(ModelError, match=r"images in a row .*status 400: no vision The 3 answers"):
        load(section(server.url))
    assert len(server.requests) < 20
    with pytest.raises(ModelError, match="no connection"):
        load(section("http://127.0.0.1:9/v1"))


def test_what_stops_the_step(project, server):
    with pytest.raises(DataError, match=r"photos.* does not exist; set download\.datasets\.glit\.root"):
        load(section(server.url))
    Path("photos").mkdir()
    with pytest.raises(DataError, match="no image that can be used"):
        load(section(server.url))
    photo("a.png", 0)
    with pytest.raises(DataError, match="is not below"):
        load(section(server.url, images=".."))
    server.answer = lambda request: chat("I cannot describe people.")
    with pytest.raises(DataError, match=r"no image got a caption.*refused: 1 \(first: a I cannot"):
        load(section(server.url))


def test_the_step_download_with_a_tiny_model(project):
    """The experiment's own configuration, with a tiny LLaVA-NeXT in the place of the large one."""
    model = tiny_llava.save(project / "tiny")
    generator = np.random.default_rng(0)
    Path("photos").mkdir()
    for index in range(10):
        Image.fromarray(generator.integers(0, 256, (30 + index, 60, 3), dtype=np.uint8)).save(f"photos/{index}.png")
    Path("photos/broken.png").write_bytes(b"")
    glit = "download.datasets.glit"
    overrides = [f"{glit}.root=photos", f"{glit}.captioner.model={model}", f"{glit}.captioner.transformers.batch_size=4"]
    params = check(compose(["experiment=glit", *overrides, f"{glit}.captioner.max_new_tokens=20"]))
    main(SimpleNamespace(download=params.download), NullTracker())
    dataset, skipped = load_dataset("glit"), load_skipped("glit")
    assert len(dataset.records) == 10 and len(dataset.hashes) == 10 and dataset.source == "captioned"
    assert skipped[["sample", "reason"]].values.tolist() == [["broken", "unreadable image"]]
    known = {sentence.strip() for sentence in tiny_llava.SENTENCES}
    for caption in dataset.records["long_caption"]:
        assert {sentence.text for sentence in split_sentences(caption)} <= known and len(split_sentences(caption)) >= 3
    assert dataset.records["long_caption"].nunique() >= 5
    assert params.flism.splits == ["train", "val", "test"] and params.publish.layout == "parquet"
    assert (params.base.detector.kind, params.base.detector.weights) == ("yolos", "hustvl/yolos-base")
    before = Path("data/records/glit.json").read_bytes()
    main(SimpleNamespace(download=params.download), NullTracker())
    assert Path("data/records/glit.json").read_bytes() == before
