"""The tasks `composition` and `zero_shot` against slow loops."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from fake_store import questions, study, unit
from squares import CLASSES, CPU, Recording, tiny_clip, with_choices, write_squares

from fast_goal.data.captions import tokenize
from fast_goal.data.images import open_image
from fast_goal.errors import DataError
from fast_goal.evaluation import embedding
from fast_goal.evaluation.comparison import MODELS, Study
from fast_goal.evaluation.embedding import Choices, Labels
from fast_goal.evaluation.features import FeatureStore
from fast_goal.evaluation.tasks import composition, measure

TASKS = ["composition", "zero_shot"]
WIDE = {"names": [f"kind{n}" for n in range(12)], "templates": ["A {}."]}


def words(values):
    return np.array(values, dtype=object)


@pytest.fixture
def made():
    """Eight images, 4 and 5 of one scene, with choices of one to three foils about whole images and crops."""
    draw = random.Random(2)
    crops = [(draw.randrange(8), draw.choice([None, (1, 2, 30, 40), (5, 5, 9, 9)])) for _ in range(60)]
    foils = [[f"foil {row} {other}" for other in range(1 + row % 3)] for row in range(60)]
    suites = words(["plain" if row < 20 else "vg_attribution" for row in range(60)])
    groups = words(["x" if row % 3 else "y" for row in range(60)])
    choices = Choices(crops, suites, groups, [f"caption {row % 50}" for row in range(60)], foils)
    shown = [(draw.randrange(8), draw.choice([None, (1, 2, 30, 40)])) for _ in range(40)]
    names = [draw.choice(CLASSES["names"]) for _ in range(25)] + [draw.choice(WIDE["names"]) for _ in range(15)]
    labels = Labels(shown, words(["few"] * 25 + ["wide"] * 15), words(names), {"few": CLASSES, "wide": WIDE})
    scenes = np.array([0, 1, 2, 3, 4, 4, 6, 7])
    return study(questions([""] * 8, scenes=scenes, choices=choices, labels=labels), 3)


def image_vector(store, row, box):
    return store.vectors[row] if box is None else store.vector(f"{row} {box}")


def score(one, other):
    return np.float32(np.dot(np.float32(one).astype(float), np.float32(other).astype(float)))


def test_choices_agree_with_loops(made):
    found = measure(made, ["composition"])["composition"]
    choices = made.asked.choices
    assert list(found) == ["plain", "vg_attribution"]
    for suite, (start, stop) in {"plain": (0, 20), "vg_attribution": (20, 60)}.items():
        for model in MODELS:
            store, right = made.stores[model], {"x": [], "y": []}
            for case in range(start, stop):
                image = image_vector(store, *choices.crops[case])
                own = score(image, store.vector(choices.captions[case]))
                rivals = [score(image, store.vector(foil)) for foil in choices.foils[case]]
                right[choices.groups[case]].append(all(own > rival for rival in rivals))
            every = right["x"] + right["y"]
            assert 0 < sum(every) < len(every)
            assert found[suite][model]["accuracy"] == pytest.approx(100 * np.mean(every))
            listed = found[suite][model]["groups"]
            assert set(listed) == ({"x"} if suite == "vg_attribution" else {"x", "y"}), "x has 27 cases there, y 13"
            for group, values in listed.items():
                assert values["accuracy"] == pytest.approx(100 * np.mean(right[group]))
                assert values["cases"] == len(right[group])
        shares = [1 / (1 + len(choices.foils[case])) for case in range(start, stop)]
        assert found[suite]["chance"]["accuracy"] == pytest.approx(100 * np.mean(shares))
        change = found[suite]["difference"]["accuracy"]
        gain = found[suite]["finetuned"]["accuracy"] - found[suite]["base"]["accuracy"]
        assert change["value"] == pytest.approx(gain) and change["low"] <= gain <= change["high"]
        units = {made.asked.groups[row] for row, _ in choices.crops[start:stop]}
        assert found[suite]["independent"] == len(units) <= 7


@pytest.mark.parametrize("at_once", [1, 5, 7])
def test_choices_do_not_depend_on_the_memory_allowed(made, monkeypatch, at_once):
    whole = measure(made, ["composition"])["composition"]
    monkeypatch.setattr(composition, "AT_ONCE", at_once)
    assert measure(made, ["composition"])["composition"] == whole


def test_a_tie_is_wrong_and_counted():
    """Of the five choices one is right, two are tied (a foil equal to the caption; one that is equal as far as the model
    reads) and two are wrong, one of them in spite of a tie among its foils."""
    asked = questions([""] * 2)
    made = study(asked, 0)
    store = made.stores["base"]
    vectors = {"best": 1.0, "middle": 0.5, "worst": 0.1}
    for text, share in vectors.items():
        vectors[text] = share * store.vectors[0]
    store.vector = lambda text, tokens=None: vectors[text.split()[0]]
    store.given = {"best and far too long": 101}
    cases = [
        ("best", ["middle", "worst"]),
        ("best", ["worst", "best"]),
        ("best", ["best and far too long"]),
        ("middle", ["best", "best"]),
        ("worst", ["worst", "middle"]),
    ]
    choices = Choices([(0, None)] * 5, words(["s"] * 5), words(["g"] * 5), [own for own, _ in cases], [f for _, f in cases])
    made = study(dataclasses.replace(asked, choices=choices), 0)
    made = dataclasses.replace(made, stores={model: store for model in MODELS})
    found = measure(made, ["composition"])["composition"]["s"]
    for model in MODELS:
        assert (found[model]["accuracy"], found[model]["ties"]) == (20, 2)
        assert found[model]["groups"]["g"] == {"accuracy": 20, "cases": 5, "ties": 2}
    assert found["truncated"] == {"base": 1, "finetuned": 1}
    assert found["difference"]["accuracy"] == {"value": 0, "low": 0, "high": 0, "p": 1}


def test_classes_agree_with_loops(made):
    found = measure(made, ["zero_shot"])["zero_shot"]
    labels = made.asked.labels
    for suite, classes, rows in (("few", CLASSES, range(25)), ("wide", WIDE, range(25, 40))):
        for model in MODELS:
            store, ranks = made.stores[model], {}
            means = [
                unit(sum(store.vector(template.replace("{}", name)) for template in classes["templates"]))
                for name in classes["names"]
            ]
            for case in rows:
                image = image_vector(store, *labels.crops[case])
                scores = [score(image, mean) for mean in means]
                own = scores[classes["names"].index(labels.labels[case])]
                ranks.setdefault(labels.labels[case], []).append(sum(other >= own for other in scores))
            every = [rank for of_class in ranks.values() for rank in of_class]
            assert found[suite][model]["accuracy"] == pytest.approx(100 * np.mean([rank == 1 for rank in every]))
            by_class = {name: 100 * np.mean([rank == 1 for rank in of_class]) for name, of_class in ranks.items()}
            assert found[suite][model]["macro"] == pytest.approx(np.mean(list(by_class.values())))
            listed = {name: values["accuracy"] for name, values in found[suite][model]["groups"].items()}
            assert listed == pytest.approx(by_class)
            if suite == "wide":
                assert found[suite][model]["accuracy@5"] == pytest.approx(100 * np.mean([rank <= 5 for rank in every]))
    assert found["few"]["chance"]["accuracy"] == pytest.approx(100 / 3) and "accuracy@5" not in found["few"]["difference"]
    assert found["wide"]["chance"]["accuracy@5"] == pytest.approx(100 * 5 / 12)
    assert (found["few"]["classes"], found["few"]["templates"]) == (3, 3)


def test_classes_that_look_alike_are_ties():
    """Twelve classes of two embeddings: six tie with the right one, so that it is not even among the first five."""
    classes = {"names": [f"{'near' if n < 6 else 'far'} {n}" for n in range(12)], "templates": ["{}"]}
    labels = Labels([(0, None), (0, None)], words(["s", "s"]), words(["near 3", "far 7"]), {"s": classes})
    made = study(questions([""], labels=labels))
    for store in made.stores.values():
        store.vector = lambda text, tokens=None, image=store.vectors[0]: image if text.startswith("near") else -image
    found = measure(made, ["zero_shot"])["zero_shot"]["s"]
    for model in MODELS:
        assert (found[model]["accuracy"], found[model]["accuracy@5"], found[model]["ties"]) == (0, 0, 1)


@pytest.fixture
def squares(tmp_path):
    return with_choices(write_squares(tmp_path))


def test_questions_know_crops_and_classes(squares):
    asked = embedding.questions(squares, "test")
    assert asked.choices.crops == asked.labels.crops == [(0, None), (0, (10, 5, 41, 60)), (1, None)]
    assert asked.choices.captions == ["number 0", "a thing", "a thing"]
    assert asked.choices.foils == [["a foil", "another"], ["a foil"], ["number 1"]]
    assert asked.labels.labels.tolist() == ["red", "blue", "red"] and list(asked.labels.classes) == ["few"]
    other = embedding.questions(squares, "val")
    assert (other.choices.captions, other.labels.crops) == (["number 6"], [(0, (0, 0, 9, 9))])
    less = dataclasses.replace(squares, choices=squares.choices[:3], labels=None)
    assert embedding.questions(less, "val").choices is None and embedding.questions(less, "test").labels is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: {"choices": d.choices.assign(foils=[[]] * 4)}, r"choices of 's', image_id 'i0': no foil"),
        (
            lambda d: {"choices": d.choices.assign(image_id="gone")},
            r"'squares', choices: image_id 'gone' is none of its records",
        ),
        (lambda d: {"labels": d.labels.assign(image_id="gone")}, r"'squares', labels: image_id 'gone' is none of its records"),
        (lambda d: {"labels": d.labels.assign(label="green")}, r"the label 'green' of image_id 'i0' is none of its 3 names"),
        (lambda d: {"labels": d.labels.assign(suite="unused")}, r"classes of 'unused': templates \[\]"),
        (lambda d: {"classes": {}}, r"classes of 'few': templates \[\]"),
        (lambda d: {"classes": {"few": CLASSES | {"templates": ["A thing."]}}}, r"each with \{\} for the name"),
        (lambda d: {"classes": {"few": CLASSES | {"names": ["red", "red"]}}}, r"'red' stands twice"),
    ],
)
def test_what_cannot_be_asked_is_named(squares, change, words):
    with pytest.raises(DataError, match=words):
        embedding.questions(dataclasses.replace(squares, **change(squares)), "test")


def test_a_real_store_agrees_with_loops_and_embeds_once(squares, made):
    asked = embedding.questions(squares, "test")
    clips = {"base": Recording(tiny_clip(0, 77)), "finetuned": Recording(tiny_clip(1, 77))}
    stores = {model: FeatureStore(None, clip, CPU, 8) for model, clip in clips.items()}
    found = measure(Study(asked, stores, made.config), TASKS)
    texts = {text for own, foils in zip(asked.choices.captions, asked.choices.foils, strict=True) for text in (own, *foils)}
    prompts = {template.replace("{}", name) for template in CLASSES["templates"] for name in CLASSES["names"]}
    for clip in clips.values():
        assert len(clip.texts) == len(set(clip.texts)) == len(texts | prompts)
        assert len(clip.images) == len(set(clip.images)) == len(asked.files) + 1, "the images, and one crop"
    with torch.inference_mode():
        for model, seed in (("base", 0), ("finetuned", 1)):
            clip, right, named = tiny_clip(seed, 77), [], []

            def text(words, clip=clip):
                return clip(tokens=tokenize([words], 77)[0]).text_features[0].numpy()

            means = [
                unit(sum(text(template.replace("{}", name)) for template in CLASSES["templates"])) for name in CLASSES["names"]
            ]
            for case, (row, box) in enumerate(asked.choices.crops):
                image = open_image(asked.paths[row])
                image = image.crop(box) if box else image
                shown = clip(clip.view(*image.size).apply(image)[None]).image_features[0].numpy()
                own = score(shown, text(asked.choices.captions[case]))
                right.append(all(own > score(shown, text(foil)) for foil in asked.choices.foils[case]))
                scores = [score(shown, mean) for mean in means]
                named.append(CLASSES["names"][int(np.argmax(scores))] == asked.labels.labels[case])
            assert found["composition"]["s"][model]["accuracy"] == pytest.approx(100 * np.mean(right))
            assert found["zero_shot"]["few"][model]["accuracy"] == pytest.approx(100 * np.mean(named))


def test_without_choices_and_labels_the_tasks_are_left_out_quietly(caplog):
    found = measure(study(questions(["A b. C d."])), ["long", *TASKS])
    assert found["skipped"] == {"composition": "captions to choose from", "zero_shot": "labels"}
    assert "long" in found and not caplog.records
