"""Measured on tiny models and drawn images, held against slow loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fitted_clip import fitted
from small_project import params, tiny_clip, write_scenes

from fast_goal.data.captions import tokenize, trim
from fast_goal.data.images import open_image
from fast_goal.data.records import load_dataset
from fast_goal.errors import DataError, ModelError
from fast_goal.evaluation.features import FeatureStore
from fast_goal.promotion import latency
from fast_goal.promotion.measure import measure

CPU = torch.device("cpu")
CONFIG = params().evaluate


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        patch.setattr(latency, "SECONDS", 0.05)
        write_scenes("scenes", 18)
        yield load_dataset("scenes")


@pytest.fixture(scope="module")
def found(project):
    return measure(fitted(tiny_clip(0), project, 12), tiny_clip(0), [project], CONFIG, CPU)


def slow_r1(clip, dataset, captions, tie_counts):
    """R@1 in percent, the mean of both directions, one score at a time. captions: (text, row)."""
    images = [open_image(dataset.path(path)) for path in dataset.records.image_path]
    with torch.inference_mode():
        left = [clip.encode_image(clip.view(*image.size).apply(image)[None])[0].double().numpy() for image in images]
        right = [clip.encode_text(trim(tokenize([text], 248)[0]))[0].double().numpy() for text, _ in captions]
    scores = np.array([[np.float32(one @ other) for other in right] for one in left])
    scores = np.round(scores.astype(float), 6)  # identical texts and images tie
    better = np.greater if tie_counts else np.greater_equal
    forward = []
    for text, (_, row) in enumerate(captions):
        others = np.delete(scores[:, text], row)
        forward.append(not better(others, scores[row, text]).any())
    backward = []
    for row in sorted({row for _, row in captions}):
        mine = np.array([owner == row for _, owner in captions])
        backward.append(not better(scores[row, ~mine], scores[row, mine].max()).any())
    return 100 * (np.mean(forward) + np.mean(backward)) / 2


def test_recall_is_that_of_slow_loops(found, project):
    records = project.records
    captions = {
        "long": [(text, row) for row, text in enumerate(records.long_caption)],
        "short": [(text, row) for row, texts in enumerate(records.captions) for text in texts],
    }
    models = {"candidate": fitted(tiny_clip(0), project, 12).eval(), "champion": tiny_clip(0).eval()}
    for kind, compared in (("long", found.long["scenes"]), ("short", found.short["scenes"])):
        expected = {name: slow_r1(clip, project, captions[kind], True) for name, clip in models.items()}
        assert compared.candidate == pytest.approx(expected["candidate"])
        assert compared.champion == pytest.approx(expected["champion"])
        assert compared.difference == pytest.approx(expected["candidate"] - expected["champion"])
        assert compared.low <= compared.difference <= compared.high and 0 < compared.p <= 1
    assert found.long["scenes"].difference > 30 and found.long["scenes"].p < 0.05
    assert found.against_ties.champion == pytest.approx(slow_r1(models["champion"], project, captions["long"], False))
    assert found.dataset == "scenes" and len(found.numbers()) == 6 + 6 + 1 + 6


def test_features_that_evaluate_computed_are_used_again(found, project, monkeypatch):
    monkeypatch.setattr(FeatureStore, "_running", None)  # what it computes in
    again = measure(fitted(tiny_clip(0), project, 12), tiny_clip(0), [project], CONFIG, CPU)
    assert (again.long, again.short, again.against_ties) == (found.long, found.short, found.against_ties)


def test_a_model_that_gives_everything_the_same_embedding_is_not_better(project):
    flat = tiny_clip(0)
    with torch.no_grad():
        for weights in (flat.model.visual.ln_post, flat.model.ln_final):
            weights.weight.zero_()
            weights.bias.fill_(1.0)
    measured = measure(flat, tiny_clip(0), [project], CONFIG, CPU)
    assert measured.long["scenes"].candidate == 100 and measured.against_ties.candidate == 0
    assert measured.against_ties.difference <= 0


def test_a_candidate_that_diverged_gives_nan_and_a_champion_an_error(project):
    broken = tiny_clip(0)
    with torch.no_grad():
        broken.model.text_projection.fill_(float("nan"))
    measured = measure(broken, tiny_clip(0), [project], CONFIG, CPU)
    one = measured.long["scenes"]
    assert np.isnan([one.candidate, one.difference, one.p]).all() and one.champion >= 0
    with pytest.raises(ModelError, match=r"The champion, .*cannot be measured"):
        measure(tiny_clip(0), broken, [project], CONFIG, CPU)


def test_the_first_data_set_with_long_captions_decides(project):
    from dataclasses import replace

    bare = replace(project, name="bare", records=project.records.assign(long_caption=""))
    measured = measure(tiny_clip(1), tiny_clip(0), [bare, project], CONFIG, CPU)
    assert measured.dataset == "scenes" and list(measured.long) == ["scenes"] and list(measured.short) == ["bare", "scenes"]
    with pytest.raises(DataError, match=r"None of evaluate\.datasets \(bare\) has a long caption in the split 'test'"):
        measure(tiny_clip(1), tiny_clip(0), [bare], CONFIG, CPU)


def test_the_models_take_turns_and_the_medians_are_theirs(monkeypatch):
    """A clock that only the models move: 3 ms for the candidate, 2 ms for the champion, and a burst that hits both."""
    now, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def embed(clip):
        calls.append(clip)
        slow = 10 if 20 <= len(calls) < 32 else 1
        now[0] += {"candidate": 0.003, "champion": 0.002}[clip] * slow

    times = latency._times("candidate", "champion", embed)
    assert times.candidate == pytest.approx(3) and times.champion == pytest.approx(2) and times.ratio == pytest.approx(1.5)
    counted = calls[2 * latency.WARM_UP :]
    assert len(counted) == 2 * latency.MOST or now[0] > latency.SECONDS
    for begin in range(0, len(counted), 4):
        assert counted[begin : begin + 4] in (
            ["candidate", "champion", "champion", "candidate"],
            ["candidate", "champion"],
        )


def test_rounds_that_something_else_slowed_down_do_not_count(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def embed(clip):
        calls.append(clip)
        busy = len(calls) % 7 < 5 and clip == "candidate"  # most of the time, and by chance the candidate's
        now[0] += 0.009 if busy else 0.003

    times = latency._times("candidate", "champion", embed)
    assert times.candidate == pytest.approx(9) and times.champion == pytest.approx(3) and times.ratio == pytest.approx(1)


@pytest.mark.parametrize(("own", "ratio", "seconds"), [(0.003, 1, 4), (0.006, 2, 20)])
def test_a_candidate_that_seems_slow_is_timed_for_longer(monkeypatch, own, ratio, seconds):
    """The machine is busy, whenever it is the candidate's turn, for four seconds; what is slow by itself stays so."""
    now = [0.0]
    monkeypatch.setattr(latency, "SECONDS", 2.0)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def embed(clip):
        now[0] += {"candidate": own + (0.02 if now[0] < 4 else 0), "champion": 0.003}[clip]

    times = latency._times("candidate", "champion", embed, 1.25)
    assert times.ratio == pytest.approx(ratio) and now[0] == pytest.approx(seconds, abs=0.2)


def test_latency_is_that_of_a_real_text_and_image(found):
    for kind in ("text", "image"):
        assert 0 < found.latency[kind].candidate < 5000 and 0 < found.latency[kind].ratio < 100
    assert Path(".fast_goal/features").is_dir()
