"""Learning-rate schedules, told where training stands: fixed, and Eden for training an encoder.

    schedule = Eden(optimizer)
    schedule.step_epoch(epoch)      # at the start of each epoch: how many were completed before
    schedule.step_batch(batch_idx)  # before each step: how many batches all epochs had so far
"""

import torch

from speechllm.errors import InputError


class FixedLR:
    """Every parameter group keeps its initial learning rate; also the base of other schedules.

    A group's initial rate is its `initial_lr` where it has one (as after a resumption: torch saves
    it with the optimizer's state), else its `lr`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.batch = 0
        self.epoch = 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._set_lr()

    def factor(self) -> float:
        """The present learning rate as a multiple of the initial one."""
        return 1.0

    def step_batch(self, batch_idx: int) -> None:
        """Set the learning rates for batch number `batch_idx`, counted from 0 over all epochs."""
        self.batch = batch_idx
        self._set_lr()

    def step_epoch(self, epoch: int) -> None:
        """Set the learning rates for an epoch; `epoch` is the number of those completed."""
        self.epoch = epoch
        self._set_lr()

    def get_last_lr(self) -> list[float]:
        """The present learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """Where training stands; the initial rates are in the optimizer's own `state_dict`."""
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a `state_dict()`; load the optimizer's own first."""
        self.batch, self.epoch = state_dict["batch"], state_dict["epoch"]
        self._set_lr()

    def _set_lr(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.factor()


class Eden(FixedLR):
    """Learning rates that fall with the batch b and the epoch e, after a linear warm-up.

    lr · ((b² + B²) / B²)^(-1/4) · ((e² + E²) / E²)^(-1/4) · warm-up. From Yao et al., "Zipformer",
    2023, section 3.5, https://arxiv.org/abs/2310.11230.

    Args:
      optimizer: any torch optimizer.
      lr_batches: B, the batches after which the rate begins to fall in earnest.
      lr_epochs: E, likewise in epochs.
      warmup_batches: length of the warm-up; 0 for none.
      warmup_start: factor at batch 0, from where it rises to 1.

    Raises:
      ValueError: for lr_batches or lr_epochs that are not positive.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr_batches: float = 7500,
        lr_epochs: float = 3.5,
        warmup_batches: float = 500,
        warmup_start: float = 0.5,
    ):
        if not (lr_batches > 0 and lr_epochs > 0):
            raise InputError(
                f"lr_batches and lr_epochs must be positive, got {lr_batches} and {lr_epochs}"
            )
        self.lr_batches = lr_batches
        self.lr_epochs = lr_epochs
        self.warmup_batches = warmup_batches
        self.warmup_start = warmup_start
        super().__init__(optimizer)

    def factor(self) -> float:
        """The decay by batches, times that by epochs, times the warm-up."""
        by_batch = (1 + (self.batch / self.lr_batches) ** 2) ** -0.25
        by_epoch = (1 + (self.epoch / self.lr_epochs) ** 2) ** -0.25
        if self.batch >= self.warmup_batches:
            return by_batch * by_epoch
        progress = self.batch / self.warmup_batches
        return by_batch * by_epoch * (self.warmup_start + (1 - self.warmup_start) * progress)
