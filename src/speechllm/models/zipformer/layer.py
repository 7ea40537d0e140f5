"""Zipformer layer and its modules (arXiv 2310.11230, figure 2), batch first: (B, T, C)."""

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechllm.models.zipformer.chunks import CausalConv, DepthwiseConv, Frames
from speechllm.models.zipformer.config import ZipformerConfig
from speechllm.models.zipformer.swoosh import swoosh_l, swoosh_r


class BiasNorm(nn.Module):
    """Norm over channels that preserves length information: x / rms(x - bias) * exp(log_scale)."""

    def __init__(self, dim: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.randn(dim) * 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        scale = (x - self.bias).pow(2).mean(dim=-1, keepdim=True).rsqrt() * self.log_scale.exp()
        return (x * scale).to(x.dtype)


class Bypass(nn.Module):
    """Learned mixture of a module's input and output: orig + (x - orig) * bypass_scale."""

    def __init__(self, dim: int):
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, orig: Tensor, x: Tensor) -> Tensor:
        dtype = self.bypass_scale.dtype
        return torch.lerp(orig.to(dtype), x.to(dtype), self.bypass_scale)


class Dropout(nn.Module):
    """Dropout on (B, T, C) with a mask (B, 1, C) shared over time."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = torch.rand(x.size(0), 1, x.size(2), device=x.device) >= self.p
        return x * (keep.to(x.dtype) / (1.0 - self.p))


def scaled_linear(in_dim: int, out_dim: int, scale: float, bias: bool = True) -> nn.Linear:
    """Create a Linear with PyTorch's initial weights scaled by `scale`, and a small bias."""
    linear = nn.Linear(in_dim, out_dim, bias=bias)
    with torch.no_grad():
        linear.weight.mul_(scale)
        if bias:
            linear.bias.uniform_(-0.1 * scale, 0.1 * scale)
    return linear


def positional_embedding(num_frames: int, dim: int, device=None, left: int = 0) -> Tensor:
    """Return float32 embeddings (L + 2T, dim) of the offsets -(L + T - 1) to T.

    `left` is L, the number of frames before a chunk. Offset T is unused; it avoids a special case
    for T = 1 in `relative_shift`.
    """
    size = 1 << (num_frames + left - 1).bit_length()
    return _embeddings(size, dim, device)[size - num_frames - left : size + num_frames]


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # the cached result may also be used in training
def _embeddings(size: int, dim: int, device: torch.device | None) -> Tensor:
    """Return embeddings of offsets -(N - 1) to N; N = `size` is a power of 2, so few are cached."""
    offsets = torch.arange(1 - size, size + 1, device=device, dtype=torch.float32)
    length = math.sqrt(dim)
    compressed = length * offsets.sign() * ((offsets.abs() + length) / length).log()
    angle = (compressed / (dim / (2.0 * math.pi))).atan()
    angles = angle[:, None] * torch.arange(1, dim // 2 + 1, device=device)
    embedding = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
    embedding[:, -1] = 1.0
    return embedding


def relative_shift(x: Tensor) -> Tensor:
    """Convert scores by offset (…, T, L + 2T) to scores by source frame (…, T, L + T).

    Row t of the result starts at column T - 1 - t of the input, that is, at offset -L - t.
    """
    num_frames, num_offsets = x.shape[-2:]
    flat = x.flatten(-2)[..., num_frames - 1 : -1]
    return flat.unflatten(-1, (num_frames, num_offsets - 1))[..., : num_offsets - num_frames]


class AttentionWeights(nn.Module):
    """Computes self-attention weights (B, H, T, L + T) from content and relative position."""

    def __init__(self, dim: int, heads: int, query_dim: int, pos_head_dim: int, pos_dim: int):
        super().__init__()
        self.heads = heads
        self.sizes = (heads * query_dim, heads * query_dim, heads * pos_head_dim)
        self.in_proj = scaled_linear(dim, sum(self.sizes), query_dim**-0.25)
        self.linear_pos = scaled_linear(pos_dim, heads * pos_head_dim, 0.05, bias=False)

    def forward(self, x: Tensor, pos_emb: Tensor, frames: Frames) -> Tensor:
        """Return weights (0 outside `frames.sources`); x (B, T, C), pos_emb (L + 2T, pos_dim)."""
        q, k, p = self.in_proj(x).split(self.sizes, dim=-1)
        k = frames.with_history(k)
        q, k, p = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, head dim)
            for part in (q, k, p)
        )
        r = self.linear_pos(pos_emb).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
        scores = q @ k.transpose(-1, -2) + relative_shift(p @ r)  # r (H, head dim, L + 2T)
        scores = torch.where(frames.sources[:, None], scores, -1000.0)
        if scores.requires_grad:  # the gradient of nearly uniform weights needs float32
            return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
        # The same result in one kernel, which computes in float32; `softmax` is cast by autocast.
        return torch._softmax(scores, dim=-1, half_to_float=False)


