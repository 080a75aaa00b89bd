"""The configuration: groups compose, params.yaml is the demo's composition, wrong keys and values are named in full."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from fast_goal.config import Params, build, load_params
from fast_goal.configure import CONF, check, compose, configure, groups
from fast_goal.errors import ConfigError

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def demo() -> dict:
    return compose()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_checks(experiment: str):
    overrides = [f"experiment={experiment}"]
    if experiment.startswith("own_photos"):
        overrides.append("download.datasets.photos.root=photos")
    if experiment == "glit":
        overrides.append("download.datasets.glit.root=photos")
    params = check(compose(overrides))
    assert params.experiment == experiment


@pytest.mark.parametrize("group", [name for name in groups() if name not in ("experiment", "dataset", "download")])
def test_every_option_of_every_group_composes(group: str):
    needed = {
        "intermediate=before": ["intermediate.dataset=scenes"],
        "objective=hard_negatives": ["finetune.pairs=all", "flism.top_k=3"],
        **{f"objective={name}": ["negatives=rules"] for name in ("degla", "negclip", "fast_goal_degla")},
    }
    for option in groups()[group]:
        choice = f"{group}={option}"
        check(compose([choice, *needed.get(choice, [])]))


def test_committed_params_are_the_composed_demo(demo: dict):
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == demo, "run `fast-goal configure`"


def test_configure_writes_what_load_params_reads(tmp_path: Path):
    written = configure(["finetune.epochs=3", "seed=7"], tmp_path / "params.yaml")
    read = load_params(tmp_path / "params.yaml")
    assert read == written
    assert (read.finetune.epochs, read.seed) == (3, 7)


def test_an_invalid_configuration_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text("before")
    with pytest.raises(ConfigError):
        configure(["finetune.epochs=0"], path)
    assert path.read_text() == "before"


def changed(values: dict, key: str, value: object) -> dict:
    values = deepcopy(values)
    place = values
    *parents, last = key.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("finetune.epochs", 0, "finetune.epochs = 0: expected at least 1"),
        ("finetune.epochs", "three", "finetune.epochs = 'three': expected int"),
        ("finetune.epochs", True, "finetune.epochs = True: expected int"),
        ("finetune.learning_rate", 0.0, "finetune.learning_rate = 0.0: expected more than 0"),
        ("finetune.learning_rate", float("nan"), "finetune.learning_rate = nan"),
        ("finetune.gradient_clip", -1.0, "finetune.gradient_clip = -1.0: expected null"),
        ("finetune.betas", [0.9], "finetune.betas = [0.9]: expected two numbers from 0 to below 1"),
        ("finetune.betas", [0.9, 1.0], "finetune.betas = [0.9, 1.0]: expected two numbers from 0 to below 1"),
        ("finetune.betas", [-0.1, 0.9], "finetune.betas[0] = -0.1: expected at least 0"),
        ("intermediate.training.adam_epsilon", 0.0, "intermediate.training.adam_epsilon = 0.0: expected more than 0"),
        ("flism.splits", [], "objective.name = 'fast_goal' needs local pairs, but flism.splits = []"),
        ("finetune.accumulate", 99, "finetune.accumulate = 99: a batch of batch_size = 64"),
        ("intermediate.training.ema", 1.0, "intermediate.training.ema = 1.0: expected null"),
        ("intermediate.training.epochs", 0, "intermediate.training.epochs = 0: expected at least 1"),
        ("intermediate.objective.weights", {"globl": 1.0}, "intermediate.objective.weights.globl = 1.0: unknown term"),
        ("intermediate.objective.name", "goal", "intermediate.objective.name = 'goal': expected one of"),
        ("intermediate.dataset", "docci", "intermediate.dataset = 'docci': not among download.datasets: ['scenes']"),
        ("flism.merge_iou", 2.0, "flism.merge_iou = 2.0: expected null"),
        ("finetune.epoch", 3, "unknown key finetune.epoch = 3. Did you mean finetune.epochs?"),
        ("base.scratch.widht", 3, "unknown key base.scratch.widht"),
        ("flism.confidence", 1.5, "flism.confidence = 1.5: expected at most 1"),
        ("flism.regions", "all", "flism.regions = 'all': expected one of"),
        ("download.train_dataset", "docci", "download.train_dataset = 'docci' is not one of download.datasets: ['scenes']"),
        ("download.datasets.scenes.source", "scene", "download.datasets.scenes.source"),
        ("download.datasets.scenes.train", -5, "download.datasets.scenes.train = -5"),
        ("download.datasets.scenes.trian", 5, "download.datasets.scenes.trian"),
        ("objective.weights", {"globl": 1.0}, "objective.weights.globl"),
        ("evaluate.ks", [1, "five"], "evaluate.ks[1] = 'five'"),
        ("base.keep_positions", 77, "base.keep_positions = 77: expected at most 75"),
        ("validate.expected_counts", {"trian": 5}, "validate.expected_counts = 'trian': expected one of"),
        ("evaluate.ks", [1, 0], "evaluate.ks[1] = 0: expected at least 1"),
        ("evaluate.split", "tset", "evaluate.split = 'tset': expected one of"),
        ("evaluate.datasets", ["scenes", "docci"], "evaluate.datasets = ['docci']: not among download.datasets: ['scenes']"),
        ("flism.splits", ["train", "trian"], "flism.splits[1] = 'trian': expected one of"),
        ("evaluate.conditioned_on", ["long", "long"], "evaluate.conditioned_on = ['long', 'long']: names 'long' twice"),
        ("negatives.types", [], "negatives.types = []: expected some of reshuffle"),
        ("negatives.types", ["swap_nouns", "swap_nouns"], "names 'swap_nouns' twice"),
        ("seed", None, "seed = None"),
        ("nonsense", 1, "unknown key nonsense"),
    ],
)
def test_a_wrong_value_is_named_with_its_full_key(demo: dict, key: str, value: object, message: str):
    with pytest.raises(ConfigError) as error:
        check(changed(demo, key, value))
    assert message in str(error.value)


def test_regions_of_a_detector_that_is_not_there_are_refused(demo: dict):
    with pytest.raises(ConfigError, match=r"flism\.regions = 'detector' needs a detector"):
        check(changed(changed(demo, "flism.regions", "detector"), "base.detector.kind", "none"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=hard_negatives"], "objective.in_image_negatives = 0.5 needs several pairs of an image, but "
         "finetune.pairs = 'best' and flism.top_k = 1: set finetune.pairs=all and flism.top_k=3, or objective.in_image_"),
        (["objective=hard_negatives", "finetune.pairs=all"], "but flism.top_k = 1: set finetune.pairs=all"),
        (["objective=hard_negatives", "flism.top_k=2"], "but finetune.pairs = 'best': set finetune.pairs=all"),
        (
            ["intermediate=before", "intermediate.dataset=scenes", "objective@intermediate.objective=hard_negatives"],
            "intermediate.objective.in_image_negatives = 0.5 needs several pairs of an image, but intermediate.training.pairs",
        ),
        (
            ["objective=fast_goal_degla", "negatives=rules", "objective.parts.fast_goal.objective.in_image_negatives=0.5"],
            "objective.parts.fast_goal.objective.in_image_negatives = 0.5 needs several pairs of an image, but finetune.pairs",
        ),
    ],
)  # fmt: skip
def test_in_image_negatives_need_several_pairs(overrides: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        check(compose(overrides))
    assert message in str(error.value)


def test_the_objective_of_a_first_stage_that_is_not_there_is_not_looked_at_closely():
    check(compose(["objective@intermediate.objective=hard_negatives"]))


def test_of_several_data_sets_the_photographs_that_are_trained_on_are_watched():
    overrides = ["experiment=own_photos", "download.datasets.photos.root=mine/photos", "dataset=[folder,docci]"]
    with pytest.raises(ConfigError, match=r"download\.watch = 'src/fast_goal/data/sources' does not hold 'mine/photos'.*Add"):
        check(compose([*overrides, "download.train_dataset=photos"]))
    for watch in ("mine/photos", "mine"):
        check(compose([*overrides, "download.train_dataset=photos", f"download.watch={watch}"]))


def test_a_part_without_weight_is_not_looked_at_closely():
    part = "objective.parts.fast_goal"
    overrides = ["objective=fast_goal_degla", "negatives=rules", f"{part}.objective.in_image_negatives=0.5", f"{part}.weight=0"]
    check(compose(overrides))


@pytest.mark.parametrize("parts", [None, 3, {"a": None}, {"a": {"weight": 1.0, "objective": 3}}])
def test_parts_that_are_none_are_said_by_the_objective(demo: dict, parts: object):
    with pytest.raises(ConfigError, match=r"objective\.parts"):
        check(changed(demo, "objective", {"name": "weighted", "parts": parts}))


def test_a_first_stage_needs_its_data_set():
    with pytest.raises(ConfigError, match=r"intermediate\.dataset has no default"):
        compose(["intermediate=before"])


def test_the_data_sets_that_are_trained_on():
    def names(*overrides: str) -> list[str]:
        return check(compose(overrides)).training_datasets

    assert names() == names("experiment=demo_hard_negatives") == ["scenes"]
    assert names("experiment=demo_two_stages") == ["scenes", "earlier_scenes"]


def test_a_missing_key_is_named(demo: dict):
    values = deepcopy(demo)
    del values["finetune"]["epochs"]
    with pytest.raises(ConfigError, match=r"missing key finetune\.epochs"):
        build(Params, values, "params.yaml")


def test_numbers_that_yaml_reads_as_text_are_numbers(demo: dict):
    values = changed(demo, "finetune.learning_rate", yaml.safe_load("5e-6"))
    assert build(Params, values, "params.yaml").finetune.learning_rate == 5e-6


def test_unknown_override_names_the_key():
    with pytest.raises(ConfigError, match=r"finetune\.epocs"):
        compose(["finetune.epocs=3"])


def test_a_value_that_must_be_given_is_asked_for_with_the_command():
    with pytest.raises(ConfigError, match=r"fast-goal configure experiment=own_photos download\.datasets\.photos\.root=VALUE"):
        compose(["experiment=own_photos"])


def test_missing_params_file_says_how_to_write_it(tmp_path: Path):
    with pytest.raises(ConfigError, match="fast-goal configure"):
        load_params(tmp_path / "params.yaml")
