"""Optimizers by name, and learning-rate schedules against values computed by hand."""

import pytest
import torch
from torch import nn

from speechllm.training.config import TrainConfig
from speechllm.training.optim import Eden, make_optimizer
from speechllm.training.scaled_adam import ScaledAdam

both = pytest.mark.parametrize("optimizer_class", [ScaledAdam, torch.optim.AdamW])


def two_groups(optimizer_class=ScaledAdam):
    """Return an optimizer of two parameters with learning rates 0.01 and 0.05."""
    first, second = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    return optimizer_class([{"params": [first]}, {"params": [second], "lr": 0.05}], lr=0.01)


@pytest.mark.parametrize("name, kind", [("scaled_adam", ScaledAdam), ("adamw", torch.optim.AdamW)])
def test_only_trainable_parameters_are_optimized(name, kind):
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(TrainConfig(optimizer=name, base_lr=0.02), model.parameters())
    [group] = optimizer.param_groups
    assert type(optimizer) is kind and group["lr"] == 0.02
    assert len(group["params"]) == 1 and group["params"][0] is model.weight


@pytest.mark.parametrize(
    ("option", "batch", "epoch", "factor"),
    [
        ({}, 0, 0, 0.5),  # the warm-up begins
        ({}, 250, 0, 0.7497918112),  # 0.75 * (1 + 1/900)^(-1/4)
        ({}, 7500, 3.5, 0.7071067812),  # 2^(-1/2)
        ({"lr_batches": 1000}, 1000, 0, 2**-0.25),
        ({"lr_epochs": 1}, 7500, 2, 2**-0.25 * 5**-0.25),
        ({"warmup_batches": 15000}, 7500, 0, 2**-0.25 * 0.75),
        ({"warmup_batches": 0}, 0, 0, 1.0),
    ],
)
@both
def test_eden_equals_its_formula(optimizer_class, option, batch, epoch, factor):
    schedule = Eden(two_groups(optimizer_class), **option)
    schedule.step_epoch(epoch)
    schedule.step_batch(batch)
    assert schedule.get_last_lr() == pytest.approx([0.01 * factor, 0.05 * factor], rel=1e-9)
    assert schedule.optimizer.param_groups[1]["lr"] == schedule.get_last_lr()[1]


@both
def test_resuming_keeps_the_initial_rates(optimizer_class):
    schedule = Eden(two_groups(optimizer_class))
    schedule.step_epoch(3)
    schedule.step_batch(9000)
    resumed_optimizer = two_groups(optimizer_class)
    resumed_optimizer.load_state_dict(schedule.optimizer.state_dict())
    resumed = Eden(resumed_optimizer)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr()
    for one in (schedule, resumed):
        one.step_batch(9001)
    assert resumed.get_last_lr() == schedule.get_last_lr()
