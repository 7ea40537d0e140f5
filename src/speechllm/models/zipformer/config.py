"""Zipformer sizes (the released sizes, and `tiny` for small corpora), chunks and frame counts.

A causal encoder can use any chunk size (see `Chunking`), chosen per forward pass.
"""

from dataclasses import dataclass, field, fields
from itertools import product
from typing import NamedTuple, TypeVar

from speechllm.cli import comma_list, flag_name
from speechllm.errors import InputError

Frames = TypeVar("Frames")  # int, numpy array or tensor of int64
MIN_FEATURE_FRAMES = 9  # needed for a single output frame
CAUSAL_CONV = "depthwise_conv.causal_conv.weight"  # parameter that only causal encoders have


def frontend_out_lens(feature_lens: Frames) -> Frames:
    """Return the number of frontend frames (50 per second) for feature frames (100 per second)."""
    return (feature_lens - 7) // 2


def encoder_out_lens(feature_lens: Frames) -> Frames:
    """Return the number of output frames (25 per second) for feature frames (100 per second)."""
    return (frontend_out_lens(feature_lens) + 1) // 2


@dataclass(frozen=True)
class ZipformerConfig:
    """Encoder sizes; each tuple has one entry per stack, or a single entry for all stacks."""

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
    causal: bool = field(default=False, repr=False)  # visible in the parameter names

    def __post_init__(self):
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) == 1:
                object.__setattr__(self, name, value * len(self.encoder_dim))


