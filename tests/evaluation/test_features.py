"""The store of features: equal to encoding one by one, equal to the last bit whatever it held before, and nothing twice."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from squares import CPU, Recording, tiny_clip, write_squares

from fast_goal.data.captions import tokenize
from fast_goal.data.images import crop, open_image
from fast_goal.errors import DataError, ModelError
from fast_goal.evaluation import features
from fast_goal.evaluation.embedding import questions
from fast_goal.evaluation.features import FeatureStore, FeatureTable, ImageFile, embed_images, pixel_box, store_key

TEXTS = [f"number {index}" + ", a red square beside a green one" * (index % 5) + "." for index in range(40)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return questions(write_squares(tmp_path_factory.mktemp("images")), "test").files


@pytest.fixture
def clip():
    return Recording(tiny_clip(context_length=77))


def store_of(folder, clip, batch_size=8, precision="fp32"):
    return FeatureStore(folder, clip, CPU, batch_size, precision)


def everything(store, files):
    """Features of all kinds, in the order in which an evaluation would ask for them."""
    sentences = [(row, text) for row in range(len(files)) for text in TEXTS[row : row + 2]]
    texts, lengths = store.texts(TEXTS)
    cut, _ = store.texts(TEXTS, 12)
    images = store.images(files)
    crops = store.images(files, [(2, 3, 40, 50)] * len(files))
    similarities, patches = store.similarities(files, sentences), store.tokens(files)
    return [texts, torch.from_numpy(lengths), cut, images, crops, similarities, patches, store.queries(TEXTS, 12)]


def same(one, other):
    return all(torch.equal(mine, others) for mine, others in zip(one, other, strict=True))


@torch.inference_mode()
def test_texts_are_those_of_one_by_one_encoding(clip):
    found, lengths = store_of(None, clip).texts(TEXTS)
    cut, same_lengths = store_of(None, clip).texts(TEXTS, 12)
    for row, text in enumerate(TEXTS):
        whole, length = tokenize([text], 77)
        torch.testing.assert_close(found[row], clip.encode_text(whole)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(cut[row], clip.encode_text(tokenize([text], 12)[0])[0], atol=1e-5, rtol=0)
        assert lengths[row] == same_lengths[row] == length
    assert found.dtype == torch.float32


@torch.inference_mode()
def test_images_crops_and_patches_are_those_of_one_by_one_encoding(clip, files):
    store = store_of(None, clip, 4)
    boxes = [None, (0, 0, 30, 30), (10, 20, 50, 60), None, (60, 60, 64, 64), (0, 5, 80, 6)]
    found = store.images(files, boxes)
    sentences = [(3, TEXTS[0]), (0, TEXTS[1]), (3, TEXTS[1]), (3, TEXTS[4]), (5, TEXTS[0])]
    similarities = store.similarities(files, sentences)
    for row, (file, box) in enumerate(zip(files, boxes, strict=True)):
        image = open_image(file.path)
        image = image if box is None else crop(image, box)
        expected = clip.encode_image(clip.view(*image.size).apply(image)[None])[0]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
    for (row, text), similarity in zip(sentences, similarities, strict=True):
        image = open_image(files[row].path)
        encoded = clip(images=clip.view(*image.size).apply(image)[None], tokens=tokenize([text], 77)[0])
        expected = clip.project_image(encoded.image_tokens)[0] @ encoded.text_features[0]
        torch.testing.assert_close(similarity, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_tokens_and_queries_are_those_of_one_by_one_encoding(clip, files):
    store = store_of(None, clip, 4)
    patches = store.tokens(files)
    assert patches.shape == (6, 16, 16) and patches.dtype == torch.float32
    for row, file in enumerate(files):
        image = open_image(file.path)
        tokens = clip(images=clip.view(*image.size).apply(image)[None]).image_tokens
        torch.testing.assert_close(patches[row], clip.project_patches(tokens)[0], atol=1e-5, rtol=1e-5)
    whole, cut = store.queries(TEXTS), store.queries(TEXTS, 12)
    for row, text in enumerate(TEXTS):
        expected = clip(tokens=tokenize([text], 77)[0]).text_queries[0]
        torch.testing.assert_close(whole[row], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cut[row], clip(tokens=tokenize([text], 12)[0]).text_queries[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.nn.functional.normalize(whole, dim=1), store.texts(TEXTS)[0], atol=1e-6, rtol=0)


def test_patches_are_kept_where_asked_for_and_come_in_the_same_pass(clip, files, tmp_path):
    other = Recording(tiny_clip(1, context_length=77))
    stores = [store_of(tmp_path, model) for model in (clip, other)]
    sentences = [(row, TEXTS[0]) for row in range(len(files))]
    embed_images(stores, files, [(0, (0, 0, 9, 9))], sentences, patches=[stores[1]])
    cold = stores[1].tokens(files[1:4])
    stores[1].images(files)
    stores[1].similarities(files, sentences)
    stores[1].queries([TEXTS[0]])
    assert (len(clip.images), len(other.images)) == (7, 7), "six images and a crop"
    assert len(other.texts) == 1
    assert not list((stores[0].folder / "tokens").glob("*")) and list((stores[1].folder / "tokens").glob("*"))
    again = Recording(tiny_clip(1, context_length=77))
    assert torch.equal(store_of(tmp_path, again).tokens(files[1:4]), cold) and not again.images
    clip.images.clear()
    stores[0].tokens(files[:2])
    assert len(clip.images) == 2, "an image that was there without its patches is shown once more"


def test_shards_of_patches_are_smaller(clip, files, tmp_path, monkeypatch):
    cold = store_of(None, clip).tokens(files)
    monkeypatch.setattr(features, "SHARD_NUMBERS", 3 * 16 * 16)
    store = store_of(tmp_path, clip)
    assert FeatureTable(None, 16 * 16).shard_rows == 3 and FeatureTable(None, 10**9).shard_rows == 1
    assert torch.equal(store.tokens(files), cold)
    assert torch.equal(store_of(tmp_path, clip).tokens(files[::-1]), cold.flip(0))


def test_a_second_run_reads_the_same_bits_and_computes_nothing(clip, files, tmp_path):
    cold = everything(store_of(tmp_path, clip), files)
    again = Recording(tiny_clip(context_length=77))
    warm = everything(store_of(tmp_path, again), files)
    assert same(cold, warm)
    assert not again.images and not again.texts
    assert same(cold, everything(store_of(None, again), files)), "kept on disk or in memory"


@pytest.mark.parametrize("first", [1, 3, 7, 11])
def test_what_was_there_before_does_not_matter(clip, files, tmp_path, first):
    cold = everything(store_of(None, clip, 8), files)
    store = store_of(tmp_path, clip, 8)
    store.texts(TEXTS[::first])
    store.texts(TEXTS[5 : 5 + first], 12)
    store.images(files[1:2] + files[4:])
    store.similarities(files, [(first % 6, TEXTS[first])])
    assert same(cold, everything(store, files))
    assert same(cold, everything(store_of(tmp_path, clip, 32), files)), "another batch size"


def test_everything_is_computed_once(clip, files):
    store = store_of(None, clip, 8)
    sentences = [(row, TEXTS[0]) for row in range(len(files))]
    embed_images([store], files, [(row, None) for row in range(len(files))], sentences)
    everything(store, files)
    store.texts([*TEXTS, *TEXTS], 77)
    assert len(clip.texts) == len(set(clip.texts))
    cut = sum(len(ids) == 12 for ids in clip.texts)
    long = sum(int(length) > 12 for length in tokenize(TEXTS, 77)[1])
    assert (len(clip.texts) - cut, cut) == (40, long), "what 12 tokens hold is the whole text"
    # the second sentences of `everything` came later than the images, and the patches later than these: each image once more
    # for either, and never for its feature
    assert len(set(clip.images)) == 12 and len(clip.images) == 24


def test_the_same_picture_under_two_names_is_one(clip, files, tmp_path):
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[0].path.read_bytes())
    store = store_of(tmp_path / "store", clip)
    found = store.images([files[0], files[0]._replace(path=copy)])
    assert torch.equal(found[0], found[1]) and len(clip.images) == 1


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_models_share_the_decoded_image(files, tmp_path, mode, monkeypatch):
    base, tuned = Recording(tiny_clip(0)), Recording(tiny_clip(1))
    tuned._clip.view_mode = mode
    opened, shown = [], []
    opens, views = features.open_image, type(base.view(8, 8)).pixels
    monkeypatch.setattr(features, "open_image", lambda *arguments: opened.append(arguments[0]) or opens(*arguments))
    monkeypatch.setattr(type(base.view(8, 8)), "pixels", lambda view, image: shown.append(view.mode) or views(view, image))
    stores = [store_of(tmp_path, clip) for clip in (base, tuned)]
    embed_images(stores, files, [(row, box) for row in range(6) for box in (None, (0, 0, 40, 40))])
    assert sorted(opened) == [file.path for file in files]
    assert sorted(shown) == ["crop"] * 12 + [mode] * (0 if mode == "crop" else 12)
    assert len(base.images) == len(tuned.images) == 12
    for store in stores:
        alone = store_of(None, store.clip)
        assert torch.equal(store.images(files), alone.images(files))


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from squares import CPU, Recording, tiny_clip, write_squares
from test_features import TEXTS
from fast_goal.evaluation import features
from fast_goal.evaluation.embedding import questions
from fast_goal.evaluation.features import FeatureStore

class Killed(Recording):
    def __call__(self, *arguments, **options):
        if len(self.texts) >= 24:
            os._exit(9)
        return super().__call__(*arguments, **options)

features.SHARD_ROWS = 8
torch.set_num_threads(1)
FeatureStore(Path(sys.argv[1]), Killed(tiny_clip(context_length=77)), CPU, 8).texts(TEXTS)
"""


