"""The Zipformer speech encoder (arXiv 2310.11230) in plain PyTorch, with icefall's parameter names.

Knows nothing of LLMs. Shapes everywhere: B batch, T frames, C channels, H heads; lengths are
int64 tensors (B,) of valid frames.
"""

from speechllm.zipformer.checkpoint import load_encoder, save_encoder
from speechllm.zipformer.encoder import ZipformerEncoder
from speechllm.zipformer.sizes import SIZES, ZipformerConfig

__all__ = ["SIZES", "ZipformerConfig", "ZipformerEncoder", "load_encoder", "save_encoder"]
