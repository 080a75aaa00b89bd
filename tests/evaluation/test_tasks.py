"""Each task against slow loops over made-up captions, and all of them over one real store."""

import dataclasses
import random
import typing

import numpy as np
import pytest
import torch
from fake_store import caption, questions, slow_recall, study, unit
from squares import CPU, Recording, tiny_clip, with_choices, with_masks, write_squares

from fast_goal.config import EvaluateConfig
from fast_goal.data.captions import split_sentences, tokenize
from fast_goal.data.images import open_image
from fast_goal.evaluation import embedding, tasks
from fast_goal.evaluation.comparison import MODELS, Study
from fast_goal.evaluation.features import FeatureStore
from fast_goal.evaluation.headline import flatten
from fast_goal.evaluation.tasks import NotAsked, generator, known_tasks, measure, section, task

ALL = typing.get_args(typing.get_args(typing.get_type_hints(EvaluateConfig)["tasks"])[0])
COUNT = 12


@pytest.fixture
def made():
    """Twelve images, one without a long caption, with short captions of unequal number; images 4 and 5 are one scene."""
    draw = random.Random(1)
    long = [caption(draw) if row != 3 else "" for row in range(COUNT)]
    short = [[caption(draw, 1).split(".")[0] for _ in range(row % 3)] for row in range(COUNT)]
    scenes = np.array([0, 1, 2, 3, 4, 4, *range(6, COUNT)])
    return study(questions(long, short, scenes=scenes), 1)


def sentences_of(text):
    return [sentence.text for sentence in split_sentences(text)]


def check(made, block, queries, owners, tokens=None):
    """The recall of a block is that of these queries, tuples of texts, by loops."""
    assert block["captions"] == len(queries)
    for model in MODELS:
        store = made.stores[model]
        vectors = [unit(np.mean([store.vector(text, tokens) for text in query], axis=0)) for query in queries]
        for k in made.config.ks:
            expected = slow_recall(store.vectors, vectors, owners, k)
            found = [block[model][direction][f"R@{k}"] for direction in ("text_to_image", "image_to_text")]
            assert found == pytest.approx(expected)


def check_drop(made, found, block):
    """What R@1 falls by, from the recalls of the whole captions and of the changed ones."""
    for model in MODELS:
        falls = [
            found["long"][model][direction]["R@1"] - block[model][direction]["R@1"]
            for direction in ("text_to_image", "image_to_text")
        ]
        assert block["drop"][model]["R@1"] == pytest.approx(sum(falls) / 2)
    change = block["drop"]["difference"]["R@1"]
    assert change["value"] == pytest.approx(block["drop"]["finetuned"]["R@1"] - block["drop"]["base"]["R@1"])
    assert change["low"] <= change["value"] <= change["high"] and 0 < change["p"] <= 1


def test_the_words_of_the_configuration_are_the_files_of_the_package(made):
    assert sorted(ALL) == known_tasks()
    for name in ALL:
        assert all(section(name, made.config)) and "{" not in "".join(section(name, made.config))
    assert "50%" in section("dropped", made.config).about


def test_two_tasks_of_one_name_are_refused():
    known_tasks()
    with pytest.raises(ValueError, match="two tasks are named 'long'"):
        task("long", "", "")(lambda study: [])


def test_long_and_short(made):
    found = measure(made, ["long", "short"])
    asked = made.asked
    check(made, found["long"], [(text,) for text in asked.long.texts], asked.long.images.tolist())
    check(made, found["short"], [(text,) for text in asked.short.texts], asked.short.images.tolist())
    assert (found["images"], found["independent"], found["skipped"]) == (12, 11, {})


def test_sentence_average(made):
    found = measure(made, ["long", "sentence_average"])
    queries = [tuple(sentences_of(text)) for text in made.asked.long.texts]
    assert all(len(query) >= 3 for query in queries)
    check(made, found["sentence_average"], queries, made.asked.long.images.tolist())
    check_drop(made, found, found["sentence_average"])
    whole = found["long"]["slices_by_sentences"]
    parts = found["sentence_average"]["slices_by_sentences"]
    assert [part["captions"] for part in parts.values()] == [part["captions"] for part in whole.values()]


