"""`fast-goal ablate`, with a queue that answers at once; and DVC's real one, in a repository of one trivial step (slow)."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fast_goal import environment
from fast_goal.ablations import plan, results, runner, study, tables
from fast_goal.ablations.queue import Queue, Status
from fast_goal.configure import check, compose
from fast_goal.errors import ConfigError, FastGoalError

WAYS = ("text_to_image", "image_to_text")


def report(values, seed):
    """What `evaluate` would say of a model whose quality follows from its objective and the seed."""
    local = values["objective"]["weights"]["local"]
    quality = {"base": 20.0 + seed, "finetuned": 50.0 + seed + 10 * local + values["finetune"]["epochs"] / 10}
    recall = {model: {way: {f"R@{k}": quality[model] + k for k in (1, 5, 25, 50)} for way in WAYS} for model in quality}
    made = {"images": 8, "captions": 8, **recall}
    hits = {model: {f"hit@{k}": quality[model] for k in (1, 5, 10, 15)} for model in quality}
    chance = {f"hit@{k}": 14.0 for k in (1, 5, 10, 15)}
    drop = {"drop": {model: {"R@1": 3.0} for model in quality}}
    scenes = {"long": made, "sentence_average": made, "robustness": {**made, **drop}}
    return {"scenes": {**scenes, "localisation": {"images": 8, **hits, "chance": chance}}, "seconds": 1.0}


class FakeQueue:
    """A queue whose experiments end when somebody looks at it. `broken`: names (as expressions) that fail."""

    def __init__(self, root, broken="(?!)", stops=None):
        self.root, self.broken, self.stops = root, re.compile(broken), stops
        self.done, self.tasks, self.asked, self.dropped = {}, {}, {}, []
        self.workers = self.starts = 0
        (root / "params.yaml").write_text(yaml.safe_dump(compose()))

    def git(self, *arguments):
        if arguments[0] == "show":
            return "stages: {a: {deps: [src/x.py, data/y]}}"
        return "" if arguments[0] == "status" else "abc\n"

    def finished(self):
        return {name: f"commit of {name}" for name in self.done}

    def add(self, name, settings):
        assert name not in self.tasks or self.tasks[name] == "Failed"
        self.tasks[name], self.asked[name] = "Queued", settings
        if self.stops == name:
            raise KeyboardInterrupt

    def start(self, jobs):
        self.starts += 1
        self.workers = jobs

    def status(self):
        waiting = [name for name, state in self.tasks.items() if state == "Queued"]
        if self.workers and waiting:
            name = waiting[0]
            if self.broken.search(name):
                self.tasks[name] = "Failed"
            else:
                values = applied(yaml.safe_load((self.root / "params.yaml").read_text()), self.asked[name])
                self.done[name], self.tasks[name] = values, "Success"
        if not any(state == "Queued" for state in self.tasks.values()):
            self.workers = 0
        return Status(dict(self.tasks), self.workers)

    def step(self, name):
        return "finetune"

    def reason(self, name):
        return "the disk is on fire"

    def drop(self, names):
        self.dropped += names
        for name in names:
            self.tasks.pop(name, None)

    def file(self, commit, path):
        values = self.done[commit.removeprefix("commit of ")]
        if path == "params.yaml":
            return yaml.safe_dump(values)
        if path == study.FINETUNE:
            steps = 10 * values["finetune"]["epochs"]
            cost = 0.3 if values["objective"]["weights"]["tsl_image"] else 0.2
            waited = 60.0 * values["seed"]  # for other work on the machine
            return json.dumps({"steps": steps, "training_seconds": cost * steps + waited, "step_seconds": cost})
        return json.dumps(report(values, values["seed"]))


def applied(values, settings):
    """params.yaml as `dvc exp run -S` leaves it, by Hydra's own parser."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    made = OmegaConf.create(values)
    OmegaConf.set_struct(made, True)
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(settings)), made)
    return OmegaConf.to_container(made)


def make(queue, *words, said=None):
    return study.Study(study.parse(words), queue, say=(said if said is not None else []).append, poll=0)


