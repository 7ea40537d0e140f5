"""icefall's `pretrained.pt`: every key is used, or named as belonging to a head we do not use."""

import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from speechllm.checkpoint_file import load_checkpoint, write_checkpoint
from speechllm.errors import InputError
from speechllm.zipformer.encoder import ZipformerEncoder
from speechllm.zipformer.sizes import SIZES, ZipformerConfig

UNUSED_HEADS = ("decoder", "joiner", "simple_am_proj", "simple_lm_proj", "attention_decoder")
CTC_WEIGHT = "ctc_output.1.weight"


def load_encoder(path: str | Path, size: str, dropout: float = 0.1) -> ZipformerEncoder:
    """The encoder, and its CTC head when the file has one, from `{"model": state_dict}`.

    Args:
      path: icefall's pretrained.pt, or an averaged checkpoint of the same form.
      size: a name in `SIZES`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a checkpoint, is of another size, or has keys of something else.
    """
    if size not in SIZES:
        raise InputError(f"unknown encoder size {size!r}: choose from {', '.join(SIZES)}")
    state = load_checkpoint(path)["model"]
    try:
        encoder = encoder_from_state(state, SIZES[size], dropout)
    except ValueError as error:
        others = [name for name in SIZES if name != size and _fits(state, SIZES[name])]
        hint = f"; its shapes are those of size {others[0]!r}" if others else ""
        raise InputError(f"{path} is not a Zipformer of size {size!r}: {error}{hint}") from None
    logging.info(f"{path}: {describe_unused(state)}")
    return encoder


def encoder_from_state(
    state: dict[str, Tensor], config: ZipformerConfig, dropout: float = 0.1
) -> ZipformerEncoder:
    """An encoder with the weights of an icefall state dict.

    Raises:
      ValueError: naming missing, alien or differently shaped parameters.
    """
    vocab_size = state[CTC_WEIGHT].size(0) if CTC_WEIGHT in state else None
    used = {k: v for k, v in state.items() if k.split(".")[0] not in UNUSED_HEADS}
    problem = _difference(used, config, vocab_size)
    if problem:
        raise InputError(problem)
    encoder = ZipformerEncoder(config, vocab_size, dropout)
    encoder.load_state_dict(used)
    return encoder


def save_encoder(encoder: ZipformerEncoder, path: str | Path) -> None:
    """Writes `{"model": state_dict}` under icefall's names, all of it or nothing."""
    state = {key: value.detach().cpu().clone() for key, value in encoder.state_dict().items()}
    write_checkpoint({"model": state}, path)


def describe_unused(state: dict[str, Tensor]) -> str:
    """The heads in `state`, such as "CTC head of 500 tokens; unused: decoder (2 tensors)"."""
    ctc = "no CTC head"
    if CTC_WEIGHT in state:
        ctc = f"CTC head of {state[CTC_WEIGHT].size(0)} tokens"
    groups = Counter(key.split(".")[0] for key in state)
    unused = [f"{head} ({groups[head]} tensors)" for head in UNUSED_HEADS if head in groups]
    return f"{ctc}; unused: {', '.join(unused) or 'nothing'}"


def _fits(state: dict[str, Tensor], config: ZipformerConfig) -> bool:
    return not _difference(state, config, None, prefix="encoder.")


def _difference(
    state: dict[str, Tensor], config: ZipformerConfig, vocab_size: int | None, prefix: str = ""
) -> str:
    """What keeps `state` from being the encoder of `config`: one sentence, or nothing."""
    with torch.device("meta"):
        expected = ZipformerEncoder(config, vocab_size).state_dict()
    expected = {k: tuple(v.shape) for k, v in expected.items() if k.startswith(prefix)}
    found = {k: tuple(v.shape) for k, v in state.items() if k.startswith(prefix)}
    shapes = [k for k in expected if k in found and found[k] != expected[k]]
    if shapes:
        key = shapes[0]
        return f"{key} is {found[key]} in the file and {expected[key]} in this size"
    for what, keys in (("missing", expected.keys() - found), ("alien", found.keys() - expected)):
        if keys:
            return f"{len(keys)} {what} keys such as {min(keys)}"
    return ""
