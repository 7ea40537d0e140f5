"""LLMs with int8 weights for decoding on CPUs: faster, and a quarter of the size of float32.

Each weight row, also in embedding and head, has a scale: its largest absolute value divided by 127.
A linear layer quantizes its input rows in the same way, multiplies integers and rescales, so an
utterance's result does not depend on its batch.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

INT8_FILE = "model-int8.safetensors"  # replaces model.safetensors
SCALE = "_scale"  # suffix added to a weight's name


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight (N, K) to int8 (N, K) with float32 scales (N, 1)."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """Linear layer with int8 W (N, K) and a scale per row: x (…, K) -> x W' + b (…, N)."""

    def __init__(self, rows: int, columns: int, bias: bool):
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(rows, 1))
        self.register_buffer("bias", torch.empty(rows) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # _int_mm has more constraints on GPUs
            weight = (self.weight * self.weight_scale).to(x.dtype)
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        integers, scale = quantize(x.reshape(-1, x.size(-1)))
        out = torch._int_mm(integers, self.weight.t()).float()
        out.mul_(scale).mul_(self.weight_scale.t())
        out = out if self.bias is None else out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """Embedding with an int8 weight: ids (…) -> rows (…, K) in `dtype`."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, embed_scale: float = 1.0):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = rows, columns, dtype
        self.embed_scale = embed_scale  # Gemma's factor
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(rows, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.weight_scale[ids]).to(self.dtype) * self.embed_scale


def int8_state(llm: nn.Module) -> dict[str, Tensor]:
    """Return the content of INT8_FILE for an LLM, without a duplicate of a tied head."""
    state = {}
    for name, value in llm.named_parameters():
        if value.dim() == 2:
            state[name], state[name + SCALE] = quantize(value.detach())
        else:
            state[name] = value.detach().float()
    return state


def load_int8(path: str, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """Load an int8 LLM from a directory; norms and embeddings are computed in `dtype`."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with no_init_weights():
        llm = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    for name, module in list(llm.named_modules()):
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            llm.set_submodule(name, Int8Linear(rows, columns, module.bias is not None))
        elif isinstance(module, nn.Embedding):
            scale = getattr(module, "scalar_embed_scale", 1.0)
            llm.set_submodule(name, Int8Embedding(*module.weight.shape, dtype, scale))
    state = load_file(f"{path}/{INT8_FILE}")
    if config.tie_word_embeddings:
        for name in ("weight", "weight" + SCALE):
            state[f"lm_head.{name}"] = state[f"model.embed_tokens.{name}"]
    floats = dict(llm.named_parameters())
    state = {name: v.to(dtype) if name in floats else v for name, v in state.items()}
    llm.load_state_dict(state, assign=True)
    return llm.eval()


def is_int8(llm: nn.Module) -> bool:
    return isinstance(llm.get_input_embeddings(), Int8Embedding)