@pytest.mark.parametrize("name", ["V", "VI", "VII", "VIII", "XIV", "XV", "XVI", "XVII", "degla", "flair"])
def test_every_arm_of_every_table_composes_and_is_reached_by_settings(name, tmp_path):
    table, start = tables.load(name), compose()
    for arm in table.arms:
        run = plan.make_run(arm, 1, plan.overrides_of(table, arm, table.experiment), "code", tmp_path)
        assert run.values["seed"] == 1
        reached = applied(copy.deepcopy(start), plan.settings(run.values, start))
        assert plan.canonical(reached) == plan.canonical(run.values)
        assert re.fullmatch(r"[\w-]+", run.name)
        back = applied(copy.deepcopy(run.values), plan.settings(start, run.values))
        assert plan.canonical(back) == plan.canonical(start)


def test_the_tables_are_those_of_the_paper_and_then_our_own():
    assert tables.names() == ["V", "VI", "VII", "VIII", "XIV", "XV", "XVI", "XVII", "degla", "flair"]
    for name in tables.names():
        labels = [column.label for column in tables.load(name).columns]
        assert all(re.fullmatch(r"[\w .@-]+", label) for label in labels), "they become names of metrics in MLflow"
    with pytest.raises(ConfigError, match=r"table = 'IX': expected one of V, VI"):
        tables.load("IX")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"A b": {"label": "x"}}, "rows": []}, "small letters"),
        ({"arms": {"a": {"label": "x", "colour": 1}}}, "unknown key"),
        ({"arms": {"a": {"label": "x", "like": "b"}}}, "a.like = 'b'"),
        ({"arms": {"a": {"label": "x", "equal_compute": "b"}, "b": {"label": "y"}}}, "a.like is missing"),
        ({"rows": [{"label": "x", "arm": "c"}]}, "arm 'c'"),
        ({"reference": "nobody"}, "no such row"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tmp_path, change, message):
    values = {"title": "t", "about": "a", "arms": {"a": {"label": "x"}}, "columns": {"c": "long/R@1"}, **change}
    (tmp_path / "T.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        tables.load("T", tmp_path)


@pytest.mark.parametrize(
    "value", ["it's", 'a "b"', "c=d,e", "back\\slash", "end\\", "a\\'b", "", "null", "5", 5, 1e-9, True, None, [1, "x, y"], {}]
)
def test_values_survive_the_grammar_of_overrides(value):
    assert applied({"key": "before"}, [f"key={plan.literal(value)}"]) == {"key": value}


def test_settings_add_change_and_remove():
    before = {"a": {"b": 1, "c": [1]}, "gone": 2, "kind": {"x": 1}, "rate": "5e-06", "nothing": None, "unset": None}
    after = {"a": {"b": 1, "c": [2, 3], "new": {"d": "e f"}}, "kind": 3, "rate": 5e-06, "unset": {"x": None}}
    changes = list(plan.settings(after, before))
    assert changes[:2] == ["a.c=[2, 3]", "+a.new={d: 'e f'}"] and "~gone" in changes
    assert not any(change.startswith(("rate", "a.b")) for change in changes)
    assert plan.canonical(applied(before, changes)) == plan.canonical(after)


def test_files_outside_of_git_are_named_in_full(tmp_path):
    (tmp_path / "photos").mkdir()
    values = compose(["experiment=own_photos", "download.datasets.photos.root=photos"])
    made = plan.outside(values, tmp_path)
    assert made["download"]["datasets"]["photos"]["root"] == str(tmp_path / "photos")
    assert made["download"]["watch"] == str(tmp_path / "photos")
    assert plan.outside(compose(), tmp_path) == compose()
    assert plan.outside({"model": "local-dir:photos"}, tmp_path) == {"model": f"local-dir:{tmp_path / 'photos'}"}
    assert plan.outside({"root": "nowhere"}, tmp_path) == {"root": "nowhere"}


def test_a_whole_table(tmp_path):
    said = []
    queue = FakeQueue(tmp_path)
    folder = make(queue, "table=VI", "seeds=[0,1]", said=said).run()
    assert len(queue.done) == 14 and queue.starts == 2, "a second time for the runs that waited for the first ones"
    order = [name.rsplit("-", 1)[0] for name in queue.done]
    rest = ("local", "global_local", "fast_goal", "wrong_region", "true_region")
    assert order[:7] == ["global-s0", "global-s1", *(f"{arm}-s0" for arm in rest)], "one run of each seed makes its base"
    timed = [values for name, values in queue.done.items() if name.startswith("global_equal_compute")]
    assert [values["finetune"]["epochs"] for values in timed] == [8, 8], "5 epochs at 0.3 s a step, in steps of 0.2 s"
    assert [values["objective"]["weights"]["local"] for values in timed] == [0, 0]
    assert timed[0]["finetune"]["learning_rate"] == 5e-4, "as the arm global"
    text = (folder / "table.md").read_text()
    # seeds 0 and 1: mean 50.5 + 5 epochs / 10 + R@1's 1, and half of the square root of 2
    assert "| global | 52.0 ± 0.7 |" in text
    assert "| base | 21.5 ± 0.7 |" in text
    assert "| global + local + TSL (FAST-GOAL) | +5.0 ± 0.0 |" in text, "minus the row global, seed by seed"
    assert "Equal compute: epochs 8 (seed 0), 8 (seed 1)" in text
    assert "no number in the paper: it measures DOCCI" in text
    assert "short T2I" not in text, "what no report has is no column"
    lines = (folder / "table.csv").read_text().splitlines()
    assert lines[0].startswith("table,dataset,row,column,mean,sd")
    assert any(line.startswith("VI,scenes,global,long T2I R@1,52,0.707107,0 1,51.5 52.5,,") for line in lines)
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    assert any("12/12" not in line and "left" in line and "about" in line for line in said)


def test_nothing_is_run_twice(tmp_path):
    queue = FakeQueue(tmp_path)
    make(queue, "table=VII", "seeds=[0]").run()
    first, queue.asked = dict(queue.asked), {}
    said = []
    make(queue, "table=VII", "seeds=[0,1]", said=said).run()
    assert not set(first) & set(queue.asked) and all("-s1-" in name for name in queue.asked)
    assert "3 of 6 runs are finished already" in said[0]
    # another table with the same run, and params.yaml that differs meanwhile
    queue.asked = {}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(compose(["finetune.epochs=9", "seed=4"])))
    make(queue, "table=VIII", "seeds=[0]").run()
    assert {name.split("-")[0] for name in queue.asked} == {"uniform", "similarity"}, "the best pair is the arm both of VII"
    assert all(values["finetune"]["epochs"] == 5 for values in queue.done.values()), "params.yaml does not matter"


