"""The tests of data drift on samples made by hand: what is found, what is left out and why."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from fast_goal.config import DriftConfig, build
from fast_goal.errors import ConfigError
from fast_goal.evaluation.bootstrap import holm
from fast_goal.monitoring.data import WHAT, aligned, compare
from fast_goal.monitoring.snapshot import Facts, Sample, Snapshot

CONFIG = DriftConfig(samples=200, permutations=1200, significance=0.01, probe=8)


def keys(numbers) -> np.ndarray:
    hashes = sorted(hashlib.sha256(str(number).encode()).digest()[:16] for number in numbers)
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)


def sample(numbers, shift=0.0, longer=0, seen=None, labels=("cat", "dog")) -> Sample:
    """A member for each number; its values follow from its key, apart from `shift` and `longer`."""
    every, known = keys(numbers), keys(numbers)[:seen]
    made = [np.random.default_rng(int.from_bytes(key.tobytes()[:8], "little")) for key in every]
    features = np.array([generator.normal(size=5) for generator in made], np.float32).reshape(-1, 5) + shift
    tokens = np.array([generator.integers(20, 60) for generator in made], np.int64) + longer
    counts = np.array([generator.integers(0, 3, 2) for generator in made], np.int64).reshape(-1, 2)
    counts[:, 1] += longer
    sentences = tokens // 10
    return Sample(every, features, every, features[:, ::-1], tokens, sentences, known, np.array(labels), counts[: len(known)])


def snapshot(numbers, found=None, base="b", detector="d", digest="x") -> Snapshot:
    found = found or sample(numbers)
    return Snapshot(Facts("scenes", digest, "2026-01-01T00:00:00Z", base, detector, 200), keys(numbers), keys(numbers), found)


def nothing() -> Sample:
    return sample([])


def test_the_same_data_do_not_drift():
    reference = snapshot(range(100))
    findings, left_out = compare(reference, {"all": sample(range(100)), "new": nothing()}, reference, CONFIG)
    assert [finding.what for finding in findings] == list(WHAT)
    assert all(finding.p == 1 and finding.exact and not finding.drifted for finding in findings)
    assert all(finding.statistic == pytest.approx(0, abs=1e-9) for finding in findings)
    assert {(one.what, one.rows, one.reason) for one in left_out} == {(what, "new", "nothing is new") for what in WHAT}


def test_other_data_of_the_same_kind_do_not_drift():
    reference, present = snapshot(range(80)), snapshot(range(40, 140))
    samples = {"all": sample(range(40, 140)), "new": sample(range(80, 140))}
    findings, left_out = compare(reference, samples, present, CONFIG)
    assert len(findings) == 12 and not left_out
    assert not any(finding.drifted for finding in findings)
    assert min(finding.p for finding in findings) > 0.01
    adjusted = holm([finding.p for finding in findings])
    assert [finding.p_adjusted for finding in findings] == adjusted, "for all the tests together"
    again, _ = compare(reference, samples, present, CONFIG)
    assert again == findings, "the same data, the same findings"


def test_a_shift_is_found_in_everything():
    reference = snapshot(range(60))
    moved = sample(range(100, 160), shift=2.0, longer=20)
    findings, _ = compare(reference, {"all": moved, "new": moved}, snapshot(range(100, 160), moved), CONFIG)
    assert len(findings) == 12 and all(finding.drifted for finding in findings)
    assert all(finding.p == pytest.approx(1 / 1201) for finding in findings)
    assert all(finding.p_adjusted < 0.01 < 0.1 < finding.statistic for finding in findings)
    assert "images, new rows only: energy coefficient" in findings[6].text and "drifted; 60 against 60" in findings[6].text


def test_what_is_diluted_in_the_whole_shows_in_the_new_rows():
    reference = snapshot(range(200))
    new = sample(range(500, 512), shift=0.9)
    old = sample(range(190))
    order = np.argsort([key.tobytes() for key in np.concatenate([old.image_keys, new.image_keys])], kind="stable")
    parts = {
        name: np.concatenate([getattr(old, name), getattr(new, name)])[order]
        for name in ("image_keys", "image_features", "caption_keys", "caption_features", "tokens", "sentences", "detections")
    }
    whole = Sample(**parts, region_keys=parts["image_keys"], labels=old.labels)
    findings, _ = compare(reference, {"all": whole, "new": new}, snapshot(range(202), whole), CONFIG)
    images = {finding.rows: finding for finding in findings if finding.what == "images"}
    assert images["new"].drifted and not any(finding.drifted for finding in findings if finding.what == "tokens")
    assert images["new"].statistic > 10 * images["all"].statistic


def test_samples_are_cut_to_what_is_asked_for_and_small_ones_are_left_out():
    reference = snapshot(range(60))
    config = replace(CONFIG, samples=20)
    findings, left_out = compare(
        reference, {"all": sample(range(100)), "new": sample(range(60, 69))}, snapshot(range(69)), config
    )
    assert {(finding.reference, finding.present, finding.rows) for finding in findings} == {(20, 20, "all")}
    reasons = {one.reason for one in left_out if one.rows == "new"}
    assert reasons == {"new rows only: 9 images; 10 are needed", "new rows only: 9 captions; 10 are needed"}


@pytest.mark.parametrize(
    ("change", "what", "reason"),
    [
        ({"base": "other"}, {"images", "captions"}, "the base model is another one"),
        ({"detector": "other"}, {"detections", "classes"}, "the detector or its settings are others"),
        ({"detector": ""}, {"detections", "classes"}, "there is no detector"),
    ],
)
def test_what_does_not_compare_is_left_out_with_its_reason(change, what, reason):
    reference, present = snapshot(range(50)), snapshot(range(100, 150), **change)
    findings, left_out = compare(reference, {"all": present.sample, "new": present.sample}, present, CONFIG)
    assert {one.what for one in left_out} == what and all(one.reason.startswith(reason) for one in left_out)
    assert {finding.what for finding in findings} == set(WHAT) - what
    if change == {"detector": ""}:
        _, left_out = compare(present, {"all": reference.sample}, reference, CONFIG)
        assert {one.reason for one in left_out} == {"the reference was made without a detector"}


def test_images_that_flism_has_not_seen_and_a_detector_of_one_class():
    reference = snapshot(range(50))
    unseen = sample(range(100, 150), seen=3)
    _, left_out = compare(reference, {"all": unseen}, snapshot(range(100, 150), unseen), CONFIG)
    assert {one.reason for one in left_out} == {"FLISM has seen 3 of these images; 10 are needed: run `dvc repro flism`"}
    early = snapshot(range(50), sample(range(50), seen=0))
    _, left_out = compare(early, {"all": reference.sample}, reference, CONFIG)
    assert {one.reason for one in left_out} == {"FLISM had seen 0 images of the reference when it was made; 10 are needed"}
    single = [replace(sample(numbers), labels=np.array(["object"])) for numbers in (range(50), range(100, 150))]
    single = [replace(one, detections=one.detections[:, :1]) for one in single]
    findings, left_out = compare(snapshot(range(50), single[0]), {"all": single[1]}, reference, CONFIG)
    assert [(one.what, one.reason) for one in left_out] == [("classes", "the detector knows one class only")]
    assert "detections" in {finding.what for finding in findings}


def test_labels_of_two_samples_are_put_in_one_order():
    first = replace(nothing(), labels=np.array(["cat", "dog"]), detections=np.array([[1, 2]]))
    second = replace(nothing(), labels=np.array(["bird", "dog"]), detections=np.array([[3, 4], [0, 5]]))
    labels, before, now = aligned(first, second)
    assert labels == ["bird", "cat", "dog"]
    assert before.tolist() == [[0, 1, 2]] and now.tolist() == [[3, 0, 4], [0, 0, 5]]


def test_settings_under_which_nothing_could_be_found_are_refused():
    values = {"samples": 100, "permutations": 1199, "significance": 0.01, "probe": 8}
    with pytest.raises(ConfigError, match=r"drift\.permutations = 1199: .* expected at least 1200"):
        build(DriftConfig, values, "drift")
    with pytest.raises(ConfigError, match=r"drift\.significance = 0"):
        build(DriftConfig, {**values, "significance": 0}, "drift")
    assert DriftConfig.TESTS / (build(DriftConfig, {**values, "permutations": 1200}, "drift").permutations + 1) < 0.01
