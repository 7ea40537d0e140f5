"""The flags name an optimizer, of what is trained, and a schedule."""

import pytest
import torch
from torch import nn
from typed_flags import parse

from speechllm.training.optimizers import make_optimizer, make_schedule
from speechllm.training.scaled_adam import ScaledAdam
from speechllm.training.schedule import Eden, FixedLR


def test_the_optimizer_has_the_trained_parameters_only():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    for name, kind in (("scaled_adam", ScaledAdam), ("adamw", torch.optim.AdamW)):
        optimizer = make_optimizer(name, model.parameters(), 0.02)
        assert type(optimizer) is kind
        assert [p is model.weight for p in optimizer.param_groups[0]["params"]] == [True]
        assert optimizer.param_groups[0]["lr"] == 0.02


def rate(*flags):
    args = parse(*flags)
    optimizer = make_optimizer(args.optimizer, nn.Linear(2, 2).parameters(), args.base_lr)
    schedule = make_schedule(args, optimizer)
    schedule.step_epoch(2)
    schedule.step_batch(300)
    return type(schedule), schedule.get_last_lr()[0]


def test_schedules():
    assert rate("--base-lr", 0.02) == (FixedLR, 0.02)
    eden = ("--lr-schedule", "eden", "--base-lr", 0.02)
    kind, lr = rate(*eden)
    by_batch, by_epoch = (1 + (300 / 7500) ** 2) ** -0.25, (1 + (2 / 3.5) ** 2) ** -0.25
    assert kind is Eden and lr == pytest.approx(0.02 * by_batch * by_epoch * 0.8)
    for flag, value in (("--lr-batches", 100), ("--lr-epochs", 1), ("--warmup-batches", 100)):
        assert rate(*eden, flag, value)[1] != pytest.approx(lr)
