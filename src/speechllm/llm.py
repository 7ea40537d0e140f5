"""Qwen2 from a directory or the hub, with LoRA or without, and its tokenizer."""

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from speechllm.errors import InputError
from speechllm.int8 import INT8_FILE, is_int8, load_int8
from speechllm.lora import with_lora
from speechllm.prompt import add_speech_tokens


def load_llm(
    path: str,
    dtype: torch.dtype = torch.float32,
    use_flash_attn: bool = False,
    device: str = "cpu",
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The LLM with its weights in `dtype`, and its tokenizer with the speech tokens.

    Args:
      path: a local directory, which may hold weights in int8, or a name on the Hugging Face hub.
      device: "meta" gives shapes without weights, from a look at which weights there are.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: what is there (or on the hub) is not whole, no causal LLM, needs code of its own,
        or has no safetensors; the tokenizer has no room for the speech tokens.
    """
    check_llm_path(path)
    attention = "flash_attention_2" if use_flash_attn else "sdpa"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if (Path(path) / INT8_FILE).is_file():
            llm, missing = load_int8(path, dtype, attention), []
        else:
            llm, loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,  # else it would ask
                use_safetensors=True,  # no pickles
                output_loading_info=True,
                device_map=None if device == "cpu" else device,
            )
            missing = loaded["missing_keys"]  # transformers would go on with random numbers
    except Exception as error:  # transformers, the hub, safetensors and json have their own each
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"the LLM cannot be loaded from {path}: {reason}") from None
    if missing:
        raise InputError(
            f"the LLM in {path} lacks {len(missing)} of its weights, such as {min(missing)}"
        )
    add_speech_tokens(tokenizer, llm.get_input_embeddings().num_embeddings)
    # An instruct model's own sampling and repetition penalty must not reach a transcript.
    llm.generation_config = GenerationConfig()
    return llm, tokenizer


def prepare_llm(llm: nn.Module, unfreeze: bool, use_lora: bool) -> nn.Module:
    """What of the LLM is trained: nothing, LoRA matrices in float32, or everything.

    Raises:
      ValueError: something of an LLM in int8.
    """
    if unfreeze and is_int8(llm):
        raise InputError(
            "the LLM has weights in int8, beside which nothing is trained (see --unfreeze-llm)"
        )
    llm.requires_grad_(unfreeze and not use_lora)
    if unfreeze and use_lora:
        llm = with_lora(llm)
    trained = sum(p.numel() for p in llm.parameters() if p.requires_grad)
    logging.info(f"LLM: {sum(p.numel() for p in llm.parameters())} parameters, {trained} trained")
    return llm


def check_llm_path(path: str) -> None:
    """A path that is no hub name must exist; the hub is not asked for it."""
    local = path.startswith((".", "/", "models/", "exp/")) or path.count("/") > 1
    if local or Path(path).exists():
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"LLM directory {path} is missing or has no config.json")
