import csv
from functools import partial

import pytest
import torch

from fast_goal.training.recorder import BadLoss, CsvLog, Recorder


def test_flush_gives_the_last_step():
    recorder = Recorder("finetune")
    recorder.add(1, 4, {"loss": torch.tensor(3.0), "scale": torch.tensor(10.0)})
    recorder.add(2, 4, {"loss": torch.tensor(2.0), "scale": torch.tensor(11.0)})
    values = recorder.flush()
    assert values.pop("samples_per_second") > 0
    assert values == {"loss": 2.0, "scale": 11.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_first_step_that_is_not_finite_is_named(bad):
    recorder = Recorder("finetune")
    for step, value in [(7, 1.0), (8, bad), (9, bad)]:
        recorder.add(step, 4, {"tsl_image": torch.tensor(0.25), "loss": torch.tensor(value)})
    for check in (partial(recorder.check, 9), recorder.flush):
        with pytest.raises(BadLoss, match=r"step 8: tsl_image = 0\.25, loss = .*finetune\.learning_rate") as error:
            check()
        assert (error.value.step, error.value.since) == (8, 8)


def test_a_check_takes_nothing_from_the_next_record():
    recorder = Recorder("finetune")
    recorder.check(0)
    recorder.add(1, 4, {"loss": torch.tensor(3.0)})
    recorder.check(1, [torch.ones(2, 2), torch.zeros(())])
    assert recorder.flush()["loss"] == 3.0


def written(losses, diverged, history=()):
    """Which of the records, counted from 1, is said to show a training that has diverged; None: none."""
    recorder = Recorder("intermediate.training", None, [*history], diverged)
    for step, loss in enumerate(losses, start=len(history) + 1):
        try:
            recorder.write({"step": step, "loss": loss, "epoch": 1})
        except BadLoss as error:
            assert error.step == step
            return step, error.since, str(error)
        recorder.write({"step": step, "epoch": 1, "val": 1e9})  # a measurement is no loss
    return None


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([2.0, 10.0, 10.0, 10.0, 10.0], None),  # not above
        ([2.0, 11.0, 11.0, 9.0, 11.0, 11.0], None),  # never three in a row
        ([2.0, 1.0, 11.0, 12.0, 13.0], (5, 3)),
        ([2.0, 11.0, 11.0, 9.0, 11.0, 11.0, 10.5], (7, 5)),
        ([0.0, 2.0, 3.0, 9.0, 2.5], None),  # the first batch had nothing to compare
        ([0.0, 2.0, 11.0, 11.0, 11.0], (5, 3)),
        ([0.0, 0.0, 0.0, 0.0], None),
    ],
)
def test_a_loss_that_stays_high_has_diverged(losses, at):
    found = written(losses, 5.0)
    assert at == (found and found[:2])
    assert written(losses, None) is None
    if found is None:
        return
    names = [f"intermediate.training.{name}" for name in ("diverged = 5", "learning_rate", "gradient_clip", "diverged to null")]
    assert all(name in found[2] for name in names) and f"at step {at[0]}" in found[2]
    for done in range(at[0]):  # a resumed training decides alike
        history = [{"step": step, "loss": loss} for step, loss in enumerate(losses[:done], start=1)]
        assert written(losses[done:], 5.0, history) == found


def test_records_as_csv(tmp_path):
    path = tmp_path / "logs" / "finetune.csv"
    path.parent.mkdir()
    path.write_text("of an earlier run")
    log = CsvLog(path)
    assert not path.exists()
    records = [
        {"step": 2, "epoch": 1, "loss": 0.1 + 0.2},
        {"step": 4, "epoch": 1, "loss": 1e-7},
        {"step": 4, "epoch": 1, "val_R@1": 50.0},
        {"step": 6, "epoch": 2, "loss": 3.0, "note": 'a "b", c'},
    ]
    for number, record in enumerate(records, start=1):
        log(record["step"], record)
        with path.open(newline="") as stream:  # complete after every record
            rows = list(csv.DictReader(stream))
        assert [{name: cell for name, cell in row.items() if cell} for row in rows] == [
            {name: str(value) for name, value in record.items()} for record in records[:number]
        ]
    assert path.read_text().splitlines()[0] == "step,epoch,loss,val_R@1,note"
    CsvLog(path)(2, records[0])
    assert path.read_text().splitlines() == ["step,epoch,loss", "2,1,0.30000000000000004"]


def test_history_of_a_state_is_handed_on_again():
    seen = []
    recorder = Recorder("finetune", lambda step, record: seen.append((step, record)), [{"step": 2, "loss": 1.0}])
    recorder.write({"step": 4, "loss": 0.5})
    assert seen == [(2, {"step": 2, "loss": 1.0}), (4, {"step": 4, "loss": 0.5})]
    assert recorder.history == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}]
