"""Engine: model, optimizer and gradient scaler of one rank; several ranks use DDP."""

import gc
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from speechllm.checkpoints import copy_to_cpu
from speechllm.distributed import DistEnv
from speechllm.precision import autocast

GROW_BELOW = ((400, 32.0), (100, 8.0), (25, 2.0))  # (N, limit): checked every N batches


class Engine:
    """Model and optimizer of one rank, with DDP, autocast and a gradient scaler."""

    # True if validating and reading parameters or optimizer state involve all ranks.
    is_sharded = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dist_env: DistEnv = DistEnv(),
        dtype: torch.dtype = torch.float32,
        max_grad_norm: float = 0.0,
    ):
        """
        Args:
          dtype: autocast dtype; float16 uses a gradient scaler.
          max_grad_norm: clip the norm of all gradients to this value; 0: no clipping.
        """
        self.module, self.optimizer, self.dist_env, self.dtype = model, optimizer, dist_env, dtype
        self.max_grad_norm = max_grad_norm
        self.model = wrap_ddp(model, dist_env)  # for calls in training
        self.sent: set[Tensor] = set()  # parameters whose gradients DDP received in this step
        if dist_env.world_size > 1:
            for parameter in trained(model):
                parameter.register_post_accumulate_grad_hook(self._note_sent)
        device = dist_env.device.type
        self.scaler = torch.amp.GradScaler(device, init_scale=1.0, enabled=dtype == torch.float16)

    def autocast(self) -> AbstractContextManager:
        return autocast(self.dist_env.device, self.dtype)

    def grad_sync(self, last: bool) -> AbstractContextManager:
        """Return a context for forward and backward; it averages gradients only if `last`."""
        self.sent.clear()
        return nullcontext() if last or self.dist_env.world_size == 1 else self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _note_sent(self, parameter: Tensor) -> None:
        if self.model.require_backward_grad_sync:
            self.sent.add(parameter)

    def recover_from_oom(self) -> None:
        """Free memory, and send the gradients that other ranks wait for; the step is skipped.

        If the forward pass failed, no gradients have been sent. If the backward pass failed, some
        have been, and must not be sent again. As the step is skipped, zeros suffice.
        """
        gc.collect()
        if self.dist_env.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.dist_env.world_size == 1:
            return
        if self.sent:
            zero_of(p for p in trained(self.module) if p not in self.sent).backward()
        else:
            self.model().backward()

    def gradients_finite(self) -> Tensor:
        """Return a tensor (): true if all gradients are finite, and always with fp16's scaler."""
        gradients = [p.grad for p in trained(self.module) if p.grad is not None]
        if self.scaler.is_enabled():
            gradients = []
        return nn.utils.get_total_norm(gradients).isfinite()

    def step(self) -> bool:
        """Update the parameters and clear the gradients; return false if the update was skipped."""
        if self.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(trained(self.module), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.zero_grad()
        return True

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def skip_step(self) -> None:
        """Clear the gradients without updating the parameters."""
        self.zero_grad()

    def full_param(self, parameter: Tensor) -> Tensor:
        return copy_to_cpu(parameter)

    def state_dict(self) -> dict:
        """Return the states of the optimizer and the gradient scaler, for a checkpoint."""
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if state["grad_scaler"]:  # empty if trained without fp16
            self.scaler.load_state_dict(state["grad_scaler"])


class DDPWrapper(nn.Module):
    """Wrapper whose forward pass without inputs returns 0, for ranks that are out of memory."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **options):
        """Call the module; without inputs, return 0, whose gradients are zeros."""
        if inputs or options:
            return self.module(*inputs, **options)
        return zero_of(trained(self.module))


def adjust_grad_scale(scaler: torch.amp.GradScaler, batch_idx: int) -> None:
    """Double a gradient scale that is below its limit, as in the published recipe.

    A scale below 1e-5 raises RuntimeError.
    """
    if not scaler.is_enabled() or batch_idx % 25:
        return
    scale = scaler.get_scale()
    limit = next(limit for n, limit in GROW_BELOW if batch_idx % n == 0)
    if scale < limit:
        scaler.update(scale * 2.0)
    if scale < 0.01:
        logging.warning(f"Grad scale is small: {scale}")
    if scale < 1.0e-5:
        raise RuntimeError(f"grad_scale is too small, exiting: {scale}")


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that require gradients."""
    return (p for p in module.parameters() if p.requires_grad)


def zero_of(parameters: Iterable[Tensor]) -> Tensor:
    """Return 0 with every parameter in its autograd graph."""
    return sum(p.sum() * 0 for p in parameters)


def wrap_ddp(model: nn.Module, dist_env: DistEnv) -> nn.Module:
    """Wrap the model in DDP if there are several ranks."""
    if dist_env.world_size == 1:
        return model
    # The gradients of the frontend's convolutions are channels_last; the result is the same.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # With `device_ids`, DDP would move lengths, ids and labels, which the model needs on the CPU.
    return nn.parallel.DistributedDataParallel(DDPWrapper(model), broadcast_buffers=False)


def check_outputs_finite(model: nn.Module) -> None:
    """Make every module check its output (--inf-check).

    Raises (later, from the forward pass):
      FloatingPointError: a module's output is not finite; the message names the first such module.
    """

    def check(module, _inputs, output, name):
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        for tensor in tensors:
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(
                        f"the output of {name} ({type(module).__name__}) is not finite"
                    )

    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: check(m, i, o, name or "the model"))
