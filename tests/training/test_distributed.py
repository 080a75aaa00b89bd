"""Two processes on the CPU do what one does with the large batch."""

import os
import pickle
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pandas as pd
import psutil
import pytest
import torch
from flair_settings import flair_config
from test_loop import CONFIG, WEIGHTS, fast_goal

from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.objectives import make_objective
from fast_goal.training import distributed, loop
from fast_goal.training.batches import PairDataset
from fast_goal.training.checkpoint import states
from fast_goal.training.distributed import Disconnected, Group, check_batch, check_step, connected, launch, processes
from fast_goal.training.loader import Loader
from fast_goal.training.loop import finetune

DEGLA = {"global": 1.0, "local": 0.0}  # what it looks at besides is in `degla`
SCRIPT = textwrap.dedent(
    """
    import os, pickle, signal, sys, time
    from pathlib import Path
    import torch
    from fast_goal.environment import prepare
    from fast_goal.training import loop
    from fast_goal.training.distributed import process_group

    prepare()
    folder = Path(sys.argv[1])
    jobs = pickle.loads((folder / "jobs.pickle").read_bytes())
    torch.set_num_threads(1)
    device, gradients, step, save = torch.device("cpu"), [], loop.TrainStep.__call__, loop.save_state
    happens = os.environ.get("HAPPENS", "").split(",")  # what, at which rank and step

    def noted(self, parts):
        values = step(self, parts)
        gradients.append({name: value.grad.clone() for name, value in self.clip.named_parameters() if value.grad is not None})
        at = f"{self.group.rank} {len(gradients)}"
        if f"all stop {at}" in happens:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)
        if f"stops {at}" in happens:
            os.kill(os.getpid(), signal.SIGTERM)
        if f"dies {at}" in happens:
            os._exit(7)
        return values

    def noted_save(*arguments):
        if f"stops as it saves {arguments[4]['step']}" in happens:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        save(*arguments)

    loop.TrainStep.__call__, loop.save_state = noted, noted_save
    if "SGD" in happens:
        loop.make_optimizer = lambda groups, rate, decay, *_: torch.optim.SGD(groups, rate, 0.9, weight_decay=decay)
    with process_group(device) as group:
        for number, (dataset, pairs, clip, objective, config, *negatives) in enumerate(jobs):
            gradients.clear()
            path = folder / f"state{number or ''}.pt"
            loop.finetune(clip, dataset, pairs, objective, config, seed=5, device=device, state_path=path, state_key="key",
                          group=group, negatives=negatives[0] if negatives else None)
            torch.save([gradients[0], clip.state_dict()], folder / f"rank{group.rank}-{number}.pt")
    """
)


def two_processes(folder, *job):
    return several_jobs(folder, [job])[0]


