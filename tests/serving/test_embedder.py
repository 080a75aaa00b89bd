"""The registered model in this process: rows, outputs, files, limits."""

import base64
import io
import os
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from file_server import FileServer
from PIL import Image
from serving_project import pooled_clip
from small_project import tiny_clip

from fast_goal.data.captions import tokenize
from fast_goal.data.images import open_image
from fast_goal.errors import ConfigError, DataError
from fast_goal.tracking import contents
from fast_goal.tracking.contents import Access
from fast_goal.tracking.downloads import UrlPolicy
from fast_goal.tracking.pyfunc import MAX_URLS, Embedder
from fast_goal.tracking.registry import signature


def picture(color="red", size=(90, 60)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def clip():
    return tiny_clip(0).eval()


@pytest.fixture
def root(tmp_path):
    """A folder of images beside a file that is none of its business."""
    (tmp_path / "photos/deep").mkdir(parents=True)
    (tmp_path / "photos/deep/red.png").write_bytes(picture())
    (tmp_path / "photos/broken.png").write_bytes(picture()[:50])
    (tmp_path / "secret.png").write_bytes(picture("blue"))
    return tmp_path / "photos"


def embedded(clip, image):
    with torch.no_grad():
        return clip.encode_image(clip.view(*image.size).apply(image)[None])[0].numpy()


def test_paths_urls_and_bytes_of_one_image_embed_alike(clip, root):
    with FileServer({"red.png": picture()}) as server:
        embedder = Embedder(clip, Access(root, UrlPolicy.parse(server.address)))
        rows = pd.DataFrame(
            [
                {"image_path": "deep/red.png"},
                {"image_path": str(root / "deep/red.png")},
                {"image_url": server.url("red.png")},
                {"image": picture()},
                {"image": base64.b64encode(picture()).decode()},
            ]
        )
        made = np.array(embedder.predict(rows)["embedding"].tolist())
    wanted = embedded(clip, open_image(root / "deep/red.png"))
    np.testing.assert_allclose(made, np.tile(wanted, (5, 1)), atol=1e-6)


def test_scores_are_the_cosines_of_images_with_texts(clip):
    texts, colors = ["a red kite", "a blue field with a tree"], ["red", "green", "blue"]
    rows = pd.DataFrame(
        {"text": [texts[0], None, None, texts[1], None], "image": [None, *map(picture, colors[:2]), None, picture("blue")]},
        index=list("abcde"),
    )
    made = Embedder(clip).predict(rows, {"output": "scores"})
    assert list(made.index) == ["b", "c", "e"] and made["row"].tolist() == [1, 2, 4]
    assert made["text_rows"].tolist() == [[0, 3]] * 3
    with torch.no_grad():
        text_features = clip.encode_text(tokenize(texts, clip.context_length)[0]).numpy()
    image_features = np.stack([embedded(clip, Image.new("RGB", (90, 60), color)) for color in colors])
    np.testing.assert_allclose(np.array(made["scores"].tolist()), image_features @ text_features.T, atol=1e-5)


@pytest.fixture(scope="module")
def pooled():
    """The model with a text-conditioned pooling that is far from what it starts as."""
    return pooled_clip(0)


TEXTS = ["a red kite", "a blue field with a tree", "word " * 400, "a", "grey"]
COLORS = ["red", "green", "blue", "white"]


def compared(texts=TEXTS, colors=COLORS):
    """Rows of texts and pictures, by turns."""
    rows = [row for text, color in zip(texts, colors, strict=False) for row in ({"text": text}, {"image": picture(color)})]
    return pd.DataFrame([*rows, *({"text": text} for text in texts[len(colors) :])])


def asked_one_by_one(clip, texts=TEXTS, colors=COLORS):
    """The cosine of every text with every image as the text pools it, by torch's own attention: [images, texts]."""
    head, wanted = clip.pooling.pooling, torch.zeros(len(colors), len(texts))
    with torch.no_grad():
        for i, color in enumerate(colors):
            image = open_image("", picture(color))
            patches = clip.project_patches(clip(images=clip.view(*image.size).apply(image)[None]).image_tokens)
            for j, text in enumerate(texts):
                query = clip(tokens=tokenize([text], clip.context_length)[0]).text_queries
                rows = head.norm_query(query)[None], head.norm_key(patches), head.norm_value(patches)
                wanted[i, j] = torch.cosine_similarity(head.attention(*rows)[0][0], query)
    return wanted.numpy()


def test_conditioned_scores_are_those_of_one_text_and_one_image_at_a_time(pooled):
    made, warnings = Embedder(pooled).answer(compared(), {"output": "scores", "mode": "conditioned"})
    assert made["row"].tolist() == [1, 3, 5, 7] and made["text_rows"].tolist() == [[0, 2, 4, 6, 8]] * 4
    wanted = asked_one_by_one(pooled)
    np.testing.assert_allclose(np.array(made["scores"].tolist()), wanted, atol=1e-5)
    assert wanted.std(axis=0).min() > 1e-3 and warnings[0].startswith("1 of 5 texts")
    plain = Embedder(pooled).predict(compared(), {"output": "scores"})
    np.testing.assert_array_equal(
        np.array(Embedder(pooled).predict(compared(), {"output": "scores", "mode": "global"})["scores"].tolist()),
        np.array(plain["scores"].tolist()),
    )
    assert abs(np.array(plain["scores"].tolist()) - wanted).max() > 0.05


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 200])
def test_rerank_scores_the_best_of_each_text_and_of_each_image(pooled, top_k):
    embedder = Embedder(pooled)
    cosines = np.array(embedder.predict(compared(), {"output": "scores"})["scores"].tolist())
    wanted = asked_one_by_one(pooled)
    scores = embedder.predict(compared(), {"output": "scores", "mode": "rerank", "top_k": top_k})["scores"].tolist()
    for i, row in enumerate(scores):
        for j, score in enumerate(row):
            better_texts, better_images = (cosines[i] > cosines[i, j]).sum(), (cosines[:, j] > cosines[i, j]).sum()
            if better_texts < top_k or better_images < top_k:
                assert score == pytest.approx(wanted[i, j], abs=1e-5)
            else:
                assert score is None
    assert (top_k > 3) == all(score is not None for row in scores for score in row)


