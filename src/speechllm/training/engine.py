"""What holds model and optimizer of one rank: how gradients are added up and used."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from speechllm.checkpoint_file import copy_to_cpu
from speechllm.training.distributed import Ranks


class Engine:
    """A whole copy of the model on each rank, DDP among them, autocast and a gradient scaler."""

    # Whether all ranks must take part in validation, and in reading values and the optimizer.
    divided = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks = Ranks(),
        dtype: torch.dtype = torch.float32,
    ):
        """`dtype` is autocast's; float16 has a scaler of gradients."""
        self.module, self.optimizer, self.ranks, self.dtype = model, optimizer, ranks, dtype
        self.model = wrap_ddp(model, ranks)  # to be called in training
        device = ranks.device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=1.0, enabled=dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(
            self.ranks.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    def gathering(self, last: bool) -> AbstractContextManager:
        """Around forward and backward: only the last of a step's backward passes sends gradients.

        DDP averages them over the ranks.
        """
        return nullcontext() if last or self.ranks.world_size == 1 else self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Update the parameters and forget the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def value(self, parameter: Tensor) -> Tensor:
        """A copy of a parameter, whole and on the CPU."""
        return copy_to_cpu(parameter)

    def state_dict(self) -> dict:
        """What a checkpoint keeps beside the model."""
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if state["grad_scaler"]:  # empty after a training without fp16
            self.scaler.load_state_dict(state["grad_scaler"])


def wrap_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    if ranks.world_size == 1:
        return model
    # Gradients of the frontend's convolutions have channels last: another layout, no other result.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # With `device_ids` DDP would move what the model wants on the CPU: lengths, ids and labels.
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
