"""Chunks in a causal Zipformer: attention mask, depthwise convolution, state between chunks.

The same layers process whole utterances with a mask (`Chunking`), or single chunks with the
preceding frames (`History`); both give the same output.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechllm.models.zipformer.config import Chunking


def valid_frames(lens: Tensor, max_len: int) -> Tensor:
    """Return a mask (B, max_len) that is True for the first `lens[b]` frames of row b."""
    return torch.arange(max_len, device=lens.device) < lens[:, None]


class History:
    """Frames before a chunk, stored per module with left context, for a batch of streams.

    Modules call `extend` in the same order for every chunk.

    Attributes:
      seen: number of frames before the chunk, at 50 per second: (B,).
      left: number of left-context frames for attention, at 50 per second.
      updated: frames to store for the next chunk; batch first.
    """

    def __init__(self, seen: Tensor, left: int, stored: list[Tensor] | None = None):
        """Initialize; without `stored`, all earlier frames are zeros."""
        self.seen, self.left, self.updated = seen, left, []
        self._stored = None if stored is None else iter(stored)

    def extend(self, x: Tensor, count: int, after: int = 0, dim: int = 1) -> Tensor:
        """Prepend the `count` frames before a chunk, and store its last `count` frames.

        Args:
          after: number of frames at the end of `x` that belong to the next chunk.
        """
        if self._stored is None:
            shape = list(x.shape)
            shape[dim] = count
            before = x.new_zeros(shape)
        else:
            before = next(self._stored)
        x = torch.cat([before, x], dim)
        self.updated.append(x.narrow(dim, x.size(dim) - after - count, count))
        return x


class Frames(NamedTuple):
    """Masks and chunk sizes for the layers of a stack.

    valid: (B, T), False for padding.
    sources: mask of the frames that each frame attends to, (B, 1 or T, L + T).
    chunk: frames per chunk.
    chunk_lens: frames per chunk of each utterance, (B,); fewer if the utterance is shorter.
    left: L, the number of frames before the chunk; 0 offline.
    """

    valid: Tensor
    sources: Tensor
    chunk: int
    chunk_lens: Tensor
    left: int = 0
    history: History | None = None

    def with_history(self, x: Tensor) -> Tensor:
        """Prepend the L frames before a chunk: (B, T, C) -> (B, L + T, C)."""
        return x if self.history is None else self.history.extend(x, self.left)


def stack_frames(lens: Tensor, num_frames: int, chunks: Chunking | History, factor: int) -> Frames:
    """Return the Frames of a stack that downsamples by `factor`; lens (B,) are its frame counts."""
    valid = valid_frames(lens, num_frames)
    sources = valid[:, None]
    if isinstance(chunks, History):
        left = chunks.left // factor
        before = torch.arange(-left, 0, device=lens.device) >= -(chunks.seen // factor)[:, None]
        sources = torch.cat([before[:, None], sources], dim=2)
        chunk_lens = lens.where(chunks.seen == 0, num_frames)
        return Frames(valid, sources, num_frames, chunk_lens, left, chunks)
    if chunks.chunk_size < 0:
        return Frames(valid, sources, num_frames, lens)
    size = chunks.chunk_size // factor
    chunk = torch.arange(num_frames, device=lens.device) // size
    distance = chunk[:, None] - chunk  # (T, T), in chunks
    allowed = distance >= 0
    if chunks.left_chunks is not None:
        allowed &= distance <= chunks.left_chunks
    return Frames(valid, sources & allowed, size, lens.clamp(max=size))


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """Convolve each channel of x (B, C, H, W) with its weight (C, 1, h, w), giving (B, C, H', W').

    CPUs compute in the weight's dtype; the result has x's.
    """
    if not x.is_cpu:
        return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))
    # In bfloat16, oneDNN 3.12 is slow, and for 16 or 144 channels its code generation may not end.
    with torch.autocast("cpu", enabled=False):
        y = F.conv2d(x.to(weight.dtype), weight, bias, padding=padding, groups=len(weight))
    return y.to(x.dtype)


class DepthwiseConv(nn.Conv1d):
    """Depthwise convolution over time: (B, T, C) -> (B, T + 2 * padding - kernel + 1, C)."""

    def __init__(self, dim: int, kernel: int, padding: int = 0):
        super().__init__(dim, dim, kernel, padding=padding, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        # CPUs are much faster with channels last, which PyTorch has only for two dimensions.
        image = x[:, None].permute(0, 3, 1, 2)  # (B, C, 1, T)
        y = depthwise_conv2d(image, self.weight[:, :, None], self.bias, (0, *self.padding))
        return y.permute(0, 2, 3, 1)[:, 0]


class CausalConv(nn.Module):
    """Depthwise convolution over past frames plus one within chunks: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.causal_conv = DepthwiseConv(dim, (kernel + 1) // 2)
        self.chunkwise_conv = DepthwiseConv(dim, kernel, padding=kernel // 2)
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, dim, kernel))

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        """Convolve `x`, which must be zero in padding."""
        context = self.causal_conv.kernel_size[0] - 1
        if frames.history is None:
            past = F.pad(x, (0, 0, context, 0))
        else:
            past = frames.history.extend(x, context)
        return self.causal_conv(past) + self._within_chunks(x, frames)

    def _within_chunks(self, x: Tensor, frames: Frames) -> Tensor:
        """Convolve each chunk separately, scaled near its edges: (B, T, C) -> (B, T, C)."""
        num_frames = x.size(1)
        groups = -(-num_frames // frames.chunk)
        x = F.pad(x, (0, 0, 0, groups * frames.chunk - num_frames))
        x = x.unflatten(1, (groups, frames.chunk))  # (B, groups, chunk, C)
        y = self.chunkwise_conv(x.flatten(0, 1)).unflatten(0, (-1, groups))
        y = y * self._scale(frames.chunk_lens, frames.chunk)[:, None]
        return y.flatten(1, 2)[:, :num_frames]

    def _scale(self, lens: Tensor, num_frames: int) -> Tensor:
        """Return the scale (N, T, C) for N chunks of lens (N,) frames: 1 far from the edges."""
        at_start, at_end = self.chunkwise_conv_scale.transpose(1, 2)  # (kernel, C)
        kernel = at_start.size(0)
        at_start = F.pad(at_start[:num_frames], (0, 0, 0, max(0, num_frames - kernel)))
        column = kernel - lens[:, None] + torch.arange(num_frames, device=lens.device)
        at_end = at_end[column.clamp(0, kernel - 1)]
        return 1 + at_start + at_end * (column >= 0)[..., None]
