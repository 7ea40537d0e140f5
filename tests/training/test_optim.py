"""Optimizers by name, groups of parameters, and schedules against their formulas."""

from functools import partial

import pytest
import torch
from tiny_speech_llm import speech_llm
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from speechllm.errors import InputError
from speechllm.training.config import TrainConfig
from speechllm.training.engine import Engine
from speechllm.training.optim import (
    Schedule,
    eden,
    load_keeping_flags,
    lr_factor,
    make_optimizer,
    param_groups,
)
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
    config = TrainConfig(optimizer=name, base_lr=0.02)
    optimizer = make_optimizer(config, param_groups(config, model))
    [group] = optimizer.param_groups
    assert type(optimizer) is kind and group["lr"] == 0.02
    assert len(group["params"]) == 1 and group["params"][0] is model.weight


def trained_by_rate(model, **options):
    """Return the names of the parameters of each learning rate."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups(TrainConfig(base_lr=0.01, **options), model)
    return {round(one["lr"], 9): [names[p] for p in one["params"]] for one in groups}


def test_parts_of_a_model_have_their_own_learning_rates():
    model = speech_llm(frozen=(True, False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained_by_rate(model) == {0.01: trained}
    found = trained_by_rate(model, projector_lr=2.0, lora_lr=0.5, encoder_lr=0.1)
    parts = {0.02: "encoder_projector.", 0.005: "llm.", 0.001: "encoder.1."}
    assert found == {
        rate: [name for name in trained if name.startswith(part)] for rate, part in parts.items()
    }
    assert trained_by_rate(model, projector_lr=2.0, lora_lr=2.0).keys() == {0.02, 0.01}
    assert all(".lora_" in name for name in found[0.005])


@pytest.mark.parametrize("option", ["projector_lr", "lora_lr", "encoder_lr"])
def test_a_rate_of_a_part_that_is_not_trained_is_an_error(option):
    model = speech_llm(use_lora=False)
    model.encoder_projector.requires_grad_(False)
    flag = f"--{option.replace('_', '-')}"
    with pytest.raises(InputError, match=f"^{flag} 0.5: this part of the model is not trained$"):
        param_groups(TrainConfig(**{option: 0.5}), model)


def step(max_grad_norm=0.0, dtype=torch.float32, gradient=4.0, **options):
    """Return a parameter after two steps from 1, with gradients of 0.01 and then `gradient`."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = make_optimizer(TrainConfig(base_lr=0.1, **options), model.parameters())
    engine = Engine(model, optimizer, dtype=dtype, max_grad_norm=max_grad_norm)
    for value in (0.01, gradient):
        engine.backward(value * model.weight.sum())
        engine.step()
    return model.weight.item()


def test_options_of_the_optimizers_change_their_steps():
    adamw = partial(step, optimizer="adamw")
    assert adamw(weight_decay=0.01) == adamw() > adamw(weight_decay=0.5)
    assert adamw(betas="0.9,0.999") == adamw() != adamw(betas="0.5,0.999")
    assert step(betas="0.9,0.98") == step() != step(betas="0.9,0.5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_gradients_are_scaled_down_to_the_maximal_norm(dtype):
    clipped = partial(step, optimizer="adamw", dtype=dtype)
    assert clipped(max_grad_norm=1.0) == pytest.approx(clipped(gradient=1.0), rel=1e-4)
    assert clipped(max_grad_norm=5.0) == clipped() != clipped(max_grad_norm=1.0)


def test_flags_precede_the_options_of_a_checkpoint():
    def optimizer(rate, decay):
        config = TrainConfig(optimizer="adamw", base_lr=rate, weight_decay=decay)
        made = make_optimizer(config, [nn.Parameter(torch.ones(1))])
        return Schedule(made).optimizer

    saved, resumed = optimizer(0.1, 0.2).state_dict(), optimizer(0.3, 0.4)
    load_keeping_flags(resumed, lambda: resumed.load_state_dict(saved))
    [group] = resumed.param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (0.3, 0.4)


@pytest.mark.parametrize("name, reference", [
    ("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup),
])  # fmt: skip
@pytest.mark.parametrize("warmup", [0, 4])
def test_linear_and_cosine_equal_transformers(name, reference, warmup):
    config = TrainConfig(lr_schedule=name, warmup_batches=warmup)
    ours = Schedule(two_groups(), lr_factor(config, num_steps=20))
    theirs = reference(two_groups(torch.optim.AdamW), warmup, 20)
    for batch in range(21):
        ours.step_batch(batch)
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), abs=1e-12)
        theirs.optimizer.step()
        theirs.step()
    ours.step_batch(25)  # epochs may be a little longer than was estimated
    assert ours.get_last_lr() == [0.0, 0.0]


def test_a_training_within_the_warmup_is_an_error():
    sentence = "^--warmup-batches 20 must be below the 20 steps of this run .--lr-schedule li"
    with pytest.raises(InputError, match=sentence):
        lr_factor(TrainConfig(lr_schedule="linear", warmup_batches=20), num_steps=20)


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
    schedule = Schedule(two_groups(optimizer_class), partial(eden, **option))
    schedule.step_epoch(epoch)
    schedule.step_batch(batch)
    assert schedule.get_last_lr() == pytest.approx([0.01 * factor, 0.05 * factor], rel=1e-9)
    assert schedule.optimizer.param_groups[1]["lr"] == schedule.get_last_lr()[1]


@both
def test_resuming_keeps_the_initial_rates(optimizer_class):
    schedule = Schedule(two_groups(optimizer_class), eden)
    schedule.step_epoch(3)
    schedule.step_batch(9000)
    resumed_optimizer = two_groups(optimizer_class)
    resumed_optimizer.load_state_dict(schedule.optimizer.state_dict())
    resumed = Schedule(resumed_optimizer, eden)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr()
    for one in (schedule, resumed):
        one.step_batch(9001)
    assert resumed.get_last_lr() == schedule.get_last_lr()
