"""Optimizers, and learning rate schedules that depend on batch and epoch numbers.

    schedule = Schedule(optimizer, lr_factor(config))
    schedule.step_epoch(epoch)      # at the start of each epoch: number of completed epochs
    schedule.step_batch(batch_idx)  # before each step: number of batches so far, in all epochs
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from speechllm.cli import flag_name
from speechllm.errors import InputError
from speechllm.training.config import TrainConfig
from speechllm.training.scaled_adam import ScaledAdam

PARTS = {  # options for learning rates relative to --base-lr -> names of their parameters
    "projector_lr": re.compile(r"encoder_projector\."),
    "lora_lr": re.compile(r".*\.lora_[AB]\."),
    "encoder_lr": re.compile(r"encoder\."),
}
FROM_FLAGS = ("initial_lr", "betas", "weight_decay")  # group options not taken from checkpoints


def param_groups(config: TrainConfig, model: nn.Module) -> list[dict]:
    """Return the trainable parameters, in order, in one group per learning rate.

    A learning rate for a part that is not trainable raises InputError.
    """
    factors = {name: getattr(config, name) for name in PARTS}
    groups: dict[float, list[nn.Parameter]] = {}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        part = next((part for part in PARTS if PARTS[part].match(name)), None)
        groups.setdefault(factors.get(part, 1.0), []).append(parameter)
    for part, factor in factors.items():
        if factor != 1 and not any(map(PARTS[part].match, trained)):
            raise InputError(f"{flag_name(part)} {factor:g}: this part of the model is not trained")
    return [{"params": some, "lr": config.base_lr * factor} for factor, some in groups.items()]


def make_optimizer(
    config: TrainConfig, parameters: Iterable[Tensor] | list[dict]
) -> torch.optim.Optimizer:
    """Return the optimizer selected by --optimizer, for parameters or parameter groups."""
    options = {"betas": config.adam_betas, "weight_decay": config.weight_decay}
    options = {name: value for name, value in options.items() if value is not None}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.base_lr, fused=True, **options)
    return ScaledAdam(parameters, lr=config.base_lr, clipping_scale=2.0, **options)


def load_keeping_flags(optimizer: torch.optim.Optimizer, load: Callable[[], None]) -> None:
    """Call `load`, which loads the optimizer's state, but keep the options set by flags."""
    kept = [{k: v for k, v in one.items() if k in FROM_FLAGS} for one in optimizer.param_groups]
    load()
    for group, options in zip(optimizer.param_groups, kept, strict=True):
        group.update(options)


# ---- schedules: (batches, epochs) so far -> factor for the initial learning rate

Factor = Callable[[int, int], float]


def fixed(batch: int, epoch: int) -> float:
    """Return 1: a constant learning rate."""
    return 1.0


def eden(
    batch: int,
    epoch: int,
    lr_batches: float = 7500,
    lr_epochs: float = 3.5,
    warmup_batches: float = 500,
) -> float:
    """Decay with batch b and epoch e, after a linear warm-up from 0.5.

    ((b² + B²) / B²)^(-1/4) · ((e² + E²) / E²)^(-1/4) · warm-up, for B = `lr_batches` and E =
    `lr_epochs`, from Yao et al., "Zipformer", 2023, https://arxiv.org/abs/2310.11230.
    """
    by_batch = (1 + (batch / lr_batches) ** 2) ** -0.25
    by_epoch = (1 + (epoch / lr_epochs) ** 2) ** -0.25
    if batch >= warmup_batches:
        return by_batch * by_epoch
    return by_batch * by_epoch * (0.5 + 0.5 * (batch / warmup_batches))


def linear(batch: int, epoch: int, warmup_batches: float, num_steps: int) -> float:
    """Rise from 0 to 1 in the warm-up, then fall to 0 at step `num_steps`, as in transformers."""
    if batch < warmup_batches:
        return batch / warmup_batches
    return max(0.0, (num_steps - batch) / (num_steps - warmup_batches))


def cosine(batch: int, epoch: int, warmup_batches: float, num_steps: int) -> float:
    """Rise like `linear`, then fall to 0 along half a cosine."""
    if batch < warmup_batches:
        return batch / warmup_batches
    return 0.5 - 0.5 * math.cos(math.pi * linear(batch, epoch, warmup_batches, num_steps))


SCHEDULES = {  # by name: the function and its options, from TrainConfig or num_steps
    "fixed": (fixed, ()),
    "eden": (eden, ("lr_batches", "lr_epochs", "warmup_batches")),
    "linear": (linear, ("warmup_batches", "num_steps")),
    "cosine": (cosine, ("warmup_batches", "num_steps")),
}


def needs_num_steps(config: TrainConfig) -> bool:
    """Return true if the schedule depends on the total number of steps."""
    return "num_steps" in SCHEDULES[config.lr_schedule][1]


def lr_factor(config: TrainConfig, num_steps: int | None = None) -> Factor:
    """Return the schedule selected by --lr-schedule as a function.

    Args:
      num_steps: total number of steps, if the schedule depends on it; a longer warm-up raises
        InputError.
    """
    function, names = SCHEDULES[config.lr_schedule]
    values = {**vars(config), "num_steps": num_steps}
    if "num_steps" in names and num_steps <= config.warmup_batches:
        raise InputError(
            f"--warmup-batches {config.warmup_batches:g} must be below the {num_steps} steps of "
            f"this run (--lr-schedule {config.lr_schedule})"
        )
    return partial(function, **{name: values[name] for name in names})


class Schedule:
    """Sets the learning rate of each group to its initial rate times a factor.

    A group's initial rate is its `initial_lr` if set, else its `lr`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Factor = fixed):
        self.optimizer, self.factor, self.batch, self.epoch = optimizer, factor, 0, 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._set_lr()

    def step_batch(self, batch_idx: int) -> None:
        """Set the learning rates for a batch, counted from 0 over all epochs."""
        self.batch = batch_idx
        self._set_lr()

    def step_epoch(self, epoch: int) -> None:
        """Set the learning rates for an epoch; `epoch` is the number of completed epochs."""
        self.epoch = epoch
        self._set_lr()

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a `state_dict()`; load the optimizer's state first."""
        self.batch, self.epoch = state_dict["batch"], state_dict["epoch"]
        self._set_lr()

    def _set_lr(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor(self.batch, self.epoch)
