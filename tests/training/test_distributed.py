"""Two processes on the CPU do what one does with the large batch."""

import pickle
import textwrap
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_loop import CONFIG, fast_goal

from fast_goal.errors import ConfigError, FastGoalError
from fast_goal.training.distributed import Group, check_batch, launch, processes
from fast_goal.training.loop import finetune

SCRIPT = textwrap.dedent(
    """
    import os, pickle, sys
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


def test_a_dead_process_ends_the_training_with_a_message(make_scenes, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("DIES", "1 2")
    dataset, pairs = make_scenes()
    with pytest.raises(FastGoalError, match="Process 1 of 2 ended with exit status 7"):
        two_processes(tmp_path, dataset, pairs, tiny_clip(), fast_goal(), replace(CONFIG, batch_size=6))


def test_a_batch_must_be_shared_evenly():
    check_batch(64, Group(0, 4))
    with pytest.raises(ConfigError, match=r"finetune\.batch_size = 63 .* Set it to 60"):
        check_batch(63, Group(0, 4))


def test_number_of_processes(monkeypatch):
    monkeypatch.delenv("FAST_GOAL_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (processes(0), processes(3)) == (4, 3)
    monkeypatch.setenv("FAST_GOAL_DEVICE", "cuda:1")
    assert processes(0) == 1
