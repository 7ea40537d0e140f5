"""Zipformer encoder: frontend, stacks at several frame rates, downsampling, CTC head."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechllm.errors import InputError
from speechllm.models.zipformer.chunks import History, stack_frames
from speechllm.models.zipformer.config import (
    MIN_FEATURE_FRAMES,
    OFFLINE,
    Chunking,
    ZipformerConfig,
    encoder_out_lens,
)
from speechllm.models.zipformer.ctc_head import CtcHead
from speechllm.models.zipformer.frontend import Frontend
from speechllm.models.zipformer.layer import (
    Bypass,
    ZipformerLayer,
    positional_embedding,
)
from speechllm.precision import cast_frozen

FEATURE_MASK_PROBABILITY = 0.125


class Downsample(nn.Module):
    """Learned weighted mean over groups of s frames: (B, T, C) -> (B, ceil(T / s), C)."""

    def __init__(self, factor: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Downsample; each utterance's last group is padded with the utterance's last frame."""
        factor = self.bias.numel()
        groups = (x.size(1) + factor - 1) // factor
        index = torch.arange(groups * factor, device=x.device)
        index = torch.minimum(index, (lens - 1).clamp(min=0)[:, None])  # (B, groups * s)
        x = x.gather(1, index[:, :, None].expand(-1, -1, x.size(2)))
        x = x.unflatten(1, (groups, factor))  # (B, groups, s, C)
        x = (x * self.bias.softmax(dim=0)[:, None]).sum(dim=2)
        return x, (lens + factor - 1) // factor