def several_jobs(folder, jobs):
    """What each of two processes has after each job: its first gradient and its weights."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    launch(2, [str(folder / "script.py"), str(folder)])
    return [
        [torch.load(folder / f"rank{rank}-{number}.pt", weights_only=True) for rank in range(2)] for number in range(len(jobs))
    ]


def one_process(folder, dataset, pairs, clip, objective, config, monkeypatch, negatives=None):
    first = []

    class Noted(loop.TrainStep):
        def __call__(self, parts):
            values = super().__call__(parts)
            if not first:
                first.append({n: v.grad.clone() for n, v in self.clip.named_parameters() if v.grad is not None})
            return values

    with monkeypatch.context() as patched:
        patched.setattr(loop, "TrainStep", Noted)
        device = torch.device("cpu")
        more = {"state_path": folder / "one.pt", "state_key": "k", "negatives": negatives}
        finetune(clip, dataset, pairs, objective, config, seed=5, device=device, **more)
    return first[0]


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_equal_one(make_scenes, tiny_clip, tmp_path, monkeypatch, parts):
    dataset, pairs = make_scenes()
    pairs.loc[1, "weight"] = 0.5
    # the shares have different numbers of pairs: one image has two, some have none
    pairs = pd.concat([pairs.drop([4, 7, 10]), pairs.iloc[[1]].assign(rank=2, x1=0.0)])
    config = replace(CONFIG, epochs=1, batch_size=6, pairs="all", accumulate=parts)
    whole = tiny_clip()
    objective = fast_goal(in_image_negatives=0.99)  # looks at the boxes
    gradient = one_process(tmp_path, dataset, pairs, whole, objective, replace(config, accumulate=1), monkeypatch)
    ranks = two_processes(tmp_path, dataset, pairs, tiny_clip(), objective, config)
    for found, weights in ranks:
        assert found.keys() == gradient.keys()
        for name, value in gradient.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert all(torch.equal(weights[name], value) for name, value in ranks[0][1].items())  # the same on all
    assert states(tmp_path / "state.pt")


def test_what_the_objective_does_not_look_at_stays(make_scenes, make_negatives, degla, tiny_clip, tmp_path, monkeypatch):
    """The weights after three steps, with a weight decay that would show, and with a process or a part without any pair or
    hard negative."""
    monkeypatch.setenv("HAPPENS", "SGD")
    monkeypatch.setattr(
        loop, "make_optimizer", lambda groups, rate, decay, *_: torch.optim.SGD(groups, rate, 0.9, weight_decay=decay)
    )
    (dataset, pairs), none = make_scenes(), dict.fromkeys(("global", "local", "tsl_image", "tsl_text"), 0.0)
    config = replace(CONFIG, epochs=3, batch_size=12, learning_rate=0.02, weight_decay=0.5)
    few = pairs.iloc[[1, 2, 5]]
    cases = {
        "tsl_image": (none | {"tsl_image": 1.0}, few, {}, 1e-5),
        "tsl_image in parts": (none | {"tsl_image": 1.0}, few, {"accumulate": 2}, 1e-5),
        "tsl_text": (none | {"tsl_text": 1.0}, few, {"accumulate": 3}, 1e-5),
        "no pair": (none | {"tsl_image": 1.0}, pairs[:0], {"accumulate": 2}, 1e-5),
        "local": (none | {"local": 1.0}, few, {}, 1e-5),
        "local in parts": (none | {"local": 1.0}, few, {"accumulate": 3}, 1e-5),
        "frozen": (WEIGHTS, pairs, {"freeze": ["text"], "accumulate": 2}, 1e-5),
        "bf16": (WEIGHTS, pairs, {"precision": "bf16"}, 3e-2),
        "degla": (DEGLA, pairs, {}, 1e-5),
        "degla in parts": (DEGLA, pairs, {"accumulate": 2}, 1e-5),
        "degla for few": (DEGLA, pairs, {"accumulate": 3}, 1e-5),
    }
    every = make_negatives(dataset)
    hard = {"degla": every, "degla in parts": every, "degla for few": every[every.image_id == "image3"]}
    objectives = {case: degla() if case in hard else fast_goal(weights) for case, (weights, *_) in cases.items()}
    jobs = [
        (dataset, table, tiny_clip(), objectives[case], replace(config, **settings), hard.get(case))
        for case, (_, table, settings, _) in cases.items()
    ]
    shared = several_jobs(tmp_path, jobs)
    start = tiny_clip().state_dict()
    for (case, (weights, table, settings, tolerance)), ranks in zip(cases.items(), shared, strict=True):
        whole = tiny_clip()
        settings = {name: value for name, value in settings.items() if name != "accumulate"}
        (tmp_path / case).mkdir()
        settings = replace(config, **settings)
        one_process(tmp_path / case, dataset, table, whole, objectives[case], settings, monkeypatch, hard.get(case))
        still = {"tsl_image": "text", "tsl_text": "image", "no pair": "text", "frozen": "text"}.get(
            case.removesuffix(" in parts")
        )
        scale_stays = not weights["global"] and not weights["local"]
        if case in hard:
            teachers = [torch.load(file, weights_only=True)["teacher"] for file in taught(tmp_path, case, list(cases))]
            for name, value in teachers[0].items():
                torch.testing.assert_close(teachers[1][name], value, atol=tolerance, rtol=0)
        for name, value in whole.named_parameters():
            assert torch.equal(ranks[0][1][name], ranks[1][1][name]), (case, name)
            torch.testing.assert_close(
                ranks[0][1][name], value.detach(), atol=tolerance, rtol=0, msg=lambda text, at=(case, name): f"{at}: {text}"
            )
            tower, _ = whole.depths()[name]
            stays = tower == still or (tower == "both" and scale_stays)
            if stays or value.ndim != 1:  # a bias of 0 does not decay
                assert torch.equal(value, start[name]) == stays, (case, name)


def test_two_processes_draw_and_learn_as_one(make_scenes, tiny_clip, flair, tmp_path, monkeypatch):
    """The first gradient, and the weights after several steps, of the towers and of the pooling."""
    monkeypatch.setenv("HAPPENS", "SGD")
    monkeypatch.setattr(
        loop, "make_optimizer", lambda groups, rate, decay, *_: torch.optim.SGD(groups, rate, 0.9, weight_decay=decay)
    )
    dataset, pairs = make_scenes()
    pairs = pairs.drop([4, 7])
    config = replace(CONFIG, epochs=1, batch_size=6, learning_rate=2e-3, weight_decay=0.5, head_rate=2.0)
    fine = {"name": "fast_goal", "weights": WEIGHTS, "target_matrix": "diagonal", "in_image_negatives": None}
    parts = {
        "parts": {"objective": flair_config(count=2), "weight": 1.0},
        "fine": {"objective": {**fine, "alignment": "exact"}, "weight": 1.0},
    }
    cases = {
        "flair": (flair(), {}),
        "in parts": (flair(), {"accumulate": 2, "gradient_clip": 5.0}),
        "positives alone": (flair(tcs=0.0), {}),
        "beside fast_goal": (make_objective({"name": "weighted", "parts": parts}), {"accumulate": 2, "ema": 0.5}),
        "frozen": (flair(), {"freeze": ["image"], "accumulate": 3}),
        "bf16": (flair(), {"precision": "bf16"}),
    }
    jobs = [(dataset, pairs, tiny_clip(), objective, replace(config, **settings)) for objective, settings in cases.values()]
    shared = several_jobs(tmp_path, jobs)
    for (case, (objective, settings)), ranks in zip(cases.items(), shared, strict=True):
        (tmp_path / case).mkdir()
        whole, alone = tiny_clip(), replace(config, **settings | {"accumulate": 1})
        gradient = one_process(tmp_path / case, dataset, pairs, whole, objective, alone, monkeypatch)
        assert ("pooling.pooling.attention.in_proj_weight" in gradient) == (case != "positives alone")
        tolerance = 3e-2 if case == "bf16" else 1e-4
        for found, weights in ranks:
            assert found.keys() == gradient.keys(), case
            for name, value in gradient.items():
                largest = max(1.0, value.abs().max().item())
                assert (found[name] - value).abs().max().item() <= tolerance * largest, (case, name)
            for name, value in whole.state_dict().items():
                assert torch.equal(weights[name], ranks[0][1][name]), (case, name)
                torch.testing.assert_close(
                    weights[name], value, atol=tolerance, rtol=0, msg=lambda text, at=(case, name): f"{at}: {text}"
                )


def taught(folder, case, cases):
    """The last states of two processes and of one."""
    paths = folder / f"state{cases.index(case) or ''}.pt", folder / case / "one.pt"
    return [next(iter(states(path).values())) for path in paths]


def started(folder, job):
    """The command of a process that starts two others."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / "jobs.pickle").write_bytes(pickle.dumps([job]))
    code = f"from fast_goal.training.distributed import launch; launch(2, [{str(folder / 'script.py')!r}, {str(folder)!r}])"
    return [sys.executable, "-c", code]


