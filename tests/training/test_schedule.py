import pytest
import torch

from fast_goal.training.schedule import learning_rate, make_optimizer, set_rate


def test_published_cosine(vectors):
    published = vectors["V11_schedules_and_splitters"]["goal_cosine_total100_init5e-6"]
    for step, rate in published.items():
        assert learning_rate(int(step), 100, 5e-6) == pytest.approx(rate, rel=1e-9)


def test_published_cosine_with_warmup(vectors):
    published = vectors["V11_schedules_and_splitters"]["openclip/longclip/degla_cosine_base1e-6_warm200_total1000"]
    for step, rate in published.items():
        assert learning_rate(int(step), 1000, 1e-6, warmup=200) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("warmup", [0, 3, 10, 20])
def test_rate_is_above_zero_and_never_above_base(warmup):
    rates = [learning_rate(step, 10, 1.0, warmup) for step in range(10)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])


def test_one_fused_step_is_adamw_with_decay_on_every_parameter():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 2), (4,), ()]]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(parameters, rate=1.0, weight_decay=0.1)
    set_rate(optimizer, 0.01)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        # In its first step Adam moves by the rate times the sign of the gradient.
        torch.testing.assert_close(parameter.detach(), old * (1 - 0.01 * 0.1) - 0.01)


def test_betas_and_epsilon_are_those_of_adam():
    """Three steps against Kingma and Ba's Algorithm 1, with gradients small enough for the epsilon to show."""
    parameter, value, epsilon = torch.nn.Parameter(torch.tensor([2.0])), 2.0, 1e-2
    optimizer = make_optimizer([parameter], 0.1, 0.0, betas=[0.5, 0.8], epsilon=epsilon)
    first = second = 0.0
    for step, gradient in enumerate([0.03, -0.01, 0.02], start=1):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        first, second = 0.5 * first + 0.5 * gradient, 0.8 * second + 0.2 * gradient**2
        value -= 0.1 * (first / (1 - 0.5**step)) / ((second / (1 - 0.8**step)) ** 0.5 + epsilon)
        assert parameter.item() == pytest.approx(value, rel=1e-6)
    (group,) = make_optimizer([parameter], 0.1, 0.0).param_groups
    (torchs,) = torch.optim.AdamW([parameter]).param_groups
    assert (group["betas"], group["eps"]) == (torchs["betas"], torchs["eps"])
