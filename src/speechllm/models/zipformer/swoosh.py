"""Swoosh activations (arXiv 2310.11230, section 3.4), using k2's kernels if installed."""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import k2
except ImportError:  # optional: only speed differs
    k2 = None


class _Swoosh(torch.autograd.Function):
    """Computes log(1 + exp(x - shift)) - 0.08 x - offset; saves only x for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        return F.softplus(x - shift).sub_(x, alpha=0.08).sub_(offset)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return (x - ctx.shift).sigmoid_().sub_(0.08).mul_(grad), None, None


def swoosh_l(x: Tensor) -> Tensor:
    """Return log(1 + exp(x - 4)) - 0.08 x - 0.035, element-wise."""
    if k2 is not None:
        return k2.swoosh_l(x) if x.requires_grad else k2.swoosh_l_forward(x)
    return _Swoosh.apply(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """Return log(1 + exp(x - 1)) - 0.08 x - 0.313261687, element-wise."""
    if k2 is not None:
        return k2.swoosh_r(x) if x.requires_grad else k2.swoosh_r_forward(x)
    return _Swoosh.apply(x, 1.0, 0.313261687)