def test_a_failed_run_is_named_and_tried_again(tmp_path):
    queue = FakeQueue(tmp_path, broken="spatial")
    with pytest.raises(FastGoalError, match=r"1 runs failed.*\n  spatial-s0-\w+: the disk is on fire"):
        make(queue, "table=VII", "seeds=[0]").run()
    text = (tmp_path / "models/ablations/VII/table.md").read_text()
    assert re.search(r"- spatial-s0-\w+ failed: the disk is on fire", text) and "| spatial only | – |" in text
    queue.broken = re.compile("(?!)")
    make(queue, "table=VII", "seeds=[0]").run()
    assert len(queue.done) == 3 and queue.dropped[0].startswith("spatial")


def test_a_run_that_another_needs_fails(tmp_path):
    queue = FakeQueue(tmp_path, broken="fast_goal-s0")
    with pytest.raises(FastGoalError, match="1 runs failed"):
        make(queue, "table=VI", "seeds=[0]", "arms=[global_equal_compute]").run()
    text = (tmp_path / "models/ablations/VI/table.md").read_text()
    assert "- global_equal_compute, seed 0: global and fast_goal have to be run first" in text


def test_after_an_interrupt_the_queue_is_empty_and_the_next_call_goes_on(tmp_path):
    queue = FakeQueue(tmp_path)
    names = [run.name for run in make(queue, "table=VII", "seeds=[0]")._first()]
    queue.stops = names[1]
    before = (tmp_path / "params.yaml").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        make(queue, "table=VII", "seeds=[0]").run()
    assert set(queue.dropped) == set(names) and not queue.tasks
    assert (tmp_path / "params.yaml").read_bytes() == before
    assert not (tmp_path / runner.BACKUP).exists()
    queue.stops = None
    make(queue, "table=VII", "seeds=[0]").run()
    assert len(queue.done) == 3


