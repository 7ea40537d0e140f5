"""The learning-rate schedules against values worked out by hand."""

import pytest
import torch

from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.schedule import Eden, FixedLR


def two_groups(optimizer_class=ScaledAdam):
    """An optimizer of two parameters with learning rates 0.01 and 0.05."""
    first, second = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    return optimizer_class([{"params": [first]}, {"params": [second], "lr": 0.05}], lr=0.01)


@pytest.mark.parametrize(
    ("batch", "epoch", "factor"),
    [
        (0, 0, 0.5),  # the warm-up begins
        (250, 0, 0.7497918112),  # 0.75 * (1 + 1/900)^(-1/4)
        (500, 0, 0.9988919651),  # (1 + 1/225)^(-1/4)
        (7500, 0, 0.8408964153),  # 2^(-1/4)
        (7500, 3.5, 0.7071067812),  # 2^(-1/2)
        (30000, 14, 0.2425356250),  # 17^(-1/2)
        (0, 3.5, 0.4204482076),  # 0.5 * 2^(-1/4)
    ],
)
@pytest.mark.parametrize("optimizer_class", [ScaledAdam, torch.optim.AdamW])
def test_eden_by_hand(optimizer_class, batch, epoch, factor):
    schedule = Eden(two_groups(optimizer_class))
    schedule.step_epoch(epoch)
    schedule.step_batch(batch)
    assert schedule.get_last_lr() == pytest.approx([0.01 * factor, 0.05 * factor], rel=1e-9)
    assert schedule.optimizer.param_groups[1]["lr"] == schedule.get_last_lr()[1]


@pytest.mark.parametrize(
    ("option", "batch", "factor"),
    [
        ({"lr_batches": 1000}, 1000, 2**-0.25),
        ({"lr_epochs": 1}, 7500, 2**-0.25 * 5**-0.25),
        ({"warmup_batches": 15000}, 7500, 2**-0.25 * 0.75),
        ({"warmup_batches": 15000, "warmup_start": 0.1}, 7500, 2**-0.25 * 0.55),
        ({"warmup_batches": 0}, 0, 1.0),
    ],
)
def test_every_option_of_eden_counts(option, batch, factor):
    schedule = Eden(two_groups(), **option)
    schedule.step_batch(batch)
    schedule.step_epoch(2 if "lr_epochs" in option else 0)
    assert schedule.get_last_lr() == pytest.approx([0.01 * factor, 0.05 * factor])


def test_fixed_stays():
    schedule = FixedLR(two_groups())
    schedule.step_epoch(9)
    schedule.step_batch(100_000)
    assert schedule.get_last_lr() == [0.01, 0.05]


@pytest.mark.parametrize("optimizer_class", [ScaledAdam, torch.optim.AdamW])
def test_resuming_keeps_the_initial_rates(optimizer_class):
    """Also when the optimizer is restored before there is a schedule."""
    schedule = Eden(two_groups(optimizer_class))
    schedule.step_epoch(3)
    schedule.step_batch(9000)
    resumed_optimizer = two_groups(optimizer_class)
    resumed_optimizer.load_state_dict(schedule.optimizer.state_dict())
    resumed = Eden(resumed_optimizer)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr()
    resumed.step_batch(9001)
    schedule.step_batch(9001)
    assert resumed.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize("option", [{"lr_batches": 0}, {"lr_epochs": -1}])
def test_eden_refuses_what_it_cannot_divide_by(option):
    with pytest.raises(ValueError, match="must be positive"):
        Eden(two_groups(), **option)
