"""`fast-goal embed FOLDER --against TABLE`, and the patches and queries from which anyone can compute the same."""

import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_project import tiny_clip
from typer.testing import CliRunner

from fast_goal.cli import app
from fast_goal.data.captions import tokenize
from fast_goal.data.images import open_image
from fast_goal.errors import DataError
from fast_goal.evaluation.features import FeatureStore
from fast_goal.model.clip import Clip
from fast_goal.operations import embed, scores

TEXTS = ["A red kite.", "A field, wide and green.", "word " * 400, "grey", "Two dogs by the sea."]
MODES = ("global", "conditioned", "rerank")


def pooled_clip(seed=0):
    made = tiny_clip(seed)
    made.add_pooling(4, seed=3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(8)
        for value in made.pooling.parameters():  # far from what it starts as
            value += 0.3 * torch.randn_like(value)
    return made.eval()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Pictures, of which one cannot be read and two are the same, texts, of which one is empty, and a model."""
    monkeypatch.chdir(tmp_path)
    pooled_clip().save("model", {})
    generator = np.random.default_rng(0)
    (tmp_path / "photos/deep").mkdir(parents=True)
    for index in range(9):
        picture = Image.fromarray(generator.integers(0, 255, (40 + index, 60, 3), dtype=np.uint8))
        picture.save(tmp_path / "photos" / ("deep" if index % 2 else ".") / f"{index}.png")
    (tmp_path / "photos/9.png").write_bytes((tmp_path / "photos/4.png").read_bytes())
    (tmp_path / "photos/broken.png").write_bytes(b"x")
    pd.DataFrame({"id": [f"t{row}" for row in range(6)], "caption": ["", *TEXTS]}).to_csv("captions.csv", index=False)
    return tmp_path


def one_by_one(clip, folder, paths):
    """Cosines of every text with every image, plain and as the text pools the image: each [texts, images]."""
    head = clip.pooling.pooling
    plain, conditioned = np.zeros((2, len(TEXTS), len(paths)), np.float32)
    with torch.no_grad():
        texts = [clip(tokens=tokenize([text], clip.context_length)[0]) for text in TEXTS]
        for i, path in enumerate(paths):
            image = open_image(folder / path)
            encoded = clip(images=clip.view(*image.size).apply(image)[None])
            patches = clip.project_patches(encoded.image_tokens)
            for t, text in enumerate(texts):
                rows = head.norm_query(text.text_queries)[None], head.norm_key(patches), head.norm_value(patches)
                plain[t, i] = (encoded.image_features * text.text_features).sum()
                conditioned[t, i] = torch.cosine_similarity(head.attention(*rows)[0][0], text.text_queries)
    return plain, conditioned


def listed(mode, top_k, plain, conditioned):
    """(text, rank, image, score) of every row that is to be written, by sorting whole lists."""
    rows = []
    for t in range(len(plain)):
        first = plain[t] if mode != "conditioned" else conditioned[t]
        best = sorted(range(len(first)), key=lambda i: (-first[i], i))[:top_k]
        if mode == "rerank":
            best.sort(key=lambda i: -conditioned[t][i])
        rows += [(t, rank, i, (plain if mode == "global" else conditioned)[t][i]) for rank, i in enumerate(best, start=1)]
    return rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("top_k", "texts", "images"), [(3, 2, 4), (1, 1024, 1), (128, 3, 1024)])
def test_the_best_images_of_every_text(project, monkeypatch, mode, top_k, texts, images):
    monkeypatch.setattr(scores, "TEXTS", texts)
    monkeypatch.setattr(scores, "IMAGES", images)
    told = scores.run(project / "photos", project / "captions.csv", project / "out.parquet", "model", mode, top_k, 4, "caption")
    assert f"5 texts, of each the best {min(top_k, 10)} of 10 images by {mode} scores; 2 skipped" in told
    assert "1 of 5 texts are longer" in told
    table = pq.read_table("out.parquet")
    assert table.column_names == ["id", "text", "rank", "path", "score"]
    found = table.to_pandas()
    paths = sorted(path.relative_to(project / "photos").as_posix() for path in (project / "photos").rglob("?.png"))
    plain, conditioned = one_by_one(Clip.load("model").eval(), project / "photos", paths)
    wanted = listed(mode, top_k, plain, conditioned)
    assert found["id"].tolist() == [f"t{text + 1}" for text, *_ in wanted]
    assert found["text"].tolist() == [TEXTS[text] for text, *_ in wanted]
    assert found["rank"].tolist() == [rank for _, rank, *_ in wanted]
    np.testing.assert_allclose(found["score"], [score for *_, score in wanted], atol=1e-5)
    known = plain if mode == "global" else conditioned
    for row in found.itertuples():  # by its own path: which of the twins 4.png and 9.png comes first may be rounding
        assert row.score == pytest.approx(known[int(row.id[1:]) - 1, paths.index(row.path)], abs=1e-5)
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert about["fast_goal.mode"] == mode and about["fast_goal.top_k"] == str(top_k) and about["fast_goal.skipped"] == "2"
    skipped = pd.read_parquet("out.skipped.parquet")
    assert skipped["item"].tolist() == ["broken.png", "t0"]


def test_nothing_is_done_twice_and_features_are_shared(project, monkeypatch):
    output, pushed, push = project / "out.parquet", [], FeatureStore.push
    monkeypatch.setattr(FeatureStore, "push", lambda self, *rest: (pushed.append(rest[0].path.name), push(self, *rest)))

    def run(mode="conditioned", top_k=2):
        return scores.run(project / "photos", project / "captions.csv", output, "model", mode, top_k, column="caption")

    run()
    assert len(pushed) == 10
    assert "nothing to do" in run()
    assert "nothing to do" not in run("rerank") and "nothing to do" not in run("rerank", 3)
    embed.run(project / "photos", project / "photos.parquet", "model", patches=True)
    assert len(pushed) == 10
    Image.new("RGB", (30, 30), "red").save(project / "photos/new.png")
    run("rerank", 3)
    assert pushed[10:] == ["new.png"]


def test_patches_and_queries_are_what_the_pooling_takes(project):
    told = embed.run(project / "photos", project / "photos.parquet", "model", patches=True)
    assert "10 images, 16 numbers each, and 16 patches of as many; 1 skipped" in told
    told = embed.run(project / "captions.csv", project / "captions.parquet", "model", column="caption", patches=True)
    assert "16 numbers each, and a query of as many" in told
    images, texts = pq.read_table("photos.parquet"), pq.read_table("captions.parquet")
    assert images.schema.field("patches").type == pa.list_(pa.float32(), 256)
    assert texts.schema.field("queries").type == pa.list_(pa.float32(), 16)
    count, width = map(int, images.schema.metadata[b"fast_goal.patches"].split())
    patches = torch.tensor(np.stack(images["patches"].to_pandas())).reshape(-1, count, width)
    queries = torch.tensor(np.stack(texts["queries"].to_pandas()))
    clip = Clip.load("model").eval()
    with torch.no_grad():  # as docs/serving.md says it
        seen = clip.pooling.pooling(patches, queries.expand(len(patches), -1, -1))
        found = torch.cosine_similarity(seen, queries[None], dim=-1)
    _, wanted = one_by_one(clip, project / "photos", images["path"].to_pylist())
    np.testing.assert_allclose(found.numpy(), wanted.T, atol=1e-5)
    assert "nothing to do" in embed.run(project / "photos", project / "photos.parquet", "model", patches=True)
    embed.run(project / "photos", project / "photos.parquet", "model")
    assert "patches" not in pq.read_schema("photos.parquet").names


def test_patches_come_in_row_groups_of_a_bounded_size(project, monkeypatch):
    embed.run(project / "photos", project / "whole.parquet", "model", patches=True)
    monkeypatch.setattr(embed, "NUMBERS", 3 * 256)
    embed.run(project / "photos", project / "parts.parquet", "model", patches=True)
    file = pq.ParquetFile("parts.parquet")
    assert [file.metadata.row_group(one).num_rows for one in range(file.num_row_groups)] == [3, 3, 3, 1]
    assert pq.read_table("parts.parquet").equals(pq.read_table("whole.parquet"))


def test_the_table_of_patches_is_opened_before_the_threads_that_look_into_it(project, monkeypatch):
    table, opened = FeatureStore._table, []

    def note(self, kind, width):
        opened.append((kind, threading.current_thread()))
        return table(self, kind, width)

    monkeypatch.setattr(FeatureStore, "_table", note)
    embed.run(project / "photos", project / "plain.parquet", "model")  # so that of each image the patches alone are lacking
    assert opened and "tokens" not in dict(opened)
    embed.run(project / "photos", project / "photos.parquet", "model", patches=True)
    assert [thread for kind, thread in opened if kind == "tokens"] == [threading.main_thread()]


def test_what_cannot_be_compared(project):
    def run(folder="photos", table="captions.csv", model="model", mode="conditioned", output="out.parquet"):
        return scores.run(project / folder, project / table, project / output, model, mode, 2, column="caption")

    with pytest.raises(DataError, match=r"captions\.csv is no folder: --against compares a folder of images with the texts"):
        run("captions.csv")
    with pytest.raises(DataError, match=r"none\.csv"):
        run(table="none.csv")
    with pytest.raises(DataError, match=r"ends in \.parquet"):
        run(output="out.csv")
    tiny_clip(0).save(project / "plain", {})
    for mode in MODES[1:]:
        with pytest.raises(DataError, match=rf"--mode {mode}: plain has no text-conditioned pooling.*use --mode global"):
            run(model="plain", mode=mode)
    run(model="plain", mode="global")
    with pytest.raises(DataError, match="--mode other: expected global, conditioned or rerank"):
        run(mode="other")
    (project / "bad").mkdir()
    (project / "bad/broken.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 1 images can be embedded"):
        run("bad")


def test_the_command(project):
    def call(*words):
        return CliRunner().invoke(app, ["embed", "photos", "--model", "model", "--output", "out.parquet", *words])

    told = call("--against", "captions.csv", "--column", "caption", "--mode", "rerank", "--top-k", "2")
    assert told.exit_code == 0 and "of each the best 2 of 10 images by rerank scores" in told.output
    told = call("--against", "captions.csv", "--column", "caption")
    assert told.exit_code == 0 and "of each the best 10 of 10 images by global scores" in told.output
    told = call("--patches")
    assert told.exit_code == 0 and "and 16 patches of as many" in told.output
    for words in (["--mode", "rerank"], ["--top-k", "3"], ["--patches", "--against", "captions.csv"], ["--mode", "some"]):
        told = call(*words)
        assert told.exit_code == 2 and words[0] in told.output, words