def test_truncation(made):
    lengths = made.lengths(made.whole)
    assert lengths.max() > 15 > lengths.min()
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, truncation=[15, 5, 15, 99, int(lengths.max())]))
    found = measure(made, ["long", "truncation"])
    assert list(found["truncation"]) == ["5", "15", "full"], "what cuts nothing is left out"
    for name, tokens in (("5", 5), ("15", 15), ("full", None)):
        block = found["truncation"][name]
        check(made, block, [(text,) for text in made.asked.long.texts], made.asked.long.images.tolist(), tokens)
        assert block["truncated"]["base"] == (0 if tokens is None else (lengths > tokens).sum())
    check_drop(made, found, found["truncation"]["5"])
    assert found["truncation"]["full"] == found["long"]


def test_sentences(made):
    found = measure(made, ["sentences"])
    queries = [
        ((sentence,), row)
        for text, row in zip(made.asked.long.texts, made.asked.long.images, strict=True)
        for sentence in sentences_of(text)
    ]
    check(made, found["sentences"], [query for query, _ in queries], [int(row) for _, row in queries])


def variants(made, name):
    """The queries of a task of one variant, as plain texts."""
    (variant,) = tasks._TASKS[name][0]._variants(made)
    assert all(len(query) == 1 for query in variant.queries)
    return [text for (text,) in variant.queries]


def test_shuffled(made):
    found = measure(made, ["long", "shuffled"])
    changed = variants(made, "shuffled")
    for before, after in zip(made.asked.long.texts, changed, strict=True):
        assert sorted(sentences_of(before)) == sorted(sentences_of(after)) and before != after
    check(made, found["shuffled"], [(text,) for text in changed], made.asked.long.images.tolist())
    check_drop(made, found, found["shuffled"])


def test_shuffling_draws_every_other_order_alike():
    texts = [f"A {number}. B {number}. C {number}." for number in range(600)]
    orders = ["".join(word for word in text.split() if word in "ABC") for text in variants(study(questions(texts)), "shuffled")]
    counts = {order: orders.count(order) for order in set(orders)}
    assert sorted(counts) == ["ACB", "BAC", "BCA", "CAB", "CBA"]
    assert all(80 < count < 160 for count in counts.values())


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, {3: 1, 4: 2, 5: 2, 6: 3, 7: 3}), (0.2, {3: 2, 4: 3, 5: 4, 6: 5, 7: 6})])
def test_dropped(made, fraction, kept):
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, dropped=fraction))
    found = measure(made, ["long", "dropped"])
    changed = variants(made, "dropped")
    for before, after in zip(made.asked.long.texts, changed, strict=True):
        left = iter(sentences_of(before))
        assert all(sentence in left for sentence in sentences_of(after)), "a part of them, in their order"
        assert len(sentences_of(after)) == kept[len(sentences_of(before))]
    check(made, found["dropped"], [(text,) for text in changed], made.asked.long.images.tolist())
    check_drop(made, found, found["dropped"])


def test_one_sentence_is_left_however_many_are_dropped():
    made = study(questions(["A b. C d. E f.", "G h.", "I j. K l."]), dropped=1.0)
    assert [len(sentences_of(text)) for text in variants(made, "dropped")] == [1, 1, 1]
    assert variants(made, "shuffled")[1] == "G h."