def test_scores_do_not_depend_on_the_batch(pooled, monkeypatch):
    params = [{"output": "scores", "mode": mode, "top_k": 2} for mode in ("global", "conditioned", "rerank")]
    frame = compared([f"{text} {number}" for number in range(3) for text in ("a kite", "wide", "by the sea", "x")], COLORS)
    before = [Embedder(pooled).predict(frame, one)["scores"].tolist() for one in params]
    monkeypatch.setattr("fast_goal.tracking.pyfunc.BATCH_SIZE", 3)
    for one, wanted in zip(params, before, strict=True):
        found = Embedder(pooled).predict(frame, one)["scores"].tolist()
        np.testing.assert_allclose(np.array(found, float), np.array(wanted, float), atol=1e-5)  # None becomes NaN


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"output": "scores", "mode": "reranked"}, r"params\.mode = 'reranked': expected global, conditioned or rerank"),
        ({"mode": "conditioned"}, r"params\.mode = 'conditioned' compares images with texts: set output = 'scores'"),
        ({"output": "scores", "mode": "rerank", "top_k": 0}, r"params\.top_k = '0': expected a whole number, at least 1"),
        ({"output": "scores", "mode": "rerank", "top_k": 2.5}, r"params\.top_k = '2\.5'"),
        ({"output": "scores", "top_k": True}, r"params\.top_k = 'True'"),
        ({"output": "scores", "mode": ["rerank"]}, r"params\.mode = "),
    ],
)
def test_parameters_that_there_are_not(pooled, params, reason):
    with pytest.raises(DataError, match=reason):
        Embedder(pooled).predict(compared(), params)