def told_to_stop(folder, job, happens):
    """The end of two processes, started by a third, of which one or all are sent SIGTERM."""
    return subprocess.run(
        started(folder, job), env={**os.environ, "HAPPENS": happens}, capture_output=True, text=True, timeout=120
    )


def test_a_kill_of_the_one_that_starts_them_leaves_none(make_scenes, tiny_clip, tmp_path):
    config = replace(CONFIG, batch_size=6, epochs=100_000)
    command = started(tmp_path, (*make_scenes(), tiny_clip(), fast_goal(), config))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as starter:
        while not states(tmp_path / "state.pt"):
            assert starter.poll() is None
            time.sleep(0.1)
        shared = psutil.Process(starter.pid).children()
        starter.kill()
    assert len(shared) == 2
    assert psutil.wait_procs(shared, timeout=30)[1] == []


def test_a_signal_ends_all_and_the_state_is_continued(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, batch_size=6, save_every=1000)
    ended = told_to_stop(tmp_path, (dataset, pairs, tiny_clip(), fast_goal(), config), "all stop 0 3")
    assert ended.returncode == 143 and "Traceback" not in ended.stderr and "deprecated" not in ended.stderr, ended.stderr
    assert list(states(tmp_path / "state.pt")) == [3, 2]
    (tmp_path / "whole").mkdir()
    runs = [
        two_processes(folder, dataset, pairs, tiny_clip(seed=seed), fast_goal(), config)[0][1]
        for folder, seed in ((tmp_path, 9), (tmp_path / "whole", 0))
    ]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@pytest.mark.parametrize("happens", ["stops 1 3,stops as it saves 3", "stops 0 2"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(make_scenes, tiny_clip, tmp_path, happens):
    config = replace(CONFIG, batch_size=6, save_every=1000, log_every=1000)
    ended = told_to_stop(tmp_path, (*make_scenes(), tiny_clip(), fast_goal(), config), happens)
    assert "of 2 ended with exit status 143" in ended.stderr, ended.stderr
    assert "Disconnected" not in ended.stderr and "RuntimeError" not in ended.stderr, ended.stderr
    assert max(states(tmp_path / "state.pt")) == (2 if happens.endswith("2") else 3)  # 2 is the last step of an epoch


def test_a_dead_process_ends_the_training_with_a_message(make_scenes, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HAPPENS", "dies 1 2")
    dataset, pairs = make_scenes()
    with pytest.raises(FastGoalError, match="Process 1 of 2 ended with exit status 7"):
        two_processes(tmp_path, dataset, pairs, tiny_clip(), fast_goal(), replace(CONFIG, batch_size=6))


def test_a_lost_process_is_said():
    gone = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4711")
    message = r"Process 1 of 2 has lost another one.*closed by peer.*Run the step again"
    with pytest.raises(Disconnected, match=message), connected(Group(1, 2)):
        raise gone
    with pytest.raises(RuntimeError), connected(Group(0, 1)):
        raise gone
    with pytest.raises(RuntimeError, match="shapes"), connected(Group(1, 2)):
        raise RuntimeError("shapes do not fit")


def test_no_two_captions_of_one_picture_meet_on_whatever_process(make_scenes, tiny_clip):
    dataset, pairs = make_scenes()
    records = dataset.records
    records["content_hash"] = records["image_id"].map(lambda name: int(name.removeprefix("image")) % 6)  # every picture twice
    hashes = dict(zip(records["image_id"], records["content_hash"], strict=True))
    groups = [Group(), Group(0, 2), Group(1, 2)]
    loaders = [Loader(PairDataset(dataset, "train", pairs, tiny_clip(), group=group), 6, seed=3) for group in groups]
    for epoch in range(3):
        for step, (whole, *shares) in enumerate(zip(*(loader.epoch(epoch) for loader in loaders), strict=True)):
            ids = [loader.image_ids(epoch * loader.steps + step) for loader in loaders]
            assert ids[0] == ids[1] == ids[2] and len({hashes[image_id] for image_id in ids[0]}) == 6
            assert torch.equal(torch.cat([share.boxes for share in shares]), whole.boxes)  # each has its half


def test_a_batch_must_be_shared_evenly():
    check_batch(64, Group(0, 4))
    with pytest.raises(ConfigError, match=r"finetune\.batch_size = 63 .* Set it to 60"):
        check_batch(63, Group(0, 4))
    check_batch(64, Group(0, 4), samples=8)
    with pytest.raises(ConfigError, match=r"intermediate\.training\.batch_size = 63 "):
        check_batch(63, Group(0, 4), section="intermediate.training")
    with pytest.raises(ConfigError, match=r"finetune\.batch_size = 64, but .* 7 samples.* Set it to 4"):
        check_batch(64, Group(0, 4), samples=7)
    with pytest.raises(ConfigError, match=r"finetune\.processes: 4 .* 3 samples. Set it to 3"):
        check_batch(64, Group(0, 4), samples=3)


def test_processes_that_begin_at_different_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_of_main", lambda step, *_: step + 2)
    with pytest.raises(FastGoalError, match=r"state\.pt.*shared file system"):
        check_step(3, tmp_path / "state.pt", Group())


def test_number_of_processes(monkeypatch):
    monkeypatch.delenv("FAST_GOAL_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (processes(0), processes(3)) == (4, 3)
    monkeypatch.setenv("FAST_GOAL_DEVICE", "cuda:1")
    assert processes(0) == 1
