import errno
import logging

import pytest
import torch

from fast_goal.errors import FastGoalError
from fast_goal.training.checkpoint import load_state, remove_state, save_state


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


def test_no_state_is_none(tmp_path):
    assert load_state(tmp_path / "a.pt", "key", *trained(0)) is None


def test_another_key_is_ignored_with_a_message(tmp_path, caplog):
    save_state(tmp_path / "a.pt", "old", *trained(3), {"step": 3})
    model, optimizer = trained(0)
    before = model.weight.clone()
    with caplog.at_level(logging.WARNING):
        assert load_state(tmp_path / "a.pt", "new", model, optimizer) is None
    assert torch.equal(model.weight, before)
    assert "other parameters or inputs" in caplog.text and "a.pt" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a state", b"PK\x03\x04 half a file"])
def test_damaged_state_is_ignored_with_a_message(tmp_path, caplog, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert load_state(tmp_path / "a.pt", "key", *trained(0)) is None
    assert "cannot be read" in caplog.text


def test_a_pickle_that_runs_code_is_refused(tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"version": 1, "key": "key", "model": Evil()}, tmp_path / "a.pt")
    assert load_state(tmp_path / "a.pt", "key", *trained(0)) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_names_the_file_and_keeps_the_former_state(tmp_path, monkeypatch, wrapped):
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

    with monkeypatch.context() as patched, pytest.raises(FastGoalError, match=r"No space left .*a\.pt.*run the step again"):
        patched.setattr(torch, "save", full)
        save_state(path, "key", *trained(2), {"step": 2})
    assert load_state(path, "key", *trained(0)) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_other_errors_of_saving_are_not_hidden(tmp_path, monkeypatch):
    def broken(state, stream):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="something else"):
        save_state(tmp_path / "a.pt", "key", *trained(1), {})


def test_halves_of_a_killed_save_are_removed(tmp_path):
    half = tmp_path / ".a.pt.4711.tmp"
    half.write_bytes(b"half")
    load_state(tmp_path / "a.pt", "key", *trained(0))
    assert not half.exists()
    save_state(tmp_path / "a.pt", "key", *trained(1), {})
    half.write_bytes(b"half")
    remove_state(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