def test_a_run_that_a_killed_worker_left_begins_anew(tmp_path):
    queue = FakeQueue(tmp_path)
    (name, *_) = [run.name for run in make(queue, "table=VII", "seeds=[0]", "arms=[both]")._first()]
    queue.tasks[name] = "Running"
    make(queue, "table=VII", "seeds=[0]", "arms=[both]").run()
    assert queue.dropped == [name] and name in queue.done


def test_one_of_two_workers_that_died_is_replaced_and_the_other_is_let_work(tmp_path):
    class OneDies(FakeQueue):
        def start(self, jobs):
            super().start(jobs)
            self.workers = 1 if self.starts == 1 else jobs

    queue = OneDies(tmp_path)
    asked = study.parse(["table=VII", "seeds=[0,1]"])
    study.Study(asked, queue, jobs=2, say=[].append, poll=0).run()
    assert len(queue.done) == 6 and queue.starts == 2 and not queue.dropped


def test_living_workers_are_counted_by_their_processes(tmp_path):
    folder = tmp_path / ".dvc/tmp/exps/celery"
    folder.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number, (pid, code) in enumerate([(os.getpid(), None), (os.getpid(), 0), (ended.pid, None)], 1):
        (folder / f"dvc-exp-worker-{number}.json").write_text(json.dumps({"pid": pid, "returncode": code}))
    (folder / "dvc-exp-worker-4.json").write_text("{")
    assert Queue(tmp_path)._living_workers() == 1


def test_an_experiment_with_other_parameters_is_not_believed(tmp_path):
    queue = FakeQueue(tmp_path)
    asked = make(queue, "table=VII", "seeds=[0]", "arms=[both]")
    (run,) = asked._first()
    queue.done[run.name] = {**run.values, "seed": 3}
    with pytest.raises(FastGoalError, match=r"not what was asked for: it lacks seed=0"):
        asked.run()


def test_params_yaml_comes_back_whatever_dvc_does_to_it(tmp_path):
    queue = FakeQueue(tmp_path)
    path, add = tmp_path / "params.yaml", queue.add
    path.write_text("# mine\n" + path.read_text())
    before = path.read_bytes()

    def rough(name, settings):
        assert (tmp_path / runner.BACKUP).read_bytes() == before
        add(name, settings)
        path.unlink()

    queue.add = rough
    make(queue, "table=VII", "seeds=[0]").run()
    assert path.read_bytes() == before
    # killed in that moment
    (tmp_path / runner.BACKUP).write_bytes(before)
    study.check_project(queue)
    (tmp_path / runner.BACKUP).write_bytes(b"seed: 7")
    with pytest.raises(ConfigError, match=r"mv .*params\.before_ablation\.yaml"):
        study.check_project(queue)


def test_uncommitted_code_is_refused(tmp_path):
    queue = FakeQueue(tmp_path)
    queue.git = lambda *arguments: " M src/fast_goal/cli.py\n?? src/new.py\n"
    with pytest.raises(ConfigError, match=r"src/fast_goal/cli\.py, src/new\.py.*git commit"):
        study.check_project(queue)
    (tmp_path / "params.yaml").unlink()
    with pytest.raises(ConfigError, match="fast-goal configure"):
        study.check_project(queue)


