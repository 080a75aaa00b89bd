import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from published import CAPTION, SENTENCES, config, make

from fast_goal.data import publication
from fast_goal.data.publication import write_publication
from fast_goal.data.records import SKIPPED, read_table
from fast_goal.errors import DataError

LAYOUTS = ["table", "parquet", "webdataset"]
MADE = {"matcher": {"model": "ViT-B-16", "pretrained": "openai"}, "flism": {"top_k": 2}}


@pytest.fixture
def data(tmp_path):
    return make(tmp_path / "root")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(folder: Path, layout: str) -> list[tuple[dict, bytes | None]]:
    """Every row with its image, read without the project's own reader."""
    found = []
    for path in sorted((folder / "data").iterdir()):
        if layout != "webdataset":
            for row in pq.read_table(path).to_pylist():
                image = row.pop("image", None)
                assert image is None or image["path"] == row["image_path"]
                found.append((row, image and image["bytes"]))
            continue
        with tarfile.open(path) as archive:
            members = [(member.name, archive.extractfile(member).read()) for member in archive]
        keys = list(dict.fromkeys(name.partition(".")[0] for name, _ in members))
        for key in keys:
            own = {name.partition(".")[2]: data for name, data in members if name.startswith(f"{key}.")}
            row = json.loads(own.pop("json"))
            [(ending, image)] = own.items()
            assert row["image_path"].endswith(f".{ending}")
            found.append((row, image))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_there_with_its_image_and_pairs(data, tmp_path, layout):
    dataset, pairs, skipped = data
    info = write_publication(dataset, pairs, skipped, config(layout), tmp_path / "out", MADE)
    found = rows_of(tmp_path / "out", layout)
    order = {split: index for index, split in enumerate(["pretrain", "train", "val", "test"])}
    assert sorted(row["image_id"] for row, _ in found) == sorted(dataset.records["image_id"])
    assert {row["split"] for row, _ in found} == set(order) - {"pretrain"}
    for row, image in found:
        record = dataset.records[dataset.records["image_id"] == row["image_id"]].iloc[0]
        assert {name: row[name] for name in record.index} == record.to_dict()
        if layout != "table":
            assert image == (dataset.root / record["image_path"]).read_bytes()
        own = pairs[pairs["image_id"] == row["image_id"]].sort_values("rank").drop(columns="image_id").to_dict("records")
        assert row["pairs"] == own
        flat = {name: row[name] for name in ("char_start", "char_end", "x1", "y1", "x2", "y2", "kind", "similarity")}
        assert flat == ({name: own[0][name] for name in flat} if own else dict.fromkeys(flat))
        assert row["local_sentence"] == (own[0]["sentence"] if own else None)
        if own:
            assert row["long_caption"][row["char_start"] : row["char_end"]] == row["local_sentence"]
    ending = "tar" if layout == "webdataset" else "parquet"
    assert info["splits"] == {
        "train": {"images": 6, "files": [f"data/train-0000{number}-of-00002.{ending}" for number in range(2)]},
        "val": {"images": 1, "files": [f"data/val-00000-of-00001.{ending}"]},
        "test": {"images": 1, "files": [f"data/test-00000-of-00001.{ending}"]},
    }
    assert (info["images"], info["pairs"], info["images_with_pair"], info["skipped"], info["skipped_here"]) == (8, 9, 7, 1, 0)
    assert info["mean_words_long"] == len(CAPTION.split()) and info["pairs_by_kind"] == {"detector": 7}
    best = pairs[pairs["rank"] == 1]["similarity"]
    assert info["mean_similarity"] == pytest.approx(best.mean(), abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_data_give_the_same_bytes(data, tmp_path, layout):
    dataset, pairs, skipped = data
    shuffled = pairs.sample(frac=1, random_state=1)
    write_publication(dataset, pairs, skipped, config(layout), tmp_path / "one", MADE)
    write_publication(dataset, shuffled, skipped, config(layout), tmp_path / "two", MADE)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    other = write_publication(
        dataset, pairs.assign(similarity=pairs["similarity"] + 0.01), skipped, config(layout), tmp_path / "two"
    )
    assert other["digest"] != json.loads((tmp_path / "one/dataset.json").read_text())["digest"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_checksums_are_those_that_sha256sum_finds(data, tmp_path, layout):
    write_publication(*data, config(layout), tmp_path / "out")
    done = subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=tmp_path / "out", check=False)
    assert done.returncode == 0
    listed = {line.split("  ")[1] for line in (tmp_path / "out/checksums.sha256").read_text().splitlines()}
    assert listed == set(files(tmp_path / "out")) - {"checksums.sha256"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_that_can_no_longer_be_read_are_listed(data, tmp_path, layout):
    dataset, pairs, skipped = data
    paths = [dataset.root / path for path in dataset.records["image_path"]]
    paths[0].unlink()
    paths[1].write_bytes(b"another file")
    info = write_publication(dataset, pairs, skipped, config(layout), tmp_path / "out")
    found = read_table(tmp_path / "out/skipped.parquet", SKIPPED)
    lost = [["id/old", "flism", "no sentence"], ["id/0.x", "publish", "image missing"]]
    if layout != "table":
        lost.append(["id/1.x", "publish", "image changed"])
    assert found[["sample", "step", "reason"]].to_numpy().tolist() == lost
    assert str(tmp_path) not in " ".join(found["detail"])
    assert info["skipped_here"] == len(lost) - 1 and info["images"] == 9 - len(lost)
    assert len(rows_of(tmp_path / "out", layout)) == info["images"]


def test_no_key_comes_twice_in_the_shards_of_a_split(data, tmp_path):
    """Read with the library itself."""
    import webdataset

    write_publication(*data, config("webdataset"), tmp_path / "out")
    shards = f"{tmp_path}/out/data/train-{{00000..00001}}-of-00002.tar"
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(6)]
    assert samples[0]["jpg"].size == (40, 30) and samples[0]["json"]["image_id"] == "id/0.x"


def test_the_parquet_files_say_which_column_is_the_image(data, tmp_path):
    write_publication(*data, config("parquet"), tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out/data/train-00000-of-00002.parquet")
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"] == {"image": {"_type": "Image"}}
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"


def test_the_card_has_a_header_that_hugging_face_reads_and_pictures(data, tmp_path):
    dataset, pairs, skipped = data
    info = write_publication(dataset, pairs, skipped, config("parquet"), tmp_path / "out", MADE)
    card = (tmp_path / "out/README.md").read_text()
    _, header, body = card.split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["license"] == "cc-by-4.0" and values["size_categories"] == ["n<1K"]
    assert values["configs"][0]["data_files"] == [{"split": s, "path": f"data/{s}-*"} for s in ("train", "val", "test")]
    assert "8 images with captions, 7 of them with a local pair" in body and f"`{info['digest']}`" in body
    assert "| matcher | model | `ViT-B-16` |" in body and "| flism | no sentence | 1 | id/old |" in body
    assert f"**{SENTENCES[0]}**" in body and "house \\| behind" in body
    assert str(tmp_path) not in card
    pictures = sorted((tmp_path / "out/examples").iterdir())
    assert len(pictures) == 3 and all(f"(examples/{path.name})" in body for path in pictures)
    assert max(Image.open(pictures[0]).size) <= 256


def test_a_publication_without_images_has_no_small_ones_either(data, tmp_path):
    write_publication(*data, config("table"), tmp_path / "out", MADE)
    card = (tmp_path / "out/README.md").read_text()
    assert not (tmp_path / "out/examples").exists() and "![" not in card
    assert f"**{SENTENCES[0]}**" in card and "detector (1, 2, 30, 20)" in card


def test_odd_texts_in_the_card(data, tmp_path):
    """A licence that YAML and Markdown would read, and a caption of 10,000 words around the sentence."""
    dataset, pairs, skipped = data
    filling = "word " * 5000
    shift = len(filling)
    long = replace(dataset, records=dataset.records.assign(long_caption=filling + CAPTION + " word" * 5000))
    moved = pairs.assign(char_start=pairs["char_start"] + shift, char_end=pairs["char_end"] + shift)
    licence = 'see: "terms" # 1\n--- <b>ü</b>'
    settings = replace(config("parquet"), licence=licence)
    write_publication(long, moved, skipped, settings, tmp_path / "out", {"flism": {"classes": None}})
    card = (tmp_path / "out/README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == licence and "\\<b\\>ü" in body
    assert f"**{SENTENCES[0]}**" in body and "… " in body and " …" in body and len(body) < 10_000
    assert "| flism | classes | null |" in body and "kept as their source published them" in body
    made = {"captions": {"model": "llava", "prompt": "Describe | this."}}
    write_publication(long, moved, skipped, settings, tmp_path / "out", made)
    card = (tmp_path / "out/README.md").read_text()
    assert "| captions | prompt | `Describe \\| this.` |" in card and "written by a model" in card
    assert "kept as their source published them" not in card


def test_a_failure_leaves_the_publication_that_was_there(data, tmp_path, monkeypatch):
    dataset, pairs, skipped = data
    write_publication(dataset, pairs, skipped, config("parquet"), tmp_path / "out")
    before = files(tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publication, "write_card", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        write_publication(dataset, pairs, skipped, config("webdataset"), tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "root"]


def test_what_cannot_be_published_is_named(data, tmp_path):
    dataset, pairs, skipped = data
    with pytest.raises(DataError, match="the pairs speak of image 'nobody'"):
        write_publication(
            dataset, pd.concat([pairs, pairs.head(1).assign(image_id="nobody")]), skipped, config("table"), tmp_path / "out"
        )
    recaptioned = replace(dataset, records=dataset.records.assign(long_caption="Another caption."))
    with pytest.raises(
        DataError, match=r"image 'id/0.x': its long caption has 'Another caption.' where .* run the step `flism`"
    ):
        write_publication(recaptioned, pairs, skipped, config("table"), tmp_path / "out")
    for path in ("../x.jpg", "/x.jpg", "a/../../x.jpg", "a\\x.jpg"):
        bad = replace(dataset, records=dataset.records.assign(image_path=path))
        with pytest.raises(DataError, match="leaves the data root"):
            write_publication(bad, pairs, skipped, config("table"), tmp_path / "out")
    for path in dataset.records["image_path"]:
        (dataset.root / path).unlink()
    with pytest.raises(DataError, match=r"there is no image to publish \(8 skipped; photos/b.c/0.v1.jpg does not exist\)"):
        write_publication(dataset, pairs, skipped, config("parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_memory_is_bounded_by_a_row_group_not_by_the_data_set(tmp_path, layout, monkeypatch):
    """60 images of 1 MB: what is alive at once stays well below their sum."""
    import tracemalloc

    monkeypatch.setattr(publication, "GROUP_BYTES", 4 * 2**20)
    monkeypatch.setattr(publication, "READ_AHEAD", 4)
    dataset, pairs, skipped = make(tmp_path / "root", 2)
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "BMP")
    records = []
    for number in range(60):
        path = f"{number}.bmp"
        (tmp_path / "root" / path).write_bytes(stream.getvalue())
        record = dataset.records.iloc[0].to_dict()
        content = hashlib.sha256(stream.getvalue()).hexdigest()
        records.append(record | {"image_id": path, "image_path": path, "content_hash": content})
    dataset = replace(dataset, records=pd.DataFrame(records))
    tracemalloc.start()
    write_publication(dataset, pairs.head(0), skipped, config(layout, 1000), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * 2**20 < 60 * len(stream.getvalue())