def test_a_model_without_a_pooling_has_one_mode(clip, pooled):
    assert Embedder(clip).modes == ["global"] and Embedder(pooled).modes == ["global", "conditioned", "rerank"]
    for mode in ("conditioned", "rerank"):
        with pytest.raises(DataError, match=rf"'{mode}': this model has no text-conditioned pooling.*only mode is 'global'"):
            Embedder(clip).predict(compared(), {"output": "scores", "mode": mode})


def test_scores_need_both_sides_and_outputs_have_names(clip):
    embedder = Embedder(clip)
    for rows in ({"text": ["a"]}, {"image": [picture()]}):
        with pytest.raises(DataError, match="at least one of each"):
            embedder.predict(pd.DataFrame(rows), {"output": "scores"})
    with pytest.raises(DataError, match="'cosines': expected embedding or scores"):
        embedder.predict(pd.DataFrame({"text": ["a"]}), {"output": "cosines"})


def test_the_signature_names_every_column_and_the_parameter():
    made = signature()
    assert made.inputs.input_names() == ["text", "image", "image_path", "image_url"]
    assert not any(column.required for column in made.inputs)
    assert {one.name: one.default for one in made.params} == {"output": "embedding", "mode": "global", "top_k": 128}


def test_nothing_is_read_unless_the_operator_says_so(clip, root, monkeypatch):
    for name in (contents.ROOT_VARIABLE, contents.URLS_VARIABLE, contents.ROWS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    embedder = Embedder(clip)
    path, url = pd.DataFrame({"image_path": [str(root / "deep/red.png")]}), pd.DataFrame({"image_url": ["http://127.0.0.1/"]})
    with pytest.raises(DataError, match=r"row 0: image_path = .*FAST_GOAL_IMAGE_ROOT"):
        embedder.predict(path)
    with pytest.raises(DataError, match=r"row 0: image_url = .*FAST_GOAL_ALLOW_URLS"):
        embedder.predict(url)
    monkeypatch.setenv("FAST_GOAL_IMAGE_ROOT", str(root))
    assert len(embedder.predict(path)) == 1
    monkeypatch.setenv("FAST_GOAL_ALLOW_URLS", "photos.example")
    with pytest.raises(DataError, match="not among those"):
        embedder.predict(url)
    monkeypatch.setenv("FAST_GOAL_MAX_ROWS", "many")
    with pytest.raises(ConfigError, match="FAST_GOAL_MAX_ROWS = 'many'"):
        embedder.predict(path)


def test_paths_that_leave_the_folder(clip, root):
    (root / "out").symlink_to(root.parent)
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "round.png").symlink_to(root / "round.png")
    (root / "within.png").symlink_to(root / "deep/red.png")
    embedder = Embedder(clip, Access(root))
    outside = [
        "../secret.png",
        "out/secret.png",
        "out.png",
        str(root.parent / "secret.png"),
        "/etc/passwd",
        "deep/../../secret.png",
    ]
    messages = set()
    for name in [*outside, "../nothing.png", "deep/red.png\0", "round.png"]:
        with pytest.raises(DataError) as error:
            embedder.predict(pd.DataFrame({"image_path": [name]}))
        messages.add(str(error.value).rpartition(": ")[2])
    # nor does the answer tell whether a file outside is there
    assert messages <= {"not below the folder of images that may be read", "there is no such file that can be read"}
    assert len(embedder.predict(pd.DataFrame({"image_path": ["within.png"]}))) == 1


def test_a_link_that_is_put_there_after_the_check_leads_nowhere(root):
    (root / "later").symlink_to(root.parent)
    with pytest.raises(OSError):
        contents._open_below(root.resolve(), ("later", "secret.png"))
    (root / "later.png").symlink_to(root.parent / "secret.png")
    with pytest.raises(OSError):
        contents._open_below(root.resolve(), ("later.png",))


