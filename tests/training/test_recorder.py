import pytest
import torch

from fast_goal.errors import FastGoalError
from fast_goal.training.recorder import Recorder


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
    with pytest.raises(FastGoalError, match=r"step 8: tsl_image = 0\.25, loss = .*finetune\.learning_rate"):
        recorder.flush()


def test_history_of_a_state_is_handed_on_again():
    seen = []
    recorder = Recorder("finetune", lambda step, record: seen.append((step, record)), [{"step": 2, "loss": 1.0}])
    recorder.write({"step": 4, "loss": 0.5})
    assert seen == [(2, {"step": 2, "loss": 1.0}), (4, {"step": 4, "loss": 0.5})]
    assert recorder.history == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}]
