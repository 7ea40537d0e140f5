"""Sizes of the Zipformer: the released ones, and `tiny` for small corpora; its frame counts."""

from dataclasses import dataclass, fields
from typing import TypeVar

Frames = TypeVar("Frames")  # int, numpy array or tensor of int64
MIN_FEATURE_FRAMES = 9  # needed for a single output frame


def frontend_out_lens(feature_lens: Frames) -> Frames:
    """Return the frames after the convolutions, 50 per second, for feature frames at 100."""
    return (feature_lens - 7) // 2


def encoder_out_lens(feature_lens: Frames) -> Frames:
    """Return the frames of the encoder's output, 25 per second, for feature frames at 100."""
    return (frontend_out_lens(feature_lens) + 1) // 2


@dataclass(frozen=True)
class ZipformerConfig:
    """Sizes of an encoder; each tuple has one entry per stack, or a single one for all stacks."""

    num_encoder_layers: tuple[int, ...]
    downsampling_factor: tuple[int, ...]
    feedforward_dim: tuple[int, ...]
    num_heads: tuple[int, ...]
    encoder_dim: tuple[int, ...]
    encoder_unmasked_dim: tuple[int, ...]
    cnn_module_kernel: tuple[int, ...]
    query_head_dim: tuple[int, ...] = (32,)
    value_head_dim: tuple[int, ...] = (12,)
    pos_head_dim: tuple[int, ...] = (4,)
    frontend_channels: int = 128  # in all released models
    pos_dim: int = 48
    feature_dim: int = 80

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) == 1:
                object.__setattr__(self, field.name, value * len(self.encoder_dim))


_COMMON = dict(downsampling_factor=(1, 2, 4, 8, 4, 2), cnn_module_kernel=(31, 31, 15, 15, 15, 31))

SIZES = {
    "tiny": ZipformerConfig(
        num_encoder_layers=(1, 1, 1),
        downsampling_factor=(2, 4, 2),
        feedforward_dim=(256, 384, 256),
        num_heads=(4,),
        encoder_dim=(96, 144, 96),
        encoder_unmasked_dim=(64, 96, 64),
        cnn_module_kernel=(31, 15, 31),
        frontend_channels=16,
    ),
    "small": ZipformerConfig(
        num_encoder_layers=(2, 2, 2, 2, 2, 2),
        feedforward_dim=(512, 768, 768, 768, 768, 768),
        num_heads=(4, 4, 4, 8, 4, 4),
        encoder_dim=(192, 256, 256, 256, 256, 256),
        encoder_unmasked_dim=(192,),
        **_COMMON,
    ),
    "medium": ZipformerConfig(
        num_encoder_layers=(2, 2, 3, 4, 3, 2),
        feedforward_dim=(512, 768, 1024, 1536, 1024, 768),
        num_heads=(4, 4, 4, 8, 4, 4),
        encoder_dim=(192, 256, 384, 512, 384, 256),
        encoder_unmasked_dim=(192, 192, 256, 256, 256, 192),
        **_COMMON,
    ),
    "large": ZipformerConfig(
        num_encoder_layers=(2, 2, 4, 5, 4, 2),
        feedforward_dim=(512, 768, 1536, 2048, 1536, 768),
        num_heads=(4, 4, 4, 8, 4, 4),
        encoder_dim=(192, 256, 512, 768, 512, 256),
        encoder_unmasked_dim=(192, 192, 256, 320, 256, 192),
        **_COMMON,
    ),
}
