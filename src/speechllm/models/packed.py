"""LLMs with bfloat16 weights in oneDNN's memory layout, for decoding on CPUs.

`F.linear` rearranges the weight in every call, which for a few tokens takes about as long as the
product. torch.compile's frozen graphs use the same operators.
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """Linear layer without gradients, with a packed bfloat16 weight: x (…, K) -> (…, N)."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, None))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16).contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linear_layers(llm: nn.Module) -> None:
    """Replace an LLM's linear layers in bfloat16; those of LoRA and other dtypes stay."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for name, layer in list(llm.named_modules()):
        if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16:
            llm.set_submodule(name, PackedLinear(layer))
