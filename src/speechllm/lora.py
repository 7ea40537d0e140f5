"""LoRA (arXiv 2106.09685) as peft computes it, in fewer operations and a third of the memory.

peft's layer keeps for the backward pass a copy of its input after dropout, and the dropout's mask
in the input's type; it scales and adds in the width of the output. Here the input itself is kept,
with one byte of mask an element, scaling is done in the width of LoRA's rank, and the update is
added in place. Parameters and their names are peft's.
"""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

LORA = dict(
    r=64,
    lora_alpha=16,
    lora_dropout=0.05,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)


def with_lora(llm: nn.Module) -> PeftModel:
    """The LLM with LoRA matrices, which alone are trained."""
    config = LoraConfig(**LORA)
    config._register_custom_module({nn.Linear: LoraLinear})
    with warnings.catch_warnings():  # peft 0.21 calls transformers 5.23 by an old name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(llm, config)


class LoraLinear(lora.Linear):
    """A frozen Linear with LoRA matrices: x W' + b + scaling * dropout(x) A' B'.

    The result differs from peft's by rounding; dropout draws other random numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x)
        if torch.compiler.is_compiling():  # which joins peft's operations by itself
            return super().forward(x)
        result = self.base_layer(x)
        for name in self.active_adapters:
            dropout = self.lora_dropout[name]
            result = _add_update(
                result,
                x,
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self.scaling[name],
                getattr(dropout, "p", 0.0) if dropout.training else 0.0,
            )
        return result


def _add_update(
    result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float
) -> Tensor:
    """Add scaling * dropout(x) A' B' to `result` (…, M), in place and in its type.

    Args:
      x: (…, N); a: A (R, N); b: B (M, R); p: probability that dropout zeroes an element.
    """
    keep = None if p == 0 else _draw(x, p)
    kind = result.dtype
    return _Update.apply(result, x.to(kind), keep, a.to(kind), b.to(kind), scaling / (1 - p))


def _draw(x: Tensor, p: float) -> Tensor:
    """A mask like x, false with probability p."""
    if x.is_cuda:
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    # Four times as fast on a CPU: sixteen random bits an element.
    n = x.numel()
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:n] >= round(p * 2**16) - 2**15).view_as(x)


class _Update(torch.autograd.Function):
    """result (…, M) + factor * where(keep, x, 0) A' B', written into `result`; x (…, N)."""

    @staticmethod
    def forward(ctx, result, x, keep, a, b, factor):
        low = (_kept(x, keep).flatten(0, -2) @ a.t()).mul_(factor)  # (…, R)
        ctx.save_for_backward(x, keep, low, a, b)
        ctx.factor = factor
        ctx.mark_dirty(result)
        result.flatten(0, -2).addmm_(low, b.t())
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, keep, low, a, b = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_low = (flat @ b).mul_(ctx.factor)
        grad_a = grad_low.t() @ _kept(x, keep).flatten(0, -2)
        grad_x = _kept((grad_low @ a).view_as(x), keep)
        return grad, grad_x, None, grad_a, flat.t() @ low, None


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0.0)