def test_a_killed_run_keeps_its_finished_shards(clip, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()[-2000:]
    found, _ = store_of(tmp_path, clip).texts(TEXTS)
    assert len(clip.texts) == len(TEXTS) - 24
    assert torch.equal(found, store_of(None, tiny_clip(context_length=77)).texts(TEXTS)[0])


def test_an_error_in_the_middle_keeps_what_was_computed(clip, files, tmp_path):
    broken = [*files[:5], files[5]._replace(path=tmp_path / "absent.png")]
    crops = [(row, (0, 0, 9, side)) for row in range(6) for side in (9, 8)]
    store = store_of(tmp_path, clip)
    with pytest.raises(DataError, match=r"absent\.png: the image file does not exist"):
        embed_images([store], broken, crops)
    assert len(clip.images) == 8, "one batch of the ten crops before it"
    embed_images([store], broken, crops[8:10])
    assert len(clip.images) == 10, "and what waited is forgotten"
    clip.images.clear()
    store_of(tmp_path, clip).images(files[:5], [(0, 0, 9, 9)] * 5)
    assert not clip.images


@pytest.mark.parametrize("damage", ["flipped bit", "cut values", "cut keys", "no values", "no keys"])
def test_a_damaged_shard_is_computed_again(clip, tmp_path, monkeypatch, damage, caplog):
    monkeypatch.setattr(features, "SHARD_ROWS", 8)
    cold, _ = store_of(tmp_path, clip).texts(TEXTS)
    (folder,) = tmp_path.glob("*/texts")
    values = sorted(folder.glob("*.values.npy"))
    assert len(values) >= 4
    keys = folder / values[1].name.replace("values", "keys")
    if damage == "flipped bit":
        content = bytearray(values[1].read_bytes())
        content[-3] ^= 1
        values[1].write_bytes(content)
    elif damage.startswith("cut"):
        path = keys if damage == "cut keys" else values[1]
        path.write_bytes(path.read_bytes()[:-5])
    else:
        (keys if damage == "no keys" else values[1]).unlink()
    again = Recording(tiny_clip(context_length=77))
    assert torch.equal(store_of(tmp_path, again).texts(TEXTS)[0], cold)
    assert 0 < len(again.texts) < len(TEXTS)
    assert ("is damaged" in caplog.text) == (damage != "no keys")
    third = Recording(tiny_clip(context_length=77))
    assert torch.equal(store_of(tmp_path, third).texts(TEXTS)[0], cold) and not third.texts


def test_another_model_view_or_precision_has_another_folder():
    one, other = tiny_clip(0), tiny_clip(0)
    assert store_key(one, "fp32") == store_key(other, "fp32")
    keys = [store_key(one, "fp32"), store_key(one, "bf16"), store_key(tiny_clip(0, 40), "fp32")]
    with torch.no_grad():
        other.model.visual.proj[0, 0] += 1e-6
    keys.append(store_key(other, "fp32"))
    for name, value in (("view_mode", "pad"), ("mean", (0.5, 0.5, 0.5))):
        changed = tiny_clip(0)
        setattr(changed, name, value)
        keys.append(store_key(changed, "fp32"))
    activation = tiny_clip(0)
    activation.config["quick_gelu"] = True
    keys.append(store_key(activation, "fp32"))
    assert len(set(keys)) == 7


def test_stores_of_two_models_do_not_mix(files, tmp_path):
    base, tuned = store_of(tmp_path, tiny_clip(0)), store_of(tmp_path, tiny_clip(1))
    assert not torch.allclose(base.images(files), tuned.images(files))
    assert torch.equal(store_of(tmp_path, tiny_clip(1)).images(files), tuned.images(files))
    assert len(list(tmp_path.iterdir())) == 2


def test_bf16_is_near_fp32_and_comes_back_as_it_was(clip, files, tmp_path):
    exact, rounded = everything(store_of(None, clip), files), everything(store_of(tmp_path, clip, precision="bf16"), files)
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0)
    assert not torch.equal(exact[0], rounded[0])
    assert same(rounded, everything(store_of(tmp_path, clip, precision="bf16"), files))


