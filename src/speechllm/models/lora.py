"""LoRA (arXiv 2106.09685) with the same result as peft, in fewer operations and less memory.

For the backward pass, peft's layer stores both the input after dropout and the dropout mask in the
input's dtype, and it scales and adds tensors of the output's width. Here the input itself is
stored with a mask of one byte per element, tensors of LoRA's rank are scaled, and the update is
added in place. The feed-forward module stores only the gate and up projections and recomputes their
product. A norm takes one kernel, a rotary embedding three, and one converts all LoRA matrices of a
decoder layer to autocast's dtype. Parameters have peft's names.
"""

import warnings

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from speechllm.cli import comma_list
from speechllm.errors import InputError
from speechllm.models.config import LORA_TARGETS, ONE_ENCODER, ModelConfig
from speechllm.precision import autocast_dtype_of

ADAPTER = "default"
QWEN_ROTARY = modeling_qwen2.apply_rotary_pos_emb


def with_lora(llm: nn.Module, config: ModelConfig = ONE_ENCODER) -> PeftModel:
    """Add LoRA matrices, the only trainable parameters, to a frozen LLM.

    A layer in --lora-targets that the LLM lacks raises InputError.
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
        elif type(module) is Qwen2RMSNorm:
            module.__class__ = FusedRMSNorm
    for layer in llm.get_base_model().get_decoder().layers:
        layer.register_forward_pre_hook(_cast_matrices)
    modeling_qwen2.apply_rotary_pos_emb = apply_rotary  # module-level: for all Qwen2 LLMs
    return llm


def _targets(llm: nn.Module, names: str) -> list[str]:
    """Return the names of the layers with LoRA; LLMs may lack some of the default names."""
    head = llm.get_output_embeddings()  # used by its weight only, see chunked_cross_entropy
    existing = {
        name.rpartition(".")[2]
        for name, layer in llm.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    if unknown := sorted(set(comma_list(names)) - existing):
        if names != LORA_TARGETS:
            raise InputError(
                f"--lora-targets {names}: LoRA cannot be added to {unknown[0]}, only to "
                f"{', '.join(sorted(existing))}"
            )
    return comma_list(names)


class LoraLinear(lora.Linear):
    """Frozen Linear with LoRA matrices: x W' + b + scaling * dropout(x) A' B'.

    Results equal peft's up to rounding, except for dropout's random numbers.
    """

    @property
    def plain(self) -> bool:
        """True if `forward` uses peft's code, which torch.compile can fuse."""
        return self.disable_adapters or self.merged or torch.compiler.is_compiling()

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (R, N) and B (M, R)."""
        return self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return super().forward(x)
        x = x.to(autocast_dtype_of(x))
        base = self.base_layer
        return _Linear.apply(x, base.weight.to(x.dtype), base.bias, *self.update_of(x.dtype))

    def update_of(self, dtype: torch.dtype) -> tuple:
        """Return A and B in `dtype`, the scale, and the dropout probability."""
        # Only in training: validation must not use stale copies left by an error.
        cast = self.__dict__.pop("cast", None) if torch.is_grad_enabled() else None
        a, b = cast or self.matrices
        p = getattr(self.lora_dropout[ADAPTER], "p", 0.0) if self.training else 0.0
        return a.to(dtype), b.to(dtype), self.scaling[ADAPTER], p


class LoraMLP(Qwen2MLP):
    """Qwen2's feed-forward module, with LoRA in its three Linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj
        if getattr(down, "plain", True):  # a plain Linear after peft's `unload`
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        weight = down.base_layer.weight.to(gate.dtype)
        return _DownLinear.apply(gate, up, weight, *down.update_of(gate.dtype))


