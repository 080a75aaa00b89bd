"""Saved views of MLflow's page of runs: which runs, columns and charts it shows. They stand in its menu Views.

MLflow keeps a view as a tag of the experiment, `mlflow.sharedViewState.<id>`, with a JSON of name, times and state; the state
is that of the page, as JSON deflated and in base64. The format is not documented: it is what the page of MLflow 3.17 writes
and reads. A view that is there already is left alone, people may have changed it.
"""

from __future__ import annotations

import base64
import json
import re
import time
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fast_goal.config import Params
from fast_goal.tracking.server import tracking_uri

if TYPE_CHECKING:
    from mlflow.tracking.client import MlflowClient

PREFIX = "mlflow.sharedViewState."
LOCAL_SERVER = "http://127.0.0.1:5000"  # that of `make ui`
# Metrics, and the titles of their charts, which are narrow.
SECTIONS = {
    "Long captions": {
        "long.finetuned.text_to_image.R1": "text → image R@1",
        "long.finetuned.image_to_text.R1": "image → text R@1",
    },
    "Short captions": {
        "short.finetuned.text_to_image.R1": "text → image R@1",
        "short.finetuned.image_to_text.R1": "image → text R@1",
    },
    "Localisation": {"localisation.finetuned.hit1": "best patch in box"},
}
CURVES = {
    "loss": "loss",
    "val_text_to_image_R_at_1": "text → image R@1",
    "val_image_to_text_R_at_1": "image → text R@1",
    "samples_per_second": "samples/s",
}
COLUMNS = ("objective.weights.tsl_image", "finetune.epochs", "finetune.learning_rate", "seed")  # parameters


def save_views(client: MlflowClient, experiment_id: str, params: Params) -> dict[str, str]:
    """Makes the views that are missing; returns the address of each by its name."""
    tags = client.get_experiment(experiment_id).tags
    addresses = {}
    for key, (name, state) in _views(params).items():
        if f"{PREFIX}{key}" not in tags:
            client.set_experiment_tag(experiment_id, f"{PREFIX}{key}", _pack(name, state))
        uri = tracking_uri()
        server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL_SERVER
        addresses[name] = f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&compareRunsMode=CHART"
    return addresses


def _views(params: Params) -> dict[str, tuple[str, dict[str, Any]]]:
    """The name and state of each view by its id."""
    datasets = params.evaluate.datasets
    found = {
        f"fast-goal-results-{re.sub(r'[^A-Za-z0-9_-]', '_', name)}": (f"Results on {name}", _results(name)) for name in datasets
    }
    return {**found, "fast-goal-curves": ("Training curves", _curves())}


def _results(dataset: str) -> dict[str, Any]:
    """One row and one bar for each pipeline."""
    cards = [
        {**_card("BAR", section), "metricKey": f"{dataset}.{metric}", "displayName": title}
        for section, metrics in enumerate(SECTIONS.values())
        for metric, title in metrics.items()
    ]
    columns = [f"metrics.`{card['metricKey']}`" for card in cards]
    columns += ["attributes.`Dataset`", "attributes.`Version`", *(f"params.`{name}`" for name in COLUMNS)]
    return {
        "searchFilter": "tags.`fast_goal.role` = 'pipeline'",
        "selectedColumns": columns,
        **_charts(SECTIONS, cards),
    }


def _curves() -> dict[str, Any]:
    """The curves of fine-tuning, a colour for each pipeline's name; those of equal names are averaged."""
    cards = [
        {
            **_card("LINE", 0),
            "metricKey": metric,
            "selectedMetricKeys": [metric],
            "displayName": title,
            "scaleType": "linear",
            "xAxisScaleType": "linear",
            "xAxisKey": "step",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "lineSmoothness": 0,
            "range": {},
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }
        for metric, title in CURVES.items()
    ]
    return {
        "searchFilter": "tags.step = 'finetune'",
        "groupBy": {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "pipeline"}]},
        **_charts(["Fine-tuning"], cards),
    }


def _card(kind: str, section: int) -> dict[str, Any]:
    return {
        "type": kind,
        "metricSectionId": f"section-{section}",
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
    }


def _charts(sections: Iterable[str], cards: list[dict[str, Any]]) -> dict[str, Any]:
    """The sections opened, and after them MLflow's own, closed, for the charts that it adds for all other metrics."""
    made = [{"uuid": f"section-{number}", "name": title, "display": True} for number, title in enumerate(sections)]
    made += [{"uuid": f"rest-{name}", "name": name, "display": False} for name in ("Model metrics", "System metrics")]
    return {
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
        "compareRunSections": [{**section, "isReordered": True} for section in made],
        "compareRunCharts": [{**card, "uuid": f"card-{number}"} for number, card in enumerate(cards)],
    }


def _pack(name: str, state: Mapping[str, Any]) -> str:
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    now = int(time.time() * 1000)
    return json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})