def test_a_changed_file_is_no_feature_of_its_old_content(clip, files, tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (20, 20), "red").save(path)
    known = ImageFile(path, (20, 20), hashlib.sha256(path.read_bytes()).hexdigest())
    store_of(tmp_path, clip).images([known])
    Image.new("RGB", (20, 20), "blue").save(path)
    with pytest.raises(DataError, match=r"image\.png: the file was changed since the step `download`"):
        store_of(tmp_path, clip).images([known], [(0, 0, 9, 9)])
    with pytest.raises(DataError, match="was changed"):
        store_of(None, clip).images([known._replace(size=(20, 21))])
    path.unlink()
    store_of(tmp_path, clip).images([known])  # it need not be there to be read back
    with pytest.raises(DataError, match="does not exist"):
        store_of(None, clip).images([known])


def test_a_full_disk_costs_the_store_and_not_the_run(clip, files, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.np, "save", full)
    store = store_of(tmp_path, clip)
    found = everything(store, files)
    assert "No space left" in caplog.text
    monkeypatch.undo()
    assert same(found, everything(store_of(None, clip), files))
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*.tmp"))


def test_features_that_are_not_finite_are_refused_and_not_kept(tmp_path, files):
    broken = tiny_clip()
    with torch.no_grad():
        broken.model.text_projection[:] = torch.nan
        broken.model.visual.proj[:] = torch.nan
    for ask in (lambda store: store.texts(TEXTS), lambda store: store.images(files), lambda store: store.tokens(files)):
        with pytest.raises(ModelError, match="NaN or infinity"):
            ask(store_of(tmp_path, broken))
    assert not list(tmp_path.glob("*/texts/*.npy")) and not list(tmp_path.glob("*/images/*.npy"))


