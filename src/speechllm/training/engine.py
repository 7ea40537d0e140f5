"""What holds model and optimizer of one rank: how gradients are added up and used."""

import gc
import warnings
from collections.abc import Iterable, Iterator
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
        self.sent: set[Tensor] = set()  # parameters whose gradients DDP has in this step
        if ranks.world_size > 1:
            for parameter in trained(model):
                parameter.register_post_accumulate_grad_hook(self._note_sent)
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
        self.sent.clear()
        return nullcontext() if last or self.ranks.world_size == 1 else self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _note_sent(self, parameter: Tensor) -> None:
        if self.model.require_backward_grad_sync:
            self.sent.add(parameter)

    def recover(self) -> None:
        """After running out of memory: free it, and send the gradients that others wait for.

        In the forward pass none was sent; in the backward pass some were, and no other pass
        may send them again. The step will be skipped: zeros will do.
        """
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.ranks.world_size == 1:
            return
        if self.sent:
            zero_of(p for p in trained(self.module) if p not in self.sent).backward()
        else:
            self.model().backward()

    def gradients_finite(self) -> Tensor:
        """(), on the device: whether all are, on all ranks; fp16's scaler looks at its own."""
        gradients = [p.grad for p in trained(self.module) if p.grad is not None]
        if self.scaler.is_enabled():
            gradients = []
        return nn.utils.get_total_norm(gradients).isfinite()

    def step(self) -> bool:
        """Update the parameters and forget the gradients; whether these were finite after all."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skip_step()
        return True

    def skip_step(self) -> None:
        """Forget the gradients."""
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


def autocast_dtype(use_fp16: bool, use_bf16: bool) -> torch.dtype:
    """What the flags say, for autocast and for weights that are not trained."""
    if use_bf16:
        return torch.bfloat16
    return torch.float16 if use_fp16 else torch.float32


class WithStandIn(nn.Module):
    """A module, and a pass through all that is trained in it for those who have no batch."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        """Without inputs: 0, whose gradients are zeros."""
        if inputs or options:
            return self.module(*inputs, **options)
        return zero_of(trained(self.module))


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def zero_of(parameters: Iterable[Tensor]) -> Tensor:
    """0, to which each parameter contributes."""
    return sum(p.sum() * 0 for p in parameters)


def wrap_ddp(model: nn.Module, ranks: Ranks) -> nn.Module:
    if ranks.world_size == 1:
        return model
    # Gradients of the frontend's convolutions have channels last: another layout, no other result.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # With `device_ids` DDP would move what the model wants on the CPU: lengths, ids and labels.
    return nn.parallel.DistributedDataParallel(WithStandIn(model), broadcast_buffers=False)
