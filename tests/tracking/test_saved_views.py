import base64
import json
import zlib
from dataclasses import replace

from fast_goal.evaluation.headline import headline
from fast_goal.tracking.runs import step_run
from fast_goal.tracking.server import connect
from fast_goal.tracking.views import save_views

RECALL = {way: {"R@1": 1.0} for way in ("text_to_image", "image_to_text")}
MEASURED = {
    "long": {"base": RECALL, "finetuned": RECALL},
    "short": {"base": RECALL, "finetuned": RECALL},
    "localisation": {model: {"hit@1": 1.0} for model in ("base", "finetuned", "chance")},
}


def views(client, experiment) -> dict[str, dict]:
    """What MLflow's page reads, by the view's name."""
    found = {}
    for tag, value in client.get_experiment(experiment).tags.items():
        if tag.startswith("mlflow.sharedViewState."):
            envelope = json.loads(value)
            assert len(value) < 5000 and isinstance(envelope["createdAt"], int)
            packed = envelope["state"].removeprefix("deflate;")
            found[envelope["name"]] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return found


def test_views_are_made_with_the_first_pipeline(project, params):
    with step_run("finetune", params) as track:
        track.headline(headline({"scenes": MEASURED}))
    client, experiment = connect()
    found = views(client, experiment)
    assert set(found) == {"Results on scenes", "Training curves"}
    results = found["Results on scenes"]
    [pipeline] = client.search_runs([experiment], results["searchFilter"])
    charts = {card["metricKey"] for card in results["compareRunCharts"]}
    assert len(charts) == 5 and charts <= pipeline.data.metrics.keys(), "a chart of a metric that there is"
    columns = [name.split("`")[1] for name in results["selectedColumns"] if name.startswith("params.")]
    assert set(columns) <= pipeline.data.params.keys()
    sections = {section["uuid"] for section in results["compareRunSections"]}
    assert {card["metricSectionId"] for card in results["compareRunCharts"]} <= sections
    [finetune] = client.search_runs([experiment], found["Training curves"]["searchFilter"])
    [group] = found["Training curves"]["groupBy"]["groupByKeys"]
    assert finetune.data.tags[group["groupByData"]] == pipeline.info.run_name


def test_views_are_left_alone_once_they_are_there(project, params, monkeypatch):
    client, experiment = connect()
    addresses = save_views(client, experiment, params)
    assert addresses["Training curves"] == (
        f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?viewStateShareKey=fast-goal-curves&compareRunsMode=CHART"
    )
    client.set_experiment_tag(experiment, "mlflow.sharedViewState.fast-goal-curves", "mine")
    two = replace(params, evaluate=replace(params.evaluate, datasets=["scenes", "my photos.2"]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server/")
    added = save_views(client, experiment, two)
    assert added["Results on my photos.2"].startswith("http://server/#/experiments/")
    tags = client.get_experiment(experiment).tags
    assert tags["mlflow.sharedViewState.fast-goal-curves"] == "mine"
    assert "mlflow.sharedViewState.fast-goal-results-my_photos_2" in tags