def test_folders_that_nobody_used_for_long_are_removed(tmp_path, files):
    store_of(tmp_path, tiny_clip(0)).images(files)
    store_of(tmp_path, tiny_clip(1)).images(files)
    unused, used = (tmp_path / store_key(tiny_clip(seed), "fp32") for seed in (0, 1))
    long_ago = time.time() - 91 * 86400
    os.utime(unused / "used", (long_ago, long_ago))
    store_of(tmp_path, tiny_clip(1))
    assert not unused.exists() and used.exists()


def test_a_table_keeps_the_first_of_two_rows_of_a_key(tmp_path):
    keys = [bytes([number]) * 16 for number in range(5)]
    table = FeatureTable(tmp_path, 3)
    table.add(keys[:3], np.arange(9, dtype=np.float32).reshape(3, 3))
    table.add(keys[2:], -np.ones((3, 3), np.float32))
    assert table.read([keys[2], keys[4], keys[2]]).tolist() == [[6, 7, 8], [-1, -1, -1], [6, 7, 8]]
    assert table.read([]).shape == (0, 3)
    reopened = FeatureTable(tmp_path, 3)
    assert all(key in reopened for key in keys) and b"x" * 16 not in reopened
    assert isinstance(reopened._shards[0], np.memmap)
    with pytest.raises(KeyError):
        reopened.read([b"x" * 16])


def test_a_box_becomes_the_pixels_that_it_touches():
    assert pixel_box([1.5, 2.0, 9.1, 30.0], (20, 25)) == (1, 2, 10, 25)
    assert pixel_box([30, 30, 30, 30], (20, 25)) == (19, 24, 20, 25)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features_and_keeps_its_bits(clip, files, tmp_path):
    cuda = torch.device("cuda")
    cold = everything(FeatureStore(tmp_path, tiny_clip(context_length=77), cuda, 8), files)
    for one, other in zip(everything(store_of(None, clip), files), cold, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    partly = FeatureStore(tmp_path / "partly", tiny_clip(context_length=77), cuda, 8)
    partly.texts(TEXTS[::3])
    partly.images(files[2:4])
    assert same(cold, everything(partly, files))
