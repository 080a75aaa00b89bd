import errno
import logging

import pytest
import torch

from fast_goal.errors import FastGoalError
from fast_goal.training.checkpoint import VERSION, load_state, remove_state, save_state, states


def trained(steps: int, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_round_trip_restores_everything(tmp_path):
    model, optimizer = trained(3)
    path = tmp_path / "state" / "a.pt"
    save_state(path, "key", model, optimizer, {"step": 3, "history": [{"step": 2, "loss": 0.5}]})
    expected = torch.rand(4)
    other, other_optimizer = trained(1, seed=1)
    assert load_state(path, "key", other, other_optimizer) == {"step": 3, "history": [{"step": 2, "loss": 0.5}]}
    assert torch.equal(torch.rand(4), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    for slot, other_slot in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(slot[name], other_slot[name]) for name in slot)


def test_average_and_teacher_are_kept_apart(tmp_path):
    (model, optimizer), average, teacher = trained(3), trained(2)[0], trained(1)[0]
    save_state(tmp_path / "a.pt", "key", model, optimizer, {"step": 3}, average, 1, teacher)
    others = [trained(0)[0] for _ in range(2)]
    load_state(tmp_path / "a.pt", "key", *trained(0), *others)
    assert torch.equal(others[0].weight, average.weight) and torch.equal(others[1].weight, teacher.weight)


def test_a_state_of_another_version_is_left_alone(tmp_path, caplog):
    save_state(tmp_path / "a.pt", "key", *trained(3), {"step": 3})
    former = tmp_path / "a.00000003.pt"
    state = torch.load(former, weights_only=True)
    del state["teacher"]
    torch.save(state | {"version": VERSION - 1}, former)
    assert load_state(tmp_path / "a.pt", "key", *trained(0)) is None
    assert "a.00000003.pt belongs to other parameters" in caplog.text and former.exists()


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path / "a.pt", "key", *trained(0)) is None


def test_another_key_is_ignored_with_a_message(tmp_path, caplog):
    save_state(tmp_path / "a.pt", "old", *trained(3), {"step": 3})
    model, optimizer = trained(0)
    before = model.weight.clone()
    with caplog.at_level(logging.WARNING):
        assert load_state(tmp_path / "a.pt", "new", model, optimizer) is None
    assert torch.equal(model.weight, before)
    assert "a.00000003.pt belongs to other parameters or inputs" in caplog.text and "from the beginning" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 half a file"])
def test_damaged_state_is_ignored_with_a_message(tmp_path, caplog, content):
    (tmp_path / "a.00000003.pt").write_bytes(content)
    assert load_state(tmp_path / "a.pt", "key", *trained(0)) is None
    assert "cannot be read" in caplog.text and "from the beginning" in caplog.text


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_last_states_are_kept(tmp_path):
    path = tmp_path / "a.pt"
    others = ["a.pt.best", "ab.00000001.pt", "b.00000001.pt", "a.00000001.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"of somebody else")
    for step in (1, 2, 10):
        save_state(path, "key", *trained(step), {"step": step}, None, 2)
    assert list(states(path)) == [10, 2]
    assert names(tmp_path) == sorted([*others, "a.00000002.pt", "a.00000010.pt"])
    save_state(path, "key", *trained(1), {"step": 11}, None, 1)
    assert list(states(path)) == [11]
    remove_state(path)
    assert names(tmp_path) == sorted(others[1:])


def flip_a_bit(file):
    """In the middle of the weights, where torch alone would not notice."""
    content = bytearray(file.read_bytes())
    weights = trained(2)[0].weight.detach().numpy().tobytes()
    content[content.index(weights) + 5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.write_bytes(file.read_bytes()[:-100])])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, caplog, damage):
    path = tmp_path / "a.pt"
    for step in (1, 2):
        save_state(path, "key", *trained(step), {"step": step}, None, 2)
    damage(tmp_path / "a.00000002.pt")
    model, optimizer = trained(0)
    assert load_state(path, "key", model, optimizer) == {"step": 1}
    assert torch.equal(model.weight, trained(1)[0].weight)
    assert "a.00000002.pt cannot be read" in caplog.text and "before it" in caplog.text and "a.00000001.pt" in caplog.text
    # the training goes on, and its next state takes the damaged one's place
    save_state(path, "key", *trained(2), {"step": 2}, None, 2)
    assert load_state(path, "key", model, optimizer) == {"step": 2} and list(states(path)) == [2, 1]


def test_later_states_of_another_training_make_way(tmp_path):
    path = tmp_path / "a.pt"
    save_state(path, "old", *trained(3), {"step": 300})
    save_state(path, "new", *trained(1), {"step": 100})
    assert list(states(path)) == [100] and load_state(path, "new", *trained(0)) == {"step": 100}


def test_a_pickle_that_runs_code_is_refused(tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"version": VERSION, "key": "key", "model": Evil()}, tmp_path / "a.00000001.pt")
    assert load_state(tmp_path / "a.pt", "key", *trained(0)) is None
    assert not (tmp_path / "ran").exists() and "cannot be read" in caplog.text


@pytest.mark.parametrize(("wrapped", "keep"), [(False, 1), (True, 3)])
def test_full_disk_names_the_file_and_keeps_the_former_state(tmp_path, monkeypatch, wrapped, keep):
    fewer = {1: "disk space, and run", 3: "keep_states below 3 .* and run"}[keep]
    message = rf"No space left .*a\.00000002\.pt.*MB needed.*{fewer} the step again"
    path = tmp_path / "a.pt"
    save_state(path, "key", *trained(1), {"step": 1})

    def full(state, stream):
        stream.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if wrapped:  # what torch makes of it when the archive is closed
                raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904
            raise

    with monkeypatch.context() as patched, pytest.raises(FastGoalError, match=message):
        patched.setattr(torch, "save", full)
        save_state(path, "key", *trained(2), {"step": 2}, None, keep)
    assert load_state(path, "key", *trained(0)) == {"step": 1}
    assert names(tmp_path) == ["a.00000001.pt"]


def test_other_errors_of_saving_are_not_hidden(tmp_path, monkeypatch):
    def broken(state, stream):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="something else"):
        save_state(tmp_path / "a.pt", "key", *trained(1), {"step": 1})


def test_halves_of_a_killed_save_are_removed(tmp_path):
    halves = [tmp_path / name for name in (".a.00000002.pt.4711.tmp", ".a.pt.best.4711.tmp")]
    other = tmp_path / ".b.00000002.pt.4711.tmp"
    for half in (*halves, other):
        half.write_bytes(b"half")
    load_state(tmp_path / "a.pt", "key", *trained(0))
    assert names(tmp_path) == [other.name]
    other.unlink()
    save_state(tmp_path / "a.pt", "key", *trained(1), {"step": 1})
    halves[0].write_bytes(b"half")
    remove_state(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
