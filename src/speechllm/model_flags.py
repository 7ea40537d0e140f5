"""From flags to a SpeechLLM: what training and decoding say alike."""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from speechllm.errors import InputError
from speechllm.flags import comma_list, str2bool
from speechllm.llm import check_llm_path, load_llm, prepare_llm
from speechllm.model import SpeechLLM
from speechllm.prompt import chat_ids
from speechllm.zipformer import SIZES, load_encoder


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--llm-path", default="models/qwen2-1.5b-instruct", help="a directory or a hub name")
    add("--speech-encoder-type", help=f"{'|'.join(SIZES)}, comma-separated for several")
    add("--speech-encoder-path", help="pretrained.pt, comma-separated for several")
    add("--speech-encoder-bpe-path",
        help="bpe.model of each encoder, or one of all: decoding drafts with it")  # fmt: skip
    add("--encoder-projector-ds-rate", type=int, default=4,
        help="encoder frames in one speech embedding")  # fmt: skip
    add("--use-flash-attn", type=str2bool, default=False, help="flash-attn instead of SDPA")


def encoder_files(args) -> list[tuple[str, str]]:
    """(path, size) of each encoder; one size stands for all.

    Raises:
      ValueError: the number of sizes is neither one nor that of the paths.
    """
    paths, sizes = comma_list(args.speech_encoder_path), comma_list(args.speech_encoder_type)
    if len(sizes) == 1:
        sizes = sizes * len(paths)
    if not paths or len(sizes) != len(paths):
        raise InputError(
            f"--speech-encoder-type names {len(sizes)} encoders, "
            f"--speech-encoder-path {len(paths)}"
        )
    return list(zip(paths, sizes))


def check_model_files(args) -> None:
    """What can be known of the model before any of it is loaded.

    Raises:
      FileNotFoundError, ValueError: one sentence naming the file.
    """
    if args.encoder_projector_ds_rate < 1:
        raise InputError(
            f"--encoder-projector-ds-rate {args.encoder_projector_ds_rate} must be at least 1"
        )
    check_llm_path(args.llm_path)
    for path, size in encoder_files(args):
        if not Path(path).is_file():
            raise FileNotFoundError(f"encoder {path} is missing (see local/download_models.sh)")
        if size not in SIZES:
            raise InputError(f"unknown encoder size {size!r}: choose from {', '.join(SIZES)}")


def build_model(
    args,
    llm_dtype: torch.dtype,
    encoder_dtype: torch.dtype,
    unfreeze_llm: bool = True,
    unfreeze_encoder: bool = False,
    encoder_feature_mask: bool = True,
) -> tuple[SpeechLLM, PreTrainedTokenizerBase]:
    """The model the flags describe, on the CPU, and its tokenizer with the speech tokens.

    `encoder_dtype` is of frozen encoders.
    """
    encoders = [load_encoder(path, size) for path, size in encoder_files(args)]
    if not unfreeze_encoder:
        encoders = [encoder.freeze(encoder_dtype) for encoder in encoders]
    llm, tokenizer = load_llm(args.llm_path, llm_dtype, args.use_flash_attn)
    llm = prepare_llm(llm, unfreeze_llm, args.use_lora)
    model = SpeechLLM(
        encoders,
        llm,
        chat_ids(tokenizer),
        ds_rate=args.encoder_projector_ds_rate,
        encoder_feature_mask=encoder_feature_mask,
    )
    return model, tokenizer
