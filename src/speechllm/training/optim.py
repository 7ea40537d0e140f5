"""Optimizers, and learning-rate schedules that follow from batch and epoch numbers.

    schedule = Eden(optimizer)
    schedule.step_epoch(epoch)      # at the start of each epoch: epochs completed
    schedule.step_batch(batch_idx)  # before each step: batches trained on in all epochs
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from speechllm.training.config import TrainConfig
from speechllm.training.scaled_adam import ScaledAdam


def make_optimizer(config: TrainConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer that --optimizer selects, for the parameters that require gradients."""
    parameters = [p for p in parameters if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.base_lr)
    return ScaledAdam(parameters, lr=config.base_lr, clipping_scale=2.0)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> "FixedLR":
    """Return the schedule that --lr-schedule selects."""
    if config.lr_schedule == "eden":
        return Eden(optimizer, config.lr_batches, config.lr_epochs, config.warmup_batches)
    return FixedLR(optimizer)


class FixedLR:
    """Constant learning rates; base class of the other schedules.

    The initial rate of a group is its `initial_lr` if set (torch saves it with the optimizer's
    state), else its `lr`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.batch, self.epoch = optimizer, 0, 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._set_lr()

    def factor(self) -> float:
        """Return the learning rate relative to the initial one."""
        return 1.0

    def step_batch(self, batch_idx: int) -> None:
        """Set the learning rates for a batch, counted from 0 over all epochs."""
        self.batch = batch_idx
        self._set_lr()

    def step_epoch(self, epoch: int) -> None:
        """Set the learning rates for an epoch; `epoch` is the number of completed ones."""
        self.epoch = epoch
        self._set_lr()

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """Return batch and epoch; the initial rates are in the optimizer's `state_dict`."""
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a `state_dict()`; load the optimizer's own first."""
        self.batch, self.epoch = state_dict["batch"], state_dict["epoch"]
        self._set_lr()

    def _set_lr(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor()


class Eden(FixedLR):
    """Learning rates that decay with batch b and epoch e, after a linear warm-up from half of them.

    lr · ((b² + B²) / B²)^(-1/4) · ((e² + E²) / E²)^(-1/4) · warm-up, from Yao et al.,
    "Zipformer", 2023, section 3.5, https://arxiv.org/abs/2310.11230.

    Args:
      lr_batches: B, batches after which the decay sets in.
      lr_epochs: E, likewise in epochs.
      warmup_batches: length of the warm-up; 0 for none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_batches: float = 7500,
        lr_epochs: float = 3.5,
        warmup_batches: float = 500,
    ):
        self.lr_batches, self.lr_epochs, self.warmup_batches = lr_batches, lr_epochs, warmup_batches
        super().__init__(optimizer)

    def factor(self) -> float:
        """Return decay by batches times decay by epochs times warm-up."""
        by_batch = (1 + (self.batch / self.lr_batches) ** 2) ** -0.25
        by_epoch = (1 + (self.epoch / self.lr_epochs) ** 2) ** -0.25
        if self.batch >= self.warmup_batches:
            return by_batch * by_epoch
        return by_batch * by_epoch * (0.5 + 0.5 * (self.batch / self.warmup_batches))