class FusedRMSNorm(Qwen2RMSNorm):
    """Qwen2's norm as one GPU kernel instead of six, and one for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys (B, H, L, C) by cos and sin (B, L, C), as Qwen2's function does."""
    if torch.compiler.is_compiling():
        return QWEN_ROTARY(q, k, cos, sin)
    cos, sin = cos[:, None], sin[:, None, :, : sin.size(-1) // 2]  # both halves are the same
    rotate = _Rotary.apply if torch.is_grad_enabled() else _rotate
    return rotate(q, cos, sin), rotate(k, cos, sin)


def _cast_matrices(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Convert all LoRA matrices of a decoder layer to autocast's dtype before its forward pass.

    They are too small for one kernel each. Per layer, not per model: DDP sends the gradients of
    the last layers during the backward pass of the first ones.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    parts = [part for part in layer.modules() if isinstance(part, LoraLinear) and not part.plain]
    matrices = [matrix for part in parts for matrix in part.matrices]
    dtype = autocast_dtype_of(inputs[0])
    if matrices and matrices[0].dtype != dtype:
        cast = iter(_Cast.apply(dtype, *matrices))
        for part in parts:
            part.cast = next(cast), next(cast)


class _Cast(torch.autograd.Function):
    """Converts tensors to `dtype` with one kernel, and their gradients back with another."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtype = tensors[0].dtype
        return _cast(tensors, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, *_cast(grads, ctx.dtype)


def _cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(x, dtype=dtype) for x in tensors)
    torch._foreach_copy_(copies, tensors)
    return copies


class _Rotary(torch.autograd.Function):
    """Rotates x (B, H, L, C) in 3 kernels and its gradient back in 3, instead of 5 and about 7."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """Rotate pairs of channels (i, i + C / 2); `sign` -1 for the inverse rotation."""
    result = x * cos
    (first, second), (low, high) = x.chunk(2, dim=-1), result.chunk(2, dim=-1)
    low.addcmul_(second, sin, value=-sign)
    high.addcmul_(first, sin, value=sign)
    return result


class _Linear(torch.autograd.Function):
    """x W' + bias + scale * dropout(x) A' B' for x (…, N) and frozen W (M, N) and bias."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, p):
        kept, mask = _dropout(x, p)
        low = _low(kept, a, scale, p)
        ctx.save_for_backward(x, weight, mask, low, a, b)
        ctx.scale, ctx.p = scale, p
        result = F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
        result.flatten(0, -2).addmm_(low, b.t())
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, *update = ctx.saved_tensors
        x = _kept(x, update[0], ctx.p)
        grad_x, *grads = _backward(grad, x, weight, update, ctx.scale, ctx.p)
        return grad_x, None, None, *grads, None, None


class _DownLinear(torch.autograd.Function):
    """x W' + scale * dropout(x) A' B' for x = silu(gate) * up (…, N) and frozen W (M, N)."""

    @staticmethod
    def forward(ctx, gate, up, weight, a, b, scale, p):
        x = F.silu(gate).mul_(up)
        result = x @ weight.t()
        kept, mask = _dropout(x, p, out=x)
        low = _low(kept, a, scale, p)
        ctx.save_for_backward(gate, up, weight, mask, low, a, b)
        ctx.scale, ctx.p = scale, p
        result.flatten(0, -2).addmm_(low, b.t())
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up, weight, *update = ctx.saved_tensors
        activated = F.silu(gate)
        x = activated * up
        x = _kept(x, update[0], ctx.p, out=x)
        grad_x, *grads = _backward(grad, x, weight, update, ctx.scale, ctx.p)
        grad_up = activated.mul_(grad_x)
        grad_gate = torch.ops.aten.silu_backward(grad_x.mul_(up), gate)
        return grad_gate, grad_up, None, *grads, None, None


def _low(kept: Tensor, a: Tensor, scale: float, p: float) -> Tensor:
    """Return the input after dropout, projected to LoRA's rank: (rows, R)."""
    return _scaled_mm(kept.flatten(0, -2), a.t(), _scale(kept, scale, p))


def _scaled_mm(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Return scale * x @ y, with one kernel."""
    return torch.addmm(x.new_empty(1), x, y, beta=0, alpha=scale)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, update: list[Tensor], scale: float, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input (before dropout), A and B.

    Args:
      x: input after dropout.
      update: dropout mask or None, low-rank projection of x, A, and B.
    """
    mask, low, a, b = update
    shape, grad = x.shape, grad.flatten(0, -2)
    grad_low = _scaled_mm(grad, b, _scale(x, scale, p))
    grad_a = grad_low.t() @ x.flatten(0, -2)
    grad_x = (grad_low @ a).view(shape)
    grad_x = _kept(grad_x, mask, p, out=grad_x)
    grad_x.flatten(0, -2).addmm_(grad, weight)
    return grad_x, grad_a, grad.t() @ low


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _dropout(x: Tensor, p: float, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Zero elements with probability p (see `_kept`); also return the mask of kept elements."""
    if not p:
        return x, None
    if on_gpu(x):
        return torch.native_dropout(x, p, True)
    mask = _sample_mask(x, p)
    return _kept(x, mask, p, out), mask


def _kept(x: Tensor, mask: Tensor | None, p: float, out: Tensor | None = None) -> Tensor:
    """Zero elements outside the mask; on GPUs, also scale by 1 / (1 - p), at no cost."""
    if mask is None:
        return x
    if on_gpu(x):
        return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - p))
    return torch.where(mask, x, x.new_zeros(()), out=out)


def _scale(x: Tensor, scale: float, p: float) -> float:
    """Return LoRA's scale, times 1 / (1 - p) where `_kept` does not apply it."""
    return scale if on_gpu(x) else scale / (1 - p)


def _sample_mask(x: Tensor, p: float) -> Tensor:
    """Sample a CPU mask of x's shape that is False with probability p.

    Uses 16 random bits per element, 4 times as fast as bernoulli_.
    """
    n = x.numel()
    bits = torch.empty(-(-n // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:n] >= round(p * 2**16) - 2**15).view_as(x)
