"""Load the LLM and its tokenizer, and select its trainable parameters."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from speechllm.errors import InputError, first_line
from speechllm.models.config import ONE_ENCODER, ModelConfig, check_llm_path
from speechllm.models.int8 import INT8_FILE, is_int8, load_int8
from speechllm.models.prompt import add_speech_tokens
from speechllm.precision import auto_dtype


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Raise InputError for any error of transformers, the hub, safetensors or json."""
    try:
        yield
    except Exception as error:
        raise InputError(f"the LLM cannot be loaded from {path}: {first_line(error)}") from None


def fastest_dtype(path: str) -> torch.dtype:
    """Return the dtype in which this machine computes the LLM fastest; see `auto_dtype`."""
    with _loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return auto_dtype(getattr(config, "hidden_size", 0))  # `load_llm` refuses multimodal LLMs


def load_llm(
    path: str, dtype: torch.dtype = torch.float32, use_flash_attn: bool = False, device: str = "cpu"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the LLM with weights in `dtype`, and its tokenizer with the speech tokens added.

    Args:
      path: a local directory, possibly with int8 weights, or a Hugging Face hub name.

    Raises:
      FileNotFoundError: the directory is missing.
      InputError: the LLM is incomplete, is not a causal text LLM, needs custom code, or has no
        safetensors file or no ChatML tokens.
    """
    check_llm_path(path)
    # None: sdpa if the LLM supports it; flash-attn does not support "meta"
    attention = "flash_attention_2" if use_flash_attn and device != "meta" else None
    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if (Path(path) / INT8_FILE).is_file():
            llm, missing = load_int8(path, dtype, attention), []
        else:
            llm, loaded = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,  # True would run the model's own code
                use_safetensors=True,  # never pickles
                output_loading_info=True,
                device_map=None if device == "cpu" else device,
            )
            missing = loaded["missing_keys"]  # transformers initializes them randomly
    if missing:
        raise InputError(f"the LLM in {path} lacks {len(missing)} weights, e.g. {min(missing)}")
    if not hasattr(llm.config, "max_position_embeddings"):
        kind = llm.config.model_type
        raise InputError(f"the LLM in {path} is multimodal ({kind}): use a text LLM")
    rows = add_speech_tokens(tokenizer)
    if rows > llm.get_input_embeddings().num_embeddings:
        add_embedding_rows(llm, rows)
    # Drop an instruct model's sampling and repetition penalty, which would alter transcripts.
    llm.generation_config = GenerationConfig()
    return llm, tokenizer


def add_embedding_rows(llm: nn.Module, rows: int) -> None:
    """Extend embedding and head to `rows` rows; new rows are the mean of the old rows."""
    old = llm.get_input_embeddings().num_embeddings
    logging.info(f"LLM: the embedding has {old} rows; {rows - old} are added for the speech tokens")
    llm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].float().mean(dim=0)


def prepare_llm(
    llm: nn.Module, unfreeze: bool, use_lora: bool, config: ModelConfig = ONE_ENCODER
) -> nn.Module:
    """Make all or none of the LLM's parameters trainable, or only LoRA matrices.

    Args:
      config: describes the LoRA matrices, which are in float32.

    Raises:
      InputError: `unfreeze` is set for int8 weights, or the LLM lacks a layer in --lora-targets.
    """
    if unfreeze and is_int8(llm):
        raise InputError(
            "the LLM has int8 weights, which cannot be trained: use --unfreeze-llm false"
        )
    llm.requires_grad_(unfreeze and not use_lora)
    if unfreeze and use_lora:
        from speechllm.models.lora import with_lora  # imports peft, which merged models do not need

        llm = with_lora(llm, config)
    total = sum(p.numel() for p in llm.parameters())
    trainable = sum(p.numel() for p in llm.parameters() if p.requires_grad)
    logging.info(f"LLM: {total} parameters, {trainable} trainable")
    return llm
