"""A model with text-conditioned pooling in the registry and behind a server: registered, loaded, asked in all modes."""

import base64
import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from serving_project import pooled_clip, registered
from small_project import tiny_clip

from fast_goal.errors import ModelError
from fast_goal.tracking import registry
from fast_goal.tracking.champion import fetch
from fast_goal.tracking.contents import Access
from fast_goal.tracking.located import locate
from fast_goal.tracking.pyfunc import Embedder, load
from fast_goal.tracking.serving import Limits, application, check_embeds

MODES = ("global", "conditioned", "rerank")


@pytest.fixture(scope="module")
def project(tmp_path_factory, empty_store):
    """A folder with a registered model, the current one of this module."""
    with registered(tmp_path_factory.mktemp("project"), empty_store, pooled_clip(1), "A card.", {}) as folder:
        yield folder


def records():
    rows = [{"text": text} for text in ("a red kite", "a blue field with a tree", "grey")]
    for color in ("red", "green", "blue"):
        stream = io.BytesIO()
        Image.new("RGB", (90, 60), color).save(stream, "PNG")
        rows.append({"image": base64.b64encode(stream.getvalue()).decode()})
    return rows


def asked(mode, top_k=1):
    return {"output": "scores", "mode": mode, "top_k": top_k}


@pytest.fixture(scope="module")
def client(project):
    from starlette.testclient import TestClient

    located, access = locate("models:/fast-goal@candidate"), Access()
    embedder = load(located.folder, access)
    check_embeds(embedder, "fast-goal")
    return TestClient(application(embedder, located, access, Limits(), ["*"]))


def test_the_pooling_makes_another_model(project):
    folder = project / "models/finetune"
    whole = registry.model_digest(folder)
    assert registry.pooling_heads(folder) == 4
    shutil.copytree(folder, project / "towers")
    (project / "towers/pooling.safetensors").unlink()
    assert registry.model_digest(project / "towers") != whole and registry.pooling_heads(project / "towers") is None
    other = pooled_clip(1)
    with torch.no_grad():
        other.pooling.pooling.norm_key.weight[0] += 1
    other.save(project / "other", {})
    assert registry.model_digest(project / "other") != whole


def test_the_registered_model_has_its_pooling(project):
    folder = fetch("models:/fast-goal@candidate")
    assert registry.pooling_heads(folder) == 4
    (folder / "pooling.safetensors").unlink()
    assert registry.pooling_heads(fetch("models:/fast-goal@candidate")) == 4  # found missing, and had again


def test_every_mode_answers_alike_wherever_it_is_asked(project, client):
    """In this process, as MLflow loads it, behind our server and behind MLflow's."""
    import mlflow
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    from fast_goal.tracking.server import tracking_uri

    mlflow.set_tracking_uri(tracking_uri())
    loaded, own = mlflow.pyfunc.load_model("models:/fast-goal@candidate"), Embedder(pooled_clip(1), Access())
    theirs, found = TestClient(init(loaded)), {}
    for mode in MODES:
        frame, params = pd.DataFrame(records()), asked(mode)
        found[mode] = own.predict(frame, params)["scores"].tolist()
        assert loaded.predict(frame, params)["scores"].tolist() == found[mode]
        request = {"dataframe_records": records(), "params": params}
        answers = [one.post("/invocations", json=request) for one in (client, theirs)]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text + answers[1].text
        assert answers[0].json() == answers[1].json()
        assert [row["scores"] for row in answers[0].json()["predictions"]] == found[mode]
    assert "null" in client.post("/invocations", json=request).text  # a pair that was not compared again
    assert found["global"] != found["conditioned"]
    kept = [
        (one, two)
        for row, other in zip(found["rerank"], found["conditioned"], strict=True)
        for one, two in zip(row, other, strict=True)
    ]
    assert all(one is None or one == pytest.approx(two, abs=1e-6) for one, two in kept)


def test_the_server_says_which_modes_there_are(client):
    assert client.get("/metadata").json()["modes"] == [*MODES]
    answer = client.post("/invocations", json={"dataframe_records": records(), "params": asked("rerank", 0)})
    assert answer.status_code == 400 and "params.top_k = '0': expected a whole number" in answer.json()["message"]


def test_the_parameters_stand_in_the_registry(project):
    import mlflow

    from fast_goal.tracking.server import tracking_uri

    mlflow.set_tracking_uri(tracking_uri())
    params = json.loads(mlflow.models.get_model_info("models:/fast-goal@candidate").signature.to_dict()["params"])
    assert {one["name"]: (one["type"], one["default"]) for one in params} == {
        "output": ("string", "embedding"),
        "mode": ("string", "global"),
        "top_k": ("long", 128),
    }


def test_a_damaged_pooling_is_not_served_and_gets_no_alias(project):
    damaged = pooled_clip(1)
    with torch.no_grad():
        damaged.pooling.pooling.norm_value.weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"scores .*nan.* in the mode conditioned: its weights are damaged"):
        check_embeds(Embedder(damaged), "fast-goal")
    damaged.save(project / "damaged", {})
    with pytest.raises(ModelError, match=r"scores .*nan.* in the mode conditioned\. Is the training broken"):
        registry.register(project / "damaged", "fast-goal", "candidate", "A card.", {}, None)
    assert registry.model_digest(fetch("models:/fast-goal@candidate")) == registry.model_digest(project / "models/finetune")


def test_the_embeddings_are_those_of_the_towers(project):
    frame = pd.DataFrame(records())
    with_pooling, without = Embedder(pooled_clip(1)).predict(frame), Embedder(tiny_clip(1).eval()).predict(frame)
    np.testing.assert_array_equal(np.array(with_pooling["embedding"].tolist()), np.array(without["embedding"].tolist()))
