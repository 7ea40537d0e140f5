"""Write a trained model to one relocatable directory, without pickled files:

    config.json, model.safetensors, tokenizer…  the LLM with LoRA merged: a plain Qwen2
    model.safetensors.index.json                index of the LLM's weights only, for vLLM
    projector.safetensors                       projectors
    encoders/1/model.safetensors, bpe.model     one folder per encoder, with its CTC head
    model.json                                  ModelConfig

With int8, model-int8.safetensors (see speechllm/models/int8.py) replaces model.safetensors.
"""

import copy
import dataclasses
import json
import logging
import shutil
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from speechllm.errors import InputError
from speechllm.io import check_space
from speechllm.models.config import (
    INDEX_FILE,
    MAX_NEW_TOKENS,
    VLLM_MODEL,
    ModelConfig,
    save_model_config,
)
from speechllm.models.identity import content_hashes
from speechllm.models.int8 import INT8_FILE, int8_state
from speechllm.models.lora import ADAPTER
from speechllm.models.speech_llm import SpeechLLM
from speechllm.models.state_dict import trainable_state

PROJECTOR, ENCODER, BPE = "projector.safetensors", "model.safetensors", "bpe.model"
WEIGHTS = "model.safetensors"


def write_lora(llm: PeftModel, folder: Path) -> None:
    """Write the LoRA matrices in float32, for `PeftModel.from_pretrained`."""
    config = copy.deepcopy(llm.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(llm, save_embedding_layers=False)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_model(
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    int8: bool,
) -> None:
    """Write a trained model to an empty folder; `model` is converted in place.

    Args:
      config: the experiment's configuration.
      dtype: dtype of the LLM's weights and the encoders' linear layers.
      int8: store the LLM's weights in 8 bits.

    Raises:
      InputError: disk space is insufficient, or a weight is not finite in `dtype`.
    """
    model.llm = merge_lora(model.llm, dtype).requires_grad_(False)
    for encoder in model.encoder:
        encoder.freeze(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    check_space(folder.parent, size, "the model")
    write_llm(model, tokenizer, int8, folder)
    paths = write_encoders(model, config.bpe_paths, folder)
    save_file(trainable_state(model), folder / PROJECTOR)  # everything else is frozen now
    exported = dataclasses.replace(
        config,
        **paths,
        speech_encoder_type=",".join(size for _, size in config.encoder_files),
        llm_path=".",
        use_lora=False,
        unfreeze_llm=False,
        unfreeze_encoder=False,
        checkpoint=PROJECTOR,
        llm_hash=None,
        encoder_hashes=content_hashes(
            ",".join(str(folder / path) for path in paths["speech_encoder_path"].split(","))
        ),
    )
    save_model_config(exported, folder)
    for licence in Path(config.llm_path).glob("LICENSE*"):
        shutil.copyfile(licence, folder / licence.name)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.rglob("*.safetensors"):  # save_file makes them readable by the owner only
        path.chmod(mode)


def merge_lora(llm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a plain LLM in `dtype`, after merging LoRA in the precision of `llm`."""
    if hasattr(llm, "peft_config"):
        llm = llm.merge_and_unload()
    llm = llm.to(dtype)
    for name, weight in llm.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"{name} contains NaN or infinity in {dtype}")
    return llm


def write_llm(
    model: SpeechLLM, tokenizer: PreTrainedTokenizerBase, int8: bool, folder: Path
) -> None:
    """Write the LLM and the tokenizer with speech tokens, for `from_pretrained`."""
    llm, chat = model.llm, model.chat
    llm.generation_config = GenerationConfig(
        eos_token_id=sorted({*chat.ends}), pad_token_id=chat.pad, max_new_tokens=MAX_NEW_TOKENS
    )
    if int8:
        save_file(int8_state(llm), folder / INT8_FILE)
    else:
        llm.save_pretrained(folder)
        write_index(folder)
    # transformers uses model_type instead. With the LLM's class here, vLLM would serve the LLM
    # alone when the plugin is absent or broken.
    llm.config.architectures = [VLLM_MODEL]
    llm.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_index(folder: Path) -> None:
    """Write an index of the LLM's weights, unless they are sharded: shards come with an index.

    Without an index, vLLM reads every safetensors file in the directory, including the projectors.
    """
    if not (folder / INDEX_FILE).exists():
        with safe_open(folder / WEIGHTS, "pt") as weights:
            weight_map = dict.fromkeys(weights.keys(), WEIGHTS)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_encoders(model: SpeechLLM, bpe_paths: list[str], folder: Path) -> dict[str, str]:
    """Write `encoders/<number>/` and return the paths for model.json."""
    paths, bpes = [], []
    bpe_paths = bpe_paths * len(model.encoder)  # a single path applies to all encoders
    for k, encoder in enumerate(model.encoder):
        own = Path("encoders") / str(k + 1)
        (folder / own).mkdir(parents=True)
        save_file(encoder.state_dict(), folder / own / ENCODER)
        paths.append(str(own / ENCODER))
        bpes.append(str(own / BPE))
        if bpe_paths and Path(bpe_paths[k]).is_file():
            shutil.copyfile(bpe_paths[k], folder / own / BPE)
        elif bpe_paths:
            logging.warning(
                f"{bpe_paths[k]} is missing: decoding cannot use that encoder's CTC head"
            )
    has_bpe = any((folder / path).exists() for path in bpes)
    return {
        "speech_encoder_path": ",".join(paths),
        "speech_encoder_bpe_path": ",".join(bpes) if has_bpe else "",
    }
