import base64
import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fast_goal import stages
from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.data.captions import tokenize
from fast_goal.errors import DataError, ModelError
from fast_goal.files import read_json, write_json
from fast_goal.model.clip import Clip, build_scratch
from fast_goal.stages import register
from fast_goal.tracking import NullTracker, server
from fast_goal.tracking.pyfunc import Embedder

PARAMS = build(Params, compose(["experiment=demo"]), "params.yaml")
TINY = replace(
    PARAMS.base.scratch, image_size=32, patch_size=16, embed_dim=16, vision_width=32, vision_layers=1, text_width=16,
    text_layers=1, head_width=8,
)  # fmt: skip
INTERVAL = {"value": 2.0, "low": 1.0, "high": 3.0}


def png(color: str, size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def project(tmp_path_factory, empty_store):
    """A project folder with everything the step reads, and a store of its own; the current folder of this module."""
    folder, before = tmp_path_factory.mktemp("project"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        patch.setenv("FAST_GOAL_PIPELINE_ID", "one")
        shutil.copy(empty_store, "mlflow.db")
        build_scratch(TINY, 77, seed=0).save(folder / "models/finetune", {"method": "test"})
        info = {"name": "scenes", "source": "scenes", "images": 3, "splits": {"train": 3}, "digest": "0123"}
        write_json(folder / "data/records/scenes.json", info)
        directions = ("text_to_image", "image_to_text")
        parts = {"base": {"R@1": 10.0}, "finetuned": {"R@1": 12.0}, "difference": {"R@1": INTERVAL}}
        metrics = {"long": {part: dict.fromkeys(directions, values) for part, values in parts.items()}}
        write_json(folder / "models/reports/metrics.json", {"scenes": metrics})
        yield folder
    import mlflow

    mlflow.set_tracking_uri(None)
    assert Path.cwd() == before


@pytest.fixture(scope="module")
def registration(project):
    register.main(PARAMS, NullTracker())
    return read_json("models/register/registration.json")


@pytest.fixture(scope="module")
def loaded(registration):
    import mlflow

    mlflow.set_tracking_uri(server.tracking_uri())
    return mlflow.pyfunc.load_model("models:/fast-goal@candidate")


def test_registration(registration, project):
    assert registration["model"] == "fast-goal" and registration["version"] == 1 and registration["alias"] == "candidate"
    assert registration["uri"] == "models:/fast-goal@candidate"
    client, _ = server.connect()
    version = client.get_model_version_by_alias("fast-goal", "candidate")
    assert version.tags["model_digest"] == registration["digest"]
    assert version.tags["dataset_digest"] == "0123" and version.tags["objective"] == "fast_goal"
    card = (project / "models/register/model_card.md").read_text()
    assert version.description == card and "+1.0 to +3.0" in card


def test_nothing_pickled_and_source_and_requirements_stored(loaded, registration, project):
    [model] = project.glob("mlruns/*/models/*/artifacts")
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert {"data/finetune/open_clip_model.safetensors", "code/fast_goal/tracking/pyfunc.py", "input_example.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pt", ".pth", ".pyc"))]
    wanted = {line.partition("==")[0]: line.partition("==")[2] for line in (model / "requirements.txt").read_text().split()}
    assert {"torch", "torchvision", "open_clip_torch", "pillow", "numpy", "pandas", "safetensors", "mlflow"} <= wanted.keys()
    assert all(wanted.values()) and not any("+" in version for version in wanted.values())