def test_robustness(made):
    found = measure(made, ["long", "robustness"])
    changed, asked = variants(made, "robustness"), made.asked
    captions = zip(asked.long.texts, asked.long.images, strict=True)
    owner = {sentence: row for text, row in captions for sentence in sentences_of(text)}
    drawn = set()
    for before, after, row in zip(asked.long.texts, changed, asked.long.images, strict=True):
        own, all_of_them = sentences_of(before), sentences_of(after)
        middle = -(-len(own) // 2)
        false = all_of_them.pop(middle)
        assert all_of_them == own
        assert asked.groups[owner[false]] != asked.groups[row], "of another scene"
        drawn.add(false)
    assert len(drawn) > len(changed) / 2
    check(made, found["robustness"], [(text,) for text in changed], asked.long.images.tolist())
    check_drop(made, found, found["robustness"])


def test_a_false_sentence_is_one_that_the_caption_does_not_have():
    same = "A b. C d."
    made = study(questions([same, same, "A b. X y.", same], scenes=np.array([0, 1, 2, 0])))
    changed = variants(made, "robustness")
    assert changed[0] == changed[1] == changed[3] == "A b. X y. C d."
    assert changed[2] == "A b. C d. X y."
    twins = study(questions(["A b.", "C d."], scenes=np.array([7, 7])))
    found = measure(twins, ["long", "robustness"])
    assert found["skipped"] == {"robustness": "sentences of other images"} and "robustness" not in found


def test_what_is_drawn_depends_on_the_seed_and_the_text_alone(made):
    for name in ("shuffled", "dropped"):
        whole = variants(made, name)
        some = study(questions(made.asked.long.texts[4:7]))
        assert variants(some, name) == whole[4:7]
        other = dataclasses.replace(made, config=dataclasses.replace(made.config, seed=1))
        assert variants(other, name) != whole == variants(made, name)
    assert generator("a", 0, "x").random() != generator("b", 0, "x").random()


def test_tasks_without_questions_are_skipped_and_the_others_run():
    made = study(questions(["", ""], [["one"], ["two", "three"]]))
    found = measure(made, list(ALL))
    others = {"localisation": "boxes", "joint": "boxes", "composition": "captions to choose from", "zero_shot": "labels"}
    others |= {"segmentation": "masks", "conditioned": "a model with text-conditioned pooling"}
    lacking = {name: "long captions" for name in ALL if name not in ("short", *others)}
    assert found["skipped"] == {**lacking, **others}
    assert "short" in found and "long" not in found


def test_joint_items_are_linked_as_in_loops(monkeypatch):
    draw = random.Random(3)
    long = [caption(draw) if row != 2 else "" for row in range(6)]
    regions = [(row, sentence) for row in (0, 1, 2, 4) for sentence in (sentences_of(long[row]) if long[row] else ["lost"])]
    made = study(questions(long, regions=regions), 2)
    found = measure(made, ["joint"])["joint"]
    assert (found["images"], found["regions"], found["texts"]) == (5, 3, 8)
    rows = tasks._TASKS["joint"][0]._regions(made)
    assert [regions[row][0] for row in rows] == [0, 1, 4], "one of each image that has a long caption"
    for model in MODELS:
        store = made.stores[model]
        items = [(row, store.vectors[row], long[row], row) for row in range(6) if long[row]]
        for row in rows:
            image, sentence = regions[row]
            items.append((image, store.vector(f"{image} (1, 2, 30, 40)"), sentence, None))
        assert len({text for _, _, text, _ in items}) == len(items)
        precisions = {"image_to_text": [], "text_to_image": []}
        for mine, (image, vector, text, _) in enumerate(items):
            relevant = {other for other, item in enumerate(items) if item[0] == image}
            for way, scores in (
                ("image_to_text", [np.dot(vector, store.vector(item[2])) for item in items]),
                ("text_to_image", [np.dot(store.vector(text), item[1]) for item in items]),
            ):
                order = sorted(range(len(items)), key=lambda item, scores=scores: -scores[item])[:10]
                hits = [place for place, item in enumerate(order, 1) if item in relevant]
                precisions[way].append(sum(count / place for count, place in enumerate(hits, 1)) / len(relevant))
            assert mine in relevant
        for way, values in precisions.items():
            assert found[model][way]["mAP@10"] == pytest.approx(100 * np.mean(values))
    for way in ("image_to_text", "text_to_image"):
        change = found["difference"][way]["mAP@10"]
        assert change["value"] == pytest.approx(found["finetuned"][way]["mAP@10"] - found["base"][way]["mAP@10"])


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return embedding.questions(with_masks(with_choices(write_squares(tmp_path_factory.mktemp("images")))), "test")


def real(squares, settings_of, folder=None):
    clips = {"base": Recording(tiny_clip(0, 77)), "finetuned": Recording(tiny_clip(1, 77))}
    clips["finetuned"].add_pooling(2)
    stores = {model: FeatureStore(folder, clip, CPU, 8) for model, clip in clips.items()}
    return Study(squares, stores, settings_of), clips


def test_localisation_agrees_with_loops(squares, made):
    asked, _ = real(squares, made.config)
    found = measure(asked, ["localisation"])["localisation"]
    regions = squares.regions
    assert (found["sentences"], found["images"], found["patches"], found["boxes"]) == (8, 4, 16, "truth")
    with torch.inference_mode():
        for model, seed in (("base", 0), ("finetuned", 1)):
            clip, ranks, shares = tiny_clip(seed, 77), [], []
            for sentence, row, box in zip(regions.sentences, regions.images, regions.boxes, strict=True):
                image = open_image(squares.paths[row])
                view = clip.view(*image.size)
                encoded = clip(view.apply(image)[None], tokenize([sentence], 77)[0])
                similarity = (clip.project_image(encoded.image_tokens)[0] @ encoded.text_features[0]).tolist()
                x1, y1, x2, y2 = view.box(tuple(box))
                inside = {n for n in range(16) if x1 <= n % 4 * 16 + 8 < x2 and y1 <= n // 4 * 16 + 8 < y2}
                order = sorted(range(16), key=lambda n, similarity=similarity: -similarity[n])
                ranks.append(next((rank for rank, n in enumerate(order, 1) if n in inside), 17))
                shares.append(len(inside) / 16)
            for k in (1, 3):
                assert found[model][f"hit@{k}"] == pytest.approx(100 * np.mean([rank <= k for rank in ranks]))
            assert found["without_centre"][model] == shares.count(0)
            chance = found["chance" if model == "finetuned" else "chance_of_base"]
            assert chance["hit@1"] == pytest.approx(100 * np.mean(shares))


def without_times(found):
    asked = {name: {**block, "seconds_per_query": 0} for name, block in found["conditioned"].items()}
    return {**found, "seconds": 0, "conditioned": asked}


def test_everything_is_embedded_once_over_all_tasks(squares, made):
    """Every text, and every image and crop, in exactly one forward pass of each model."""
    asked, clips = real(squares, dataclasses.replace(made.config, truncation=[20]))
    found = measure(asked, list(ALL))
    assert not found["skipped"] and all(np.isfinite(value) for value in flatten(found).values())
    wanted = {}
    for name in ALL:
        for text, tokens in tasks._TASKS[name][0].needs(asked).texts:
            ids = tokenize([text], tokens or 77)[0][0]
            wanted[tuple(ids[: int(ids.argmax()) + 1].tolist())] = text
    for sentence in squares.regions.sentences:
        ids = tokenize([sentence], 77)[0][0]
        wanted[tuple(ids[: int(ids.argmax()) + 1].tolist())] = sentence
    for clip in clips.values():
        assert len(clip.texts) == len(set(clip.texts))
        assert set(clip.texts) == set(wanted)
        assert len(clip.images) == len(set(clip.images)) == 6 + 4 + 1, (
            "the images, a crop of each that has a box, and one to choose"
        )
    before = [(len(clip.texts), len(clip.images)) for clip in clips.values()]
    assert without_times(measure(asked, list(reversed(ALL)))) == without_times(found)
    assert [(len(clip.texts), len(clip.images)) for clip in clips.values()] == before


def test_another_run_over_the_same_store_finds_the_same(squares, made, tmp_path):
    cold, _ = real(squares, made.config, tmp_path)
    first = measure(cold, list(ALL))
    warm, clips = real(squares, made.config, tmp_path)
    second = measure(warm, list(ALL))
    assert without_times(first) == without_times(second)
    assert second["seconds"] == {"base": 0.0, "finetuned": 0.0}
    assert not any(clip.images or clip.texts for clip in clips.values())


def test_a_task_that_asks_nothing_says_what_is_wanting():
    with pytest.raises(NotAsked, match="short captions"):
        tasks._TASKS["short"][0].needs(study(questions(["A b. C d."])))
