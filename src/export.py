#!/usr/bin/env python3
"""Export a trained model to one directory, which is all that decoding and serving need.

    python src/export.py --exp-dir exp/mine --epoch 10 --avg 5 --out models/mine
    python src/export.py ... --int8 true --out models/mine-for-cpu
    python src/export.py ... --dtype float16 --lora-dir exp/mine-lora --push-to-hub me/mine
    python src/transcribe.py --exp-dir models/mine talk.wav

The files are described in speechllm/models/export.py; README.md is a model card with commands and
the error rates found in --exp-dir. --lora-dir also writes the LoRA matrices separately, for
`PeftModel.from_pretrained(llm, DIR)`.
"""

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from speechllm.cli import Parser, add_options, from_args, option
from speechllm.decoding.config import CheckpointConfig
from speechllm.errors import InputError, exit_on_user_error, first_line
from speechllm.io import atomic_directory
from speechllm.models.config import ModelConfig, check_model_files, model_config

_export = partial(option, group="export")
DECODING_ONLY = ("use_encoders", "use_fp16", "use_bf16", "use_flash_attn")


@dataclass(frozen=True)
class ExportConfig:
    """Options of export.py."""

    out: Path = _export(None, "output directory, which must not exist")
    dtype: str = _export(
        "float32", "dtype of the LLM's weights and of the encoders' linear layers",
        choices=("float32", "bfloat16", "float16"),
    )  # fmt: skip
    int8: bool = _export(
        False, "store LLM weights in 8 bits: faster on a CPU; transformers alone cannot load them"
    )
    lora_dir: Path | None = _export(
        None, "also write the LoRA matrices to this directory, in peft's format"
    )
    push_to_hub: str | None = _export(
        None, "upload --out to this Hugging Face repository, private if new, with the token from "
        "HF_TOKEN or `hf auth login`",
    )  # fmt: skip


def check_options(export: ExportConfig, model: ModelConfig) -> None:
    """Check the options before loading the model."""
    check_model_files(model)
    for flag, path in (("--out", export.out), ("--lora-dir", export.lora_dir)):
        if path and path.exists():
            raise InputError(f"{flag} {path} already exists")
    if export.lora_dir and not (model.use_lora and model.unfreeze_llm):
        raise InputError(f"--lora-dir {export.lora_dir}: the model was trained without LoRA")
    if export.push_to_hub:
        check_hub(export.push_to_hub)


def check_hub(name: str) -> None:
    """Check the repository name, and that there is a token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {name}: {error}") from None
    if get_token() is None:
        raise InputError(f"--push-to-hub {name} needs a token: set HF_TOKEN or run `hf auth login`")


def push(folder: Path, name: str) -> None:
    """Upload a directory to the Hugging Face hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder)  # with the user name
    except Exception as error:  # errors of the hub and of the connection
        raise InputError(
            f"exported to {folder}, but the upload to {name} failed: {first_line(error)}"
        ) from None


def export_model(export: ExportConfig, checkpoint: CheckpointConfig, config: ModelConfig) -> str:
    """Write --lora-dir and --out; return the name of the parameters."""
    import torch

    from speechllm.decoding.load import read_parameters
    from speechllm.models.build import build_model
    from speechllm.models.export import write_lora, write_model
    from speechllm.models.int8 import is_int8
    from speechllm.models.model_card import model_card
    from speechllm.models.state_dict import load_trainable_state

    parameters, name = read_parameters(checkpoint, config.checkpoint)
    model, tokenizer = build_model(config)
    load_trainable_state(model, parameters, name)
    if is_int8(model.llm):
        raise InputError(f"{config.llm_path} is already int8: export the model it was made from")
    model.eval()
    if export.lora_dir:
        with atomic_directory(export.lora_dir) as folder:
            write_lora(model.llm, folder)
    with atomic_directory(export.out) as folder:
        dtype = getattr(torch, export.dtype)
        write_model(model, tokenizer, config, folder, dtype, export.int8)
        weights = f"int8 (LLM) and {export.dtype}" if export.int8 else export.dtype
        command = shlex.join(sys.argv)
        card = model_card(config, checkpoint.exp_dir, name, export.out, weights, command)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return name


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add_options(parser, ExportConfig, required=("out",))
    add_options(parser, CheckpointConfig, skip=DECODING_ONLY)
    add_options(parser, ModelConfig)
    args = parser.parse_args(argv)
    export, checkpoint = from_args(ExportConfig, args), from_args(CheckpointConfig, args)
    config = model_config(args, checkpoint.exp_dir)
    check_options(export, config)
    name = export_model(export, checkpoint, config)  # contains the heavy imports
    print(f"exported {name} to {export.out}")
    if export.push_to_hub:
        push(export.out, export.push_to_hub)
        print(f"uploaded to {export.push_to_hub}")


if __name__ == "__main__":
    main()
