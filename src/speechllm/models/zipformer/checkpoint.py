"""Loading of icefall's `pretrained.pt`; every key is loaded or belongs to a known unused head."""

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from speechllm.checkpoints import (
    copy_to_cpu,
    load_checkpoint,
    state_difference,
    write_checkpoint,
)
from speechllm.errors import InputError
from speechllm.models.zipformer.config import (
    AUTO,
    CAUSAL_CONV,
    SIZES,
    ZipformerConfig,
    config_from_shapes,
)
from speechllm.models.zipformer.encoder import ZipformerEncoder

UNUSED_HEADS = ("decoder", "joiner", "simple_am_proj", "simple_lm_proj", "attention_decoder")
CTC_WEIGHT = "ctc_output.1.weight"


def load_encoder(
    path: str | Path, size: str = AUTO, heads: tuple[int, ...] = (), unmasked: tuple[int, ...] = ()
) -> ZipformerEncoder:
    """Load an encoder and its CTC head, if any, from icefall's pretrained.pt or epoch-N.pt.

    Args:
      size: one of `SIZES`, or "auto".
      heads, unmasked: with "auto", sizes not given by the shapes (see `config_from_shapes`).

    Raises:
      FileNotFoundError: the file is missing.
      InputError: the file is not a checkpoint, its size differs, or keys are unexpected.
    """
    state = read_state(path)
    sizes = _sizes_for(state)
    try:
        config = _read_config(state, heads, unmasked) if size == AUTO else sizes[size]
        encoder = encoder_from_state(state, config)
    except InputError as error:
        others = [name for name in sizes if not _difference(state, sizes[name], None, "encoder.")]
        hint = f"; its shapes match size {others[0]!r}" if others and size not in others else ""
        if size == AUTO:
            raise InputError(f"{path} cannot be read as a Zipformer: {error}") from None
        raise InputError(f"{path} is not a Zipformer of size {size!r}: {error}{hint}") from None
    logging.info(f"{path}: {describe_unused(state)}")
    return encoder


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of an encoder's checkpoint, without the prefix of DDP."""
    state = load_checkpoint(path)["model"]
    return {key.removeprefix("module."): value for key, value in state.items()}


def _sizes_for(state: dict[str, Tensor]) -> dict[str, ZipformerConfig]:
    """Return `SIZES`, as causal encoders if the checkpoint is causal."""
    causal = any(key.endswith(CAUSAL_CONV) for key in state)
    return {name: replace(size, causal=causal) for name, size in SIZES.items()}


def _read_config(
    state: dict[str, Tensor], heads: tuple[int, ...], unmasked: tuple[int, ...]
) -> ZipformerConfig:
    """Return the size in `SIZES` with these shapes, or a new config if none matches."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for size in () if heads or unmasked else _sizes_for(state).values():
        with suppress(InputError):
            if config_from_shapes(shapes, size.num_heads, size.encoder_unmasked_dim) == size:
                return size
    return config_from_shapes(shapes, heads, unmasked)


def encoder_from_state(
    state: dict[str, Tensor], config: ZipformerConfig, dropout: float = 0.1
) -> ZipformerEncoder:
    """Build an encoder from an icefall state dict; raise InputError if keys or shapes differ."""
    vocab_size = state[CTC_WEIGHT].size(0) if CTC_WEIGHT in state else None
    used = {k: v for k, v in state.items() if k.split(".")[0] not in UNUSED_HEADS}
    if problem := _difference(used, config, vocab_size):
        raise InputError(problem)
    encoder = ZipformerEncoder(config, vocab_size, dropout)
    encoder.load_state_dict(used)
    return encoder


def save_encoder(encoder: ZipformerEncoder, path: str | Path) -> None:
    """Write `{"model": state_dict}` atomically, with icefall's names."""
    state = {key: copy_to_cpu(value) for key, value in encoder.state_dict().items()}
    write_checkpoint({"model": state}, path)


def describe_unused(state: dict[str, Tensor]) -> str:
    """Describe the heads in `state`: "CTC head of 500 tokens; unused: decoder (2 tensors)"."""
    ctc = f"CTC head of {len(state[CTC_WEIGHT])} tokens" if CTC_WEIGHT in state else "no CTC head"
    groups = Counter(key.split(".")[0] for key in state)
    unused = [f"{head} ({groups[head]} tensors)" for head in UNUSED_HEADS if head in groups]
    return f"{ctc}; unused: {', '.join(unused) or 'nothing'}"


def _difference(
    state: dict[str, Tensor], config: ZipformerConfig, vocab_size: int | None, prefix: str = ""
) -> str:
    with torch.device("meta"):
        encoder = ZipformerEncoder(config, vocab_size)
    found, expected = (
        {key: value for key, value in tensors.items() if key.startswith(prefix)}
        for tensors in (state, encoder.state_dict())
    )
    return state_difference(found, expected)
