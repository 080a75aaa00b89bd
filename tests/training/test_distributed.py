"""Two processes on the CPU do what one does with the large batch."""

import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_loop import CONFIG, fast_goal

from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.training import distributed
from fast_goal.training.distributed import Group, check_batch, check_step, launch, processes
from fast_goal.training.loop import finetune

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
    dataset, pairs, clip, objective, config = pickle.loads((folder / "job.pickle").read_bytes())
    torch.set_num_threads(1)
    device, gradients, step = torch.device("cpu"), [], loop.TrainStep.__call__

    def noted(self, parts):
        values = step(self, parts)
        gradients.append({name: value.grad.clone() for name, value in self.clip.named_parameters() if value.grad is not None})
        if os.environ.get("STOPS") == f"{self.group.rank} {len(gradients)}":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)
        if os.environ.get("DIES") == f"{self.group.rank} {len(gradients)}":
            os._exit(7)
        return values

    loop.TrainStep.__call__ = noted
    with process_group(device) as group:
        loop.finetune(clip, dataset, pairs, objective, config, seed=5, device=device, state_path=folder / "state.pt",
                      state_key="key", group=group)
        torch.save([gradients[0], clip.state_dict()], folder / f"rank{group.rank}.pt")
    """
)


def two_processes(folder, *job):
    (folder / "script.py").write_text(SCRIPT)
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    launch(2, [str(folder / "script.py"), str(folder)])
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def one_process(folder, dataset, pairs, clip, objective, config, monkeypatch):
    from fast_goal.training import loop

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
        finetune(clip, dataset, pairs, objective, config, seed=5, device=device, state_path=folder / "one.pt", state_key="k")
    return first[0]


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_equal_one(make_scenes, tiny_clip, tmp_path, monkeypatch, parts):
    dataset, pairs = make_scenes()
    pairs.loc[1, "weight"] = 0.5
    # the shares have different numbers of pairs: one image has two, some have none
    pairs = pd.concat([pairs.drop([4, 7, 10]), pairs.iloc[[1]].assign(rank=2, x1=0.0)])
    config = replace(CONFIG, epochs=1, batch_size=6, pairs="all", accumulate=parts)
    whole = tiny_clip()
    gradient = one_process(tmp_path, dataset, pairs, whole, fast_goal(), replace(config, accumulate=1), monkeypatch)
    ranks = two_processes(tmp_path, dataset, pairs, tiny_clip(), fast_goal(), config)
    for found, weights in ranks:
        assert found.keys() == gradient.keys()
        for name, value in gradient.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert all(torch.equal(weights[name], value) for name, value in ranks[0][1].items())  # the same on all
    assert (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(("term", "parts"), [("local", 3), ("tsl_image", 1)])
def test_a_process_without_local_pairs(make_scenes, tiny_clip, tmp_path, monkeypatch, term, parts):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, epochs=1, batch_size=6, accumulate=parts)  # the last part of a process has none
    objective = fast_goal(dict.fromkeys(("global", "local", "tsl_image", "tsl_text"), 0.0) | {term: 1.0})
    whole = tiny_clip()
    few = pairs.iloc[[1, 2, 5]]
    gradient = one_process(tmp_path, dataset, few, whole, objective, replace(config, accumulate=1), monkeypatch)
    ranks = two_processes(tmp_path, dataset, few, tiny_clip(), objective, config)
    for found, weights in ranks:
        for name, value in found.items():
            expected = gradient.get(name, torch.zeros_like(value))  # a tower that the term does not look at
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert all(torch.equal(weights[name], value) for name, value in ranks[0][1].items())


def test_a_signal_ends_all_and_the_state_is_continued(make_scenes, tiny_clip, tmp_path):
    dataset, pairs = make_scenes()
    config = replace(CONFIG, batch_size=6, save_every=1000)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((dataset, pairs, tiny_clip(), fast_goal(), config)))
    code = f"from fast_goal.training.distributed import launch; launch(2, [{str(tmp_path / 'script.py')!r}, {str(tmp_path)!r}])"
    environment = {**os.environ, "STOPS": "0 3"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 143 and "Traceback" not in ended.stderr, ended.stderr
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["step"] == 3
    (tmp_path / "whole").mkdir()
    runs = [
        two_processes(folder, dataset, pairs, tiny_clip(seed=seed), fast_goal(), config)[0][1]
        for folder, seed in ((tmp_path, 9), (tmp_path / "whole", 0))
    ]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_dead_process_ends_the_training_with_a_message(make_scenes, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("DIES", "1 2")
    dataset, pairs = make_scenes()
    with pytest.raises(FastGoalError, match="Process 1 of 2 ended with exit status 7"):
        two_processes(tmp_path, dataset, pairs, tiny_clip(), fast_goal(), replace(CONFIG, batch_size=6))


def test_a_batch_must_be_shared_evenly():
    check_batch(64, Group(0, 4))
    with pytest.raises(ConfigError, match=r"finetune\.batch_size = 63 .* Set it to 60"):
        check_batch(63, Group(0, 4))
    check_batch(64, Group(0, 4), samples=8)
    with pytest.raises(ConfigError, match=r"finetune\.batch_size = 64, but .* 7 samples.* Set it to 4"):
        check_batch(64, Group(0, 4), samples=7)
    with pytest.raises(ConfigError, match=r"finetune\.processes: 4 .* 3 samples. Set it to 3"):
        check_batch(64, Group(0, 4), samples=3)


def test_processes_that_begin_at_different_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_of_main", lambda step, *_: step + 2)
    with pytest.raises(FastGoalError, match=r"state\.pt.*shared file system"):
        check_step(3, tmp_path / "state.pt", Group(), torch.device("cpu"))


def test_number_of_processes(monkeypatch):
    monkeypatch.delenv("FAST_GOAL_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (processes(0), processes(3)) == (4, 3)
    monkeypatch.setenv("FAST_GOAL_DEVICE", "cuda:1")
    assert processes(0) == 1
