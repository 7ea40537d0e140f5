"""LLMs with bfloat16 weights in oneDNN's memory layout, for decoding on CPUs.

Products with a few tokens are faster than those of `F.linear`, which takes weights as they are.
The operators are those of torch.compile's frozen graphs.
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
        x = x.to(torch.bfloat16).contiguous()  # autocast does not do it for this operator
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linear_layers(llm: nn.Module) -> None:
    """Replace the bfloat16 linear layers of an LLM without LoRA, if oneDNN supports the CPU.

    A head that shares its weight with the embedding becomes a second copy.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for name, layer in list(llm.named_modules()):
        if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16:
            llm.set_submodule(name, PackedLinear(layer))