def test_embeds_texts_and_images_like_the_model(loaded, project):
    clip = Clip.load(project / "models/finetune").eval()
    picture = png("red")
    rows = pd.DataFrame(
        {
            "text": ["a red kite", None, "a field", np.nan, "long " * 500],
            "image": [None, base64.b64encode(picture).decode(), "", picture, None],
        },
        index=[7, 3, 5, 1, 2],
    )
    made = loaded.predict(rows)
    assert list(made.index) == [7, 3, 5, 1, 2] and list(made.columns) == ["embedding"]
    assert isinstance(made["embedding"].iloc[0], list) and isinstance(made["embedding"].iloc[0][0], float)
    found = np.array(made["embedding"].tolist())
    with torch.no_grad():
        tokens, lengths = tokenize(["a red kite", "a field", "long " * 500], 77)
        texts = clip.encode_text(tokens).numpy()
        view = clip.view(40, 30)
        image = clip.encode_image(view.apply(Image.open(io.BytesIO(picture)))[None]).numpy()
    assert lengths[2] > 77
    np.testing.assert_allclose(found, np.stack([texts[0], image[0], texts[1], image[0], texts[2]]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_one_column_is_enough(loaded):
    assert len(loaded.predict(pd.DataFrame({"text": ["a", "b"]}))) == 2
    assert len(loaded.predict(pd.DataFrame({"image": [png("blue")]}))) == 1


def test_results_do_not_depend_on_the_batch(loaded):
    texts = [f"a kite number {index} " + "very " * (index % 40) for index in range(70)]
    together = np.array(loaded.predict(pd.DataFrame({"text": texts}))["embedding"].tolist())
    alone = np.array([loaded.predict(pd.DataFrame({"text": [text]}))["embedding"].iloc[0] for text in texts[::23]])
    np.testing.assert_allclose(together[::23], alone, atol=1e-5)


def test_missing_cells_of_any_kind_are_empty():
    embedder = Embedder(build_scratch(TINY, 77, seed=0))
    for missing in (None, np.nan, pd.NA, pd.NaT, "", b"", bytearray()):
        assert len(embedder.predict(pd.DataFrame({"text": ["a"], "image": pd.Series([missing], dtype=object)}))) == 1
        with pytest.raises(DataError, match="row 0: has neither text nor image"):
            embedder.predict(pd.DataFrame({"text": pd.Series([missing], dtype=object)}))
    with pytest.raises(DataError, match="row 0: image is a ndarray"):
        embedder.predict(pd.DataFrame({"image": [np.zeros((2, 2, 3))]}))


def test_bad_rows_are_named():
    embedder = Embedder(build_scratch(TINY, 77, seed=0))
    rows = pd.DataFrame(
        [
            {"text": "fine", "image": None},
            {"text": "both", "image": png("red")},
            {"text": " ", "image": None},
            {"text": 5, "image": None},
            {"text": None, "image": "photos/kite.jpg"},
            {"text": None, "image": base64.b64encode(b"no image").decode()},
            {"text": None, "image": png("red")[:60]},
            {"text": None, "image": 3},
        ]
    )
    with pytest.raises(DataError) as error:
        embedder.predict(rows)
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"row {row}" for row in range(1, 8)]
    for line, words in zip(
        lines,
        ["text and image", "neither", "not a text", "not base64", "not an image", "truncated", "int"],
        strict=True,
    ):
        assert words in line and "/tmp" not in line
    with pytest.raises(DataError, match="caption"):
        embedder.predict(pd.DataFrame({"caption": ["a"]}))
    assert len(embedder.predict(pd.DataFrame({"text": []}))) == 0


def test_loads_where_fast_goal_is_not_installed(loaded, project):
    """With -S the editable installation is not seen; only the copy stored with the model is."""
    code = (
        f"import sys; sys.path += {[path for path in sys.path if 'site-packages' in path]!r}\n"
        "import importlib.util\nassert importlib.util.find_spec('fast_goal') is None\n"
        "import mlflow, pandas\nmodel = mlflow.pyfunc.load_model('models:/fast-goal@candidate')\n"
        "print(len(model.predict(pandas.DataFrame({'text': ['a kite']}))['embedding'][0]))\n"
        "import fast_goal; assert 'artifacts' in fast_goal.__file__, fast_goal.__file__"
    )
    env = {**os.environ, "MLFLOW_TRACKING_URI": server.tracking_uri(), "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "16"


def test_registering_again_moves_the_alias_only(registration, project):
    client, _ = server.connect()
    other = replace(PARAMS, register=replace(PARAMS.register, alias="second"))
    register.main(other, NullTracker())
    assert read_json("models/register/registration.json")["version"] == 1
    assert len(client.search_model_versions("name = 'fast-goal'")) == 1
    assert client.get_model_version_by_alias("fast-goal", "second").version == 1

    build_scratch(TINY, 77, seed=1).save(project / "models/finetune", {"method": "test"})
    try:
        register.main(PARAMS, NullTracker())
        assert client.get_model_version_by_alias("fast-goal", "candidate").version == 2
        assert client.get_model_version_by_alias("fast-goal", "second").version == 1
    finally:
        build_scratch(TINY, 77, seed=0).save(project / "models/finetune", {"method": "test"})


def test_the_whole_step_through_run(registration, project):
    """As `fast-goal register` runs it: its own MLflow run, linked to the model."""
    import yaml

    values = compose(["experiment=demo", "register.model_name=other"])
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    stages.run("register")
    made = read_json("models/register/registration.json")
    client, experiment = server.connect()
    [run] = client.search_runs([experiment], "tags.step = 'register'")
    assert made["run_id"] == run.info.run_id and run.info.status == "FINISHED"
    assert run.data.params["register.model_name"] == "other" and run.data.params["seed"] == "0"
    assert run.data.tags["model_version"] == "1"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["model_card.md"]
    version = client.get_model_version("other", "1")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    shown = {metric.key: (metric.value, metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert shown["scenes.long.finetuned.text_to_image.R1"] == (12.0, "scenes", "0123") and len(shown) == 4
    [pipeline] = client.search_runs([experiment], "tags.`fast_goal.role` = 'pipeline'")
    assert [output.model_id for output in pipeline.outputs.model_outputs] == [model.model_id]
    registered = client.get_registered_model("other")
    assert "models:/other@champion" in registered.description and registered.tags["task"] == "image-text retrieval"
    client.update_registered_model("other", "My own words.")
    register.main(replace(PARAMS, register=replace(PARAMS.register, model_name="other")), NullTracker())
    assert client.get_registered_model("other").description == "My own words."


def test_missing_inputs_are_named(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"models/finetune/open_clip_config\.json does not exist"):
        register.main(PARAMS, NullTracker())
    build_scratch(TINY, 77, seed=0).save(tmp_path / "models/finetune", {})
    with pytest.raises(DataError, match=r"models/reports/metrics\.json does not exist.*evaluate"):
        register.main(PARAMS, NullTracker())


def test_a_model_that_gives_nan_gets_no_alias(registration, project, tmp_path):
    from fast_goal.tracking import registry

    clip = build_scratch(TINY, 77, seed=2)
    with torch.no_grad():
        clip.model.text_projection.fill_(float("nan"))
    clip.save(tmp_path / "broken", {})
    with pytest.raises(ModelError, match="instead of 1"):
        registry.register(tmp_path / "broken", "broken", "candidate", "", {}, None)
    client, _ = server.connect()
    assert client.get_registered_model("broken").aliases == {}
