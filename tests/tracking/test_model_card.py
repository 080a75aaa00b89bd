from fast_goal.config import Params, build
from fast_goal.configure import compose
from fast_goal.tracking.model_card import comparisons, metrics_table, model_card

INTERVAL = {"value": 2.0, "low": 1.0, "high": 3.0}
METRICS = {
    "seconds": 3.0,
    "scenes": {
        "long": {
            "images": 8,
            "base": {"text_to_image": {"R@1": 10.0, "R@5": 20.0, "tied": 0.0}},
            "finetuned": {"text_to_image": {"R@1": 12.0, "R@5": 19.0, "tied": 0.0}},
            "difference": {"text_to_image": {"R@1": INTERVAL, "R@5": {"value": -1.0, "low": -2.0, "high": 0.0}}},
            "chance": {"text_to_image": {"R@1": 0.5, "R@5": 2.5}},
            "slices": {
                "up to 77": {"base": {"R@1": 1.0}, "finetuned": {"R@1": 3.0}, "difference": {"R@1": INTERVAL}},
            },
        },
        "localisation": {"base": {"hit@1": 15.0}, "finetuned": {"hit@1": 17.0}, "difference": {"hit@1": INTERVAL}},
    },
}


def test_comparisons_are_found_wherever_they_stand():
    found = {row.name: row for row in comparisons(METRICS)}
    assert list(found) == [
        "scenes · long · text → image · R@1",
        "scenes · long · text → image · R@5",
        "scenes · long · slices · up to 77 · R@1",
        "scenes · localisation · hit@1",
    ]
    row = found["scenes · long · text → image · R@5"]
    assert (row.base, row.finetuned, row.difference, row.low, row.high, row.chance) == (20.0, 19.0, -1.0, -2.0, 0.0, 2.5)
    assert found["scenes · localisation · hit@1"].chance is None


def test_table():
    lines = metrics_table(METRICS).splitlines()
    assert lines[2] == "| scenes · long · text → image · R@1 | 10.0 | 12.0 | +2.0 | +1.0 to +3.0 | 0.5 |"
    assert lines[3].startswith("| scenes · long · text → image · R@5 | 20.0 | 19.0 | -1.0 |")
    assert len(lines) == 5, "without the slices"
    assert metrics_table({}) == "No metrics compare the two models."


def test_of_the_other_tasks_the_table_has_what_they_come_down_to():
    block = METRICS["scenes"]["long"]
    drop = {"base": {"R@1": 9.0}, "finetuned": {"R@1": 7.0}, "difference": {"R@1": INTERVAL}}
    joint = {part: {"text_to_image": {"mAP@10": 5.0}} for part in ("base", "finetuned")}
    more = {
        "robustness": {**block, "drop": drop, "slices_by_objects": block["slices"]},
        "truncation": {"77": block},
        "joint": {**joint, "difference": {"text_to_image": {"mAP@10": INTERVAL}}},
    }
    lines = metrics_table({"scenes": {**METRICS["scenes"], **more}}).splitlines()
    assert [line.split(" |")[0] for line in lines[5:]] == [
        "| scenes · robustness · drop · R@1",
        "| scenes · joint · text → image · mAP@10",
    ]


def test_card_says_what_matters(params):
    info = {"name": "scenes", "source": "scenes", "images": 30, "splits": {"train": 20, "val": 0, "test": 10}, "digest": "abc"}
    card = model_card(params, [info], METRICS, {"git_commit": "1234567"})
    for text in (
        "models:/fast-goal@candidate",
        "30 images (train 20, test 10), digest `abc`",
        "+1.0 to +3.0",
        "The base is weak",
        "fast_goal",
        "* git_commit: `1234567`",
        "## Limits",
        "## Licence",
    ):
        assert text in card


def test_card_names_a_first_stage():
    values = compose(["experiment=demo_two_stages", "intermediate.training.epochs=3"])
    info = {"name": "earlier_scenes", "source": "scenes", "images": 20, "splits": {"train": 20}, "digest": "def"}
    card = model_card(build(Params, values, "params.yaml"), [info], METRICS, {})
    first, then = card.index("first on `earlier_scenes` with the objective `fast_goal`"), card.index("; then on `scenes` with")
    assert first < card.index("for 3 epochs") < then < card.index("for 5 epochs")
    assert "`earlier_scenes` (training; source `scenes`)" in card


def test_card_names_the_parts_of_a_sum_and_the_hard_negatives():
    def card(*overrides: str) -> str:
        return model_card(build(Params, compose([*overrides]), "params.yaml"), [], METRICS, {})

    text = card("experiment=demo_degla", "objective=fast_goal_degla", "objective.parts.degla.weight=0.5")
    assert "`weighted` (1 fast_goal (global 0, local 0.5, tsl_image 1, tsl_text 1); 0.5 degla (global 1, igc 0.1, tgc" in text
    assert "Hard negatives of the long captions: generator `rules`, at most 2 for each." in text
    assert "`degla` (global 1, igc 0.1, tgc 0.1, distillation 0.005)" in card("experiment=demo_degla")
    assert "Hard negatives" not in card() and "found by FLISM (regions: both, best 1 per image)." in card()
    assert "FLISM" not in card("experiment=demo_degla", "flism.splits=[]").split("## Data")[0]


def test_card_says_how_to_ask_a_pooling():
    params = build(Params, compose(["experiment=demo_flair"]), "params.yaml")
    card = model_card(params, [], METRICS, {}, heads=8)
    for text in (
        "## Text-conditioned pooling",
        "a pooling of 8 heads (FLAIR, `pooling.safetensors`)",
        'params={"output": "scores", "mode": "conditioned"}',
        "`rerank`: `conditioned` only for the best `top_k` (128)",
        "with the objective `flair` (tcs 0.5, mps 0.5)",
        "8 sub-captions of each caption and epoch, of 1 to 3 sentences, 50 % of them in a row.",
    ):
        assert text in card
    plain = model_card(build(Params, compose(["experiment=demo"]), "params.yaml"), [], METRICS, {})
    assert "pooling" not in plain and "sub-captions" not in plain