class Chunking(NamedTuple):
    """Chunks of a causal encoder, in frames at 50 per second; -1: no limit.

    A frame attends to its own chunk and to `left_context` earlier frames, rounded down to whole
    chunks but at least one; with `chunk_size` -1, to the whole utterance.
    """

    chunk_size: int = -1
    left_context: int = -1

    @property
    def left_chunks(self) -> int | None:
        """Number of earlier chunks that a frame attends to; None for all."""
        return None if self.left_context < 0 else max(1, self.left_context // self.chunk_size)

    def __str__(self) -> str:
        """Return a file name component such as `chunk32-left128`; "" for whole utterances."""
        left = "" if self.left_context < 0 else f"-left{self.left_context}"
        return "" if self.chunk_size < 0 else f"chunk{self.chunk_size}{left}"

    def check(self, config: ZipformerConfig) -> None:
        """Raise InputError unless an encoder with this configuration supports the chunking."""
        size, left = f"--chunk-size {self.chunk_size}", self.left_context
        if self.chunk_size < 0:
            return
        if not config.causal:
            raise InputError(
                f"{size}: the encoder is not causal (pretrain_encoder.py --causal true)"
            )
        for factor in (2, *config.downsampling_factor):  # 2: after the last stack
            if self.chunk_size % factor:
                raise InputError(
                    f"{size} is not a multiple of {factor}, the downsampling of a stack"
                )
        stacks = zip(config.cnn_module_kernel, config.downsampling_factor)
        needed = max(kernel // 2 * factor for kernel, factor in stacks)
        if 0 <= left < needed:
            raise InputError(
                f"--left-context-frames {left} is too short: the convolutions need {needed}"
            )


OFFLINE = Chunking()


def parse_chunkings(chunk_sizes: str, left_contexts: str) -> tuple[Chunking, ...]:
    """Combine comma-separated chunk sizes and left contexts; the last value is the default.

    Values that are neither positive nor -1 raise InputError.
    """
    given = {"--chunk-size": chunk_sizes, "--left-context-frames": left_contexts}
    values = []
    for flag, text in given.items():
        try:
            values.append([int(one) for one in comma_list(text)])
        except ValueError:
            values.append([])
        if not values[-1] or any(n != -1 and n < 1 for n in values[-1]):
            raise InputError(f"{flag} {text} must be positive numbers or -1, comma-separated")
    return tuple(OFFLINE if size < 0 else Chunking(size, left) for size, left in product(*values))


_COMMON = dict(downsampling_factor=(1, 2, 4, 8, 4, 2), cnn_module_kernel=(31, 31, 15, 15, 15, 31))

AUTO = "auto"  # read the sizes from the checkpoint
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


def config_from_shapes(
    shapes: dict[str, tuple[int, ...]],
    num_heads: tuple[int, ...] = (),
    encoder_unmasked_dim: tuple[int, ...] = (),
) -> ZipformerConfig:
    """Derive an encoder's sizes from the shapes of its parameters.

    Args:
      num_heads: per stack, or one number for all; by default derived from icefall's head sizes.
      encoder_unmasked_dim: likewise; by default the smallest dimension of a stack.

    Raises:
      InputError: the shapes are not those of a Zipformer, or not divisible by the heads.
    """
    number = len({key.split(".")[2] for key in shapes if key.startswith("encoder.encoders.")})
    try:
        stacks = [_stack_sizes(shapes, i, num_heads) for i in range(number)]
        channels = shapes["encoder_embed.conv.7.weight"][0]
        frequencies = shapes["encoder_embed.out.weight"][1] // channels  # see Frontend
        sizes = {name: tuple(stack[name] for stack in stacks) for name in stacks[0]}
    except (IndexError, KeyError) as error:
        raise InputError(f"its parameters are not those of a Zipformer ({error})") from None
    [pos_dim, *_] = sizes.pop("pos_dim")
    unmasked = encoder_unmasked_dim or (min(sizes["encoder_dim"]),)
    for name, given in (("num_heads", num_heads), ("encoder_unmasked_dim", unmasked)):
        if given and len(given) not in (1, number):
            raise InputError(f"{flag_name(name)} has {len(given)} numbers for {number} stacks")
    return ZipformerConfig(
        **sizes,
        encoder_unmasked_dim=unmasked,
        frontend_channels=channels,
        pos_dim=pos_dim,
        feature_dim=4 * frequencies + 4,
        causal=any(key.endswith(CAUSAL_CONV) for key in shapes),
    )


def _stack_sizes(
    shapes: dict[str, tuple[int, ...]], stack: int, num_heads: tuple[int, ...]
) -> dict[str, int]:
    prefix = f"encoder.encoders.{stack}."
    factor = shapes.get(f"{prefix}downsample.bias", (1,))[0]
    layers = f"{prefix}layers." if factor == 1 else f"{prefix}encoder.layers."
    first = f"{layers}0."
    pos, pos_dim = shapes[f"{first}self_attn_weights.linear_pos.weight"]
    all_queries = shapes[f"{first}self_attn_weights.in_proj.weight"][0] - pos
    values = shapes[f"{first}self_attn1.in_proj.weight"][0]
    conv = f"{first}conv_module1.depthwise_conv."
    kernel = shapes.get(f"{conv}chunkwise_conv.weight") or shapes[f"{conv}weight"]
    heads = num_heads[min(stack, len(num_heads) - 1)] if num_heads else pos // 4
    usual = (heads * 64, heads * 12) == (all_queries, values)
    if heads < 1 or any(n % heads for n in (pos, all_queries // 2, values)):
        raise InputError(f"stack {stack + 1} cannot have {heads} heads: see --num-heads")
    if not num_heads and not usual:
        raise InputError("its heads do not have the usual dimensions: give --num-heads")
    return {
        "num_encoder_layers": len({key[len(layers):].split(".")[0]
                                   for key in shapes if key.startswith(layers)}),
        "downsampling_factor": factor,
        "feedforward_dim": shapes[f"{first}feed_forward2.in_proj.weight"][0],
        "num_heads": heads,
        "encoder_dim": shapes[f"{first}norm.bias"][0],
        "cnn_module_kernel": kernel[-1],
        "query_head_dim": all_queries // 2 // heads,
        "value_head_dim": values // heads,
        "pos_head_dim": pos // heads,
        "pos_dim": pos_dim,
    }  # fmt: skip
