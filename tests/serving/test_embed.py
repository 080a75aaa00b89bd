"""`fast-goal embed`: what comes out, what is skipped, what a kill costs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_project import tiny_clip

from fast_goal.data.captions import tokenize
from fast_goal.data.images import open_image
from fast_goal.errors import DataError, ModelError
from fast_goal.evaluation.features import FeatureStore
from fast_goal.operations import embed

COUNT = 40


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_clip(0).save(tmp_path / "model", {})
    return tmp_path


def photographs(folder, count=COUNT):
    """Different pictures at different depths."""
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / ("a/b/c" if index % 3 else "z") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40 + index, 60, 3), dtype=np.uint8)).save(path)


def vectors(path):
    return np.array(pd.read_parquet(path)["embedding"].tolist(), np.float32)


def test_a_folder_of_images(project):
    photographs(project / "photos", 10)
    (project / "photos/notes.txt").write_text("no image")
    (project / "photos/broken.png").write_bytes((project / "photos/z/000.png").read_bytes()[:200])
    (project / "photos/empty.jpg").touch()
    (project / "photos/lost.jpg").symlink_to("nowhere.jpg")
    (project / "photos/Twin.PNG").write_bytes((project / "photos/z/000.png").read_bytes())
    told = embed.run(project / "photos", project / "out/photos.parquet", "model", batch_size=4)
    assert "11 images, 16 numbers each; 3 skipped" in told

    table = pq.read_table(project / "out/photos.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    paths = table["path"].to_pylist()
    assert len(paths) == 11 and paths == sorted(paths) and "a/b/c/001.png" in paths and "Twin.PNG" in paths
    clip = tiny_clip(0).eval()
    with torch.no_grad():
        images = [open_image(project / "photos" / path) for path in paths]
        wanted = torch.cat([clip.encode_image(clip.view(*image.size).apply(image)[None]) for image in images]).numpy()
    found = vectors(project / "out/photos.parquet")
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (found[paths.index("Twin.PNG")] == found[paths.index("z/000.png")]).all()

    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert about["fast_goal.model"] == "model" and len(about["fast_goal.model_digest"]) == 16
    assert about["fast_goal.skipped"] == "3"
    skipped = pd.read_parquet(project / "out/photos.skipped.parquet")
    assert skipped["item"].tolist() == ["broken.png", "empty.jpg", "lost.jpg"]
    for reason, word in zip(skipped["reason"], ["truncated", "empty", "No such file"], strict=True):
        assert word in reason and str(project) not in reason


def test_the_texts_of_a_table(project):
    texts = ["A red kite.", "", "A field, wide and green.", "word " * 400, "x" * 2000]
    pd.DataFrame({"id": list("abcde"), "caption": texts}).to_csv("texts.csv", index=False)
    pd.DataFrame({"text": texts}).to_parquet("texts.parquet")
    pd.DataFrame({"id": list("abcde"), "text": texts}).to_json("texts.jsonl", orient="records", lines=True)
    told = embed.run(project / "texts.csv", project / "out.parquet", "model", column="caption")
    assert "3 texts, 16 numbers each; 2 skipped" in told and "1 of 3 texts are longer" in told
    table = pd.read_parquet("out.parquet")
    assert list(table.columns) == ["id", "text", "embedding"] and table["id"].tolist() == ["a", "c", "d"]
    clip = tiny_clip(0).eval()
    with torch.no_grad():
        wanted = clip.encode_text(tokenize([texts[0], texts[2], texts[3]], clip.context_length)[0]).numpy()
    np.testing.assert_allclose(vectors("out.parquet"), wanted, atol=1e-6)
    skipped = pd.read_parquet("out.skipped.parquet")
    assert skipped["item"].tolist() == ["b", "e"]
    assert "empty" in skipped["reason"][0] and "a word of more than 500 characters" in skipped["reason"][1]

    for name in ("texts.parquet", "texts.jsonl"):
        embed.run(project / name, project / "other.parquet", "model")
        np.testing.assert_array_equal(vectors("other.parquet"), vectors("out.parquet"))
    embed.run(project / "texts.parquet", project / "other.parquet", "model")
    assert pd.read_parquet("other.parquet")["id"].tolist() == ["1", "3", "4"]  # the rows' numbers, where there is no id


def test_nothing_is_done_twice(project, monkeypatch):
    photographs(project / "photos", 12)
    output = project / "photos.parquet"
    embed.run(project / "photos", output, "model")
    before = output.read_bytes(), output.stat().st_mtime_ns
    assert "nothing to do" in embed.run(project / "photos", output, "model")
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before

    pushed = []
    push = FeatureStore.push
    monkeypatch.setattr(FeatureStore, "push", lambda self, *rest: (pushed.append(rest[0].path.name), push(self, *rest)))
    Image.new("RGB", (30, 30), "red").save(project / "photos/new.png")
    embed.run(project / "photos", output, "model")
    assert pushed == ["new.png"] and len(vectors(output)) == 13
    tiny_clip(1).save(project / "model", {})
    embed.run(project / "photos", output, "model")
    assert len(pushed) == 14  # another model embeds all anew


def test_the_result_does_not_depend_on_the_batch(project):
    photographs(project / "photos", 21)
    for size in (1, 8, 64):
        embed.run(project / "photos", project / f"{size}.parquet", "model", batch_size=size)
        for leftover in (project / ".fast_goal/features").glob("*/*"):
            if leftover.is_dir():
                for file in leftover.iterdir():
                    file.unlink()
    np.testing.assert_array_equal(vectors("1.parquet"), vectors("64.parquet"))
    np.testing.assert_array_equal(vectors("8.parquet"), vectors("64.parquet"))


def test_a_kill_costs_only_what_was_under_way(project, monkeypatch):
    """Killed for good in the middle; the same command again gives the same file, without what was there already."""
    photographs(project / "photos")
    monkeypatch.setattr(embed, "CHUNK", 8)
    code = (
        "import time\nfrom pathlib import Path\nfrom fast_goal.operations import embed\n"
        "from fast_goal.evaluation.features import FeatureStore\n"
        "embed.CHUNK, push = 8, FeatureStore.push\n"
        "def slow(self, *rest):\n    time.sleep(0.1); return push(self, *rest)\n"
        "FeatureStore.push = slow\n"
        "embed.run(Path('photos'), Path('photos.parquet'), 'model', batch_size=8)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ.copy())
    deadline = time.monotonic() + 120
    while len(list((project / ".fast_goal").glob("features/*/images/*.keys.npy"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (project / "photos.parquet").exists()
    pushed = []
    push = FeatureStore.push
    monkeypatch.setattr(FeatureStore, "push", lambda self, *rest: (pushed.append(rest), push(self, *rest)))
    embed.run(Path("photos"), Path("photos.parquet"), "model", batch_size=8)
    assert 0 < len(pushed) <= COUNT - 16
    resumed = (project / "photos.parquet").read_bytes()

    for table in (project / ".fast_goal/features").glob("*/images/*"):
        table.unlink()
    (project / "photos.parquet").unlink()
    embed.run(Path("photos"), Path("photos.parquet"), "model", batch_size=8)
    assert (project / "photos.parquet").read_bytes() == resumed


def test_sources_and_outputs_that_cannot_be_used(project):
    (project / "photos").mkdir()
    (project / "photos/notes.txt").write_text("x")
    for source, reason in (("photos", "no images in the folder or below it"), ("none", "does not exist")):
        with pytest.raises(DataError, match=reason):
            embed.run(project / source, project / "out.parquet", "model")
    (project / "photos/broken.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 1 images can be embedded; .*out\.skipped\.parquet has the reasons"):
        embed.run(project / "photos", project / "out.parquet", "model")
    assert not (project / "out.parquet").exists() and len(pd.read_parquet("out.skipped.parquet")) == 1
    (project / "texts.csv").write_text("caption\nA kite\n")
    with pytest.raises(DataError, match=r"no column 'text'; its columns are \['caption'\]. Name one with --column"):
        embed.run(project / "texts.csv", project / "out.parquet", "model")
    with pytest.raises(DataError, match=r"ends in \.parquet"):
        embed.run(project / "texts.csv", project / "out.csv", "model")
    with pytest.raises(ModelError, match="elsewhere"):
        embed.run(project / "texts.csv", project / "out.parquet", "elsewhere", column="caption")