class SelfAttention(nn.Module):
    """Sum of values weighted by given attention weights: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, heads: int, value_dim: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(dim, heads * value_dim)
        self.out_proj = scaled_linear(heads * value_dim, dim, 0.05)

    def forward(self, x: Tensor, weights: Tensor, frames: Frames) -> Tensor:
        values = frames.with_history(self.in_proj(x))
        values = values.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out_proj((weights @ values).transpose(1, 2).flatten(2))


class NonlinAttention(nn.Module):
    """Gated values weighted by the first attention head: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * hidden_dim)
        self.out_proj = scaled_linear(hidden_dim, dim, 0.05)

    def forward(self, x: Tensor, first_head: Tensor, frames: Frames) -> Tensor:
        s, x, y = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj((first_head @ frames.with_history(x * s.tanh())) * y)


class FeedForward(nn.Module):
    """Feed-forward module with SwooshL activation: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.in_proj = nn.Linear(dim, hidden_dim)
        self.dropout = Dropout(dropout)
        self.out_proj = scaled_linear(hidden_dim, dim, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(swoosh_l(self.in_proj(x))))


class ConvModule(nn.Module):
    """Gated depthwise convolution over time: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, kernel: int, causal: bool):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.causal = causal
        self.depthwise_conv = (
            CausalConv(dim, kernel) if causal else DepthwiseConv(dim, kernel, padding=kernel // 2)
        )
        self.out_proj = scaled_linear(dim, dim, 0.05)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = F.glu(self.in_proj(x)) * frames.valid[:, :, None]
        x = self.depthwise_conv(x, frames) if self.causal else self.depthwise_conv(x)
        return self.out_proj(swoosh_r(x))


class ZipformerLayer(nn.Module):
    """Zipformer layer; the attention weights are computed once and used three times."""

    def __init__(self, config: ZipformerConfig, stack: int, dropout: float):
        super().__init__()
        dim, heads = config.encoder_dim[stack], config.num_heads[stack]
        feedforward_dim, kernel = config.feedforward_dim[stack], config.cnn_module_kernel[stack]
        self.self_attn_weights = AttentionWeights(
            dim, heads, config.query_head_dim[stack], config.pos_head_dim[stack], config.pos_dim
        )
        self.self_attn1 = SelfAttention(dim, heads, config.value_head_dim[stack])
        self.self_attn2 = SelfAttention(dim, heads, config.value_head_dim[stack])
        self.nonlin_attention = NonlinAttention(dim, 3 * dim // 4)
        self.feed_forward1 = FeedForward(dim, feedforward_dim * 3 // 4, dropout)
        self.feed_forward2 = FeedForward(dim, feedforward_dim, dropout)
        self.feed_forward3 = FeedForward(dim, feedforward_dim * 5 // 4, dropout)
        self.conv_module1 = ConvModule(dim, kernel, config.causal)
        self.conv_module2 = ConvModule(dim, kernel, config.causal)
        self.norm = BiasNorm(dim)
        self.bypass = Bypass(dim)
        self.bypass_mid = Bypass(dim)
        # Unused, but part of icefall's state dicts.
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5), requires_grad=False)

    def forward(self, x: Tensor, pos_emb: Tensor, frames: Frames) -> Tensor:
        """Return (B, T, C) for x (B, T, C) and pos_emb (L + 2T, pos_dim)."""
        orig = x
        weights = self.self_attn_weights(x, pos_emb, frames)
        x = x + self.feed_forward1(x)
        x = x + self.nonlin_attention(x, weights[:, 0], frames)
        x = x + self.self_attn1(x, weights, frames)
        x = x + self.conv_module1(x, frames)
        x = x + self.feed_forward2(x)
        x = self.bypass_mid(orig, x)
        x = x + self.self_attn2(x, weights, frames)
        x = x + self.conv_module2(x, frames)
        x = x + self.feed_forward3(x)
        return self.bypass(orig, self.norm(x))