class Stack(nn.Module):
    """Layers at the input's frame rate: (B, T, C) -> (B, T, C)."""

    def __init__(self, layers: list[ZipformerLayer], pos_dim: int, factor: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pos_dim = pos_dim
        self.factor = factor  # downsampling of the input
        self.checkpointed = False

    def forward(
        self, x: Tensor, lens: Tensor, mask: Tensor | float, chunks: Chunking | History
    ) -> Tensor:
        frames = stack_frames(lens, x.size(1), chunks, self.factor)
        pos_emb = positional_embedding(x.size(1), self.pos_dim, x.device, frames.left).to(x.dtype)
        x = x * mask
        for layer in self.layers:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(layer, x, pos_emb, frames, use_reentrant=False) * mask
            else:
                x = layer(x, pos_emb, frames) * mask
        return x


class DownsampledStack(nn.Module):
    """Layers at a lower frame rate, upsampled and mixed with the input: (B, T, C) -> (B, T, C)."""

    def __init__(self, encoder: Stack, factor: int, dim: int):
        super().__init__()
        self.downsample = Downsample(factor)
        self.encoder = encoder
        self.out_combiner = Bypass(dim)
        self.factor = factor

    def forward(
        self, x: Tensor, lens: Tensor, mask: Tensor | float, chunks: Chunking | History
    ) -> Tensor:
        low, low_lens = self.downsample(x, lens)
        low = self.encoder(low, low_lens, mask, chunks)
        up = low.repeat_interleave(self.factor, dim=1)[:, : x.size(1)]
        return self.out_combiner(x, up)


class Zipformer(nn.Module):
    """Stacks and a final downsampling by 2: (B, T, d0) -> (B, (T + 1) // 2, max d)."""

    def __init__(self, config: ZipformerConfig, dropout: float):
        super().__init__()
        self.dims = config.encoder_dim
        self.unmasked_dims = config.encoder_unmasked_dim
        stacks = []
        for i, factor in enumerate(config.downsampling_factor):
            layers = range(config.num_encoder_layers[i])
            layers = [ZipformerLayer(config, i, dropout) for _ in layers]
            stack = Stack(layers, config.pos_dim, factor)
            if factor > 1:
                stack = DownsampledStack(stack, factor, config.encoder_dim[i])
            stacks.append(stack)
        self.encoders = nn.ModuleList(stacks)
        self.downsample_output = Downsample(2)

    def feature_masks(self, x: Tensor) -> list[Tensor]:
        """Sample a mask (B, 1, d) per stack that zeroes the upper channels of some utterances."""
        keep = torch.rand(2, x.size(0), 1, 1, device=x.device) >= FEATURE_MASK_PROBABILITY
        m1, m2 = keep[0].to(x.dtype), keep.all(dim=0).to(x.dtype)
        masks = []
        for dim, unmasked in zip(self.dims, self.unmasked_dims):
            mask = x.new_ones(x.size(0), 1, dim)
            middle = unmasked + (dim - unmasked) // 2
            mask[..., unmasked:middle] *= m1
            mask[..., middle:] *= m2
            masks.append(mask)
        return masks

    def stack_outputs(
        self,
        x: Tensor,
        lens: Tensor,
        feature_mask: bool = False,
        chunks: Chunking | History = OFFLINE,
    ) -> list[Tensor]:
        """Return each stack's output (B, T, d_i) for x (B, T, d0)."""
        masks = self.feature_masks(x) if feature_mask else [1.0] * len(self.encoders)
        outputs = []
        for stack, dim, mask in zip(self.encoders, self.dims, masks):
            x = nn.functional.pad(x, (0, dim - x.size(-1)))  # a negative number truncates
            x = stack(x, lens, mask, chunks)
            outputs.append(x)
        return outputs

    def forward(
        self, x: Tensor, lens: Tensor, feature_mask: bool, chunks: Chunking | History
    ) -> Tensor:
        outputs = self.stack_outputs(x, lens, feature_mask, chunks)
        # Each channel comes from the last stack that has it.
        pieces, dim = [outputs[-1]], self.dims[-1]
        for output in reversed(outputs[:-1]):
            if output.size(-1) > dim:
                pieces.append(output[..., dim:])
                dim = output.size(-1)
        return self.downsample_output(torch.cat(pieces, dim=-1), lens)[0]


class ZipformerEncoder(nn.Module):
    """Encodes features at 100 frames/s to 25 frames/s; optionally has a CTC head.

    An utterance's output does not depend on its batch. Parameter names are those in icefall's
    checkpoints (`encoder_embed.*`, `encoder.*`, `ctc_output.*`).
    """

    def __init__(
        self, config: ZipformerConfig, vocab_size: int | None = None, dropout: float = 0.1
    ):
        super().__init__()
        self.config = config
        self.encoder_embed = Frontend(
            config.feature_dim, config.frontend_channels, config.encoder_dim[0], dropout
        )
        self.encoder = Zipformer(config, dropout)
        self.ctc_output = CtcHead(self.output_dim, vocab_size, dropout) if vocab_size else None
        self.frozen = False
        self.chunkings: tuple[Chunking, ...] = (OFFLINE,)

    @property
    def output_dim(self) -> int:
        return max(self.config.encoder_dim)

    def freeze(self, dtype: torch.dtype = torch.float32) -> "ZipformerEncoder":
        """Freeze all parameters, with linear layers in `dtype`.

        The encoder stays in evaluation mode, even after `train()` on a parent module.
        """
        cast_frozen(self, dtype)
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def set_chunkings(self, chunkings: tuple[Chunking, ...]) -> None:
        """Set the chunkings to sample from in training; evaluation uses the last one.

        Chunkings that the encoder does not support raise InputError.
        """
        for chunking in chunkings:
            chunking.check(self.config)
        self.chunkings = chunkings

    def sample_chunking(self) -> Chunking:
        """Sample the chunking for a training batch."""
        if len(self.chunkings) == 1:
            return self.chunkings[0]
        return self.chunkings[int(torch.randint(len(self.chunkings), (), device="cpu"))]

    def checkpoint_activations(self) -> None:
        """Store only the input of each layer; the backward pass recomputes the rest."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.checkpointed = True

    def compile_layers(self) -> None:
        """Compile each layer with torch.compile, with dynamic lengths."""
        for module in self.modules():
            if isinstance(module, ZipformerLayer):
                module.compile(dynamic=True)

    def train(self, mode: bool = True) -> "ZipformerEncoder":
        return super().train(mode and not self.frozen)

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        feature_mask: bool = False,
        chunking: Chunking | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode features (B, T, 80) of lengths (B,) to (B, T / 4, output_dim) of lengths (B,).

        Args:
          feature_lens: on the CPU, like the output lengths, to avoid synchronizing with the GPU.
          feature_mask: zero upper channels of random utterances, as in the published training.
          chunking: chunks of a causal encoder, by default the last of `set_chunkings`.

        Raises:
          InputError: an utterance is too short for a single output frame.
        """
        shortest = min(features.size(1), int(feature_lens.min()))
        if shortest < MIN_FEATURE_FRAMES:
            raise InputError(
                f"features of {shortest} frames are too short: "
                f"the encoder needs at least {MIN_FEATURE_FRAMES}"
            )
        on_device = feature_lens.to(features.device, non_blocking=True)
        x, lens = self.encoder_embed(features, on_device)
        chunks = self.chunkings[-1] if chunking is None else chunking
        return self.encoder(x, lens, feature_mask, chunks), encoder_out_lens(feature_lens)
