"""From flags to a SpeechLLM: what training and decoding say alike.

Training writes what its flags say of the model to `<exp-dir>/model.json`; programs that use the
model need no flag but --exp-dir then. In a directory of export.py, whose model.json names a
`checkpoint`, the paths in it are relative to the directory.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from speechllm.errors import InputError
from speechllm.flags import comma_list, str2bool
from speechllm.llm import check_llm_path, load_llm, prepare_llm
from speechllm.model import SpeechLLM
from speechllm.prompt import chat_ids
from speechllm.whole_file import whole_file
from speechllm.zipformer import SIZES, load_encoder

MODEL_FILE = "model.json"
MODEL_FLAGS = {  # what model.json holds, and of which type
    "llm_path": str,
    "speech_encoder_type": str,
    "speech_encoder_path": str,
    "speech_encoder_bpe_path": str,
    "encoder_projector_ds_rate": int,
    "prompt": str,
    "use_context": bool,
    "use_lora": bool,
    "unfreeze_llm": bool,
    "unfreeze_encoder": bool,
    "language": str,
    "command": str,  # of the training
    "checkpoint": str,  # of an exported model, in the directory
}
REPOSITORY = Path(__file__).resolve().parents[2]
PATHS = ("llm_path", "speech_encoder_path", "speech_encoder_bpe_path")
FREE_FLAGS = ("speech_encoder_bpe_path", "language", "command")  # training makes no use of them


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
    add("--prompt", default="", help="an instruction to the LLM, after the speech; published: none")
    add("--use-context", type=str2bool, default=False,
        help="after the instruction comes what the utterance's supervision has as custom "
        "`context`, such as hotwords")  # fmt: skip
    add("--use-flash-attn", type=str2bool, default=False, help="flash-attn instead of SDPA")


def take_model_file(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """What model.json in --exp-dir says, if it is there, becomes the parser's defaults.

    Raises:
      ValueError: one sentence naming the file.
    """
    parser.set_defaults(**read_model_file(parser.parse_args(argv).exp_dir))


def read_model_file(exp_dir: Path) -> dict:
    """What the model was trained with, by flag; nothing where there is no model.json.

    Raises:
      ValueError: naming the file and what is wrong in it.
    """
    path = exp_dir / MODEL_FILE
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(stored, dict):
        raise InputError(f"{path} holds no flags by name")
    for name, value in stored.items():
        if name not in MODEL_FLAGS:
            raise InputError(f"{path} has {name!r}, which is no flag of a model")
        if type(value) is not MODEL_FLAGS[name]:
            raise InputError(f"{path}: {name} is {value!r}, not {MODEL_FLAGS[name].__name__}")
    if "checkpoint" in stored:
        for name in stored.keys() & PATHS:
            stored[name] = ",".join(str(exp_dir / part) for part in comma_list(stored[name]))
        return stored
    for name in stored.keys() & PATHS:  # of a training that was begun in the repository
        parts = comma_list(stored[name])
        there = [REPOSITORY / part for part in parts]
        if not any(Path(part).exists() for part in parts) and all(map(Path.exists, there)):
            stored[name] = ",".join(map(str, there))
    return stored


def write_model_file(folder: Path, flags: dict) -> None:
    """`<folder>/model.json` of what `flags` say of the model, paths as they are."""
    stored = {name: flags[name] for name in MODEL_FLAGS if flags.get(name) is not None}
    with whole_file(folder / MODEL_FILE) as partial:
        partial.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n")


def check_same_model(args) -> None:
    """A training that goes on must be of the model that was begun.

    Raises:
      ValueError: naming both values of a flag.
    """
    for name, then in read_model_file(args.exp_dir).items():
        if name not in FREE_FLAGS and then != (now := getattr(args, name)):
            flag = "--" + name.replace("_", "-")
            now, then = (str(v).lower() if isinstance(v, bool) else v for v in (now, then))
            raise InputError(
                f"{flag} {now}: the training in {args.exp_dir} was begun with {flag} {then}"
            )


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
    device: str = "cpu",
) -> tuple[SpeechLLM, PreTrainedTokenizerBase]:
    """The model the flags describe, on the CPU, and its tokenizer with the speech tokens.

    `encoder_dtype` is of frozen encoders. On `device` "meta" the model is checked all the same, and
    has no weights.
    """
    encoders = [load_encoder(path, size).to(device) for path, size in encoder_files(args)]
    if not unfreeze_encoder:
        encoders = [encoder.freeze(encoder_dtype) for encoder in encoders]
    llm, tokenizer = load_llm(args.llm_path, llm_dtype, args.use_flash_attn, device)
    llm = prepare_llm(llm, unfreeze_llm, args.use_lora)
    with torch.device(device):
        model = SpeechLLM(
            encoders,
            llm,
            chat_ids(tokenizer, args.prompt, args.use_context),
            ds_rate=args.encoder_projector_ds_rate,
            encoder_feature_mask=encoder_feature_mask,
        )
    return model, tokenizer
