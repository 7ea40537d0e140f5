"""LoRA (arXiv 2106.09685) with peft's result, in fewer operations and less memory.

For the backward pass, peft's layer stores its input after dropout and the dropout mask in the
input's dtype; it scales and adds tensors of the output's width. Here the input itself is stored
with a mask of one byte per element, scaling happens in the width of LoRA's rank, and the update is
added in place. The feed-forward module stores only its two widest inputs and recomputes their
product. Parameters and their names are peft's.
"""

import warnings

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from speechllm.cli import comma_list
from speechllm.errors import InputError
from speechllm.models.config import LORA_TARGETS, ONE_ENCODER, ModelConfig

ADAPTER = "default"


def with_lora(llm: nn.Module, config: ModelConfig = ONE_ENCODER) -> PeftModel:
    """Add LoRA matrices to a frozen LLM; only they are trainable.

    Raises:
      InputError: the LLM lacks a layer of --lora-targets.
    """
    options = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_targets(llm, config.lora_targets),
        task_type="CAUSAL_LM",
    )
    options._register_custom_module({nn.Linear: LoraLinear})
    with warnings.catch_warnings():  # peft 0.21 uses a deprecated name of transformers 5.23
        warnings.simplefilter("ignore", FutureWarning)
        llm = get_peft_model(llm, options)
    for module in llm.modules():
        if type(module) is Qwen2MLP and module.config.hidden_act == "silu":
            module.__class__ = LoraMLP
    return llm


def _targets(llm: nn.Module, names: str) -> list[str]:
    """Return the names of the layers with LoRA; LLMs may lack some of the default ones."""
    head = llm.get_output_embeddings()  # its weights are used alone, see chunked_cross_entropy
    existing = {
        name.rpartition(".")[2]
        for name, layer in llm.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    if unknown := sorted(set(comma_list(names)) - existing):
        if names != LORA_TARGETS:
            raise InputError(
                f"--lora-targets {names}: the LLM has no linear layer {unknown[0]} inside, but "
                f"{', '.join(sorted(existing))}"
            )
    return comma_list(names)


class LoraLinear(lora.Linear):
    """A frozen Linear with LoRA matrices: x W' + b + scaling * dropout(x) A' B'.

    The result equals peft's up to rounding; dropout uses other random numbers.
    """

    @property
    def plain(self) -> bool:
        """True if peft's own forward is to be used, which torch.compile fuses."""
        return self.disable_adapters or self.merged or torch.compiler.is_compiling()

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return super().forward(x)
        base = self.base_layer
        result = F.linear(x, base.weight)  # a bias would make it a view, slow to update in place
        update = self.update_of(x, result.dtype)
        return _Update.apply(result, base.bias, x.to(result.dtype), *update)

    def update_of(self, x: Tensor, dtype: torch.dtype) -> tuple:
        """Return the dropout mask (like x, or None), A and B in `dtype`, and the scale."""
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        p = getattr(self.lora_dropout[ADAPTER], "p", 0.0) if self.training else 0.0
        keep = _sample_mask(x, p) if p else None
        return keep, a.to(dtype), b.to(dtype), self.scaling[ADAPTER] / (1 - p)


class LoraMLP(Qwen2MLP):
    """Qwen2's feed-forward module, with LoRA in its three Linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj
        if getattr(down, "plain", True):  # a plain Linear after peft's `unload`
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        weight = down.base_layer.weight.to(gate.dtype)
        return _DownUpdate.apply(gate, up, weight, *down.update_of(up, gate.dtype))


def _sample_mask(x: Tensor, p: float) -> Tensor:
    """Sample a mask like x that is False with probability p."""
    if x.is_cuda:
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    # 16 random bits per element: 4 times as fast as bernoulli_ on a CPU.
    n = x.numel()
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:n] >= round(p * 2**16) - 2**15).view_as(x)


class _Update(torch.autograd.Function):
    """result (…, M) += bias + scale * where(keep, x, 0) A' B'; x (…, N), bias frozen."""

    @staticmethod
    def forward(ctx, result, bias, x, keep, a, b, scale):
        low = _low(_kept(x, keep), a, scale)
        ctx.save_for_backward(x, keep, low, a, b)
        ctx.scale = scale
        ctx.mark_dirty(result)
        result.flatten(0, -2).addmm_(low, b.t())
        return result if bias is None else result.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, keep, low, a, b = ctx.saved_tensors
        return grad, None, *_backward(grad, _kept(x, keep), keep, low, a, b, ctx.scale)


class _DownUpdate(torch.autograd.Function):
    """x W' + scale * where(keep, x, 0) A' B' with x = silu(gate) * up (…, N), W (M, N) frozen."""

    @staticmethod
    def forward(ctx, gate, up, weight, keep, a, b, scale):
        x = F.silu(gate).mul_(up)
        result = x @ weight.t()
        low = _low(_kept(x, keep, out=x), a, scale)
        ctx.save_for_backward(gate, up, weight, keep, low, a, b)
        ctx.scale = scale
        result.flatten(0, -2).addmm_(low, b.t())
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up, weight, keep, low, a, b = ctx.saved_tensors
        grad = grad.contiguous()
        activated = F.silu(gate)
        x = activated * up
        x = _kept(x, keep, out=x)
        grad_x, *lora_grads = _backward(grad, x, keep, low, a, b, ctx.scale)
        grad_x.flatten(0, -2).addmm_(grad.flatten(0, -2), weight)
        grad_up = activated.mul_(grad_x)
        grad_gate = torch.ops.aten.silu_backward(grad_x.mul_(up), gate)
        return grad_gate, grad_up, None, *lora_grads


def _low(x: Tensor, a: Tensor, scale: float) -> Tensor:
    """Project x to LoRA's rank: (rows of x, R)."""
    return (x.flatten(0, -2) @ a.t()).mul_(scale)


def _backward(
    grad: Tensor, x: Tensor, keep: Tensor | None, low: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple:
    """Return the gradients of x before dropout, keep, A, B and scale; `x` is after dropout."""
    grad = grad.flatten(0, -2)
    grad_low = (grad @ b).mul_(scale)
    grad_a = grad_low.t() @ x.flatten(0, -2)
    grad_x = (grad_low @ a).view_as(x)
    return _kept(grad_x, keep, out=grad_x), None, grad_a, grad.t() @ low, None


def _kept(x: Tensor, keep: Tensor | None, out: Tensor | None = None) -> Tensor:
    return x if keep is None else torch.where(keep, x, x.new_zeros(()), out=out)