def test_what_is_no_file_of_an_image(clip, root, monkeypatch):
    os.mkfifo(root / "pipe.png")
    monkeypatch.setattr(contents, "MAX_BYTES", 10_000)
    (root / "large.png").write_bytes(bytes(10_001))
    rows = {
        "deep": "not a file",
        "pipe.png": "not a file",
        ".": "there is no such file",
        "none.png": "there is no such file",
        "large.png": "larger than 10,000 bytes",
        "broken.png": "truncated or damaged",
    }
    with pytest.raises(DataError) as error:
        Embedder(clip, Access(root)).predict(pd.DataFrame({"image_path": list(rows)}))
    lines = str(error.value).splitlines()
    for row, (name, reason) in enumerate(rows.items()):
        assert lines[row].startswith(f"row {row}: image_path = '{name}'") and reason in lines[row]
    assert str(root) not in str(error.value)
    with pytest.raises(DataError, match="row 0: image_path is a int"):
        Embedder(clip, Access(root)).predict(pd.DataFrame({"image_path": [3]}))


def test_too_many_pixels_rows_and_urls(clip, monkeypatch):
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")  # 81 million pixels in a few kilobytes
    with pytest.raises(DataError, match="row 1: the image has 9000 x 9000 pixels"):
        Embedder(clip).predict(pd.DataFrame({"image": [picture(), bomb.getvalue()]}))
    with pytest.raises(DataError, match="row 3: too many rows: 4 in one request, where at most 3"):
        Embedder(clip, Access(max_rows=3)).predict(pd.DataFrame({"text": list("abcd")}))
    urls = pd.DataFrame({"image_url": ["ftp://x/"] * (MAX_URLS + 1)})
    with pytest.raises(DataError, match=r"\.\.\. and 55 more"):
        Embedder(clip, Access(urls=UrlPolicy.parse("1"))).predict(urls)


def test_long_texts_are_cut_and_counted_absurd_ones_refused(clip, caplog):
    embedder = Embedder(clip)
    long = " ".join(f"word{number}" for number in range(1_000))
    made, warnings = embedder.answer(pd.DataFrame({"text": [long, "short"]}))
    assert warnings == ["1 of 2 texts (50.0 %) are longer than the model's 248 tokens and were cut off."]
    with caplog.at_level("WARNING"):
        embedder.predict(pd.DataFrame({"text": [long, "short"]}))
    assert caplog.messages == warnings
    with torch.no_grad():
        wanted = clip.encode_text(tokenize([long], clip.context_length)[0])[0].numpy()
    np.testing.assert_allclose(made["embedding"][0], wanted, atol=1e-5)
    with pytest.raises(DataError, match=r"row 0: .* has a word of more than 500 characters\nrow 2: .* has 10,001 characters"):
        embedder.predict(pd.DataFrame({"text": ["x" * 501, "fine", "x " * 5_000 + "x"]}))
    for blank in "\v\x1c\x1f":  # which the tokenizer deletes: to it this is one word
        with pytest.raises(DataError, match="has a word of more than 500 characters"):
            embedder.predict(pd.DataFrame({"text": [blank.join("x" * 300)]}))


def test_bad_rows_of_all_kinds_are_named_in_order(clip):
    rows = [{"text": "a"}, {"image": "%%%"}, {"image_path": "a.png"}, {"text": "b", "image_url": "http://x/"}, {"text": 3}]
    with pytest.raises(DataError) as error:
        Embedder(clip, Access()).predict(pd.DataFrame(rows))
    found = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in found] == ["row 1", "row 2", "row 3", "row 4"]
    assert "not base64" in found[0] and "text and image_url" in found[2]


def test_threads_share_the_model(clip):
    embedder = Embedder(clip)
    frames = [pd.DataFrame({"text": [f"kite {number}"], "image": [None]}) for number in range(6)]
    frames += [pd.DataFrame({"image": [picture(color)]}) for color in ("red", "green", "blue")]
    alone = [embedder.predict(frame)["embedding"].tolist() for frame in frames]
    together = [None] * len(frames)

    def ask(number):
        together[number] = embedder.predict(frames[number])["embedding"].tolist()

    threads = [threading.Thread(target=ask, args=[number]) for number in range(len(frames))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
