"""Precision in training and decoding: float32, or autocast to float16 or bfloat16."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

LARGE_SIZE = 512  # hidden size of LLMs that are faster in bfloat16 on CPUs: see tests/README.md


def autocast_dtype(use_fp16: bool | None, use_bf16: bool | None) -> torch.dtype:
    """Return the dtype set by --use-fp16 and --use-bf16; bfloat16 takes precedence.

    Args:
      use_fp16: None means float16 if there is a GPU, else float32.
      use_bf16: None means false.
    """
    if use_bf16:
        return torch.bfloat16
    fp16 = torch.cuda.is_available() if use_fp16 is None else use_fp16
    return torch.float16 if fp16 else torch.float32


def auto_dtype(hidden_size: int) -> torch.dtype:
    """Return the fastest dtype for an LLM: bfloat16 if supported, else float16, on a CPU float32.

    Args:
      hidden_size: of the LLM; on a CPU, small LLMs are faster in float32.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if supported and hidden_size >= LARGE_SIZE else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return an autocast context for `dtype`; for float32, a null context."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def autocast_dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype used by autocast for products with x; without autocast, x's dtype."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def cast_frozen(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a frozen module's linear layers to `dtype` once; autocast would do it every step."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
