"""icefall's `pretrained.pt`: every key is used, or named as belonging to a head we do not use."""

import logging
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

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
        raise ValueError(f"unknown encoder size {size!r}: choose from {', '.join(SIZES)}")
    state = read_model_state(path)
    try:
        encoder = encoder_from_state(state, SIZES[size], dropout)
    except ValueError as error:
        others = [name for name in SIZES if name != size and _fits(state, SIZES[name])]
        hint = f"; its shapes are those of size {others[0]!r}" if others else ""
        raise ValueError(f"{path} is not a Zipformer of size {size!r}: {error}{hint}") from None
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
        raise ValueError(problem)
    encoder = ZipformerEncoder(config, vocab_size, dropout)
    encoder.load_state_dict(used)
    return encoder


def save_encoder(encoder: ZipformerEncoder, path: str | Path) -> None:
    """Writes `{"model": state_dict}` under icefall's names, all of it or nothing."""
    state = {key: value.detach().cpu().clone() for key, value in encoder.state_dict().items()}
    partial = Path(f"{path}.partial")
    torch.save({"model": state}, partial)
    os.replace(partial, path)


def read_model_state(path: str | Path) -> dict[str, Tensor]:
    """The `model` entry of a checkpoint, loaded without running any code in the file.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or pickled file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{path} has no 'model' entry with a state dict")
    return checkpoint["model"]


def describe_unused(state: dict[str, Tensor]) -> str:
    """One sentence on the heads in `state`, such as "CTC head of 500 tokens; unused: decoder (2)"."""
    ctc = f"CTC head of {state[CTC_WEIGHT].size(0)} tokens" if CTC_WEIGHT in state else "no CTC head"
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