def test_the_preview_runs_nothing(tmp_path):
    queue = FakeQueue(tmp_path)
    text = "\n".join(make(queue, "table=VI", "seeds=[0]", "experiment=paper_docci").preview())
    assert "-S objective.weights.local=0.0" in text and "experiment=paper_docci" in text
    assert "global_equal_compute: as global, for as long as fast_goal takes" in text
    assert "true_region: not with experiment=paper_docci, only with demo" in text
    assert not queue.tasks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=[0]"], "table= is missing"),
        (["table=VI", "seeds=[a]"], "whole numbers"),
        (["table=VI", "seeds=[]"], "whole numbers"),
        (["table=VI", "arms=[nobody]"], "table VI has global, local"),
        (["table=VI", "seed=3"], r"seeds=\[0,1,2\]"),
        (["table=VI", "fast"], "KEY=VALUE"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(ConfigError, match=message):
        study.parse(words)


def test_rows_of_one_arm(tmp_path):
    """Tables XV to XVII are read from the report of one model."""
    queue = FakeQueue(tmp_path)
    text = (make(queue, "table=XVI", "seeds=[0]").run() / "table.md").read_text()
    assert "| chance | 14.0 | 14.0 |" in text and "| base | 20.0 |" in text
    text = (make(queue, "table=XVII", "seeds=[0]").run() / "table.md").read_text()
    assert re.search(r"\| FAST-GOAL \|.* 3\.0 \|", text)
    text = (make(queue, "table=XV", "seeds=[0]").run() / "table.md").read_text()
    assert "| base, averaged sentences | 21.0 |" in text


def test_the_paper_stands_beside_what_compares():
    """DOCCI with the paper's settings; and with another batch size, which is said."""
    made = {way: {f"R@{k}": 70.0 for k in (1, 5, 25, 50)} for way in WAYS}
    long = {"images": 5000, "captions": 5000, "base": made, "finetuned": made}
    for more, expected in (([], "| global | 70.0 (paper 76.02) |"), (["finetune.batch_size=32"], "batches of 32")):
        values = compose(["experiment=paper_docci", "objective=global", *more])
        run = results.Measured("global", 0, check(values), {"docci": {"long": long}}, {})
        text = results.markdown(results.gather(tables.load("VI"), [run], ["global"], [], []))
        assert expected in text


def test_hard_negatives_beside_their_parts(tmp_path):
    """Our own table: composition and zero-shot of each arm."""
    table = tables.load("degla")
    arms = ["global", "degla", "fast_goal_degla"]
    assert set(arms) < set(table.arms)
    groups = ("swap_colours", "swap_positions", "replace_shape", "add_object", "count")
    runs = []
    for place, arm in enumerate(arms):
        run = plan.make_run(arm, 0, plan.overrides_of(table, arm, "demo"), "code", tmp_path)
        assert (run.values["negatives"]["generator"] == "rules") == (arm != "global")
        right = {
            model: {"macro": share, "groups": {group: {"accuracy": share + 1} for group in groups}}
            for model, share in (("base", 50.0), ("finetuned", 60.0 + place))
        }
        shapes = {model: {"accuracy": values["macro"] + 20} for model, values in right.items()}
        task = {"composition": {"scenes_sentences": right, "scenes_captions": right}, "zero_shot": {"scenes_shapes": shapes}}
        runs.append(results.Measured(arm, 0, check(run.values), {"scenes": task}, {"training_seconds": 7.0}))
    result = results.gather(table, runs, arms, [], [])
    row = {label: cell.mean for label, cell in result.datasets["scenes"]["DeGLA"].items() if cell.values}
    expected = {"sentences right": 61.0, "long captions right": 61.0, "zero-shot shapes": 81.0, "training seconds": 7.0}
    kinds = [group.replace("_", " ") for group in groups]
    assert row == expected | dict.fromkeys([*kinds, *(f"long {kind}" for kind in kinds)], 62.0)
    text = results.markdown(result)
    assert "| FAST-GOAL and DeGLA | +12.0 |" in text and "Minus the row *base*" in text
    assert "no number in the paper" not in text, "there is none of scenes, and none is looked for in a table of this name"


def conditioned(recall):
    """What the task of that name says of long captions, R@1 by mode."""
    modes = {mode: {way: {"R@1": value} for way in WAYS} for mode, value in recall.items()}
    return {"long": {**modes, "seconds_per_query": {"global": 0.001, "conditioned": 0.003, "rerank": 0.002}}}


def test_flair_in_its_modes_beside_the_others(tmp_path):
    """Our own table: rows of one arm that differ in how its model is asked."""
    table = tables.load("flair")
    runs = []
    for place, arm in enumerate(table.arms):
        run = plan.make_run(arm, 0, plan.overrides_of(table, arm, "demo"), "code", tmp_path)
        assert run.values["objective"]["name"] == ("flair" if arm == "flair" else "fast_goal")
        plain = {model: {way: {"R@1": value} for way in WAYS} for model, value in (("base", 10.0), ("finetuned", 20.0 + place))}
        hits = {model: {"hit@1": 5.0 + place} for model in ("base", "finetuned")}
        scenes = {"long": plain, "localisation": hits}
        if arm == "flair":
            scenes["conditioned"] = conditioned({"global": 22.0, "conditioned": 30.0, "rerank": 29.0})
            hits["attention"] = {"hit@1": 45.0}
        runs.append(results.Measured(arm, 0, check(run.values), {"scenes": scenes}, {"training_seconds": 7.0}))
    result = results.gather(table, runs, list(table.arms), [], [])
    cells = {
        label: {column: cell.mean for column, cell in row.items() if cell.values}
        for label, row in result.datasets["scenes"].items()
    }
    assert [cells[label]["long T2I R@1"] for label in cells] == [10.0, 20.0, 21.0, 22.0, 30.0, 29.0]
    assert cells["FLAIR"]["best patch"] == 7.0 and "best patch" not in cells["FLAIR, rerank"]
    assert cells["FLAIR, conditioned"]["attention"] == 45.0
    assert cells["FLAIR, conditioned"]["ms per query"] == pytest.approx(3.0)
    assert "ms per query" not in cells["FAST-GOAL"] and cells["FLAIR"]["training seconds"] == 7.0
    assert "| FLAIR, conditioned | +20.0 |" in results.markdown(result)


def test_deglas_numbers_stand_beside_what_compares():
    """The arm with the paper's settings, on a suite of as many cases as the paper's; not on one that is shrunk."""
    arm = {"macro": 80.0, "accuracy": 81.0, "groups": {}}
    orders, crepe = {"cases": 25_000, "base": arm, "finetuned": arm}, {"cases": 70, "base": arm, "finetuned": arm}
    report = {"all": {"composition": {"coco_order": orders, "sugarcrepe": crepe}}}
    run = results.Measured("degla", 0, check(compose(["experiment=paper_degla"])), report, {})
    text = results.markdown(results.gather(tables.load("degla"), [run], ["degla"], [], []))
    assert "| base | 80.0 | 81.0 (paper 48.4) |" in text and "| DeGLA | 80.0 | 81.0 (paper 93.8) |" in text
    assert "its test has, as far as we know, 25,010 cases, ours 25,000" in text and "no number in the paper" not in text


def test_the_runs_stand_below_one(tmp_path, monkeypatch, empty_store):
    """Pipelines started with the group's environment are its children; those that ran elsewhere are told."""
    from mlflow.tracking.client import MlflowClient

    from fast_goal.tracking import identity, runs
    from fast_goal.tracking.groups import Group

    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    group = Group.open("ablation VI", {"table": "VI"})
    for name, value in {**group.environment, identity.DVC_EXPERIMENT_VARIABLE: "global-s0-x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(identity.PIPELINE_VARIABLE, "one")
    with runs.step_run("finetune", check(compose())):
        pass
    assert group.experiments() == {"global-s0-x"}
    queue = FakeQueue(tmp_path)
    folder = study.run_in(group, make(queue, "table=VII", "seeds=[0]"))
    names = group.experiments()
    assert names == {"global-s0-x", *queue.done}
    assert Group.open("ablation VI", {"table": "VI"}).run_id == group.run_id
    assert Group.open("ablation VI", {"table": "VII"}).run_id != group.run_id
    client = MlflowClient(uri)
    assert {file.path for file in client.list_artifacts(group.run_id)} == {path.name for path in folder.iterdir()}
    (child,) = client.search_runs([client.get_run(group.run_id).info.experiment_id], "tags.arm = 'both'")
    assert child.data.metrics["scenes.long_T2I_R1"] == pytest.approx(56.5)


def test_a_copy_of_the_project_shares_caches(tmp_path, monkeypatch):
    main, copied = tmp_path / "main/.fast_goal", tmp_path / "copy"
    copied.mkdir()
    monkeypatch.chdir(copied)
    environment.share_work()
    assert not (copied / ".fast_goal").exists()
    monkeypatch.setenv(environment.WORK_VARIABLE, str(main))
    monkeypatch.setenv(environment.WORK_SHARED_VARIABLE, "caches")
    environment.share_work()
    (copied / ".fast_goal/features/x").write_text("known")
    assert (main / "features/x").read_text() == "known" and not (copied / ".fast_goal/state").exists()
    monkeypatch.delenv(environment.WORK_SHARED_VARIABLE)
    environment.share_work()
    assert (copied / ".fast_goal/state").resolve() == (main / "state").resolve()
    monkeypatch.chdir(main.parent)
    environment.share_work()
    assert not any(path.is_symlink() for path in main.iterdir())


def test_what_dvc_prints_is_understood(tmp_path, monkeypatch):
    listed = (
        "Task     Name        Created    Status\n"
        "2c7c93b  one-s0-a    12:23 AM   Running\n"
        "f429731  two-s0-b    Nov 20, 2026  Queued\n"
        "620ccf7  three-s0-c  12:32 AM   Failed\n\nWorker status: 1 active, 2 idle\n"
    )
    logs = "Running stage 'base'\n> fast-goal base\nRunning stage 'finetune'\nfast-goal: DataError: no pairs\nERROR: failed\n"
    refs = "refs/exps/celery/stash 11\nrefs/exps/e8/193bf8/one-s0-a 22\nrefs/exps/exec/EXEC_HEAD 33\n"
    calls = []

    def answer(self, command):
        calls.append(command)
        words = " ".join(command)
        return listed if "queue status" in words else logs if "queue logs" in words else refs

    monkeypatch.setattr(Queue, "_run", answer)
    queue = Queue(tmp_path)
    assert queue.status() == Status({"one-s0-a": "Running", "two-s0-b": "Queued", "three-s0-c": "Failed"}, 3)
    assert queue.finished() == {"one-s0-a": "22"}
    assert queue.step("one-s0-a") == "finetune"
    assert queue.reason("three-s0-c") == "fast-goal: DataError: no pairs"
    calls.clear()
    killed = []

    def kill(self, command):
        if "kill" in command:
            killed.append(command[-1])
        return listed.replace("2c7c93b", "-") if killed and "status" in command else answer(self, command)

    monkeypatch.setattr(Queue, "_run", kill)
    queue.drop(["one-s0-a", "three-s0-c", "unknown"])
    assert killed == ["one-s0-a"]
    assert [command[3:] for command in calls if "remove" in command] == [["queue", "remove", "three-s0-c"]]
    queue.add("x", ["a=1", "+b={c: 2}"])
    expected = ["exp", "run", "--queue", "--name", "x", "-S", "a=1", "-S", "+b={c: 2}", "evaluate"]
    assert calls[-1][3:] == expected


@pytest.mark.slow
def test_dvc_itself(tmp_path):
    """A queue of two in DVC: one run and one that fails; the settings arrive, params.yaml stays as it is, uncommitted."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    command = "mkdir -p out && cp params.yaml out/copy && test ! -e stop.$(grep -c bad params.yaml)"
    pipeline = {"stages": {"evaluate": {"cmd": command, "params": ["a", "b"], "outs": ["out"]}}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    (tmp_path / "params.yaml").write_text("a: 1\nb: {c: x}\n")
    (tmp_path / "stop.1").touch()
    git("add", "-A")
    git("commit", "-qm", "start")
    mine = "# mine\na: 2\nb: {c: x, old: 3}\n"
    (tmp_path / "params.yaml").write_text(mine)
    queue = Queue(tmp_path)
    wanted = {"good-s0-x": {"a": 5e-06, "b": {"c": "it's"}, "new": {"d": [1, None]}}, "bad-s0-y": {"a": "bad", "b": {}}}
    current = runner.current_params(tmp_path)
    for name, values in wanted.items():
        queue.add(name, list(plan.settings(values, current)))
    assert (tmp_path / "params.yaml").read_text() == mine
    queue.start(1)
    end = time.monotonic() + 90
    while queue.status().tasks != {"good-s0-x": "Success", "bad-s0-y": "Failed"}:
        assert time.monotonic() < end, queue.status()
        time.sleep(0.5)
    (commit,) = queue.finished().values()
    assert plan.canonical(yaml.safe_load(queue.file(commit, "params.yaml"))) == plan.canonical(wanted["good-s0-x"])
    assert queue.file(commit, "out/copy") == queue.file(commit, "params.yaml")
    assert "exited with 1" in queue.reason("bad-s0-y")
    queue.drop(["bad-s0-y"])
    assert "bad-s0-y" not in queue.status().tasks
    assert (tmp_path / "params.yaml").read_text() == mine and not Path(tmp_path / "out").exists()
